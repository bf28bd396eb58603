"""What a run will need, said before it starts (--dry_run): parameters, memory by part, FLOPs of a step.

The trainers' own functions build the models, on the meta device, so that nothing is loaded and no weights
need be there: config.json and the tokenizer's files are enough. Data and tokenizer are read as in training.
What is counted is what this code keeps: weights and optimizer states from the very tensors, activations as in
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), but by what our modules
save for their backward pass. Bytes are per GPU, and the run uses one. Fragmentation is not counted.
"""

import contextlib
import os
import sys

import torch

from nanorlhf import hub, lora, tasks
from nanorlhf.kernels.slots import PREFILL, SLOTS, that_fit
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.pairs import encode_pairs, load_examples, load_rows, require_both
from nanorlhf.rewards import SCORE_TOKENS, load_prompts
from nanorlhf.run import worker
from nanorlhf.run.device import freeze

META = torch.device("meta")
GIB = 1 << 30
TILES = 96 << 20  # bytes of logits that the Triton backend holds at once; the torch backend less
STORED = GIB  # the same for losses in one pass (kernels/triton_backend.py: STORED_BYTES), at most
SIZES = 8, 12, 16, 24, 40, 48, 80, 139  # GiB of GPUs
CONTEXT = GIB // 2  # what CUDA itself and its libraries take, about
PEAK, SHARE, BANDWIDTH = 312e12, 0.4, 2.0e12  # A100 80 GB: bf16 FLOP/s, of which we expect 40%; bytes/s


@contextlib.contextmanager
def without_weights():
    """Inside, hub.load builds its models on the meta device, and reads no weights."""
    fill, drawing = hub._fill, hub._Drawing
    hub._fill, hub._Drawing = lambda model, family, folder: None, contextlib.nullcontext
    try:
        with META:
            yield
    finally:
        hub._fill, hub._Drawing = fill, drawing


# ------------------------------------------------------------------------------------------------------------
# arithmetic


def _trunk(model):
    return getattr(model, "trunk", model)


def n_bytes(*models):
    """Bytes of weights and buffers, each tensor once: LoRA's reference shares those of the policy."""
    tensors = {id(x): x for m in models for x in (*m.parameters(), *m.buffers())}
    return sum(x.nbytes for x in tensors.values())


def trained_bytes(*models):
    """Bytes of what the optimizer moves; gradients take as much, AdamW's two moments twice as much."""
    return sum(p.nbytes for m in models for p in m.parameters() if p.requires_grad)


def width(model):
    """Bytes of an activation."""
    return (_trunk(model).compute_dtype or _trunk(model).wte.weight.dtype).itemsize


def kv_bytes(model, rows, length):
    """Bytes of the keys and values of all layers: rows × length × 2 · n_layer · n_kv_head · head_dim."""
    cfg = _trunk(model).cfg
    return 2 * cfg.n_layer * rows * length * cfg.n_kv_head * cfg.head_dim * width(model)


def _saved_by_norm(norm, rows, c, out=True):
    """Bytes a norm's backward pass keeps per token: its input in fp32, its statistics, what multiplies a
    trained weight; and its output, in c bytes, if what follows keeps it."""
    D, layer = len(norm.weight), norm.bias is not None
    fp32 = D * (1 if layer or not norm.weight.requires_grad else 2) + (2 if layer else 1)
    return rows * (4 * fp32 + c * D * out)


def layer_bytes(model):
    """→ (bytes that one block keeps per token for its backward pass, bytes that it keeps once).

    With D width, F of the MLP, Q = n_head · head_dim, K = n_kv_head · head_dim, in elements: norms, above;
    attention Q + 2K + Q (its output; with rotary positions once more, in another order), fp32 log-sum-exps;
    MLP 2F, SwiGLU 4F; adapters r each. Once: the copies in c bytes of weights that are kept in others.
    """
    trunk, c = _trunk(model), width(model)
    block, cfg = trunk.blocks[0], trunk.cfg
    attn, mlp = block.attn, block.mlp
    Q, K = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    per_token = _saved_by_norm(block.norm1, 1, c) + _saved_by_norm(block.norm2, 1, c)
    if cfg.parallel:  # both norms read the same x; in bf16 each has its own fp32 copy
        per_token -= 4 * cfg.d_model * (c == 4)
    if attn.q_norm is not None:
        per_token += _saved_by_norm(attn.q_norm, cfg.n_head, c, out=False)
        per_token += _saved_by_norm(attn.k_norm, cfg.n_kv_head, c, out=False)
    per_token += c * (2 * Q + 2 * K + Q * (cfg.pos == "rope")) + 4 * cfg.n_head
    per_token += c * cfg.d_ff * (4 if mlp.gate is not None else 2)
    matrices = [p for p in block.parameters() if p.dim() == 2]
    once = sum(c * p.numel() for p in matrices if p.dtype.itemsize != c)
    return per_token + sum(c * len(m.A) for m in block.modules() if isinstance(m, lora.Adapted)), once


def activation_bytes(model, tokens):
    """Bytes kept for the backward pass of so many padded tokens, those for the head included."""
    trunk = _trunk(model)
    per_token, once = layer_bytes(model)
    last = _saved_by_norm(trunk.norm, 1, 4)
    kept = trunk.cfg.n_layer * (per_token * tokens + once)
    if trunk.recompute:  # the inputs of all blocks, and one block at a time
        kept = trunk.cfg.n_layer * width(model) * trunk.cfg.d_model * tokens + per_token * tokens + once
    return kept + (last + 8) * tokens


def head_bytes(model, train=False, one_pass=0):
    """Bytes that log-probs need: the unembedding, if it is cast; its gradient in fp32; tiles of logits, or,
    where the loss of `one_pass` tokens is formed in one pass, whole rows of logits and of their gradients.
    """
    weight, c = _trunk(model).wte.weight, width(model)
    if isinstance(model, ScalarModel):
        return 0
    tiles = min(STORED, one_pass * len(weight) * (4 + c * (c < 4))) or TILES
    return tiles + weight.numel() * (c * (weight.itemsize > c) + 4 * (train and weight.requires_grad))


def passing_bytes(model, tokens):
    """Bytes at work in one layer of a forward pass that keeps nothing, about."""
    cfg = _trunk(model).cfg
    return tokens * (width(model) * (3 * cfg.d_ff + 3 * cfg.d_model) + 8 * cfg.d_model)


def flops(model, rows, length, kept, train=False, one_pass=False):
    """FLOPs of rows sequences of `length` tokens, `kept` of which go through the head (2 per multiply-add).

    Forward: 2 per weight and token, and 4 · Q · length in every layer and token for attention (the whole
    square: kernels that skip the masked half do half of it). Backward: as much for the inputs, as much for
    weights that are trained, 2.5 × for attention, which computes its scores again; the head once more too,
    unless its loss is formed in one pass, and the blocks with --save_memory.
    Norms and the like, of order D, are left out (arXiv 2001.08361, 2205.05198).
    """
    trunk = _trunk(model)
    cfg, tokens = trunk.cfg, rows * length
    head = [model.score.weight] if isinstance(model, ScalarModel) else [trunk.wte.weight]
    passes = 3.5 + trunk.recompute if train else 1
    out = tokens * 4 * cfg.n_head * cfg.head_dim * length * cfg.n_layer * passes
    for weights, n in (([p for p in trunk.blocks.parameters() if p.dim() == 2], tokens), (head, kept)):
        for p in weights:
            again = 1 + p.requires_grad
            again += trunk.recompute if weights is not head else isinstance(model, GPT) and not one_pass
            out += 2 * p.numel() * n * (1 + again * train)
    return out


def decode(model, rows, prompt, new, slots=SLOTS):
    """→ FLOPs, bytes moved, of `new` tokens for each of rows prompts already prefilled.

    The first of them needs the head only, the last is never fed back. Every step reads all weights, in the
    activations' dtype, and the live cache; rows beyond the slots come later, and read the weights again.
    """
    trunk, c = _trunk(model), width(model)
    Q, cfg = trunk.cfg.n_head * trunk.cfg.head_dim, trunk.cfg
    matrices = [p for p in trunk.blocks.parameters() if p.dim() == 2]
    live = prompt + new / 2
    work = rows * (new - 1) * (2 * sum(p.numel() for p in matrices) + 4 * Q * live * cfg.n_layer)
    moved = c * (sum(p.numel() for p in matrices) + trunk.wte.weight.numel()) * max(1, rows / slots)
    return work + 2 * rows * new * trunk.wte.weight.numel(), new * (moved + kv_bytes(model, rows, live))


# ------------------------------------------------------------------------------------------------------------
# one plan per trainer


def _padded(cfg, rows, longest):
    """Tokens of the largest micro-batch: the budget, or all rows, or the longest row alone."""
    total = rows * longest
    return max(longest, min(cfg.tokens_per_microbatch or total, total))


def _sampling(model, slots, length, prompt):
    """Bytes while `slots` rows are sampled at once, of `length` tokens with a prompt of at most `prompt`."""
    c, waiting = width(model), max(prompt, min(PREFILL, slots * prompt))
    weights = [p for p in model.blocks.parameters() if p.dim() == 2 and p.dtype.itemsize != c]
    cast = c * (sum(p.numel() for p in weights) + model.wte.weight.numel())  # the unembedding in any case
    return {"KV cache": kv_bytes(model, slots, length), "prompts that wait": kv_bytes(model, 1, waiting),
            "a layer at work on prompts": passing_bytes(model, waiting), "weights cast once": cast,
            "logits": 4 * 4 * slots * model.n_ids}  # fmt: skip  # and copies, as in slots.py


def _passing(model, tokens):
    return {"a layer at work": passing_bytes(model, tokens), "unembedding, tile of logits": head_bytes(model)}


def _update(tokens, *trained, one_pass=True):
    heads = sum(head_bytes(m, True, tokens * one_pass) for m in trained)
    return {"activations": sum(activation_bytes(m, tokens) for m in trained),
            "a layer at work": passing_bytes(trained[0], tokens),
            "unembedding, gradient, tile of logits": heads}  # fmt: skip


def _mean(x):
    return sum(x) / len(x)


def _sft_or_rm(cfg, model, lengths, what, sampled):
    rows = cfg.batch_size * (2 if isinstance(model, ScalarModel) else 1)
    longest, mean = max(lengths), _mean(lengths)
    phases = {"update": _update(_padded(cfg, rows, longest), model),
              "evaluation": _passing(model, 64 * longest)}  # fmt: skip
    sampling = (model, 8, longest, longest) if sampled else None
    kept = rows if isinstance(model, ScalarModel) else rows * mean
    work = {"update": flops(model, rows, mean, kept, train=True, one_pass=True)}
    about = f"{len(lengths):,} {what}, {mean:.0f} tokens on average, {longest:,} at most"
    report(cfg, about, {"model": model}, ("model",), phases, work, sampling)


def sft(cfg, load):
    with without_weights():
        model, _, data, _ = load(cfg, META)
    _sft_or_rm(cfg, model, [len(ids) for ids, _ in data], "demonstrations", sampled=True)


def rm(cfg, load_model):
    with without_weights():
        model, tok = load_model(cfg, META)
        lora.add(model, cfg.lora_rank, cfg.dtype)
    lengths = _pair_lengths(cfg, model, tok)
    _sft_or_rm(cfg, model, [n for pair in lengths for n in pair], "sides of pairs", sampled=False)


def _pair_lengths(cfg, policy, tok, kto=False):
    """(tokens of the first, of the second side) of every pair of --data, of those that a task would make."""
    max_len = policy.cfg.max_len
    if not cfg.data:  # made by sampling, so not there yet: as long as they can be
        task = tasks.get(cfg.task)
        prompts = [len(tok.encode_prompt(r["prompt"])) for r in task.prompts("train", 256, cfg.seed)]
        return [(min(max_len, n + task.max_new_tokens),) * 2 for n in prompts]
    if hasattr(cfg, "eval_prompts"):  # DPO
        found = load_examples(cfg, tasks.get(cfg.task), policy, tok, kto)[0]
        return [(len(e.prompt) + len(e.first), len(e.prompt) + len(e.second)) for e in found]
    train, test = load_rows(cfg, tasks.get(cfg.task), policy, tok)
    train = encode_pairs(train, tok, max_len, "training")
    require_both(cfg, train, encode_pairs(test, tok, max_len, "held-out"))
    return [(len(p) + len(w), len(p) + len(l)) for p, w, l in train]


def dpo(cfg, load_models):
    with without_weights():
        policy, ref, rm, tok = load_models(cfg, META)
        freeze(cfg, ref, rm, trained=(policy,))
    for spec in cfg.reward:
        worker.load_reward(spec)
    lengths = _pair_lengths(cfg, policy, tok, cfg.loss == "kto")
    longest, mean, rows = max(map(max, lengths)), _mean([_mean(pair) for pair in lengths]), cfg.batch_size
    batch = _padded(cfg, 2 * cfg.batch_size, longest)
    models = {"policy": policy, "reference": ref, "reward model": rm}
    copies = n_bytes(policy) * (cfg.online_ref == "round" and cfg.online > 0)
    work = {"update": flops(policy, 2 * rows, mean, 2 * rows * mean, train=True)}
    pairs = cfg.pairs if cfg.online else len(lengths)
    rows = 2 * pairs / cfg.steps
    passes = {"reference (once a pair, spread over the steps)": flops(ref, rows, mean, rows * mean)}
    at_once = max(cfg.eval_prompts, 512 * bool(cfg.online))
    sampling = policy, at_once, min(policy.cfg.max_len, longest + cfg.max_new_tokens), longest
    phases = {"scoring": _passing(policy, max(batch, 8192, SCORE_TOKENS * bool(rm))),
              "update": _update(batch, policy, one_pass=False)}  # fmt: skip
    about = f"{len(lengths):,} pairs, {mean:.0f} tokens a side on average, {longest:,} at most"
    report(cfg, about, models, ("policy",), phases, work | passes, sampling, copies=copies)


def rl(cfg, load_models):
    """PPO and GRPO: sampling, scoring, update."""
    with without_weights():
        policy, ref, *critic, rm, tok = load_models(cfg, META)
        freeze(cfg, ref, rm, trained=(policy, *critic))
    for spec in cfg.reward:
        worker.load_reward(spec)
    new = cfg.limits[-1] if hasattr(cfg, "limits") else cfg.max_new_tokens
    data, test = load_prompts(cfg, tasks.get(cfg.task), tok, policy.cfg.max_len, new)
    prompts = [len(tok.encode_prompt(r["prompt"])) for r in data]
    longest, mean, rows = max(prompts) + new, _mean(prompts), cfg.prompts_per_step * cfg.group_size
    length, responses, batch = mean + new, rows * new, _padded(cfg, rows, longest)

    models = {"policy": policy, "reference": ref} | dict(zip(["critic"], critic)) | {"reward model": rm}
    older = getattr(cfg, "off_policy_steps", 0)
    copies = n_bytes(policy) * (older and older + 2)  # the sampler, and the weights of the steps since
    trained, by_token = [policy, *critic], getattr(cfg, "ratio", "token") == "token"
    at_once = max(rows, min(512, len(test)))  # of a step, or of the evaluation
    phases = {"scoring": _passing(policy, max(batch, SCORE_TOKENS * bool(rm))),
              "update": _update(batch, *trained, one_pass=by_token)}  # fmt: skip

    work = decode(policy, rows, mean, new)[0]
    work += flops(policy, cfg.prompts_per_step, mean, 0)
    scoring = flops(rm, rows, length, rows) if rm else 0
    scoring += flops(ref, rows, length, responses) if ref else 0
    scoring += flops(critic[0], rows, length, rows * length) if critic else 0
    update = sum(flops(m, rows, length, responses, True, by_token) for m in trained) * cfg.epochs
    about = f"{len(data):,} prompts, {mean:.0f} tokens on average, {longest - new:,} at most; "
    about += f"responses of at most {new:,}"
    work = {"sampling": work, "scoring": scoring, "update": update}
    sampling, decoding = (policy, at_once, longest, longest - new), (policy, rows, mean, new)
    report(cfg, about, models, ["policy", "critic"][: len(trained)], phases, work, sampling, decoding, copies)


# ------------------------------------------------------------------------------------------------------------
# the report


def report(cfg, about, models, trained, phases, work, sampling=None, decoding=None, copies=0):
    """Print it all, at most 80 columns wide. The peak is what always lies there and the largest phase.

    sampling: model, rows, tokens of a row, tokens of a prompt. On a GPU with little memory fewer rows are
    sampled at once; the figures are those of the smallest GPU where memory sets no limit to them, or else of
    the largest. decoding: the arguments of `decode`, where it counts in the hours.
    """

    def row(name, size, note=""):
        print(f"  {name:<46}{size / GIB:>10.2f}  {note}".rstrip())

    print(f"dry run of {os.path.basename(sys.argv[0])}: nothing is trained or written\n{about}\n")
    models = {name: model for name, model in models.items() if model is not None}
    first = models[trained[0]]
    for name, model in models.items():
        n = sum(p.numel() for p in model.parameters())
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        own = model is first or n_bytes(model, first) > n_bytes(first)
        note = f"{trains:,} trained" if name in trained else "frozen" if own else "the policy's own"
        print(f"  {name:<14}{n:>16,} parameters, {note}")

    moves = trained_bytes(*(models[name] for name in trained))
    away = [m for m in models.values() if getattr(m, "home", None)]  # --save_memory
    if away:
        phases["scoring"]["largest offloaded model"] = max(map(n_bytes, away))
    stay = [m for m in models.values() if m not in away]
    resident = {"weights": n_bytes(*stay) + copies, "gradients": moves,
                "optimizer (AdamW's two moments)": 2 * moves, "CUDA's own, about": CONTEXT}  # fmt: skip
    phases = phases | {"optimizer step": {"AdamW's temporaries": moves}}
    held, fits, slots, wanted = sum(resident.values()), [], 1, 1
    if sampling:
        model, rows, length, prompt = sampling
        wanted = min(rows, SLOTS)
    for gpu in SIZES:
        if sampling:
            slots = that_fit(model, rows, length, gpu * GIB - held)
            phases["sampling"] = _sampling(model, slots, length, prompt)
        biggest = max(phases, key=lambda phase: sum(phases[phase].values()))
        peak = held + sum(phases[biggest].values())
        if peak <= gpu * GIB:
            fits.append((gpu, slots))
            if slots == wanted:
                break
    print("\nmemory of the GPU, GiB")
    for name, size in resident.items():
        row(name, size)
    for phase, parts in phases.items():
        for name, size in parts.items():
            row(f"{phase}: {name}", size)
    row("at most", peak, f"({biggest})")
    for gpu, n in fits[-1:] + fits[:-1][:1]:
        print(f"  fits a GPU of {gpu} GiB" + f", sampling {n} of {wanted} rows at once" * (n < wanted))
    if not fits:
        print("  fits no single GPU")

    total = sum(work.values())
    print("\nFLOPs of a step (one of --steps), responses as long as they may be")
    for name, n in work.items():
        print(f"  {name:<46}{n:>10.2e}")
    moved = decode(*decoding, slots)[1] if decoding else 0
    seconds = total / (PEAK * SHARE) + moved / BANDWIDTH
    print(f"  {'all':<46}{total:>10.2e}")
    if moved:
        print(f"  {'bytes that decoding moves':<46}{moved:>10.2e}")
    print(f"computed, not measured: {seconds:,.1f} s a step, {seconds * cfg.steps / 3600:,.1f} h in all,\n"
          "on an A100 at 40% of 312 TFLOP/s and, where it decodes, all of 2 TB/s")  # fmt: skip
