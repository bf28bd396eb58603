import torch
import torch.nn.functional as F


def pairwise_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def reward_at_end(values, lengths):
    rows = torch.arange(len(values))
    return values[rows, lengths - 1]


def process_score(logits, ends):
    per_step = torch.where(ends, F.logsigmoid(logits), 0.0)
    return per_step.sum(1).exp()
