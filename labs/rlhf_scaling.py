"""Does RLHF scale? More responses per prompt, larger reward models, larger policies, more diverse prompts.

    prompts    more responses per prompt, the prompts of a step fixed: the samples grow with them
    samples    more responses per prompt, the samples of a step fixed: the prompts shrink
    sizes      reward models and policies of two sizes
    diversity  reward models on equally many pairs from many prompts, or from few with many responses each

The updates are as many in all of them. GRPO with the KL in the reward, as PPO has it.
"""

import random

import torch

import train_grpo
import train_rm
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Hou et al. 2024, Does RLHF scale? Exploring impacts from data, model, and method (arXiv 2412.06000)"
QUESTION = "What does more of everything buy in RLHF: responses, reward model, policy, prompts?"
PREDICTION = (
    "Gold rises with the responses per prompt and soon stops: the last doubling (8 to 16) buys less than "
    "the first (2 to 4). A larger reward model helps a little; the larger policy gains less. For the reward "
    "model many prompts are worth more than many responses to few."
)
STATISTIC = (
    "Gold on 512 held-out prompts, prompts of a step fixed: G = 4 minus G = 2, less G = 16 minus G = 8, "
    "paired by seed, Student's t 95%; seen if above 0. The other three claims have intervals of their own."
)
DIFFERS = (
    "GRPO instead of PPO, 0.03M and 0.3M parameters instead of 9B to 200B, one task, 30 steps; reward models "
    "see samples of the SFT model, not of many models."
)
CHANGES = [
    "five seeds in place of three: with three the difference was +0.36 ± 0.38",
]
SEEDS = 5

SMALL = dict(n_layer=1, d_model=32, n_head=2)
SIZES = [(p, r) for p in ("small", "large") for r in ("small", "large")]  # policy, RM; last: G = 8
PAIRS = 1000  # of the reward models that differ in diversity


def points(smoke):
    grid = [{"study": "prompts", "prompts": 12, "G": G} for G in (2, 4, 8, 16)]
    grid += [{"study": "samples", "prompts": 96 // G, "G": G} for G in (2, 16)]
    grid += [{"study": "sizes", "prompts": 12, "G": 8, "policy": p, "rm": r} for p, r in SIZES[:3]]
    grid += [{"study": "diversity", "distinct": n} for n in (20, PAIRS)]
    return [grid[0], grid[-2]] if smoke else grid


def language_model(size, seed, smoke):
    short = dict(demos=200, steps=4) if smoke else {}
    return common.trained(train_sft, seed=seed, **(SMALL if size == "small" else {}), **short)


def reward_model(size, seed, smoke):
    """Both sizes learn from the same pairs, which the large SFT model wrote."""
    large = language_model("large", seed, smoke)
    short = dict(data=common.smoke_pairs(), steps=2) if smoke else {}
    rm = common.trained(train_rm, seed=seed, init=f"{large}/model", **short)
    if size == "small":
        init = f"{language_model('small', seed, smoke)}/model"
        rm = common.trained(train_rm, seed=seed, init=init, data=common.pairs_file(rm))
    return rm


@torch.no_grad()
def pairs_from(distinct, sft, seed, smoke):
    """PAIRS labelled pairs, equally many of each of `distinct` prompts, and pairs for testing → path."""
    policy, tok = hub.load(f"{sft}/model")
    task, rows = tasks.get("reviews"), []
    for split, prompts, each in (("train", distinct, PAIRS // distinct), ("test", 256, 1)):
        seed = derive_seed(seed, "diversity", split)
        rng = random.Random(seed)
        asked = [r["prompt"] for r in task.prompts(split, prompts, seed)][: 20 if smoke else None]
        each = 2 if smoke else each
        _, texts = generate.respond(policy, tok, asked, 2 * each, task.max_new_tokens, seed=seed)
        for i, (a, b) in enumerate(zip(texts[::2], texts[1::2])):
            prompt, tau = asked[i // each], 0.5 if split == "train" else 0.0
            if a != b:
                chosen, rejected = tasks.prefer(prompt, a, b, rng, tau)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return common.data_file(rows)


def run(point, seed, smoke):
    if point["study"] == "diversity":
        sft = language_model("large", seed, smoke)
        data = pairs_from(point["distinct"], sft, seed, smoke)
        steps = 2 if smoke else 65  # three epochs
        rm = common.trained(train_rm, seed=seed, init=f"{sft}/model", data=data, steps=steps)
        return [{"rm_acc": common.final(rm)["eval/acc"]}]
    sft = language_model(point.get("policy", "large"), seed, smoke)
    rm = reward_model(point.get("rm", "large"), seed, smoke)
    flags = dict(task="reviews", kl="k1", kl_in="reward", beta=0.3, steps=2 if smoke else 30, eval_prompts=8)
    flags |= dict(prompts_per_step=point["prompts"], group_size=point["G"])
    grpo = common.trained(train_grpo, seed=seed, init=f"{sft}/model", rm=f"{rm}/model", **flags)
    n = 32 if smoke else 512
    before, after = (common.judge(f"{x}/model", f"{sft}/model", seed, f"{rm}/model", n) for x in (sft, grpo))
    after |= {"gold_sft": before["gold"], "gain": after["gold"] - before["gold"]}
    return [after | {"rm_acc": common.final(rm)["eval/acc"]}]


def effects(rows):
    def gold(G):
        return common.by_seed(rows, "gold", study="prompts", G=G)

    first = common.less(gold(4), gold(2))
    last = common.less(gold(16), gold(8))
    return {"gold, first doubling of G less the last": common.less(first, last)}


def verdict(rows):
    def gold(column="gold", **conditions):
        return common.by_seed(rows, column, **conditions)

    fixed = {G: gold(study="prompts", G=G) for G in (2, 4, 8, 16)}
    numbers, text = {}, []

    def add(name, sentence, a, b, column=""):
        mean, half = common.paired(a, b)
        numbers[name], numbers[f"{name}, half"] = mean, half
        text.append(f"{sentence} {common.pm(mean, half)}")

    if not all(fixed.values()):  # a smoke run has one of them
        return False, "too few points for a verdict", numbers
    first, last = ([x - y for x, y in zip(fixed[a], fixed[b])] for a, b in ((4, 2), (16, 8)))
    add("first doubling", "G 2 to 4 buys", fixed[4], fixed[2])
    add("last doubling", "G 8 to 16 buys", fixed[16], fixed[8])
    add("plateau", "the difference is", first, last)
    seen = common.seen(effects(rows))
    for G in (2, 16):
        fixed[-G] = gold(study="samples", G=G)
    add("fixed samples", "96 samples a step, G = 16 against 2:", fixed[-16], fixed[-2])
    gain = {(p, r): gold("gain", policy=p, rm=r) for p, r in SIZES[:3]}
    gain[SIZES[3]] = gold("gain", study="prompts", G=8)
    for size in ("small", "large"):
        name = f"larger RM, {size} policy"
        add(name, name, gain[size, "large"], gain[size, "small"])
    add("larger policy", "larger policy's gain over the smaller's:", gain[SIZES[3]], gain["small", "large"])
    many, few = (gold("rm_acc", study="diversity", distinct=n) for n in (PAIRS, 20))
    add("diversity", f"RM accuracy, {PAIRS} prompts against 20:", many, few)
    return seen, "; ".join(text), numbers


def figure(rows, path):
    fig, (left, middle, right) = common.axes(3, width=3.6)
    common.line(left, rows, "G", "gold", "12 prompts", study="prompts")
    common.line(left, rows, "G", "gold", "96 samples", study="samples")
    left.set(title="gold", xlabel="responses per prompt G", xscale="log")
    left.set(xticks=[2, 4, 8, 16], xticklabels=[2, 4, 8, 16])
    left.minorticks_off()
    left.legend(fontsize=8)
    for x, (p, r) in enumerate(SIZES):
        found = common.select(rows, policy=p, rm=r) or common.select(rows, study="prompts", G=8)
        middle.plot([x] * len(found), [r["gain"] for r in found], "o", color="tab:blue", ms=4, alpha=0.7)
    middle.set(title="gold, gain over SFT", xticks=range(4), xticklabels=[f"{p}\n{r} RM" for p, r in SIZES])
    middle.tick_params(labelsize=8)
    for r in common.select(rows, study="diversity"):
        right.plot([r["distinct"]], [r["rm_acc"]], "o", color="tab:green", ms=4, alpha=0.7)
    right.set(title=f"RM accuracy, {PAIRS} pairs", xlabel="distinct prompts", xscale="log")
    common.save(fig, path)
