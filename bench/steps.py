"""Whole steps of the trainers, as a user gets them: data, rollout, reward, loss, update, logging.

Every variant is a real run of its trainer in a process of its own (bench/worker.py), and they do their
steps in turn. Equal for all: the weights (a folder that we saved), the tokenizer, the data file, batch size,
sequence lengths, dtype, one thread, AdamW, and the tokens that count in every step, which is asserted. For
GRPO and PPO the lengths of responses are planned: EOS is forced at the same lengths for everybody, a fresh
permutation of them over the rows of each step.

Not equal: the order of the rows, and the random numbers (so the sampled tokens). TRL's DPO scores the
reference in each step; ours once per pair before the first, of which a step is charged its share, as in the
first epoch. TRL computes a token-mean GRPO loss ("dapo") as ours does, and neither has a KL term or a
reference.
"""

import itertools
import json
import math
import os
import random
import string
import sys
import tempfile

import torch

from bench import table
from bench.worker import ROOT, Failed, Worker
from nanorlhf import hub
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.tokenizer import WORDS, Tokenizer

SIZES = {  # layers, width, heads, vocabulary
    "tiny": (1, 32, 2, 512),
    "demo": (2, 96, 4, 544),
    "0.8M": (4, 128, 4, 512),
    "4.9M": (6, 256, 4, 512),
    "10.8M": (6, 384, 6, 512),
    "124M": (12, 768, 12, 50257),
    "0.5B": (24, 1280, 20, 50257),
    "1.5B": (48, 1600, 25, 50257),
}
PROMPT, LENGTH = 16, 128  # tokens of a prompt; of a demonstration or one side of a pair, prompt included


def save_model(folder, size, max_len, vocab=0):
    """A random GPT-2-shaped model with a tokenizer whose tokens are words, saved → tokenizer.

    EOS is the last id (bench/ours.py needs it there), and every word is one token, for transformers too.
    """
    layers, width, heads, V = SIZES[size]
    V = vocab or V
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = [" " + "".join(x) for x in itertools.islice(letters, V - 258)]
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    tok = Tokenizer("bpe", WORDS, tokens, control={"<|pad|>": V - 2, "<|eos|>": V - 1})
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(V, n_layer=layers, n_head=heads, d_model=width, max_len=max_len))
    hub.save(model, tok, folder)
    return tok


def save_data(path, tok, keys, n, length, prompt=PROMPT):
    """n rows of random words: a prompt, and in each other key as many as fill `length` with an EOS."""
    rng = random.Random(0)
    with open(path, "w") as f:
        for _ in range(n):
            sizes = [prompt] + [length - prompt - 1] * (len(keys) - 1)
            texts = (tok.decode(rng.choices(range(256, tok.vocab_size - 2), k=k)) for k in sizes)
            f.write(json.dumps(dict(zip(keys, texts))) + "\n")


def ragged(rows, longest, mean=None):
    """Planned lengths: even from 1 to the longest, or with a `mean` exponential, cut there."""
    if mean is None:
        return [1 + round(i * (longest - 1) / (rows - 1)) for i in range(rows)]
    return [min(longest, max(1, round(-mean * math.log(1 - (i + 0.5) / rows)))) for i in range(rows)]


def variants(tmp, job, size, vocab=0, rows=16, prompts=8, group=8, new=64, mean=None, length=LENGTH,
             prompt=PROMPT, budget=1024, device="cpu", dtype="float32", peers=()):
    """Write model and data → {variant: spec for its worker}, ours first.

    rows, length   of SFT, RM and DPO: rows or pairs a step, tokens of a row (or of a side), prompt included
    prompts, group, new, mean   of GRPO: prompts a step, samples of each, longest response, see `ragged`
    budget         our --tokens_per_microbatch for GRPO: less padding than with its default, the same loss
    """
    tok = save_model(f"{tmp}/model", size, max(length, prompt + new), vocab)
    pairs = ("prompt", "chosen", "rejected")
    keys = {"sft": ("prompt", "response"), "rm": pairs, "dpo": pairs}.get(job, ("prompt",))
    n = max(96, 2 * prompts)
    save_data(f"{tmp}/data.jsonl", tok, keys, n, length, prompt)
    theirs = f"{tmp}/peers.jsonl"
    names = ("prompt", "completion") if job == "sft" else keys
    with open(f"{tmp}/data.jsonl") as f, open(theirs, "w") as g:
        g.writelines(json.dumps(dict(zip(names, json.loads(line).values()))) + "\n" for line in f)

    config = dict(data=f"{tmp}/data.jsonl", init=f"{tmp}/model", out=f"{tmp}/ours", steps=10_000, lr=1e-4,
                  eval_every=0, save_every=0, threads=1, device=device, dtype=dtype)  # fmt: skip
    shared = dict(job=job, device=device, dtype=dtype)
    if job == "grpo":
        plan = ragged(prompts * group, new, mean)
        shared |= dict(lengths=plan, group=group, new=new, rows=prompts * group)
        config |= dict(prompts_per_step=prompts, group_size=group, max_new_tokens=new, minibatches=1,
                       ref="none", tokens_per_microbatch=budget, reward_timeout=0.0, eval_prompts=1,
                       reward=[f"{ROOT}/bench/reward.py:score"])  # fmt: skip
    elif job == "ppo":
        plan = [new + 1] * prompts  # none ends: the case in which we gain least
        shared |= dict(lengths=plan, new=new, rows=prompts, rm=f"{tmp}/rm")
        config |= dict(prompts_per_step=prompts, max_new_tokens=new, minibatches=1, eval_prompts=1)
        config["rm"] = f"{tmp}/rm"
        hub.save(ScalarModel(hub.load(f"{tmp}/model")[0]), tok, f"{tmp}/rm")
    else:
        shared["rows"] = config["batch_size"] = rows
        config |= dict(eval_prompts=1, max_new_tokens=4) if job == "dpo" else {}
    specs = {"ours": shared | dict(who="ours", config=config)}
    for peer in peers:
        out = f"{tmp}/{peer.replace(' ', '-')}"
        specs[peer] = shared | dict(who="peers", variant=peer, model=f"{tmp}/model", data=theirs, out=out)
    return specs


def in_turn(specs, rounds, warmup, tmp):
    """Let the variants do their steps in turn → {variant: {"cpu", "wall", "tokens", ...: one value a round}}.

    A peer that fails is left out, and its last words are printed; if ours does, that is an error.
    """
    workers = {}
    if os.environ.get("NANORLHF_FAKE_GPU"):
        specs = {"ours": specs["ours"]}
    for name, spec in specs.items():
        python = os.environ.get("PPO_PYTHON") if name == OLD else spec.get("python", sys.executable)
        if python:
            workers[name] = Worker(spec, f"{tmp}/{name.replace(' ', '-')}.log", python)
    found = {name: {} for name in workers}
    try:
        for i in range(warmup + rounds):
            for name in list(workers):
                try:
                    reply = workers[name].step()
                except Failed as e:
                    if name == "ours":
                        raise
                    print(f"without {name}: {str(e)[:90]}")
                    workers.pop(name).close()
                    found.pop(name)
                    continue
                for key, value in reply.items() if i >= warmup else ():
                    found[name].setdefault(key, []).append(value)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def seconds(run, gpu):
    """Seconds of each round: CPU seconds, or on a GPU those of the wall."""
    more = run.get("cpu_more", [0.0] * len(run["cpu"]))
    return run["wall"] if gpu else [a + b for a, b in zip(run["cpu"], more)]


def compare(name, found, goals, share_goals, gpu=False):
    """Measured variants → one row for each peer of `goals`, those that are missing included."""
    ours = found["ours"]
    rows = []
    for peer, goal in goals.items():
        run = found.get(peer)
        if run:
            both = f"{name}: {ours['tokens']} tokens, {peer}: {run['tokens']}"
            assert run["tokens"] == ours["tokens"], both
        mib = max(ours["mib"]), run and max(run["mib"])
        walls = {"ours_wall": sum(ours["wall"]) / len(ours["wall"])}
        walls |= {"theirs_wall": sum(run["wall"]) / len(run["wall"])} if run else {}
        rows.append(table.row(name, "s", seconds(ours, gpu), peer, run and seconds(run, gpu), goal, mib,
                              share_goals.get(peer), tokens=ours["tokens"][-1], **walls))  # fmt: skip
    return rows


TUNED, DEFAULTS, OLD = "TRL tuned", "TRL defaults", "TRL 1.9.2"
CPU = [  # name, goals in time, goals in memory, what variants() gets
    ("SFT, 4.9M, V 512", {TUNED: 1.1, DEFAULTS: 1.2}, {}, dict(job="sft", size="4.9M")),
    ("RM, 4.9M, V 512", {TUNED: 1.05, DEFAULTS: 1.2}, {}, dict(job="rm", size="4.9M")),
    ("DPO, 4.9M, V 512", {TUNED: 1.1, DEFAULTS: 1.2}, {}, dict(job="dpo", size="4.9M")),
    ("PPO, 4.9M, V 512", {OLD: 1.2}, {}, dict(job="ppo", size="4.9M", prompts=64)),
    ("GRPO, 4.9M, V 512", {TUNED: 1.6, DEFAULTS: None}, {TUNED: 0.55}, dict(job="grpo", size="4.9M")),
    ("GRPO, 0.8M, V 512", {TUNED: 2.2}, {}, dict(job="grpo", size="0.8M", mean=12)),
    ("GRPO, demo's size, V 544", {TUNED: 4.0}, {}, dict(job="grpo", size="demo", mean=12)),
    ("SFT, V 50,257", {TUNED: 2.6}, {TUNED: 0.36}, dict(job="sft", size="4.9M", vocab=50257)),
    ("GRPO, V 50,257", {TUNED: 2.4}, {TUNED: 0.28}, dict(job="grpo", size="4.9M", vocab=50257)),
]
QUICK = [
    ("SFT, tiny", {TUNED: None}, {}, dict(job="sft", size="tiny", rows=4, length=32)),
    ("RM, tiny", {TUNED: None}, {}, dict(job="rm", size="tiny", rows=4, length=32)),
    ("DPO, tiny", {TUNED: None}, {}, dict(job="dpo", size="tiny", rows=4, length=32)),
    ("PPO, tiny", {OLD: None}, {}, dict(job="ppo", size="tiny", prompts=8, new=8)),
    ("GRPO, tiny", {TUNED: None}, {}, dict(job="grpo", size="tiny", prompts=2, group=4, new=8)),
]


def rows(quick=False, gpu=False, rounds=0, only=""):
    """All rows of this part; `only` takes those whose name contains it."""
    return measure([x for x in (QUICK if quick else CPU) if only in x[0]], rounds or quick)


def measure(wanted, rounds=0, gpu=False):
    """Rows of (name, goals, share goals, arguments of `variants`); 5 rounds, of the slow ones 3."""
    out = []
    for name, goals, shares, what in wanted:
        heavy = what.get("vocab", 0) > 1000
        with tempfile.TemporaryDirectory() as tmp:
            specs = variants(tmp, **what, peers=goals)
            found = in_turn(specs, rounds or (3 if heavy else 5), 1 if heavy else 2, tmp)
        for r in compare(name, found, goals, shares, gpu):
            out.append(r)
            table.progress(r)
    return out
