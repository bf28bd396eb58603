"""The N+ implementation details of RLHF with PPO, taken away one at a time.

Every run is PPO on reviews with a limit of 24 tokens, where most responses of the SFT model are cut: only
then can it matter what a response without EOS scores. The control has every detail in place.
"""

import contextlib
import math
import re
from types import SimpleNamespace
from unittest import mock

import torch

import train_ppo
import train_rm
import train_sft
from labs import common
from nanorlhf import hub
from nanorlhf.model import Block

PAPER = (
    "Huang et al. 2024, The N+ implementation details of RLHF with PPO: a case study on TL;DR summarization "
    "(arXiv 2403.17031)"
)
QUESTION = "Which of the details matter, and how much?"
PREDICTION = (
    "With dropout the first importance ratio is not 1; without the penalty for a missing EOS fewer responses "
    "end; larger models (policy and reward model) reach a higher gold. Of the others no sign is predicted."
)
STATISTIC = (
    "Largest ratio of the first minibatch minus 1, share of held-out samples that end, and their gold, each "
    "minus that of the control, paired by seed, Student's t 95%; seen if all three have the sign predicted."
)
DIFFERS = (
    "0.03M and 0.3M parameters instead of 1B to 6.9B, a scripted judge instead of GPT, 30 rollouts of 96, "
    "one epoch of two minibatches. Dropout 0.1 acts on each block's residual update where gradients are on."
)
CHANGES = [
    "five seeds in place of three: with three the share that ends fell in each seed, by -0.13 ± 0.27",
]
SEEDS = 5

LIMIT, SMALL = 24, dict(n_layer=1, d_model=32, n_head=2)
ABLATIONS = {  # name → flags that take a detail away
    "control": {},
    "no EOS penalty": {},
    "no reward normalisation": {},
    "no advantage whitening": dict(whiten_advantages=False),
    "dropout 0.1": {},
    "critic from SFT": {},
    "lr / 5": dict(lr=1e-4, critic_lr=2e-4),
    "lr × 4": dict(lr=2e-3, critic_lr=4e-3),
    "small models": {},
}


def points(smoke):
    names = ["control", "dropout 0.1"] if smoke else list(ABLATIONS)
    return [{"what": name} for name in names] + ([] if smoke else [{"what": "RM, 500 pairs"}])


def dropped(plain, p=0.1):
    """Block.forward with dropout on what the block adds; not where gradients are off: sampling, scoring."""

    def forward(self, x, *args):
        y = plain(self, x, *args)
        return x + torch.nn.functional.dropout(y - x, p) if torch.is_grad_enabled() else y

    return forward


def without(what):
    """train_ppo, or a trainer around it that takes away a detail which no flag does."""
    if what not in ("no EOS penalty", "dropout 0.1"):
        return train_ppo

    def train(cfg):
        patch = contextlib.nullcontext()
        if what == "no EOS penalty":
            cfg.no_eos_score = None  # such a response keeps the reward model's own score
        else:
            patch = mock.patch.object(Block, "forward", dropped(Block.forward))
        with patch:
            return train_ppo.train(cfg)

    name = "train_ppo-" + re.sub(r"\W+", "_", what)
    return SimpleNamespace(__name__=name, __file__=__file__, Config=train_ppo.Config, train=train)


def not_normalised(rm):
    """A copy of the reward model with the bias that training left it: 0."""
    model, tok = hub.load(f"{rm}/model")
    model.reward_bias.zero_()
    hub.save(model, tok, f"{rm}/raw")
    return f"{rm}/raw"


def run(point, seed, smoke):
    what = point["what"]
    size = SMALL if what == "small models" else {}
    sft = common.trained(train_sft, seed=seed, **size, **(dict(demos=200, steps=4) if smoke else {}))
    short = dict(data=common.smoke_pairs(), steps=2) if smoke else {}
    rm = common.trained(train_rm, seed=seed, init=f"{sft}/model", **short)
    if what.startswith("RM"):
        data, few = common.pairs_file(rm, 500), dict(batch_size=12, steps=130)  # three epochs, as with 4,000
        few = common.trained(train_rm, seed=seed, init=f"{sft}/model", data=data, **few)
        return [{"rm_acc": common.final(few)["eval/acc"]}]
    flags = dict(init=f"{sft}/model", rm=f"{rm}/model", max_new_tokens=LIMIT, eval_prompts=8)
    flags |= dict(steps=2, prompts_per_step=8) if smoke else dict(steps=30)
    if what == "no reward normalisation":
        flags["rm"] = not_normalised(rm)
    if what == "critic from SFT":
        flags["critic_init"] = f"{sft}/model"
    ppo = common.trained(without(what), seed=seed, **flags | ABLATIONS[what])
    (gaps,) = common.logged(ppo, "gap")
    ratio = math.exp(gaps[0])  # of the first minibatch: the ratio farthest from 1, or its inverse
    n = 32 if smoke else 512
    row = common.judge(f"{ppo}/model", f"{sft}/model", seed, f"{rm}/model", n, LIMIT)
    (variance,) = common.logged(ppo, "explained_var")
    start = common.judge(f"{sft}/model", f"{sft}/model", seed, n=n, max_new_tokens=LIMIT)
    row |= {"first_ratio": ratio, "rm_acc": common.final(rm)["eval/acc"], "explained_var": variance[-1]}
    return [row | {"gold_sft": start["gold"], "stop_sft": start["stop"]}]


def effects(rows):
    def per_seed(column, what):
        return common.by_seed(rows, column, what=what)

    ratio = common.less(per_seed("first_ratio", "dropout 0.1"), per_seed("first_ratio", "control"))
    ended = common.less(per_seed("stop", "control"), per_seed("stop", "no EOS penalty"))
    gold = common.less(per_seed("gold", "control"), per_seed("gold", "small models"))
    return {
        "first ratio, dropout less control": ratio,
        "share that ends, control less no EOS penalty": ended,
        "gold, control less small models": gold,
    }


def verdict(rows):
    def against_control(column, what):
        a, b = (common.by_seed(rows, column, what=name) for name in (what, "control"))
        return common.paired(a, b) if a else (float("nan"), float("nan"))

    dropout = against_control("first_ratio", "dropout 0.1")
    stop = against_control("stop", "no EOS penalty")
    small = against_control("gold", "small models")
    seen = common.seen(effects(rows))
    text = f"dropout moves the first ratio by {common.pm(*dropout)}; without the EOS penalty the share that "
    text += f"ends changes by {common.pm(*stop)}; small models change gold by {common.pm(*small)}"
    numbers = {"dropout_ratio": dropout[0], "eos_stop": stop[0], "small_gold": small[0]}
    others, judged = [], [r for r in rows if r["gold"] is not None and r["what"] != "control"]
    for name in dict.fromkeys(r["what"] for r in judged):
        mean, half = against_control("gold", name)
        numbers |= {f"gold: {name}": mean, f"gold: {name}, half": half}
        if name != "small models":
            others.append(f"{name} {common.pm(mean, half)}")
    acc = [common.by_seed(rows, "rm_acc", what=x) for x in ("control", "small models", "RM, 500 pairs")]
    text += f". Gold against the control's: {', '.join(others)}. RM accuracy: " + ", ".join(
        f"{common.mean_ci(x)[0]:.2f} ({name})" for x, name in zip(acc, ("control", "small", "500 pairs")) if x
    )
    return seen, text, numbers


def figure(rows, path):
    fig, (left, right) = common.axes(2, width=4.8, height=3.6)
    names = list(dict.fromkeys(r["what"] for r in rows if r.get("gold") is not None))
    for ax, column, title in ((left, "gold", "gold on held-out prompts"), (right, "stop", "share that ends")):
        for y, name in enumerate(names):
            values = common.by_seed(rows, column, what=name)
            ax.plot(values, [y] * len(values), "o", color="tab:blue", ms=4, alpha=0.7)
        control = common.mean_ci(common.by_seed(rows, column, what="control"))[0]
        sft = common.mean_ci([r[f"{column}_sft"] for r in common.select(rows, what="control")])[0]
        ax.axvline(control, color="black", lw=0.8, label="control")
        ax.axvline(sft, color="tab:gray", ls=":", label="SFT")
        ax.set(title=title, yticks=range(len(names)), yticklabels=names if ax is left else [])
        ax.invert_yaxis()
    right.legend(fontsize=8)
    common.save(fig, path)
