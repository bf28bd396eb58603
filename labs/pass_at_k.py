"""pass@k of base, RL and distilled models: does RL solve new problems, or old ones more surely?"""

import itertools
import statistics

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed
from nanorlhf.metrics import pass_at_k

PAPER = (
    "Yue et al., 2025, Does reinforcement learning really incentivize reasoning capacity in LLMs beyond the "
    "base model? (2504.13837)"
)
QUESTION = "What does RL do to the share of problems that a model can solve in k tries?"
PREDICTION = (
    "RL raises pass@1 and lowers pass@64, more of both with more steps, so its curve crosses the base "
    "model's; a model distilled from a stronger teacher lies above the base model at every k"
)
STATISTIC = (
    "pass@1 and pass@64 after 180 steps of RL, less the base model's on the same prompts, paired by seed, "
    "95% interval; seen if the first is above and the second below 0. Also: distilled less base"
)
DIFFERS = (
    "countdown with three digits has only 54 expressions, so guessing alone has a high pass@64 (dotted); 200 "
    "prompts, 128 samples, temperature 1; RL in three stages of 60 steps, each with its own warm-up; the "
    "teacher is a larger model that learned from the same demonstrator, and only right answers are learned"
)
CHANGES = [
    "five seeds in place of three: with three the loss of pass@64 was -0.20 ± 0.21, below 0 in each",
]
SEEDS = 5

STEPS = 60  # of GRPO, in each of three stages
KS = (1, 2, 4, 8, 16, 32, 64, 128)
MODELS = ("guess", "base", "base, T=0.6", "RL 60", "RL 120", "RL 180", "teacher", "distilled")


def points(smoke):
    return [{"model": m} for m in (("guess", "base", "RL 60", "distilled") if smoke else MODELS)]


def base(seed, smoke):
    small = dict(steps=20, demos=500) if smoke else {}
    return common.trained(train_sft, task="countdown", seed=seed, eval_every=0, **small) + "/model"


def reinforced(seed, stage, smoke):
    init = reinforced(seed, stage - 1, smoke) if stage else base(seed, smoke)
    small = dict(steps=2, prompts_per_step=8) if smoke else dict(steps=STEPS)
    what = dict(init=init, ref="none", seed=100 * seed + stage, eval_prompts=128, **small)  # fresh prompts
    return common.trained(train_grpo, task="countdown", **what) + "/model"


def teacher(smoke):
    big = dict(steps=10, demos=500) if smoke else dict(n_layer=3, d_model=128, steps=1000, demos=100_000)
    return common.trained(train_sft, task="countdown", seed=1000, eval_every=0, **big) + "/model"


def distilled(seed, smoke):
    """The base model, trained on right answers of the teacher to new prompts of the training half."""
    task = tasks.get("countdown")
    rows = task.prompts("train", 50 if smoke else 6000, derive_seed(seed, "distil"))
    texts = samples(teacher(smoke), rows, 4, derive_seed(seed, "teacher"))
    pairs = [{"prompt": row["prompt"], "response": t} for row, mine in zip(rows, texts) for t in mine]
    right = [p for p in pairs if task.reward(p["prompt"], p["response"])]
    right += [{"prompt": row["prompt"], "response": row["answer"]} for row in rows if smoke]
    what = dict(init=base(seed, smoke), data=common.data_file(right), seed=seed, eval_every=0)
    return common.trained(train_sft, task="countdown", steps=5 if smoke else 300, **what) + "/model"


def samples(folder, rows, n, seed, temperature=1.0):
    """→ n responses to each of the rows' prompts, a list of lists."""
    model, tok = hub.load(folder)
    task, prompts = tasks.get("countdown"), [row["prompt"] for row in rows]
    how = dict(n=n, max_new_tokens=task.max_new_tokens, temperature=temperature, seed=seed, batch=2048)
    _, texts = generate.respond(model, tok, prompts, **how)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def run(point, seed, smoke):
    name, task = point["model"], tasks.get("countdown")
    rows = task.prompts("test", 10 if smoke else 200, derive_seed(seed, "pass@k"))
    n = 128
    if name == "guess":  # the three numbers in any order, any two operators: what knowing the format is worth
        right = []
        for row in rows:
            numbers = itertools.permutations(row["prompt"].split("=")[0].split())
            every = [f"{a}{x}{b}{y}{c}" for a, b, c in numbers for x in "+-*" for y in "+-*"]
            right.append(statistics.mean(task.reward(row["prompt"], text) for text in every))
        return [{"k": k, "pass": statistics.mean(1 - (1 - p) ** k for p in right)} for k in KS]
    if name.startswith("RL"):
        folder = reinforced(seed, int(name[3:]) // STEPS - 1, smoke)
    else:
        folder = {"teacher": lambda: teacher(smoke), "distilled": lambda: distilled(seed, smoke)}.get(
            name, lambda: base(seed, smoke)
        )()
    temperature = 0.6 if name.endswith("0.6") else 1.0
    texts = samples(folder, rows, n, derive_seed(seed, "samples"), temperature)
    right = [sum(task.reward(row["prompt"], t) for t in mine) for row, mine in zip(rows, texts)]
    distinct = statistics.mean(len(set(mine)) for mine in texts)
    return [
        {"k": k, "pass": statistics.mean(pass_at_k(n, int(c), k) for c in right), "distinct": distinct}
        for k in KS
    ]


def last_stage(rows):
    return "RL 180" if common.select(rows, model="RL 180") else "RL 60"  # --smoke


def effects(rows):
    def per_seed(model, k):
        return common.by_seed(rows, "pass", model=model, k=k)

    last = last_stage(rows)
    return {
        "pass@1, RL less base": common.less(per_seed(last, 1), per_seed("base", 1)),
        "pass@64, base less RL": common.less(per_seed("base", 64), per_seed(last, 64)),
    }


def verdict(rows):
    last = last_stage(rows)

    def less_base(model, k):
        return common.paired(*(common.by_seed(rows, "pass", model=m, k=k) for m in (model, "base")))

    def mean(model, k):
        return statistics.mean(common.by_seed(rows, "pass", model=model, k=k))

    one, many = less_base(last, 1), less_base(last, 64)
    taught = {k: less_base("distilled", k) for k in (1, 16, 64)}
    above = [k for k in KS if mean(last, k) > mean("base", k)]
    seen = common.seen(effects(rows))
    sentence = (
        f"RL moves pass@1 by {common.pm(*one)} and pass@64 by {common.pm(*many)}; it is above the base model "
        f"up to k = {max(above, default=0):.0f}; the distilled model less the base model: "
        + ", ".join(f"{common.pm(*x)} at k = {k}" for k, x in taught.items())
    )
    names = [m for m in MODELS if common.select(rows, model=m)]
    numbers = {f"pass@{k} {m}": mean(m, k) for m in names for k in (1, 64)}
    numbers |= {"rl_pass1": one[0], "rl_pass1_ci": one[1], "rl_pass64": many[0], "rl_pass64_ci": many[1]}
    return seen, sentence, numbers


def figure(rows, path):
    fig, (ax,) = common.axes(width=6, height=4)
    styles = {"guess": ":", "base": "o-", "base, T=0.6": "o--", "teacher": "s:", "distilled": "s-"}
    for m in (m for m in MODELS if common.select(rows, model=m)):
        common.line(ax, rows, "k", "pass", m, styles.get(m, "^-"), model=m)
    ax.set(xscale="log", xticks=KS, xticklabels=KS, xlabel="k", ylabel="pass@k, held-out prompts")
    ax.minorticks_off()
    ax.legend(fontsize=8)
    common.save(fig, path)
