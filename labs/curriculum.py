"""A curriculum without rewards: practise most where an ensemble of models disagrees (WAKER).

Four families of prompts, six digits each, of very different difficulty; and, in some runs, one that is noise:

    copy     c352814=352814        reverse  r352814=418253        noise  x352814=709144, or anything else
    largest  m352814=355888        sum      s352814=380139        running maximum, running sum mod 10

Two models learn from demonstrations, in rounds. What differs is a round's share of each family:

    uniform  equal
    waker    softmax of the standardised disagreement (KL between the two per token, mean of both directions)
    success  p (1 − p), p the share of right answers: this one needs the checker

The last two keep a fifth of uniform sampling, as WAKER does.
"""

import itertools
import math
import random
import statistics

import torch

import train_sft
from evaluate import kl_per_token
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.data import encode_demonstration
from nanorlhf.errors import derive_seed

PAPER = (
    "Rigter, Jiang, Posner 2024, Reward-free curricula for training robust world models, WAKER "
    "(arXiv 2306.09205)"
)
QUESTION = "Does practising where an ensemble disagrees make the worst family of prompts better?"
PREDICTION = (
    "At equally many demonstrations the worst family's accuracy is higher with waker than with uniform "
    "sampling and than with the success-rate curriculum; noise does not catch waker's attention for long."
)
STATISTIC = (
    "Accuracy of the worst family after the last round, 256 held-out prompts, sampled, mean of both models: "
    "waker minus uniform, without noise; paired by seed, Student's t 95%; seen if above 0. Six rounds were "
    "chosen on seed 0, where uniform sampling is half-way."
)
DIFFERS = (
    "Supervised next-token models of text families instead of world models of environments, an ensemble of "
    "two, rounds instead of a running average, and no stage with rewards afterwards."
)
CHANGES = [
    "the mean over the rounds was added: after six, two of five seeds are at the ceiling with either",
    "ten seeds in place of five: with five waker minus uniform was +0.26 ± 0.36",
]
SEEDS = 10

FAMILIES = {  # first character → answer
    "c": lambda x: x,
    "r": lambda x: x[::-1],
    "m": lambda x: "".join(itertools.accumulate(x, max)),
    "s": lambda x: "".join(str(n % 10) for n in itertools.accumulate(map(int, x))),
}
NOISE = "x"
ROUNDS, STEPS, BATCH = 6, 100, 64


def points(smoke):
    grid = [("waker", 1), ("uniform", 0), ("waker", 0), ("success", 0), ("uniform", 1)]
    return [{"curriculum": x, "noise": noise} for x, noise in grid[: 1 if smoke else 5]]


def draw(family, split, n, rng):
    """n rows of one family, of training or of held-out prompts."""
    rows, answer = [], FAMILIES.get(family, lambda x: "".join(rng.choices("0123456789", k=6)))
    while len(rows) < n:
        digits = "".join(rng.choices("0123456789", k=6))
        prompt = f"{family}{digits}="
        if tasks.held_out(prompt) == (split == "test"):
            rows.append({"prompt": prompt, "response": answer(digits)})
    return rows


@torch.no_grad()
def measure(folders, families, seed, n):
    """→ {family: (disagreement in nats per token, accuracy)} of the two models on held-out prompts."""
    (one, tok), (two, _) = (hub.load(f"{folder}/model") for folder in folders)
    found = {}
    for family in families:
        rows = draw(family, "test", n, random.Random(derive_seed(seed, family)))
        encoded = [x for r in rows for x in encode_demonstration(tok, r)]
        tokens, mask = train_sft.pad_demonstrations(encoded, tok, "cpu")
        kl = kl_per_token(one, two, tokens, mask) + kl_per_token(two, one, tokens, mask)
        kl, right = kl.sum() / mask.sum() / 2, 0.0
        for model in (one, two):
            _, texts = generate.respond(model, tok, [r["prompt"] for r in rows], 1, 7, seed=seed)
            right += statistics.mean(text == r["response"] for text, r in zip(texts, rows)) / 2
        found[family] = kl.item(), right
    return found


def shares(curriculum, found):
    """{family: share of the next round} from what `measure` found."""
    signal = [0.0] * len(found)
    if curriculum == "waker":
        kl = [x for x, _ in found.values()]
        signal = [math.exp((x - statistics.mean(kl)) / (statistics.pstdev(kl) + 1e-6)) for x in kl]
    if curriculum == "success":
        signal = [p * (1 - p) for _, p in found.values()]
    total, even = sum(signal), 1 / len(found)
    return {f: 0.2 * even + 0.8 * (x / total if total else even) for f, x in zip(found, signal)}


def run(point, seed, smoke):
    rounds, steps, n = (1, 2, 16) if smoke else (ROUNDS, STEPS, 256)
    families = [*FAMILIES, NOISE][: 4 + point["noise"]]
    share, models, rows = dict.fromkeys(families, 1 / len(families)), ["", ""], []
    for i in range(rounds):
        for member in (0, 1):  # data of their own: else both would learn the same noise
            rng = random.Random(derive_seed(seed, "curriculum", i, member))
            data = [r for f, w in share.items() for r in draw(f, "train", round(w * steps * BATCH), rng)]
            rng.shuffle(data)
            init = dict(init=f"{models[member]}/model") if i else dict(n_layer=1, d_model=64, max_len=16)
            how = dict(tokenizer="chars", steps=steps, batch_size=BATCH, lr=5e-3, eval_every=0)
            how |= dict(task="chain", seed=derive_seed(seed, "member", member), data=common.data_file(data))
            models[member] = common.trained(train_sft, **init, **how)
        found = measure(models, families, seed, n)
        for family, (kl, right) in found.items():
            row = {"round": i + 1, "family": family, "share": share[family]}
            rows.append(row | {"disagreement": kl, "accuracy": right})
        share = shares(point["curriculum"], found)
    return rows


def worst(rows, **conditions):
    """The worst family's accuracy for each seed, in the order of the seeds; noise aside."""
    found = [common.by_seed(rows, "accuracy", family=family, **conditions) for family in FAMILIES]
    return [min(x) for x in zip(*found)]


def effects(rows):
    last = common.select(rows, round=max(r["round"] for r in rows))
    waker = worst(last, curriculum="waker", noise=0)
    uniform = worst(last, curriculum="uniform", noise=0)
    return {"worst family's accuracy, waker less uniform": common.less(waker, uniform)}


def verdict(rows):
    def along(curriculum):  # mean over the rounds, for each seed
        rounds = sorted({r["round"] for r in rows})
        found = [worst(rows, curriculum=curriculum, noise=0, round=i) for i in rounds]
        return [statistics.mean(x) for x in zip(*found)]

    last = common.select(rows, round=max(r["round"] for r in rows))
    acc = {x: worst(last, curriculum=x, noise=0) for x in ("uniform", "waker", "success")}
    noisy = {x: worst(last, curriculum=x, noise=1) for x in ("uniform", "waker")}
    if not all((*acc.values(), *noisy.values())):  # a smoke run has one of them
        return False, "too few points for a verdict", {}
    main, other = (common.paired(acc["waker"], acc[x]) for x in ("uniform", "success"))
    noise = common.paired(noisy["waker"], noisy["uniform"])
    early = common.paired(along("waker"), along("uniform"))
    share = common.mean_ci(common.by_seed(last, "share", curriculum="waker", noise=1, family=NOISE))
    means = {x: statistics.mean(values) for x, values in acc.items()}
    text = ", ".join(f"{x} {mean:.2f}" for x, mean in means.items())
    text = f"worst family's accuracy: {text}; waker minus uniform {common.pm(*main)} (mean over the "
    text += f"rounds {common.pm(*early)}), minus success "
    text += f"{common.pm(*other)}; with a family of noise, waker minus uniform {common.pm(*noise)}; noise "
    text += f"has {share[0]:.2f} ± {share[1]:.2f} of waker's last round"
    numbers = means | {"waker_uniform": main[0], "waker_uniform_half": main[1], "noise_share": share[0]}
    numbers |= {"waker_uniform_rounds": early[0], "waker_uniform_rounds_half": early[1]}
    numbers |= {"waker_success": other[0], "waker_success_half": other[1]}
    return common.seen(effects(rows)), text, numbers | {"noisy": noise[0], "noisy_half": noise[1]}


def figure(rows, path):
    fig, axes = common.axes(4, width=2.5, height=2.2)
    rounds = sorted({r["round"] for r in rows})
    for noise, ax in enumerate(axes[:2]):
        for name, colour in zip(("uniform", "waker", "success"), ("tab:gray", "tab:blue", "tab:orange")):
            found = [worst(rows, round=i, curriculum=name, noise=noise) for i in rounds]
            ax.plot(rounds, found, color=colour, alpha=0.3, lw=1)
            if all(found):
                ax.plot(rounds, [statistics.mean(x) for x in found], "o-", color=colour, ms=4, label=name)
        ax.set(title="worst family" + ", with noise" * noise, ylabel="accuracy", ylim=(-0.05, 1.05))
    for noise, ax in enumerate(axes[2:]):
        here = common.select(rows, curriculum="waker", noise=noise)
        for family in dict.fromkeys(r["family"] for r in here):
            one = dict(curriculum="waker", noise=noise, family=family)
            ax.plot(rounds, [statistics.mean(common.by_seed(rows, "share", round=i, **one)) for i in rounds],
                    "o-", ms=4, label=family)  # fmt: skip
        ax.set(title="waker's shares" + ", with noise" * noise, ylim=(0, 1))
    for ax in axes:
        ax.set_xlabel("round")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    common.save(fig, path)
