"""Where a run computes and in which precision: none of it moves a learning curve, but for rounding."""

import contextlib
import os

import torch

from nanorlhf.errors import require
from nanorlhf.run import dist


def setup(cfg):
    """Seeds torch; cfg.device → torch.device. `auto` takes CUDA, then Apple's mps, then the CPU.

    With cfg.deterministic torch takes algorithms that repeat bit by bit, and warns where it has none. On the
    CPU all of ours do so anyway.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in has if has[d]) if cfg.device == "auto" else cfg.device
    require(has[device], f"--device {device}: this torch sees no such GPU; use cpu, or another torch")
    _join(cfg, device)
    torch.manual_seed(cfg.seed)
    if getattr(cfg, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with a fixed one
        torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device(device)


def _join(cfg, device):
    """Join the other processes of torchrun; UserError for what does not work, or not with so many of them."""
    shard = getattr(cfg, "shard", False)  # evaluate.py and sample.py have no such flag
    if not dist.launched():
        how = "start with torchrun --standalone --nproc_per_node=8 in place of python"
        require(not shard, f"--shard cuts the model over processes: {how}")
        return
    require(device != "mps", "--device mps: for one process only; use cpu or cuda with torchrun")
    here, asked = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require(device == "cpu" or asked <= here, f"--nproc_per_node={asked} of torchrun: here are {here} GPUs")
    dist.start(device)
    for flag in ("batch_size", "prompts_per_step"):
        n = getattr(cfg, flag, None)
        say = f"--{flag} {n}: fewer than the {dist.size()} processes; some would have nothing to do"
        require(n is None or n >= dist.size(), say)
        if n is not None and n % dist.size():
            more = "some have one row more than others"
            print(f"--{flag} {n} does not divide by {dist.size()} processes: {more}")
    if shard:
        older = getattr(cfg, "off_policy_steps", 0)
        require(not older, "--off_policy_steps does not go together with --shard")
        both = cfg.lora_rank and getattr(cfg, "ref_every", 0)
        require(not both, "--ref_every does not go together with --lora_rank and --shard")
        from torch.distributed.fsdp import FSDPModule  # two seconds

        new = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
        require(new, f"--shard needs a newer torch than {torch.__version__}: pip install -U torch")


THREADS = torch.get_num_threads()  # torch's own choice


def to_device(cfg, device, *models):
    """Move models (or None), set their dtypes and the number of threads → models.

    bf16_weights: weights in bfloat16 and Adam's moments with them, so that a step smaller than half their
    spacing is lost; activations in fp32. Otherwise weights are fp32, and logits always.

    Below a million parameters one thread is faster than two, and on a busy machine a hundred times faster:
    the threads wait for each other at every small operation. The largest model decides.
    """
    size, rounded = 0, cfg.dtype == "bf16_weights"
    compute = {"bfloat16": torch.bfloat16, "bf16_weights": torch.float32}.get(cfg.dtype)
    home = None if getattr(cfg, "shard", False) else device  # FSDP2 moves a block at a time: all may not fit
    for model in filter(None, models):
        model.to(home, torch.bfloat16 if rounded else None)
        trunk = getattr(model, "trunk", model)
        trunk.compute_dtype = compute
        trunk.recompute = getattr(cfg, "save_memory", False)
        size = max(size, sum(p.numel() for p in model.parameters()))
    torch.set_num_threads(cfg.threads or (1 if size < 1_000_000 else THREADS))
    return models


def freeze(cfg, *models, trained):
    """Let models (or None) that are only read take less memory: --dtype bfloat16 and --save_memory.

    bfloat16 halves their matrices and changes no bit, as a weight is cast to the activations' dtype at its
    use. Embeddings to which learned positions are added in fp32, and a reward model's head, stay in fp32. A
    reference that shares the tensors of a `trained` model (LoRA) is left as it is. With --save_memory a model
    moves to the CPU's memory until `at_work`; what --shard cuts FSDP2 moves itself (dist.spread).
    """
    taken = {id(p) for model in trained for p in model.parameters()}
    for model in filter(None, models):
        trunk = getattr(model, "trunk", model)
        if any(id(p) in taken for p in trunk.parameters()):
            continue
        added = (trunk.wte.weight, trunk.wpe.weight) if trunk.wpe is not None else ()
        for p in trunk.parameters():
            if cfg.dtype == "bfloat16" and p.dim() > 1 and not any(p is x for x in added):
                p.data = p.data.bfloat16()
        sharded = dist.launched() and cfg.shard
        if cfg.save_memory and model.device.type != "cpu" and not sharded:
            model.home = model.device
            if model.device.type != "meta":  # --dry_run
                model.to("cpu")


@contextlib.contextmanager
def at_work(model):
    """Within, a model that `freeze` has offloaded is on its device; afterwards on the CPU again."""
    home = getattr(model, "home", None)
    if home is not None:
        model.to(home)
    try:
        yield
    finally:
        if home is not None:
            model.to("cpu")


def adamw(groups, device, **how):
    """torch.optim.AdamW; on CUDA its fused form, one kernel for all weights."""
    return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None, **how)


def clip_gradient(model, max_norm):
    """Scale the model's gradient down to the norm max_norm, if it exceeds it → its norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return dist.full(norm).item()


def lr_at(step, steps, peak):
    """Learning rate: linear warm-up over the first 5% of the steps, then linear down to peak/10."""
    warmup = max(1, round(0.05 * steps))
    return peak * min((step + 1) / warmup, 1 - 0.9 * step / steps)
