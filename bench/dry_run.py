"""--dry_run against the peak memory of real runs: each trainer, with adapters and with all weights.

    python -m bench.dry_run --model models/SmolLM2-135M-Instruct \\
        --demos gsm8k_train.jsonl --pairs hh_harmless_test.jsonl.gz      → bench/results/dry_run.csv

One or two steps of each trainer in a process of its own, on one CPU thread, on the first short rows of the
files, which are in any format that the trainers read. With all weights it is two steps, because before the
first update AdamW has no moments; those of adapters are small. What a run took is the largest resident set of
its process. Times are not compared: on a busy machine those of this minute tell little of the next.
"""

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

from bench import table
from nanorlhf.hub.files import write_jsonl
from recipes.smollm2.short_rows import short_rows

ROOT = Path(table.ROOT)
RESULTS = ROOT / "bench/results/dry_run.csv"
REWARD = f"{ROOT}/nanorlhf/answers.py:last_number"
COMMON = "--device cpu --threads 1 --save_every 0 --overwrite"
SAMPLES = "--eval_prompts 1 --max_new_tokens 4"
FLAGS = {
    "sft": "--batch_size 4",
    "rm": "--batch_size 2",
    "dpo": f"--batch_size 2 {SAMPLES}",
    "ppo": f"--prompts_per_step 4 --minibatches 1 --reward {REWARD} {SAMPLES}",
    "grpo": f"--prompts_per_step 1 --group_size 4 --tokens_per_microbatch 1024 --reward {REWARD} {SAMPLES}",
    "distill": f"--prompts_per_step 1 --tokens_per_microbatch 1024 {SAMPLES}",
}
COLUMNS = "trainer lora_rank dtype planned_gib measured_gib ratio origin".split()


def write_data(demos, pairs, out):
    """The few rows of a run → out/demos.jsonl, out/pairs.jsonl and out/heldout.jsonl (of pairs)."""
    few = short_rows(pairs, characters=700, most=9)
    files = {"demos": short_rows(demos, characters=400, most=12), "pairs": few[:4], "heldout": few[7:]}
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)


def command(trainer, rank, dtype, model, out):
    """The command line of a run, without --dry_run."""
    steps = 1 if rank != "0" else 2
    flags = f"--init {model} --out {out}/{trainer}-{rank} --lora_rank {rank} --dtype {dtype} --steps {steps} "
    flags += f"{COMMON} {FLAGS[trainer]}"
    if trainer in ("rm", "dpo"):
        flags += f" --data {out}/pairs.jsonl --eval_data {out}/heldout.jsonl"
    else:
        flags += f" --data {out}/demos.jsonl"
    if trainer == "distill":
        flags += f" --teacher {model}"
    return [sys.executable, f"train_{trainer}.py", *flags.split()]


def run(command, out):
    """→ what the command printed, and the largest resident set of its process in GiB."""
    with open(out, "w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        log.seek(0)
        text = log.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return text, usage.ru_maxrss / 1024**2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder, such as that of SmolLM2-135M-Instruct")
    parser.add_argument("--demos", required=True, help="questions with worked answers, such as GSM8K's")
    parser.add_argument("--pairs", required=True, help="preferences, such as HH's")
    parser.add_argument("--only", default=",".join(FLAGS), help="trainers, such as sft,grpo")
    parser.add_argument("--ranks", default="16,0", help="of the adapters; 0: all weights")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="bfloat16 needs units")
    parser.add_argument("--out", default="runs/bench-dry-run", help="folder for the runs")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_data(args.demos, args.pairs, out)
    model = Path(args.model).resolve()
    print("| trainer | `--lora_rank` | `--dtype` | `--dry_run`, GiB | measured, GiB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    axes = [names.split(",") for names in (args.only, args.ranks, args.dtypes)]
    for trainer, rank, dtype in itertools.product(*axes):
        words = command(trainer, rank, dtype, model, out)
        text, _ = run([*words, "--dry_run"], out / "dry.log")
        planned = float(re.search(r"^  at most +([\d.]+)", text, re.M)[1])
        _, measured = run(words, out / f"{trainer}-{rank}.log")
        run_of = (trainer, rank, dtype)
        figures = (f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}")
        save(run_of, figures)
        print(f"| {' | '.join(run_of + figures)} |", flush=True)


def save(run_of, figures):
    """Put a row into bench/results/dry_run.csv, in place of an older one; the others stay."""
    rows = {}
    if RESULTS.exists():
        with open(RESULTS, newline="", encoding="utf-8") as f:
            rows = {(row["trainer"], row["lora_rank"], row["dtype"]): row for row in csv.DictReader(f)}
    rows[run_of] = dict(zip(COLUMNS, [*run_of, *figures, table.origin()]))
    with open(RESULTS, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


if __name__ == "__main__":
    main()
