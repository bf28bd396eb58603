"""DeepScaleR: RL with a short limit on the length first and a long one later, at equal sampled tokens."""

import random
import re
import statistics

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Luo et al., 2025, DeepScaleR: surpassing o1-preview with a 1.5B model by scaling RL (no arXiv paper)"
QUESTION = "Is RL cheaper with a short context first and a long one later, where problems need long thoughts?"
PREDICTION = (
    "at equal sampled tokens, RL that begins with 14 tokens and is lengthened to 43 is more accurate on "
    "held-out problems than RL with 43 throughout, and than RL with 14 throughout"
)
STATISTIC = (
    "held-out accuracy (512 samples at temperature 1, limit 43) when 80 thousand tokens have been sampled, "
    "linear between evaluations: 14-43 at 16 less 43 throughout, and less the end of 14 throughout (of no "
    "fewer tokens, judged with 43 too); paired, 5 seeds, seen if both 95% intervals lie above 0"
)
DIFFERS = (
    "sums of 3 to 14 digits mod 10, by a model of 54k parameters: thoughts need 8 to 19 tokens, and 14 "
    "suffice for 9 digits; the base model rambles for up to 24 tokens and slips at 4% of the tokens of a "
    "thought, so that long thoughts are wrong more often, as in the paper; compute is sampled tokens; 28 "
    "steps of 256 samples, constant learning rate"
)
CHANGES = [
    "a new set-up: problems that need long thoughts, compared at equal tokens; the one before asked for the "
    "tokens until a reward of 0.9 on problems of up to 8 digits, where no thought needed the longest limit",
    "set-up chosen on seed 9000, one run each: with rambling up to 12 tokens, a limit of 31 and 180 thousand "
    "tokens the long run ended at 0.96, too near its ceiling; with 24, 43 and 100 thousand at 0.90, where "
    "14-43 had 0.89; 80 thousand, where both had 0.88, and 28 steps were taken then, so that the limit rises "
    "after 57% of the steps (the paper: 59%)",
]
SEEDS = 5

WIDTH = 14  # digits of the longest problem
RAMBLE = 24  # most tokens that a thought goes on after its last sum
SLIP = 0.04  # a token of a thought is a random digit
SHORT = 14  # thoughts of up to 9 digits
LONG = 43  # the longest demonstration, with EOS
BUDGET = 80_000  # sampled tokens at which the runs are compared
EVERY = 4  # steps between evaluations

SCHEDULES = {  # limits, steps at which the limit is raised, steps in all
    "43 throughout": ([LONG], [], 20),
    "14 throughout": ([SHORT], [], 28),
    "14-43 at 16": ([SHORT, LONG], [16], 28),
    "14-24-43 at 16, 22": ([SHORT, 24, LONG], [16, 22], 28),
}
MAIN = "14-43 at 16"


def points(smoke):
    names = ["43 throughout", MAIN] if smoke else list(SCHEDULES)
    return [{"limits": name} for name in names]


# ---- the task


def accuracy(prompt, response, row):
    """1 for `<digits>|digit` with the right last digit; the prompt is digits, filled up with =."""
    answer = sum(map(int, prompt.rstrip("="))) % 10
    match = re.fullmatch(r"<[0-9]*>\|([0-9])", response)
    return float(match is not None and int(match[1]) == answer)


def thought(digits, rng):
    """Running sums mod 10, then the last sum again and again; a slip is carried on in what follows."""
    written = ""
    total = 0
    for digit in digits + [0] * rng.randint(0, RAMBLE):
        total = (total + digit) % 10
        if rng.random() < SLIP:
            total = rng.randrange(10)
        written += str(total)
    return written


def problems(n, seed, split):
    """n rows of one split, with demonstrations that ramble and slip."""
    rng = random.Random(f"lengthening {split} {seed}")
    rows = []
    while len(rows) < n:
        digits = [rng.randrange(10) for _ in range(rng.randint(3, WIDTH))]
        prompt = "".join(map(str, digits)).ljust(WIDTH, "=")
        if tasks.held_out(prompt) != (split == "test"):
            continue
        sums = thought(digits, rng)
        rows.append({"prompt": prompt, "response": f"<{sums}>|{sums[-1]}"})
    return rows


# ---- runs


def base(seed, smoke):
    data = common.data_file(problems(500 if smoke else 40_000, seed, "train"))
    steps = 5 if smoke else 400
    size = dict(tokenizer="chars", max_len=60)
    return common.trained(train_sft, task="chain", data=data, steps=steps, seed=seed, eval_every=0, **size)


def accuracy_within(folder, seed, limit, n):
    """Accuracy of a model folder on n held-out problems, one sample each at temperature 1."""
    model, tok = hub.load(folder)
    prompts = [row["prompt"] for row in problems(n, seed, "test")]
    _, texts = generate.respond(model, tok, prompts, 1, limit, seed=derive_seed(seed, "lengthening"))
    return statistics.mean(accuracy(prompt, text, None) for prompt, text in zip(prompts, texts))


def run(point, seed, smoke):
    """A row for each evaluation: the tokens sampled before it, and accuracy within the limit of that step."""
    limits, at, steps = SCHEDULES[point["limits"]]
    n = 512
    if smoke:
        n = 32
        at = [1] * len(at)
        steps = 3
    sft = base(seed, smoke)
    data = common.data_file(problems(3000, seed, "train"))
    held_out = common.data_file(problems(n, seed, "test"))
    folder = common.trained(
        train_grpo, task="chain", init=f"{sft}/model", ref="none", seed=seed, steps=steps,
        data=data, eval_data=held_out, eval_every=EVERY, reward=[f"{__file__}:accuracy"], reward_timeout=0,
        max_new_tokens=limits, lengthen_at=at, constant_lr_after=5,
    )
    lengths, stops, sampled = common.logged(folder, "len", "stop", "sampled")
    rows = []
    for step, found in zip(*common.logged(folder, "step", "eval/reward")):
        step = int(step)
        done = step
        if step == steps - 1:  # the last evaluation comes after its step, the others before
            done = steps
        measured = {"step": done, "tokens": sum(sampled[:done]), "accuracy": found}
        rows.append(measured | {"len": lengths[step], "cut": 1 - stops[step]})
    rows[-1]["accuracy_long"] = accuracy_within(f"{folder}/model", seed, LONG, n)
    return rows


# ---- statistic


def at_budget(rows, budget=BUDGET):
    """Rows of one run → accuracy when `budget` tokens had been sampled, linear between two evaluations."""
    curve = sorted((r["tokens"], r["accuracy"]) for r in rows)
    for (left, low), (right, high) in zip(curve, curve[1:]):
        if left <= budget <= right:
            return low + (high - low) * (budget - left) / (right - left)
    return curve[-1][1]  # the run ended before


def compared(rows, limits):
    """Accuracy of one schedule at the budget, a value for each seed."""
    mine = common.select(rows, limits=limits)
    seeds = sorted({r["seed"] for r in mine})
    return [at_budget(common.select(mine, seed=seed)) for seed in seeds]


def effects(rows):
    main = compared(rows, MAIN)
    long = compared(rows, "43 throughout")
    short = common.by_seed(rows, "accuracy_long", limits="14 throughout")
    return {
        "lengthened less 43 throughout": [a - b for a, b in zip(main, long)],
        "lengthened less 14 throughout": [a - b for a, b in zip(main, short)],
    }


def verdict(rows):
    numbers = {}
    for name in SCHEDULES:
        mine = common.select(rows, limits=name)
        if mine:
            numbers[f"accuracy {name}"] = statistics.mean(compared(mine, name))
            numbers[f"at the end, 43 tokens, {name}"] = statistics.mean(common.by_seed(mine, "accuracy_long"))
    parts = []
    seen = True
    for label, values in effects(rows).items():
        mean, half = common.mean_ci(values)
        numbers[label] = mean
        numbers[f"{label} ±"] = half
        parts.append(f"{label} {common.pm(mean, half, 3)}")
        seen = seen and mean - half > 0
    return seen, f"accuracy at {BUDGET:,} sampled tokens: " + ", ".join(parts), numbers


def figure(rows, path):
    fig, axs = common.axes(3, width=3.4, height=3.2)
    for i, name in enumerate(SCHEDULES):
        mine = common.select(rows, limits=name)
        steps = sorted({r["step"] for r in mine})
        mean = {}
        for column in ("tokens", "accuracy", "len", "cut"):
            mean[column] = [statistics.mean(common.by_seed(mine, column, step=step)) for step in steps]
        style = f"C{i}-"
        if name.endswith("throughout"):
            style = f"C{i}--"
        axs[0].plot([tokens / 1000 for tokens in mean["tokens"]], mean["accuracy"], style, lw=1.2, label=name)
        axs[1].plot(steps, mean["len"], style, lw=1.2)
        axs[2].plot(steps, mean["cut"], style, lw=1.2)
    axs[0].axvline(BUDGET / 1000, color="0.7", lw=0.8)
    axs[0].set(xlabel="sampled tokens, thousands", ylabel="held-out accuracy within the limit")
    axs[1].set(xlabel="step", ylabel="length of responses, tokens")
    axs[2].set(xlabel="step", ylabel="share of responses cut")
    axs[0].legend(fontsize=7)
    common.save(fig, path)
