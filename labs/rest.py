"""ReST: sample, keep what the reward model likes, imitate it; and again.

Grow: samples of the policy, scored once. Improve: supervised learning on the samples and demonstrations above
a threshold, which rises from one Improve to the next. The reward model filters, gold judges. Beside it, with
as many updates: more imitation of the demonstrations (BC), and one high threshold from the start (RAFT); and
with as many samples PPO on the same reward model.
"""

import math

import torch

import train_ppo
import train_rm
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.data import pad
from nanorlhf.errors import derive_seed
from nanorlhf.rewards import score_responses

PAPER = "Gulcehre, Le Paine, Srinivasan and others 2023, Reinforced self-training (ReST) (2308.08998)"
QUESTION = "Does filtered imitation of one's own samples, with rising thresholds, climb like online RL?"
PREDICTION = (
    "Each Grow with its Improve steps raises the reward: IWSLT 70.9 (BC), 77.8 (one Grow), 83.1 (two); at "
    "equal samples online PPO stays behind (71.6), held by reward hacking."
)
STATISTIC = (
    "Gold after the last Improve, paired by seed, t interval over three seeds: first Grow − BC with as many "
    "updates; second Grow − first. Seen if both exceed zero. ReST − PPO, and ReST − one high threshold, are "
    "reported beside it."
)
DIFFERS = (
    "Thresholds are quantiles of each Grow's scores; the policy has 0.24 million parameters, reviews are 27 "
    "tokens long; PPO is online with a KL penalty; gold is a hidden scorer, where the paper has the reward "
    "model itself and human raters."
)
CHANGES = []
SEEDS = 3

QUANTILES = (0.5, 0.75, 0.9)  # thresholds of the Improve steps
GROW, SAMPLES = 800, 4  # prompts, samples for each
STEPS, LRS = 60, (1e-3, 7e-4, 5e-4)  # of an Improve: the learning rate falls from one to the next
LABELS = {"bc": "BC, as many updates", "raft": "one threshold, 0.9", "rest": "ReST, rising thresholds",
          "ppo": "PPO, as many samples"}


def points(smoke):
    return [{"method": method} for method in (("bc", "rest", "ppo") if smoke else LABELS)]


@torch.no_grad()
def grow(policy, rm, seed, n):
    """Samples of a policy folder on training prompts → rows {"prompt", "response", "score"} that ended."""
    (model, tok), task = hub.load(policy), tasks.get("reviews")
    rows = [r for r in task.prompts("train", n, seed) for _ in range(SAMPLES)]
    prompts = [r["prompt"] for r in rows[::SAMPLES]]
    rolls, texts = generate.respond(model, tok, prompts, SAMPLES, task.max_new_tokens, seed=seed)
    score = torch.cat([score_responses(roll, rm, None) for roll in rolls]).tolist()
    ended = torch.cat([roll.finished for roll in rolls]).tolist()
    found = [r | {"response": t, "score": s} for r, t, s in zip(rows, texts, score)]
    return [r for r, end in zip(found, ended) if end]


@torch.no_grad()
def demonstrations(sft, rm, seed, n):
    """The task's own, scored as samples are."""
    tok, rows = hub.load(sft)[1], tasks.get("reviews").demonstrations(n, seed)
    ids = [tok.encode(r["prompt"]) + tok.encode(r["response"]) + [tok.eos_id] for r in rows]
    tokens, lengths = pad(ids, tok.pad_id)
    return [r | {"score": s} for r, s in zip(rows, rm.rewards(tokens, lengths).tolist())]


def improve(policy, rows, lr, seed, steps):
    """Imitate the rows, starting from a policy folder → the new one."""
    data = common.data_file([{k: r[k] for k in ("prompt", "response")} for r in rows])
    how = dict(steps=steps, lr=lr, eval_every=0, seed=seed)
    return common.trained(train_sft, data=data, init=policy, **how) + "/model"


def run(point, seed, smoke):
    method, n, steps = point["method"], *((16, 2) if smoke else (GROW, STEPS))
    small = [dict(demos=300, steps=6), dict(pairs=60, steps=4)] if smoke else [{}, {}]
    sft = common.trained(train_sft, seed=seed, **small[0]) + "/model"
    rm = common.trained(train_rm, seed=seed, init=sft, **small[1]) + "/model"
    out, judge, prompts = [], hub.load(rm)[0], 16 if smoke else 512

    def note(policy, grows, improves):
        found = common.judge(policy, sft, seed, rm, prompts)
        out.append({"grow": grows, "improve": improves} | found)

    note(sft, 0, 0)
    if method == "ppo":
        samples = 2 * n * SAMPLES
        small = dict(steps=2, prompts_per_step=16) if smoke else dict(steps=round(samples / 96))
        how = small | dict(eval_prompts=1, sample_every=10**6)
        note(common.trained(train_ppo, init=sft, rm=rm, seed=seed, **how) + "/model", 2, len(QUANTILES))
        return out
    base, policy = demonstrations(sft, judge, seed, 2 * n), sft
    for grows in (1, 2):
        grown = base if method == "bc" else grow(policy, judge, derive_seed(seed, "grow", grows), n)
        rows, scores = base + grown, torch.tensor([r["score"] for r in grown])
        for improves, (quantile, lr) in enumerate(zip(QUANTILES, LRS), start=1):
            least = scores.quantile(QUANTILES[-1] if method == "raft" else quantile).item()
            kept = rows if method == "bc" else [r for r in rows if r["score"] >= least]
            policy = improve(policy, kept, lr, seed, steps)
            if method == "rest" or improves == len(QUANTILES):
                note(policy, grows, improves)
    return out


def effects(rows):
    def end(method, grow):
        return common.by_seed(rows, "gold", method=method, grow=grow, improve=len(QUANTILES))

    first = end("rest", 1)
    return {
        "gold, first Grow less BC": common.less(first, end("bc", 1)),
        "gold, second Grow less first": common.less(end("rest", 2), first),
    }


def verdict(rows):
    def end(method, grow, column="gold"):
        found = common.by_seed(rows, column, method=method, grow=grow, improve=float(len(QUANTILES)))
        return found or [math.nan]  # not in a smoke run

    found = {
        "first_grow": common.paired(end("rest", 1.0), end("bc", 1.0)),
        "second_grow": common.paired(end("rest", 2.0), end("rest", 1.0)),
        "rest_minus_ppo": common.paired(end("rest", 2.0), end("ppo", 2.0)),
        "rest_minus_raft": common.paired(end("rest", 2.0), end("raft", 2.0)),
        "proxy_rest_minus_ppo": common.paired(end("rest", 2.0, "proxy"), end("ppo", 2.0, "proxy")),
    }
    said = {name: common.pm(*x) for name, x in found.items()}
    start = common.mean_ci(common.by_seed(rows, "gold", method="rest", grow=0.0))[0]
    return common.seen(effects(rows)), (
        f"Gold {start:.2f} at the start; the first Grow ends {said['first_grow']} above BC with as many "
        f"updates, the second {said['second_grow']} above the first. ReST − PPO at equal samples: gold "
        f"{said['rest_minus_ppo']}, reward model {said['proxy_rest_minus_ppo']}. Rising thresholds − one "
        f"high threshold: {said['rest_minus_raft']}."
    ), {name + end: x for name, both in found.items() for end, x in zip(("", "_half"), both)}


def figure(rows, path):
    fig, (a, b) = common.axes(2)
    last = len(QUANTILES)
    for method, label in LABELS.items():
        mine = [r | {"at": (r["grow"] - 1) * last + r["improve"] if r["grow"] else 0}
                for r in common.select(rows, method=method)]
        for ax, column in ((a, "gold"), (b, "proxy")):
            common.line(ax, mine, "at", column, label, "o--" if method == "ppo" else "o-")
    ticks = ["SFT", *(f"G{g}\nI{i}" for g in (1, 2) for i in range(1, last + 1))]
    for ax, title in ((a, "gold, held out"), (b, "reward model's score")):
        ax.set(xticks=range(len(ticks)), xticklabels=ticks, title=title, xlabel="Grow and Improve")
    a.legend(fontsize=8)
    common.save(fig, path)
