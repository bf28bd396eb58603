"""DPO and PPO at equal KL, over the number of preference pairs and the size of the reward model.

The responses are few enough to enumerate (strings of at most four letters behind each of 13 prompts), so
that the largest reward at any KL is known exactly: the frontier of the tilts of π_ref (nanorlhf.exact). Three
learners see the same pairs: DPO, PPO on a reward model, and the exact optimum for that reward model, which a
perfect PPO would find. So what PPO lacks splits into the reward model's part and the optimiser's.
"""

import random

import numpy
import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from labs import common
from nanorlhf import exact, hub, tasks
from nanorlhf.data import pad
from nanorlhf.tokenizer import Tokenizer

PAPER = "Rafailov, Sharma, Mitchell, Ermon, Manning, Finn 2023, Direct preference optimization (2305.18290)"
QUESTION = "From the same finite pairs, is DPO or a well-optimised PPO nearer to the best reward at equal KL?"
PREDICTION = "figure 2: at every KL DPO has more reward than PPO on a reward model from the same pairs"
STATISTIC = (
    "true reward lacking to the exact frontier, mean over KL = 0.5, 1, 2 nats (interpolated in √KL) and 500, "
    "2000, 8000 pairs; PPO less DPO, paired by seed, all models of width 32; seen if the 95% interval lies "
    "above 0. Beside it each number of pairs, and reward models of other widths"
)
DIFFERS = (
    "enumeration in place of samples; PPO's β is where its reward model's optimum has the wanted KL; unended "
    "responses have −3 and are in no pair; the true reward sums over neighbouring letters, DPO's over tokens"
)
CHANGES = ["Set-up chosen on seed 9000 by true reward: 7 settings of DPO, 13 of the reward model, 3 of PPO."]
SEEDS = 5

LETTERS = "abcd"
LIMIT = 5  # tokens of a response: four letters and EOS
TOK = Tokenizer.from_chars(LETTERS)
TREE = exact.Tree(TOK.vocab_size, LIMIT, TOK.eos_id)
TEXTS = [TOK.decode(y[:-1]) if y[-1] == TOK.eos_id and TOK.pad_id not in y else None for y in TREE.responses]
ENDED = torch.tensor([text is not None for text in TEXTS])
PROMPTS = [x + y for x in LETTERS for y in LETTERS]
TRAIN = [prompt for prompt in PROMPTS if not tasks.held_out(prompt)]
UNENDED = -3.0  # reward of a response without EOS, in standard deviations
PAIRS = {500: 400, 2000: 400, 8000: 800}  # and the reward model's steps
WIDTH = 32  # of the policy
ARMS = [(pairs, WIDTH) for pairs in PAIRS] + [(2000, 4), (2000, 64)]  # pairs, width of the reward model
LEVELS = (0.5, 1.0, 2.0)  # nats
DPO_BETAS = (0.5, 0.15, 0.05)
PPO_KLS = (0.5, 2.2)  # nats, around the levels
LEARNERS = {"DPO": ("dpo", "lack"), "PPO": ("ppo", "lack"), "perfect PPO": ("ppo", "perfect_lack")}
BETAS = [10 ** (x / 20) for x in range(40, -41, -2)]  # of exact optima, whose KL rises along the list
SFT = dict(n_layer=1, max_len=2 + LIMIT, tokenizer="chars", steps=200, batch_size=64, lr=5e-3, eval_every=0)
DPO = dict(steps=200, batch_size=64, lr=3e-4, eval_every=0, eval_prompts=1, max_new_tokens=LIMIT)
RM = dict(batch_size=64, lr=5e-3, weight_decay=0.0, eval_every=0)
PPO = dict(steps=60, prompts_per_step=256, max_new_tokens=LIMIT, minibatches=1, lr=5e-3, critic_lr=1e-2,
           lam=1.0, whiten_advantages=False, no_eos_score=UNENDED, eval_prompts=0, sample_every=10**6)


def points(smoke):
    dpo = [{"method": "dpo", "pairs": n, "width": WIDTH, "beta": beta} for n in PAIRS for beta in DPO_BETAS]
    ppo = [{"method": "ppo", "pairs": n, "width": w, "kl_wanted": kl} for n, w in ARMS for kl in PPO_KLS]
    return [dpo[0], ppo[0]] if smoke else dpo + ppo


# ---- the language, its true reward and the pairs


def demonstrations(seed):
    """Strings of a random Markov chain."""
    rng, rows = random.Random(f"language {seed}"), []
    chain = {x: [2 ** rng.gauss(0, 1) for _ in LETTERS] for x in LETTERS}
    for prompt in PROMPTS * 200:
        text = prompt
        while len(text) < 2 + LIMIT - 1 and rng.random() < 0.85:
            text += rng.choices(LETTERS, chain[text[-1]])[0]
        rows.append({"prompt": prompt, "response": text[2:]})
    return rows


def true_reward(ref, seed):
    """(13, N): random worths of letters behind letters; mean 0 and deviation 1 under π_ref."""
    rng = random.Random(f"reward {seed}")
    worth, first = ({x + y: rng.gauss(0, 1) for x in LETTERS for y in LETTERS} for _ in range(2))
    rows = [[sum(worth[x + y] for x, y in zip(p[1] + text, text)) + sum(first[p[0] + y] for y in text[:1])
             for text in (t or "" for t in TEXTS)] for p in TRAIN]
    reward = torch.tensor(rows, dtype=torch.float64)
    weight = ref.exp() * ENDED / (ref.exp() * ENDED).sum()
    reward -= (weight * reward).sum()
    return torch.where(ENDED, reward / (weight * reward**2).sum().sqrt(), UNENDED)


def make_pairs(ref, reward, n, seed):
    """Preferences between two samples of π_ref, by Bradley–Terry with the true reward."""
    draw, rows = torch.Generator().manual_seed(seed), []
    for prompt, logp, r in zip(TRAIN, ref, reward):
        a, b = (logp.exp() * ENDED).multinomial(2 * (n // len(TRAIN)), True, generator=draw).view(2, -1)
        wins = torch.rand(len(a), generator=draw) < (r[a] - r[b]).sigmoid()
        for w, l in zip(torch.where(wins, a, b).tolist(), torch.where(wins, b, a).tolist()):
            rows.append({"prompt": prompt, "chosen": TEXTS[w], "rejected": TEXTS[l]})
    return rows + [{"prompt": p, "chosen": "a", "rejected": "b"} for p in PROMPTS if p not in TRAIN]  # no use


# ---- policies and rewards as tables over all responses to the training prompts, (13, N)


@torch.no_grad()
def logps(folder):
    model = hub.load(folder)[0]
    return torch.stack([TREE.logp(TREE.table(model, TOK.encode(p))) for p in TRAIN])


@torch.no_grad()
def scores(folder):
    """The reward as PPO sees it: a reward model's, and UNENDED."""
    model = hub.load(folder)[0]
    table = torch.full((len(TRAIN), len(TEXTS)), UNENDED, dtype=torch.float64)
    for row, prompt in zip(table, map(TOK.encode, TRAIN)):
        batch = pad([prompt + list(y) for y, text in zip(TREE.responses, TEXTS) if text is not None], 0)
        row[ENDED] = model.rewards(*batch).double()
    return table


def measured(logp, ref, worth):
    """A policy's KL, true reward and share of unended responses, means over the prompts."""
    found = exact.kl(logp, ref), (logp.exp() * worth).sum(1), (logp.exp() * ~ENDED).sum(1)
    return dict(zip(("kl", "reward", "unended"), (x.mean().item() for x in found)))


def optima(ref, reward, worth):
    """`measured` of the policies that are best for `reward`, one a β, by rising KL."""
    return [measured(exact.optimum(ref, reward, beta), ref, worth) for beta in BETAS]


def reward_at(kl, policies):
    """The true reward at a KL, by interpolation in √KL between policies of rising KL."""
    return numpy.interp(kl**0.5, [p["kl"] ** 0.5 for p in policies], [p["reward"] for p in policies])


def run(point, seed, smoke):
    short = dict(steps=4) if smoke else {}
    sft = dict(data=common.data_file(demonstrations(seed)), seed=seed) | SFT | short
    base = common.trained(train_sft, d_model=WIDTH, **sft) + "/model"
    ref = logps(base)
    worth = true_reward(ref, seed)
    pairs = common.data_file(make_pairs(ref, worth, point["pairs"], seed))
    shared = dict(init=base, seed=seed)
    if point["method"] == "dpo":
        folder = common.trained(train_dpo, data=pairs, beta=point["beta"], **shared, **DPO | short)
    else:
        trunk = common.trained(train_sft, d_model=point["width"], **sft) + "/model"
        length = dict(steps=PAIRS[point["pairs"]]) | short
        rm = common.trained(train_rm, data=pairs, init=trunk, seed=seed, **RM, **length) + "/model"
        perfect = optima(ref, scores(rm), worth)
        beta = float(numpy.interp(point["kl_wanted"], [p["kl"] for p in perfect], BETAS))
        shared |= dict(data=common.data_file({"prompt": p} for p in TRAIN), rm=rm, critic_init=base)
        folder = common.trained(train_ppo, beta=beta, **shared, **PPO | short)
    row = measured(logps(f"{folder}/model"), ref, worth)
    frontier = reward_at(row["kl"], optima(ref, worth, worth))
    row["lack"] = frontier - row["reward"]
    if point["method"] == "ppo":
        row["perfect_lack"] = frontier - reward_at(row["kl"], perfect)
    return [row]


# ---- the verdict


def lacking(rows, learner, pairs, width=WIDTH):
    """What a learner lacks at LEVELS, their mean → one value a seed. At KL 0 nothing is lacking."""
    method, column = LEARNERS[learner]
    chosen, values = common.select(rows, method=method, pairs=pairs, width=width), []
    for seed in sorted({r["seed"] for r in chosen}):
        curve = sorted((r["kl"] ** 0.5, r[column]) for r in common.select(chosen, seed=seed))
        roots, lacks = zip((0.0, 0.0), *curve)
        values.append(float(numpy.interp(numpy.sqrt(LEVELS), roots, lacks).mean()))
    return values


def effects(rows):
    arms = [zip(lacking(rows, "PPO", n), lacking(rows, "DPO", n)) for n in PAIRS]
    gaps = zip(*([ppo - dpo for ppo, dpo in arm] for arm in arms))
    return {"PPO lacks more than DPO": [sum(gap) / len(PAIRS) for gap in gaps]}


def verdict(rows):
    mean, half = common.mean_ci(*effects(rows).values())
    parts = [f"reward lacking at equal KL, in deviations: PPO less DPO {common.pm(mean, half)}"]
    numbers = {"PPO less DPO": mean, "PPO less DPO ±": half, "least lack": min(r["lack"] for r in rows)}
    for pairs, width in ARMS if numpy.isfinite(half) else ():  # a smoke run has one arm
        dpo = lacking(rows, "DPO", pairs)
        for learner in ("PPO", "perfect PPO"):
            gap = common.paired(lacking(rows, learner, pairs, width), dpo)
            name = f"{learner} less DPO, {pairs} pairs, width {width}"
            numbers |= {name: gap[0], f"{name} ±": gap[1], f"DPO lacks, {pairs} pairs": numpy.mean(dpo)}
            parts.append(f"{name} {common.pm(*gap)}")
    return mean - half > 0, "; ".join(parts), numbers


def figure(rows, path):
    fig, (ax,) = common.axes(1, width=7, height=3.6)
    for i, learner in enumerate(LEARNERS):
        arms = [arm for arm in ARMS if learner != "DPO" or arm[1] == WIDTH]  # DPO has no reward model
        intervals = [common.mean_ci(lacking(rows, learner, *arm)) for arm in arms]
        places = [x + 0.15 * (i - 1) for x in range(len(arms))]
        ax.errorbar(places, *zip(*intervals), fmt="os^"[i], capsize=2, label=learner)
    ax.set_xticks(range(len(ARMS)), [f"{pairs} pairs\nreward model {width}" for pairs, width in ARMS])
    ax.set(ylabel="reward lacking to the frontier", ylim=(0, None))
    ax.legend()
    common.save(fig, path)
