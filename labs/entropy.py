"""The entropy that RL spends: reward against entropy over a run, and methods that keep the entropy.

GRPO on countdown. Every few steps the accuracy on fixed held-out prompts is measured beside the entropy of
the policy. R = −a e^H + b is fitted to the first part of the run and asked for the rest. Beside plain GRPO,
from the same model and with the same prompts: clip-higher and Clip-Cov.
"""

import math
import statistics

import train_grpo
import train_sft
import variants
from labs import common

PAPER = (
    "Cui et al., 2025, The entropy mechanism of reinforcement learning for reasoning language models "
    "(2505.22617)"
)
QUESTION = "Is reward bought with entropy at a fixed price, and can a method pay less?"
PREDICTION = (
    "Without intervention R = −a e^H + b: fitted to the first 36 of 236 steps it predicts the rest with a "
    "root mean square error of about 0.01. Clip-Cov keeps the entropy well above GRPO's, clip-higher keeps "
    "some of it, and the reward of Clip-Cov ends higher."
)
STATISTIC = (
    "0.03 less the mean absolute error of the law on the last two thirds of GRPO's measurements, when it is "
    "fitted to the first third; the mean entropy over the same measurements of Clip-Cov less GRPO's. 95% "
    "interval, seen if both lie above 0. Clip-higher's entropy, the last accuracies and two rivals of the "
    "law (a line in H, no further change) are reported."
)
DIFFERS = (
    "three digits and a target, six tokens a response; each accuracy is that of 768 samples, each entropy "
    "the mean of five steps of 256; Clip-Cov takes 2% of the tokens (the paper 0.02%), clip-higher has "
    "ε = 0.4 (DAPO 0.28), because a step has 1,500 tokens only; KL-Cov is left out"
)
CHANGES = [
    "Set-up chosen on seed 9000: runs of 120 steps with 25 measurements took too long, so 80 steps with 11; "
    "the entropy of a single step moved by 0.03 with its 16 prompts, so that of five steps is averaged"
]
SEEDS = 5

STEPS, EVERY = 80, 8
NEAR = 2  # steps before and after a measurement whose entropies are averaged: 16 prompts say little
FITTED = 1 / 3  # share of the measurements that the law is fitted to
TOLERANCE = 0.03  # mean absolute error in accuracy
METHODS = {"GRPO": {}, "clip-higher": dict(clip_high=0.4), "Clip-Cov": dict(cov_share=0.02)}


def points(smoke):
    return [{"method": method} for method in METHODS]


def run(point, seed, smoke):
    method = point["method"]
    trainer = variants.load("clip_cov") if method == "Clip-Cov" else train_grpo
    small = dict(steps=10, demos=300) if smoke else {}
    init = common.trained(train_sft, task="countdown", seed=seed, eval_every=0, **small) + "/model"
    size = dict(steps=STEPS, prompts_per_step=16, eval_every=EVERY, eval_prompts=768)
    if smoke:
        size = dict(steps=4, prompts_per_step=4, eval_every=1, eval_prompts=8)
    settings = dict(task="countdown", init=init, ref="none", seed=seed, reward_timeout=0)
    folder = common.trained(trainer, **settings, **size, **METHODS[method])
    steps, entropies = common.logged(folder, "step", "entropy")
    rows = []
    for step, accuracy in zip(*common.logged(folder, "step", "eval/reward")):
        near = [h for s, h in zip(steps, entropies) if abs(s - step) <= NEAR]
        rows.append({"step": step, "accuracy": accuracy, "entropy": statistics.mean(near)})
    return rows


def fit(entropy, accuracy):
    """Least squares of R = −a e^H + b → a, b."""
    slope, intercept = statistics.linear_regression([math.exp(h) for h in entropy], accuracy)
    return -slope, intercept


def cut(rows):
    """One run's rows → those that the law is fitted to, and the rest."""
    n = max(2, round(FITTED * len(rows)))
    return rows[:n], rows[n:]


def column(rows, name):
    return [r[name] for r in rows]


def errors(rows):
    """Mean absolute errors on the rest of a run → of the law, of a line in H, and of no further change."""
    first, rest = cut(rows)
    entropy, accuracy = column(first, "entropy"), column(first, "accuracy")
    a, b = fit(entropy, accuracy)
    slope, intercept = statistics.linear_regression(entropy, accuracy)
    predicted = {
        "law": [b - a * math.exp(r["entropy"]) for r in rest],
        "line": [intercept + slope * r["entropy"] for r in rest],
        "constant": [accuracy[-1] for r in rest],
    }
    return {name: statistics.mean(abs(r["accuracy"] - p) for r, p in zip(rest, guess))
            for name, guess in predicted.items()}


def runs(rows, method):
    """→ the rows of each seed's run, in the order of the seeds."""
    mine = common.select(rows, method=method)
    return [common.select(mine, seed=seed) for seed in sorted({r["seed"] for r in mine})]


def kept(rows, method):
    """Entropy over the rest of the run less GRPO's, one value a seed."""
    mine, base = (
        [statistics.mean(column(cut(run_rows)[1], "entropy")) for run_rows in runs(rows, m)]
        for m in (method, "GRPO")
    )
    return [x - y for x, y in zip(mine, base, strict=True)]


def effects(rows):
    law = [TOLERANCE - errors(run_rows)["law"] for run_rows in runs(rows, "GRPO")]
    return {"0.03 − error of the law": law, "entropy, Clip-Cov − GRPO": kept(rows, "Clip-Cov")}


def last(rows, method):
    """Accuracy over the last three measurements, one value a seed."""
    return [statistics.mean(column(r[-3:], "accuracy")) for r in runs(rows, method)]


def verdict(rows):
    found = {name: common.mean_ci(values) for name, values in effects(rows).items()}
    seen = all(mean > half for mean, half in found.values())
    found["entropy, clip-higher − GRPO"] = common.mean_ci(kept(rows, "clip-higher"))
    for method in ("Clip-Cov", "clip-higher"):
        gain = common.paired(last(rows, method), last(rows, "GRPO"))
        found[f"last accuracy, {method} − GRPO"] = gain
    mistakes = [errors(run_rows) for run_rows in runs(rows, "GRPO")]
    for name in ("law", "line", "constant"):
        found[f"error of {name}"] = common.mean_ci(column(mistakes, name))
    for name in ("entropy", "accuracy"):
        found[f"{name} at first"] = common.mean_ci([r[0][name] for r in runs(rows, "GRPO")])
        found[f"{name} at last"] = common.mean_ci([r[-1][name] for r in runs(rows, "GRPO")])
    numbers = {f"{name}{end}": x for name, both in found.items() for end, x in zip(("", " ±"), both)}
    return seen, "; ".join(f"{name} {common.pm(*both, 3)}" for name, both in found.items()), numbers


def figure(rows, path):
    fig, (left, middle, right) = common.axes(3, width=3.2, height=3)
    for method in METHODS:
        common.line(left, rows, "step", "entropy", method, "-", method=method)
        common.line(middle, rows, "step", "accuracy", method, "-", method=method)
    for i, run_rows in enumerate(runs(rows, "GRPO")):
        first, rest = cut(run_rows)
        for part, fill in ((first, f"C{i}"), (rest, "none")):
            points = column(part, "entropy"), column(part, "accuracy")
            right.scatter(*points, s=14, edgecolors=f"C{i}", facecolors=fill)
        a, b = fit(column(first, "entropy"), column(first, "accuracy"))
        grid = sorted(column(run_rows, "entropy"))
        right.plot(grid, [b - a * math.exp(h) for h in grid], color=f"C{i}", lw=1)
    left.set(xlabel="step", ylabel="entropy, nats a token")
    middle.set(xlabel="step", ylabel="accuracy, held-out prompts")
    right.set(xlabel="entropy of GRPO", ylabel="accuracy (full: fitted)")
    left.legend(fontsize=8)
    common.save(fig, path)
