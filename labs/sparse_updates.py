"""How many weights does RL leave as they were, and how much of that is rounding?"""

import statistics

import torch

import train_grpo
import train_sft
from labs import common
from labs.spurious_rewards import demonstrations, measure
from nanorlhf import hub, tasks

PAPER = "Mukherjee et al., 2025, Reinforcement learning finetunes small subnetworks in LLMs (2505.11711)"
QUESTION = "Which share of the weights does RL change, and is a small share RL's doing or bfloat16's?"
PREDICTION = (
    "RL leaves 70% to 95% of the weights unchanged, far more than SFT does, and the update has nearly full "
    "rank; if it is a property of RL, it does not hang on the learning rate or on the rounding to bfloat16"
)
STATISTIC = (
    "share of weights unchanged after 200 updates, compared in float32 and after rounding both to bfloat16; "
    "95% interval over 3 seeds; seen if RL gains accuracy at a learning rate at which more than 70% are "
    "unchanged in float32. Beside it: RL less SFT at each learning rate, paired"
)
DIFFERS = (
    "chain with 53k parameters from its SFT model: RL by GRPO, SFT on demonstrations that always think, "
    "both 200 updates of 64 samples without weight decay; 'kept in bfloat16' rounds weights and Adam's "
    "moments after every update; rank: singular values that hold 99% of the energy of a matrix's update, of "
    "its full rank"
)
CHANGES = []
SEEDS = 3

LRS = (1e-6, 1e-5, 1e-4, 3e-4)
DTYPES = {"float32": "float32", "bf16_weights": "kept in bfloat16"}


def points(smoke):
    every = [{"method": m, "lr": lr, "dtype": d} for m in ("RL", "SFT") for lr in LRS for d in DTYPES]
    return [every[6], every[-1]] if smoke else every


def weights(folder):
    return {name: p.detach() for name, p in hub.load(folder)[0].named_parameters()}


def compare(before, after):
    """Two dicts of weights → shares unchanged {"exact", "tiny", "bf16"}, "size" and "rank" of the update.

    tiny: by 1e-5 at most; bf16: after rounding both; size: its norm, of that of the weights.
    """
    pairs = [(before[name].flatten(), after[name].flatten()) for name in before]
    a, b = (torch.cat(x) for x in zip(*pairs))
    ranks = []
    for name in before:
        update = (after[name] - before[name]).double()
        if update.dim() == 2 and "wte" not in name and "wpe" not in name and update.any():
            energy = torch.linalg.svdvals(update).square()
            ranks.append(((energy.cumsum(0) / energy.sum() < 0.99).sum().item() + 1) / len(energy))
    same = {"exact": a == b, "tiny": (a - b).abs() <= 1e-5, "bf16": a.bfloat16() == b.bfloat16()}
    size, rank = (a - b).norm() / a.norm(), statistics.mean(ranks) if ranks else None
    return {k: x.float().mean().item() for k, x in same.items()} | {"size": size.item(), "rank": rank}


def run(point, seed, smoke):
    small = dict(steps=5, demos=500) if smoke else {}
    base = common.trained(train_sft, task="chain", seed=seed, eval_every=0, **small) + "/model"
    what = dict(task="chain", seed=seed, init=base, lr=point["lr"], dtype=point["dtype"])
    if point["method"] == "RL":
        data = common.data_file(tasks.get("chain").prompts("train", 3000, seed))
        more = dict(data=data, eval_prompts=0, ref="none", steps=2 if smoke else 50)
        after = common.trained(train_grpo, **what, **more)
    else:
        data = common.data_file(demonstrations(200 if smoke else 12_800, seed, 1.0))
        more = dict(data=data, weight_decay=0.0, eval_every=0, steps=2 if smoke else 200)
        after = common.trained(train_sft, **what, **more)
    start, end = weights(base), weights(f"{after}/model")
    if point["dtype"] == "bf16_weights":  # it lost the rest of its start at once
        start = {name: p.bfloat16().float() for name, p in start.items()}
    n = 64 if smoke else 512
    gain = measure(f"{after}/model", seed, n)["accuracy"] - measure(base, seed, n)["accuracy"]
    return [compare(start, end) | {"gain": gain}]


def verdict(rows):
    def of(column, method, lr, dtype="float32"):
        return common.by_seed(rows, column, method=method, lr=lr, dtype=dtype)

    numbers, said, seen = {}, [], False
    for lr in (lr for lr in LRS if all(of("exact", m, lr, d) for m in ("RL", "SFT") for d in DTYPES)):
        shares = {
            "in float32": common.mean_ci(of("exact", "RL", lr)),
            "seen in bfloat16": common.mean_ci(of("bf16", "RL", lr)),
            "kept in bfloat16": common.mean_ci(of("exact", "RL", lr, "bf16_weights")),
        }
        gain = common.mean_ci(of("gain", "RL", lr))
        seen |= shares["in float32"][0] - shares["in float32"][1] > 0.7 and gain[0] > gain[1]
        less = common.paired(of("bf16", "RL", lr), of("bf16", "SFT", lr))
        numbers |= {f"unchanged {name}, lr {lr:g}": x for name, (x, _) in shares.items()}
        numbers |= {f"gain, lr {lr:g}": gain[0], f"gain, lr {lr:g} ±": gain[1]}
        numbers |= {f"RL less SFT, lr {lr:g}": less[0], f"RL less SFT, lr {lr:g} ±": less[1]}
        numbers[f"rank, lr {lr:g}"] = statistics.mean(of("rank", "RL", lr))
        kept = common.paired(of("exact", "RL", lr, "bf16_weights"), of("exact", "RL", lr))
        numbers |= {f"rounding, lr {lr:g}": kept[0], f"rounding, lr {lr:g} ±": kept[1]}
        numbers[f"gain kept in bfloat16, lr {lr:g}"] = statistics.mean(of("gain", "RL", lr, "bf16_weights"))
        parts = " / ".join(f"{x:.2f}" for x, _ in shares.values())
        said.append(f"lr {lr:g}: {parts}, RL less SFT {common.pm(*less)}, accuracy {common.pm(*gain)}")
    start = "unchanged by RL in float32 / seen in bfloat16 / kept in bfloat16: "
    return seen, start + "; ".join(said), numbers


def figure(rows, path):
    fig, axs = common.axes(2, width=4.4, height=3.8)
    views = (("exact", "float32", "o-", "float32"), ("bf16", "float32", "s--", "seen in bfloat16"),
             ("exact", "bf16_weights", "^:", "kept in bfloat16"))  # fmt: skip
    for colour, method in (("tab:blue", "RL"), ("tab:orange", "SFT")):
        for ax in axs:
            ax.set_prop_cycle(color=[colour])
        for column, dtype, style, name in views:
            mine = common.select(rows, method=method, dtype=dtype)
            common.line(axs[0], mine, "lr", column, f"{method}, {name}", style)
            if column == "exact":
                common.line(axs[1], mine, "lr", "gain", None, style)
    axs[0].set(xscale="log", xlabel="learning rate", ylabel="share of weights unchanged", ylim=(-0.03, 1.03))
    axs[1].set(xscale="log", xlabel="learning rate", ylabel="accuracy gained")
    fig.legend(loc="outside lower center", ncols=2, fontsize=8)
    common.save(fig, path)
