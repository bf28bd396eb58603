import torch


def bandit_gradient(logits, reward):
    p = logits.softmax(0)
    average = (p * reward).sum()
    return p * (reward - average)


def reinforce_loss(logp, adv, mask, denom):
    per_token = -adv.detach()[:, None] * logp
    return torch.where(mask, per_token, 0.0).sum() / denom


def rewards_to_go(reward, mask):
    reward = torch.where(mask, reward, 0.0)
    to_go = reward.flip(1).cumsum(1).flip(1)
    return torch.where(mask, to_go, 0.0)


def leave_one_out(reward):
    others = reward.shape[1] - 1
    mean_of_others = (reward.sum(1, keepdim=True) - reward) / others
    return reward - mean_of_others
