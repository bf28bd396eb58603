"""Models cut over the processes (FSDP2), and their checkpoints. Models that are not cut pass as they are.

Each process holds a piece of every weight, gradient and optimizer state: 1/N of the rows of each tensor. A
block's weights are gathered when the block is used. torch calls such a tensor a DTensor; it has a
`device_mesh`.
"""

import contextlib
import os

import torch
import torch.distributed as torch_dist

from nanorlhf import lora

SHARDS = "shards"  # subfolder of a checkpoint: the tensors of a sharded run

# ------------------------------------------------------------------------------------------------------------
# models


def shard(model, mesh, dtype, offload):
    """Cut a GPT or ScalarModel over the processes of a mesh, in place.

    Each block is gathered when it is used. The embedding, the last norm and the head stay gathered until the
    backward pass ends, as the head is used after the trunk's forward pass.

    dtype: the flag. With "bfloat16" weights are kept in fp32 and gathered in bf16; gradients are summed in
    fp32. offload: the pieces stay in the host's memory and go to the GPU block by block. If weights are on
    the meta device, pieces are made now, and `model.fill`, left by hub.load, reads the file (UserError for a
    bad one).
    """
    from torch.distributed import fsdp  # two seconds

    settings = {"mesh": mesh}
    if offload:
        settings["offload_policy"] = fsdp.CPUOffloadPolicy()
    if dtype == "bfloat16":  # inputs are not cast: the rotary tables must stay fp32
        precision = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        settings["mp_policy"] = precision
    trunk = model.trunk
    for block in trunk.blocks:
        fsdp.fully_shard(block, **settings)
    fsdp.fully_shard(trunk, reshard_after_forward=False, **settings)
    if model is not trunk:  # the scalar head
        fsdp.fully_shard(model, reshard_after_forward=False, **settings)

    home = "cpu" if offload else mesh.device_type
    model._apply(lambda x: torch.empty_like(x, device=home) if x.is_meta else x)
    for module in (trunk, model):
        fill = vars(module).pop("fill", None)
        if fill is not None:
            fill(module)

    for module in sharded_modules(model):  # sum, not average: losses have the whole step's denominator
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in model.PASSES:
        fsdp.register_fsdp_forward_method(model, name)


def sharded_modules(model):
    """The modules that FSDP2 gathers one at a time; none if the model is not cut."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


@contextlib.contextmanager
def gathered(model):
    """Inside, all weights of a sharded GPT are gathered → a plain GPT of them; any other model → itself.

    Sampling needs this: processes make different numbers of decoding steps, and a forward pass of the sharded
    model would wait for all of them.
    """
    modules = sharded_modules(model)
    if not modules:
        yield model
        return
    for module in modules:
        module.unshard()
    try:
        yield _plain(model)
    finally:
        reshard(model)


def _plain(model):
    """An unsharded GPT that shares the gathered weights of this one."""
    weights = dict(model.named_parameters())
    with torch.device("meta"):
        plain = type(model)(model.cfg)
        lora.add(plain, lora.rank_in(weights))
    plain.load_state_dict(weights, assign=True)
    for name in ("compute_dtype", "n_ids", "stop_ids"):
        setattr(plain, name, getattr(model, name))
    return plain


def reshard(model):
    """Drop the gathered weights: after a forward pass without a backward pass they would stay in memory."""
    for module in sharded_modules(model):
        module.reshard()


# ------------------------------------------------------------------------------------------------------------
# tensors


def full(x):
    """Sharded tensor → the whole tensor, on every process. All must call it together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x):
    """Sharded tensor → this process's piece, sharing its memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def piece(tensor, x):
    """Whole tensor → the rows of it that are this process's piece of the sharded tensor x.

    5 rows on 2 processes: the first holds rows 0, 1, 2 and the second rows 3, 4.
    """
    if not hasattr(x, "device_mesh"):
        return tensor
    rows = -(-len(tensor) // x.device_mesh.size())  # rounded up, as in torch.chunk, by which FSDP2 cuts
    start = rows * x.device_mesh.get_local_rank()
    return tensor[start : start + rows]


def shard_like(tensor, x):
    """Whole tensor, or the list of its pieces → cut as the sharded tensor x is.

    The whole tensor, if x is not cut or has another shape.
    """
    if isinstance(tensor, list):
        tensor = torch.cat(tensor) if len(tensor) > 1 else tensor[0]
    if not hasattr(x, "device_mesh") or tensor.shape != x.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(x.device_mesh.device_type), x.device_mesh, x.placements)


# ------------------------------------------------------------------------------------------------------------
# checkpoints: every process writes a file of its pieces, and any number of processes can read them


def write(folder, state):
    """Write this process's pieces of the tensors in nested dicts. All processes call it together.

    OSError on all of them if one cannot write.
    """
    torch_dist.barrier()  # until rank 0 has made the folder around it
    rank = torch_dist.get_rank()
    error = None
    try:
        os.makedirs(folder, exist_ok=True)
        torch.save(_pieces(state, rank), f"{folder}/{rank:05d}.pt")
    except (OSError, RuntimeError) as e:
        error = str(e)
    errors = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise OSError(error)


def _pieces(x, rank):
    """Nested dicts of tensors → the same of this process's pieces; what is not cut is left to rank 0."""
    if not isinstance(x, dict):
        return local(x)
    pieces = {}
    for name, value in x.items():
        if rank == 0 or isinstance(value, dict) or hasattr(value, "device_mesh"):
            pieces[name] = _pieces(value, rank)
    return pieces


def read(folder):
    """The nested dicts that `write` was given, with the list of its pieces in place of each tensor.

    The files are mapped: a tensor takes memory only when `shard_like` puts its pieces together.
    """
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return _merge([torch.load(file, weights_only=True, map_location="cpu", mmap=True) for file in files])


def _merge(parts):
    """Nested dicts of pieces, one of each process → nested dicts of lists of pieces.

    >>> _merge([{"wte": {"weight": 1, "bias": 2}}, {"wte": {"weight": 3}}])
    {'wte': {'weight': [1, 3], 'bias': [2]}}
    """
    if not isinstance(parts[0], dict):
        return parts
    return {name: _merge([part[name] for part in parts if name in part]) for name in parts[0]}
