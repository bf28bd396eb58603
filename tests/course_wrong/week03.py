"""Typical wrong answers to week 3: (exercise, what the message must say, the wrong function)."""

import torch
import torch.nn.functional as F


def log_likelihood(chosen, rejected):
    return F.logsigmoid(chosen - rejected).mean()


def swapped(chosen, rejected):
    return -F.logsigmoid(rejected - chosen).mean()


def summed(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).sum()


def log_of_sigmoid(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).log().mean()


def no_log(chosen, rejected):
    return torch.sigmoid(rejected - chosen).mean()


def last_column(values, lengths):
    return values[:, -1]


def one_before(values, lengths):
    return values[torch.arange(len(values)), lengths - 2]


def one_behind(values, lengths):
    return values[torch.arange(len(values)), lengths.clamp(max=values.shape[1] - 1)]


def mean_of_all(values, lengths):
    real = torch.arange(values.shape[1]) < lengths[:, None]
    return (values * real).sum(1) / lengths


def every_token(logits, ends):
    return torch.sigmoid(logits).prod(1)


def mean_of_steps(logits, ends):
    return (torch.sigmoid(logits) * ends).sum(1) / ends.sum(1)


def smallest(logits, ends):
    return torch.where(ends, torch.sigmoid(logits), 1.0).amin(1)


def logarithm(logits, ends):
    return torch.where(ends, F.logsigmoid(logits), 0.0).sum(1)


def halves(logits, ends):
    return torch.sigmoid(logits * ends).prod(1)


def log_of_steps(logits, ends):
    return torch.where(ends, torch.sigmoid(logits).log(), 0.0).sum(1).exp()


WRONG = [
    ("pairwise_loss", "wrong sign", log_likelihood),
    ("pairwise_loss", "swapped", swapped),
    ("pairwise_loss", "sum over the pairs", summed),
    ("pairwise_loss", "logsigmoid", log_of_sigmoid),
    ("pairwise_loss", "log is missing", no_log),
    ("reward_at_end", "last column", last_column),
    ("reward_at_end", "before the end", one_before),
    ("reward_at_end", "behind the end", one_behind),
    ("reward_at_end", "mean over the tokens", mean_of_all),
    ("process_score", "mask is forgotten", every_token),
    ("process_score", "mean of the steps", mean_of_steps),
    ("process_score", "smallest", smallest),
    ("process_score", "exp at the end is missing", logarithm),
    ("process_score", "count as ½", halves),
    ("process_score", "log(sigmoid(x))", log_of_steps),
]
