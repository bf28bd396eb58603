"""Typical wrong answers to week 10: (exercise, what the message must say, the wrong function)."""

import math

import torch


def fitted(result=lambda A, B, C, start: (A, B, C), ceiling=None, points=200, clamp=True):
    def fit(compute, reward, start):
        gain = reward.double() - start
        best = (math.inf,)
        middle = torch.logspace(
            math.log10(compute.min() / 5), math.log10(compute.max() * 5), 2 * points
        ).double()
        for B in torch.logspace(math.log10(0.3), 1, points).double():
            shape = 1 / (1 + (middle[:, None] / compute) ** B)
            height = (shape * gain).sum(1) / shape.square().sum(1)
            if clamp:
                height = height.clamp(0, 1 - start)
            if ceiling:
                height = torch.full_like(height, ceiling(reward) - start)
            error = (height[:, None] * shape - gain).square().sum(1)
            i = int(error.argmin())
            if error[i] < best[0]:
                best = (error[i], start + height[i].item(), B.item(), middle[i].item())
        return result(*best[1:], start)

    return fit


def distilled(direction="reverse", sign=1, masked=True, mean=False, detach=True, hold_p=False):
    def loss(student_logits, teacher_logits, mask, denom):
        logp = student_logits.log_softmax(-1)
        logq = (teacher_logits.detach() if detach else teacher_logits).log_softmax(-1)
        if direction == "forward":
            kl = (logq.exp() * (logq - logp)).sum(-1)
        else:
            p = logp.exp().detach() if hold_p else logp.exp()
            kl = (p * (logp - logq)).sum(-1)
        if masked:
            kl = torch.where(mask, kl, 0.0)
        return sign * kl.sum() / (mask.sum() if mean else denom)

    return loss


WRONG = [
    ("fit_sigmoid", "ceiling is asked for", fitted(lambda A, B, C, start: (A - start, B, C))),
    ("fit_sigmoid", "largest reward seen", fitted(ceiling=lambda reward: reward.max().item())),
    ("fit_sigmoid", "sign of B", fitted(lambda A, B, C, start: (A, -B, C))),
    ("fit_sigmoid", "upside down", fitted(lambda A, B, C, start: (A, B, 1 / C))),
    ("fit_sigmoid", "too coarse", fitted(points=4)),
    ("fit_sigmoid", "Clamp A", fitted(clamp=False)),
    ("distillation_loss", "other way round", distilled("forward")),
    ("distillation_loss", "wrong sign", distilled(sign=-1)),
    ("distillation_loss", "mask is forgotten", distilled(masked=False)),
    ("distillation_loss", "whole step", distilled(mean=True)),
    ("distillation_loss", "come to meet its student", distilled(detach=False)),
    ("distillation_loss", "part of the gradient is missing", distilled(hold_p=True)),
    ("mean_over_ranks", "mean of the GPUs' means", lambda sums, counts: (sums / counts).mean()),
    ("mean_over_ranks", "number of GPUs", lambda sums, counts: sums.mean()),
    ("mean_over_ranks", "sum of the means", lambda sums, counts: (sums / counts).sum()),
    ("mean_over_ranks", "not divided", lambda sums, counts: sums.sum()),
]
