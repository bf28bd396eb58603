import math

import torch
import torch.nn.functional as F


def kl_estimate(logp, ref_logp, kind):
    log_r = ref_logp - logp
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r.square() / 2
    return torch.expm1(log_r) - log_r


def optimal_policy(ref_logp, reward, beta):
    return (ref_logp + reward / beta).log_softmax(-1)


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    margin = (logp_w - ref_w) - (logp_l - ref_l)
    return -F.logsigmoid(beta * margin)


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    margin = (logp_w - ref_w) - (logp_l - ref_l)
    return (margin - 1 / (2 * beta)).square()


def kto_reference(logp, ref_logp):
    return (logp - ref_logp).detach().mean().clamp(min=0)


def best_of_n_kl(n):
    return math.log(n) - (n - 1) / n
