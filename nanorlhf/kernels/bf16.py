"""bf16 that pays: weights cast once, and the matrix units of a CPU that has them.

Activations in bf16 need weights in bf16, and the weights that are trained are fp32. A forward pass that casts
them reads 4 bytes and writes 2 for each weight, which in decoding is more than the matmuls themselves read.
"""

import contextlib
import types

import torch
import torch.nn as nn


def has_units(device):
    """Whether the device of --device multiplies bf16 in hardware; a CPU with AMX or AVX-512 BF16 does."""
    if device == "cuda" and not torch.cuda.is_available():
        return True  # --dry_run plans for a GPU that is elsewhere
    on_gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = device == "cpu" or (device == "auto" and not torch.backends.mps.is_available())
    return on_cpu and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@contextlib.contextmanager
def in_units(x):
    """Inside, matmuls of fp32 tensors may use a CPU's bf16 units if x is bf16; their sums stay fp32.

    AMX rounds operands to bf16. That changes nothing in hidden states that were widened from bf16; weights
    and gradients lose what they lose on a GPU, where they are cast to bf16. Other processors multiply in
    fp32, in oneDNN, which on an AMD EPYC is twice as fast as what torch takes otherwise.
    """
    before = torch.get_float32_matmul_precision()
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def cast_once(model, kept=None):
    """Inside, where no weight may change, the linear layers have their weights in the activations' dtype.

    So a decode loop, or the micro-batches of an optimizer step, cost one cast and not one in every pass. A
    gradient goes through the cast to the weight itself, as it would without. Left as they are: weights that
    the cast would make larger (bf16_weights), those cut over processes (--shard), all of a model that is to
    save memory, and, except on CUDA, the unembedding (GPT.unembedding).

    kept: a dict {name: copy} of a GPU's slots, whose CUDA graphs hold the copies' addresses. Copies that it
    has are written anew where they are; the others are put into it. All weights of another dtype are cast
    then, because no activations of training are in memory beside them.
    """
    trunk = model.trunk
    dtype = trunk.dtype
    on_gpu = trunk.device.type == "cuda"
    copies = {} if kept is None else kept

    def casts(p):
        if kept is not None:
            return p.dtype != dtype
        is_cut = hasattr(p, "device_mesh")
        return not is_cut and not trunk.recompute and p.dtype.itemsize > dtype.itemsize

    def cast(name, p):
        if name in copies:
            return copies[name].copy_(p)
        copies[name] = p.to(dtype)
        return copies[name]

    head = trunk.lm_head
    if head is None and on_gpu and casts(trunk.wte.weight):  # tied: tokens are looked up in fp32
        trunk.lm_head = types.SimpleNamespace(weight=cast("head", trunk.wte.weight))
    hidden = []
    for place, layer in trunk.named_modules():
        if isinstance(layer, nn.Linear) and (on_gpu or layer is not head):
            for name, p in layer.named_parameters(recurse=False):
                if casts(p) and name not in vars(layer):  # else it is cast already, by a caller
                    vars(layer)[name] = cast(f"{place}.{name}", p)  # hides the parameter of this name
                    hidden.append((layer, name))
    try:
        yield
    finally:
        trunk.lm_head = head
        for layer, name in hidden:
            del vars(layer)[name]
