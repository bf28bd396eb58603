"""LoRA (arXiv 2106.09685): train a low-rank change of every linear layer of the blocks and nothing else.

    W x  →  W x + α/r · B (A x)            A (r, in) starts at N(0, 1/√in), B (out, r) at 0

W is frozen, so it needs neither gradient nor optimizer state, and the model as it was before training, which
is RLHF's reference, is still there: `add` returns it, sharing every tensor. `hub.save` writes W + α/r · B A.
"""

import copy

import torch
import torch.nn as nn

from nanorlhf.errors import require
from nanorlhf.model import Linear

ALPHA = 32.0  # with a fixed α the best learning rate hardly depends on r; it is about ten times that of W


class Adapted(Linear):
    """A frozen linear layer (its `weight` and `bias` keep their names) and its trained change, in fp32."""

    def __init__(self, base, rank):
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = base.weight, base.bias, ALPHA / rank
        n_out, n_in = base.weight.shape
        how = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32), device=base.weight.device)
        if base.weight.is_meta:  # --shard: only the file's tensors wait there
            how["device"] = None
        self.A = nn.Parameter(torch.randn(rank, n_in, **how) * n_in**-0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank, **how))

    def forward(self, x):
        return super().forward(x) + self.scale * (x @ self.A.T.to(x.dtype)) @ self.B.T.to(x.dtype)

    @torch.no_grad()
    def merged_weight(self):
        """→ W + α/r · B A in the precision of A and B."""
        return merge(self.weight, self.A, self.B, self.scale)

    def merged(self):
        """→ one plain layer that computes the same."""
        out = nn.Module.__new__(Linear)
        nn.Module.__init__(out)
        out.weight, out.bias = nn.Parameter(self.merged_weight()), self.bias
        return out


def merge(weight, A, B, scale):
    """→ W + scale · B A, for tensors that are whole on this process."""
    return weight + scale * B @ A


def _twin(model):
    """Another model of the very same tensors, whose layers can be exchanged without touching this one."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _exchange(model, old, new):
    """Put new(layer) in the place of every layer of the blocks of class `old`."""
    for block in getattr(model, "trunk", model).blocks:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if type(layer) is old:
                    setattr(part, name, new(layer))
    return model


def add(model, rank, dtype=None):
    """Freeze a GPT or ScalarModel and adapt it, in place → its frozen self, for a reference.

    dtype ("bfloat16", say) is that of the frozen matrices from now on: where activations have it too, nothing
    is lost, as `Linear` casts its weight to theirs. A ScalarModel's head, which is new, is trained whole.
    Rank 0 changes nothing → None.
    """
    if not rank:
        return None
    what = f"--lora_rank {rank} with --dtype bf16_weights: adapters are trained in fp32; use bfloat16"
    require(dtype != "bf16_weights", what)
    frozen = _twin(model).requires_grad_(False)

    def adapt(layer):
        adapted = Adapted(layer, rank)
        if dtype:
            layer.weight.data = layer.weight.data.to(getattr(torch, dtype))
        return adapted

    _exchange(model, Linear, adapt)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return frozen


def merged(model):
    """→ a model of plain layers that computes what this one computes; itself, if it has no adapters."""
    if not any(isinstance(layer, Adapted) for layer in model.modules()):
        return model
    return _exchange(_twin(model), Adapted, Adapted.merged)
