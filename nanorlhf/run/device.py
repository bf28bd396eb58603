"""Where a run computes, and in which precision. Learning curves change by rounding at most."""

import contextlib
import os
from pathlib import Path

import torch

from nanorlhf.errors import require
from nanorlhf.hub.files import read_json
from nanorlhf.run import dist, sharding
from nanorlhf.run.speed import best_threads

ON_GPU = 1 << 15  # tokens of a micro-batch on a GPU, by default: with few it waits for the next launch


def setup(cfg):
    """Seed torch, join the other processes of torchrun (if any) → torch.device.

    --device auto takes CUDA, then Apple's mps, then the CPU. --deterministic makes torch take algorithms that
    repeat bit by bit, and warn where it has none; on the CPU all of ours repeat without it. UserError for
    flags that do not work here.
    """
    has = _devices()
    device = device_of(cfg)
    require(has[device], f"--device {device}: this torch sees no such GPU; use cpu, or another torch")
    _join(cfg, device)  # from here on only the first of several processes prints
    if device == "cuda":
        _settle_on_cuda(cfg)
    torch.manual_seed(cfg.seed)
    if getattr(cfg, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with a fixed one
        torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device(device)


def _devices():
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def device_of(cfg):
    """Where a run with these flags computes, by name: "cuda", "mps" or "cpu"."""
    has = _devices()
    return next(name for name in has if has[name]) if cfg.device == "auto" else cfg.device


def _settle_on_cuda(cfg):
    """What a GPU needs and a CPU must not notice: larger micro-batches, attention without cuDNN's plans."""
    larger_microbatches(cfg)
    # cuDNN makes a plan for every new shape, 23 to 37 ms each, and ragged micro-batches are new all the time
    torch.backends.cuda.enable_cudnn_sdp(False)
    if cfg.dtype == "float32":
        print("hint: --dtype bfloat16 computes several times as fast on a GPU as float32")


def larger_microbatches(cfg):
    """Set --tokens_per_microbatch to ON_GPU, unless it was typed or differs from the default of a CPU.

    Not for real models: 32,768 tokens of one with 0.5B parameters have 47 GB of activations.
    """
    name = "tokens_per_microbatch"
    typed = name in getattr(cfg, "asked_for", ()) or getattr(cfg, "is_real", False)
    if getattr(cfg, name, None) == getattr(type(cfg), name, 0) and not typed:
        setattr(cfg, name, ON_GPU)


def _join(cfg, device):
    """Under torchrun, join the other processes. UserError for flags that do not work with them."""
    shard = getattr(cfg, "shard", False)  # evaluate.py and sample.py have no such flag
    if not dist.launched():
        command = "torchrun --standalone --nproc_per_node=8"
        require(not shard, f"--shard cuts the model over processes: start with {command} in place of python")
        return
    require(device != "mps", "--device mps: for one process only; use cpu or cuda with torchrun")
    if device == "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count()
        require(processes <= gpus, f"--nproc_per_node={processes} of torchrun: here are {gpus} GPUs")
    dist.start(device)
    processes = dist.size()
    for flag in ("batch_size", "prompts_per_step"):
        n = getattr(cfg, flag, processes)
        few = f"--{flag} {n}: fewer than the {processes} processes; some would have nothing to do"
        require(n >= processes, few)
        if n % processes:
            uneven = f"--{flag} {n} does not divide by {processes} processes"
            print(f"{uneven}: some have one row more than others")
    if not shard:
        return
    older = getattr(cfg, "off_policy_steps", 0)
    require(not older, "--off_policy_steps does not go together with --shard")
    moves = cfg.lora_rank and getattr(cfg, "ref_every", 0)
    require(not moves, "--ref_every does not go together with --lora_rank and --shard")
    from torch.distributed.fsdp import FSDPModule  # two seconds

    new = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    require(new, f"--shard needs a newer torch than {torch.__version__}: pip install -U torch")


THREADS = torch.get_num_threads()  # torch's own choice
LARGE = 50_000_000  # parameters; a real model


def to_device(cfg, device, *models):
    """Move models (or None) to the device in place; set their dtypes and the number of threads.

    Weights are fp32, activations have --dtype, logits are always fp32. Only --dtype bf16_weights keeps the
    weights, and so Adam's moments, in bfloat16, with activations in fp32. A step that is smaller than half
    the spacing of bfloat16 numbers is then lost.

    Below a million parameters one thread is faster than two, and on a busy machine a hundred times faster:
    the threads wait for each other at every small operation. Above LARGE the number is measured. The largest
    model decides, so give all in one call.
    """
    compute_dtype = {"bfloat16": torch.bfloat16, "bf16_weights": torch.float32}.get(cfg.dtype)
    weight_dtype = torch.bfloat16 if cfg.dtype == "bf16_weights" else None  # None: as it is
    home = None if getattr(cfg, "shard", False) else device  # the model may not fit; FSDP2 moves each block
    largest = 0
    measured = None  # the trunk of the largest
    for model in filter(None, models):
        model.to(home, weight_dtype)
        trunk = model.trunk
        trunk.compute_dtype = compute_dtype
        trunk.recompute = getattr(cfg, "save_memory", False)
        size = sum(p.numel() for p in model.parameters())
        if size > largest:
            largest = size
            measured = trunk
    if not cfg.threads and largest > LARGE and device_of(cfg) == "cpu" and THREADS > 1:
        cfg.threads = _measured_threads(cfg, measured)
    torch.set_num_threads(cfg.threads or (1 if largest < 1_000_000 else THREADS))


def _measured_threads(cfg, trunk):
    """The fastest number of threads now; a trainer prints it. A resumed run keeps its own, for its bits."""
    trains = hasattr(cfg, "resume")
    if trains and cfg.resume:
        saved = read_json(Path(cfg.out, "config.json")).get("threads")
        if type(saved) is int and 0 < saved <= 1024:
            return saved
    threads, rates = best_threads(THREADS, trunk.cfg.d_model, trunk.cfg.d_ff, trunk.dtype)
    shown = ", ".join(f"{rate / 1e9:.0f} GFLOP/s on {n}" for n, rate in rates.items())
    if trains:
        print(f"--threads {threads}: measured just now, {shown}")
    return threads


def freeze(cfg, *models, trained):
    """Let models (or None) that are only read take less memory: --dtype bfloat16 and --save_memory.

    bfloat16 halves the memory of their matrices and changes no bit, because a weight is cast to the dtype of
    the activations whenever it is used. What is read in fp32 stays in fp32: embeddings to which learned
    positions are added, a reward model's head, and, except on CUDA, the unembedding. Rounded to bf16 it would
    put a reference up to 6e-3 nats a token away from a policy of the same weights. A reference that shares
    tensors with a `trained` model (LoRA) is left as it is. With --save_memory a model stays in the CPU's
    memory until `at_work`; with --shard it is FSDP2 that moves it (dist.spread).
    """
    trained_ids = {id(p) for model in trained for p in model.parameters()}
    offload = cfg.save_memory and not cfg.shard
    for model in filter(None, models):
        trunk = model.trunk
        if any(id(p) in trained_ids for p in trunk.parameters()):
            continue
        if cfg.dtype == "bfloat16":
            in_fp32 = ["wte", "wpe"] if trunk.wpe is not None else []
            if model is trunk and device_of(cfg) != "cuda":
                in_fp32.append("wte" if trunk.cfg.tied else "lm_head")
            for name, p in trunk.named_parameters():
                if p.dim() > 1 and not name.startswith(tuple(in_fp32)):
                    p.data = p.data.bfloat16()
        if offload and model.device.type != "cpu":
            model.home = model.device
            if model.device.type != "meta":  # --dry_run
                model.to("cpu")


@contextlib.contextmanager
def at_work(model):
    """Inside, a model that `freeze` has offloaded is on its device; afterwards on the CPU again."""
    home = getattr(model, "home", None)
    if home is None:
        yield
        return
    model.to(home)
    try:
        yield
    finally:
        model.to("cpu")


def adamw(groups, device, **settings):
    """torch.optim.AdamW, with its own settings (lr, betas, ...). On CUDA one kernel updates all weights."""
    return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None, **settings)


def clip_gradient(model, max_norm):
    """Scale the model's gradient down to the norm max_norm if it is longer → its norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return sharding.full(norm).item()


def set_rate(opt, lr):
    """Give an optimizer this learning rate → the rate, for the log."""
    for group in opt.param_groups:
        group["lr"] = lr
    return lr


def rl_rate(step, cfg):
    """GRPO's learning rate: it rises over the first 5 steps, and falls linearly to 0 at the end.

    With cfg.constant_lr_after it rises over that many steps, and then stays.
    """
    if cfg.constant_lr_after:
        return cfg.lr * min((step + 1) / cfg.constant_lr_after, 1)
    return cfg.lr * min((step + 1) / 5, 1 - step / cfg.steps)


def lr_at(step, steps, peak):
    """Learning rate: linear warm-up over the first 5% of the steps, then linear down to peak/10.

    >>> [round(lr_at(step, 100, 1.0), 3) for step in (0, 4, 99)]
    [0.2, 0.964, 0.109]
    """
    warmup = max(1, round(0.05 * steps))
    return peak * min((step + 1) / warmup, 1 - 0.9 * step / steps)
