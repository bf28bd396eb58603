"""The oracles: what the kernels compute, in plain torch, ten lines each. Tests run them in float64."""

import torch


def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None):
    """hidden (N, D), weight (V, D), targets (N,) → log-prob (N,) and entropy (N,); builds N×V logits."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logp = torch.log_softmax(logits / temperature, dim=-1)  # (N, V)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)  # 0 · log 0 = 0
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, reverse=False, bias=None,
              ref_bias=None):
    """Exact KL(policy‖reference) per position (N,), or KL(reference‖policy); builds N×V logits twice."""
    logits, ref_logits = hidden @ weight.T, ref_hidden @ ref_weight.T
    if bias is not None:
        logits = logits + bias
    if ref_bias is not None:
        ref_logits = ref_logits + ref_bias
    logp = torch.log_softmax(logits / temperature, dim=-1)
    logq = torch.log_softmax(ref_logits / temperature, dim=-1)
    if reverse:
        logp, logq = logq, logp
    return torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0.0).sum(-1)
