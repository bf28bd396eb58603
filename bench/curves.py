"""The curves of the pages in docs/: real runs, their metrics.csv in docs/data/, pictures in docs/img/.

    python bench/curves.py            draw docs/img/*.png from docs/data/*.csv and bench/results/*.csv
    python bench/curves.py --run      first make docs/data/*.csv anew: seven CPU minutes, seed 0

After --run, `python tests/test_docs.py --update` brings the figures quoted in the pages up to date.
"""

import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA, IMG, BENCH = ROOT / "docs/data", ROOT / "docs/img", ROOT / "bench/results"
sys.path.insert(0, str(ROOT))

from nanorlhf.look.plots import compare, pyplot, save_figure  # noqa: E402

# name of the CSV → the command; {name} stands for the run folder of an earlier one
RUNS = {
    "sft": "train_sft.py",
    "rm": "train_rm.py --init {sft}/model",
    "ppo": "train_ppo.py --init {sft}/model --rm {rm}/model",
    "ppo_beta0": "train_ppo.py --init {sft}/model --rm {rm}/model --beta 0",
    "dpo": "train_dpo.py --init {sft}/model",
    "dpo_beta003": "train_dpo.py --init {sft}/model --beta 0.03",
    "dpo_rm": "train_dpo.py --init {sft}/model --online 3 --rm {rm}/model",
    "dpo_self": "train_dpo.py --init {sft}/model --online 3 --judge self",
    "chain_sft": "train_sft.py --task chain",
    "chain_ppo": "train_ppo.py --task chain --init {chain_sft}/model",
    "chain_grpo": "train_grpo.py --init {chain_sft}/model",
    "chain_distill": "train_distill.py --init {chain_sft}/model --teacher {chain_grpo}/model",
}
BLUE, RED, GREEN, GREY = "tab:blue", "tab:red", "tab:green", "tab:gray"


def run_all():
    with tempfile.TemporaryDirectory() as tmp:
        folders = {name: f"{tmp}/{name}" for name in RUNS}
        for name, command in RUNS.items():
            print(f"── {name}: python {command.format(**{n: f'RUN/{n}' for n in RUNS})}", flush=True)
            argv = [sys.executable, *command.format(**folders).split(), "--out", folders[name], "--seed", "0"]
            subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            shutil.copy(f"{folders[name]}/metrics.csv", DATA / f"{name}.csv")
        write_gold("gold", folders, ("ppo", "ppo_beta0"))
        write_gold("dpo_gold", folders, ("dpo", "dpo_rm", "dpo_self"))
        write_k1(folders["dpo"])


def write_gold(name, folders, runs):
    """Gold is read after training, from the samples that the runs logged; the steps are the same in all."""
    from demo import gold_along

    columns = [gold_along(folders[run]) for run in runs]
    with open(DATA / f"{name}.csv", "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("step", *(f"gold_{run}" for run in runs)))
        rows = zip(columns[0][0], *(gold for _, gold in columns))
        writer.writerows((step, *(f"{x:.6g}" for x in row)) for step, *row in rows)


def write_k1(run):
    """log π − log π_ref of each sample of DPO's last row: samples.jsonl has β times that as reward."""
    with open(f"{run}/config.json") as f:
        beta = json.load(f)["beta"]
    with open(f"{run}/samples.jsonl", encoding="utf-8") as f:
        rows = list(map(json.loads, f))
    k1 = sorted(r["reward"] / beta for r in rows if r["step"] == rows[-1]["step"])
    with open(DATA / "dpo_k1.csv", "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("sample", "k1", "negative"))
        writer.writerows((i, f"{x:.6g}", int(x < 0)) for i, x in enumerate(k1))


def write_variants():
    """bench/results/grpo_variants.csv with one row a seed, for the pages to quote: sampled_VARIANT …"""
    with open(BENCH / "grpo_variants.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if int(r["seed"]) < 3]
    with open(DATA / "grpo_variants.csv", "w", newline="") as f:
        columns = "sampled entropy len_wrong dead".split()
        keys = [(r["variant"], k) for r in rows if r["seed"] == "0" for k in columns]
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("seed", *(f"{k}_{v.replace(', ', '_').replace(' ', '_')}" for v, k in keys)))
        for seed in "012":
            of = {r["variant"]: r for r in rows if r["seed"] == seed}
            writer.writerow((seed, *(of[v][k] for v, k in keys)))


def column(name, key, x="step", folder=DATA):
    """The points (x, key) of a CSV, where key was measured → two lists."""
    with open(folder / f"{name}.csv", newline="") as f:
        points = [(float(r[x]), float(r[key])) for r in csv.DictReader(f) if r[key]]
    return [list(side) for side in zip(*points)]


def rows_of(name):
    """A CSV of docs/data → one dict a step, None where nothing was measured."""
    with open(DATA / f"{name}.csv", newline="") as f:
        rows = [{key: float(x) if x else None for key, x in row.items()} for row in csv.DictReader(f)]
    return [row | {"step": int(row["step"])} for row in rows]


def panels(plt, high, wide, *titles):
    size = (4.2 * wide, 2.9 * high)
    fig, axes = plt.subplots(high, wide, figsize=size, layout="constrained", squeeze=False)
    for ax, title in zip(axes.flat, titles):
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.25)
    return fig, axes.flat


def draw_sft(plt):
    fig, (a, b, c) = panels(plt, 1, 3, "reviews: loss, nats per token", "reviews: gradient norm",
                            "chain: loss, nats per token")
    for ax, name in ((a, "sft"), (c, "chain_sft")):
        ax.plot(*column(name, "loss"), color=GREY, lw=1, label="loss")
        ax.plot(*column(name, "eval/loss"), "o-", color=GREEN, label="eval/loss")
        ax.legend()
    b.plot(*column("sft", "gnorm"), color=BLUE, lw=1)
    return fig


def draw_rm(plt):
    fig, (a, b, c) = panels(plt, 1, 3, "loss", "accuracy", "margin, chosen − rejected")
    a.plot(*column("rm", "loss"), color=GREY, lw=1, alpha=0.6, label="loss (noisy labels)")
    a.plot(*column("rm", "eval/loss"), "o-", color=GREEN, label="eval/loss (no noise)")
    a.axhline(math.log(2), color="black", ls=":", label="log 2")
    b.plot(*column("rm", "acc"), color=GREY, lw=1, alpha=0.6, label="acc (noisy labels)")
    b.plot(*column("rm", "eval/acc"), "o-", color=GREEN, label="eval/acc (no noise)")
    b.axhline(column("rm", "eval/acc_len_only")[1][-1], color="black", ls=":", label="eval/acc_len_only")
    c.plot(*column("rm", "margin"), color=BLUE, lw=1)
    a.legend()
    b.legend()
    return fig


def draw_ppo(plt):
    groups = {"β = 0.3": [rows_of("ppo")], "β = 0": [rows_of("ppo_beta0")]}
    return compare(groups, ["reward", "kl", "entropy", "len", "clip", "explained_var"])


def draw_overoptimisation(plt):
    fig, (a, b) = panels(plt, 1, 2, "seed 0, while training", "five seeds, at the end")
    for run, gold, colour, name in (("ppo", "gold_ppo", BLUE, "β = 0.3"),
                                    ("ppo_beta0", "gold_ppo_beta0", RED, "β = 0")):
        a.plot(*column(run, "reward"), color=colour, ls="--", alpha=0.6, label=f"{name}: proxy")
        a.plot(*column("gold", gold), ".-", color=colour, label=f"{name}: gold")
    for name, colour, marker, label in (("sft", GREY, "s", "SFT"), ("ppo", BLUE, "o", "PPO, β = 0.3"),
                                        ("ppo_nokl", RED, "X", "PPO, β = 0")):
        b.plot(*column("demo", f"gold_{name}", f"proxy_{name}", BENCH), marker, color=colour, label=label)
    b.set(xlabel="proxy: the reward model's score", ylabel="gold")
    a.set_ylabel("score")
    a.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.27))  # the corners are full of curves
    b.legend(fontsize=8)
    return fig


def draw_chain(plt):
    titles = ("reward: accuracy while sampling", "len, tokens", "entropy, nats per token")
    fig, axes = panels(plt, 1, 3, *titles)
    for ax, key in zip(axes, ("reward", "len", "entropy")):
        ax.plot(*column("chain_ppo", key), color=BLUE, label=key)
    for key, mark, colour in (("eval/reward", "o", GREEN), ("eval/greedy", "X", RED)):
        axes[0].plot(*column("chain_ppo", key), mark, color=colour, label=key, clip_on=False, zorder=3)
    axes[0].legend()
    return fig


def draw_grpo(plt):
    titles = ("reward: accuracy while sampling", "tokens of a response", "dead: share of the groups",
              "kl, nats per sequence", "entropy, nats per token", "ratio_max of the step's updates")
    fig, axes = panels(plt, 2, 3, *titles)
    for ax, key in zip(axes, ("reward", "len", "dead", "kl", "entropy", "ratio_max")):
        ax.plot(*column("chain_grpo", key), color=BLUE, label=key)
    for key, mark, colour in (("eval/reward", "o", GREEN), ("eval/greedy", "X", RED)):
        axes[0].plot(*column("chain_grpo", key), mark, color=colour, label=key, clip_on=False, zorder=3)
    axes[1].plot(*column("chain_grpo", "len_wrong"), color=RED, lw=1, label="len_wrong")
    axes[0].legend()
    axes[1].legend()
    return fig


def draw_dpo(plt):
    titles = ("loss", "log-probs of a batch, nats", "kl, nats per sequence", "margin, chosen − rejected",
              "accuracy, held-out pairs", "gold against KL, three seeds")
    fig, axes = panels(plt, 2, 3, *titles)
    for run, colour, name in (("dpo", BLUE, "β = 0.3"), ("dpo_beta003", RED, "β = 0.03")):
        for ax, key in zip(axes[:5], ("loss", "logp_chosen", "kl", "margin", "eval/acc")):
            ax.plot(*column(run, key), color=colour, lw=1, label=name)
        axes[1].plot(*column(run, "logp_rejected"), color=colour, lw=1, alpha=0.4, label="… rejected")
    axes[0].axhline(math.log(2), color="black", ls=":", label="log 2")
    for beta, colour in (("0.3", BLUE), ("0.1", GREEN), ("0.03", RED)):
        points = column("dpo_beta", f"gold_{beta}", f"kl_{beta}", BENCH)
        axes[5].plot(*points, "o", color=colour, label=f"β = {beta}")
    gold = column("dpo_beta", "gold_sft", "seed", BENCH)[1]
    axes[5].plot([0] * len(gold), gold, "s", color=GREY, label="SFT")
    axes[5].set_xlabel("KL to SFT, nats per sequence")
    axes[2].set_yscale("symlog", linthresh=1)
    for i in (0, 1, 5):
        axes[i].legend(fontsize=8)
    return fig


def draw_distill(plt):
    titles = ("kl, nats per sequence", "reward: accuracy while sampling", "len, tokens")
    fig, (a, b, c) = panels(plt, 1, 3, *titles)
    a.plot(*column("chain_distill", "kl"), color=BLUE, label="kl, exact")
    a.plot(*column("chain_distill", "eval/kl"), "o", color=GREEN, label="eval/kl, one sample a prompt")
    a.set_yscale("log")
    for run, colour, name in (("chain_distill", BLUE, "distillation"), ("chain_grpo", GREY, "GRPO")):
        b.plot(*column(run, "reward"), color=colour, label=name)
        c.plot(*column(run, "len"), color=colour, label=name)
    a.legend()
    b.legend()
    return fig


def draw_reading(plt):
    titles = ("chain, SFT: loss stands still, then drops", "reward model: 50% at first",
              "PPO: clip is near 0", "DPO: k1 of the last samples, 2% below 0", "DPO: both log-probs fall",
              "entropy: chain to 0, reviews not")
    fig, (a, b, c, d, e, f) = panels(plt, 2, 3, *titles)
    a.plot(*column("chain_sft", "loss"), color=GREY, lw=1)
    b.plot(*column("rm", "acc"), color=GREY, lw=1, alpha=0.6, label="acc (noisy labels)")
    b.plot(*column("rm", "eval/acc"), "o-", color=GREEN, label="eval/acc (no noise)")
    c.plot(*column("ppo", "clip"), color=BLUE)
    d.plot(*column("dpo_k1", "k1", "sample"), ".", color=BLUE)
    d.axhline(0, color="black", ls=":")
    d.set_xlabel("sample, in order of k1")
    for key, colour in (("logp_chosen", GREEN), ("logp_rejected", RED)):
        steps, values = column("dpo", key)
        e.plot(steps, values, color=colour, lw=0.5, alpha=0.4)
        means = [sum(values[i : i + 25]) / 25 for i in range(0, len(values) - 24, 25)]
        e.plot(steps[12::25], means, ".-", color=colour, label=f"{key}, means of 25 steps")
    for run in ("ppo", "chain_ppo"):
        f.plot(*column(run, "entropy"), label=run)
    for ax in (b, e, f):
        ax.legend(fontsize=8)
    return fig


def main():
    if sys.argv[1:] not in ([], ["--run"]):
        sys.exit(__doc__)
    if sys.argv[1:]:
        run_all()
    write_variants()
    plt = pyplot()
    if plt is None:
        return
    for name, draw in (("sft", draw_sft), ("rm", draw_rm), ("ppo", draw_ppo), ("chain", draw_chain),
                       ("grpo", draw_grpo), ("overoptimisation", draw_overoptimisation), ("dpo", draw_dpo),
                       ("distill", draw_distill), ("reading", draw_reading)):
        save_figure(draw(plt), str(IMG / f"{name}.png"))


if __name__ == "__main__":
    main()
