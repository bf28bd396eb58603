"""Sampling beside transformers' generate, same weights, prompts, lengths and dtype, in turn.

    python -m bench generation            CPU, one thread, 8 minutes; bench/results/generation_cpu.csv
    python -m bench generation --gpu      one GPU, bf16; generation_gpu.csv. Not measured yet

Random weights at published shapes: how fast a token comes does not depend on which one it is. How long the
responses are must be equal, so lengths are planned and no sampled stop is trusted. Ours: EOS is the last id
and the uniform of the planned step is so close to 1 that the inverse CDF ends there; all others stay below
0.9, where it cannot. Nothing in our code is touched. Theirs: a LogitsProcessor forbids EOS and leaves
nothing else at the planned step; it costs them one column a step and 0.1% of their time. Ours returns
log-probs besides. Both sample from the full softmax at temperature 1; theirs gets the padding mask it asks
for and otherwise its defaults. Before it is timed, a run must give the planned lengths on both sides, and at
temperature 0 the same tokens (fp32).

Useful tokens are those up to a row's end. CPU seconds of the process, and wall seconds beside them; memory
is the peak of a process that ran this variant alone, weights included. On a GPU it is wall time between
synchronisations, with the prompts' prefill, but for "decode" rows: there the time for one token is taken off,
and the floor is weights and live cache, read once a step at the copy bandwidth measured in the same run.
"""

import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch

from bench import table
from nanorlhf import generate, hub
from nanorlhf.model import GPT, GPTConfig, KVCache
from nanorlhf.tokenizer import Tokenizer

HF = "transformers generate"
CPU = dict(n_layer=6, n_head=6, d_model=384, max_len=128)  # 10.8M without the embedding
GPT2 = dict(vocab_size=50257, n_layer=12, n_head=12, d_model=768, max_len=1024)  # 124M
QWEN = dict(vocab_size=151936, n_layer=28, n_head=12, n_kv_head=2, d_model=1536, d_ff=8960, max_len=2048,
            qkv_bias=True)  # fmt: skip


def build(shape, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    kind = GPTConfig.llama if "n_kv_head" in shape else GPTConfig.gpt2
    with torch.device(device):
        return GPT(kind(**shape)).to(dtype).requires_grad_(False)


def transformers_model(model):
    """The same weights in transformers' class; None where it is not installed."""
    if os.environ.get("NANORLHF_FAKE_GPU"):
        return None
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        hub.save(model, Tokenizer.from_chars("ab"), folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.wte.weight.dtype)
    return peer.to(model.device).eval()


def ours(model, prompts, lengths, seed=0, temperature=1.0, **how):
    """→ the rollout. lengths: planned, a list; None: no row ends before `new` tokens."""
    new = how.pop("new", 0) or max(lengths)
    u = 0.9 * torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(seed))
    if lengths:
        u[torch.arange(len(prompts)), torch.tensor(lengths) - 1] = 1 - 2**-24
    eos = model.n_ids - 1 if lengths else None
    with mock.patch.object(generate.torch, "rand", lambda *shape, generator: u):
        return generate.generate(model, prompts, 1, new, temperature, eos, **how)


def theirs(peer, prompts, lengths, seed=0, temperature=1.0, new=0):
    """→ their tokens (B, prompt + longest)."""
    torch.manual_seed(seed)
    ids = torch.tensor(prompts, device=peer.device)
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new or max(lengths), pad_token_id=0)
    how |= dict(do_sample=temperature > 0, eos_token_id=None)
    if temperature:
        how |= dict(top_k=0)
    if lengths:
        eos, ends = peer.config.vocab_size - 1, torch.tensor(lengths, device=peer.device)

        def plan_ends(tokens, scores):
            here = (ends == tokens.shape[1] - ids.shape[1] + 1)[:, None]
            scores = scores.masked_fill(here, -torch.inf)
            scores[:, eos] = torch.where(here[:, 0], 0.0, -torch.inf)
            return scores

        how |= dict(logits_processor=[plan_ends], eos_token_id=eos)
    return peer.generate(ids, **how)


def check(model, peer, prompts, lengths, new):
    """Both as planned; in fp32, greedy tokens the same → how many of so many rows are not, as a note.

    On a CPU it must be none. On a GPU rounding may turn a token, and all that follow it: they are counted.
    """
    roll = ours(model, prompts, lengths, new=new)
    assert roll.response_len.tolist() == (lengths or [new] * len(prompts))
    if peer is None:
        return ""
    out = theirs(peer, prompts, lengths, new=new)
    assert out.shape == roll.tokens.shape
    if lengths:
        ended = (out[:, len(prompts[0]) :] == model.n_ids - 1).float().argmax(1) + 1
        assert ended.tolist() == lengths
    if model.wte.weight.dtype == torch.float32:
        few = dict(new=min(new, 64), temperature=0.0)
        differ = ours(model, prompts, None, **few).tokens != theirs(peer, prompts, None, **few)
        flipped = int(differ.any(1).sum())
        assert not flipped or model.device.type == "cuda", f"{flipped} rows of greedy tokens differ"
        return f"{flipped} of {len(prompts)} greedy rows differ from {HF}'s"
    return ""


def in_turn(variants, rounds):
    """{name: fn} → {name: (CPU seconds, wall seconds)}, lists over the rounds; one more warms up."""
    times = {name: ([], []) for name in variants}
    for i in range(rounds + 1):
        for name, fn in variants.items():
            start = time.process_time(), time.perf_counter()
            fn(i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name][0].append(time.process_time() - start[0])
                times[name][1].append(time.perf_counter() - start[1])
    return times


# ------------------------------------------------------------------------------------------------------------
# CPU


def setting(vocab, ragged, quick):
    """→ shape, prompts, lengths or None, new tokens. Ragged: 1 … 64, each once, in any order."""
    shape = dict(CPU, n_layer=2, n_head=2, d_model=32) if quick else CPU
    rows, prompt, new = (8, 4, 8) if quick else (64, 16, 64)
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, vocab - 1, (rows, prompt), generator=g).tolist()
    lengths = (1 + torch.randperm(rows, generator=g)).tolist() if ragged else None
    return shape | dict(vocab_size=vocab), prompts, lengths, new


def peak(who, vocab, ragged, quick):
    """MiB at most of a process that builds a model and runs one variant once."""
    what = f"from bench import generation as g; g.alone({who!r}, {vocab}, {ragged}, {quick})"
    command = [sys.executable, "-c", what]
    done = subprocess.run(command, cwd=table.ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def alone(who, vocab, ragged, quick):
    torch.set_num_threads(1)
    shape, prompts, lengths, new = setting(vocab, ragged, quick)
    model = build(shape)
    peer = transformers_model(model) if who == HF else None
    if peer:
        model = None
        theirs(peer, prompts, lengths, new=new)
    else:
        ours(model, prompts, lengths, new=new)
    with open("/proc/self/status") as f:
        print(next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024)


def cpu_rows(quick, rounds, only=""):
    torch.set_num_threads(1)
    goals = {(512, False): 1.15, (50257, False): 1.7, (512, True): 1.65, (50257, True): 2.6}
    out = []
    for (vocab, ragged), goal in goals.items():
        name = f"{'ragged' if ragged else 'equal'} lengths, V {vocab:,}"
        if only not in name:
            continue
        shape, prompts, lengths, new = setting(vocab, ragged, quick)
        model = build(shape)
        peer = transformers_model(model)
        check(model, peer, prompts, lengths, new)
        variants = {"ours": lambda i: ours(model, prompts, lengths, i, new=new)}  # noqa: B023
        if peer:
            variants[HF] = lambda i: theirs(peer, prompts, lengths, i, new=new)  # noqa: B023
        times = in_turn(variants, rounds)
        useful = sum(lengths) if lengths else new * len(prompts)
        rates = {name: [[useful / t for t in clock] for clock in both] for name, both in times.items()}
        names = {"ours": "ours", "theirs": HF} if peer else {"ours": "ours"}
        wall = {f"{who}_wall": sorted(rates[name][1])[rounds // 2] for who, name in names.items()}
        mib = [peak(name, vocab, ragged, quick) if name in rates else None for name in ("ours", HF)]
        out.append(table.row(name, "tok/s", rates["ours"][0], HF, rates.get(HF, [None])[0], goal, mib,
                             tokens=useful, **wall))  # fmt: skip
        table.progress(out[-1])
    return out


# ------------------------------------------------------------------------------------------------------------
# GPU


def cache_bytes(model, rows):
    """Bytes of one position of the KV cache."""
    return KVCache(model.cfg, rows, 1, "meta", model.compute_dtype or model.wte.weight.dtype).kv.nbytes


def floor(model, rows, prompt, new, bandwidth):
    """Seconds that reading weights and live cache takes, for all tokens but the first: it needs no step."""
    read = sum(p.nbytes for p in model.blocks.parameters()) + model.unembedding.nbytes
    live = prompt + new / 2
    return (new - 1) * (read + cache_bytes(model, rows) * live) / bandwidth


def gap_row(model, prompts, new, goal):
    """The largest difference between a log-prob as sampled and as the trainers score it, without a cache."""
    roll = ours(model, prompts, None, new=new)
    gap = (model.logprobs(roll.tokens, roll.mask)[0] - roll.logp).abs().max().item()
    dtype = str(model.wte.weight.dtype)[6:]
    return table.row(f"sampled and recomputed log-probs apart, {dtype}", "nats", [gap], goal=goal)


def gpu_rows(quick, rounds, only=""):
    from bench import gpu

    copy = sorted(gpu.bandwidth(20, 1 << 20 if quick else gpu.GiB))[10]
    out, g = [], torch.Generator().manual_seed(1)
    tiny = dict(vocab_size=512, n_layer=2, n_head=2, d_model=64, max_len=1024)
    cases = [("124M", GPT2, 256, 768, 256, "≥ 60%", None), ("1.5B", QWEN, 64, 768, 256, "≥ 60%", None),
             ("1.5B", QWEN, 256, 768, 256, "≥ 60%", None), ("124M", GPT2, 64, 16, 240, "≥ 30%", 10)]
    for name, shape, rows, prompt, new, goal, times in cases[-1:] if quick else cases:
        rows, prompt, new = (4, 4, 6) if quick else (rows, prompt, new)
        what = f"{name}, {rows} rows, context {prompt + new:,}"
        if only not in what:
            continue
        note = ""
        shape = tiny if quick else shape
        prompts = torch.randint(1, shape["vocab_size"] - 1, (rows, prompt), generator=g).tolist()
        small = build(shape, "cuda")
        if times:  # greedy in fp32, a few tokens
            note = check(small, transformers_model(small), prompts[:8], None, min(new, 32))
            out.append(gap_row(small, prompts, new, "≤ 1e-4"))
        model = small.bfloat16()
        if times:
            out.append(gap_row(model, prompts, new, "≤ 2e-2"))
        peer = transformers_model(model) if times else None
        check(model, peer, prompts, None, new)
        variants = {"all": lambda i: ours(model, prompts, None, i, new=new, slots=rows),  # noqa: B023
                    "one": lambda i: ours(model, prompts, None, i, new=1, slots=rows)}  # noqa: B023
        if peer:
            variants[HF] = lambda i: theirs(peer, prompts, None, i, new=new)  # noqa: B023
        wall = {key: both[1] for key, both in in_turn(variants, rounds).items()}
        least = floor(model, rows, prompt, new, copy)
        share = [least / (a - b) for a, b in zip(wall["all"], wall["one"])]
        out.append(table.row(f"decode, {what}: share of the floor", "share", share, goal=goal))
        if peer:
            rates = [[rows * new / t for t in wall[key]] for key in ("all", HF)]
            out.append(table.row(f"generate, {what}", "tok/s", rates[0], HF, rates[1], times, note=note))
        elif times:
            rates = [rows * new / t for t in wall["all"]]
            out.append(table.row(f"generate, {what}", "tok/s", rates, HF, None, times))
    if only in "ragged lengths":
        out += ragged_gpu_rows(tiny if quick else GPT2, quick, rounds)
    return out


def ragged_gpu_rows(shape, quick, rounds):
    """Log-normal lengths, mean 200, at most 960, which with the prompt of 64 fill the context of 1,024."""
    count, prompt, most = (8, 4, 8) if quick else (512, 64, 960)
    g = torch.Generator().manual_seed(2)
    drawn = torch.randn(count, generator=g)
    lengths = (200 * torch.exp(drawn - 0.5) * most / 960).round().clamp(1, most).long().tolist()
    lengths[0] = most
    prompts = torch.randint(1, shape["vocab_size"] - 1, (count, prompt), generator=g).tolist()
    model = build(shape, "cuda", torch.bfloat16)
    peer = transformers_model(model)
    check(model, peer, prompts, lengths, most)
    halves = [slice(0, count // 2), slice(count // 2, count)]

    def wait(i):
        """Batches of as many rows as there are slots, each of which runs on until its longest row ends."""
        for half in halves:
            ours(model, prompts[half], None, i, new=max(lengths[half]), slots=count // 2)

    variants = {"ours": lambda i: ours(model, prompts, lengths, i, slots=count // 2), "waiting": wait}
    if peer:
        variants[HF] = lambda i: theirs(peer, prompts, lengths, i)
    rates = {key: [sum(lengths) / t for t in both[1]] for key, both in in_turn(variants, rounds).items()}
    name = f"ragged lengths, 124M, {count} samples, mean {sum(lengths) / count:.0f}"
    return [table.row(name, "tok/s", rates["ours"], HF, rates.get(HF), 15),
            table.row(name, "tok/s", rates["ours"], "waiting for the longest", rates["waiting"], 2)]


def rows(quick=False, gpu=False, rounds=0, only=""):
    rounds = rounds or (1 if quick else 5)
    return gpu_rows(quick, rounds, only) if gpu else cpu_rows(quick, rounds, only)
