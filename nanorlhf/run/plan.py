"""The GPU memory that a run needs, computed before it starts (--dry_run).

The trainer's own loader builds the models on the meta device, where tensors have shapes but no memory. It
reads config.json and the tokenizer's files, but no weights; data is read as in training. Weights, gradients
and AdamW's moments are counted from the models' tensors. Activations are counted as in "Reducing Activation
Recomputation in Large Transformer Models" (arXiv 2205.05198), from what our modules save for their backward
pass. Sizes are bytes on one GPU, for a run of one process. Memory lost to fragmentation is not counted.
"""

import os
import sys
from typing import NamedTuple

import torch

from nanorlhf import lora, tasks
from nanorlhf.kernels.slots import PREFILL, SLOTS, that_fit
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.pairs import load_examples
from nanorlhf.rewards import SCORE_TOKENS, load_prompts
from nanorlhf.run import worker
from nanorlhf.run.device import freeze

META = torch.device("meta")
GIB = 1 << 30
TILES = 96 << 20  # bytes of logits that the Triton backend holds at once; the torch backend holds fewer
STORED = GIB  # at most so many bytes where it forms a loss in one pass (triton_backend.STORED_BYTES)
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
    total = 0
    for p in module.parameters():
        if p.dim() == 2 and p.dtype.itemsize != c:
            total += c * p.numel()
    return total


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


def head_bytes(model, logits=TILES, train=False):
    """Bytes that log-probs need: logits, the unembedding where it is cast, and its gradient in fp32."""
    if isinstance(model, ScalarModel):
        return 0
    weight = model.trunk.wte.weight
    c = width(model)
    out = logits
    if weight.itemsize > c:
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


def sampling_parts(model, slots, length, prompt):
    """→ {part: bytes} while `slots` rows are sampled, of `length` tokens with a prompt of `prompt` tokens."""
    c = width(model)
    prefilled = max(prompt, min(PREFILL, slots * prompt))  # padded tokens prefilled together
    return {
        "KV cache": model.new_cache(slots, length).kv.nbytes,  # on the meta device: nothing is allocated
        "prompts that wait": model.new_cache(1, prefilled).kv.nbytes,
        "a layer at work on prompts": forward_bytes(model, prefilled),
        "weights cast once": cast_bytes(model.blocks, c) + c * model.wte.weight.numel(),
        "logits": 4 * 4 * slots * model.n_ids,  # fp32, with the copies that slots.py makes
    }


def forward_parts(model, tokens):
    """→ {part: bytes} of log-probs without gradient."""
    return {
        "a layer at work": forward_bytes(model, tokens),
        "unembedding, tile of logits": head_bytes(model),
    }


def update_parts(models, tokens, one_pass=True):
    """→ {part: bytes} of forward and backward pass of the trained models, on so many padded tokens.

    A loss that is formed in one pass stores logits with their gradients, otherwise tiles of logits are made
    twice.
    """
    logits = STORED if one_pass else TILES
    return {
        "activations": sum(activation_bytes(m, tokens) for m in models),
        "a layer at work": forward_bytes(models[0], tokens),
        "unembedding, gradient, tile of logits": sum(head_bytes(m, logits, train=True) for m in models),
    }


# ------------------------------------------------------------------------------------------------------------
# One plan per trainer. `load` is the trainer's own loader


def _microbatch(cfg, rows, longest):
    """Padded tokens of the largest micro-batch: the budget or all rows, and at least the longest row."""
    tokens = rows * longest
    if cfg.tokens_per_microbatch:
        tokens = min(tokens, cfg.tokens_per_microbatch)
    return max(longest, tokens)


def _summary(lengths, unit="tokens"):
    return f"{sum(lengths) / len(lengths):.0f} {unit} on average, {max(lengths):,} at most"


def _supervised(about, cfg, model, rows, lengths, sampled=None):
    """The plan of a trainer whose step trains on `rows` rows of the data, which have these lengths."""
    longest = max(lengths)
    phases = {
        "update": update_parts([model], _microbatch(cfg, rows, longest)),
        "evaluation": forward_parts(model, 64 * longest),
    }
    about = f"{len(lengths):,} {about}, {_summary(lengths)}"
    report(about, {"model": model}, {}, phases, sampled)


def sft(cfg, load):
    model, _, data, _ = load(cfg, META)
    lengths = [len(ids) for ids, _ in data]
    longest = max(lengths)
    sampled = SampledRows(model, rows=8, length=longest, prompt=longest)
    _supervised("demonstrations", cfg, model, cfg.batch_size, lengths, sampled)


def rm(cfg, load, load_pairs):
    model, tok = load(cfg, META)
    lora.add(model, cfg.lora_rank, cfg.dtype)
    if cfg.data:
        pairs, _ = load_pairs(cfg, tasks.get(cfg.task), model, tok)
        lengths = _side_lengths(pairs)
    else:
        lengths = _made_lengths(cfg, model, tok)
    _supervised("sides of pairs", cfg, model, 2 * cfg.batch_size, lengths)


def _side_lengths(pairs):
    """Tokens of both sides of each pair, with its prompt."""
    lengths = []
    for prompt, first, second, *_ in pairs:
        lengths += [len(prompt) + len(first), len(prompt) + len(second)]
    return lengths


def _made_lengths(cfg, model, tok):
    """Tokens of both sides of 256 pairs that the trainer would sample, each at its longest."""
    task = tasks.get(cfg.task)
    prompts = [tok.encode_prompt(row["prompt"]) for row in task.prompts("train", 256, cfg.seed)]
    return 2 * [min(model.cfg.max_len, len(prompt) + task.max_new_tokens) for prompt in prompts]


def dpo(cfg, load):
    policy, ref, rm, tok = load(cfg, META)
    freeze(cfg, ref, rm, trained=[policy])
    task = tasks.get(cfg.task)
    worker.rewards_of(task, cfg.reward)
    if cfg.data:
        examples = load_examples(cfg, task, policy, tok, cfg.loss == "kto")[0]
        lengths = _side_lengths(examples)
    else:
        lengths = _made_lengths(cfg, policy, tok)
    longest = max(lengths)
    tokens = _microbatch(cfg, 2 * cfg.batch_size, longest)
    phases = {
        "scoring": forward_parts(policy, max(tokens, SCORE_TOKENS if rm else 8192)),
        "update": update_parts([policy], tokens, one_pass=False),
    }
    rows = cfg.eval_prompts
    copies = 0
    if cfg.online:
        rows = max(rows, 512)
        if cfg.online_ref == "round":
            copies = n_bytes([policy])
    length = min(policy.cfg.max_len, longest + cfg.max_new_tokens)
    sampled = SampledRows(policy, rows, length, prompt=longest)
    about = f"{len(lengths) // 2:,} pairs, {_summary(lengths, 'tokens a side')}"
    report(about, {"policy": policy}, {"reference": ref, "reward model": rm}, phases, sampled, copies)


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
    rewards = worker.rewards_of(task, cfg.reward)
    data, test = load_prompts(cfg, task, tok, policy.cfg.max_len, new, rewards)
    new = new or cfg.max_new_tokens
    prompts = [len(row["_ids"]) for row in data]
    longest = max(prompts) + new
    rows = cfg.prompts_per_step * cfg.group_size
    tokens = _microbatch(cfg, rows, longest)
    by_token = getattr(cfg, "ratio", "token") == "token" and not distills
    phases = {
        "scoring": forward_parts(policy, max(tokens, SCORE_TOKENS if rm else 0)),
        "update": update_parts(list(trained.values()), tokens, one_pass=by_token),
    }
    if distills or getattr(cfg, "kl", "") == "exact":  # a forward pass of the other model in each micro-batch
        phases["update"] |= {f"reference, {name}": n for name, n in forward_parts(ref, tokens).items()}
    copies = 0
    older = getattr(cfg, "off_policy_steps", 0)
    if older:  # the sampler, and the weights of each step since it was current
        copies = n_bytes([policy]) * (older + 2)
    rows = max(rows, min(512, len(test)))  # those of a step, or of the evaluation
    sampled = SampledRows(policy, rows, longest, max(prompts))
    about = f"{len(data):,} prompts, {_summary(prompts)}; responses of at most {new:,}"
    frozen = {"teacher" if distills else "reference": ref, "reward model": rm}
    report(about, trained, frozen, phases, sampled, copies)


# ------------------------------------------------------------------------------------------------------------
# The report


def report(about, trained, frozen, phases, sampled=None, copies=0):
    """Print the plan, at most 80 columns wide. The peak is the resident memory and the largest phase's.

    about: a line on the data. trained, frozen: {name: model, frozen ones may be None}. phases: {phase: {part:
    bytes}}. sampled: SampledRows. copies: bytes of further copies of the weights.
    A GPU with little memory samples fewer rows at once. The figures are for the smallest GPU on which memory
    does not reduce them, or else for the largest GPU. The last lines name the GPUs that the run fits, up to
    that one.
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

    away = [model for model in frozen.values() if hasattr(model, "home")]  # --save_memory
    if away:
        phases["scoring"]["largest offloaded model"] = max(n_bytes([model]) for model in away)
    stay = [model for model in models.values() if model not in away]
    gradients = trained_bytes(trained.values())
    always = {
        "weights": n_bytes(stay) + copies,
        "gradients": gradients,
        "optimizer (AdamW's two moments)": 2 * gradients,
        "CUDA's own, about": CONTEXT,
    }
    resident = sum(always.values())
    slots = 0
    wanted = min(sampled.rows, SLOTS) if sampled else 0
    fits = []
    for gib in SIZES:
        if sampled:
            slots = that_fit(sampled.model, wanted, sampled.length, gib * GIB - resident)
            phases["sampling"] = sampling_parts(sampled.model, slots, sampled.length, sampled.prompt)
        sizes = {phase: sum(parts.values()) for phase, parts in phases.items()}
        largest = max(sizes, key=sizes.get)
        peak = resident + sizes[largest]
        if peak > gib * GIB:
            continue
        fewer = f", sampling {slots} of {wanted} rows at once" if slots < wanted else ""
        fits.append(f"  fits a GPU of {gib} GiB{fewer}")
        if slots == wanted:
            break

    print("\nmemory of the GPU, GiB")
    rows = always
    for phase, parts in phases.items():
        rows |= {f"{phase}: {name}": size for name, size in parts.items()}
    for name, size in rows.items():
        print(f"  {name:<46}{size / GIB:>10.2f}")
    print(f"  {'at most':<46}{peak / GIB:>10.2f}  ({largest})")
    print("\n".join(fits) or "  fits no single GPU")
