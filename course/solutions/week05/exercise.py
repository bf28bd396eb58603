import torch


def group_advantages(reward, group, eps=1e-6):
    adv = torch.zeros_like(reward)
    for number in group.unique():
        rows = group == number
        own = reward[rows]
        if own.max() > own.min():
            adv[rows] = (own - own.mean()) / (own.std() + eps)
    return adv


def token_weights(mask, agg, longest):
    w = mask.float()
    length = w.sum(1, keepdim=True)
    if agg == "token":
        return w / length.sum()
    if agg == "seq_mean":
        return w / length.clamp(min=1) / len(w)
    return w / longest / len(w)


def clipped_loss(logp, old_logp, adv, mask, w, clip_low, clip_high):
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.exp()
    unclipped = -adv[:, None] * ratio
    clipped = -adv[:, None] * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    return (w * torch.where(mask, loss, 0.0)).sum()


def sequence_ratio(logp, old_logp, mask):
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    return (log_ratio.sum(1) / mask.sum(1)).exp()
