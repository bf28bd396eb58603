"""R1-Zero: a model that hardly ever thinks finds out that it pays, and a small one learns it from that."""

import re
import statistics

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "DeepSeek-AI, 2025, DeepSeek-R1: incentivizing reasoning capability in LLMs via RL (2501.12948)"
QUESTION = (
    "Do accuracy and length rise together under RL, and should a small model do RL or learn from a large "
    "one?"
)
PREDICTION = (
    "with accuracy and format rewards both accuracy and the length of responses rise, of themselves; a "
    "small model distilled from the result is better than the small model after RL of its own, at equal "
    "tokens"
)
STATISTIC = (
    "held-out accuracy and length of 512 samples after RL less before, and the distilled small model's "
    "accuracy less that of the small model after RL; paired by seed, 95% interval by Student's t; seen if "
    "all three are above 0"
)
DIFFERS = (
    "chain: the large model (53k parameters) thinks in a tenth of its samples and is then right, so "
    "thinking is selected, not invented; the small one has 4k parameters and can hardly think; 4 updates per "
    "rollout of 256 samples, not 16 per 8,192; tokens: "
    "those that the small model is trained on, without the large one's own RL, which the paper does not "
    "count either"
)
CHANGES = [
    "five seeds in place of three: with three, distilled less RL was +0.61 ± 0.97, above 0 in each; one "
    "small base model of three could half think, and RL did something for that one",
    "the figure shows every seed, for what they do is far from normal",
]
SEEDS = 5

SMALL = 16  # width of the small model
REWARDS = {"both": ("accuracy", "format"), "accuracy": ("accuracy",), "format": ("format",)}
POINTS = ("large, both", "large, accuracy", "large, format", "small, both", "small, distilled")


def points(smoke):
    return [{"run": name} for name in (POINTS[3:] if smoke else POINTS)]


# ---- the rewards


def accuracy(prompt, response, row):
    return tasks.get("chain").reward(prompt, response)


def format(prompt, response, row):
    """1 for thoughts in their tags and then an answer, whatever both are."""
    return float(re.fullmatch(r"<[0-9]+>\|[0-9]", response) is not None)


# ---- runs


def start(size, seed, smoke):
    return common.thinker(seed, 0.1, smoke, **({"d_model": SMALL} if size == "small" else {}))


def reinforced(size, rewards, seed, smoke):
    data = common.data_file(tasks.get("chain").prompts("train", 3000, seed))
    steps = 2 if smoke else {"large": 50, "small": 150}[size]
    what = dict(recipe="r1_zero", minibatches=4, init=start(size, seed, smoke), data=data, steps=steps)
    what["seed"] = seed
    reward = [f"{__file__}:{name}" for name in REWARDS[rewards]]
    return common.trained(
        train_grpo, task="chain", **what, reward=reward, reward_timeout=0, eval_prompts=0
    )


def tokens(folder):
    """Generated in a run of GRPO, all of which it was trained on once."""
    return 256 * sum(common.logged(folder, "len")[0])


def distilled(seed, smoke):
    """The small model, trained on right samples of the large one; as many tokens as its own RL had."""
    budget = tokens(reinforced("small", "both", seed, smoke))
    teacher = f"{reinforced('large', 'both', seed, smoke)}/model"
    rows = tasks.get("chain").prompts("train", 100 if smoke else 20_000, derive_seed(seed, "distil"))
    prompts = [row["prompt"] for row in rows]
    model, tok = hub.load(teacher)
    _, texts = generate.respond(model, tok, prompts, 1, 11, seed=derive_seed(seed, "teacher"))
    pairs = [{"prompt": p, "response": t} for p, t in zip(prompts, texts) if accuracy(p, t, None)]
    pairs += [{"prompt": row["prompt"], "response": f"|{row['answer']}"} for row in rows if smoke]
    length = statistics.mean(len(p["response"]) + 1 for p in pairs)
    steps = 2 if smoke else round(budget / (64 * length))
    what = dict(init=start("small", seed, smoke), data=common.data_file(pairs), steps=steps, eval_every=0)
    return common.trained(train_sft, task="chain", seed=seed, **what)


def run(point, seed, smoke):
    size, what = point["run"].split(", ")
    folder = distilled(seed, smoke) if what == "distilled" else reinforced(size, what, seed, smoke)
    ends, n = {"before": start(size, seed, smoke), "after": f"{folder}/model"}, 64 if smoke else 512
    out = [{"when": when} | common.measure_thinker(model, seed, n) for when, model in ends.items()]
    if what == "distilled":
        return out
    right = {"both": "reward/accuracy", "accuracy": "reward", "format": "len"}[what]
    for step, length, score in list(zip(*common.logged(folder, "step", "len", right)))[::5]:
        out.append({"when": "during", "step": step, "length": length})
        if what != "format":
            out[-1]["accuracy"] = score
    return out


def effects(rows):
    def per_seed(column, name, when="after"):
        return common.by_seed(rows, column, run=name, when=when)

    def rise(column):
        return common.less(per_seed(column, "large, both"), per_seed(column, "large, both", "before"))

    distilled = per_seed("accuracy", "small, distilled")
    return {
        "accuracy, after RL less before": rise("accuracy"),
        "length, after RL less before": rise("length"),
        "accuracy, distilled less RL": common.less(distilled, per_seed("accuracy", "small, both")),
    }


def verdict(rows):
    def change(column, name):
        return common.paired(*(common.by_seed(rows, column, run=name, when=w) for w in ("after", "before")))

    def after(name):
        return common.by_seed(rows, "accuracy", run=name, when="after")

    numbers = {}
    for name in (name for name in POINTS if after(name)):
        for column in ("accuracy", "length", "skill"):
            mean, half = change(column, name)
            numbers |= {f"{column} {name}": mean, f"{column} {name} ±": half}
    distil = common.paired(after("small, distilled"), after("small, both"))
    numbers |= {"distilled less RL": distil[0], "distilled less RL ±": distil[1]}
    if not after("large, both"):
        return False, f"distilled less RL {common.pm(*distil)}", numbers
    said = {name: f"accuracy {common.pm(*change('accuracy', name))}, length "
                  f"{common.pm(*change('length', name), 1)}" for name in POINTS}
    sentence = f"distilled less RL, small model: {common.pm(*distil)}; change by training: "
    sentence += "; ".join(f"{name}: {what}" for name, what in said.items())
    return common.seen(effects(rows)), sentence, numbers


def figure(rows, path):
    fig, axs = common.axes(3, width=3.3, height=3.2)
    seeds = sorted({r["seed"] for r in rows})
    for i, name in enumerate(POINTS[:4]):
        for seed in seeds:
            mine = common.select(rows, when="during", run=name, seed=seed)
            for ax, column in zip(axs, ("length", "accuracy")):
                found = [(r["step"], r[column]) for r in mine if r[column] is not None]
                ax.plot(*zip(*found) if found else ((), ()), f"C{i}", lw=1, label=name * (seed == seeds[0]))
    axs[0].set(xlabel="step", ylabel="length of responses, tokens")
    axs[1].set(xlabel="step", ylabel="accuracy in training", ylim=(0, 1.03))
    axs[0].legend(fontsize=7)
    for when, mark in (("before", "C7_"), ("after", "C3o")):
        for i, name in enumerate(POINTS):
            ends = common.by_seed(rows, "accuracy", run=name, when=when)
            x = [i + 0.08 * (j - len(ends) / 2) for j in range(len(ends))]
            axs[2].plot(x, ends, mark, ms=4, label=f"{when}, one mark a seed" * (i == 0))
    axs[2].set(xticks=range(len(POINTS)), ylabel="accuracy, held out", ylim=(0, 1.03))
    axs[2].set_xticklabels([name.replace(", ", "\n") for name in POINTS], fontsize=6)
    axs[2].legend(fontsize=7)
    common.save(fig, path)
