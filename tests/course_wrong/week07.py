"""Typical wrong answers to week 7: (exercise, what the message must say, the wrong function)."""

import math

import torch
import torch.nn.functional as F


def kl_backwards(logp, ref_logp, kind):
    return {"k1": ref_logp - logp}.get(kind)


def kl_no_half(logp, ref_logp, kind):
    d = logp - ref_logp
    return {"k1": d, "k2": d.square()}.get(kind)


def k3_upside_down(logp, ref_logp, kind):
    d = logp - ref_logp
    return {"k1": d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[kind]


def k3_without_one(logp, ref_logp, kind):
    d = logp - ref_logp
    return {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d}[kind]


def tilt(normalise=True, scale=lambda r, beta: r / beta, ref=1):
    def policy(ref_logp, reward, beta):
        z = ref * ref_logp + scale(reward, beta)
        return z.log_softmax(-1) if normalise else z

    return policy


def in_probabilities(ref_logp, reward, beta):
    p = ref_logp.exp() * (reward / beta).exp()
    return (p / p.sum()).log()


def dpo(margin=lambda w, l, rw, rl: (w - rw) - (l - rl), loss=lambda m, b: -F.logsigmoid(b * m)):
    def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
        return loss(margin(logp_w, logp_l, ref_w, ref_l), beta)

    return dpo_loss


def ipo(target=lambda b: 1 / (2 * b), scale=lambda b: 1, power=2, sign=1):
    def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta):
        margin = sign * ((logp_w - ref_w) - (logp_l - ref_l))
        return (scale(beta) * margin - target(beta)) ** power

    return ipo_loss


WRONG = [
    ("kl_estimate", "sign is wrong", kl_backwards),
    ("kl_estimate", "½ is missing", kl_no_half),
    ("kl_estimate", "upside down", k3_upside_down),
    ("kl_estimate", "−1 is missing", k3_without_one),
    ("optimal_policy", "not normalised", tilt(normalise=False)),
    ("optimal_policy", "multiply the reward by beta", tilt(scale=lambda r, b: r * b)),
    ("optimal_policy", "wrong sign", tilt(scale=lambda r, b: -r / b)),
    ("optimal_policy", "reference is forgotten", tilt(ref=0)),
    ("optimal_policy", "log_softmax", in_probabilities),
    ("dpo_loss", "swapped", dpo(margin=lambda w, l, rw, rl: (l - rl) - (w - rw))),
    ("dpo_loss", "beta is forgotten", dpo(loss=lambda m, b: -F.logsigmoid(m))),
    ("dpo_loss", "reference is forgotten", dpo(margin=lambda w, l, rw, rl: w - l)),
    ("dpo_loss", "outside the sigmoid", dpo(loss=lambda m, b: -b * F.logsigmoid(m))),
    ("dpo_loss", "shape", dpo(loss=lambda m, b: -F.logsigmoid(b * m).mean())),
    ("dpo_loss", "logsigmoid", dpo(loss=lambda m, b: -torch.sigmoid(b * m).log())),
    ("ipo_loss", "yours is 1 / beta", ipo(target=lambda b: 1 / b)),
    ("ipo_loss", "yours is beta / 2", ipo(target=lambda b: b / 2)),
    ("ipo_loss", "in the target alone", ipo(scale=lambda b: b)),
    ("ipo_loss", "square is missing", ipo(power=1)),
    ("ipo_loss", "swapped", ipo(sign=-1)),
    ("kto_reference", "sign is wrong", lambda logp, ref: (ref - logp).detach().mean()),
    ("kto_reference", "must become 0", lambda logp, ref: (logp - ref).detach().mean()),
    ("kto_reference", "mean that is clamped", lambda logp, ref: (logp - ref).detach().clamp(min=0).mean()),
    ("kto_reference", "gradient flows", lambda logp, ref: (logp - ref).mean().clamp(min=0)),
    ("kto_reference", "mean over the responses", lambda logp, ref: (logp - ref).detach().sum().clamp(min=0)),
    ("best_of_n_kl", "log n alone", lambda n: math.log(n)),
    ("best_of_n_kl", "base 2", lambda n: math.log2(n) - (n - 1) / n),
    ("best_of_n_kl", "it is (n − 1)/n", lambda n: math.log(n) - 1 / n),
    ("best_of_n_kl", "is subtracted", lambda n: math.log(n) + (n - 1) / n),
]
