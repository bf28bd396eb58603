"""LoRA (arXiv 2106.09685): train a low-rank change of every linear layer of the blocks, and nothing else.

    W x  →  W x + α/r · B (A x)            A (r, in) starts at N(0, 1/√in), B (out, r) at 0

W is frozen, so it needs no gradient and no optimizer state. The model before training, RLHF's reference, is
then still there: `add` returns it, and it shares every tensor. `hub.save` writes W + α/r · B A.
"""

import copy

import torch
import torch.nn as nn

from nanorlhf.errors import require
from nanorlhf.model import Linear

ALPHA = 32.0  # with a fixed α the best learning rate hardly depends on r; it is about ten times that of W


class Adapted(Linear):
    """A frozen linear layer, whose `weight` and `bias` keep their names, and its trained change in fp32."""

    def __init__(self, base, rank):
        nn.Module.__init__(self)
        self.weight = base.weight
        self.bias = base.bias
        self.scale = ALPHA / rank
        n_out, n_in = base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        # With --shard the weights wait on the meta device for their file, which holds no A: it is drawn now.
        device = None if base.weight.is_meta else base.weight.device
        A = torch.randn(rank, n_in, dtype=dtype, device=device)
        B = torch.zeros(n_out, rank, dtype=dtype, device=device)
        self.A = nn.Parameter(A * n_in**-0.5)
        self.B = nn.Parameter(B)

    def forward(self, x):
        low = x @ self.A.T.to(x.dtype)  # (..., r)
        return super().forward(x) + self.scale * low @ self.B.T.to(x.dtype)


@torch.no_grad()
def merge(weight, A, B, scale):
    """→ W + scale · B A (out, in), in the precision of A and B. The tensors must not be sharded."""
    return weight + scale * B @ A


def add(model, rank, dtype=None):
    """Adapt a GPT or ScalarModel in place, so that only adapters are trained → its frozen self.

    The frozen self is the reference; it shares every tensor. Rank 0 changes nothing → None. The frozen
    matrices get `dtype`: "bfloat16" halves their memory, and loses nothing where activations have it too, as
    `Linear` casts its weight to theirs. A ScalarModel's head is new, so it is trained whole. UserError for
    bf16_weights.
    """
    if not rank:
        return None
    message = f"--lora_rank {rank} with --dtype bf16_weights: adapters are trained in fp32; use bfloat16"
    require(dtype != "bf16_weights", message)
    # Another model of the very same tensors, whose layers are not replaced with those of this one
    frozen = copy.deepcopy(model, {id(p): p for p in model.parameters()}).requires_grad_(False)
    for block in model.trunk.blocks:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if type(layer) is not Linear:  # a norm
                    continue
                setattr(part, name, Adapted(layer, rank))
                if dtype:
                    layer.weight.data = layer.weight.data.to(getattr(torch, dtype))
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return frozen


def merged_weights(model):
    """→ {name: tensor} of the model of plain layers that computes what this one computes."""
    weights = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            A = weights.pop(f"{name}.A")
            B = weights.pop(f"{name}.B")
            weights[f"{name}.weight"] = merge(layer.weight, A, B, layer.scale)
    return weights


def own_weights(model):
    """→ {name: tensor} of what training may change: without the frozen weights, where there are adapters."""
    weights = model.state_dict()
    if rank_in(weights):
        for name, p in model.named_parameters():
            if not p.requires_grad and not name.endswith((".A", ".B")):  # of a model that is only read, too
                del weights[name]
    return weights


def rank_in(weights):
    """Rank of the adapters among {name: tensor}; 0 if there are none."""
    return next((len(x) for name, x in weights.items() if name.endswith(".A")), 0)
