"""The table of recipes/smollm2_all.sh: held-out figures before and after every stage, ± standard errors.

    python -m recipes.smollm2.report_all RUN SEED       → RUN/report.md; report.json for bench/smollm2.py

A change counts where it is larger than two standard errors: √(se² before + se² after), or for SFT's loss
that of the differences row by row. A stage that has not run is left out.
"""

import csv
import math
import os

from nanorlhf.errors import require
from nanorlhf.hub.files import read_json
from nanorlhf.run.folders import write_json
from recipes.smollm2 import command

SUMS = {"pass@1": "sums right, sampled", "greedy": "sums right, greedy"}
FIGURES = {  # stage → {figure in STAGE.json: what it is}
    "grpo_full": SUMS,
    "sft": {"loss": "loss on held-out problems, nats a token"},
    "dpo": {"implicit_acc": "held-out pairs in order"},
    "rm": {"rm_acc": "held-out pairs in order"},
    "ppo": SUMS,
    "distill": SUMS,
}
ENDS = ("before", "before_se", "after", "after_se", "change_se")


def seconds_of(path):
    """stages.csv → {stage: seconds of its last run}; those without a run have none."""
    if not os.path.exists(path):
        return {}
    with open(path, newline="", encoding="utf-8") as f:
        return {row["stage"]: float(row["seconds"]) for row in csv.DictReader(f)}


def ends_of(measured, base, figure):
    """→ {end of ENDS: its value}. base: the figures before the stages on sums."""
    if figure == "loss":
        return {end: measured[f"loss_{end}"] for end in ENDS}
    # Of pairs, chance: the base model is its own reference, and a head of zeros gives ties
    before = base[figure] if figure in SUMS else 0.5
    before_se = base[f"{figure}_se"] if figure in SUMS else 0.0
    after_se = measured[f"{figure}_se"]
    return {
        "before": before,
        "before_se": before_se,
        "after": measured[figure],
        "after_se": after_se,
        "change_se": math.hypot(before_se, after_se),
    }


def main(run, seed):
    base = read_json(f"{run}/sums_before.json")
    seconds = seconds_of(f"{run}/stages.csv")
    figures = {"seed": int(seed)}
    lines = ["| stage | held out | before | after | beyond 2 s.e. | seconds |", "|---|---|---|---|---|---|"]
    for stage, names in FIGURES.items():
        measured = read_json(f"{run}/{stage}.json")
        if not measured:
            continue
        for figure, meaning in names.items():
            ends = ends_of(measured, base, figure)
            figures |= {f"{stage}_{figure}_{end}": value for end, value in ends.items()}
            gain = ends["after"] - ends["before"]
            if figure == "loss":
                gain = -gain
            clear = "yes" if gain > 2 * ends["change_se"] else "no"
            values = "{before:.3f} ± {before_se:.3f} | {after:.3f} ± {after_se:.3f}".format(**ends)
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
    command(main, __doc__)
