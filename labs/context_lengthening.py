"""DeepScaleR: RL with a short limit on the length first, and longer ones later, against one limit."""

import math
import random
import re
import statistics

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Luo et al., 2025, DeepScaleR: surpassing o1-preview with a 1.5B model by scaling RL (no arXiv paper)"
QUESTION = "Is it cheaper to begin RL with a short context, and when should it be lengthened?"
PREDICTION = (
    "begun at 11 tokens and lengthened to 14 and 29, RL reaches 90% with fewer tokens, ends as good, and "
    "shorter"
)
STATISTIC = (
    "11, 14, 29 at steps 20 and 40 against 29 throughout, 3 seeds, paired, 95% interval: generated tokens "
    "until the mean reward of five steps is 0.9 (log ratio), held-out accuracy and length at the end; seen "
    "if the log ratio is below 0, the length too, and the accuracy's interval is above -0.02"
)
DIFFERS = (
    "sums of three to eight digits mod 10, by a model (54k parameters) that guesses in half of its samples "
    "and else thinks rightly, but then repeats the last sum up to 16 times before it answers: thoughts need "
    "8 to 13 tokens and take up to 29; rollouts of 256 samples, 60 steps; the paper lengthened after 59% "
    "and 87% of its steps"
)
CHANGES = []
SEEDS = 3

WIDTH, RAMBLE, LONGEST = 9, 16, 29
SCHEDULES = (  # limits, steps at which they are lengthened
    ([29], []),
    ([14], []),
    ([11], []),
    ([11, 14, 29], [10, 20]),
    ([11, 14, 29], [20, 40]),
    ([11, 14, 29], [35, 52]),
    ([8, 14, 29], [20, 40]),
)
MAIN, FIXED = SCHEDULES[4], SCHEDULES[0]


def name(limits, at):
    when = f" at {' and '.join(map(str, at))}" if at else " throughout"
    return "-".join(map(str, limits)) + when


def points(smoke):
    return [{"limits": name(*s)} for s in (SCHEDULES[:1] + SCHEDULES[4:5] if smoke else SCHEDULES)]


def accuracy(prompt, response, row):
    """1 for `|digit` or `<digits>|digit` with the right digit; the prompt is digits, filled up with =."""
    answer = sum(map(int, prompt.rstrip("="))) % 10
    match = re.fullmatch(r"(<[0-9]*>)?\|([0-9])", response)
    return float(match is not None and int(match[2]) == answer)


def problems(n, seed, split):
    """n rows of one split, with demonstrations: half of them guess, half think, and ramble."""
    rng, rows = random.Random(f"lengthening {split} {seed}"), []
    while len(rows) < n:
        digits = [rng.randrange(10) for _ in range(rng.randint(3, 8))]
        prompt = "".join(map(str, digits)).ljust(WIDTH, "=")
        if tasks.held_out(prompt) != (split == "test"):
            continue
        sums = "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))
        thought = f"<{sums}{sums[-1] * rng.randint(0, RAMBLE)}>" if rng.random() < 0.5 else ""
        rows.append({"prompt": prompt, "response": f"{thought}|{sums[-1]}"})
    return rows


def base(seed, smoke):
    data = common.data_file(problems(500 if smoke else 40_000, seed, "train"))
    what = dict(task="chain", tokenizer="chars", max_len=48, eval_every=0, steps=5 if smoke else 800)
    return common.trained(train_sft, **what, data=data, seed=seed) + "/model"


def measure(folder, seed, n):
    """→ {"accuracy", "greedy", "length"} on held-out problems, with the longest limit."""
    model, tok = hub.load(folder)
    prompts = [row["prompt"] for row in problems(n, seed, "test")]
    out = {}
    for column, temperature in (("greedy", 0.0), ("accuracy", 1.0)):
        how = dict(temperature=temperature, seed=derive_seed(seed, "lengthening"))
        rolls, texts = generate.respond(model, tok, prompts, 1, LONGEST, **how)
        out[column] = statistics.mean(accuracy(p, t, None) for p, t in zip(prompts, texts))
    return out | {"length": statistics.mean(n for roll in rolls for n in roll.response_len.tolist())}


def run(point, seed, smoke):
    limits, at = next(s for s in SCHEDULES if name(*s) == point["limits"])
    at, steps = (at and [1, 2], 3) if smoke else (at, 60)
    data = common.data_file(problems(3000, seed, "train"))
    what = dict(init=base(seed, smoke), data=data, ref="none", seed=seed)
    what |= dict(max_new_tokens=limits, lengthen_at=at, steps=steps, eval_prompts=0)
    reward = [f"{__file__}:accuracy"]
    folder = common.trained(train_grpo, task="chain", **what, reward=reward, reward_timeout=0)
    rewards, lengths, stops = common.logged(folder, "reward", "len", "stop")
    rows, tokens, reached = [], 0, None
    for i in range(len(rewards)):
        tokens += 256 * lengths[i]
        five = slice(max(0, i - 4), i + 1)
        reward = statistics.mean(rewards[five])
        reached = tokens if reached is None and i >= 4 and reward >= 0.9 else reached
        if i % 5 == 4 or smoke:
            cut, length = 1 - statistics.mean(stops[five]), statistics.mean(lengths[five])
            rows.append({"step": i + 1, "tokens": tokens, "reward": reward, "cut": cut, "long": length})
    start = {f"{k}_before": v for k, v in measure(base(seed, smoke), seed, 64 if smoke else 512).items()}
    end = measure(f"{folder}/model", seed, 64 if smoke else 512)
    return [*rows, start | end | {"total": tokens, "to90": reached}]


def verdict(rows):
    def of(column, schedule):
        return common.by_seed(rows, column, limits=name(*schedule))

    numbers = {}
    for s in (s for s in SCHEDULES if of("total", s)):
        found = {column: of(column, s) for column in ("accuracy", "greedy", "length", "total", "to90")}
        numbers |= {f"{column} {name(*s)}": statistics.mean(x) for column, x in found.items() if x}
    logs = [[math.log(x) for x in of("to90", s)] for s in (MAIN, FIXED)]
    if not logs[0] or len(logs[0]) != len(logs[1]):
        return False, "not every run reached 0.9", numbers
    sooner = common.paired(*logs)
    better, shorter = (common.paired(of(c, MAIN), of(c, FIXED)) for c in ("accuracy", "length"))
    total = common.paired(*([math.log(x) for x in of("total", s)] for s in (MAIN, FIXED)))
    seen = sum(sooner) < 0 and sum(shorter) < 0 and better[0] - better[1] > -0.02
    sentence = (
        f"lengthened against 29 throughout: log of the tokens until 0.9 {common.pm(*sooner)}, of all tokens "
        f"{common.pm(*total)}, accuracy at the end {common.pm(*better, 3)}, length {common.pm(*shorter, 1)}"
    )
    numbers |= {"log tokens to 0.9": sooner[0], "log tokens to 0.9 ±": sooner[1], "log tokens": total[0]}
    numbers |= {"accuracy": better[0], "accuracy ±": better[1], "length": shorter[0], "length ±": shorter[1]}
    return seen, sentence, numbers


def figure(rows, path):
    fig, axs = common.axes(3, width=3.4, height=3.2)
    for i, s in enumerate(s for s in SCHEDULES if common.select(rows, limits=name(*s))):
        style = f"C{i}-" if s[1] else f"C{i}--"
        during = [r for r in common.select(rows, limits=name(*s)) if r["step"] is not None]
        steps = sorted({r["step"] for r in during})
        mean = {
            c: [statistics.mean(r[c] for r in during if r["step"] == x) for x in steps]
            for c in ("tokens", "reward", "long", "cut")
        }
        axs[0].plot([x / 1000 for x in mean["tokens"]], mean["reward"], style, lw=1.2, label=name(*s))
        axs[1].plot(steps, mean["long"], style, lw=1.2)
        axs[2].plot(steps, mean["cut"], style, lw=1.2)
    axs[0].set(xlabel="generated tokens, thousands", ylabel="reward, mean of five steps")
    axs[1].set(xlabel="step", ylabel="length of responses, tokens")
    axs[2].set(xlabel="step", ylabel="share of responses cut")
    axs[0].legend(fontsize=7)
    common.save(fig, path)
