"""The memory that a run needs, and the least time of a step, computed before it starts (--dry_run).

The trainer's own loader builds the models on the meta device, where tensors have shapes but no memory. It
reads config.json and the tokenizer's files, but no weights; data is read as in training. Weights, gradients
and AdamW's moments are counted from the models' tensors. Activations are counted as in "Reducing Activation
Recomputation in Large Transformer Models" (arXiv 2205.05198), from what our modules save for their backward
pass. Sizes are bytes on one GPU, or in the memory of this machine where the run computes on a CPU, for a run
of one process. Memory lost to fragmentation is not counted. The time is that of the matrix products alone, at
the rate that this machine shows in a second.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from nanorlhf import lora, tasks
from nanorlhf.data import epoch_batches, microbatches
from nanorlhf.errors import derive_seed
from nanorlhf.kernels import torch_backend
from nanorlhf.kernels.slots import PREFILL, SLOTS, that_fit, that_stay
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.pairs import load_examples
from nanorlhf.rewards import SCORE_TOKENS, load_prompts
from nanorlhf.run import speed, worker
from nanorlhf.run.device import device_of, freeze

META = torch.device("meta")
GIB = 1 << 30
TILES = 96 << 20  # bytes of logits that the Triton backend holds at once; the torch backend holds fewer
STORED = GIB  # at most so many bytes where it forms a loss in one pass (triton_backend.STORED_BYTES)
CPU_TILES = 5 * 4 * torch_backend.TILE  # the torch backend's tile of logits, and its copies of that size
CPU_STORED = 4 * torch_backend.STORED + CPU_TILES
# Activations take more than their bytes under Linux: glibc's heap has a hole for a temporary tensor between
# two that are kept. An adapter keeps its r numbers a token between two large temporary ones. SmolLM2-135M's
# take 1.51 times their bytes at rank 16, 1.11 without adapters, 1.01 with MALLOC_MMAP_THRESHOLD_=100000.
HOLES = 0.11
ADAPTERS_HOLES = 0.5
DRAWS = 100  # steps whose batches are drawn, to find the largest micro-batch
SIZES = 8, 12, 16, 24, 40, 48, 80, 139  # GiB of GPUs
CONTEXT = GIB // 2  # bytes that CUDA and its libraries take, about


# ------------------------------------------------------------------------------------------------------------
# Bytes of a model


def n_bytes(models):
    """Bytes of weights. Each tensor counts once: LoRA's reference shares those of the policy."""
    weights = {p for model in models for p in model.parameters()}
    return sum(p.nbytes for p in weights)


def trained_bytes(models):
    """Bytes of the trained weights. Gradients take as much again, AdamW's two moments twice as much."""
    return sum(p.nbytes for model in models for p in model.parameters() if p.requires_grad)


def width(model):
    """Bytes of an activation: 2 with --dtype bfloat16, 4 in fp32."""
    return model.trunk.dtype.itemsize


def cast_bytes(module, c):
    """Bytes of the matrices that are cast at each use: in elements of c bytes, those stored in others."""
    return sum(c * p.numel() for p in module.parameters() if p.dim() == 2 and p.dtype.itemsize != c)


def norm_bytes(norm, size, output_width):
    """Bytes per token that a norm of `size` numbers keeps for its backward pass.

    It keeps its input in fp32. RMSNorm with a trained weight also keeps the normalised input, which the
    weight's gradient is computed from. output_width: bytes of an element of the output, or 0 where the next
    operation does not keep its input.
    """
    copies = 1
    if norm.bias is None and norm.weight.requires_grad:
        copies = 2
    return size * (4 * copies + output_width)


def layer_bytes(model):
    """→ (bytes that a block keeps per token for its backward pass, bytes that it keeps for any tokens).

    Per token, with Q = n_head · head_dim, K = n_kv_head · head_dim, F = d_ff, a block keeps two norms
    (norm_bytes); in attention Q queries, 2K keys and values, Q outputs, with rotary positions Q more; in an
    MLP 2F, in SwiGLU 4F. For any tokens it keeps the copies of weights that are cast to the activations'
    dtype. Statistics of norms and of the softmax, and LoRA's r numbers a layer, are below 2% and left out.
    """
    c = width(model)
    cfg = model.trunk.cfg
    block = model.trunk.blocks[0]
    Q = cfg.n_head * cfg.head_dim
    K = cfg.n_kv_head * cfg.head_dim
    per_token = 2 * norm_bytes(block.norm1, cfg.d_model, c)
    if cfg.parallel:  # both norms keep the same x, the residual stream
        per_token -= 4 * cfg.d_model
    if block.attn.q_norm is not None:
        per_token += norm_bytes(block.attn.q_norm, Q + K, 0)
    per_token += c * (2 * Q + 2 * K + 2 * cfg.d_ff)
    if cfg.pos == "rope":
        per_token += c * Q
    if block.mlp.gate is not None:
        per_token += c * cfg.d_ff * 2
    return per_token, cast_bytes(block, c)


def activation_bytes(model, tokens):
    """Bytes kept for the backward pass of so many padded tokens, up to the input of the head."""
    trunk = model.trunk
    per_token, once = layer_bytes(model)
    block = per_token * tokens + once
    if trunk.recompute:  # the inputs of all blocks, and all activations of one block at a time
        inputs = trunk.cfg.n_layer * tokens * trunk.cfg.d_model
        kept = 4 * inputs + block  # the residual stream is fp32
    else:
        kept = trunk.cfg.n_layer * block
    return kept + norm_bytes(trunk.norm, trunk.cfg.d_model, 4) * tokens


def tile_bytes(cfg, one_pass=False):
    """Bytes of logits that are held at once where log-probs, or a loss in one pass, are formed."""
    if device_of(cfg) == "cuda":
        return STORED if one_pass else TILES
    return CPU_STORED if one_pass else CPU_TILES


def head_bytes(cfg, model, logits, train=False):
    """Bytes that log-probs need: logits, the unembedding where it is cast, and its gradient in fp32."""
    if isinstance(model, ScalarModel):
        return 0
    weight = model.trunk.wte.weight
    c = width(model)
    out = logits
    if weight.itemsize > c and device_of(cfg) == "cuda":  # elsewhere it is read itself
        out += c * weight.numel()
    if train and weight.requires_grad:
        out += 4 * weight.numel()
    return out


def forward_bytes(model, tokens):
    """Bytes that one layer uses in a forward pass that keeps nothing, about."""
    cfg = model.trunk.cfg
    activations = 3 * cfg.d_ff + 3 * cfg.d_model
    return tokens * (width(model) * activations + 8 * cfg.d_model)


# ------------------------------------------------------------------------------------------------------------
# Bytes of a phase of training, by part


class SampledRows(NamedTuple):
    """The rows that a run samples in one call. Those that the GPU has no slots for wait their turn."""

    model: GPT
    rows: int
    length: int  # tokens of the longest row, prompt and response
    prompt: int  # tokens of the longest prompt


def sampling_parts(model, slots, length, prompt, on_gpu=True):
    """→ {part: bytes} while `slots` rows are sampled, of `length` tokens with a prompt of `prompt` tokens.

    CUDA has a copy of the unembedding, padded. Elsewhere the weight itself is read.
    """
    c = width(model)
    copied = c if on_gpu else 0
    prefilled = max(prompt, min(PREFILL, slots * prompt))  # padded tokens prefilled together
    return {
        "KV cache": model.new_cache(slots, length).kv.nbytes,  # on the meta device: nothing is allocated
        "prompts that wait": model.new_cache(1, prefilled).kv.nbytes,
        "a layer at work on prompts": forward_bytes(model, prefilled),
        "weights cast once": cast_bytes(model.blocks, c) + copied * model.wte.weight.numel(),
        "logits": 4 * 4 * slots * model.n_ids,  # fp32, with the copies that slots.py makes
    }


def forward_parts(cfg, model, tokens):
    """→ {part: bytes} of log-probs without gradient."""
    return {
        "a layer at work": forward_bytes(model, tokens),
        "weights cast once": cast_bytes(model.trunk.blocks, width(model)),
        "unembedding, tile of logits": head_bytes(cfg, model, tile_bytes(cfg)),
    }


def update_parts(cfg, models, tokens, n_microbatches=2, one_pass=True):
    """→ {part: bytes} of forward and backward pass of the trained models, on so many padded tokens.

    n_microbatches: of an optimizer step. In a single one gradients, which are counted elsewhere, take the
    place of activations, but not of the weights that are cast for the whole step. A loss that is formed in
    one pass stores logits with their gradients, otherwise tiles of logits are made twice.
    """
    logits = tile_bytes(cfg, one_pass)
    kept = sum(activation_bytes(m, tokens) for m in models)
    if n_microbatches == 1:
        once = [m for m in models if width(m) == 2 and not m.trunk.recompute]  # as bf16.cast_once does
        cast = sum(cast_bytes(m.trunk.blocks, 2) for m in once)
        kept = cast + max(0, kept - cast - trained_bytes(models))
    return {
        "activations": kept,
        "a layer at work": forward_bytes(models[0], tokens),
        "unembedding, gradient, tile of logits": sum(head_bytes(cfg, m, logits, train=True) for m in models),
    }


# ------------------------------------------------------------------------------------------------------------
# One plan per trainer. `load` is the trainer's own loader


def _microbatch(cfg, lengths, rows, repeats=1):
    """→ padded tokens of the largest micro-batch; the most micro-batches of a step, which draws `rows` rows.

    lengths: tokens of each row of the data. The batches are those of training. repeats: samples of each row.
    """
    seed = derive_seed(cfg.seed, "data")
    most = n_parts = 0
    for step in range(min(cfg.steps, DRAWS)):
        batch = [lengths[i] for i in epoch_batches(len(lengths), rows, seed, step) for _ in range(repeats)]
        parts = microbatches(batch, cfg.tokens_per_microbatch)
        n_parts = max(n_parts, len(parts))
        for part in parts:
            most = max(most, len(part) * batch[part[0]])  # the longest comes first
    return most, n_parts


def _summary(lengths):
    return f"{sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths):,} at most"


def _supervised(
    about, cfg, model, lengths, scored, sampled=None, per_row=1, frozen=None, one_pass=True, copies=0
):  # fmt: skip
    """The plan of a trainer whose step trains on --batch_size rows of the data, which have these lengths.

    scored: tokens of a pass without gradients. per_row: sequences of each row; a pair is two, padded to the
    longer one.
    """
    units = [max(lengths[i : i + per_row]) * per_row for i in range(0, len(lengths), per_row)]
    tokens, n_microbatches = _microbatch(cfg, units, cfg.batch_size)
    phases = {
        "scoring": forward_parts(cfg, model, scored),
        "update": update_parts(cfg, [model], tokens, n_microbatches, one_pass),
    }
    about = f"{len(lengths):,} {about}, {_summary(lengths)}"
    tokens = cfg.batch_size * sum(lengths) / len(units)
    work = {"update": update_flops(model, tokens, tokens)}
    report(cfg, about, {"model": model}, frozen or {}, phases, work, sampled, copies)


def sft(cfg, load):
    model, _, data, test = load(cfg, META)
    lengths = [len(ids) for ids, _ in data]
    longest = max(lengths)
    sampled = SampledRows(model, rows=8, length=longest, prompt=longest)
    scored = min(64, len(test)) * longest
    _supervised("demonstrations", cfg, model, lengths, scored, sampled)


def rm(cfg, load, load_pairs):
    model, tok = load(cfg, META)
    lora.add(model, cfg.lora_rank, cfg.dtype)
    lengths = _pair_lengths(cfg, model, tok, lambda task: load_pairs(cfg, task, model, tok)[0])
    _supervised("sides of pairs", cfg, model, lengths, 64 * max(lengths), per_row=2)


def _pair_lengths(cfg, model, tok, load):
    """Tokens of both sides of each pair, with its prompt. load(task) → the pairs of --data.

    Without --data of 256 pairs that the trainer would sample, each at its longest.
    """
    task = tasks.get(cfg.task)
    if not cfg.data:
        prompts = [tok.encode_prompt(row["prompt"]) for row in task.prompts("train", 256, cfg.seed)]
        return 2 * [min(model.cfg.max_len, len(prompt) + task.max_new_tokens) for prompt in prompts]
    lengths = []
    for prompt, first, second, *_ in load(task):
        lengths += [len(prompt) + len(first), len(prompt) + len(second)]
    return lengths


def dpo(cfg, load):
    policy, ref, rm, tok = load(cfg, META)
    freeze(cfg, ref, rm, trained=[policy])
    worker.rewards_of(tasks.get(cfg.task), cfg.reward)
    kto = cfg.loss == "kto"
    lengths = _pair_lengths(cfg, policy, tok, lambda task: load_examples(cfg, task, policy, tok, kto)[0])
    rows = cfg.eval_prompts
    copies = 0
    if cfg.online:
        rows = max(rows, 512)
        if cfg.online_ref == "round":
            copies = n_bytes([policy])
    longest = max(lengths)
    length = min(policy.cfg.max_len, longest + cfg.max_new_tokens)
    sampled = SampledRows(policy, rows, length, prompt=longest)
    frozen = {"reference": ref, "reward model": rm}
    scored = SCORE_TOKENS if rm else 8192
    _supervised(
        "sides of pairs", cfg, policy, lengths, scored, sampled,
        per_row=2, frozen=frozen, one_pass=False, copies=copies,
    )  # fmt: skip


def rl(cfg, load):
    """PPO, GRPO and distillation, whose reference is the teacher. Only PPO's loader returns a critic."""
    policy, ref, *critic, rm, tok = load(cfg, META)
    distills = hasattr(cfg, "teacher")
    trained = {"policy": policy}
    if critic:
        trained["critic"] = critic[0]
    freeze(cfg, ref, rm, trained=trained.values())
    new = cfg.limits[-1] if hasattr(cfg, "limits") else cfg.max_new_tokens
    task = tasks.get(cfg.task)
    rewards = worker.rewards_of(None if distills and cfg.own_data else task, cfg.reward)
    data, test = load_prompts(cfg, task, tok, policy.cfg.max_len, new, rewards)
    new = new or cfg.max_new_tokens
    prompts = [len(row["_ids"]) for row in data]
    longest = max(prompts) + new
    lengths = [n + new for n in prompts]
    tokens, _ = _microbatch(cfg, lengths, cfg.prompts_per_step, cfg.group_size)
    minibatch = max(1, cfg.prompts_per_step // getattr(cfg, "minibatches", 1))
    updated, n_microbatches = _microbatch(cfg, lengths, minibatch, cfg.group_size)
    by_token = getattr(cfg, "ratio", "token") == "token" and not distills
    phases = {
        "scoring": forward_parts(cfg, policy, max(tokens, SCORE_TOKENS if rm else 0)),
        "update": update_parts(cfg, list(trained.values()), updated, n_microbatches, by_token),
    }
    if distills or getattr(cfg, "kl", "") == "exact":  # a forward pass of the other model in each micro-batch
        phases["update"]["pass of the reference"] = sum(forward_parts(cfg, ref, tokens).values())
    rows = cfg.prompts_per_step * cfg.group_size
    all_tokens = rows * sum(lengths) / len(lengths)
    frozen = {"teacher" if distills else "reference": ref, "reward model": rm}
    scored = rows * new  # each response at its longest
    work = {"sampling": pass_flops(policy, scored, scored)}
    for name, model in (frozen | {"critic": trained.get("critic")}).items():
        if model is not None:
            work[name] = pass_flops(model, all_tokens, scored)
    updates = [update_flops(model, all_tokens, scored) for model in trained.values()]
    work["update"] = getattr(cfg, "epochs", 1) * sum(updates)
    copies = 0
    older = getattr(cfg, "off_policy_steps", 0)
    if older:  # the sampler, and the weights of each step since it was current: those that are trained
        copies = n_bytes([policy]) + trained_bytes([policy]) * (older + 1)
    rows = max(rows, min(512, len(test)))  # those of a step, or of the evaluation
    sampled = SampledRows(policy, rows, longest, max(prompts))
    about = f"{len(data):,} prompts, {_summary(prompts)}; responses of at most {new:,}"
    report(cfg, about, trained, frozen, phases, work, sampled, copies)


# ------------------------------------------------------------------------------------------------------------
# The report


def report(cfg, about, trained, frozen, phases, work, sampled=None, copies=0):
    """Print the plan, at most 80 columns wide. The peak is the resident memory and the largest phase's.

    about: a line on the data. trained, frozen: {name: model, frozen ones may be None}. phases: {phase: {part:
    bytes}}. work: {phase: operations of a step}. sampled: SampledRows. copies: bytes of further copies of the
    weights.
    """
    print(f"dry run of {os.path.basename(sys.argv[0])}: nothing is trained or written\n{about}\n")
    frozen = {name: model for name, model in frozen.items() if model}
    models = trained | frozen
    for name, model in models.items():
        n = sum(p.numel() for p in model.parameters())
        state = "frozen"
        if name in trained:
            n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            state = f"{n_trained:,} trained"
        print(f"  {name:<14}{n:>16,} parameters, {state}")

    on_gpu = device_of(cfg) == "cuda"
    away = [model for model in frozen.values() if hasattr(model, "home")]  # --save_memory
    if away and on_gpu:
        phases["scoring"]["largest offloaded model"] = max(n_bytes([model]) for model in away)
    stay = [model for model in models.values() if model not in away or not on_gpu]
    gradients = trained_bytes(trained.values())
    always = {
        "weights": n_bytes(stay) + copies,
        "gradients": gradients,
        "optimizer (AdamW's two moments)": 2 * gradients,
    }
    if on_gpu:
        _fit_a_gpu(always, phases, sampled)
    else:
        _fit_this_machine(cfg, always, phases, sampled, trained)
    _least_time(cfg, next(iter(trained.values())), work, sampled)


def _fit_a_gpu(always, phases, sampled):
    """Print the parts, and the GPUs that hold them.

    A GPU with little memory samples fewer rows at once. The figures are for the smallest GPU on which memory
    does not reduce them, or else for the largest GPU. The last lines name the GPUs that the run fits, up to
    that one.
    """
    always["CUDA's own, about"] = CONTEXT
    resident = sum(always.values())
    slots = 0
    wanted = min(sampled.rows, SLOTS) if sampled else 0
    fits = []
    for gib in SIZES:
        if sampled:
            slots = that_fit(sampled.model, wanted, sampled.length, gib * GIB - resident)
            parts = sampling_parts(*sampled._replace(rows=slots))
            stay = parts["KV cache"] + parts["weights cast once"] + parts["logits"]
            for others in phases.values():
                others["slots that stay"] = that_stay(sampled.model, stay, gib * GIB)
            phases["sampling"] = parts
        _, peak = _peak(always, phases)
        if peak > gib * GIB:
            continue
        fewer = f", sampling {slots} of {wanted} rows at once" if slots < wanted else ""
        fits.append(f"  fits a GPU of {gib} GiB{fewer}")
        if slots == wanted:
            break
    _print_parts("memory of the GPU, GiB", always, phases)
    print("\n".join(fits) or "  fits no single GPU")


def _fit_this_machine(cfg, always, phases, sampled, trained):
    """Print the parts, and whether the memory of this machine holds them. A CPU samples all rows at once."""
    always["Python, torch, tokenizer, data"] = _resident_now()
    update = phases["update"]
    holes = ADAPTERS_HOLES if cfg.lora_rank else HOLES
    update["holes in the heap between them"] = holes * update["activations"]
    # What the backward pass has freed stays in the heap; a tensor above 32 MB is mapped, beside the heap
    matrices = [p for model in trained.values() for p in model.parameters() if p.dim() == 2]
    update["AdamW at work on the largest matrix"] = 2 * max(p.nbytes for p in matrices if p.requires_grad)
    if sampled:
        phases["sampling"] = sampling_parts(*sampled, on_gpu=False)
    if cfg.init:  # one file at a time is mapped, while gradients and moments are not there
        mapped = max(0, _file_bytes(cfg.init) - 3 * always["gradients"])
        phases["loading"] = {"file of weights, mapped": mapped}
    if cfg.lora_rank:  # one model is saved after the other
        merged = max(
            sum(4 * p.numel() for p in m.parameters() if p.dim() == 2 and not p.requires_grad)
            for m in trained.values()
        )
        phases["saving"] = {"weights with their adapters": merged}
    _print_parts("memory of this machine's CPU, GiB", always, phases)
    _, peak = _peak(always, phases)
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        verdict = "fits" if peak < memory else "does not fit"
        print(f"  {verdict} into the {memory / GIB:.1f} GiB of this machine")


def _peak(always, phases):
    """→ the phase that takes most, the bytes of it and of what is always there."""
    largest = max(phases, key=lambda phase: sum(phases[phase].values()))
    return largest, sum(always.values()) + sum(phases[largest].values())


def _print_parts(title, always, phases):
    print(f"\n{title}")
    rows = dict(always)
    for phase, parts in phases.items():
        rows |= {f"{phase}: {name}": size for name, size in parts.items()}
    for name, size in rows.items():
        print(f"  {name:<46}{size / GIB:>10.2f}")
    largest, peak = _peak(always, phases)
    print(f"  {'at most':<46}{peak / GIB:>10.2f}  ({largest})")


def _resident_now():
    """Bytes that this process takes with tokenizer, data and an optimizer, but without weights.

    The first optimizer makes torch import its compiler, 120 MB.
    """
    torch.optim.AdamW([torch.zeros(1)])
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 420 << 20  # where there is no such file: as much as under Linux, about


def _file_bytes(folder):
    """Bytes of the largest file of weights in a folder, or of a .gguf."""
    path = Path(folder)
    files = [path, *path.glob("*.safetensors")]
    return max((file.stat().st_size for file in files if file.is_file()), default=0)


# ------------------------------------------------------------------------------------------------------------
# Time


def pass_flops(model, tokens, scored):
    """Operations of a forward pass: two for each weight and token; the head sees the scored tokens only."""
    weights = sum(p.numel() for p in model.trunk.blocks.parameters() if p.dim() == 2)
    head = 0 if isinstance(model, ScalarModel) else model.trunk.wte.weight.numel()
    return 2 * (weights * tokens + head * scored)


def update_flops(model, tokens, scored):
    """Operations of forward and backward pass: as many again for activations, and for weights if trained."""
    trains_all = model.trunk.blocks[0].norm1.weight.requires_grad
    return (3 if trains_all else 2) * pass_flops(model, tokens, scored)


def _least_time(cfg, model, work, sampled):
    """Print the seconds that the matrix products of a step take at the rate of this machine, right now."""
    device = device_of(cfg)
    if device == "cuda" and not torch.cuda.is_available():
        return
    trunk = model.trunk
    print("\nmatrix products of a step, at rates measured just now; other work comes on top")
    total = 0.0
    for phase, operations in work.items():
        rows = sampled.rows if phase == "sampling" else 512
        rate = speed.flops(rows, trunk.cfg.d_model, trunk.cfg.d_ff, trunk.dtype, device, seconds=0.4)
        seconds = operations / rate
        total += seconds
        print(f"  {phase:<14}{operations / 1e12:>10.3f} TFLOP{rate / 1e9:>10,.1f} GFLOP/s{seconds:>12.2f} s")
    print(f"  {'a step':<43}{total:>12.2f} s; {cfg.steps:,} steps {total * cfg.steps / 60:.1f} minutes")
