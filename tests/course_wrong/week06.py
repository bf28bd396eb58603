"""Typical wrong answers to week 6: (exercise, what the message must say, the wrong function)."""

import torch


def shaped(sign=-1, own_score=False, place="last", masked=True):
    def shape(score, logp, ref_logp, mask, finished, beta, no_eos_score):
        reward = sign * beta * (logp - ref_logp)
        if masked:
            reward = torch.where(mask, reward, 0.0)
        if not own_score:
            score = torch.where(finished, score, no_eos_score)
        left = mask.flip(1).cumsum(1).flip(1)
        here = {
            "last": mask & (left == 1),
            "before": mask & (left == 2),
            "column": torch.arange(mask.shape[1]) == mask.shape[1] - 1,
            "all": mask,
        }[place]
        return reward + here * score[:, None]

    return shape


def estimate(reset=True, discount=None, minus_value=True, ret_value=1):
    def gae(reward, value, mask, gamma, lam):
        adv = torch.zeros_like(reward)
        next_adv = torch.zeros_like(reward[:, 0])
        next_value = torch.zeros_like(reward[:, 0])
        for t in reversed(range(reward.shape[1])):
            delta = reward[:, t] + gamma * next_value - (value[:, t] if minus_value else 0)
            adv[:, t] = delta + (gamma * lam if discount is None else discount(gamma, lam)) * next_adv
            if reset:
                adv[:, t] = torch.where(mask[:, t], adv[:, t], 0.0)
                next_adv = torch.where(mask[:, t], adv[:, t], next_adv)
                next_value = torch.where(mask[:, t], value[:, t], next_value)
            else:
                next_adv = adv[:, t]
                next_value = value[:, t]
        adv = torch.where(mask, adv, 0.0)
        return adv, torch.where(mask, adv + ret_value * value, 0.0)

    return gae


def unbiased(x, mask):
    y = x[mask]
    return torch.where(mask, (x - y.mean()) / (y.std() + 1e-8), 0.0)


def every_position(x, mask):
    return torch.where(mask, (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8), 0.0)


def by_row(x, mask):
    n = mask.sum(1, keepdim=True)
    mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / n
    centred = torch.where(mask, x - mean, 0.0)
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / n + 1e-8)


def garbage_outside(x, mask):
    y = x[mask]
    return (x - y.mean()) * torch.rsqrt(y.var(correction=0) + 1e-8)


def by_the_variance(x, mask):
    y = x[mask]
    return torch.where(mask, (x - y.mean()) / (y.var(correction=0) + 1e-8), 0.0)


def errors(combine, half=0.5, masked=True, around=lambda old, ret: old, mean=False):
    def loss(value, old_value, ret, mask, clip, denom):
        centre = around(old_value, ret)
        clipped = centre + (value - centre).clamp(-clip, clip)
        per_token = combine((value - ret).square(), (clipped - ret).square())
        if masked:
            per_token = torch.where(mask, per_token, 0.0)
        return half * per_token.sum() / (mask.sum() if mean else denom)

    return loss


WRONG = [
    ("shape_rewards", "wrong sign", shaped(sign=1)),
    ("shape_rewards", "replaced by no_eos_score", shaped(own_score=True)),
    ("shape_rewards", "before the end", shaped(place="before")),
    ("shape_rewards", "last column", shaped(place="column")),
    ("shape_rewards", "every token gets the score", shaped(place="all")),
    ("shape_rewards", "mask is forgotten", shaped(masked=False)),
    ("gae", "end of a row is not seen", estimate(reset=False)),
    ("gae", "gamma alone", estimate(discount=lambda gamma, lam: gamma)),
    ("gae", "lam alone", estimate(discount=lambda gamma, lam: lam)),
    ("gae", "one-step", estimate(discount=lambda gamma, lam: 0)),
    ("gae", "advantage alone", estimate(ret_value=0)),
    ("gae", "*plus*", estimate(ret_value=-1)),
    ("whiten", "n − 1", unbiased),
    ("whiten", "all positions", every_position),
    ("whiten", "each row by itself", by_row),
    ("whiten", "must be 0", garbage_outside),
    ("whiten", "by the variance", by_the_variance),
    ("value_loss", "½ is missing", errors(torch.maximum, half=1)),
    ("value_loss", "smaller error", errors(torch.minimum)),
    ("value_loss", "nothing is clipped", errors(lambda free, held: free)),
    ("value_loss", "clipped error alone", errors(lambda free, held: held)),
    ("value_loss", "mask is forgotten", errors(torch.maximum, masked=False)),
    ("value_loss", "around old_value", errors(torch.maximum, around=lambda old, ret: ret)),
    ("value_loss", "denom", errors(torch.maximum, mean=True)),
]
