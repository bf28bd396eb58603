"""The oracles: what the kernels compute, in plain torch, ten lines each. Tests run them in float64."""

import math

import torch


def log_softmax(hidden, weight, temperature, bias):
    """hidden (N, D), weight (V, D), bias (V,) or None → log-probs of the whole vocabulary (N, V)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return torch.log_softmax(logits / temperature, dim=-1)


def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None):
    """hidden (N, D), weight (V, D), targets (N,) → log-prob (N,) and entropy (N,); builds N×V logits."""
    logp = log_softmax(hidden, weight, temperature, bias)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)  # 0 · log 0 = 0
    at_target = logp.gather(1, targets[:, None]).squeeze(1)
    return at_target, entropy


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, reverse=False, bias=None,
              ref_bias=None):
    """Exact KL(policy‖reference) per position (N,), or KL(reference‖policy); builds N×V logits twice."""
    logp = log_softmax(hidden, weight, temperature, bias)
    logq = log_softmax(ref_hidden, ref_weight, temperature, ref_bias)
    if reverse:
        logp, logq = logq, logp
    terms = logp.exp() * (logp - logq)  # (N, V)
    return torch.where(logp > -torch.inf, terms, 0.0).sum(-1)


def linear_jsd(hidden, weight, ref_hidden, ref_weight, beta, temperature=1.0):
    """β KL(reference‖m) + (1−β) KL(policy‖m) per position (N,), m = β reference + (1−β) policy."""
    logp = log_softmax(hidden, weight, temperature, None)  # (N, V)
    logq = log_softmax(ref_hidden, ref_weight, temperature, None)
    parts = torch.stack((logq + math.log(beta), logp + math.log(1 - beta)))
    logm = torch.logsumexp(parts, dim=0)
    of_ref = (logq.exp() * (logq - logm)).sum(-1)
    of_policy = (logp.exp() * (logp - logm)).sum(-1)
    return beta * of_ref + (1 - beta) * of_policy


def decode_attention(q, k, v, cache_k, cache_v, pos):
    """q (B, H, hd), k, v (B, KV, hd), caches (B, KV, T, hd), pos (B,) → (B, H, hd); one head at a time."""
    _, H, hd = q.shape
    group = H // k.shape[1]  # query heads that share a key head
    out = torch.zeros_like(q)
    for b, n in enumerate(pos.tolist()):
        for h in range(H):
            kv = h // group
            keys = torch.cat((cache_k[b, kv, :n], k[b, kv : kv + 1]))  # (n + 1, hd)
            values = torch.cat((cache_v[b, kv, :n], v[b, kv : kv + 1]))
            scores = keys @ q[b, h] / hd**0.5
            out[b, h] = scores.softmax(0) @ values
    return out
