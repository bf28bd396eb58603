"""The figures of docs/real-weights.md: gathers the runs of recipes/smollm2_cpu.sh and _all.sh over seeds.

    for s in 0 1 2; do SEED=$s make real && SEED=$s make real-all; done
    python -m bench.smollm2            runs/real*/report.json → bench/results/smollm2.csv, one row a seed
                                       runs/real*/all/report.json → bench/results/smollm2_all.csv
                                       and the tables of the page, whose figures link to these files

Run it on a quiet machine: wall seconds are among the figures.
"""

import csv
import glob
import json
import os
import statistics
import sys

from bench import table

SUMS = {  # row of the first table: its columns of smollm2.csv without _before and _after, decimals
    "right, sampled at temperature 1": ("pass@1", 2),
    "right, greedy": ("greedy", 2),
    "one of 8 samples right": ("pass@8", 2),
    "response length, tokens": ("len", 1),
    "dead groups": ("dead", 2),
}
REST = {
    "KL(after‖before) on 20 other prompts, nats a token": ("kl_others", 4),
    "of the 20 greedy answers, letter by letter the same": ("same_answers", 0),
    "wall seconds, download included": ("wall_seconds", 0),
    "seconds until the first point of the curve": ("first_point", 0),
    "CPU-seconds": ("cpu_seconds", 0),
    "peak memory, MB": ("peak_mb", 0),
}
STAGES = [  # row of the second table: its columns of smollm2_all.csv without _before and _after
    ("`grpo_full`: sums right, sampled", "grpo_full_pass@1"),
    ("`grpo_full`: sums right, greedy", "grpo_full_greedy"),
    ("`sft`: loss, nats a token", "sft_loss"),
    ("`dpo`: pairs in order", "dpo_implicit_acc"),
    ("`rm`: pairs in order", "rm_rm_acc"),
    ("`ppo`: sums right, sampled", "ppo_pass@1"),
    ("`ppo`: sums right, greedy", "ppo_greedy"),
    ("`distill`: sums right, sampled", "distill_pass@1"),
    ("`distill`: sums right, greedy", "distill_greedy"),
]
STATISTICS = {"median": statistics.median, "min": min, "max": max}


def gather(pattern):
    """report.json files → rows, in the order of their seeds."""
    rows = []
    for path in glob.glob(pattern):
        with open(path, encoding="utf-8") as f:
            rows.append(json.load(f))
    return sorted(rows, key=lambda row: row["seed"])


def write(path, rows):
    """One row a seed, numbers with five digits. A column that some rows lack is empty there."""
    columns = {name: None for row in rows for name in row}
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    seeds = ", ".join(str(row["seed"]) for row in rows)
    print(f"{path}: seeds {seeds}")


def figures(name, rows, column, decimals):
    """Median, lowest and highest of a column, each a link that tests/test_docs.py compares with the CSV."""
    values = [float(f"{row[column]:.5g}") for row in rows if column in row]
    cells = []
    for statistic, function in STATISTICS.items():
        shown = f"{function(values):.{decimals}f}"
        cells.append(f'[{shown}](../bench/results/{name}.csv "{statistic} {column}")')
    return " | ".join(cells)


def header(title, groups):
    """The first two lines of a table with median, lowest and highest of each group."""
    names = [f"{group}{cell}" for group in groups for cell in ("median", "lowest", "highest")]
    return [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]


def real_table(rows):
    """Markdown of the runs of smollm2_cpu.sh."""
    lines = header(f"held-out sums, {len(rows)} seeds", ("before, ", "after, "))
    for label, (column, decimals) in SUMS.items():
        before = figures("smollm2", rows, f"{column}_before", decimals)
        after = figures("smollm2", rows, f"{column}_after", decimals)
        lines.append(f"| {label} | {before} | {after} |")
    lines += ["", *header("the run", ("",))]
    lines += [f"| {label} | {figures('smollm2', rows, *column)} |" for label, column in REST.items()]
    return "\n".join(lines)


def all_table(rows):
    """Markdown of the runs of smollm2_all.sh; clear: seeds whose change is above two standard errors."""
    lines = header(f"{len(rows)} seeds", ("before, ", "after, "))
    lines = [lines[0] + " clear |", lines[1] + "---|"]
    for label, column in STAGES:
        have = [row for row in rows if f"{column}_after" in row]
        if not have:
            continue
        before = figures("smollm2_all", have, f"{column}_before", 3)
        after = figures("smollm2_all", have, f"{column}_after", 3)
        clear = 0
        for row in have:
            gain = row[f"{column}_after"] - row[f"{column}_before"]
            gain = -gain if column == "sft_loss" else gain
            clear += gain > 2 * row[f"{column}_change_se"]
        lines.append(f"| {label} | {before} | {after} | {clear} of {len(have)} |")
    return "\n".join(lines)


def main(runs="runs", results="bench/results", page="docs/real-weights.md"):
    blocks = {}
    for name, end, make in (("smollm2", "", real_table), ("smollm2_all", "all/", all_table)):
        rows = gather(f"{runs}/real*/{end}report.json")
        if rows:
            write(f"{results}/{name}.csv", rows)
            blocks[name] = f"{make(rows)}\n\n{table.where(table.about())}"
    if not blocks:
        sys.exit(f"there is no {runs}/real*/report.json: run make real first")
    table.fill(page, blocks)


if __name__ == "__main__":
    os.chdir(table.ROOT)
    main()
