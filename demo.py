"""The whole of RLHF in one command, on a laptop: language model, reward model and PPO policy, from nothing.

    SFT    a small GPT learns to write reviews from 4,000 demonstrations                        train_sft.py
    RM     it writes two answers to each of 4,000 prompts; noisy preferences between them
           train a reward model                                                                 train_rm.py
    PPO    the policy climbs the reward model, held to the SFT model by a KL penalty            train_ppo.py
    PPO    once more without the penalty: the proxy climbs on while the text falls apart        --beta 0
    report report.png, report.json, a table, and five answers before and after

`gold` is the hidden scorer that the preferences come from. The trainers never see it: it is read here, after
training, from the samples that the runs wrote.

CPU   python demo.py            about 2 minutes on one core
"""

import csv
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import dataclass

import torch

import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import Interrupted, derive_seed, require
from nanorlhf.hub.files import write_jsonl
from nanorlhf.look.plots import pyplot, save_figure
from nanorlhf.metrics import mean_se
from nanorlhf.run.cli import run_cli

STAGES = ("sft", "rm", "ppo", "ppo_nokl")  # the run folders within --out


@dataclass
class Config:
    seed: int = 0  # every random number of all four runs is derived from it
    out: str = "runs/demo"  # folder of the report and of the runs: sft, rm, ppo, ppo_nokl
    overwrite: bool = False  # replace what --out holds
    smoke: bool = False  # the smallest size, to see that everything runs; learns nothing
    samples: int = 512  # held-out prompts to judge on
    threads: int = 0  # CPU threads; 0: one, which is fastest for models of this size


# ------------------------------------------------------------------------------------------------------------
# judging: the only reader of gold


@dataclass
class Judged:
    """What one policy wrote on the held-out prompts; figures are mean and standard error over the prompts."""

    responses: list[str]
    gold: tuple[float, float]
    proxy: tuple[float, float]
    kl: tuple[float, float]  # nats per sequence: Σ_t log π − log π_SFT over the response
    length: tuple[float, float]  # tokens
    unique: float  # share of distinct responses: a policy can win by one template


@torch.no_grad()
def judge(folder, sft, rm, prompts, seed):
    """Fresh samples of the policy in `folder`, scored by gold and the reward model, and their KL to SFT."""
    policy, tok = hub.load(folder)
    task = tasks.get("reviews")
    seed = derive_seed(seed, "judge")
    rolls, texts = generate.respond(policy, tok, prompts, 1, task.max_new_tokens, seed=seed)
    gold = torch.tensor([tasks.gold(p, t) for p, t in zip(prompts, texts)])
    proxy = torch.cat([rm.rewards(roll.tokens, roll.lengths) for roll in rolls])
    k1 = torch.cat([(roll.logp - sft.logprobs(roll.tokens, roll.mask)[0]).sum(1) for roll in rolls])
    length = torch.cat([roll.response_len for roll in rolls]).float()
    unique = len(set(texts)) / len(texts)
    return Judged(texts, mean_se(gold), mean_se(proxy), mean_se(k1), mean_se(length), unique)


def gold_along(out):
    """Gold of the rollouts that PPO logged while it ran: samples.jsonl → steps, mean gold."""
    scores = {}
    with open(f"{out}/samples.jsonl", encoding="utf-8") as f:
        for row in map(json.loads, f):
            scores.setdefault(row["step"], []).append(tasks.gold(row["prompt"], row["response"]))
    return list(scores), [sum(s) / len(s) for s in scores.values()]


# ------------------------------------------------------------------------------------------------------------
# the report


def column(out, name):
    with open(f"{out}/metrics.csv", newline="") as f:
        points = [(int(r["step"]), float(r[name])) for r in csv.DictReader(f) if r[name]]
    return list(zip(*points)) or [(), ()]


def draw(out):
    """report.png, eight panels; the second is over-optimisation."""
    plt = pyplot()
    if plt is None:
        return
    runs = ((f"{out}/ppo", "PPO", "tab:blue"), (f"{out}/ppo_nokl", "PPO, β = 0", "tab:red"))
    fig, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    a = axes.flat
    for run, name, colour in runs:
        a[0].plot(*column(run, "reward"), color=colour, label=name)
        steps, gold = gold_along(run)
        a[1].plot(*column(run, "reward"), color=colour, ls="--", alpha=0.6, label=f"{name}: proxy")
        a[1].plot(steps, gold, color=colour, label=f"{name}: gold")
        for ax, metric in zip(a[2:5], ("kl", "entropy", "len")):
            ax.plot(*column(run, metric), color=colour, label=name)
        kl = dict(zip(*column(run, "kl")))
        a[5].plot([math.sqrt(max(kl[s], 0.0)) for s in steps], gold, ".-", color=colour, label=name)
    a[6].plot(*column(f"{out}/sft", "loss"), color="tab:gray", alpha=0.5, label="training")
    a[6].plot(*column(f"{out}/sft", "eval/loss"), "o-", color="tab:green", label="held out")
    a[7].plot(*column(f"{out}/rm", "acc"), color="tab:gray", alpha=0.5, label="training, noisy labels")
    a[7].plot(*column(f"{out}/rm", "eval/acc"), "o-", color="tab:green", label="held out, no noise")
    a[7].axhline(column(f"{out}/rm", "eval/acc_len_only")[1][-1], color="black", ls=":", label="length only")
    titles = (
        "reward model's score (proxy)",
        "over-optimisation: proxy and gold",
        "KL to the SFT model, nats",
        "entropy, nats per token",
        "response length, tokens",
        "gold against √KL",
        "SFT loss, nats per token",
        "reward model accuracy",
    )
    for ax, title in zip(a, titles):
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.legend(fontsize=8)
    a[1].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))  # the corners are full of curves
    if a[2].get_ylim()[1] > 10:
        a[2].set_yscale("symlog", linthresh=10)
    a[5].set_xlabel("√KL")
    save_figure(fig, f"{out}/report.png")


def print_report(judged, prompts, report):
    print("\nOn held-out prompts, mean ± standard error; KL in nats per sequence:\n")
    print(f"{'':10}{'gold':>14}{'proxy':>14}{'KL to SFT':>15}{'length':>14}{'unique':>8}")
    for name, j in judged.items():
        columns = ((7, j.gold), (7, j.proxy), (8, j.kl), (7, j.length))
        cells = "".join(f"{round(m, 2) + 0.0:{w}.2f} ± {se:.2f}" for w, (m, se) in columns)
        print(f"{name:10}{cells}{j.unique:>8.2f}")
    print(f"\nReward model: {report['rm_acc']:.1%} of held-out pairs in gold's order "
          f"(by length alone: {report['rm_acc_len_only']:.1%})")
    before, after, nokl = judged.values()
    for prompt in list(dict.fromkeys(prompts))[:5]:
        i = prompts.index(prompt)
        print(f"\n{prompt}")
        for name, j in (("SFT", before), ("PPO", after), ("β = 0", nokl)):
            text = textwrap.wrap(j.responses[i].strip(), 72) or ["(nothing)"]
            print("\n".join(f"{head:>5} │ {line}" for head, line in zip([name] + [""] * len(text), text)))


def peak_rss_mb():
    """Largest resident memory of this process so far, in MB; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def train(cfg):
    """SFT → RM → PPO, with and without KL, and the report → the dict that report.json holds."""
    clock = time.perf_counter()
    require(cfg.samples >= 5, f"--samples {cfg.samples}: must be at least 5")
    held = [x for x in (*STAGES, "report.json") if os.path.exists(f"{cfg.out}/{x}")]
    require(cfg.overwrite or not held, f"--out {cfg.out} holds {', '.join(held)} already: add --overwrite to "
                                       "replace all of it, or name another folder")
    out, smoke = cfg.out, cfg.smoke
    common = dict(seed=cfg.seed, threads=cfg.threads, overwrite=True, device="cpu", save_every=0)
    stages = (
        ("SFT: learn to write reviews", train_sft, "sft", dict(demos=300, steps=20) if smoke else {}),
        ("RM: learn what people prefer", train_rm, "rm", dict(pairs=100, steps=8) if smoke else {}),
        ("PPO: climb the reward model, held by the KL penalty", train_ppo, "ppo", {}),
        ("PPO with β = 0: the same without the penalty", train_ppo, "ppo_nokl", dict(beta=0.0)),
    )
    finals = {}
    for i, (title, trainer, name, flags) in enumerate(stages, start=1):
        print(f"\n── {i}/4  {title}  ({time.perf_counter() - clock:.0f} s so far)", flush=True)
        if trainer is not train_sft:
            flags = flags | {"init": f"{out}/sft/model"}
        if trainer is train_ppo:
            flags = flags | {"rm": f"{out}/rm/model", "sample_every": 2}
            flags |= dict(steps=3, prompts_per_step=16, eval_prompts=16) if smoke else {}
        try:
            finals[name] = trainer.train(trainer.Config(out=f"{out}/{name}", **flags, **common))
        except Interrupted as e:
            e.args = ("interrupted; the demo does not resume: run it again with --overwrite",)
            raise

    samples = 32 if smoke else cfg.samples
    rows = tasks.get("reviews").prompts("test", samples, derive_seed(cfg.seed, "judge"))
    prompts = [r["prompt"] for r in rows]
    sft, rm = hub.load(f"{out}/sft/model")[0], hub.load(f"{out}/rm/model")[0]
    judged = {title: judge(f"{out}/{name}/model", sft, rm, prompts, cfg.seed)
              for title, name in (("SFT", "sft"), ("PPO", "ppo"), ("PPO, β = 0", "ppo_nokl"))}
    report = {"rm_acc": finals["rm"]["eval/acc"], "rm_acc_len_only": finals["rm"]["eval/acc_len_only"]}
    for name, j in zip(("sft", "ppo", "ppo_nokl"), judged.values()):
        report |= {f"gold_{name}": j.gold[0], f"gold_{name}_se": j.gold[1], f"proxy_{name}": j.proxy[0],
                   f"proxy_{name}_se": j.proxy[1], f"kl_{name}": j.kl[0], f"kl_{name}_se": j.kl[1],
                   f"len_{name}": j.length[0], f"len_{name}_se": j.length[1], f"unique_{name}": j.unique}
    write_jsonl(f"{out}/before_after.jsonl", [dict(zip(("prompt", "sft", "ppo", "ppo_nokl"), row)) for row in
                                              zip(prompts, *(j.responses for j in judged.values()))])
    draw(out)
    print_report(judged, prompts, report)
    t = os.times()
    report |= {
        "cpu_seconds": t.user + t.system + t.children_user + t.children_system,
        "wall_seconds": time.perf_counter() - clock,
        "peak_rss_mb": peak_rss_mb(),
        "seed": float(cfg.seed),
    }
    with open(f"{out}/report.json.tmp", "w") as f:
        json.dump(report, f, indent=2)
    os.replace(f"{out}/report.json.tmp", f"{out}/report.json")
    print(f"\n{report['cpu_seconds']:.0f} CPU-seconds, {report['wall_seconds']:.0f} s wall, "
          f"{report['peak_rss_mb']:.0f} MB at most.\n"
          f"Written: {out}/report.png, {out}/report.json")
    return report


if __name__ == "__main__":
    sys.exit(run_cli(Config, train, __doc__))
