"""On-policy distillation against SFT on the teacher's samples and against RL, at equal sampled tokens.

A student knows two tasks: *countdown*, badly, and to write six digits backwards (r352814=418253), well. A
larger teacher knows both, and countdown better. The student learns countdown alone, in one of three ways:

    grpo      its own samples, a reward of 1 for a right one
    reverse   its own samples, KL(student‖teacher) at every token
    sft       the teacher's samples, as demonstrations

Each takes 512 samples of at most six tokens in each of 100 steps; `tenth` is `reverse` with 10 steps.
"""

import random
import statistics

import train_distill
import train_grpo
import train_sft
from labs import common
from labs.curriculum import draw
from nanorlhf import generate, hub, tasks
from nanorlhf.metrics import pass_at_k

PAPER = (
    "Agarwal et al. 2024, On-policy distillation of language models: learning from self-generated mistakes "
    "(2306.13649); K. Lu and Thinking Machines Lab 2025, On-policy distillation"
)
QUESTION = "Should a small model learn from a teacher's judgement, from its samples, or from rewards?"
PREDICTION = (
    "at equal sampled tokens on-policy distillation ends above GRPO in pass@1 and not below it in pass@64, "
    "and it forgets less of another task than SFT on the teacher's samples does"
)
STATISTIC = (
    "reverse less grpo, paired by seed, 95% interval: pass@1, above 0 and on average at least 0.03; pass@64, "
    "above -0.02; and accuracy on the other task, reverse less sft, above 0. Void if the teacher's pass@1 is "
    "not 0.05 above the mean of grpo"
)
DIFFERS = (
    "a student of two layers of width 96, one teacher of three layers of width 128 for all seeds; answers of "
    "five characters; distillation and SFT have one update for 512 samples at one learning rate, GRPO four, "
    "by its own defaults; GKD mixes teacher's and student's samples and starts from a student after SFT on "
    "the teacher's samples"
)
CHANGES = []
SEEDS = 5

MODELS = ("base", "grpo", "reverse", "sft", "tenth", "teacher")
KS = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = 32  # a step, with GROUP samples each
GROUP = 16


def points(smoke):
    return [{"model": model} for model in (MODELS[1:4] if smoke else MODELS)]


# ------------------------------------------------------------------------------------------------------------
# models


def demonstrations(n, seed, right):
    """n of countdown, or of these the right ones, and half as many of the other task."""
    task = tasks.get("countdown")
    rows = task.demonstrations(n, seed)
    if right:
        rows = [row for row in rows if task.reward(row["prompt"], row["response"])]
    return common.data_file(rows + draw("r", "train", n // 2, random.Random(seed)))


def student(seed, smoke):
    n = 200 if smoke else 24_000
    settings = dict(task="countdown", tokenizer="chars", eval_every=0, seed=seed)
    settings["steps"] = 5 if smoke else 560
    return common.trained(train_sft, data=demonstrations(n, seed, False), **settings) + "/model"


def teacher(smoke):
    """One for all seeds: SFT on right demonstrations, then GRPO."""
    n = 200 if smoke else 48_000
    settings = dict(task="countdown", tokenizer="chars", eval_every=0, seed=100, n_layer=3, d_model=128)
    settings["steps"] = 5 if smoke else 800
    taught = common.trained(train_sft, data=demonstrations(n, 100, True), **settings) + "/model"
    settings = dict(task="countdown", init=taught, ref="none", eval_prompts=0, seed=100)
    settings["steps"] = 2 if smoke else 60
    return common.trained(train_grpo, **settings) + "/model"


def teacher_samples(seed, steps, smoke):
    """As many samples as the other students draw for themselves, as demonstrations."""
    model, tok = hub.load(teacher(smoke))
    rows = tasks.get("countdown").prompts("train", steps * PROMPTS, seed)
    prompts = [row["prompt"] for row in rows]
    _, texts = generate.respond(model, tok, prompts, GROUP, 6, seed=seed, batch=2048)
    prompts = [prompt for prompt in prompts for _ in range(GROUP)]
    pairs = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts)]
    return common.data_file(pairs)


def student_after(name, seed, smoke):
    """The student of a seed after one of the ways to learn countdown → its run's folder."""
    steps = 2 if smoke else 10 if name == "tenth" else 100
    settings = dict(task="countdown", init=student(seed, smoke), steps=steps, seed=seed)
    if name == "sft":
        data = teacher_samples(seed, steps, smoke)
        settings |= dict(batch_size=PROMPTS * GROUP, lr=5e-4, weight_decay=0.0, eval_every=0)
        return common.trained(train_sft, data=data, **settings)
    settings |= dict(prompts_per_step=PROMPTS, group_size=GROUP, eval_prompts=0)
    if name == "grpo":
        return common.trained(train_grpo, ref="none", **settings)
    return common.trained(train_distill, teacher=teacher(smoke), lr=5e-4, **settings)


# ------------------------------------------------------------------------------------------------------------
# measuring


def measure(folder, seed, n):
    """→ pass@k on n held-out prompts of countdown, a row for each k, with accuracy on the other task."""
    model, tok = hub.load(folder)
    task = tasks.get("countdown")
    rows = task.prompts("test", n, seed)
    prompts = [row["prompt"] for row in rows]
    _, texts = generate.respond(model, tok, prompts, 64, 6, seed=seed, batch=2048)
    right = []
    for i, prompt in enumerate(prompts):
        right.append(sum(task.reward(prompt, text) for text in texts[64 * i : 64 * i + 64]))
    rows = draw("r", "test", n, random.Random(seed))
    _, texts = generate.respond(model, tok, [row["prompt"] for row in rows], 1, 7, seed=seed)
    other = statistics.mean(text == row["response"] for text, row in zip(texts, rows))
    return [{"k": k, "pass": statistics.mean(pass_at_k(64, int(c), k) for c in right), "other": other}
            for k in KS]  # fmt: skip


def run(point, seed, smoke):
    name = point["model"]
    tokens = 0
    if name == "teacher":
        folder = teacher(smoke)
    elif name == "base":
        folder = student(seed, smoke)
    else:
        after = student_after(name, seed, smoke)
        folder = after + "/model"
        tokens = PROMPTS * GROUP * sum(common.logged(after, "len")[0])
    return [row | {"tokens": tokens} for row in measure(folder, seed, 16 if smoke else 256)]


# ------------------------------------------------------------------------------------------------------------
# statistics


def effects(rows):
    def less(one, other, column, k):
        pair = [common.by_seed(rows, column, model=model, k=k) for model in (one, other)]
        return [x - y for x, y in zip(*pair)]

    gain = less("reverse", "grpo", "pass", 1)
    if statistics.mean(gain) < 0.03:  # the threshold asks for this as well as for the interval
        gain = [x - 0.03 for x in gain]
    return {
        "pass@1, reverse less GRPO": gain,
        "pass@64, reverse less GRPO": [x + 0.02 for x in less("reverse", "grpo", "pass", 64)],
        "other task, reverse less SFT": less("reverse", "sft", "other", 1),
    }


def verdict(rows):
    found = {label: common.mean_ci(values) for label, values in effects(rows).items()}
    seen = all(mean - half > 0 for mean, half in found.values())
    one, many, other = found.values()
    numbers = {"pass@1 gain": one[0], "pass@1 gain ±": one[1], "pass@64 gain": many[0] - 0.02}
    numbers |= {"pass@64 gain ±": many[1], "other gain": other[0], "other gain ±": other[1]}
    measured = [model for model in MODELS if common.select(rows, model=model)]
    for model in measured:
        numbers[f"pass@1 {model}"] = statistics.mean(common.by_seed(rows, "pass", model=model, k=1))
        numbers[f"pass@64 {model}"] = statistics.mean(common.by_seed(rows, "pass", model=model, k=64))
        numbers[f"other {model}"] = statistics.mean(common.by_seed(rows, "other", model=model, k=1))
    sentence = (
        f"reverse less GRPO: pass@1 {common.pm(*one)}, pass@64 {common.pm(many[0] - 0.02, many[1])}; "
        f"accuracy on the other task, reverse less SFT: {common.pm(*other)}; pass@1, pass@64, other task: "
    )
    columns = ("pass@1", "pass@64", "other")
    sentence += "; ".join(
        f"{model} " + ", ".join(f"{numbers[f'{column} {model}']:.2f}" for column in columns)
        for model in measured
    )
    if numbers.get("pass@1 teacher", 1) < numbers["pass@1 grpo"] + 0.05:
        sentence += "; void: the teacher is not 0.05 above GRPO"
    return seen, sentence, numbers


def figure(rows, path):
    fig, axs = common.axes(2, width=4.4, height=3.6)
    styles = {"base": "k--", "teacher": "k:"}
    for model in MODELS:
        runs = common.select(rows, model=model)
        if runs:
            common.line(axs[0], runs, "k", "pass", model, styles.get(model, "o-"))
            ends = common.select(runs, k=1)
            colour = axs[0].containers[-1][0].get_color()
            axs[1].plot([r["pass"] for r in ends], [r["other"] for r in ends], "o", ms=4, color=colour)
    axs[0].set(xscale="log", xticks=KS, xticklabels=KS, xlabel="k", ylabel="countdown: pass@k, held out")
    axs[0].minorticks_off()
    axs[0].legend(fontsize=8)
    axs[1].set(xlabel="countdown: pass@1", ylabel="other task: accuracy")
    common.save(fig, path)
