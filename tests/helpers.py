"""What several test files share: tiny models, operands of the kernels, a watch on the sizes of tensors."""

import os
from collections import Counter
from importlib import metadata

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf.hub import tokenizer_files
from nanorlhf.model import GPT, GPTConfig

V = 13


def version(package):
    """(major, minor) of an installed package; (0, 0) where it is not installed."""
    try:
        major, minor, *_ = metadata.version(package).split(".")
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# Its arrays of one number no longer turn into an int: every loop of a kernel ends in a TypeError.
BROKEN_INTERPRETER = (
    os.environ.get("TRITON_INTERPRET") == "1" and version("triton") < (3, 7) and version("numpy") >= (2, 4)
)
interpreter = pytest.mark.skipif(
    BROKEN_INTERPRETER, reason="Triton's interpreter before 3.7 needs numpy < 2.4"
)
STYLES = {  # every branch of the model: norms, positions, MLPs, grouped queries, tied and untied
    "gpt2": (GPTConfig.gpt2, {}),
    "gpt2-untied": (GPTConfig.gpt2, dict(tied=False)),
    "llama": (GPTConfig.llama, {}),
    "llama-gqa-untied": (GPTConfig.llama, dict(n_kv_head=2, tied=False, head_dim=6)),
    "llama3": (GPTConfig.llama, dict(n_kv_head=2, rope_theta=100.0, rope_scaling=(4.0, 0.5, 2.0, 8))),
    "qwen2": (GPTConfig.llama, dict(n_kv_head=2, qkv_bias=True)),
    "qwen3": (GPTConfig.llama, dict(n_kv_head=2, head_dim=8, qk_norm=True)),
    "pythia": (GPTConfig.gpt2, dict(pos="rope", rope_share=0.5, mlp="gelu_exact", parallel=True, tied=False)),
    "llama-bias": (GPTConfig.llama, dict(n_kv_head=1, qkv_bias=True, o_bias=True, mlp_bias=True)),
}


def tiny(style="gpt2", seed=0, dtype=torch.float32, **kw):
    """A random model whose biases and norm weights are random too: nothing hides at 0 or 1."""
    make, own = STYLES[style]
    torch.manual_seed(seed)
    size = dict(vocab_size=V, n_layer=2, n_head=4, d_model=16, d_ff=24, max_len=24)
    model = GPT(make(**{**size, **own, **kw})).to(dtype)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


def randint(high, *shape, seed=0):
    """int64 tensor of random ids below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def save_tokenizer(tok, folder):
    """Write the files of a tokenizer alone, without a model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer_files.files(tok).items():
        (folder / name).write_bytes(data)


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and counts the calls of each operation."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def operands(N, V, D=5, seed=0, std=3.0, dtype=torch.float64):
    """hidden, weight with logits of about the given standard deviation, targets, bias."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * std / D**0.5
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=g)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def differentiate(fn, inputs, seed=1):
    """fn(*inputs) → its outputs and the gradients of inputs under random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(seed)
    up = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) for y in out]
    return [y.detach() for y in out], torch.autograd.grad(out, leaves, up)


def close(got, want, tol):
    """Errors below tol times the largest entry (at least 1), entry by entry; infinities must be equal."""
    for a, b in zip(got, want, strict=True):
        a, b = a.double(), b.double()
        assert a.shape == b.shape and not a.isnan().any() and not b.isnan().any()
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        scale = max(1.0, b[finite].abs().max().item()) if finite.any() else 1.0
        assert ((a - b)[finite].abs() <= tol * scale).all(), (a - b)[finite].abs().max()
