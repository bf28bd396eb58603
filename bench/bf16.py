"""bf16 against fp32 on this processor: one matmul, and on a published model a training pass and sampling.

    python -m bench.bf16            F.linear of 512 × 576 × 1,536, a few seconds
    python -m bench.bf16 FOLDER     and on this Hugging Face folder: log-probs of 16 × 64 tokens forward and
                                    backward, 32 rows of 16 sampled tokens, and the sampler's gap

One thread; the variants take turns, and a figure is the median of the CPU seconds of its rounds.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

from bench import table
from nanorlhf import hub
from nanorlhf.generate import generate
from nanorlhf.kernels import bf16
from nanorlhf.run import dist

BF16 = torch.bfloat16


def in_turn(variants, rounds):
    """{name: function} → {name: median CPU seconds}, after one round that does not count."""
    found = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def matmul():
    x = torch.randn(512, 576)
    w = torch.randn(1536, 576)
    x16 = x.to(BF16)
    w16 = w.to(BF16)

    def medium():
        with bf16.in_units(x16):
            F.linear(x, w)

    variants = {"fp32": lambda: F.linear(x, w), "bf16": lambda: F.linear(x16, w16), "fp32, medium": medium}
    seconds = in_turn(variants, 60)
    for name, s in seconds.items():
        rate = 2 * 512 * 576 * 1536 / s / 1e9
        ratio = seconds["fp32"] / s
        print(f"F.linear, {name:13} {1000 * s:7.2f} ms  {rate:5.0f} GFLOP/s  {ratio:.2f} times fp32's")


def on_model(folder):
    model, tok = hub.load(folder)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(tok.vocab_size, (16, 64), generator=g)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    prompts = tokens[:, :16].tolist()

    def train(dtype):
        model.compute_dtype = dtype
        for rows in dist.paced([torch.arange(16)], model.logprobs):
            model.logprobs(tokens[rows], mask[rows])[0].sum().backward()

    def sample(dtype):
        model.compute_dtype = dtype
        return generate(model, prompts, n=2, max_new_tokens=16)

    for name, run in (("training pass, 16 × 64 tokens", train), ("sampling, 32 × 16 tokens", sample)):
        seconds = in_turn({"fp32": lambda: run(None), "bf16": lambda: run(BF16)}, 3)  # noqa: B023
        both = ", ".join(f"{dtype} {s:.2f} s" for dtype, s in seconds.items())
        print(f"{name}: {both}, {seconds['fp32'] / seconds['bf16']:.2f} times as fast")
    model.zero_grad()
    for dtype in (None, BF16):
        roll = sample(dtype)
        with torch.no_grad():
            logp, _ = model.logprobs(roll.tokens, roll.mask)
        gap = (logp - roll.logp)[roll.mask].abs()
        name = "bf16" if dtype else "fp32"
        print(f"gap of the sampler, {name}: mean {gap.mean():.1e}, largest {gap.max():.1e} nats")


def main(argv):
    torch.set_num_threads(1)
    units = "with" if bf16.has_units("cpu") else "without"
    print(f"{table.about()['cpu']}, {units} bf16 units (AMX, AVX-512 BF16); torch {torch.__version__}")
    matmul()
    for folder in argv:
        on_model(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
