"""Every method of variants/ for PPO and GRPO beside the trainer as it is, from the same SFT models.

    python bench/variant_runs.py                       chain, five seeds → bench/results/variants_chain.csv
    python bench/variant_runs.py --task countdown
    python bench/variant_runs.py --seeds 3 sapo gmpo   these methods only; no CSV is written

Two runs at a time, each on one thread. Finished runs stay in out/variants/, and the same command goes on from
there; remove the folder when the code has changed. A method is compared with runs of its trainer that have
the same seeds and the same flags, pair by pair: the interval is Student's, 95%, of the mean difference. One
in twenty methods that change nothing would be told apart by it.
"""

import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from main_job import RESULTS, ROOT, rewards, rows_of, write

sys.path.insert(0, ROOT)
import variants  # noqa: E402

OUT = f"{ROOT}/out/variants"
PLAIN = {"train_grpo.py": "grpo", "train_ppo.py": "ppo"}  # what the trainer as it is is called
STALE = "--off_policy_steps 4"
# Flags of the method's runs and of those it is compared with: without stale samples these change nothing.
STALE_METHODS = "dual_clip geo_mask icepop off_policy_mask seq_mis seq_tis tis vespo"
COMMON = {name: STALE for name in STALE_METHODS.split()}
COMMON |= {"opo": "--minibatches 1", "ppo_dual_clip": "--epochs 4", "remax": "--minibatches 1"}
# Flags of the method alone, where its published constant is meant for long answers.
OWN = {"length_adaptive_lam": "--lam_alpha 2", "geo_mask": "--geo_band 0.1", "reinforce_pp": "--kl none"}
# The curve of countdown rises fastest in its first third, and 200 runs of it all would take four hours.
OF_TASK = {"chain": "", "countdown": "--steps 60"}
QUANTILE = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
FIGURES = ("last", "curve")  # what is compared


def command(name, task, seed, flags):
    """→ the command of one run, the folder that it leaves. name: a method, or grpo, ppo, sft."""
    parts = [name, *flags.replace("--", "").split(), str(seed)]
    out = f"{OUT}/{task}/{'-'.join(parts)}"
    trainer = [f"train_{name}.py"]
    if name in variants.NAMES:
        trainer = ["-m", "variants", name, "run"]
    words = [*trainer, "--task", task, "--seed", str(seed), "--out", out, "--threads", "1"]
    words += ["--save_every", "0"]
    if name != "sft":
        words += ["--init", f"{OUT}/{task}/sft-{seed}/model", *flags.split()]
        words += OF_TASK[task].split()
    return words, out


def finish(job):
    """Run one job unless its model is there already → its folder if it failed, else None; prints a line."""
    words, out = command(*job)
    if os.path.exists(f"{out}/model/config.json"):
        return
    done = subprocess.run([sys.executable, *words, "--overwrite"], cwd=ROOT, capture_output=True, text=True)
    print(out if done.returncode == 0 else f"FAILED {out}: {done.stderr.strip()}", flush=True)
    return out if done.returncode else None


def measure(folder):
    """The figures of a run: held-out accuracy before and after, and the mean over the curve of training."""
    rows = rows_of(folder)
    return rewards(rows) | {
        "entropy": statistics.mean(float(row["entropy"]) for row in rows[-10:]),
        "len": statistics.mean(float(row["len"]) for row in rows[-10:]),
    }


def interval(differences):
    """→ the mean of paired differences, and half the width of its 95% interval."""
    n = len(differences)
    half = QUANTILE[n - 1] * statistics.stdev(differences) / n**0.5
    return statistics.mean(differences), half


def compare(name, rows, plain):
    """Two lists of figures, seed by seed → one line: mean differences, and if they are told from 0."""
    cells = []
    for figure in FIGURES:
        mean, half = interval([a[figure] - b[figure] for a, b in zip(rows, plain)])
        word = "told apart" if abs(mean) > half else "not told apart"
        cells.append(f"{figure} {mean:+.3f} ± {half:.3f} {word:<15}")
    return f"{name:<22}{'  '.join(cells)}"


def pairs_of(names):
    """→ {method: (its job, the job that it is compared with)}; a job is a name and the flags of its runs."""
    pairs = {}
    for name in names:
        trainer = variants.method(name).TRAINER
        if trainer in PLAIN:
            common = COMMON.get(name, "")
            flags = f"{common} {OWN.get(name, '')}".strip()
            pairs[name] = (name, flags), (PLAIN[trainer], common)
    return pairs


def cells(task):
    """The CSV of a task → {method: what its page says}: both differences in points, bold if told apart.

    Without a CSV, or without the method's rows in it, there is nothing to say yet.
    """
    found = {}
    path = f"{RESULTS}/variants_{task}.csv"
    if os.path.exists(path):
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                found.setdefault((row["variant"], row["flags"]), []).append(row)
    page = {}
    for name, (job, plain) in pairs_of(variants.NAMES).items():
        if job in found and plain in found:
            parts = []
            for figure in FIGURES:
                pairs = zip(found[job], found[plain])
                mean, half = interval([100 * float(a[figure]) - 100 * float(b[figure]) for a, b in pairs])
                text = f"{mean:+.1f} ± {half:.1f}".replace("-", "−")
                parts.append(f"**{text}**" if abs(mean) > half else text)
            page[name] = ", ".join(parts)
    return page


def main(argv):
    options = {"--task": "chain", "--seeds": "5"}
    names = []
    words = iter(argv)
    for word in words:
        if word in options:
            options[word] = next(words)
        else:
            names.append(word)
    task = options["--task"]
    seeds = range(int(options["--seeds"]))
    if not 2 <= len(seeds) <= 10:
        sys.exit(f"--seeds {len(seeds)}: must be 2 to 10, for an interval")
    pairs = pairs_of(names or variants.NAMES)
    jobs = sorted({job for pair in pairs.values() for job in pair})
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(finish, [("sft", task, seed, "") for seed in seeds]))
        failed += pool.map(finish, [(name, task, seed, flags) for seed in seeds for name, flags in jobs])
    if any(failed):
        sys.exit(f"{len(list(filter(None, failed)))} runs failed; nothing is written")

    found = {}
    table = []
    for name, flags in jobs:
        found[name, flags] = [measure(command(name, task, seed, flags)[1]) for seed in seeds]
        for seed, figures in zip(seeds, found[name, flags]):
            table.append({"variant": name, "flags": flags, "seed": seed, **figures})
    for name, (job, plain) in pairs.items():
        print(compare(name, found[job], found[plain]))
    if not names:
        write(f"variants_{task}", table)


if __name__ == "__main__":
    main(sys.argv[1:])
