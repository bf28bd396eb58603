"""Typical wrong answers to week 5: (exercise, what the message must say, the wrong function)."""

import torch


def per_group(reward, group, standardise):
    adv = torch.zeros_like(reward)
    for number in group.unique():
        adv[group == number] = standardise(reward[group == number])
    return adv


def wrong_way_round(reward, group, eps=1e-6):
    return per_group(reward, group, lambda r: (r.mean() - r) / (r.std() + eps))


def biased(reward, group, eps=1e-6):
    return per_group(reward, group, lambda r: (r - r.mean()) / (r.std(correction=0) + eps))


def whole_batch(reward, group, eps=1e-6):
    return (reward - reward.mean()) / (reward.std() + eps)


def without_eps(reward, group, eps=1e-6):
    return per_group(reward, group, lambda r: (r - r.mean()) / r.std())


def neighbours(reward, group, eps=1e-6):
    rows = reward.view(int(group.max()) + 1, -1)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + eps)).flatten()


def always_token(mask, agg, longest):
    return mask.float() / mask.sum()


def responses_summed(mask, agg, longest):
    w = mask.float()
    if agg == "token":
        return w / w.sum()
    return w / (w.sum(1, keepdim=True) if agg == "seq_mean" else longest)


def width(mask, agg, longest):
    w = mask.float()
    return w / w.numel() if agg == "token" else w / w.shape[1] / len(w)


def longest_here(mask, agg, longest):
    w = mask.float()
    length = w.sum(1, keepdim=True)
    if agg == "token":
        return w / w.sum()
    return w / (length if agg == "seq_mean" else length.max()) / len(w)


def both_sides(low, high):
    return 1 - low, 1 + high


def surrogate(combine, sign=1, low_high=both_sides, upside_down=False, masked=True):
    def loss(logp, old_logp, adv, mask, w, clip_low, clip_high):
        log_ratio = old_logp - logp if upside_down else logp - old_logp
        keep = mask if masked else torch.ones_like(mask)
        ratio = torch.where(keep, log_ratio, 0.0).exp()
        bounded = ratio.clamp(*low_high(clip_low, clip_high))
        per_token = sign * combine(-adv[:, None] * ratio, -adv[:, None] * bounded)
        return (w * torch.where(keep, per_token, 0.0)).sum()

    return loss


def product_outside(logp, old_logp, adv, mask, w, clip_low, clip_high):
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return (torch.maximum(-adv[:, None] * ratio, -adv[:, None] * bounded) * w * mask).sum()


def mean_again(logp, old_logp, adv, mask, w, clip_low, clip_high):
    return surrogate(torch.maximum)(logp, old_logp, adv, mask, w, clip_low, clip_high) / mask.sum()


def product_of_ratios(logp, old_logp, mask):
    return torch.where(mask, logp - old_logp, 0.0).sum(1).exp()


def arithmetic(logp, old_logp, mask):
    return (torch.where(mask, logp - old_logp, 0.0).exp() * mask).sum(1) / mask.sum(1)


def padded_width(logp, old_logp, mask):
    return torch.where(mask, logp - old_logp, 0.0).mean(1).exp()


def old_over_new(logp, old_logp, mask):
    return (torch.where(mask, old_logp - logp, 0.0).sum(1) / mask.sum(1)).exp()


WRONG = [
    ("group_advantages", "sign of mean − reward", wrong_way_round),
    ("group_advantages", "G − 1", biased),
    ("group_advantages", "whole batch", whole_batch),
    ("group_advantages", "all equal gives nan", without_eps),
    ("group_advantages", "neighbours", neighbours),
    ("token_weights", "weight of token", always_token),
    ("token_weights", "summed, and not averaged", responses_summed),
    ("token_weights", "padded width", width),
    ("token_weights", "longest response of this batch", longest_here),
    ("clipped_loss", "wrong sign", surrogate(torch.maximum, sign=-1)),
    ("clipped_loss", "upside down", surrogate(torch.maximum, upside_down=True)),
    ("clipped_loss", "nothing is clipped", surrogate(lambda free, held: free)),
    ("clipped_loss", "smaller of the two", surrogate(torch.minimum)),
    ("clipped_loss", "clipped loss alone", surrogate(lambda free, held: held)),
    ("clipped_loss", "clip_high is the upper side",
     surrogate(torch.maximum, low_high=lambda low, high: (1 - low, 1 + low))),
    ("clipped_loss", "mask is forgotten", surrogate(torch.maximum, masked=False)),
    ("clipped_loss", "divide once more", mean_again),
    ("clipped_loss", "0 · inf is nan", product_outside),
    ("sequence_ratio", "product of all ratios", product_of_ratios),
    ("sequence_ratio", "arithmetic mean", arithmetic),
    ("sequence_ratio", "padded width", padded_width),
    ("sequence_ratio", "upside down", old_over_new),
]  # fmt: skip
