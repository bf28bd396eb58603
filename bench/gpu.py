"""What only a GPU can say, with the roofline of the same run beside it. bf16; weights are random.

Not measured where there is no GPU: the tables then say so, and `python -m bench --gpu` is the one command.
"""

import contextlib
import os
import sys
import time
import traceback

import torch
import torch.nn.functional as F

from bench import generation, heads, steps, table, training
from bench.worker import Failed
from nanorlhf.errors import require

GiB = 1 << 30
MATMUL = 8192
BATCH, SEQUENCE = 4, 2048  # all variants of a row are in memory at once

SHARE = f"1.5B, {BATCH} × {SEQUENCE:,}: share of the matmul rate"


def tolerance(D, dtype):
    """Nats that log-probs of random targets may be off by on a GPU, with logits of standard deviation 6.

    fp32 rounds its sums. Tensor cores cut off the last bits of theirs, D / 16 times: an emulation gives
    5.5e-5 at D = 768 and 2.7e-4 at 4,096. No GPU has confirmed it yet.
    """
    if dtype == torch.float32:
        return 2e-5 * max(1.0, D / 1024)
    return max(2e-5, 1.1e-7 * D)


@contextlib.contextmanager
def device(fake, triton=False):
    """Inside there is a GPU, or with `fake` the one that tests/fake_device.py pretends; UserError without."""
    if not fake:
        require(torch.cuda.is_available(), "--gpu: this torch sees no GPU; --fake pretends one")
        yield
        return
    tests = os.path.join(table.ROOT, "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from fake_device import pretended

    with pretended("cuda", triton):
        yield


def timed(fn, rounds):
    """Wall seconds of each round, after two to warm up."""
    out = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return out[2:]


def bandwidth(rounds, size=GiB):
    """Bytes a second of a copy on the GPU, 1 GiB read and 1 GiB written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [2 * size / t for t in timed(lambda: target.copy_(source), rounds)]


def matmul_rate(rounds, size=MATMUL):
    """FLOP a second of a square bf16 matmul of random numbers; with zeros a GPU is faster."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    out = torch.empty_like(a)
    return [2 * size**3 / t for t in timed(lambda: torch.mm(a, b, out=out), rounds)]


def roofline_rows(quick=False, gpu=True, rounds=0, only=""):
    n, size, width = (3, 1 << 20, 64) if quick else (20, GiB, MATMUL)
    copies = [x / 1e12 for x in bandwidth(n, size)]
    rates = [x / 1e12 for x in matmul_rate(n, width)]
    return [
        table.row(f"copy, {size / GiB:.2g} GiB on {torch.cuda.get_device_name()}", "TB/s", copies),
        table.row(f"matmul, {width}³ bf16", "TFLOP/s", rates),
    ]


def attention_rows(quick=False, gpu=True, rounds=0, only=""):
    """Attention, forward and backward, on shapes never seen before: cuDNN's off, as device.setup leaves it,
    and on. cuDNN makes a plan for every new shape, and ragged micro-batches are new ones all the time."""
    heads_, width, longest = (2, 16, 16) if quick else (12, 64, 900)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    seconds = {}
    try:
        for i, on in enumerate((False, True)):
            torch.backends.cuda.enable_cudnn_sdp(on)
            seconds[on] = []
            for T in range(longest, longest - (3 if quick else 20), -1):
                shape = (4, heads_, T - 100 * i * (not quick), width)
                q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
                q.requires_grad_()
                torch.cuda.synchronize()
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
                torch.cuda.synchronize()
                seconds[on].append(1e3 * (time.perf_counter() - start))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
    ours, theirs = (seconds[on][1:] for on in (False, True))  # the first call loads the library
    return [table.row("attention, a new shape each time", "ms", ours, "with cuDNN's attention", theirs)]


def step_flops(size, tokens, sequence):
    """FLOPs of a training step: 6 for each weight of a matmul and token, the head's among them, and causal
    attention, 6 · layers · width · sequence a token (arXiv 2204.02311, appendix B, halved by the mask)."""
    layers, width, _, vocab = steps.SIZES[size]
    weights = 12 * layers * width**2 + vocab * width
    return tokens * (6 * weights + 6 * layers * width * sequence)


def training_rows(quick=False, gpu=True, rounds=0, only=""):
    """Seconds of a step beside transformers', and the share of the matmul rate of this run."""
    size, B, T = ("tiny", 2, 64) if quick else ("1.5B", BATCH, SEQUENCE)
    name = f"{size}, {B} × {T:,}"
    out = training.measure(name, {training.HF: None}, size, 0, B, T, rounds or 5, "cuda", "bfloat16")
    rate = sorted(matmul_rate(10, 64 if quick else MATMUL))[5]
    flops = step_flops(size, B * T, T)
    mfu = [flops / out[0][k] / rate for k in ("ours_high", "ours", "ours_low")]
    theirs = [flops / out[0][k] / rate for k in ("theirs_high", "theirs", "theirs_low") if out[0].get(k)]
    return [*out, table.row(SHARE.replace("1.5B", size), "share", mfu, training.HF, theirs, "≥ 50%")]


GRPO = dict(job="grpo", prompts=8, group=8, new=512, mean=200, prompt=16, device="cuda", dtype="bfloat16")


def step_rows(quick=False, gpu=True, rounds=0, only=""):
    """A GRPO step, HF's generate against ours in it.

    Both variants keep what they have allocated: at 0.5B, where TRL's 64 rows might take 90 GB, half of them.
    """
    what = dict(GRPO, prompts=2, group=4, new=16, mean=None) if quick else GRPO
    sizes = {"tiny": what["prompts"]} if quick else {"124M": 8, "0.5B": 4}
    wanted = [(f"GRPO, {size}", {steps.TUNED: 4.0}, {}, what | dict(size=size, prompts=n, budget=1 << 15))
              for size, n in sizes.items()]  # fmt: skip
    return steps.measure([x for x in wanted if quick or only in x[0]], rounds or 3, gpu=True)


# ------------------------------------------------------------------------------------------------------------
# all of it, within some minutes

PARTS = {"roofline": roofline_rows, "attention": attention_rows, "training": training_rows,
         "steps": step_rows, "kernels": heads.rows, "generation": generation.rows}  # fmt: skip
JOBS = [  # part, rows (a piece of their name), seconds and GiB at most, by count; the most telling first
    ("roofline", "", 15, 3),
    ("kernels", "8,192 × 768 × 50,257", 60, 8),
    ("generation", "124M, 256 rows", 45, 12),
    ("steps", "GRPO, 124M", 90, 24),
    ("attention", "", 10, 2),
    ("generation", "124M, 64 rows", 45, 12),
    ("kernels", "8,192 × 1,024 × 151,936", 60, 16),
    ("training", "1.5B", 90, 100),
    ("generation", "ragged lengths", 60, 24),
    ("kernels", "8,192 × 4,096 × 151,936", 60, 24),
    ("generation", "1.5B, 64 rows", 60, 24),
    ("generation", "1.5B, 256 rows", 90, 32),
    ("steps", "GRPO, 0.5B", 120, 100),
    *(("kernels", f"{N:,} × {D:,} × {V:,}", 60, 48) for N, D, V in heads.kernels.GPU_SHAPES
      if (N, D, V) not in ((8192, 768, 50257), (8192, 1024, 151936), (8192, 4096, 151936))),
]  # fmt: skip


def run_jobs(seconds, parts=(), only="", quick=False, rounds=0, folder=table.RESULTS, keep=table.merge):
    """Measure JOBS in their order; keep(part, rows) is called after each → [(what was left out, why)].

    seconds: no job begins that would not end by then (its time is an estimate). only: the jobs with this in
    their name. quick: each part once, at toy sizes.
    """
    start = time.monotonic()
    total = torch.cuda.get_device_properties(0).total_memory / GiB
    left_out = []
    done = set()
    for part, rows, estimate, memory in JOBS:
        name = f"{part}: {rows}" if rows else part
        if parts and part not in parts or only not in name or quick and part in done:
            continue
        left = seconds - (time.monotonic() - start)
        if not quick and left < estimate:
            left_out.append((name, f"takes about {estimate} s, and {max(left, 0):.0f} s are left"))
            continue
        if not quick and total < memory:
            left_out.append((name, f"needs {memory} GiB, this card has {total:.0f}"))
            continue
        done.add(part)
        print(f"\n{name} ...", flush=True)
        more = {"folder": folder} if part == "kernels" else {}
        try:
            found = PARTS[part](quick=quick, gpu=True, rounds=rounds, only="" if quick else rows, **more)
        except (RuntimeError, AssertionError, Failed) as e:  # the rows after it are still measured
            traceback.print_exc()
            left_out.append((name, f"failed: {type(e).__name__}: {str(e)[:200]}"))
            continue
        if keep is table.merge:
            keep(part, found, folder=folder)
        else:
            keep(part, found)
    return left_out


def _later(name, peer, goal, unit="s"):
    return table.row(name, unit, None, peer, None, goal, note="not measured")


NOT_MEASURED = {
    "training": [_later(SHARE, training.HF, "≥ 50%", "share")],
    "steps": [_later(f"GRPO, {size}", steps.TUNED, 4.0) for size in ("124M", "0.5B")],
    "kernels": [
        _later("one pass, forward and backward, D ≤ 1,024", "3 matmuls", 1 / 1.5, "ms"),
        _later("one pass, forward and backward, D 4,096", "3 matmuls", 1 / 1.15, "ms"),
        _later("one pass, forward and backward", "TRL", 1 / 0.75, "ms"),
    ],
    "generation": [
        _later("sampled and recomputed log-probs apart, float32", "", "≤ 1e-4", "nats"),
        _later("sampled and recomputed log-probs apart, bfloat16", "", "≤ 2e-2", "nats"),
        _later("decode, 124M, 256 rows, context 1,024", "bandwidth floor", "≥ 60%", "share"),
        _later("decode, 1.5B, 64 and 256 rows", "bandwidth floor", "≥ 60%", "share"),
        _later("decode, 124M, 64 rows, context 256", "bandwidth floor", "≥ 30%", "share"),
        _later("decode, 124M, 64 rows, context 256", "HF generate", 10.0, "tok/s"),
        _later("512 ragged samples, useful tokens", "HF generate", 15.0, "tok/s"),
        _later("slot refill", "waiting for the longest", 2.0, "tok/s"),
    ],
}
