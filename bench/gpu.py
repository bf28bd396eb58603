"""What only a GPU can say, with the roofline of the same run beside it. bf16; weights are random.

Not measured where there is no GPU: the tables then say so, and `python -m bench --gpu` is the one command.
"""

import time

import torch

from bench import steps, table, training

GiB = 1 << 30
MATMUL = 8192
BATCH, SEQUENCE = 4, 2048  # all variants of a row are in memory at once

SHARE = f"1.5B, {BATCH} × {SEQUENCE:,}: share of the matmul rate"


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


def bandwidth(rounds):
    """Bytes a second of a copy on the GPU, 1 GiB read and 1 GiB written."""
    source = torch.randint(256, (GiB,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return [2 * GiB / t for t in timed(lambda: target.copy_(source), rounds)]


def matmul_rate(rounds):
    """FLOP a second of a square bf16 matmul of random numbers; with zeros a GPU is faster."""
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    out = torch.empty_like(a)
    return [2 * MATMUL**3 / t for t in timed(lambda: torch.mm(a, b, out=out), rounds)]


def roofline_rows(quick=False, gpu=True, rounds=0, only=""):
    n = 3 if quick else 20
    return [
        table.row(f"copy, 1 GiB on {torch.cuda.get_device_name()}", "TB/s", [x / 1e12 for x in bandwidth(n)]),
        table.row(f"matmul, {MATMUL}³ bf16", "TFLOP/s", [x / 1e12 for x in matmul_rate(n)]),
    ]


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
    rate = sorted(matmul_rate(10))[5]
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
    return steps.measure([x for x in wanted if only in x[0]], rounds or 3, gpu=True)


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
