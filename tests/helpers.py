"""What several test files share: tiny models of every style, and a watch on the sizes of tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf.model import GPT, GPTConfig

V = 13
STYLES = {  # every branch of the model: norms, positions, MLPs, grouped queries, tied and untied
    "gpt2": (GPTConfig.gpt2, {}),
    "gpt2-untied": (GPTConfig.gpt2, dict(tied=False)),
    "llama": (GPTConfig.llama, {}),
    "llama-gqa-untied": (GPTConfig.llama, dict(n_kv_head=2, tied=False, head_dim=6)),
    "llama-bias": (GPTConfig.llama, dict(n_kv_head=1, bias=True)),
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


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out
