"""The table of recipes/smollm2_all.sh: held-out figures before and after every stage, ± standard errors.

    python -m recipes.smollm2.report_all RUN SEED       → RUN/report.md; report.json for bench/smollm2.py

A change counts where it is larger than two standard errors: √(se² before + se² after), or for SFT's loss
that of the differences row by row. A stage that has not run is left out.
"""

import csv
import json
import math
import os
import sys

from nanorlhf.errors import UserError, require
from nanorlhf.run.folders import write_json

SUMS = {"pass@1": "sums right, sampled", "greedy": "sums right, greedy"}
FIGURES = {  # stage → {figure in STAGE.json: what it is}
    "grpo_full": SUMS,
    "sft": {"loss": "loss on held-out problems, nats a token"},
    "dpo": {"implicit_acc": "held-out pairs in order"},
    "rm": {"rm_acc": "held-out pairs in order"},
    "ppo": SUMS,
    "distill": SUMS,
}
CHANCE = (0.5, 0.0)  # of pairs: the base model is its own reference, and a head of zeros gives ties


def read_json(path):
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def seconds_of(path):
    """stages.csv → {stage: seconds of its last run}; those without a run have none."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="", encoding="utf-8") as f:
        return {row["stage"]: float(row["seconds"]) for row in csv.DictReader(f)}


def change(measured, base, figure):
    """→ before, its s.e., after, its s.e., s.e. of the change. base: the figures before the sums' stages."""
    if figure == "loss":
        names = ("loss_before", "loss_before_se", "loss_after", "loss_after_se", "loss_change_se")
        return tuple(measured[name] for name in names)
    before, before_se = CHANCE
    if figure in SUMS:
        before = base[figure]
        before_se = base[f"{figure}_se"]
    after_se = measured[f"{figure}_se"]
    return before, before_se, measured[figure], after_se, math.hypot(before_se, after_se)


def main(run, seed):
    base = read_json(f"{run}/sums_before.json")
    seconds = seconds_of(f"{run}/stages.csv")
    figures = {"seed": int(seed)}
    lines = ["| stage | held out | before | after | beyond 2 s.e. | seconds |", "|---|---|---|---|---|---|"]
    for stage, names in FIGURES.items():
        measured = read_json(f"{run}/{stage}.json")
        if measured is None:
            continue
        for figure, meaning in names.items():
            before, before_se, after, after_se, se = change(measured, base, figure)
            gain = before - after if figure == "loss" else after - before
            ends = {"before": before, "before_se": before_se, "after": after, "after_se": after_se}
            for end, value in (ends | {"change_se": se}).items():
                figures[f"{stage}_{figure}_{end}"] = value
            clear = "yes" if gain > 2 * se else "no"
            values = f"{before:.3f} ± {before_se:.3f} | {after:.3f} ± {after_se:.3f}"
            lines.append(f"| {stage} | {meaning} | {values} | {clear} | {seconds.get(stage, math.nan):.0f} |")
        if stage in seconds:
            figures[f"{stage}_seconds"] = seconds[stage]
    require(len(figures) > 1, f"{run} has no figures: run recipes/smollm2_all.sh")
    table = "\n".join(lines)
    write_json(f"{run}/report.json", figures)
    with open(f"{run}/report.md", "w", encoding="utf-8") as f:
        f.write(f"# Every trainer on real weights, seed {seed}\n\n{table}\n")
    print(f"{table}\n\nthe page: {run}/report.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"recipes.smollm2.report_all: error: {error}")
