import torch


def shape_rewards(score, logp, ref_logp, mask, finished, beta, no_eos_score):
    reward = torch.where(mask, -beta * (logp - ref_logp), 0.0)
    score = torch.where(finished, score, no_eos_score)
    tokens_left = mask.flip(1).cumsum(1).flip(1)
    last = mask & (tokens_left == 1)
    return reward + last * score[:, None]


def gae(reward, value, mask, gamma, lam):
    adv = torch.zeros_like(reward)
    next_adv = torch.zeros_like(reward[:, 0])
    next_value = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        inside = mask[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        adv[:, t] = torch.where(inside, delta + gamma * lam * next_adv, 0.0)
        next_adv = torch.where(inside, adv[:, t], next_adv)
        next_value = torch.where(inside, value[:, t], next_value)
    return adv, torch.where(mask, adv + value, 0.0)


def whiten(x, mask):
    n = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / n
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / n
    return centred * torch.rsqrt(variance + 1e-8)


def value_loss(value, old_value, ret, mask, clip, denom):
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    larger = torch.maximum((value - ret).square(), (clipped - ret).square())
    return 0.5 * torch.where(mask, larger, 0.0).sum() / denom
