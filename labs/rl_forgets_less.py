"""RL's Razor: SFT and RL learn a new task equally well; which of them forgets the old one more?

One small model knows two families of prompts, of six digits each:

    reverse  r352814=418253    old (labs/curriculum.py)
    parity   p352814=2         new: any digit that is even or odd as the prompt's last digit is

Each prompt of the new task has five right answers. The base model gives one of them in 60% of its samples,
and it has favourites among the digits. Three methods raise that share:

    RL       GRPO, reward 1 for any right digit
    labels   SFT on an annotator's labels: 0 for even, 1 for odd
    nearest  SFT on right samples of the base model: of all policies without a mistake the nearest to it
"""

import random
import statistics

import torch

import train_grpo
import train_sft
from evaluate import kl_per_token
from labs import common
from labs.curriculum import draw
from nanorlhf import generate, hub

PAPER = (
    "Shenfeld, Pari, Agrawal 2025, RL's Razor: why online reinforcement learning forgets less (2509.04259)"
)
QUESTION = "Does RL forget less than SFT at the same new-task accuracy, and does the KL on that task tell?"
PREDICTION = (
    "where both have learned the new task equally well, RL keeps more of the old one than SFT on an "
    "annotator's labels does; over all runs KL(base‖trained) on the new task predicts what is forgotten"
)
STATISTIC = (
    "old-task accuracy where new-task accuracy passes 0.8, 0.9 and 0.98, linear between stages, mean of the "
    "three, each at the better of two learning rates (0 for a method that never gets there): RL less SFT on "
    "labels, above 0; and the correlation of the KL with the lost accuracy, over all runs and stages of a "
    "seed, above 0.8; 95% intervals over the seeds"
)
DIFFERS = (
    "a transformer of one layer and answers of one digit, like the paper's ParityMNIST, in place of Qwen 2.5 "
    "3B; stages of two learning rates in place of a large sweep; SFT and RL take equally many updates of 64 "
    "samples; the paper fits a parabola, with an R² of 0.96 in its toy and 0.71 in language models"
)
CHANGES = [
    "Set-up chosen on seed 9000: with learning rates of 3e-4 and 1e-3 and stages of 20 to 160 updates one "
    "stage went past all that matters, so the rates are three times smaller and the stages finer, most of "
    "all where SFT passes 0.9; three levels in place of 0.9 alone, as SFT lost little until 0.93 and nearly "
    "all soon after",
]
SEEDS = 5

METHODS = ("RL", "labels", "nearest")
ROLLOUTS = {3e-4: 3, 1e-4: 9}  # of a stage at each learning rate, four updates each
STAGES = (2, 1, 1, 1, 2, 2)  # multiples of it; a stage goes on where the one before it ended
LEVELS = (0.8, 0.9, 0.98)


def points(smoke):
    every = [{"method": method, "lr": lr} for lr in ROLLOUTS for method in METHODS]
    return every[:2] if smoke else every


# ------------------------------------------------------------------------------------------------------------
# the new task


def right(prompt):
    """The five answers to p352814= and its like."""
    return "13579" if prompt[-2] in "13579" else "02468"


def parity(prompt, response, row):
    """The reward."""
    return float(len(response) == 1 and response in right(prompt))


def habits(n, seed):
    """What the base model does: right in 60%; of five digits each is half as frequent as the one before."""
    rng = random.Random(seed)
    favourites = rng.sample("0123456789", 10)
    rows = draw("p", "train", n, rng)
    for row in rows:
        good = rng.random() < 0.6
        digits = [digit for digit in favourites if (digit in right(row["prompt"])) == good]
        row["response"] = rng.choices(digits, [16, 8, 4, 2, 1])[0]
    return rows


def answers(model, tok, rows, seed):
    """One sample to each prompt."""
    prompts = [row["prompt"] for row in rows]
    return generate.respond(model, tok, prompts, 1, 7, seed=seed)[1]


def practice(method, base, n, seed):
    """Prompts of the new task with right answers, of which GRPO reads the prompts."""
    rows = draw("p", "train", n, random.Random(seed))
    if method == "nearest":
        for row, text in zip(rows, answers(*hub.load(base), rows, seed)):
            row["response"] = text
        return [row for row in rows if parity(row["prompt"], row["response"], row)]
    for row in rows:
        row["response"] = right(row["prompt"])[0]
    return rows


# ------------------------------------------------------------------------------------------------------------
# runs


def base_model(seed, smoke):
    n = 200 if smoke else 20_000
    rows = habits(n, seed) + draw("r", "train", n, random.Random(seed))
    settings = dict(task="chain", tokenizer="chars", max_len=16, eval_every=0, seed=seed)
    settings["steps"] = 5 if smoke else 600
    return common.trained(train_sft, data=common.data_file(rows), **settings) + "/model"


def trained_on(folder, method, data, rollouts, lr, seed):
    """One more stage → the model's folder."""
    settings = dict(task="chain", data=data, init=folder, lr=lr, seed=seed)
    if method == "RL":
        settings |= dict(steps=rollouts, constant_lr_after=1, max_new_tokens=2, ref="none")
        settings |= dict(reward=[f"{__file__}:parity"], reward_timeout=0, eval_prompts=0)
        return common.trained(train_grpo, **settings) + "/model"
    settings |= dict(steps=4 * rollouts, weight_decay=0.0, eval_every=0)
    return common.trained(train_sft, **settings) + "/model"


@torch.no_grad()
def divergence(model, other, tok, rows, seed):
    """KL(model‖other) in nats a response, on samples of the model."""
    rolls = generate.sample_in_batches(model, tok, rows, 1, 2, 1.0, seed)
    return sum(kl_per_token(model, other, roll.tokens, roll.mask).sum().item() for roll in rolls) / len(rows)


def measure(folder, base, seed, n):
    """→ accuracy on held-out prompts of the new and the old task, both KLs to the base on the new one."""
    model, tok = hub.load(folder)
    start, _ = hub.load(base)
    new = draw("p", "test", n, random.Random(seed))
    old = draw("r", "test", n, random.Random(seed))
    solved = [parity(row["prompt"], text, row) for row, text in zip(new, answers(model, tok, new, seed))]
    kept = [text == row["response"] for row, text in zip(old, answers(model, tok, old, seed))]
    return {
        "new": statistics.mean(solved),
        "old": statistics.mean(kept),
        "kl": divergence(start, model, tok, new, seed),
        "reverse_kl": divergence(model, start, tok, new, seed),
    }


def run(point, seed, smoke):
    n = 64 if smoke else 512
    base = folder = base_model(seed, smoke)
    data = common.data_file(practice(point["method"], base, 500 if smoke else 4000, seed))
    updates = 0
    rows = [measure(base, base, seed, n) | {"updates": 0}]
    for number, stage in enumerate(STAGES[:2] if smoke else STAGES):
        rollouts = 1 if smoke else stage * ROLLOUTS[point["lr"]]
        folder = trained_on(folder, point["method"], data, rollouts, point["lr"], 100 * seed + number)
        updates += 4 * rollouts
        rows.append(measure(folder, base, seed, n) | {"updates": updates})
    return rows


# ------------------------------------------------------------------------------------------------------------
# statistics


def old_at(path, level):
    """Rows along a run → old-task accuracy where the new one's first passes the level, linear between."""
    for before, after in zip(path, path[1:]):
        if after["new"] >= level:
            share = (level - before["new"]) / (after["new"] - before["new"])
            return before["old"] + share * (after["old"] - before["old"])
    return 0.0


def kept(rows, method):
    """Of one seed: old-task accuracy at equal new-task accuracy, mean over the levels."""
    runs = [common.select(rows, method=method, lr=lr) for lr in ROLLOUTS]
    return statistics.mean(max(old_at(path, level) for path in runs) for level in LEVELS)


def correlation(rows, column):
    """Of one seed: of a KL with what is lost; 0 where nothing is."""
    after = [r for r in rows if r["updates"]]
    lost = [-r["old"] for r in after]
    return statistics.correlation([r[column] for r in after], lost) if len(set(lost)) > 1 else 0.0


def each_seed(rows, figure, *args):
    return [figure(common.select(rows, seed=seed), *args) for seed in sorted({r["seed"] for r in rows})]


def effects(rows):
    pairs = zip(each_seed(rows, kept, "RL"), each_seed(rows, kept, "labels"))
    return {
        "old task, RL less SFT": [rl - labels for rl, labels in pairs],
        "correlation of the KL": [r - 0.8 for r in each_seed(rows, correlation, "kl")],
    }


def verdict(rows):
    gap, tells = map(common.mean_ci, effects(rows).values())
    seen = all(mean - half > 0 for mean, half in (gap, tells))
    numbers = {method: statistics.mean(each_seed(rows, kept, method)) for method in METHODS}
    numbers["before"] = statistics.mean(common.by_seed(rows, "old", updates=0))
    numbers["reverse"] = statistics.mean(each_seed(rows, correlation, "reverse_kl"))
    numbers |= {"gap": gap[0], "gap ±": gap[1], "correlation": tells[0] + 0.8, "correlation ±": tells[1]}
    sentence = (
        "old task before, and at equal accuracy on the new one: {before:.2f}, RL {RL:.2f}, SFT on labels "
        "{labels:.2f}, on the nearest answers {nearest:.2f}; RL less labels {gap:+.2f} ± {gap ±:.2f}; "
        "correlation of what is lost with KL(base‖trained) {correlation:.2f} ± {correlation ±:.2f}, with "
        "KL(trained‖base) {reverse:.2f}"
    )
    return seen, sentence.format(**numbers), numbers


def figure(rows, path):
    fig, axs = common.axes(2, width=4.4, height=3.6)
    for method in METHODS:
        runs = common.select(rows, method=method)
        axs[0].plot([r["new"] for r in runs], [r["old"] for r in runs], "o", ms=4, alpha=0.6, label=method)
        axs[1].plot([r["kl"] for r in runs], [r["old"] for r in runs], "o", ms=4, alpha=0.6)
    axs[0].set(xlabel="accuracy on the new task", ylabel="accuracy on the old task")
    axs[1].set(xlabel="KL(base‖trained) on the new task, nats")
    axs[0].legend(fontsize=8)
    common.save(fig, path)
