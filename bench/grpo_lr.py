"""GRPO's learning rates of the built-in tasks: half of the default, the default, and twice.

    python bench/grpo_lr.py                   every task → results/grpo_lr_chain.csv and so on; half an hour
    python bench/grpo_lr.py chain             one task; two minutes

Three seeds; the runs of a seed start from the same SFT model, and on `reviews` have the same reward model. A
default stays unless another rate is better in the last held-out reward and in the mean of the curve, each by
two standard errors of the paired differences.
"""

import statistics
import sys
import tempfile

from main_job import ROOT, print_row, rewards, rows_of, run, write

sys.path.insert(0, ROOT)
from train_grpo import Config  # noqa: E402

FACTORS = (0.5, 1.0, 2.0)
SEEDS = (0, 1, 2)
FIGURES = ("last", "curve")  # by which a rate is better


def runs(task, seed, tmp):
    """One SFT model, and on reviews a reward model; then a GRPO run per rate → its rows."""
    common = ["--task", task, "--seed", str(seed), "--threads", "1", "--save_every", "0"]
    sft = f"{tmp}/{task}-{seed}-sft"
    run("train_sft.py", *common, "--out", sft)
    start = ["--init", f"{sft}/model"]
    if task == "reviews":
        rm = f"{tmp}/{task}-{seed}-rm"
        run("train_rm.py", *common, *start, "--out", rm)
        start += ["--rm", f"{rm}/model"]
    for factor in FACTORS:
        lr = factor * Config.BY_TASK[task]["lr"]
        out = f"{tmp}/{task}-{seed}-{factor}"
        cpu = run("train_grpo.py", *common, *start, "--lr", str(lr), "--out", out)
        log = rows_of(out)
        row = {"task": task, "factor": factor, "lr": lr, "seed": seed} | rewards(log)
        row |= {"entropy": float(log[-1]["entropy"]), "cpu_seconds": cpu}
        print_row(row)
        yield row


def better(rows, figure):
    """Print how far each other rate is from the default in this figure: mean and standard error of pairs."""
    default = [row[figure] for row in rows if row["factor"] == 1]
    for factor in FACTORS:
        if factor != 1:
            other = [row[figure] for row in rows if row["factor"] == factor]
            differences = [a - b for a, b in zip(other, default)]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            mean = statistics.mean(differences)
            print(f"{rows[0]['task']:<10} lr × {factor:<4} {figure:<6} {mean:+.3f} ± {error:.3f}")


def main(argv):
    with tempfile.TemporaryDirectory() as tmp:
        for task in argv or Config.BY_TASK:
            rows = [row for seed in SEEDS for row in runs(task, seed, tmp)]
            for figure in FIGURES:
                better(rows, figure)
            write(f"grpo_lr_{task}", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
