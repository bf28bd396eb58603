"""GRPO on rewards that know nothing: who gains from them, and whether the clip is why."""

import random
import re
import statistics

import train_grpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Shao et al., 2025, Spurious rewards: rethinking training signals in RLVR (2506.10947)"
QUESTION = "Can a reward that is independent of the answer raise accuracy, and through what?"
PREDICTION = (
    "format-only, random and wrong-label rewards raise the accuracy of the family whose favourite habit "
    "is right (thinks) and not of the one whose favourite is wrong (guesses); without the clip a coin gains "
    "nothing"
)
STATISTIC = (
    "accuracy on 512 held-out prompts after GRPO less before it, 5 seeds, 95% interval; seen if at the "
    "small learning rate a coin's gain in the thinking family is above 0, and above the one without clip"
)
DIFFERS = (
    "both families are one model of chain (53k parameters) whose habit was set by 150 more steps of SFT: it "
    "thinks in 80% of its samples, or in 20%; eight updates a rollout; the clip's range is such that it "
    "holds 0.2% to 1.3% of the tokens at either learning rate"
)
CHANGES = [
    "clip less no clip at the large learning rate, and the accuracy of samples that think, were added to the "
    "verdict; what counts as seen was not touched",
]
SEEDS = 5

FAMILIES = {"thinks": 0.8, "guesses": 0.2}  # share of demonstrations that think
OFF = 1e6  # a clip that never acts
RUNS = (  # reward, learning rate, clip
    ("true", 3e-4, 0.2), ("format", 3e-4, 0.2), ("wrong", 3e-4, 0.2),
    ("coin", 3e-4, 0.03), ("coin", 3e-4, OFF), ("coin", 5e-5, 0.005), ("coin", 5e-5, OFF),
)


def points(smoke):
    every = [{"family": f, "reward": r, "lr": lr, "clip": c} for f in FAMILIES for r, lr, c in RUNS]
    return [every[5], every[6]] if smoke else every


# ---- the rewards, as files of the user's own are: --reward labs/spurious_rewards.py:coin

coins = {}


def true(prompt, response, row):
    return tasks.get("chain").reward(prompt, response)


def format(prompt, response, row):
    return float(re.fullmatch(r"(<[0-9]*>)?\|[0-9]", response) is not None)


def wrong(prompt, response, row):
    return format(prompt, response, row) * (response[-1:] == str((int(row["answer"]) + 5) % 10))


def coin(prompt, response, row):
    """Heads or tails, whatever was answered; the stream of coins differs from seed to seed."""
    return float(coins.setdefault("rng", random.Random(prompt)).random() < 0.5)


# ---- runs


def demonstrations(n, seed, share):
    """Rows of chain, of which this share thinks."""
    rng, rows = random.Random(f"spurious {seed}"), []
    for row in tasks.get("chain").prompts("train", n, seed):
        digits = list(map(int, row["prompt"][:-1]))
        thought = "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))
        thought = f"<{thought}>" if rng.random() < share else ""
        rows.append({"prompt": row["prompt"], "response": f"{thought}|{row['answer']}"})
    return rows


def base(seed, share, smoke, **size):
    """A model that can think, then taught how often to."""
    n, small = (500, dict(steps=5)) if smoke else (40_000, {})
    what = dict(task="chain", seed=seed, eval_every=0, tokenizer="chars")
    data = common.data_file(demonstrations(n, seed, 0.5))
    skill = common.trained(train_sft, **what, data=data, **small, **size)
    habit = dict(steps=5 if smoke else 150, lr=1e-3, init=f"{skill}/model")
    data = common.data_file(demonstrations(n // 4, seed + 1000, share))
    return common.trained(train_sft, **what, data=data, **habit) + "/model"


def measure(folder, seed, n):
    """Figures of samples to held-out prompts at temperature 1 → {"accuracy", "thinks", "skill", "length"}.

    skill: accuracy of those that think; length: tokens, EOS included.
    """
    model, tok = hub.load(folder)
    task = tasks.get("chain")
    rows = task.prompts("test", n, derive_seed(seed, "spurious"))
    prompts = [row["prompt"] for row in rows]
    rolls, texts = generate.respond(model, tok, prompts, 1, 11, seed=derive_seed(seed, "samples"))
    right, thinks = list(map(task.reward, prompts, texts, rows)), list(map(task.thinks, texts))
    skill = sum(r for r, t in zip(right, thinks) if t) / max(sum(thinks), 1)
    length = statistics.mean(n for roll in rolls for n in roll.response_len.tolist())
    shares = {"accuracy": statistics.mean(right), "thinks": statistics.mean(thinks)}
    return shares | {"skill": skill, "length": length}


def run(point, seed, smoke):
    folder = base(seed, FAMILIES[point["family"]], smoke)
    data = common.data_file(tasks.get("chain").prompts("train", 3000, seed))
    clip = dict(clip_low=point["clip"], clip_high=point["clip"])
    after = common.trained(
        train_grpo, task="chain", init=folder, seed=seed, data=data, eval_prompts=0, ref="none",
        reward=[f"{__file__}:{point['reward']}"], reward_timeout=0, steps=2 if smoke else 50,
        minibatches=8, lr=point["lr"], **clip,
    )
    out, n = {}, 64 if smoke else 512
    for when, model in (("before", folder), ("after", f"{after}/model")):
        out |= {f"{name}_{when}": x for name, x in measure(model, seed, n).items()}
    out["gain"] = out["accuracy_after"] - out["accuracy_before"]
    return [out | {"clipped": statistics.mean(common.logged(after, "clip")[0])}]


def label(reward, lr, clip):
    return reward + f", lr {lr:g}" * (reward == "coin") + ", no clip" * (clip == OFF)


def verdict(rows):
    def of(family, what, column="gain"):
        return common.by_seed(rows, column, **dict(zip(("reward", "lr", "clip"), what)), family=family)

    numbers, said = {}, []
    for f, what in ((f, what) for f in FAMILIES for what in RUNS if of(f, what)):
        name, (mean, half) = f"{f}, {label(*what)}", common.mean_ci(of(f, what))
        numbers |= {f"gain {name}": mean, f"gain {name} ±": half}
        numbers |= {f"{x} {name}": statistics.mean(of(f, what, f"{x}_after")) for x in ("thinks", "skill")}
        numbers[f"clipped {name}"] = statistics.mean(of(f, what, "clipped"))
        said.append(f"{name} {common.pm(mean, half)}")
    if not of("thinks", RUNS[-1]):
        return False, "no coin without clip", {}
    clip = {lr: [of("thinks", what) for what in RUNS[i : i + 2]] for lr, i in (("3e-4", 3), ("5e-5", 5))}
    clip = {lr: common.paired(*found) for lr, found in clip.items() if all(found)}
    gained, mechanism = common.mean_ci(of("thinks", RUNS[-2])), clip["5e-5"]
    numbers |= {f"clip less no clip, lr {lr}": x[0] for lr, x in clip.items()}
    numbers |= {f"clip less no clip, lr {lr} ±": x[1] for lr, x in clip.items()}
    sentence = "a coin with the clip less one without it, thinking family: "
    sentence += ", ".join(f"{common.pm(*x)} at lr {lr}" for lr, x in clip.items()) + "; gains: "
    return gained[0] > gained[1] and mechanism[0] > mechanism[1], sentence + "; ".join(said), numbers


def figure(rows, path):
    fig, axs = common.axes(2, width=4.6, height=3.6)
    for ax, f in zip(axs, FAMILIES):
        for i, what in enumerate(RUNS):
            mine = common.select(rows, family=f, **dict(zip(("reward", "lr", "clip"), what)))
            for j, (part, name) in enumerate((("accuracy", "accuracy"), ("thinks", "share that thinks"))):
                ends = [common.mean_ci(common.by_seed(mine, f"{part}_{w}")) for w in ("before", "after")]
                (before, _), (after, half) = ends
                y, colour = i + 0.25 * j, f"C{j}"
                ax.plot([before, after], [y, y], color=colour, lw=1)
                ax.plot(before, y, "|", color=colour)
                ax.errorbar(after, y, xerr=half, fmt="o", ms=4, color=colour, label=name * (i == 0))
        names = [label(*what) for what in RUNS]
        ax.set(yticks=range(len(RUNS)), yticklabels=names, xlim=(-0.02, 1.02), title=f"the base model {f}")
        ax.set_xlabel("before (bar), after GRPO (point)")
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=8)
    axs[1].legend(fontsize=8)
    common.save(fig, path)
