"""Logits → one token and its log-prob, for every row of a batch."""

from dataclasses import dataclass

import torch

from nanorlhf.errors import RunError

NOT_FINITE = "the model's logits are not finite; lower --lr, or start from another checkpoint"


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from. Log-probs are those of this distribution.

    top_k and top_p are for evaluation and chat only: RL trainers sample from the full softmax, the
    distribution that they score under.
    """

    temperature: float = 1.0  # 0: always the most probable token, with its log-prob at temperature 1
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the smallest set of tokens whose probability reaches p


def filter_logits(logits, top_k=0, top_p=1.0):
    """(b, V) → (b, V) with −inf outside the top k tokens and the smallest set whose probability reaches p.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> filter_logits(logits, top_p=0.6).exp()  # 0.5 is not enough, 0.5 + 0.3 is
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # the probability of all tokens that are more probable
        drop = before >= top_p
        drop[:, 0] = False  # the most probable token stays, even with top_p = 0
        place = index.argsort(-1)  # from the order of probabilities back to the order of ids
        logits = logits.masked_fill(drop.gather(1, place), -torch.inf)
    return logits


def sample(logits, uniforms, sampling):
    """fp32 logits (b, V), uniforms (b,) in [0, 1) → token (b,), its log-prob (b,) as sampled.

    Raises RunError where logits are not finite.

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3)
    >>> token, logp = sample(logits, torch.tensor([0.1, 0.6, 0.9]), Sampling())
    >>> token, logp.exp()  # the cumulative probabilities are 0.5, 0.8, 1.0
    (tensor([0, 1, 2]), tensor([0.5000, 0.3000, 0.2000]))
    """
    token, logp = draw(logits, uniforms, sampling)
    if not logp.isfinite().all():
        raise RunError(NOT_FINITE)
    return token, logp


def draw(logits, uniforms, sampling, invert=None):
    """`sample` that never waits for a GPU: where logits are not finite, neither is the log-prob.

    invert: takes the place of `_invert_cdf` on a GPU.
    """
    temperature = sampling.temperature
    z = logits if temperature in (0, 1) else logits / temperature
    z = filter_logits(z, sampling.top_k, sampling.top_p)
    top = z.amax(-1, keepdim=True)
    e = (z - top).exp_()  # every pass over (b, V) counts: amax is ten times as fast as max on a CPU
    total = e.sum(-1)
    if temperature == 0:
        token = z.argmax(-1, keepdim=True)
    else:
        invert = invert or _invert_cdf
        token = invert(e, uniforms[:, None])
    logp = (z.gather(1, token) - top).squeeze(1) - total.log()
    return token.squeeze(1), logp


def _invert_cdf(e, uniforms):
    """e (b, V), probabilities up to a factor, uniforms (b, 1) → (b, 1) tokens. Overwrites e.

    The token is the first at which the cumulative probability exceeds the uniform number: one cumulative sum,
    where `torch.multinomial` is ten times slower on a CPU.
    """
    cdf = torch.cumsum(e, -1, out=e)
    return first_above(cdf, uniforms * cdf[:, -1:])


def first_above(cdf, aim):
    """cdf (b, n), sums that never fall, aim (b, 1) → (b, 1), the first place with cdf > aim.

    Where there is none, as uniforms·total can round up to total, it is the last place of any probability.
    """
    total = cdf[:, -1:].contiguous()
    place = torch.searchsorted(cdf, aim, right=True)
    last = torch.searchsorted(cdf, total)
    place = torch.minimum(place, last)
    return place.clamp_(max=cdf.shape[1] - 1)  # NaN logits would otherwise give V, which is no index
