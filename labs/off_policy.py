"""Stale samples: which importance weight keeps GRPO learning when the sampler is some rollouts behind?

    token clip         min(ρA, clip(ρ, 0.8, 1.2) A)         ρ = π/π_sampler of the token     GRPO
    sequence clip      the same of ρ = (Π_t ρ_t)^(1/n)                                        GSPO
    CISPO              min(ρ, 5) A log π, the weight without gradient
    truncated weights  min(π_old/π_sampler, 2) × the token clip of ρ = π/π_old                TIS
"""

import statistics

import train_grpo
import train_sft
import variants
from labs import common
from nanorlhf import tasks

PAPER = (
    "Piché et al., 2025, PipelineRL (2509.19128), and Khatri et al., 2025, The art of scaling reinforcement "
    "learning compute for LLMs (ScaleRL, 2510.13786)"
)
QUESTION = "How stale may samples be, and which importance weight bears it best?"
PREDICTION = (
    "samples that are 8 rollouts old cost a loss with truncated weights (CISPO) at most 0.05 of accuracy at "
    "equal sampled tokens, and it learns more from them than the token clip does"
)
STATISTIC = (
    "held-out accuracy after equally many sampled tokens, as many as the shortest of the compared runs has "
    "in all: CISPO less token clip, both 8 rollouts stale; and 0.05 less what staleness 8 costs CISPO; "
    "paired by seed, 95% interval; seen if both are above 0"
)
DIFFERS = (
    "chain with 53k parameters and 32 rollouts in place of thousands; every sample is exactly as old as "
    "said, in place of at most; sequence clip with 0.2, because GSPO's 3e-4 would clip nearly all of 11 "
    "tokens; one learning rate for all"
)
CHANGES = [
    "Set-up chosen on seed 9000: learning rate 1e-4, as with 3e-4 and 50 rollouts all but the token clip "
    "ended at 0.98, most of it learned from the first 16 rollouts",
]
SEEDS = 5

STALE = (0, 4, 8, 16)  # rollouts
METHODS = {
    "token clip": {},
    "sequence clip": dict(ratio="sequence"),
    "CISPO": dict(loss="cispo"),
    "truncated weights": {},  # of variants/tis.py
}
GRPO = dict(
    task="chain", steps=32, prompts_per_step=8, group_size=16, minibatches=4, lr=1e-4, ref="none",
    eval_every=8, eval_prompts=256, sample_every=1000,
)  # fmt: skip


def points(smoke):
    every = [{"method": name, "stale": stale} for stale in STALE for name in METHODS]
    return [every[2], every[8], every[10]] if smoke else every


def run(point, seed, smoke):
    size = dict(steps=2, demos=200) if smoke else {}
    base = common.trained(train_sft, task="chain", seed=seed, eval_every=0, **size)
    task = tasks.get("chain")
    prompts = task.prompts("train", 100 if smoke else 3000, seed)
    data = common.data_file(prompts + task.prompts("test", 16 if smoke else 256, seed))
    config = GRPO | METHODS[point["method"]] | dict(init=f"{base}/model", data=data, seed=seed)
    if smoke:
        config |= dict(steps=2, prompts_per_step=2, eval_prompts=16)
    trainer = train_grpo
    if point["method"] == "truncated weights":
        trainer = variants.load("tis")
    folder = common.trained(trainer, off_policy_steps=point["stale"], **config)
    (sampled,) = common.logged(folder, "sampled")
    steps, accuracy = common.logged(folder, "step", "eval/reward")
    steps[-1] += 1  # measured after that step, the others before
    clipped = statistics.mean(common.logged(folder, "clip")[0])
    found = zip(steps, accuracy)
    return [{"tokens": sum(sampled[: int(step)]), "accuracy": x, "clipped": clipped} for step, x in found]


# ---- accuracy at equal tokens


def at(rows, budget):
    """Rows of one run → its accuracy after `budget` tokens, on straight lines between measurements."""
    rows = sorted(rows, key=lambda r: r["tokens"])
    for before, after in zip(rows, rows[1:]):
        if budget <= after["tokens"]:
            share = (budget - before["tokens"]) / (after["tokens"] - before["tokens"])
            return before["accuracy"] + share * (after["accuracy"] - before["accuracy"])
    return rows[-1]["accuracy"]


def at_equal_tokens(rows, cases):
    """cases (method, stale) → {case: [accuracy of each seed]}, at the fewest tokens that one of them has."""
    found = {case: [] for case in cases}
    for seed in sorted({r["seed"] for r in rows}):
        runs = {(m, s): common.select(rows, method=m, stale=s, seed=seed) for m, s in cases}
        budget = min(max(r["tokens"] for r in run) for run in runs.values())
        for case, run in runs.items():
            found[case].append(at(run, budget))
    return found


def effects(rows):
    cases = [("CISPO", 0), ("CISPO", 8), ("token clip", 8)]
    fresh, stale, clipped = at_equal_tokens(rows, cases).values()
    return {
        "CISPO less token clip, 8 stale": [a - b for a, b in zip(stale, clipped)],
        "0.05 less CISPO's cost of 8 stale": [0.05 - (a - b) for a, b in zip(fresh, stale)],
    }


def cases_of(rows):
    return sorted({(r["method"], r["stale"]) for r in rows}, key=lambda c: (list(METHODS).index(c[0]), c[1]))


def verdict(rows):
    found = {label: common.mean_ci(x) for label, x in effects(rows).items()}
    seen = all(mean - half > 0 for mean, half in found.values())
    numbers = {}
    for label, (mean, half) in found.items():
        numbers |= {label: mean, f"{label} ±": half}
    parts = {}
    for (method, stale), x in at_equal_tokens(rows, cases_of(rows)).items():
        mean = statistics.mean(x)
        numbers[f"{method}, {stale:g} stale"] = mean
        parts.setdefault(method, []).append(f"{mean:.2f}")
        clipped = common.by_seed(rows, "clipped", method=method, stale=stale)
        numbers[f"clipped {method}, {stale:g} stale"] = statistics.mean(clipped)
    stales = ", ".join(f"{s:g}" for s in sorted({r["stale"] for r in rows}))
    sentence = ", ".join(f"{label}: {common.pm(*x)}" for label, x in found.items())
    sentence += f"; accuracy at equal tokens, staleness {stales}: "
    return seen, sentence + "; ".join(f"{m} {' / '.join(x)}" for m, x in parts.items()), numbers


def figure(rows, path):
    fig, axs = common.axes(2, width=4.4, height=3.6)
    found = at_equal_tokens(rows, cases_of(rows))
    points = [
        {"method": method, "stale": stale, "seed": seed, "accuracy": x}
        for (method, stale), values in found.items()
        for seed, x in enumerate(values)
    ]
    for style, method in zip(("o-", "s-", "^-", "d--"), METHODS):
        common.line(axs[0], common.select(points, method=method), "stale", "accuracy", method, style)
        stale = common.select(rows, method=method, stale=8)
        runs = [common.select(stale, seed=s) for s in sorted({r["seed"] for r in stale})]
        most = min((max(r["tokens"] for r in run) for run in runs), default=0)
        grid = [most * i / 20 for i in range(21) if runs]
        means = [statistics.mean(at(run, x) for run in runs) for x in grid]
        axs[1].plot([x / 1000 for x in grid], means, style[1:])
    axs[0].set(xlabel="staleness, rollouts", ylabel="held-out accuracy at equal tokens", xticks=STALE)
    axs[1].set(xlabel="sampled tokens, thousands", ylabel="held-out accuracy", title="8 rollouts stale")
    axs[0].legend(fontsize=8)
    common.save(fig, path)
