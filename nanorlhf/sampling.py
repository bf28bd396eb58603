"""Logits → one token and its log-prob, for every row of a batch."""

from dataclasses import dataclass

import torch

from nanorlhf.errors import RunError

NOT_FINITE = "the model's logits are not finite; lower --lr, or start from another checkpoint"


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy; top_k and top_p are for evaluation and chat only."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def filter_logits(logits, top_k=0, top_p=1.0):
    """(b, V) → (b, V) with −inf outside the top k tokens and the smallest set whose probability reaches p.

    For evaluation and chat only: RL trainers sample from the full softmax, the distribution that they score
    under.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # the probability *before* a token: the best one always stays
        drop[:, 0] = False
        logits = logits.masked_fill(drop.gather(1, index.argsort(-1)), -torch.inf)
    return logits


def sample(logits, u, sampling):
    """fp32 logits (b, V), uniforms u (b,) in [0, 1) → token (b,), its log-prob (b,) as sampled.

    Inverse CDF: the first token at which the cumulative probability exceeds u; one cumulative sum, where
    `torch.multinomial` is ten times slower on a CPU. Temperature 0 is greedy, with the log-prob at
    temperature 1.
    """
    token, logp = draw(logits, u, sampling)
    if not logp.isfinite().all():
        raise RunError(NOT_FINITE)
    return token, logp


def draw(logits, u, sampling):
    """`sample` that never waits for a GPU: where logits are not finite, neither is the log-prob."""
    temperature = sampling.temperature
    z = logits if temperature in (0, 1) else logits / temperature
    z = filter_logits(z, sampling.top_k, sampling.top_p)
    top = z.amax(-1, keepdim=True)
    e = (z - top).exp_()  # every pass over (b, V) counts: amax is ten times as fast as max on a CPU
    sums = e.sum(-1)
    if temperature:
        cdf = torch.cumsum(e, -1, out=e)
        total = cdf[:, -1:].contiguous()
        token = torch.searchsorted(cdf, u[:, None] * total, right=True)
        # u·total can round up to total: then the last token with any probability, never one of probability 0
        token = torch.minimum(token, torch.searchsorted(cdf, total)).clamp_(max=z.shape[1] - 1)  # if not NaN
    else:
        token = z.argmax(-1, keepdim=True)
    logp = (z.gather(1, token) - top).squeeze(1) - sums.log()
    return token.squeeze(1), logp
