"""Steps on a published model beside TRL's: GRPO, DPO and SFT with LoRA, from the same folder.

    python -m bench.trl FOLDER                             GRPO, DPO, SFT → bench/results/trl_cpu.csv
    python -m bench.trl FOLDER --python VENV/bin/python    TRL in an environment of its own
    python -m bench.trl FOLDER --only SFT --quick          small batches, one round, kept nowhere

FOLDER is a Hugging Face folder. Its weights and tokenizer, the data, the number and lengths of rows, the rank
of the adapters (16, on all linear layers of the blocks, α = 32), the dtype and one thread are equal for both.
Each side is a real train() in a process of its own, and they do their steps in turn (bench/worker.py). The
data of SFT and DPO is one batch, so that the first step has the same rows in it whatever their order: its
loss, or for DPO its log-probs (the loss is log 2), must agree in fp32. Responses of GRPO end at planned
lengths, and both must have sampled the same number of tokens (bench/steps.py).

fp32 and bf16 are rows of their own. On a CPU without bf16 units (AMX, AVX-512 BF16) bf16 is several times
slower than fp32 for both, and is left out; --dtype bfloat16 measures it all the same. TRL has gradient
checkpointing off, which is faster, and in bf16 its frozen weights are bf16, as ours are.
"""

import argparse
import json
import random
import re
import sys
import tempfile

from bench import steps, table
from bench.worker import ROOT
from nanorlhf import hub
from nanorlhf.errors import UserError, require
from nanorlhf.kernels import bf16

RANK = 16
TRL = "TRL tuned"
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}  # loss, and log-prob of a token, of the first step
SIZES = {  # tokens of a prompt and of a row; rows, or pairs, or prompts × samples; longest response
    "GRPO": dict(prompt=32, length=64, prompts=4, group=8, new=32),
    "DPO": dict(prompt=32, length=64, rows=8),
    "SFT": dict(prompt=32, length=64, rows=16),
}
QUICK = {
    "GRPO": dict(prompt=8, length=16, prompts=2, group=2, new=6),
    "DPO": dict(prompt=8, length=16, rows=2),
    "SFT": dict(prompt=8, length=16, rows=2),
}
GOALS = {"GRPO": (2.0, 0.6)}  # at least so many times as fast, at most this share of the memory


def words(tok):
    """Ids of the tokens that are a blank and lower-case letters: in a row of them each stays a token."""
    return [i for i in range(tok.vocab_size) if re.fullmatch(" [a-z]{3,}", tok.decode([i]))]


def save_data(path, tok, keys, rows, prompt, length):
    """Rows of random words: a prompt, and with an EOS each other key fills a row of `length` tokens."""
    rng = random.Random(0)
    ids = words(tok)
    with open(path, "w") as f:
        for _ in range(rows):
            sizes = [prompt] + [length - prompt - 1] * (len(keys) - 1)
            texts = []
            for size in sizes:
                chosen = rng.choices(ids, k=size)
                text = tok.decode(chosen)
                assert tok.encode(text) == chosen, text
                texts.append(text)
            f.write(json.dumps(dict(zip(keys, texts))) + "\n")


def specs(tmp, folder, tok, job, dtype, python, prompt, length, rows=0, prompts=0, group=0, new=0):
    """Write the data → {"ours": spec, TRL: spec} for the workers."""
    pairs = ("prompt", "chosen", "rejected")
    keys = {"SFT": ("prompt", "response"), "DPO": pairs, "GRPO": ("prompt",)}[job]
    ours, theirs = f"{tmp}/ours.jsonl", f"{tmp}/theirs.jsonl"
    save_data(ours, tok, keys, rows or prompts, prompt, length)
    names = ("prompt", "completion") if job == "SFT" else keys
    save_data(theirs, tok, names, rows or prompts, prompt, length)
    method = job.lower()
    config = dict(data=ours, eval_data=ours, init=folder, out=f"{tmp}/run", steps=10_000, lr=1e-5,
                  lora_rank=RANK, eval_every=0, save_every=0, threads=1, device="cpu", dtype=dtype,
                  tokens_per_microbatch=1024)  # fmt: skip
    shared = dict(job=method, device="cpu", dtype=dtype, rows=rows or prompts * group)
    if job == "GRPO":
        shared |= dict(lengths=steps.ragged(prompts * group, new), group=group, new=new)
        config |= dict(prompts_per_step=prompts, group_size=group, max_new_tokens=new, minibatches=1,
                       ref="none", reward_timeout=0.0, eval_prompts=1,
                       reward=[f"{ROOT}/bench/reward.py:score"])  # fmt: skip
    else:
        config["batch_size"] = rows
        if job == "DPO":
            config |= dict(eval_prompts=1, max_new_tokens=4, beta=0.1)
    mine = shared | dict(who="ours", config=config)
    if job == "GRPO":
        mine["eos"] = tok.eos_id
    peer = dict(who="peers", variant=TRL, model=folder, data=theirs, out=f"{tmp}/trl", lora_rank=RANK)
    return {"ours": mine, TRL: shared | peer | dict(python=python)}


def agreement(name, found, dtype, tokens_a_row):
    """Print what the first step of both had, and end the run where it is not the same."""
    ours, theirs = (found[who]["first"][-1] for who in ("ours", TRL))
    for key in sorted(ours.keys() & theirs.keys()):
        per = tokens_a_row if key.startswith("logp") else 1
        gap = abs(ours[key] - theirs[key]) / per
        unit = " a token" if per > 1 else ""
        both = f"ours {ours[key]:.6f}, TRL {theirs[key]:.6f}"
        print(f"{name}: first step, {key}: {both}, apart {gap:.1e}{unit}")
        assert gap < AGREE[dtype], f"{name}: {key} of the first step is not the same"


def measure(folder, tok, dtypes, only, python, sizes, rounds):
    out = []
    for job, size in sizes.items():
        for dtype in dtypes:
            name = f"{job}, {'fp32' if dtype == 'float32' else 'bf16'}"
            if only not in name:
                continue
            with tempfile.TemporaryDirectory() as tmp:
                found = steps.in_turn(specs(tmp, folder, tok, job, dtype, python, **size), rounds, 1, tmp)
            if TRL in found and job != "GRPO":  # GRPO's first loss is of other samples
                agreement(name, found, dtype, size["length"] - size["prompt"])
            goal, share = GOALS.get(job, (None, None))
            out += steps.compare(name, found, {TRL: goal}, {TRL: share})
            table.progress(out[-1])
    return out


def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.trl", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", default="")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    _, tok = hub.load(args.folder, weights=False)
    dtypes = ["float32"]
    if bf16.has_units("cpu"):
        dtypes.append("bfloat16")
    elif not args.dtype:
        print("bf16: not measured, this processor has no bf16 units")
    if args.dtype:
        dtypes = [args.dtype]
    sizes, rounds = (QUICK, 1) if args.quick else (SIZES, args.rounds)
    found = measure(args.folder, tok, dtypes, args.only, args.python, sizes, rounds)
    require(found, f"--only {args.only}: no such row; rows: {', '.join(SIZES)}, each in fp32 or bf16")
    if args.quick:
        return
    new = {r["row"] for r in found}
    rows = [r for r in table.load("trl", "cpu", table.RESULTS) if r["row"] not in new] + found
    table.save("trl", "cpu", rows, table.RESULTS)
    table.save_about("trl", "cpu", table.RESULTS)
    run = table.load_about(table.RESULTS)["trl_cpu"]
    table.fill(f"{ROOT}/docs/performance.md", {"trl_cpu": table.markdown(rows, run)})


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"python -m bench.trl: error: {e}", file=sys.stderr)
        sys.exit(2)
