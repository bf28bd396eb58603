"""ScaleRL in miniature: is held-out reward a sigmoid of compute, and does its first half tell the second?

    R(C) = R_0 + (A − R_0) / (1 + (C_mid / C)^B)      A ceiling, B steepness, C_mid compute of half the gain

GRPO on *chain* at a constant learning rate, with its design choices varied one at a time. C is 8 FLOP per
parameter and sampled token: 2 to sample it, 6 to train on it. R_0 is measured before training.
"""

import contextlib
import io
import math
import statistics
from unittest import mock

import torch

import train_grpo
import train_sft
from labs import common
from nanorlhf import hub, tasks
from nanorlhf.hub.files import write_jsonl
from nanorlhf.model import GPT

PAPER = "Khatri et al. 2025, The art of scaling reinforcement learning compute for LLMs (arXiv 2510.13786)"
QUESTION = "Can the end of an RL run be read off its first half, and which choices move its ceiling?"
PREDICTION = (
    "The sigmoid fitted to the first half of the compute predicts held-out reward on the second with a "
    "mean error below 0.02; most design choices move the efficiency (C_mid, B) and few the ceiling A: in the "
    "paper fp32 against bf16 logits (0.61 against 0.52) and the model's size do."
)
STATISTIC = (
    "Mean absolute error of the prediction on the unseen half over all runs, one value a seed; seen if it is "
    "below 0.02 by Student's t 95%. A is quoted where the compute reaches 3 C_mid and its bootstrap interval "
    "is at most ±0.02 on every seed. Differences from GRPO are paired by seed."
)
DIFFERS = (
    "A digit-sum task that GRPO solves, models of 4,000 to 60,000 parameters, runs of seconds instead of "
    "100,000 GPU-hours; bf16 rounds the sampler's logits only, which is how two engines disagree."
)
CHANGES = []
SEEDS = 3

RECIPES = {
    "grpo": {},
    "cispo": dict(loss="cispo"),
    "batch std": dict(norm="batch_std"),
    "no resampling": dict(no_positive_resampling=0.9),
    "scalerl": dict(recipe="scalerl"),
    "8 steps stale": dict(off_policy_steps=8),
    "bf16 logits": {},
}
SFT = {64: {}, 32: dict(d_model=32, steps=1600), 16: dict(d_model=16, steps=1600, lr=8e-3)}  # by width
GRPO = dict(task="chain", steps=80, lr=2e-4, eval_every=4, eval_prompts=640, sample_every=1000)
GRPO |= dict(constant_lr_after=5)  # the law is of a run that goes on, not of one that settles
PROMPTS = 640  # for training: 40 steps an epoch, so that each comes twice
A_STEP = 0.02  # differences of A below it are none, says the paper


def points(smoke):
    sizes = [{"recipe": "grpo", "width": width} for width in SFT]
    recipes = [{"recipe": name, "width": 64} for name in list(RECIPES)[1:]]
    return sizes[:1] + recipes[-1:] if smoke else sizes + recipes


def prompts_file():
    path, task = f"{common.root}/_stages/scaling_prompts.jsonl", tasks.get("chain")
    write_jsonl(path, task.prompts("train", PROMPTS, 0) + task.prompts("test", 640, 0))
    return path


def rounded(self, hidden, weight=None, exact=GPT.head_logits):
    return exact(self, hidden, weight).bfloat16().float()


def run(point, seed, smoke):
    size = SFT[point["width"]] | (dict(demos=200, steps=2) if smoke else {})
    sft = common.trained(train_sft, task="chain", seed=seed, **size)
    config = GRPO | RECIPES[point["recipe"]] | dict(init=f"{sft}/model", data=prompts_file(), seed=seed)
    if smoke:
        config |= dict(steps=6, eval_every=1, eval_prompts=8, prompts_per_step=4)
    if point["recipe"] == "bf16 logits":  # a fault planted from outside: the trainer's own logits are fp32
        folder = f"{common.root}/_stages/scaling_bf16_{seed}"
        with mock.patch.object(GPT, "head_logits", rounded), contextlib.redirect_stdout(io.StringIO()):
            train_grpo.train(train_grpo.Config(out=folder, overwrite=True, threads=1, save_every=0, **config))
    else:
        folder = common.trained(train_grpo, **config)
    model, (sampled,) = hub.load(f"{sft}/model")[0], common.logged(folder, "sampled")
    size = sum(p.numel() for p in model.parameters())
    steps, rewards = common.logged(folder, "step", "eval/reward")
    steps[-1] += 1  # measured after that step, the others before
    tokens = [sum(sampled[: int(step)]) for step in steps]
    return [{"tokens": n, "flop": 8.0 * size * n, "reward": r} for n, r in zip(tokens, rewards)]


# ------------------------------------------------------------------------------------------------------------
# the fit


def sigmoid(C, R0, A, B, C_mid):
    return R0 + (A - R0) / (1 + (C_mid / C) ** B)


def fit(C, R, R0):
    """C (n,), R (n,) or (n, k) → A, B, C_mid (k,) of least squares, A in [R0, 1]: B and C_mid on a grid.

    For a given B and C_mid the curve is linear in A, so that its best value needs no search.
    """
    B = torch.logspace(math.log10(0.3), 1, 90).double()
    C_mid = torch.logspace(math.log10(C.min() / 5), math.log10(C.max() * 5), 150).double()
    B, C_mid = (x.flatten() for x in torch.meshgrid(B, C_mid, indexing="ij"))
    s = 1 / (1 + (C_mid[:, None] / C) ** B[:, None])  # (grid, n)
    gain = (R - R0).reshape(len(C), -1)
    cross, square = s @ gain, s.square().sum(1, keepdim=True)
    a = (cross / square).clamp(0, 1 - R0)  # (grid, k): A − R0
    best = (a.square() * square - 2 * a * cross).argmin(0)  # the squared error, but for Σ gain²
    return R0 + a.gather(0, best[None])[0], B[best], C_mid[best]


def bootstrap(C, R, R0, n=200, seed=0):
    """→ 95% intervals (2,) of A, B, C_mid: residuals of the fit, drawn anew n times."""
    curve = sigmoid(C, R0, *fit(C, R, R0))
    left = (R - curve) * math.sqrt(len(C) / (len(C) - 3))  # the fit has taken three of their freedoms
    draw = torch.randint(len(C), (len(C), n), generator=torch.Generator().manual_seed(seed))
    found = fit(C, curve[:, None] + left[draw], R0)
    return [x.quantile(torch.tensor([0.025, 0.975]).double()) for x in found]


def curve_of(rows):
    """Rows of one run → C (n,), R (n,), R0."""
    C, R = (torch.tensor([r[column] for r in rows]).double() for column in ("flop", "reward"))
    return C[1:], R[1:], R[0].item()


def error_ahead(C, R, R0):
    """How well the first half of a run tells the second → mean error of the law, and of a flat line."""
    half = C <= C.max() / 2
    guess = sigmoid(C[~half], R0, *fit(C[half], R[half], R0))
    error = (guess - R[~half]).abs().mean().item()
    return error, (R[half][-1] - R[~half]).abs().mean().item()  # the control: it stays as it is


def study(rows):
    """One run → what the whole of it says, and how well its first half tells the second."""
    C, R, R0 = curve_of(rows)
    (A, B, C_mid), (A_range, *_) = (x.item() for x in fit(C, R, R0)), bootstrap(C, R, R0)
    reach, (error, flat) = C.max().item() / C_mid, error_ahead(C, R, R0)
    A_half = (A_range[1] - A_range[0]).item() / 2
    known = reach >= 3 and A_half <= A_STEP
    return dict(A=A, B=B, C_mid=C_mid, A_half=A_half, reach=reach, known=known, error=error, flat=flat)


def studies(rows):
    """{(recipe, width): [study of each seed]}"""
    runs = list(dict.fromkeys((r["recipe"], int(r["width"])) for r in rows))
    found = {}
    for recipe, width in runs:
        here = [r for r in rows if (r["recipe"], r["width"]) == (recipe, width)]
        found[recipe, width] = [study(common.select(here, seed=s)) for s in sorted({r["seed"] for r in here})]
    return found


def effects(rows):
    margins = []
    for seed in sorted({r["seed"] for r in rows}):
        here = common.select(rows, seed=seed)
        runs = dict.fromkeys((r["recipe"], r["width"]) for r in here)
        curves = [curve_of(common.select(here, recipe=recipe, width=width)) for recipe, width in runs]
        margins.append(0.02 - statistics.mean(error_ahead(*curve)[0] for curve in curves))
    return {"0.02 less the error on the unseen half": margins}


def verdict(rows):
    found, ceiling, speed, unknown = studies(rows), [], [], []
    seeds, base = list(zip(*found.values())), found["grpo", 64]  # of each seed all its runs
    error, flat = (common.mean_ci([statistics.mean(s[key] for s in runs) for runs in seeds])
                   for key in ("error", "flat"))
    numbers = {"error": error[0], "error_half": error[1], "error_flat": flat[0]}
    for (recipe, width), run in found.items():
        name = recipe if width == 64 else f"width {width}"
        numbers |= {f"{key} {name}": statistics.mean(s[key] for s in run) for key in ("A", "B", "reach")}
        unknown += [] if all(s["known"] for s in run) else [name]
        dA = common.paired([s["A"] for s in run], [s["A"] for s in base])
        slow = common.paired(*([math.log(s["C_mid"]) for s in side] for side in (run, base)))
        numbers |= {f"dA {name}": dA[0], f"dA_half {name}": dA[1]}
        numbers |= {f"slower {name}": math.exp(slow[0]), f"slower_log_half {name}": slow[1]}
        if not {"grpo", name} & set(unknown) and abs(dA[0]) > max(dA[1], A_STEP):
            ceiling.append(f"{name} ({dA[0]:+.2f})")
        if abs(slow[0]) > slow[1]:
            speed.append(f"{name} (× {math.exp(slow[0]):.2f})")
    text = f"error on the unseen half {error[0]:.4f} ± {error[1]:.4f} (a flat line {flat[0]:.4f}); A of GRPO "
    text += f"{numbers['A grpo']:.3f}, moved by {', '.join(ceiling) or 'nothing'}; "
    text += f"C_mid moved by {', '.join(speed) or 'nothing'}"
    text += f"; A is not identified for {', '.join(unknown)}" if unknown else ""
    return common.seen(effects(rows)), text, numbers


def figure(rows, path):
    found = studies(rows)
    fig, axes = common.axes(3)
    first = min(r["seed"] for r in rows)
    for i, ((recipe, width), run) in enumerate(found.items()):
        ax, name = (axes[0], f"GRPO, width {width}") if recipe == "grpo" else (axes[1], recipe)
        C, R, R0 = curve_of(common.select(rows, recipe=recipe, width=width, seed=first))
        xs = torch.logspace(math.log10(C.min()), math.log10(C.max()), 60).double()
        half = C <= C.max() / 2
        ax.plot(C, R, "o", ms=3, color=f"C{i}", label=name)
        ax.plot(xs, sigmoid(xs, R0, *fit(C[half], R[half], R0)), "-", lw=1, color=f"C{i}")
        slower = [s["C_mid"] / base["C_mid"] for s, base in zip(run, found["grpo", 64])]
        A, A_half = ([s[key] for s in run] for key in ("A", "A_half"))
        axes[2].errorbar(slower, A, A_half, fmt="o", ms=4, lw=1, color=f"C{i}", label=name)
    for ax, title in zip(axes, ("sizes, one seed", "recipes, one seed", "all seeds, whole runs")):
        ax.set(title=title, xscale="log", xlabel="FLOP; fitted to the first half", ylabel="held-out reward")
        ax.legend(fontsize=6)
    axes[2].set(xlabel="C_mid, that of GRPO with width 64 = 1", ylabel="ceiling A")
    common.save(fig, path)
