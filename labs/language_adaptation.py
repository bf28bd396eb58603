"""Language adaptation: a model learns a second language from translated demonstrations and preferences.

The first language is that of the reviews; the second has the same grammar with a vocabulary of its own, which
is generated, so that gold reads it through the dictionary. The base model has seen ten times less of it. The
translator gets one word in fifty wrong. Preferences are made in the first language, as UltraFeedback's were.
"""

import functools
import math
import random
import re

import train_dpo
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed

PAPER = "Uhlig, Schacht, Barkur 2024, PHOENIX: open-source language adaption for DPO (2401.10580)"
QUESTION = "Do translated demonstrations and preferences suffice to align a model in a second language?"
PREDICTION = (
    "SFT on translated demonstrations, then DPO on translated preferences: DPO adds to SFT in the second "
    "language (the German model beats the one it started from in most categories of MT-Bench), at a small "
    "loss in the first."
)
STATISTIC = (
    "Gold in the second language on held-out prompts, paired by seed, t interval over three seeds: DPO − "
    "SFT, and DPO − as many updates of SFT on the preferred responses. Seen if both exceed zero. The first "
    "language against the base, also with a fifth of its demonstrations mixed into SFT (replay), a perfect "
    "translator, and DPO on untranslated pairs are reported."
)
DIFFERS = (
    "The languages share their grammar and the translator is a dictionary with 2% wrong words; the base has "
    "0.3 million parameters; gold judges in both languages, where the paper has a language model's grades in "
    "the second."
)
CHANGES = []
SEEDS = 3

NOISE = 0.02  # share of words that the translator gets wrong
METHODS = {"dpo": "DPO, translated", "perfect": "DPO, perfect translator", "english": "DPO, not translated",
           "chosen": "SFT on the chosen", "replay": "DPO, SFT with replay"}
TASK = tasks.get("reviews")


def points(smoke):
    return [{"method": m} for m in (("dpo", "chosen") if smoke else METHODS)]


@functools.cache
def dictionary():
    """Each word of the reviews → one of the second language, of two or three syllables."""
    text = " ".join([*tasks.SENTENCES, *tasks.TOPICS]).lower()
    rng, words, found = random.Random("second language"), set(re.findall("[a-z]+", text)), {}
    for word in sorted(words):
        while word not in found:
            length = rng.choice((2, 2, 3))
            new = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(length))
            if new not in words and new not in found.values():
                found[word] = new
    return found


def translate(text, noise=0.0, rng=None):
    """Word by word; a share `noise` is wrong, and a word that is none stays as it is."""
    words = dictionary()

    def word(match):
        old = match[0].lower()
        new = rng.choice(list(words.values())) if rng and rng.random() < noise else words.get(old, old)
        return new.capitalize() if match[0][0].isupper() else new

    return re.sub("[A-Za-z]+", word, text)


def translate_back(text):
    """A word that is not of the second language, an English one too, becomes ?, which is ill-formed."""
    words = {new: old for old, new in dictionary().items()}

    def word(match):
        old = words.get(match[0].lower(), "?")
        return old.capitalize() if match[0][0].isupper() else old

    return re.sub("[A-Za-z]+", word, text)


def sample(folder, prompts, n, seed):
    model, tok = hub.load(folder)
    return generate.respond(model, tok, prompts, n, 48, seed=seed)[1]


def preferences(base, n, seed, split="train"):
    """Pairs in the first language, made and labelled as train_rm.py makes them."""
    prompts = [r["prompt"] for r in TASK.prompts(split, n, seed)]
    texts, rng = sample(base, prompts, 2, derive_seed(seed, "pairs")), random.Random(f"labels {seed}")
    both = [(p, a, b) for p, a, b in zip(prompts, texts[::2], texts[1::2]) if a != b]
    rows = [(p, *tasks.prefer(p, a, b, rng, 0.5)) for p, a, b in both]
    return [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]


def measure(folder, seed, n):
    """Gold and the share of ill-formed sentences in both languages, on held-out prompts."""
    prompts, out = [r["prompt"] for r in TASK.prompts("test", n, derive_seed(seed, "judge"))], {}
    for name, there, back in (("first", str, str), ("second", translate, translate_back)):
        texts = map(back, sample(folder, [there(p) for p in prompts], 1, seed))
        found = [(tasks.gold(p, t), tasks.gold_parts(p, t)["ill_formed"]) for p, t in zip(prompts, texts)]
        out |= dict(zip((f"gold_{name}", f"ill_{name}"), (sum(x) / n for x in zip(*found))))
    return out


def run(point, seed, smoke):
    method, n, held_out = point["method"], *((60, 16) if smoke else (4000, 400))
    rng, small = random.Random(f"translator {seed}"), dict(steps=4) if smoke else {}

    def translated(rows, noise=NOISE):
        return [{k: translate(v, noise, rng) for k, v in row.items()} for row in rows]

    demos = TASK.demonstrations(n, seed)
    second = translated(demos[: n // 10], 0.0)
    how = dict(n_layer=2, d_model=96, max_len=96, vocab_size=1100, eval_every=0, seed=seed) | small
    base = common.trained(train_sft, data=common.data_file(demos + second), **how) + "/model"
    how = dict(steps=120, lr=2e-3, eval_every=0, seed=seed) | small
    data = common.data_file(translated(demos[n // 2 :]) + demos[: n // 8] * (method == "replay"))
    sft = common.trained(train_sft, data=data, init=base, **how) + "/model"
    pairs = preferences(base, n, seed)
    how = dict(init=sft, steps=200, lr=5e-4, eval_every=0, seed=seed) | small
    if method == "chosen":
        chosen = [{"prompt": r["prompt"], "response": r["chosen"]} for r in pairs]
        final = common.trained(train_sft, data=common.data_file(translated(chosen)), **how) + "/model"
    else:
        data = translated(pairs, NOISE * (method != "perfect"))
        if method == "english":  # train_dpo wants held-out pairs; of the translated it takes some itself
            data = pairs + preferences(base, 32, seed, "test")
        final = common.trained(train_dpo, data=common.data_file(data), eval_prompts=8, **how) + "/model"
    stages = {"base": base, "sft": sft, "final": final}
    return [{"stage": stage} | measure(folder, seed, held_out) for stage, folder in stages.items()]


def effects(rows):
    def gold(method, stage):
        return common.by_seed(rows, "gold_second", method=method, stage=stage)

    return {
        "gold, DPO less SFT": common.less(gold("dpo", "final"), gold("dpo", "sft")),
        "gold, DPO less SFT on the chosen": common.less(gold("dpo", "final"), gold("chosen", "final")),
    }


def verdict(rows):
    def gold(method, stage, language="second"):
        return common.by_seed(rows, f"gold_{language}", method=method, stage=stage) or [math.nan]  # smoke

    dpo = gold("dpo", "final")
    found = {
        "dpo_minus_sft": common.paired(dpo, gold("dpo", "sft")),
        "dpo_minus_chosen": common.paired(dpo, gold("chosen", "final")),
        "first_language": common.paired(gold("dpo", "final", "first"), gold("dpo", "base", "first")),
        "replay_first": common.paired(gold("replay", "final", "first"), gold("dpo", "base", "first")),
        "replay_second": common.paired(gold("replay", "final"), dpo),
        "perfect_minus_dpo": common.paired(gold("perfect", "final"), dpo),
        "english_minus_sft": common.paired(gold("english", "final"), gold("dpo", "sft")),
    }
    said = {name: common.pm(*x) for name, x in found.items()}
    start, middle = (common.mean_ci(gold("dpo", stage))[0] for stage in ("base", "sft"))
    return common.seen(effects(rows)), (
        f"Gold in the second language: base {start:.2f}, SFT {middle:.2f}, DPO {said['dpo_minus_sft']} over "
        f"SFT and {said['dpo_minus_chosen']} over SFT on the chosen; a perfect translator adds "
        f"{said['perfect_minus_dpo']}; DPO on untranslated pairs {said['english_minus_sft']} over SFT. Gold "
        f"in the first language against the base: {said['first_language']} after DPO, {said['replay_first']} "
        f"with replay, which changes the second by {said['replay_second']}."
    ), {name + end: x for name, both in found.items() for end, x in zip(("", "_half"), both)}


def figure(rows, path):
    fig, axes = common.axes(2)
    bars = [("dpo", "base", "base"), ("dpo", "sft", "SFT"), *((m, "final", x) for m, x in METHODS.items())]
    for ax, name, title in zip(axes, ("gold", "ill"), ("gold, held out", "share of ill-formed sentences")):
        for i, language in enumerate(("first", "second")):
            found = [common.mean_ci(common.by_seed(rows, f"{name}_{language}", method=m, stage=stage))
                     for m, stage, _ in bars]
            where, (heights, errors) = [x + 0.4 * i for x in range(len(bars))], zip(*found)
            ax.bar(where, heights, 0.4, yerr=errors, label=f"{language} language")
        labels = [label.replace(", ", ",\n").replace("SFT on ", "SFT on\n") for *_, label in bars]
        ax.set(xticks=[x + 0.2 for x in range(len(bars))], title=title)
        ax.set_xticklabels(labels, rotation=40, ha="right", fontsize=8)
    axes[1].legend(fontsize=8)
    common.save(fig, path)
