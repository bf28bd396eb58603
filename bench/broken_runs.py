"""Runs that are broken on purpose, beside one that is not: docs/data/broken_*.csv and docs/img/broken.png.

    python bench/broken_runs.py                 all of them anew, and the picture: three CPU minutes, seed 0
    python bench/broken_runs.py sign late       those two alone, into runs/broken/; docs/ stays as it is
    python bench/broken_runs.py --seed 3        all of them with another seed, into runs/broken-3/
    python bench/broken_runs.py --draw          the picture alone

The right run beside them is docs/data/chain_grpo.csv, of bench/curves.py. Each is GRPO on chain from one SFT
model. A fault that no flag can make is a patch: every occurrence of a string in one source file is replaced,
in a copy of the repository; the working tree is never touched.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from curves import DATA, GREY, IMG, RED, ROOT, column, pyplot, save_figure

from nanorlhf.look import tokens

GRPO = "train_grpo.py"


class Fault(NamedTuple):
    name: str  # of docs/data/broken_NAME.csv
    title: str
    look: str  # the column that tells, drawn under the reward
    sees: str  # what is to be seen, in one line
    flags: str = ""
    patch: tuple | None = None  # file, source, replacement
    start: str = "chain-sft"  # the SFT model
    beside: str = "chain_grpo"  # the CSV of the right run, drawn in grey


RIGHT = [  # nothing is wrong here; what a fault is compared with where its flags are not the default ones
    Fault("temperature_right", "", "", "sampled and scored at 0.6", "--temperature 0.6"),
    Fault("kl_right", "", "", "k1 in the reward", "--kl k1 --kl_in reward --beta 0.3"),
    Fault("kl_k2_loss", "", "", "k2 in the loss", "--kl k2 --kl_unbiased false --beta 3"),
    Fault("stale_cispo", "", "", "CISPO with stale samples", "--off_policy_steps 8 --loss cispo"),
]
FAULTS = [
    Fault("sign", "advantage: wrong sign", "entropy", "the reward falls, the entropy rises", patch=(
        GRPO, "adv = advantages(", "adv = -advantages(")),
    Fault("lr_high", "--lr 1e-2", "clip", "best of all for three steps, then lost", "--lr 1e-2"),
    Fault("lr_low", "--lr 1e-6", "ratio_max", "nothing moves, and nothing looks broken", "--lr 1e-6"),
    Fault("early", "SFT of 100 steps, gate removed", "len", "nothing to select",
        start="chain-sft-early",
        patch=(GRPO, 'pass_gate(policy, tok, task, longest, cfg.seed)', "pass")),
    Fault("overlong", "--overlong_penalty 1", "len", "the reward falls, len with it",
        "--overlong_penalty 1"),
    Fault("late", "log-probs one position late", "kl", "the health line; kl is not 0 at step 0", patch=(
        "nanorlhf/model.py",
        "hidden = self(tokens[:, :-1], doc=doc)  #", "hidden = self(tokens, doc=doc)[:, 1:]  #")),
    Fault("temperature", "sampled at 0.6, scored at 1", "ratio_max", "the health line, not the reward",
        "--temperature 0.6", beside="broken_temperature_right", patch=(
        "nanorlhf/model.py", "self.unembedding, targets, temperature", "self.unembedding, targets, 1.0")),
    Fault("prompts", "rewards judged by another prompt", "eval/reward",
        "reward and eval/reward disagree", patch=(
        "nanorlhf/generate.py", "[rows[g] for g in roll.group.tolist()]", "list(rows) * n")),
    Fault("kl_sign", "KL in the reward: wrong sign", "kl", "kl runs away, the reward follows",
        "--kl k1 --kl_in reward --beta 0.3", (GRPO, "reward -= cfg.beta", "reward += cfg.beta"),
        beside="broken_kl_right"),
    Fault("kl_k1_loss", "k1 in the loss: no KL penalty", "kl", "kl is where it is without a penalty",
        "--kl k1 --kl_unbiased false --beta 3", beside="broken_kl_k2_loss"),
    Fault("stale", "8 steps stale, no ratio", "kl", "late, then unsteady; kl overshoots",
        "--off_policy_steps 8 --loss reinforce"),
    Fault("stale_clip", "8 steps stale, clipped ratio", "clip", "late and slow; clip is not 0",
        "--off_policy_steps 8"),
    Fault("group2", "two samples per prompt", "dead", "half of the groups are dead at step 0",
        "--group_size 2 --prompts_per_step 128"),
    Fault("eos", "EOS outside the mask", "entropy", "the token count of the health line", patch=(
        GRPO, "mask = roll.mask  # (B, T)", "mask = roll.mask = roll.mask & (roll.tokens != tok.eos_id)")),
    Fault("groups", "baseline of other prompts", "gnorm", "nothing", patch=(
        GRPO, "adv = advantages(reward, roll.group,",
        "adv = advantages(reward, torch.arange(len(mask)) % cfg.prompts_per_step,")),
    Fault("recomputed", "old log-probs recomputed", "ratio_max", "ratio_max is 1 in every row", patch=(
        GRPO, "torch.where(mask, logp - old_logp,", "torch.where(mask, logp - logp.detach(),")),
    Fault("zero_grad", "gradients never cleared", "gnorm", "gnorm is never below 1", patch=(
        GRPO, "                    opt.zero_grad()\n", "")),
]


def copy(root):
    """The sources, and nothing else."""
    shutil.copytree(ROOT / "nanorlhf", root / "nanorlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)


def python(root, command, out, seed):
    """Run a trainer of the repository at `root` → exit status, the lines of its output that matter."""
    argv = [sys.executable, *command.split(), "--seed", str(seed), "--out", str(out)]
    argv += ["--threads", "1", "--overwrite"]
    done = subprocess.run(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith(("health", "  !!", "held out"))]
    return done.returncode, told + (lines[-3:] if done.returncode else [])


def run(fault, base, seed):
    """Plant the fault in a copy, run it → exit status and lines, as `python` returns them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        if fault.patch:
            file, source, replacement = fault.patch
            text = (root / file).read_text("utf-8")
            if source not in text:
                sys.exit(f"{fault.name}: {file} does not hold {source!r}; mend the table")
            (root / file).write_text(text.replace(source, replacement), "utf-8")
        command = f"{GRPO} --init {base / fault.start / 'model'} {fault.flags}"
        return python(root, command, base / fault.name, seed)


def run_all(faults, base, seed=0, keep=None):
    """The SFT models, then the faults, two at a time; each metrics.csv goes into the folder `keep`."""
    for name, steps in {f.start: "--steps 100" if "early" in f.start else "" for f in faults}.items():
        if not (base / name / "model").exists():
            print(f"── {name}", flush=True)
            python(ROOT, f"train_sft.py --task chain {steps}", base / name, seed)
    with ThreadPoolExecutor(2) as pool:
        for fault, (status, told) in zip(faults, pool.map(lambda f: run(f, base, seed), faults)):
            print(f"── {fault.name}: {fault.sees}", *told, sep="\n   ", flush=True)
            if keep and status == 0:
                shutil.copy(base / fault.name / "metrics.csv", keep / f"broken_{fault.name}.csv")
                if fault.name == "groups":
                    keep_groups(base / fault.name, keep / "broken_groups")


def keep_groups(run, folder):
    """Of tokens.jsonl.gz the advantages of the groups at two steps: no column shows this fault."""
    records = [record for record in tokens.read(run) if "groups" in record][:2]
    kept = [tokens.pack({name: record[name] for name in ("step", "groups")}) for record in records]
    folder.mkdir(exist_ok=True)
    (folder / tokens.FILE).write_bytes(b"".join(kept))


def draw(plt, wide=3):
    """For each fault the reward, and under it the column that tells; in grey the right run."""
    high = -(-len(FAULTS) // wide)
    fig = plt.figure(figsize=(3.7 * wide, 2.9 * high), layout="constrained")
    for cell, fault in zip(fig.subfigures(high, wide, squeeze=False).flat, FAULTS):
        axes = cell.subplots(2, 1, sharex=True)
        for ax, key in zip(axes, ("reward", fault.look)):
            for name, colour in ((fault.beside, GREY), (f"broken_{fault.name}", RED)):
                points = column(name, key)
                ax.plot(*points, "o-" if len(points[0]) < 5 else "-", color=colour, lw=1.3)
            ax.grid(alpha=0.25)
            ax.set_ylabel(key)
        axes[0].set_title(fault.title, fontsize=10)
        axes[0].set_ylim(-0.03, 1.03)
        if fault.look == "ratio_max" and axes[1].get_ylim()[1] > 5:
            axes[1].set_yscale("log")
        elif fault.look == "kl" and axes[1].get_ylim()[1] > 20:
            axes[1].set_yscale("symlog", linthresh=2)
            axes[1].set_ylim(bottom=-0.2)
        if fault is FAULTS[0]:
            axes[0].legend(["the right run", "the broken one"], fontsize=8)
    return fig


def main(words):
    every = {f.name: f for f in (*RIGHT, *FAULTS)}
    if words[:1] == ["--seed"] and len(words) == 2 and words[1].isdecimal():
        return run_all(list(every.values()), ROOT / f"runs/broken-{words[1]}", int(words[1]))
    if words != ["--draw"] and not set(words) <= set(every):
        sys.exit(f"{__doc__}\nthe names: {' '.join(every)}")
    if words and words != ["--draw"]:
        return run_all([every[w] for w in words], ROOT / "runs/broken")
    if not words:
        with tempfile.TemporaryDirectory() as folder:
            run_all(list(every.values()), Path(folder), keep=DATA)
    plt = pyplot()
    if plt is not None:
        save_figure(draw(plt), str(IMG / "broken.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
