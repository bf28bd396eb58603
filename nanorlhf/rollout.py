"""The one object that flows through every RL trainer, with its invariants asserted in one place."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from nanorlhf.data import fill_rows
from nanorlhf.run.device import at_work


@dataclass
class Rollout:
    """B sampled sequences, prompt and response together, padded on the right to T tokens.

    Every per-token tensor is indexed by the token it describes, and is 0 outside the mask. EOS is inside the
    mask exactly when it was sampled; a row cut at max_new_tokens has finished=False and no EOS. Two answers
    to one prompt of two tokens, where 9 is EOS and 0 pads:

    >>> roll = Rollout(
    ...     tokens=torch.tensor([[5, 6, 7, 9, 0], [5, 6, 7, 8, 8]]),
    ...     mask=torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool(),
    ...     logp=torch.tensor([[0, 0, -0.5, -0.25, 0], [0, 0, -0.5, -1.5, -2.0]]),
    ...     finished=torch.tensor([True, False]),
    ...     group=torch.tensor([0, 0]),
    ...     prompt_len=torch.tensor([2, 2]),
    ... )
    >>> roll.responses()
    [[7], [7, 8, 8]]
    >>> roll.response_len
    tensor([2, 3])
    >>> roll.select(torch.tensor([1])).tokens
    tensor([[5, 6, 7, 8, 8]])
    """

    tokens: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool: the sampled tokens; from lengths, never from token ids
    logp: torch.Tensor  # (B, T) fp32: log-prob under the very distribution that was sampled from
    finished: torch.Tensor  # (B,) bool: the response ended by itself
    group: torch.Tensor  # (B,) int64: index of the row's prompt; its n samples are neighbours
    prompt_len: torch.Tensor  # (B,) int64

    rows: list = field(default_factory=list)  # (B,) the prompt's own row {"prompt", ...} of each sample
    texts: list = field(default_factory=list)  # (B,) the responses as text
    reward: torch.Tensor | None = None  # (B,) score of the whole response
    reward_parts: torch.Tensor | None = None  # (B, functions) what each reward function gave

    def __post_init__(self):
        B, T = self.tokens.shape
        assert self.mask.dtype == torch.bool
        assert self.mask.shape == self.logp.shape == (B, T)
        for per_row in (self.finished, self.group, self.prompt_len):
            assert per_row.shape == (B,)
        position = torch.arange(T, device=self.mask.device)
        after_prompt = position >= self.prompt_len[:, None]  # (B, T)
        before_end = position < self.lengths[:, None]
        one_block = torch.equal(self.mask, after_prompt & before_end)
        assert one_block, "the mask must be one block of ones right after the prompt"
        assert not self.logp[~self.mask].any(), "log-probs must be 0 outside the mask"

    def __len__(self):
        return len(self.tokens)

    @property
    def response_len(self):
        return self.mask.sum(1)  # (B,)

    @property
    def lengths(self):
        return self.prompt_len + self.response_len  # (B,)

    def responses(self, with_eos=False):
        """Token lists of the responses, without the EOS (whichever it was) that ended them, or with it."""
        ends = self.lengths
        if not with_eos:
            ends = ends - self.finished.long()
        starts = self.prompt_len.tolist()
        spans = zip(self.tokens.tolist(), starts, ends.tolist())
        return [row[start:end] for row, start, end in spans]

    def changed(self, change):
        """The same rollout with change(tensor) for each of its tensors."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{name: change(x) for name, x in tensors.items()})

    def to(self, device):
        """The same rollout with its tensors on another device."""
        return self.changed(lambda x: x.to(device))

    def select(self, index):
        """The rows of `index` (a tensor of row indices), with groups numbered anew from 0."""
        some = self.changed(lambda x: x[index])
        some.group = some.group.unique(return_inverse=True)[1]
        if self.rows:
            some.rows = [self.rows[i] for i in index.tolist()]
        if self.texts:
            some.texts = [self.texts[i] for i in index.tolist()]
        return some

    @classmethod
    def cat(cls, rolls):
        """Several rollouts as one, padded with zeros to the longest; their groups stay apart."""
        T = max(roll.tokens.shape[1] for roll in rolls)
        joined = {}
        for name, first in vars(rolls[0]).items():
            parts = [getattr(roll, name) for roll in rolls]
            if name in ("tokens", "mask", "logp"):
                parts = [F.pad(x, (0, T - x.shape[1])) for x in parts]
            if isinstance(first, list):
                joined[name] = sum(parts, [])
            elif first is not None:
                joined[name] = torch.cat(parts)
        groups = []
        groups_so_far = 0
        for roll in rolls:
            groups.append(roll.group + groups_so_far)
            groups_so_far += int(roll.group.max()) + 1
        joined["group"] = torch.cat(groups)
        return cls(**joined)

    @torch.no_grad()
    def per_token(self, fn, budget):
        """fn(tokens, mask) → (b, T') on every micro-batch, together (B, T), zeros beyond. No gradients."""
        T = self.tokens.shape[1]

        def compute(rows):
            longest = int(self.lengths[rows].max())
            tokens = self.tokens[rows, :longest]
            mask = self.mask[rows, :longest]
            return F.pad(fn(tokens, mask), (0, T - longest))

        out = torch.zeros_like(self.logp)
        return fill_rows(out, self.lengths, budget, compute, fn)

    def logp_under(self, model, temperature, budget):
        """Log-probs (B, T) of the sampled tokens under another model, 0 outside the mask. No gradients."""

        def logp(tokens, mask):
            return model.logprobs(tokens, mask, temperature)[0]

        with at_work(model):  # --save_memory brings it to the GPU and back; otherwise nothing happens
            return self.per_token(logp, budget)

    def batch(self):
        """What every update needs of a rollout, by name: a batch for data.take_rows."""
        return {
            "tokens": self.tokens,
            "lengths": self.lengths,
            "mask": self.mask,
            "old_logp": self.logp,
            "group": self.group,
        }
