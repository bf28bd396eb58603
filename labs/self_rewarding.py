"""Self-rewarding: one model writes reviews and grades them, and learns from its own grades, in rounds.

M1 learns both by imitation: demonstrations (IFT), and "review =" → a digit (EFT), gold's grade with noise.
Then three rounds of DPO: M_t answers, grades its answers (expected digit, from its own logits), and is
trained on best against worst into M_{t+1}. Beside it: M1 stays the judge in every round; a larger β.
"""

import math
import random

import torch

import train_dpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.data import pad
from nanorlhf.errors import derive_seed

PAPER = "Yuan, Pang, Cho, Li, Sukhbaatar, Xu, Weston 2024, Self-rewarding language models (2401.10020)"
QUESTION = "Does a model that is its own judge go on improving, as a writer and as a judge?"
PREDICTION = (
    "Each round's model beats the last (AlpacaEval 9.9, 15.4, 20.4%), it judges better from round to round "
    "(pairwise accuracy 78.7, 80.4, 81.7%), and its answers grow (1092, 1552, 2552 characters)."
)
STATISTIC = (
    "Gold win rate of M2 against M1, M3 against M2 and M4 against M3 on held-out prompts, less one half; and "
    "accuracy of M4 less that of M1 on fixed held-out pairs of M1's answers. t interval over three seeds; "
    "seen if all four exceed zero. The frozen judge and the length are reported."
)
DIFFERS = (
    "The grade is the expected digit behind a review, not a chain of thought with a rubric; 4,000 graded "
    "examples for 1,630; three rounds for two; gold judges, not GPT-4; answers have room for 40 tokens."
)
CHANGES = []
SEEDS = 3

ROUNDS, SAMPLES = 3, 4
STEPS, PROMPTS = 80, 640
LABELS = {("self", 1.0): "judges itself", ("frozen", 1.0): "M1 judges", ("self", 3.0): "judges itself, β = 3"}
TASK = tasks.get("reviews")


def points(smoke):
    return [dict(zip(("judge", "beta"), point)) for point in list(LABELS)[: 1 if smoke else 3]]


def grade(gold, rng):
    """Gold, from −4 to 3, with a labeller's noise → a digit."""
    return str(max(0, min(9, round((gold + rng.gauss(0, 0.5) + 4) / 7 * 9))))


def write(folder, split, n, k, seed):
    """k answers to each of n prompts → rows {"prompt", "response"} of those that ended, and their group."""
    model, tok = hub.load(folder)
    prompts = [r["prompt"] for r in TASK.prompts(split, n, seed)]
    rolls, texts = generate.respond(model, tok, prompts, k, TASK.max_new_tokens, seed=seed)
    ended = torch.cat([roll.finished for roll in rolls]).tolist()
    return [{"prompt": prompts[i // k], "response": text, "group": i // k, "ended": end}
            for i, (text, end) in enumerate(zip(texts, ended))]


@torch.no_grad()
def judged(folder, rows):
    """The model's own grade of each row: the expected digit behind "prompt response ="."""
    model, tok = hub.load(folder)
    ids = [tok.encode(f"{r['prompt']}{r['response']} =") for r in rows]
    digits, out = torch.tensor([tok.encode(str(d))[0] for d in range(10)]), []
    for i in range(0, len(ids), 256):
        tokens, lengths = pad(ids[i : i + 256], tok.pad_id)
        hidden = model(tokens)[torch.arange(len(tokens)), lengths - 1]
        out.append(model.head_logits(hidden)[:, digits].softmax(-1) @ torch.arange(10.0))
    return torch.cat(out).tolist()


def best_against_worst(rows, scores):
    groups = {}
    for row, score in zip(rows, scores):
        if row["ended"]:
            groups.setdefault(row["group"], []).append((score, row["response"], row["prompt"]))
    pairs = [(min(g), max(g)) for g in groups.values()]
    return [{"prompt": w[2], "chosen": w[1], "rejected": l[1]} for l, w in pairs
            if w[0] > l[0] and w[1] != l[1]]


def gold_of(rows):
    return [tasks.gold(r["prompt"], r["response"]) for r in rows]


def accuracy(folder, rows):
    """Share of the pairs (neighbours, two answers to one prompt) that the model puts into gold's order."""
    gold, score = gold_of(rows), judged(folder, rows)
    order = [(score[i] - score[i + 1]) * (gold[i] - gold[i + 1])
             for i in range(0, len(rows), 2) if gold[i] != gold[i + 1]]
    return sum((x > 0) + 0.5 * (x == 0) for x in order) / len(order)


def run(point, seed, smoke):
    graded, n, held_out = (24, 16, 12) if smoke else (2000, PROMPTS, 300)
    small, few = (dict(steps=4), dict(demos=300)) if smoke else ({}, {})
    m0 = common.trained(train_sft, seed=seed, max_len=80, **small, **few) + "/model"
    rng = random.Random(f"grades {seed}")
    eft = write(m0, "train", graded, 2, derive_seed(seed, "eft"))
    eft = [{"prompt": f"{r['prompt']}{r['response']} =", "response": grade(gold, rng)}
           for r, gold in zip(eft, gold_of(eft))]
    data = common.data_file(eft + TASK.demonstrations(graded, seed))
    how = dict(steps=250, lr=2e-3, batch_size=48, eval_every=0, seed=seed) | small
    model = m1 = common.trained(train_sft, data=data, init=m0, **how) + "/model"
    fixed, last, out = write(m1, "test", held_out, 2, derive_seed(seed, "fixed")), None, []
    for t in range(1, ROUNDS + 2):
        answers = write(model, "test", held_out, 2, derive_seed(seed, "answers"))
        gold = gold_of(answers)
        row = {"round": t, "gold": sum(gold) / len(gold), "accuracy": accuracy(model, fixed),
               "accuracy_own": accuracy(model, answers),
               "words": sum(len(r["response"].split()) for r in answers) / len(answers)}
        if last:
            row["win"] = sum((a > b) + 0.5 * (a == b) for a, b in zip(gold, last)) / len(gold)
        out.append(row)
        if t <= ROUNDS:
            last, pairs = gold, []
            for split, count in (("train", n), ("test", 16)):  # train_dpo wants some pairs to measure on
                rows = write(model, split, count, SAMPLES, derive_seed(seed, "round", t))
                pairs += best_against_worst(rows, judged(m1 if point["judge"] == "frozen" else model, rows))
            how = dict(beta=point["beta"], steps=STEPS, eval_every=0, eval_prompts=8, seed=seed) | small
            model = common.trained(train_dpo, data=common.data_file(pairs), init=model, **how) + "/model"
    return out


def verdict(rows):
    def column(name, t, judge="self", beta=1.0):
        return common.by_seed(rows, name, judge=judge, beta=beta, round=float(t)) or [math.nan]  # smoke

    half = [0.5] * len(column("win", 2))
    found = {f"win_{t}": common.paired(column("win", t), half) for t in range(2, ROUNDS + 2)}
    found["accuracy"] = common.paired(column("accuracy", ROUNDS + 1), column("accuracy", 1))
    seen = all(mean > half for mean, half in found.values())
    last = ROUNDS + 1
    for name, of in (("gold", "gold"), ("words", "words"), ("own", "accuracy_own")):
        found[name] = common.paired(column(of, last), column(of, 1))
    found["frozen"] = common.paired(column("gold", last), column("gold", last, "frozen"))
    for name, beta in (("late", 1.0), ("late_3", 3.0)):
        found[name] = common.paired(column("gold", last, beta=beta), column("gold", 2, beta=beta))
    said = {name: common.pm(*x) for name, x in found.items()}
    wins = ", ".join(f"M{t} {said[f'win_{t}']}" for t in range(2, ROUNDS + 2))
    return seen, (
        f"Gold win rates against the last model, less one half: {wins}. From M1 to M4 gold changes by "
        f"{said['gold']}, the judge's accuracy on fixed pairs by {common.pm(*found['accuracy'], 3)}, on the "
        f"model's own newest pairs by {said['own']}, the answers by {said['words']} words. Gold of M4 with "
        f"itself − with M1 as judge {said['frozen']}; of M4 − M2 {said['late']}, at β = 3 {said['late_3']}."
    ), {name + end: x for name, both in found.items() for end, x in zip(("", "_half"), both)}


def figure(rows, path):
    fig, axes = common.axes(4, width=3)
    for ax, name in zip(axes, ("gold", "win", "accuracy", "words")):
        for (judge, beta), label in LABELS.items():
            common.line(ax, rows, "round", name, label, judge=judge, beta=beta)
        ax.set(title={"win": "gold win rate over the last", "accuracy": "judge's accuracy"}.get(name, name),
               xticks=range(1, ROUNDS + 2), xticklabels=[f"M{t}" for t in range(1, ROUNDS + 2)])
    mine = common.select(rows, judge="self", beta=1.0)
    common.line(axes[2], mine, "round", "accuracy_own", "… on its newest answers", "o--")
    axes[1].axhline(0.5, color="black", ls=":")
    axes[2].legend(fontsize=8)
    common.save(fig, path)
