"""The one object that flows through every RL trainer, with its invariants asserted in one place."""

import itertools
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from nanorlhf.data import microbatches
from nanorlhf.run import dist


@dataclass
class Rollout:
    """B sampled sequences, prompt and response together, padded on the right to T tokens.

    Every per-token tensor is indexed by the token it describes, and is 0 outside the mask. EOS is inside the
    mask exactly when it was sampled; a row cut at max_new_tokens has finished=False and no EOS.
    """

    tokens: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool: the sampled tokens; from lengths, never from token ids
    logp: torch.Tensor  # (B, T) fp32: log-prob under the very distribution that was sampled from
    finished: torch.Tensor  # (B,) bool: the response ended by itself
    group: torch.Tensor  # (B,) int64: index of the row's prompt; its n samples are neighbours
    prompt_len: torch.Tensor  # (B,) int64

    def __post_init__(self):
        B, T = self.tokens.shape
        assert self.mask.shape == self.logp.shape == (B, T) and self.mask.dtype == torch.bool
        assert self.finished.shape == self.group.shape == self.prompt_len.shape == (B,)
        place = torch.arange(T, device=self.mask.device)
        inside = (place >= self.prompt_len[:, None]) & (place < self.lengths[:, None])
        assert torch.equal(self.mask, inside), "the mask must be one block of ones right after the prompt"
        assert not self.logp[~self.mask].any(), "log-probs must be 0 outside the mask"

    @property
    def response_len(self):
        return self.mask.sum(1)  # (B,)

    @property
    def lengths(self):
        return self.prompt_len + self.response_len  # (B,)

    def responses(self, with_eos=False):
        """Token lists of the responses, without the EOS (whichever it was) that ended them, or with it."""
        ends = (self.lengths - (0 if with_eos else self.finished.long())).tolist()
        return [row[p:e] for row, p, e in zip(self.tokens.tolist(), self.prompt_len.tolist(), ends)]

    def select(self, rows):
        """The given rows (a tensor of indices), with groups numbered anew from 0."""
        group = self.group[rows].unique(return_inverse=True)[1]
        parts = (x[rows] for x in (self.tokens, self.mask, self.logp, self.finished))
        return Rollout(*parts, group, self.prompt_len[rows])

    @classmethod
    def cat(cls, rolls, pad_id=0):
        """Several rollouts as one, padded to the longest; their groups stay apart."""
        T = max(roll.tokens.shape[1] for roll in rolls)
        wide = [[F.pad(x, (0, T - x.shape[1]), value=pad) for x, pad in
                 ((r.tokens, pad_id), (r.mask, 0), (r.logp, 0))] for r in rolls]  # fmt: skip
        first = [0, *itertools.accumulate(int(r.group.max()) + 1 for r in rolls)]
        narrow = [(r.finished, r.group + start, r.prompt_len) for r, start in zip(rolls, first)]
        return cls(*(torch.cat(x) for x in zip(*wide)), *(torch.cat(x) for x in zip(*narrow)))

    def microbatches(self, rows, budget):
        """Cut rows (a tensor of indices) by padded tokens, longest first → (row indices, longest length)."""
        lengths = self.lengths[rows]
        for mb in microbatches(lengths, budget):
            yield rows[mb], int(lengths[mb].max())

    @torch.no_grad()
    def per_token(self, fn, budget):
        """fn(tokens, mask) → (b, T') on every micro-batch, together (B, T), zeros beyond. No gradients."""
        out = torch.zeros_like(self.logp)
        for mb, T in dist.paced(self.microbatches(dist.my_rows(self.lengths), budget), fn):
            out[mb, :T] = fn(self.tokens[mb, :T], self.mask[mb, :T])
        return dist.summed(out)

    def to(self, device):
        return Rollout(*(getattr(self, f.name).to(device) for f in fields(self)))
