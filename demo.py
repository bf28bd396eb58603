"""The whole of RLHF in one command, on a laptop: language model, reward model and PPO policy, from nothing.

    SFT    a small GPT learns to write reviews from 4,000 demonstrations                        train_sft.py
    RM     it writes two answers to each of 4,000 prompts; noisy preferences between them
           train a reward model                                                                 train_rm.py
    PPO    the policy climbs the reward model, held to the SFT model by a KL penalty            train_ppo.py
    PPO    once more without the penalty: the proxy climbs on while the text falls apart        --beta 0
    report report.png, report.json, a table, and five answers before and after

The proxy is the reward model's score. Gold is the hidden score that the preferences come from. No trainer
sees gold: this file computes it after training, from the samples that the runs wrote.

CPU   python demo.py            about 2 minutes on one core, less on two
"""

import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import torch

import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import Interrupted, RunError, derive_seed, require
from nanorlhf.hub.files import read_jsonl, write_jsonl
from nanorlhf.look import page
from nanorlhf.look.plots import nats, pyplot, save_figure, values_at
from nanorlhf.metrics import mean_se
from nanorlhf.run.cli import run_cli
from nanorlhf.run.device import setup
from nanorlhf.run.folders import read_rows, require_plain, write_json

POLICIES = {"sft": "SFT", "ppo": "PPO", "ppo_nokl": "PPO, β = 0"}  # run folder: name in tables and figures


@dataclass
class Config:
    seed: int = 0  # every random number of all four runs is derived from it
    out: str = "runs/demo"  # folder of the report and of the runs: sft, rm, ppo, ppo_nokl
    overwrite: bool = False  # replace what --out holds
    smoke: bool = False  # the smallest size, to see that everything runs; learns nothing
    samples: int = 512  # held-out prompts to judge on
    threads: int = 0  # CPU threads of each run; 0: one, which is fastest for models of this size


# ------------------------------------------------------------------------------------------------------------
# training


def train_models(cfg, prompt, seed, start):
    """SFT → RM → PPO with and without the KL penalty → the last metrics of the reward model.

    The untrained model and the SFT model answer `prompt`, sampled from `seed`. `start` is the time at which
    the demo began, in seconds of time.perf_counter.
    """
    common = dict(seed=cfg.seed, threads=cfg.threads, device="cpu", overwrite=True, save_every=0)
    sft = common | {"out": f"{cfg.out}/sft"}
    rm = common | {"out": f"{cfg.out}/rm", "init": f"{cfg.out}/sft/model"}
    ppo = rm | {"out": f"{cfg.out}/ppo", "rm": f"{cfg.out}/rm/model", "sample_every": 2}
    if cfg.smoke:
        sft |= {"demos": 300, "steps": 20}
        rm |= {"pairs": 100, "steps": 8}
        ppo |= {"steps": 3, "prompts_per_step": 16, "eval_prompts": 16}
    ppo_nokl = ppo | {"out": f"{cfg.out}/ppo_nokl", "beta": 0.0}

    print_title("1/4  SFT: learn to write reviews", start)
    sft_config = train_sft.Config(**sft)
    device = setup(sft_config)
    model, tok, _, _ = train_sft.load(sft_config, device)  # the weights that SFT starts from; about a second
    first_look("untrained", model, tok, prompt, seed)
    train_sft.train(sft_config)
    model, tok = hub.load(f"{cfg.out}/sft/model")
    first_look("SFT", model, tok, prompt, seed)

    print_title("2/4  RM: learn what people prefer", start)
    rm_metrics = train_rm.train(train_rm.Config(**rm))

    print_title("3/4  PPO: climb the reward model, held by the KL penalty", start)
    last_title = "4/4  PPO with β = 0: the same without the penalty"
    if free_cores() < 2 * max(1, cfg.threads):
        train_ppo.train(train_ppo.Config(**ppo))
        print_title(last_title, start)
        train_ppo.train(train_ppo.Config(**ppo_nokl))
        return rm_metrics
    print("4/4 runs at the same time, in a second process.", flush=True)
    printed = ppo_side_by_side(ppo, ppo_nokl)
    print_title(last_title, start)
    print("The last lines that it printed, in the columns of 3/4:")
    print("\n".join(printed.splitlines()[-6:]))
    return rm_metrics


def print_title(title, start):
    print(f"\n── {title}  ({time.perf_counter() - start:.0f} s so far)", flush=True)


def first_look(name, model, tok, prompt, seed):
    roll = answer(model, tok, [prompt], seed)
    print(f"\n{prompt}")
    print_answer(name, roll.texts[0])


def free_cores():
    """CPU cores that this process may use; under taskset or in a batch job fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ppo_side_by_side(ppo, ppo_nokl):
    """Run PPO with the flags `ppo` here and with `ppo_nokl` in a child process → what the child printed.

    A run derives its random numbers from its seed alone, so both write the same numbers as one after the
    other. Raises RunError with the child's message if the child fails.
    """
    command = [sys.executable, train_ppo.__file__]
    command += [f"--{flag}={value}" for flag, value in ppo_nokl.items()]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")
    try:
        train_ppo.train(train_ppo.Config(**ppo))
        printed, errors = child.communicate()
    finally:  # after Ctrl-C or an error here the child would train on
        child.terminate()
        child.wait()
    if child.returncode != 0:
        lines = errors.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RunError(f"PPO with β = 0 failed: {lines[-1]}")
    return printed


# ------------------------------------------------------------------------------------------------------------
# judging: gold is read only here


def answer(policy, tok, prompts, seed):
    """One sample for each prompt → Rollout with texts. The first does not depend on the others."""
    longest = tasks.get("reviews").max_new_tokens
    batch = len(prompts)  # all in one Rollout
    rolls, _ = generate.respond(policy, tok, prompts, 1, longest, seed=seed, batch=batch)
    return rolls[0]


@torch.no_grad()
def judge(out, name, sft, rm, prompts, seed):
    """Fresh samples of the policy in the run folder `name` → texts, their figures for report.json.

    Figures are means over the prompts and standard errors, `gold_ppo` and `gold_ppo_se`: gold, proxy, len in
    tokens, and kl, which is Σ_t log π − log π_SFT over a response, in nats. `unique_ppo` is the share of
    distinct responses: a policy can win by one template.
    """
    policy, tok = hub.load(f"{out}/{name}/model")
    roll = answer(policy, tok, prompts, seed)
    sft_logp = sft.logprobs(roll.tokens, roll.mask)[0]  # (B, T)
    values = {  # (B,) each
        "gold": torch.tensor(list(map(tasks.gold, prompts, roll.texts))),
        "proxy": rm.rewards(roll.tokens, roll.lengths),
        "kl": (roll.logp - sft_logp).sum(1),
        "len": roll.response_len.float(),
    }
    figures = {f"unique_{name}": len(set(roll.texts)) / len(prompts)}
    for figure, value in values.items():
        mean, se = mean_se(value)
        figures[f"{figure}_{name}"] = mean
        figures[f"{figure}_{name}_se"] = se
    return roll.texts, figures


def gold_along(folder):
    """The rollouts that a PPO run logged in samples.jsonl → {step: mean gold}."""
    golds = {}
    for row in read_jsonl(f"{folder}/samples.jsonl", ("prompt", "response")):
        gold = tasks.gold(row["prompt"], row["response"])
        golds.setdefault(row["step"], []).append(gold)
    return {step: sum(values) / len(values) for step, values in golds.items()}


# ------------------------------------------------------------------------------------------------------------
# the report


def column(folder, name):
    """One column of a run's metrics.csv → {step: value}, the steps at which it was measured."""
    return values_at(read_rows(folder), name)


def curve(ax, value_at, label, colour, line="-"):
    """Draw {step: value} as one line."""
    values = list(value_at.values())
    ax.plot(list(value_at), values, line, color=colour, label=label)


def draw(out):
    """report.png, eight panels; the second is over-optimisation."""
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    proxy, both, kl, entropy, length, frontier, sft, rm = axes.flat

    for run, colour in {"ppo": "tab:blue", "ppo_nokl": "tab:red"}.items():
        folder = f"{out}/{run}"
        name = POLICIES[run]
        gold_at = gold_along(folder)
        kl_at = column(folder, "kl")
        root_kl = [math.sqrt(max(kl_at[step], 0.0)) for step in gold_at]
        curve(proxy, column(folder, "reward"), name, colour)
        curve(both, column(folder, "reward"), f"{name}: proxy", colour, "--")
        curve(both, gold_at, f"{name}: gold", colour)
        curve(kl, kl_at, name, colour)
        curve(entropy, column(folder, "entropy"), name, colour)
        curve(length, column(folder, "len"), name, colour)
        golds = list(gold_at.values())
        frontier.plot(root_kl, golds, ".-", color=colour, label=name)
    curve(sft, column(f"{out}/sft", "loss"), "training", "silver")
    curve(sft, column(f"{out}/sft", "eval/loss"), "held out", "tab:green", "o-")
    curve(rm, column(f"{out}/rm", "acc"), "training, noisy labels", "silver")
    curve(rm, column(f"{out}/rm", "eval/acc"), "held out, no noise", "tab:green", "o-")
    curve(rm, column(f"{out}/rm", "eval/acc_len_only"), "held out, by length only", "black", ":")
    names = {
        "reward model's score (proxy)": "mean score of the samples",
        "over-optimisation: proxy and gold": "mean score of the samples",
        "KL to the SFT model": "nats a response",
        "entropy": "nats a token",
        "response length": "tokens",
        "gold against √KL": "gold, the hidden judge's mean score",
        "SFT loss": "nats a token",
        "reward model accuracy": "share of pairs in order",
    }
    for ax, (title, unit) in zip(axes.flat, names.items()):
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # there is no step 0.5
        ax.legend(fontsize=8)
    low, high = both.get_ylim()
    both.set_ylim(bottom=low - 0.4 * (high - low))  # room for the legend
    meaning = "proxy: the reward model's score, gold: the hidden judge's"
    both.legend(fontsize=8, title=meaning, title_fontsize=8, ncols=2, loc="lower center")
    frontier.set_xlabel("√KL to the SFT model, √nats")
    nats(kl)
    kl.legend(fontsize=8, loc="lower right")
    save_figure(fig, f"{out}/report.png")


def print_answer(name, text):
    """A policy's answer beside its name, in 80 columns. An untrained model samples control characters too."""
    printable = "".join(c if c.isprintable() else "\ufffd" for c in text.strip())
    for line in textwrap.wrap(printable, 68) or ["(nothing)"]:
        print(f"{name:>9} │ {line}")
        name = ""


def print_report(report, rows):
    """The table, and five rows of before_after.jsonl with different prompts."""
    print("\nOn held-out prompts, mean ± standard error; KL in nats per sequence.")
    print("gold: the hidden score behind the preferences; proxy: the reward model's score.\n")
    print(f"{'':10}{'gold':>14}{'proxy':>14}{'KL to SFT':>15}{'length':>14}{'unique':>8}")
    for name, title in POLICIES.items():
        row = f"{title:10}"
        for figure, width in {"gold": 7, "proxy": 7, "kl": 8, "len": 7}.items():
            mean = round(report[f"{figure}_{name}"], 2) + 0.0  # −0.0 + 0.0 is 0.0, which prints no minus
            se = report[f"{figure}_{name}_se"]
            row += f"{mean:{width}.2f} ± {se:.2f}"
        print(f"{row}{report[f'unique_{name}']:8.2f}")
    print(f"\nReward model: {report['rm_acc']:.1%} of held-out pairs in gold's order "
          f"(by length alone: {report['rm_acc_len_only']:.1%})")
    first_with = {}
    for row in rows:
        first_with.setdefault(row["prompt"], row)
    for prompt, row in list(first_with.items())[:5]:
        print(f"\n{prompt}")
        print_answer("SFT", row["sft"])
        print_answer("PPO", row["ppo"])
        print_answer("β = 0", row["ppo_nokl"])


def next_commands(out):
    """Commands that go on with the models of this demo, as one types them in the folder of this file."""
    python = ".venv/bin/python"
    here = os.path.realpath(".venv") == os.path.realpath(sys.prefix)
    if not here or not os.path.exists(python):  # on Windows there is no bin
        python = "python"
    out = shlex.quote(out)
    return f"""Go on with these models:

  {python} train_dpo.py --init {out}/sft/model --out {out}/dpo
  {python} train_grpo.py --task reviews --init {out}/sft/model \\
      --rm {out}/rm/model --out {out}/grpo
  {python} sample.py --model {out}/ppo/model \\
      --prompt "Film: The plot was dull."
  {python} evaluate.py --model {out}/ppo/model \\
      --ref {out}/sft/model --rm {out}/rm/model"""


def peak_rss_mb():
    """Peak resident memory in MB, of this process plus its largest child; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0.0
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return (here + child) / unit


def train(cfg):
    """SFT → RM → PPO, with and without KL, and the report → the dict that report.json holds."""
    start = time.perf_counter()
    require(5 <= cfg.samples <= 100_000, f"--samples {cfg.samples}: must be at least 5, at most 100,000")
    if os.path.isdir(cfg.out):
        require_plain(cfg.out)
    names = ["sft", "rm", "ppo", "ppo_nokl", "report.json"]
    held = ", ".join(name for name in names if os.path.exists(f"{cfg.out}/{name}"))
    advice = "add --overwrite to replace all of it, or name another folder"
    require(cfg.overwrite or not held, f"--out {cfg.out} holds {held} already: {advice}")
    samples = 32 if cfg.smoke else cfg.samples
    seed = derive_seed(cfg.seed, "judge")
    rows = tasks.get("reviews").prompts("test", samples, seed)
    prompts = [row["prompt"] for row in rows]
    try:
        rm_metrics = train_models(cfg, prompts[0], seed, start)
    except Interrupted as e:
        e.args = ("interrupted; the demo does not resume: run it again with --overwrite",)
        raise

    report = {"rm_acc": rm_metrics["eval/acc"], "rm_acc_len_only": rm_metrics["eval/acc_len_only"]}
    sft = hub.load(f"{cfg.out}/sft/model")[0]
    rm = hub.load(f"{cfg.out}/rm/model")[0]
    for name in POLICIES:
        texts, figures = judge(cfg.out, name, sft, rm, prompts, seed)
        report |= figures
        for row, text in zip(rows, texts):
            row[name] = text
    write_jsonl(f"{cfg.out}/before_after.jsonl", rows)
    draw(cfg.out)
    page.try_write(cfg.out)
    print_report(report, rows)

    report["cpu_seconds"] = sum(os.times()[:4])  # user and system, of this process and of its children
    report["wall_seconds"] = time.perf_counter() - start
    report["peak_rss_mb"] = peak_rss_mb()
    report["seed"] = float(cfg.seed)
    write_json(f"{cfg.out}/report.json", report)
    cost = f"{report['cpu_seconds']:.0f} CPU-seconds, {report['wall_seconds']:.0f} s wall"
    print(f"\n{cost}, {report['peak_rss_mb']:.0f} MB at most.")
    print(f"Written: {cfg.out}/report.png, look.html, report.json\n")
    print(next_commands(cfg.out))
    return report


if __name__ == "__main__":
    sys.exit(run_cli(Config, train, __doc__))
