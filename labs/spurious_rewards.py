"""GRPO on rewards that know nothing: which family gains from them, and whether the clip is why."""

import random
import re
import statistics
from itertools import accumulate

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Shao et al., 2025, Spurious rewards: rethinking training signals in RLVR (2506.10947)"
QUESTION = "Can a reward that is independent of the answer raise accuracy, and through what?"
PREDICTION = (
    "a coin as reward, with the clip, raises the accuracy of the code-like family, whose favourite habit is "
    "the right one, and raises it more than that of the prose-like family, whose habit does not help"
)
STATISTIC = (
    "accuracy of 512 samples to held-out prompts after GRPO less before it, 5 seeds, paired: the coin's gain "
    "with the clip in the code-like family, and the same less the gain in the prose-like family; seen if "
    "both 95% intervals lie above 0"
)
DIFFERS = (
    "sums of one to six digits mod 10, by models of 53k parameters; both families write a scratchpad for 95% "
    "of the problems of one kind (first digit even) and 35% of the others: running sums in the code-like "
    "one, the digits again in the prose-like one; direct answers are right where digits are few; a fifth of "
    "the answers lack the mark that the format reward asks for, and count; the wrong label is the sum plus "
    "5; eight updates a rollout, a clip of 0.1, 40 rollouts"
)
CHANGES = [
    "a new set-up: two families with the same habit, which helps one of them, and problems that a direct "
    "answer can solve; before, the two differed in how often they took one and the same habit",
    "set-up chosen on seed 9000, one run each: at lr 3e-4 and clip 0.2 the coin took the skill away (right "
    "with the scratchpad 0.99 → 0.86, gain -0.06); at 1e-4 and 0.2 nothing was clipped (gain -0.03); at 2e-4 "
    "and 0.1 the skill stays (0.97 → 0.96, gain -0.03; prose-like -0.01), not so without the clip (0.50); "
    "then 600 steps of SFT for 400, as the prose-like family could not yet add two digits",
]
SEEDS = 5

DIGITS = 6  # of the longest problem
OFF = 1e6  # a clip that never acts
CLIP = 0.1
LR = 2e-4
FAMILIES = ("code-like", "prose-like")
REWARDS = ("true", "format", "wrong", "coin")
FIGURES = "gain habit_before habit_after with_habit_after entropy_before entropy_after clipped".split()


def points(smoke):
    """Without the clip: all but the true reward in the code-like family, the coin in the prose-like one."""
    if smoke:
        return [{"family": family, "reward": "coin", "clip": CLIP} for family in FAMILIES]
    found = [{"family": family, "reward": r, "clip": CLIP} for family in FAMILIES for r in REWARDS]
    found += [{"family": "code-like", "reward": reward, "clip": OFF} for reward in REWARDS[1:]]
    return [*found, {"family": "prose-like", "reward": "coin", "clip": OFF}]


# ---- the rewards, as files of the user's own are: --reward labs/spurious_rewards.py:coin

coins = {}


def true(prompt, response, row):
    """1 where the answer is right, with or without its mark |."""
    match = re.fullmatch(r"(<[0-9]*>)?\|?([0-9])", response)
    return float(match is not None and match[2] == row["answer"])


def format(prompt, response, row):
    """1 for `|digit` or `<digits>|digit`, whatever the digit."""
    return float(re.fullmatch(r"(<[0-9]*>)?\|[0-9]", response) is not None)


def wrong(prompt, response, row):
    """1 where the answer is the label, which is wrong for every problem."""
    label = str((int(row["answer"]) + 5) % 10)
    return true(prompt, response, {"answer": label})


def coin(prompt, response, row):
    """Heads or tails, whatever was answered. A run imports this file anew, so its coins start anew."""
    if "rng" not in coins:
        coins["rng"] = random.Random(prompt)
    return float(coins["rng"].random() < 0.5)


# ---- runs


def problems(n, seed, split, family):
    """n rows of one split, with the demonstrations of a family."""
    rng = random.Random(f"spurious {split} {seed}")
    rows = []
    while len(rows) < n:
        digits = [rng.randrange(10) for _ in range(rng.randint(1, DIGITS))]
        text = "".join(map(str, digits))
        prompt = text.ljust(DIGITS + 1, "=")
        if tasks.held_out(prompt) != (split == "test"):
            continue
        sums = "".join(str(total % 10) for total in accumulate(digits))
        scratchpad = f"<{sums}>" if family == "code-like" else f"<{text}>"
        habit = 0.35 if digits[0] % 2 else 0.95
        if rng.random() > habit:
            scratchpad = ""
        mark = "" if rng.random() < 0.2 else "|"
        rows.append({"prompt": prompt, "answer": sums[-1], "response": f"{scratchpad}{mark}{sums[-1]}"})
    return rows


def base(seed, family, smoke):
    data = common.data_file(problems(500 if smoke else 40_000, seed, "train", family))
    config = dict(task="chain", data=data, seed=seed, eval_every=0, tokenizer="chars")
    return common.trained(train_sft, **config, steps=5 if smoke else 600)


def measure(folder, seed, n):
    """Figures of one sample to each of n held-out prompts at temperature 1.

    → accuracy, habit (the share with a scratchpad), with_habit and without (accuracy of the two).
    """
    model, tok = hub.load(folder)
    rows = problems(n, seed, "test", "code-like")
    prompts = [row["prompt"] for row in rows]
    _, texts = generate.respond(model, tok, prompts, 1, 11, seed=derive_seed(seed, "spurious"))
    right = [true(row["prompt"], text, row) for row, text in zip(rows, texts)]
    habit = [float(text.startswith("<")) for text in texts]
    both = sum(r * h for r, h in zip(right, habit))
    return {
        "accuracy": statistics.mean(right),
        "habit": statistics.mean(habit),
        "with_habit": both / max(sum(habit), 1),
        "without": (sum(right) - both) / max(n - sum(habit), 1),
    }


def run(point, seed, smoke):
    sft = base(seed, point["family"], smoke)
    data = common.data_file(problems(3000, seed, "train", "code-like"))
    grpo = common.trained(
        train_grpo, task="chain", init=f"{sft}/model", ref="none", seed=seed, data=data, eval_prompts=0,
        reward=[f"{__file__}:{point['reward']}"], reward_timeout=0, steps=2 if smoke else 40,
        minibatches=8, lr=LR, clip_low=point["clip"], clip_high=point["clip"],
    )
    n = 64 if smoke else 512
    row = {}
    for when, folder in (("before", sft), ("after", grpo)):
        for name, value in measure(f"{folder}/model", seed, n).items():
            row[f"{name}_{when}"] = value
    entropies, clipped = common.logged(grpo, "entropy", "clip")
    row["entropy_before"] = entropies[0]
    row["entropy_after"] = statistics.mean(entropies[-5:])
    row["clipped"] = statistics.mean(clipped)
    row["gain"] = row["accuracy_after"] - row["accuracy_before"]
    return [row]


# ---- statistic


def name(reward, clip):
    return reward + ", no clip" * (clip == OFF)


def effects(rows):
    code = common.by_seed(rows, "gain", family="code-like", reward="coin", clip=CLIP)
    prose = common.by_seed(rows, "gain", family="prose-like", reward="coin", clip=CLIP)
    return {
        "coin's gain, code-like": code,
        "code-like less prose-like": [a - b for a, b in zip(code, prose)],
    }


def verdict(rows):
    numbers = {}
    gains = []
    for point in points(False):
        mine = common.select(rows, **point)
        if not mine:
            continue
        label = f"{point['family']}, {name(point['reward'], point['clip'])}"
        gain, half = common.mean_ci(common.by_seed(mine, "gain"))
        gains.append(f"{label} {common.pm(gain, half)}")
        for column in FIGURES:
            numbers[f"{column} {label}"] = statistics.mean(common.by_seed(mine, column))
    parts = []
    seen = True
    for label, values in effects(rows).items():
        centre, half = common.mean_ci(values)
        numbers[label] = centre
        numbers[f"{label} ±"] = half
        parts.append(f"{label} {common.pm(centre, half)}")
        seen = seen and centre - half > 0
    return seen, ", ".join(parts) + "; gains: " + "; ".join(gains), numbers


def figure(rows, path):
    """A row for each run: bars before, points after, in the colours of accuracy, habit and entropy."""
    fig, axs = common.axes(2, width=4.6, height=3.6)
    parts = {"accuracy": "accuracy", "habit": "share with a scratchpad", "entropy": "entropy, nats a token"}
    for ax, family in zip(axs, FAMILIES):
        runs = [point for point in points(False) if point["family"] == family]
        for j, column in enumerate(parts):
            for i, point in enumerate(runs):
                before, _ = common.mean_ci(common.by_seed(rows, f"{column}_before", **point))
                after, half = common.mean_ci(common.by_seed(rows, f"{column}_after", **point))
                y = i + 0.22 * j
                ax.plot([before, after], [y, y], "|-", color=f"C{j}", lw=1, markevery=[0])
                ax.errorbar(after, y, xerr=half, fmt="o", color=f"C{j}", ms=4)
            ax.plot([], [], "o-", color=f"C{j}", label=parts[column])
        labels = [name(point["reward"], point["clip"]) for point in runs]
        ax.set(yticks=range(len(runs)), yticklabels=labels, xlim=(-0.02, 1.02), ylim=(6.7, -0.3))
        ax.set(title=family, xlabel="before (bar), after GRPO (point)")
    axs[1].legend(fontsize=8, loc="lower right")
    common.save(fig, path)
