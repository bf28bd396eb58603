"""--dry_run against the peak memory of real runs: each trainer, with adapters and with all weights.

    python -m bench.dry_run --model models/SmolLM2-135M-Instruct --demos gsm8k_train.jsonl --pairs hh.jsonl

Two steps of each trainer in a process of its own, on one CPU thread; before the first update AdamW has no
moments. The files are in any format that the trainers read; a few hundred rows are enough. What a run took is
the largest resident set of its process. Times are not compared: on a busy machine those of this minute tell
little of the next.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REWARD = f"{ROOT}/nanorlhf/answers.py:last_number"
COMMON = "--device cpu --threads 1 --steps 2 --save_every 0 --overwrite"
SAMPLES = "--eval_prompts 4 --max_new_tokens 32"
FLAGS = {
    "sft": "--batch_size 8",
    "rm": "--batch_size 4",
    "dpo": f"--batch_size 4 {SAMPLES}",
    "ppo": f"--prompts_per_step 8 --minibatches 1 --reward {REWARD} {SAMPLES}",
    "grpo": f"--prompts_per_step 2 --group_size 4 --tokens_per_microbatch 1024 --reward {REWARD} {SAMPLES}",
    "distill": f"--prompts_per_step 2 --tokens_per_microbatch 1024 {SAMPLES}",
}


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
    parser.add_argument("--out", default="runs/bench-dry-run", help="folder for the runs")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = Path(args.model).resolve()
    print("| trainer | `--lora_rank` | `--dry_run`, GiB | measured, GiB | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for trainer in args.only.split(","):
        data = Path(args.pairs if trainer in ("rm", "dpo") else args.demos).resolve()
        for rank in args.ranks.split(","):
            folder = out / f"{trainer}-{rank}"
            flags = f"--init {model} --data {data} --out {folder} --lora_rank {rank} {COMMON}"
            flags += f" {FLAGS[trainer]}"
            if trainer == "distill":
                flags += f" --teacher {model}"
            command = [sys.executable, f"train_{trainer}.py", *flags.split()]
            text, _ = run([*command, "--dry_run"], out / "dry.log")
            planned = float(re.search(r"^  at most +([\d.]+)", text, re.M)[1])
            _, measured = run(command, out / f"{trainer}-{rank}.log")
            ratio = planned / measured
            print(f"| {trainer} | {rank} | {planned:.2f} | {measured:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
