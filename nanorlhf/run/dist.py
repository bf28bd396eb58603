"""One run on many processes, started by torchrun: who does what, what is summed, who speaks.

Every rank knows the whole step: prompts, minibatches, uniforms and seeds are those of one process. A rank
samples and scores its share of the rows, then all ranks exchange the results, so that advantages, statistics
and figures are computed from the whole step, on every rank alike. In the update each rank adds up the
gradient of its rows, under the denominators of the whole step, and gradients are *summed*. So the number of
ranks is no part of the algorithm, and the trainers need no `if` about it.

    by default   DDP: every rank has all weights; the gradients are summed once an optimizer step
    --shard      FSDP2: weights, gradients, optimizer states are cut over the ranks, gathered block by block

All ranks must make the same calls in the same order, or they wait for each other until TIMEOUT: a condition
that differs between ranks may hold no forward pass of a sharded model and no function of this file that
exchanges something. Without torchrun all functions here return what they are given.
"""

import contextlib
import datetime
import gc
import os
import pickle
import sys
import threading
import time

import torch
import torch.distributed as torch_dist
import torch.nn as nn

from nanorlhf import lora
from nanorlhf.metrics import Figures

SHARDS = "shards"  # subfolder of a checkpoint: the tensors of a sharded run
TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange: longer than the slowest rank's rewards may take
_device = torch.device("cpu")  # of this process, once it has joined the others
_syncing = True  # whether the next backward pass is the optimizer step's last: then DDP exchanges gradients

# ------------------------------------------------------------------------------------------------------------
# the group of processes


def launched():
    """Whether torchrun started this process."""
    return torch_dist.is_torchelastic_launched()


def size():
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank():
    if torch_dist.is_initialized():
        return torch_dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def start(device):
    """Under torchrun, join the others; only rank 0 goes on to print. device: "cpu" or "cuda"."""
    global _device
    if not launched() or torch_dist.is_initialized():
        return
    if device == "cuda":
        _device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(_device)
    how = {}
    if _agent_store():
        how = dict(rank=rank(), world_size=int(os.environ["WORLD_SIZE"]), store=_store())
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    torch_dist.init_process_group(backend, timeout=TIMEOUT, **how)
    if rank():
        sys.stdout = open(os.devnull, "w")
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def leave(status):
    """End this process, which failed, at once: the others are not waited for, and destroying the group would
    wait for them (torchtitan issue 1342). Without torchrun nothing happens."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish():
    """Leave together at the end of a run. Without the collection and the barrier a process that ends while
    another still talks to it is aborted now and then, after all work is done (pytorch issue 179291)."""
    if torch_dist.is_initialized():
        gc.collect()
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def _agent_store():
    """Whether torchrun has a key-value store of its own; else rank 0 has one."""
    return os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def _store():
    """That store, as this attempt (torchrun --max-restarts) sees it. It outlives the ranks: to the addresses
    of those before, which it still holds, torch 2.13 would try to connect."""
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = "attempt-" + os.environ["TORCHELASTIC_RESTART_COUNT"]
    return torch_dist.PrefixStore(attempt, torch_dist.TCPStore(*at, is_master=False))


def speaks_first():
    """Whether this process, which must stop, is the one to say why. The errors of the others, "connection
    closed", only follow from its end; a mistake in the flags is met by all of them."""
    if not launched():
        return True
    if not torch_dist.is_initialized() and not _agent_store():
        return rank() == 0  # whose store is not there yet
    return _store().add("failed", 1) == 1


def _end_with_the_first():
    """End this process when another one failed: in NCCL it would wait for it until TIMEOUT."""
    with contextlib.suppress(RuntimeError):  # torchrun itself is gone
        store = _store()
        while not store.check(["failed"]):
            time.sleep(0.5)
            if not torch_dist.is_initialized():
                return
    time.sleep(2)  # this process may be on its way out by itself
    if torch_dist.is_initialized():  # else all is done, and it was only the store that ended with rank 0
        os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# exchanges


def gather(x):
    """Every rank's x, anything that can be pickled and lies on the CPU → list, in the order of the ranks."""
    if size() == 1:
        return [x]
    everyone = [None] * size()
    torch_dist.all_gather_object(everyone, x)
    return everyone


def summed(x):
    """Tensor → its sum over the ranks, in place. Where each filled its rows of zeros, that is all rows."""
    if size() > 1:
        torch_dist.all_reduce(x)
    return x


def largest(number):
    """The largest of every rank's whole number."""
    x = torch.tensor(number)
    if size() > 1:
        torch_dist.all_reduce(x, torch_dist.ReduceOp.MAX)
    return int(x)


def wait():
    """Until every rank is here."""
    if size() > 1:
        torch_dist.barrier()


def total(loss, stats):
    """Loss and figures of this rank's rows → those of the whole step: sums; of ratio_max, gap the largest."""
    if size() == 1:
        return loss, stats
    losses, parts = zip(*gather((loss, stats)))
    whole = {}
    for name in dict.fromkeys(name for part in parts for name in part):  # a rank without rows has none
        values = [part[name] for part in parts if part.get(name) is not None]
        whole[name] = (max(values) if name in ("ratio_max", "gap") else sum(values)) if values else None
    return sum(losses), whole


def whole_step(figures, *models):
    """Figures and gradients of this process's rows → those of the whole optimizer step, on every process.

    figures: metrics.Figures, put together by their declared kinds. models: those whose gradients were formed.
    On one process both are returned as they are.
    """
    if size() == 1:
        return figures
    whole = Figures(**figures.kinds)
    for part in gather(figures):
        whole.add(part)
    return whole


# ------------------------------------------------------------------------------------------------------------
# who does what


def part(n):
    """The slice of n things that is this rank's: neighbours, so that a prompt's samples stay together."""
    return slice(n * rank() // size(), n * (rank() + 1) // size()) if size() > 1 else slice(0, n)


def mine(lengths):
    """lengths (B,) → this rank's indices. Rows are dealt out, longest first: all have as much to do."""
    order = range(len(lengths))
    if size() > 1:
        lengths = torch.as_tensor(lengths).tolist()  # from a GPU in one copy, not one a row
        order = sorted(order, key=lambda i: (-lengths[i], i))[rank() :: size()]
    return torch.tensor(order, dtype=torch.int64)


def share(batch, lengths=None):
    """The batch of an optimizer step → this rank's rows of its lists and tensors, and the rest as it is.

    lengths (B,): tokens of each row, if not batch["lengths"]. What is neither a list nor a tensor with rows
    belongs to the whole step: denominators, counts.
    """
    if size() == 1:
        return batch
    rows, out = mine(batch["lengths"] if lengths is None else lengths), dict(batch)
    for name, x in batch.items():
        if isinstance(x, list):
            out[name] = [x[i] for i in rows.tolist()]
        elif isinstance(x, torch.Tensor) and x.dim():
            out[name] = x[rows.to(x.device)]
    return out


def paced(microbatches, *passes):
    """The micro-batches of this rank, and an idle pass for each that another rank has more.

    passes: the functions (tokens, mask) → tensor or tuple, through which a micro-batch goes, one per model. A
    sharded model's weights are gathered in every pass, so that all ranks must make equally many; and what
    DDP sums, in the last pass of an optimizer step, every rank must add to.
    """
    global _syncing
    if size() == 1:
        yield from microbatches
        return
    microbatches = list(microbatches)
    n = largest(len(microbatches))
    try:
        for i in range(n):
            _syncing = i == n - 1
            if i < len(microbatches):
                yield microbatches[i]
            else:
                _idle(passes)
    finally:
        _syncing = True


def _idle(passes):
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=_device)
    mask = torch.tensor([[False, True]], device=_device)
    outs = [fn(tokens, mask) for fn in passes]
    nothing = sum(0 * (out[0] if isinstance(out, tuple) else out).sum() for out in outs)
    if nothing.requires_grad:
        nothing.backward()


# ------------------------------------------------------------------------------------------------------------
# models


def spread(cfg, *models, frozen=()):
    """Make the models (or None) those of all ranks: DDP for those that are trained; --shard: FSDP2 for all.

    To be called after the last copy.deepcopy of them and before the optimizer is built: one built before
    would go on moving the whole weights, which nobody uses any more. With --shard and --save_memory the
    pieces of frozen models lie in the host's memory, and go to the GPU block by block. What `hub.load` has
    left unread is read now, so that UserError may come of it.
    """
    if cfg.shard:
        for model in filter(None, models):
            _shard(model, cfg, offload=False)
        for model in filter(None, frozen):
            model.requires_grad_(False)  # of what is trained, FSDP2 wants one dtype; `freeze` makes two
            _shard(model, cfg, offload=cfg.save_memory and _device.type == "cuda")
    elif size() > 1:
        for model in models:
            _replicate(model)


class _Replica(nn.Module):
    """What DDP wraps. Its one forward is any method of the model: model.logprobs(...) stays the call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, method, *args, **kw):
        return method(self.model, *args, **kw)


def _replicate(model):
    unused = getattr(getattr(model, "trunk", None), "lm_head", None)
    if unused is not None:  # DDP would wait for its gradient
        unused.requires_grad_(False)
    ddp = nn.parallel.DistributedDataParallel(_Replica(model), gradient_as_bucket_view=True)  # no second copy
    ddp.register_comm_hook(None, _sum)
    for name in model.PASSES:
        setattr(model, name, _through(ddp, model, getattr(type(model), name)))


def _through(ddp, model, method):
    def call(*args, **kw):
        if not torch.is_grad_enabled():
            return method(model, *args, **kw)
        with contextlib.nullcontext() if _syncing else ddp.no_sync():
            return ddp(method, *args, **kw)

    return call


def _sum(_, bucket):
    """DDP would average: here every rank's denominators are those of the whole step already."""
    return torch_dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])


def _shard(model, cfg, offload):
    """FSDP2: each block is gathered when it is used; what lies around them stays until the backward ends.

    bfloat16: weights are kept, and gradients summed, in fp32, and gathered in bf16. Of weights on the meta
    device pieces are made, which `model.fill`, left there by hub.load, then reads.
    """
    from torch.distributed import fsdp

    how, home = {"mesh": torch_dist.init_device_mesh(_device.type, (size(),))}, _device
    if offload:
        how["offload_policy"], home = fsdp.CPUOffloadPolicy(), torch.device("cpu")
    if cfg.dtype == "bfloat16":  # inputs stay as they are: rotary tables are fp32
        policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        how["mp_policy"] = policy
    trunk = getattr(model, "trunk", model)
    for block in trunk.blocks:
        fsdp.fully_shard(block, **how)
    fsdp.fully_shard(trunk, reshard_after_forward=False, **how)  # the unembedding is used after its forward
    if model is not trunk:  # the scalar head
        fsdp.fully_shard(model, reshard_after_forward=False, **how)
    model._apply(lambda x: torch.empty_like(x, device=home) if x.is_meta else x)
    for module in (trunk, model):
        if fill := vars(module).pop("fill", None):
            fill(module)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)  # a sum, as in _sum
        module.set_force_sum_reduction_for_comms(True)
    for name in model.PASSES:
        fsdp.register_fsdp_forward_method(model, name)


def _sharded(model):
    return [module for module in model.modules() if hasattr(module, "unshard")]


@contextlib.contextmanager
def whole(model):
    """Inside, a sharded GPT's weights are gathered → a plain GPT of them, to be used as often as one likes:
    responses end at different steps on different ranks. Any other model → itself."""
    parts = _sharded(model)
    if not parts:
        yield model
        return
    for module in parts:
        module.unshard()
    try:
        ranks = [len(p) for name, p in model.named_parameters() if name.endswith(".A")]
        with torch.device("meta"):
            plain = type(model)(model.cfg)
            lora.add(plain, ranks[0] if ranks else 0)
        plain.load_state_dict(dict(model.named_parameters()), assign=True)
        for name in ("compute_dtype", "n_ids", "stop_ids"):
            setattr(plain, name, getattr(model, name))
        yield plain
    finally:
        reshard(model)


def reshard(model):
    """Drop what a sharded model still holds whole from its last pass without a backward pass."""
    for module in _sharded(model):
        module.reshard()


def full(x):
    """A tensor that is cut over the ranks → all of it, on every rank; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x):
    """A tensor that is cut over the ranks → this rank's piece; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def piece(whole, x):
    """A whole tensor → the rows of it that this rank holds in x; all, if x is not cut."""
    rows = -(-len(whole) // size())  # as torch.chunk, by which FSDP2 cuts
    return whole[rank() * rows : (rank() + 1) * rows] if hasattr(x, "to_local") else whole


def clip(parameters, max_norm):
    """Scale gradients down to the norm max_norm, if they exceed it → their norm before, a float."""
    return full(nn.utils.clip_grad_norm_(parameters, max_norm)).item()


# ------------------------------------------------------------------------------------------------------------
# checkpoints of sharded runs: every rank writes its pieces, and any number of processes reads them


def like(x, other):
    """A whole tensor → cut over the ranks as `other` is; what is no tensor of its shape, or cut, as it is."""
    if not hasattr(other, "device_mesh") or hasattr(x, "device_mesh") or x.shape != other.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(_device), other.device_mesh, other.placements)


def write(folder, models, optimizer):
    """State_dicts of models and optimizer → a folder of torch.distributed.checkpoint's, by all ranks.

    OSError, on all of them, if one cannot write its pieces.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    wait()  # rank 0 makes what it stands in
    tensors = {f"{key}/{name}": x for key, model in models.items() for name, x in model.items()}
    tensors |= {f"/{i}/{name}": x for i, of in optimizer["state"].items() for name, x in of.items()}
    try:
        save(tensors, storage_writer=FileSystemWriter(folder, sync_files=False))
    except CheckpointException as e:
        causes = [error for error, _ in e.failures.values()]
        raise next((error for error in causes if isinstance(error, OSError)), OSError(str(causes[0]))) from e


class _Metadata(pickle.Unpickler):
    """torch.distributed.checkpoint keeps a table of its pieces as a pickle: nothing else is read from it."""

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
        def read_metadata(self, *args, **kw):
            with open(os.path.join(folder, ".metadata"), "rb") as f:
                found = _Metadata(f).load()
            found.storage_meta.load_id = self.load_id
            return found

    reader = Reader(folder)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        key, _, rest = name.partition("/")
        if key:
            mine = models[key].state_dict().get(rest) if key in models else None
        else:
            mine = params[int(rest.split("/")[0])]
        fits = mine is not None and mine.shape == about.size
        tensors[name] = torch.zeros_like(mine) if fits else torch.zeros(about.size)
    load(tensors, storage_reader=reader)
    out = {"models": {key: {} for key in models}, "optimizer": {"state": {}}}
    for name, x in tensors.items():
        key, _, rest = name.partition("/")
        if key:
            out["models"].setdefault(key, {})[rest] = x
        else:
            i, _, which = rest.partition("/")
            out["optimizer"]["state"].setdefault(int(i), {})[which] = x
    return out
