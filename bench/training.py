"""Training step of the bare model: forward, loss, backward and AdamW on the same 16 × 128 tokens.

Weights, tokens, dtype and one thread are equal for all, and so is the loss of the first step, which is
asserted. nanoGPT takes part where the environment variable NANOGPT names its model.py.
"""

import os
import tempfile

import torch

from bench import steps, table

HF, TANH, NANOGPT = "HF default", "HF, fused GELU", "nanoGPT"
CPU = [  # name, goals in time, what it is of
    ("0.8M, V 512", {HF: 1.2, TANH: 1.0, NANOGPT: 1.0}, "0.8M", 0),
    ("4.9M, V 512", {HF: 1.2, TANH: 1.0, NANOGPT: 1.0}, "4.9M", 0),
    ("10.8M, V 512", {HF: 1.2, TANH: 1.0, NANOGPT: 1.0}, "10.8M", 0),
    ("10.8M, V 50,257", {HF: 1.3, NANOGPT: 1.3}, "10.8M", 50257),
]
QUICK = [("tiny", {HF: None, NANOGPT: None}, "tiny", 0)]


def rows(quick=False, gpu=False, rounds=0, only=""):
    out = []
    for name, goals, size, vocab in QUICK if quick else CPU:
        if only in name:
            B, T = (2, 32) if quick else (16, 128)
            n = rounds or (1 if quick else 3 if vocab else 5)
            out += measure(name, goals, size, vocab, B, T, n)
    return out


def measure(name, goals, size, vocab, B, T, rounds, device="cpu", dtype="float32"):
    with tempfile.TemporaryDirectory() as tmp:
        tok = steps.save_model(f"{tmp}/model", size, T, vocab)
        tokens = torch.randint(tok.vocab_size, (B, T), generator=torch.Generator().manual_seed(0)).tolist()
        spec = dict(job="bare", model=f"{tmp}/model", tokens=tokens, device=device, dtype=dtype)
        specs = {"ours": spec | dict(who="ours")}
        for peer in goals:
            if peer != NANOGPT or os.environ.get("NANOGPT"):
                specs[peer] = spec | dict(who="peers", variant=peer)
        found = steps.in_turn(specs, rounds, 2, tmp)
    ours = found["ours"]
    for peer, run in found.items():
        gap = abs(run["first_loss"][0] - ours["first_loss"][0])
        assert gap < (1e-3 if dtype == "float32" else 0.05), f"{name}: the loss of {peer} is off by {gap}"
    out = steps.compare(name, found, goals, {TANH: None}, device == "cuda")
    for r in out:
        table.progress(r)
    return out
