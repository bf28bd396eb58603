"""Whether a change moved a number: every committed curve of seed 0, before and after, digit by digit.

    python bench/same_numbers.py run /tmp/before        train with this checkout, about 6 minutes on one core
    ... change the code, or go to another checkout ...
    python bench/same_numbers.py run /tmp/after
    python bench/same_numbers.py compare /tmp/before /tmp/after

`run` trains what the figures of the README come from, with seed 0 and the trainers' own defaults: demo,
`chain` with SFT, PPO and GRPO, and `reviews` with SFT, reward model and DPO. `--checkout DIR` trains with the
code of another checkout; `--only grpo,dpo` trains a part, whose earlier stages must be there.
`compare` reads every metrics.csv, samples.jsonl and report.json in both folders. Each cell must be equal as
text, but for those that measure time or memory. It also prints the ratio of the time of a step, after to
before, as medians over the steps of each run. Exit status 1 where a cell differs.
"""

import csv
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEASURED = {"tok_s", "s", "cpu_seconds", "wall_seconds", "peak_rss_mb"}  # of the machine, not of the method
STAGES = {
    "demo": ["demo.py", "--out", "{out}/demo"],
    "chain-sft": ["train_sft.py", "--task", "chain", "--out", "{out}/chain-sft"],
    "chain-ppo": ["train_ppo.py", "--task", "chain", "--init", "{out}/chain-sft/model",
                  "--out", "{out}/chain-ppo"],
    "grpo": ["train_grpo.py", "--task", "chain", "--init", "{out}/chain-sft/model", "--out", "{out}/grpo"],
    "distill": ["train_distill.py", "--task", "chain", "--init", "{out}/chain-sft/model",
                "--teacher", "{out}/grpo/model", "--out", "{out}/distill"],
    "sft": ["train_sft.py", "--task", "reviews", "--out", "{out}/sft"],
    "rm": ["train_rm.py", "--task", "reviews", "--init", "{out}/sft/model", "--out", "{out}/rm"],
    "dpo": ["train_dpo.py", "--task", "reviews", "--init", "{out}/sft/model", "--out", "{out}/dpo"],
}


def train(out, checkout, names):
    os.makedirs(out, exist_ok=True)
    for name in names:
        command = [part.format(out=os.path.abspath(out)) for part in STAGES[name]]
        print(f"{name}: python {' '.join(command)}", flush=True)
        arguments = [sys.executable, *command, "--seed", "0", "--overwrite"]
        subprocess.run(arguments, cwd=checkout, check=True, stdout=subprocess.DEVNULL)


def read(path):
    """→ {(row, column): text} of a metrics.csv, a samples.jsonl or a report.json."""
    with open(path, encoding="utf-8", newline="") as f:
        if path.endswith(".csv"):
            rows = list(csv.DictReader(f))
        elif path.endswith(".jsonl"):
            rows = [json.loads(line) for line in f]
        else:
            rows = [json.load(f)]
    return {(i, column): str(value) for i, row in enumerate(rows) for column, value in row.items()}


def compared_files(folder):
    names = {"metrics.csv", "samples.jsonl", "report.json", "before_after.jsonl"}
    found = []
    for where, _, files in os.walk(folder):
        found += [os.path.relpath(os.path.join(where, name), folder) for name in files if name in names]
    return sorted(found)


def step_seconds(cells):
    return statistics.median(float(text) for (_, column), text in cells.items() if column == "s")


def compare(before, after):
    """Print one line for every file → the number of cells that differ."""
    differing = 0
    names = compared_files(before)
    if not names:
        sys.exit(f"{before}: no metrics.csv, samples.jsonl or report.json in it or below; nothing to compare")
    for name in names:
        path = os.path.join(after, name)
        if not os.path.exists(path):
            print(f"{name:<34} is missing in {after}")
            differing += 1
            continue
        old, new = read(os.path.join(before, name)), read(path)
        columns = {column for _, column in old} & {column for _, column in new} - MEASURED
        renamed = {column for _, column in old} ^ {column for _, column in new}
        cells = [cell for cell in old.keys() | new.keys() if cell[1] in columns]
        wrong = sorted(cell for cell in cells if old.get(cell) != new.get(cell))
        line = f"{name:<34}{len(cells):>7,} cells, {len(wrong)} differ"
        if name.endswith("metrics.csv"):
            line += f"; time of a step x {step_seconds(new) / step_seconds(old):.2f}"
        if renamed:
            line += f"; only in one of the two: {', '.join(sorted(renamed))}"
        print(line)
        for row, column in wrong[:3]:
            print(f"    row {row}, {column}: {old.get((row, column))} → {new.get((row, column))}")
        differing += len(wrong)
    print("every number is the same" if not differing else f"{differing} numbers differ")
    return differing


def main(argv):
    if len(argv) == 3 and argv[0] == "compare":
        return int(compare(argv[1], argv[2]) > 0)
    options = dict(zip(argv[2::2], argv[3::2]))
    names = options.pop("--only", ",".join(STAGES)).split(",")
    checkout = options.pop("--checkout", ROOT)
    if len(argv) < 2 or len(argv) % 2 or argv[0] != "run" or options or not set(names) <= set(STAGES):
        print(__doc__)
        return int("--help" not in argv)
    train(argv[1], checkout, names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
