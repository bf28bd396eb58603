"""Reward model over-optimisation: the proxy climbs on while what it stands for falls (Goodhart).

One policy, three reward models: of the policy's size with many labels, with an eighth of them, and a smaller
one. Each is optimised by best-of-n and by PPO without a KL penalty; gold and proxy are followed against
d = √KL(π‖SFT). The paper's laws, linear in α and β, are fitted to gold − gold(SFT):

    best-of-n   R(d) = d (α − β d)             KL = log n − (n − 1)/n
    RL          R(d) = d (α − β log d)
"""

import json
import math
import statistics

import torch

import train_ppo
import train_rm
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed
from nanorlhf.rewards import score_responses

PAPER = "Gao, Schulman, Hilton 2022, Scaling laws for reward model overoptimization (arXiv 2210.10760)"
QUESTION = "How far can a learnt reward be optimised before the true one falls?"
PREDICTION = (
    "In PPO the proxy rises to the end while gold rises and then falls (a hump); the hump is higher for the "
    "larger reward model and for more labels; PPO spends more KL than best-of-n for the same gold."
)
STATISTIC = (
    "Large reward model, 4,000 labels: gold at its peak minus gold over the last 5 steps, and proxy over the "
    "last 5 minus proxy at gold's peak; seen if both are above 0. It is found on one half of the samples and "
    "measured on the other. Paired by seed, Student's t 95%."
)
DIFFERS = (
    "Gold is a scripted judge of an enumerated English instead of a 6B model, policies have 0.3M parameters "
    "instead of 1.2B, reward models 0.03M and 0.3M with 500 or 4,000 noisy labels, best-of-n stops at n = 64."
)
CHANGES = [
    "KL is compared at the gold of best-of-8: PPO never reached that of the best best-of-n, of 64, as planned"
]
SEEDS = 3

SIZES = {"small": dict(n_layer=1, d_model=32, n_head=2), "large": {}}  # RM, and its SFT model
N, PROMPTS = 128, 48  # samples a prompt for best-of-n, and prompts


def points(smoke):
    grid = [("large", 4000), ("large", 500), ("small", 4000)]
    return [{"rm": size, "labels": n} for size, n in grid[: 1 if smoke else 3]]


def reward_model(size, labels, seed, smoke):
    """→ folders of the SFT policy and of a reward model trained on the first `labels` of one set of pairs."""
    short = dict(demos=200, steps=4) if smoke else {}
    sft = common.trained(train_sft, seed=seed, **short)
    short = dict(data=common.smoke_pairs(), steps=2) if smoke else {}
    largest = common.trained(train_rm, seed=seed, init=f"{sft}/model", **short)
    if (size, labels) == ("large", 4000):
        return sft, largest
    start = common.trained(train_sft, seed=seed, **SIZES[size])
    few = dict(batch_size=12, steps=130) if labels == 500 else {}  # three epochs, as with 4,000
    data = common.pairs_file(largest, labels)
    return sft, common.trained(train_rm, seed=seed, init=f"{start}/model", data=data, **few)


@torch.no_grad()
def best_of_n(sft, rm, seed, smoke):
    """Gold and proxy of the best of n by proxy, n = 1 … 64, from the same N samples of each prompt."""
    (policy, tok), (model, _) = hub.load(f"{sft}/model"), hub.load(f"{rm}/model")
    task, total, count = tasks.get("reviews"), 16 if smoke else N, 4 if smoke else PROMPTS
    prompts = [r["prompt"] for r in task.prompts("test", count, derive_seed(seed, "best of n"))]
    rolls, texts = generate.respond(policy, tok, prompts, total, task.max_new_tokens, seed=seed)
    proxy = torch.cat([score_responses(roll, model, None) for roll in rolls])
    gold = torch.tensor([tasks.gold(prompts[i // total], text) for i, text in enumerate(texts)])
    proxy, order = proxy.view(-1, total).sort(1)
    gold = gold.view(-1, total).gather(1, order)
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        if n <= total:
            row = {"how": "bon", "step": n, "kl": math.log(n) - (n - 1) / n}
            rows.append(row | {"gold": common.best_of(gold, n), "proxy": common.best_of(proxy, n)})
    return rows


def ppo(sft, rm, seed, smoke):
    """PPO without a penalty: of every step's rollout the KL, the proxy, and gold of its two halves."""
    short = dict(steps=5, prompts_per_step=8, eval_prompts=8) if smoke else dict(steps=60, eval_prompts=8)
    models = dict(init=f"{sft}/model", rm=f"{rm}/model")  # the critic starts from the RM: detail 22 of N+
    run = common.trained(train_ppo, seed=seed, beta=0.0, sample_every=1, **models, **short)
    with open(f"{run}/samples.jsonl", encoding="utf-8") as f:
        samples = [json.loads(line) for line in f]
    gold = {}
    for i, s in enumerate(samples):
        gold.setdefault(s["step"], ([], []))[i % 2].append(tasks.gold(s["prompt"], s["response"]))
    rows = []
    for step, kl, proxy in zip(*common.logged(run, "step", "kl", "reward")):
        a, b = (statistics.mean(half) for half in gold[step])
        row = {"how": "ppo", "step": step, "kl": kl, "gold": (a + b) / 2, "proxy": proxy}
        rows.append(row | {"gold_a": a, "gold_b": b})
    return rows


def run(point, seed, smoke):
    sft, rm = reward_model(point["rm"], point["labels"], seed, smoke)
    acc = common.final(rm)["eval/acc"]
    rows = best_of_n(sft, rm, seed, smoke) + ppo(sft, rm, seed, smoke)
    return [r | {"rm_acc": acc} for r in rows]


def peak(rows):
    """Of one PPO run: gold at its peak, gold at the end, the proxy's rise from there to the end."""

    def around(column, i):
        return statistics.mean(r[column] for r in rows[max(0, i - 2) : i + 3])

    top = max(range(len(rows)), key=lambda i: around("gold_a", i))
    late = len(rows) - 3
    return around("gold_b", top), around("gold_b", late), around("proxy", late) - around("proxy", top)


def fit(rows, law):
    """Least squares of R/d on (1, −law(d)) → α, β. R is gold above that of the SFT model; d ≥ 0.5 only."""
    far = [(r["kl"] ** 0.5, r["gold"] - rows[0]["gold"]) for r in rows if r["kl"] > 0.25]
    if len(far) < 3:
        return math.nan, math.nan
    slope, alpha = statistics.linear_regression([law(d) for d, _ in far], [gain / d for d, gain in far])
    return alpha, -slope


def kl_for(rows, gold):
    """KL at which a PPO run first reached this gold (mean of 5 steps); that of its end if it never did."""
    for i in range(len(rows) - 4):
        if statistics.mean(r["gold"] for r in rows[i : i + 5]) >= gold:
            return rows[i + 2]["kl"]
    return rows[-1]["kl"]


def reward_models(rows):
    return list(dict.fromkeys((r["rm"], r["labels"]) for r in rows))


def effects(rows):
    main = common.select(rows, rm="large", labels=4000, how="ppo")
    falls = []
    rises = []
    for seed in sorted({r["seed"] for r in main}):
        top, end, rise = peak(common.select(main, seed=seed))
        falls.append(top - end)
        rises.append(rise)
    return {"gold's fall after its peak": falls, "proxy's rise from there": rises}


def verdict(rows):
    found = {}
    for rm, labels in reward_models(rows):
        here = common.select(rows, rm=rm, labels=labels)
        seeds = sorted({r["seed"] for r in here})
        runs = [common.select(here, seed=seed, how="ppo") for seed in seeds]
        bon = [common.select(here, seed=seed, how="bon") for seed in seeds]
        top, end, rise = zip(*map(peak, runs))
        best = [r for b in bon for r in b if r["step"] == 8]
        ratio = [max(kl_for(r, b["gold"]), 1e-3) / b["kl"] for r, b in zip(runs, best)]
        laws = [fit(r, math.log) for r in runs], [fit(b, float) for b in bon]
        found[rm, labels] = dict(top=top, end=end, rise=rise, ratio=ratio, laws=laws)
    main = found["large", 4000]
    fall, rise = common.paired(main["top"], main["end"]), common.mean_ci(main["rise"])
    numbers = {"fall": fall[0], "fall_half": fall[1], "rise": rise[0], "rise_half": rise[1]}
    seen = common.seen(effects(rows))
    text = f"past gold's peak gold falls by {common.pm(*fall)} while the proxy rises by {common.pm(*rise)}"
    for (rm, labels), other in list(found.items())[1:]:
        diff = common.paired(main["top"], other["top"])
        text += f"; its peak is {common.pm(*diff)} above that of the {rm} RM with {labels:.0f} labels"
        numbers |= {f"peak_over_{rm}_{labels:.0f}": diff[0], f"peak_over_{rm}_{labels:.0f}_half": diff[1]}
    ratio, half = common.mean_ci([math.log(x) for x in main["ratio"]])
    low, mid, high = (math.exp(ratio + x) for x in (-half, 0, half))
    text += f"; PPO spends {mid:.1f} ({low:.1f} to {high:.1f}) times the KL of best-of-8 for its gold"
    for law, pairs in zip(("rl", "bon"), main["laws"]):
        for name, values in zip(("alpha", "beta"), zip(*pairs)):
            numbers[f"{name}_{law}"] = statistics.mean(values)
    return seen, text, numbers | {"kl_ratio": mid}


def figure(rows, path):
    fig, (left, middle, right) = common.axes(3, width=3.1, height=2.7)
    for (rm, labels), colour in zip(reward_models(rows), ("tab:blue", "tab:orange", "tab:green")):
        name = f"{rm} RM, {labels:.0f} labels"
        here = common.select(rows, rm=rm, labels=labels)
        bon = common.select(here, how="bon")
        steps = sorted({r["step"] for r in bon})
        d = [common.select(bon, step=n)[0]["kl"] ** 0.5 for n in steps]
        for column, style in (("gold", "o-"), ("proxy", "--")):
            means = [statistics.mean(common.by_seed(bon, column, step=n)) for n in steps]
            left.plot(d, means, style, color=colour, ms=4, label=name if column == "gold" else None)
        for i, seed in enumerate(sorted({r["seed"] for r in here})):
            run = common.select(here, how="ppo", seed=seed)[::3]
            d = [max(r["kl"], 0) ** 0.5 for r in run]
            middle.plot(d, [r["gold"] for r in run], color=colour, alpha=0.8, label=None if i else name)
            right.plot(d, [r["proxy"] for r in run], "--", color=colour, alpha=0.8)
    left.set(title="best-of-n: gold (—), proxy (- -)", xlabel="√KL, bound for n", ylabel="reward")
    middle.set(title="PPO, β = 0: gold", xlabel="√KL(π‖SFT)")
    right.set(title="PPO, β = 0: proxy", xlabel="√KL(π‖SFT)")
    left.legend(fontsize=7)
    common.save(fig, path)
