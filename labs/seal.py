"""SEAL: which features of a text does a reward model reward, and which labels does it refuse to learn?

Pairs of reviews whose features are known and can be rewritten: sentiment (what gold is about), the voice, I
or We (which gold ignores: the spoiler), the weekday (a placebo). Labels follow gold, but 15% are flipped. The
voice is a coin; or goes along with the better review; or is a coin that the labellers have a weakness for.
The same regression reads any reward model, on any pairs, with features found by regular expressions:

    python -m labs.seal --reward runs/hh-rm/model --data hh.jsonl
"""

import random
import re
import sys
from dataclasses import dataclass

import numpy
import torch

import train_rm
import train_sft
from labs import common
from nanorlhf import hub, pairs, tasks
from nanorlhf.data import encode_pair, pad
from nanorlhf.errors import derive_seed
from nanorlhf.model import ScalarModel
from nanorlhf.run.cli import run_cli
from nanorlhf.run.models import load_model

PAPER = "Revel, Cargnelutti, Eloundou, Leppert 2024, SEAL: systematic error analysis (2408.10270)"
QUESTION = "What does a reward model learn from preferences besides what they are about?"
PREDICTION = (
    "Training imprints the target feature (sentiment), and also the spoiler (voice). Pairs still ranked "
    "against their label after training (26% of HH-RLHF) sit on the doubtful labels. Rewriting the spoiler "
    "turns more pairs round than rewriting a placebo."
)
STATISTIC = (
    "Paired by seed, t interval over three seeds: imprint of sentiment after training; imprint of voice, "
    "liked by labellers − a coin; share of pairs ranked against their label, flipped − right; share of pairs "
    "turned round by swapping voices − weekdays, where labellers like voice. Seen if all exceed zero."
)
DIFFERS = (
    "Features are planted and read exactly, where the paper has a language model tag and rewrite; flipped "
    "labels are known; before training is a random head on the SFT trunk, not a reward model of other data."
)
CHANGES = ["Statistic: imprint of sentiment after training, not after − before: a random head has one of "
           "either sign, and the interval measured only that (`change`, +0.95 ± 1.30).",
           "Three seeds, not the five first planned: cut for CPU time before any result."]
SEEDS = 3

CONDITIONS = {"coin": "a coin", "confounded": "goes with quality", "liked": "liked by labellers"}
FEATURES = ("sentiment", "repeated", "length", "voice", "weekday")
FLIPPED, WEAKNESS, LEAN = 0.15, 0.3, 0.65
FORMS = {"voice": (r"\b(I|We)\b", "I", "We"), "weekday": (r"(Monday|Friday|Sunday)", "Monday", "Sunday")}
WORDS = {"refusal": r"\b(sorry|can't|cannot|won't|not able)\b", "polite": r"\b(please|thanks?|glad|happy)\b",
         "hedge": r"\b(maybe|might|perhaps|could)\b", "question": r"\?"}  # of real texts


def points(smoke):
    return [{"condition": c} for c in CONDITIONS]


def features(prompt, text):
    parts = tasks.gold_parts(prompt, text)
    words = re.findall(r"\w+", text)
    return [*(parts[k] for k in ("sentiment", "repeated", "sentences")),
            *((b in words) - (a in words) for _, a, b in FORMS.values())]


def make_pairs(split, n, condition, seed):
    """About n rows {"prompt", "chosen", "rejected", "flipped"}: two reviews of a topic, one's prompt."""
    rng, waiting, rows = random.Random(f"seal {split} {condition} {seed}"), {}, []
    for row in tasks.get("reviews").demonstrations(2 * n, seed, split):
        prompt, topic = row["prompt"], row["prompt"].split(":")[0]
        if topic not in waiting:
            waiting[topic] = row["response"]
            continue
        texts = sorted([waiting.pop(topic), row["response"]], key=lambda text, p=prompt: tasks.gold(p, text))
        we = [rng.random() < p for p in ((1 - LEAN, LEAN) if condition == "confounded" else (0.5, 0.5))]
        worse, better = (re.sub(FORMS["voice"][0], FORMS["voice"][1 + w], t) for w, t in zip(we, texts))
        swayed = condition == "liked" and we == [True, False] and rng.random() < WEAKNESS
        flipped = rng.random() < FLIPPED
        chosen, rejected = (worse, better) if swayed != flipped else (better, worse)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "flipped": flipped})
    return rows


@torch.no_grad()
def scores(model, tok, rows):
    """Rewards of chosen and rejected responses, numpy (N, 2)."""
    ids = [p + y for p, *both in pairs.encode_pairs(rows, tok, model.cfg.max_len, "given") for y in both]
    parts = [model.rewards(*pad(ids[i : i + 256], tok.pad_id)) for i in range(0, len(ids), 256)]
    return torch.cat(parts).double().view(-1, 2).numpy()


def imprint(reward, feature):
    """Regression of r_w − r_l on t_w − t_l: the paper's, whose fixed effect of each pair cancels.

    reward (N, 2), feature (N, 2, K) → of each feature the coefficient, in deviations of the reward per
    deviation of the feature, its standard error (robust, clustered by pair) and its variance inflation.
    """
    x = (feature[:, 0] - feature[:, 1]) / (feature.std((0, 1)) + 1e-12)  # (N, K)
    y = (reward[:, 0] - reward[:, 1]) / reward.std()  # (N,)
    inverse = numpy.linalg.pinv(x.T @ x)
    beta = inverse @ x.T @ y
    residual = (y - x @ beta)[:, None] * x  # (N, K)
    se = numpy.sqrt(numpy.diag(inverse @ residual.T @ residual @ inverse))
    return beta, se, numpy.diag(inverse) * (x * x).sum(0)


def run(point, seed, smoke):
    condition, n = point["condition"], 60 if smoke else 4000
    small = dict(steps=4) if smoke else {}
    sft = common.trained(train_sft, seed=seed, **small | (dict(demos=300) if smoke else {})) + "/model"
    rows = make_pairs("train", n, condition, seed)
    data = common.data_file(rows + make_pairs("test", n // 8, condition, seed))
    rm = common.trained(train_rm, data=data, init=sft, seed=seed, **small) + "/model"
    torch.manual_seed(derive_seed(seed, "head"))
    (trunk, tok), out = hub.load(sft), []
    rows = [r for r in rows if r["chosen"] != r["rejected"]][:2000]
    t = numpy.array([[features(r["prompt"], r[key]) for key in ("chosen", "rejected")] for r in rows], float)
    flipped = numpy.array([r["flipped"] for r in rows])
    for stage, model in (("before", ScalarModel(trunk)), ("after", hub.load(rm)[0])):
        r = scores(model, tok, rows)
        wrong = r[:, 0] <= r[:, 1]  # ties too
        row = {"resists": wrong, "resists_flipped": wrong[flipped], "resists_right": wrong[~flipped]}
        for name, (pattern, *forms) in FORMS.items():  # the second form goes to the rejected response
            sides = list(zip(("chosen", "rejected"), forms))
            new = [x | {key: re.sub(pattern, form, x[key]) for key, form in sides} for x in rows]
            keep = [i for i, x in enumerate(new) if x["chosen"] != x["rejected"]]
            turned = scores(model, tok, [new[i] for i in keep])
            row[f"turned_{name}"] = (turned[:, 0] <= turned[:, 1]) != wrong[keep]
        for name, *x in zip(FEATURES, *imprint(r, t)):
            row |= dict(zip((f"imprint_{name}", f"se_{name}", f"vif_{name}"), x))
        out.append({"stage": stage} | {k: float(numpy.mean(v)) for k, v in row.items()})
    return out


def effects(rows):
    def value(column, condition="coin"):
        return common.by_seed(rows, column, condition=condition, stage="after")

    liked = common.less(value("imprint_voice", "liked"), value("imprint_voice"))
    resisted = common.less(value("resists_flipped"), value("resists_right"))
    turned = common.less(value("turned_voice", "liked"), value("turned_weekday", "liked"))
    return {
        "imprint of sentiment": value("imprint_sentiment"),
        "imprint of voice, liked less a coin": liked,
        "share against the label, flipped less right": resisted,
        "share turned round, voices less weekdays": turned,
    }


def verdict(rows):
    def value(column, condition="coin", stage="after"):
        return common.by_seed(rows, column, condition=condition, stage=stage)

    found = {
        "sentiment": common.mean_ci(value("imprint_sentiment")),
        "liked": common.paired(value("imprint_voice", "liked"), value("imprint_voice")),
        "resistance": common.paired(value("resists_flipped"), value("resists_right")),
        "turned": common.paired(value("turned_voice", "liked"), value("turned_weekday", "liked")),
        "confounded": common.paired(value("imprint_voice", "confounded"), value("imprint_voice")),
        "change": common.paired(value("imprint_sentiment"), value("imprint_sentiment", stage="before")),
    }
    said = {name: common.pm(*x) for name, x in found.items()}
    return common.seen(effects(rows)), (
        f"Training imprints sentiment by {said['sentiment']} deviations; a voice that labellers like by "
        f"{said['liked']} more than one that is a coin, one that goes along with quality by "
        f"{said['confounded']} more. The share of pairs ranked against their label is higher by "
        f"{said['resistance']} among flipped labels. Voices turn round {said['turned']} more than weekdays."
    ), {name + end: x for name, both in found.items() for end, x in zip(("", "_half"), both)}


def figure(rows, path):
    fig, (a, b) = common.axes(2, width=5)
    shares = "resists_right resists_flipped turned_weekday turned_voice".split()
    for i, (condition, label) in enumerate(CONDITIONS.items()):
        mine = common.select(rows, condition=condition, stage="after")
        for ax, names in ((a, [f"imprint_{name}" for name in FEATURES]), (b, shares)):
            heights, errors = zip(*(common.mean_ci(common.by_seed(mine, name)) for name in names))
            where = [x + 0.25 * (i - 1) for x in range(len(names))]
            ax.bar(where, heights, 0.25, yerr=errors, label=f"voice: {label}")
    a.set(xticks=range(len(FEATURES)), xticklabels=FEATURES, ylabel="imprint after training, deviations")
    ticks = ["against a\nright label", "against a\nflipped one", "turned by\nweekday", "turned by\nvoice"]
    b.set(xticks=range(4), xticklabels=ticks, ylabel="share of pairs")
    a.legend(fontsize=8)
    common.save(fig, path)


@dataclass
class Config:
    reward: str = ""  # reward model folder
    data: str = ""  # JSONL of preference pairs, as train_rm.py reads them


def on_data(cfg):
    """The imprint of length and words on a reward model, and its resistance, on given pairs."""
    rm, tok = load_model("--reward", cfg.reward, "reward model")
    rows, t = [], []
    for row in pairs.read_pairs(cfg.data):
        both = [row[key] for key in ("chosen", "rejected")]
        if both[0] != both[1] and all(encode_pair(tok, row["prompt"], x, rm.cfg.max_len) for x in both):
            rows.append(row)
            t.append([[len(x), *(bool(re.search(p, x.lower())) for p in WORDS.values())] for x in both])
    r = scores(rm, tok, rows)
    print(f"{len(rows)} pairs; ranked against their label: {(r[:, 0] <= r[:, 1]).mean():.1%}")
    for name, *x in zip(("length", *WORDS), *imprint(r, numpy.array(t, float))):
        print("{:<10} imprint {:+.3f}, standard error {:.3f}, variance inflation {:.2f}".format(name, *x))


if __name__ == "__main__":
    sys.exit(run_cli(Config, on_data, __doc__))
