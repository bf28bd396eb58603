"""One run on many processes, started by torchrun. On one process all functions here change nothing.

Every process knows the whole step: prompts, minibatches, random numbers and seeds are those of one process. A
process samples and scores its share of the rows. Then all exchange the results, so that advantages and
statistics are computed from all rows, on every process alike. In the update each process adds up the gradient
of its rows, divided by the denominators of the whole step, and the gradients are *summed*. So the number of
processes is no part of the algorithm.

    by default   every process has all weights; gradients are summed once an optimizer step (whole_step)
    --shard      FSDP2: weights, gradients and optimizer states are cut over the processes (sharding.py)

All processes must make the same exchanges in the same order. A process that makes another one waits for the
rest until TIMEOUT. So code under `if rank() == 0`, or any condition that differs between processes, must not
call a sharded model or a function of this file that exchanges something.
"""

import contextlib
import datetime
import gc
import os
import sys
import threading
import time

import torch
import torch.distributed as torch_dist

from nanorlhf.kernels.bf16 import cast_once
from nanorlhf.metrics import Figures
from nanorlhf.run import pulse, sharding

TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange: more than the slowest process's rewards may take
_device = torch.device("cpu")  # of this process; `start` sets it once

# ------------------------------------------------------------------------------------------------------------
# the group of processes


def launched():
    """Whether torchrun started this process."""
    return torch_dist.is_torchelastic_launched()


def size():
    """The number of processes, from `start` on."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank():
    """The number of this process: 0 for the first, or the only one."""
    return int(os.environ["RANK"]) if launched() else 0


def start(device):
    """Under torchrun, join the other processes; from then on only rank 0 prints. device: "cpu" or "cuda"."""
    global _device
    if not launched() or torch_dist.is_initialized():
        return
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        _device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(_device)
    store = _store() if _agent_store() else None
    world_size = int(os.environ["WORLD_SIZE"])
    torch_dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank(), world_size=world_size)
    if rank():
        sys.stdout = open(os.devnull, "w")
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def leave(status):
    """Under torchrun, end this process, which failed, at once: destroying the group would wait for the other
    processes (torchtitan issue 1342)."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish():
    """End the group together, after a run. Without the collection and the barrier, a process that ends while
    another still talks to it is aborted now and then, after all work is done (pytorch issue 179291)."""
    if torch_dist.is_initialized():
        gc.collect()
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def _agent_store():
    """Whether torchrun itself runs the key-value store; otherwise rank 0 runs it."""
    return os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def _store():
    """The key-value store, under a prefix for this attempt (torchrun --max-restarts).

    The store outlives the processes. Without the prefix torch 2.13 finds the addresses of the previous
    attempt there, and tries to connect to processes that have ended.
    """
    port = int(os.environ["MASTER_PORT"])
    store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
    return torch_dist.PrefixStore("attempt-" + os.environ["TORCHELASTIC_RESTART_COUNT"], store)


def speaks_first():
    """Whether this failing process is the first that fails. Only the first prints its error.

    The others fail because it ended ("connection closed"), or all meet the same mistake in the flags.
    """
    if not launched():
        return True
    if not torch_dist.is_initialized() and not _agent_store():
        return rank() == 0  # the store is not there yet
    return _store().add("failed", 1) == 1


def _end_with_the_first():
    """End this process when another one failed. An exchange by NCCL would wait for that one until TIMEOUT."""
    with contextlib.suppress(RuntimeError):  # torchrun itself has ended
        store = _store()
        while not store.check(["failed"]):
            time.sleep(0.5)
            if not torch_dist.is_initialized():
                return
    time.sleep(2)  # this process may be ending by itself
    if torch_dist.is_initialized():  # otherwise the run is over, and the store only ended with rank 0
        os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# exchanges


def gather(x):
    """The x of every process → list, ordered by rank. x: anything on the CPU that can be pickled."""
    if size() == 1:
        return [x]
    everyone = [None] * size()
    torch_dist.all_gather_object(everyone, x)
    return everyone


def summed(x):
    """Tensor → its sum over the processes, in place. Each may have filled in its rows of a zero tensor."""
    if size() > 1:
        torch_dist.all_reduce(x)
    return x


def largest(number):
    """The largest of every process's number."""
    return max(gather(number))


def wait():
    """Wait until every process is here."""
    if size() > 1:
        torch_dist.barrier()


def whole_step(figures, *models):
    """Figures and gradients of this process's rows → those of the whole optimizer step, on every process.

    figures: metrics.Figures of Python numbers, put together by their declared kinds. models: those whose
    gradients were formed.
    """
    if size() == 1:
        return figures
    for model in models:
        if sharding.sharded_modules(model):
            continue  # FSDP2 has summed them in the backward pass
        for p in model.parameters():
            if not p.requires_grad:
                continue
            if p.grad is None:  # no rows here, but maybe on another process: all must make this call
                p.grad = torch.zeros_like(p)
            torch_dist.all_reduce(p.grad)  # a sum: each is divided by the whole step's denominator already
    total = Figures(**figures.kinds)
    for part in gather(figures):
        total.add(part)
    return total


# ------------------------------------------------------------------------------------------------------------
# who does what


def my_part(n):
    """The slice of n things that this process works on. Neighbours, so that a prompt's samples stay together.

    5 things on 2 processes: slice(0, 2) and slice(2, 5).

    >>> my_part(5)  # one process
    slice(0, 5, None)
    """
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def my_rows(lengths):
    """lengths (B,) → the indices of this process's rows.

    Rows are dealt out like cards, longest first, so that all processes have as many tokens. Lengths 3, 9, 5
    on 2 processes: rows [1, 0] and [2].

    >>> my_rows([3, 9, 5])  # one process
    tensor([0, 1, 2])
    """
    rows = range(len(lengths))
    if size() > 1:
        lengths = torch.as_tensor(lengths).tolist()  # one copy from the GPU, not one a row
        rows = sorted(rows, key=lambda i: (-lengths[i], i))[rank() :: size()]
    return torch.tensor(rows, dtype=torch.int64)


def share(batch):
    """The batch of an optimizer step → the same of this process's rows alone.

    Lists, and tensors with rows, are cut. Other values, such as denominators and counts, belong to the whole
    step and stay. batch["lengths"] (B,): tokens of each row.
    """
    if size() == 1:
        return batch
    rows = my_rows(batch["lengths"])
    part = dict(batch)
    for name, x in batch.items():
        if isinstance(x, list):
            part[name] = [x[i] for i in rows.tolist()]
        elif isinstance(x, torch.Tensor) and x.dim():
            part[name] = x[rows.to(x.device)]
    return part


def paced(microbatches, *passes):
    """The micro-batches of this process, then an idle pass for each micro-batch that another process has
    more.

    All processes must make equally many passes: a sharded model's weights are gathered in every pass, and all
    take part in that. passes: for each model used, a function (tokens, mask) → tensor, or tuple of tensors.
    """
    own = list(microbatches)
    most = largest(len(own))
    with contextlib.ExitStack() as stack:
        for fn in passes:
            if hasattr(fn, "__self__"):  # a method of a model: no weight changes before the last micro-batch
                stack.enter_context(cast_once(fn.__self__))
        for i, rows in enumerate(own):
            pulse.sign(f"micro-batch {i + 1} of {len(own)}")
            yield rows
        for _ in range(most - len(own)):
            _idle(passes)


def _idle(passes):
    """Forward and backward pass of one row of two tokens, whose loss is 0."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=_device)
    mask = torch.tensor([[False, True]], device=_device)
    loss = 0
    for fn in passes:
        out = fn(tokens, mask)
        out = out[0] if isinstance(out, tuple) else out
        loss = loss + 0 * out.sum()
    if loss.requires_grad:
        loss.backward()


def generate_by_share(generate, model, prompts, n, **settings):
    """Sample for this process's part of the prompts → Rollout of all prompts, on every process.

    generate(model, prompts, n=n, first_row=..., **settings) samples on one process. Its random numbers are
    rows of the whole step's table, from first_row on. prompts must not be empty; a process may get none of
    them.
    """
    part = my_part(len(prompts))
    roll = None
    with sharding.gathered(model) as plain:
        if prompts[part]:
            roll = generate(plain, prompts[part], n=n, first_row=part.start * n, **settings).to("cpu")
    rolls = [roll for roll in gather(roll) if roll is not None]
    return type(rolls[0]).cat(rolls).to(model.device)


# ------------------------------------------------------------------------------------------------------------
# models


def spread(cfg, *models, frozen=()):
    """Give all processes the same models (or None); with --shard give each process a piece of each model.

    Call it after the last copy.deepcopy of the models and before the optimizer is built: an optimizer built
    before would update the uncut weights, which nobody uses any more. With --shard and --save_memory the
    pieces of frozen models lie in the host's memory. With --shard model files are read here: UserError for a
    bad one.
    """
    if cfg.shard:
        mesh = torch_dist.init_device_mesh(_device.type, (size(),))
        for model in filter(None, models):
            sharding.shard(model, mesh, cfg.dtype, offload=False)
        for model in filter(None, frozen):
            model.requires_grad_(False)  # FSDP2 wants one dtype of what is trained; `freeze` makes two
            sharding.shard(model, mesh, cfg.dtype, offload=cfg.save_memory and _device.type == "cuda")
    elif size() > 1:
        for model in models:
            # Files and seed are the same for all, so the weights are equal already, unless a user's reward
            # file has drawn random numbers at its import. A new head would then differ for the whole run.
            for x in model.state_dict().values():
                torch_dist.broadcast(x, 0)
            head = model.trunk.lm_head
            if model.trunk is not model and head is not None:
                head.requires_grad_(False)  # unused: with a gradient of zeros weight decay would shrink it
