"""Models cut over the processes (FSDP2), and their checkpoints. Models that are not cut pass as they are.

Each process holds a piece of every weight, gradient and optimizer state: 1/N of the rows of each tensor. A
block's weights are gathered when the block is used. torch calls such a tensor a DTensor; it has a
`device_mesh`.
"""

import contextlib
import os
import pickle

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
    trunk = getattr(model, "trunk", model)
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
    ranks = [len(p) for name, p in weights.items() if name.endswith(".A")]
    with torch.device("meta"):
        plain = type(model)(model.cfg)
        lora.add(plain, ranks[0] if ranks else 0)
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
    """Whole tensor → cut as the sharded tensor x is; itself, if x is not cut or has another shape."""
    if not hasattr(x, "device_mesh") or hasattr(tensor, "device_mesh") or tensor.shape != x.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(x.device_mesh.device_type), x.device_mesh, x.placements)


# ------------------------------------------------------------------------------------------------------------
# checkpoints: every process writes its pieces, and any number of processes can read them


def _flat(state_dicts):
    """Tensors of several dicts, as one dict.

    >>> _flat({"policy": {"wte.weight": 1}, "/0": {"exp_avg": 2}})
    {'policy/wte.weight': 1, '/0/exp_avg': 2}
    """
    return {f"{key}/{name}": x for key, tensors in state_dicts.items() for name, x in tensors.items()}


def write(folder, models, optimizer):
    """Write this process's pieces of {name: a model's state_dict} and of the optimizer's state_dict.

    All processes call it together. OSError on all of them if one cannot write.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    tensors = _flat(models) | _flat({f"/{i}": moments for i, moments in optimizer["state"].items()})
    torch_dist.barrier()  # until rank 0 has made the folder around it
    try:
        save(tensors, storage_writer=FileSystemWriter(folder, sync_files=False))
    except CheckpointException as e:
        errors = [error for error, _ in e.failures.values()]
        os_errors = [error for error in errors if isinstance(error, OSError)]
        raise (os_errors or [OSError(str(errors[0]))])[0] from e


class _Metadata(pickle.Unpickler):
    """Reads the table of pieces. It is a pickle, which could run any code: only these classes are allowed."""

    NAMES = """Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata StorageMeta
        _MEM_FORMAT_ENCODING _StorageInfo PosixPath Size _get_layout""".split()

    def find_class(self, module, name):
        known = name in self.NAMES and module.partition(".")[0] in ("torch", "pathlib")
        if known or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def read(folder, models, optimizer):
    """What `write` wrote, cut as the models are here → {"models", "optimizer"}, as state_dicts."""
    from torch.distributed.checkpoint import FileSystemReader, load

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(folder, ".metadata"), "rb") as f:
                table = _Metadata(f).load()
            table.storage_meta.load_id = self.load_id
            return table

    reader = Reader(folder)
    weights = _flat({key: model.state_dict() for key, model in models.items()})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        key, i, *_ = name.split("/")
        x = weights.get(name) if key else params[int(i)]
        fits = x is not None and x.shape == entry.size
        tensors[name] = torch.zeros_like(x) if fits else torch.zeros(entry.size)
    load(tensors, storage_reader=reader)

    weights = {key: {} for key in models}
    moments = {}
    for name, x in tensors.items():
        key, _, rest = name.partition("/")
        if key:
            weights.setdefault(key, {})[rest] = x
        else:
            i, _, kind = rest.partition("/")
            moments.setdefault(int(i), {})[kind] = x
    return {"models": weights, "optimizer": {"state": moments}}
