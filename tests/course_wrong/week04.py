"""Typical wrong answers to week 4: (exercise, what the message must say, the wrong function)."""

import torch


def no_average(logits, reward):
    return logits.softmax(0) * reward


def plain_mean(logits, reward):
    return logits.softmax(0) * (reward - reward.mean())


def descent(logits, reward):
    p = logits.softmax(0)
    return p * ((p * reward).sum() - reward)


def own_probability_only(logits, reward):
    p = logits.softmax(0)
    return p * (1 - p) * reward


def positive_loss(logp, adv, mask, denom):
    return torch.where(mask, adv[:, None] * logp, 0.0).sum() / denom


def no_mask(logp, adv, mask, denom):
    return -(adv[:, None] * logp).sum() / denom


def mean_of_tokens(logp, adv, mask, denom):
    return torch.where(mask, -adv.detach()[:, None] * logp, 0.0).sum() / mask.sum()


def through_the_advantage(logp, adv, mask, denom):
    return torch.where(mask, -adv[:, None] * logp, 0.0).sum() / denom


def product_with_the_mask(logp, adv, mask, denom):
    return -(adv.detach()[:, None] * logp * mask).sum() / denom


def from_the_left(reward, mask):
    return torch.where(mask, torch.where(mask, reward, 0.0).cumsum(1), 0.0)


def one_late(reward, mask):
    reward = torch.where(mask, reward, 0.0)
    return torch.where(mask, reward.flip(1).cumsum(1).flip(1) - reward, 0.0)


def garbage_in_the_sum(reward, mask):
    return torch.where(mask, reward.flip(1).cumsum(1).flip(1), 0.0)


def all_of_it(reward, mask):
    return torch.where(mask, torch.where(mask, reward, 0.0).sum(1, keepdim=True), 0.0)


def own_in_the_baseline(reward):
    return reward - reward.mean(1, keepdim=True)


def baseline_minus_reward(reward):
    return (reward.sum(1, keepdim=True) - reward) / (reward.shape[1] - 1) - reward


def sum_of_the_others(reward):
    return reward - (reward.sum(1, keepdim=True) - reward)


def all_prompts_together(reward):
    return reward - (reward.sum() - reward) / (reward.numel() - 1)


WRONG = [
    ("bandit_gradient", "average reward is not subtracted", no_average),
    ("bandit_gradient", "plain mean", plain_mean),
    ("bandit_gradient", "sign", descent),
    ("bandit_gradient", "changes the other probabilities", own_probability_only),
    ("reinforce_loss", "wrong sign", positive_loss),
    ("reinforce_loss", "mask is forgotten", no_mask),
    ("reinforce_loss", "not by denom", mean_of_tokens),
    ("reinforce_loss", "flows into the advantage", through_the_advantage),
    ("reinforce_loss", "0 · inf is nan", product_with_the_mask),
    ("rewards_to_go", "from the left", from_the_left),
    ("rewards_to_go", "one token late", one_late),
    ("rewards_to_go", "mask is forgotten", garbage_in_the_sum),
    ("rewards_to_go", "whole reward", all_of_it),
    ("leave_one_out", "own reward in it", own_in_the_baseline),
    ("leave_one_out", "wrong sign", baseline_minus_reward),
    ("leave_one_out", "sum the other rewards", sum_of_the_others),
    ("leave_one_out", "all prompts together", all_prompts_together),
]
