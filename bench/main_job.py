"""The figures of the README's main table: the demo over five seeds, and PPO on `chain` over three.

    python bench/main_job.py                  about 10 minutes; writes bench/results/demo.csv and chain.csv
    python bench/main_job.py --seeds 0,1      other seeds

Every figure is measured on held-out prompts after training; goals stand beside the medians. Run it on a quiet
machine: CPU seconds are those of the whole process of each run, its imports included.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "bench", "results")


def run(*command):
    """Run one of our scripts in a process of its own → CPU seconds it took."""
    before = os.times()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def rows_of(folder):
    """The log of a run, a dict of texts for each step."""
    with open(f"{folder}/metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def last_row(folder, column):
    values = [float(r[column]) for r in rows_of(folder) if r[column]]
    return values[0], values[-1]


def rewards(rows):
    """A log → held-out reward before and after, the last one greedily, and the mean over the curve."""
    return {
        "first": float(rows[0]["eval/reward"]),
        "last": float(rows[-1]["eval/reward"]),
        "greedy": float(rows[-1]["eval/greedy"]),
        "curve": statistics.mean(float(row["reward"]) for row in rows),
    }


def print_row(row):
    """One line of name=value."""
    cells = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print(*cells, flush=True)


def demo(seed, tmp):
    run("demo.py", "--seed", str(seed), "--out", f"{tmp}/demo{seed}")
    with open(f"{tmp}/demo{seed}/report.json") as f:
        return json.load(f)


def chain(seed, tmp):
    common = ["--task", "chain", "--seed", str(seed)]
    sft, ppo = f"{tmp}/chain{seed}-sft", f"{tmp}/chain{seed}-ppo"
    cpu_sft = run("train_sft.py", *common, "--out", sft)
    cpu_ppo = run("train_ppo.py", *common, "--init", f"{sft}/model", "--out", ppo)
    sampled, greedy, length = (last_row(ppo, c) for c in ("eval/reward", "eval/greedy", "len"))
    return {
        "seed": seed, "sampled_before": sampled[0], "sampled_after": sampled[1], "greedy_before": greedy[0],
        "greedy_after": greedy[1], "len_before": length[0], "len_after": length[1],
        "cpu_seconds_sft": cpu_sft, "cpu_seconds_ppo": cpu_ppo,
    }


def write(name, rows):
    os.makedirs(RESULTS, exist_ok=True)
    with open(f"{RESULTS}/{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        cells = [{k: v if isinstance(v, str) else f"{v:.5g}" for k, v in row.items()} for row in rows]
        writer.writerows(cells)


def show(title, rows, goals):
    print(f"\n{title}, seeds {', '.join(str(int(r['seed'])) for r in rows)}")
    for name, (value, goal, ok) in goals.items():
        values = [value(r) for r in rows]
        verdict = "PASS" if all(map(ok, values)) else "MISS"
        each = " ".join(f"{v:.3g}" for v in values)
        print(f"  {verdict}  {name:<42} median {statistics.median(values):<7.3g} goal {goal:<8} each: {each}")


def main():
    seeds = sys.argv[2].split(",") if sys.argv[1:2] == ["--seeds"] else ["0", "1", "2", "3", "4"]
    with tempfile.TemporaryDirectory() as tmp:
        demos = [demo(int(s), tmp) for s in seeds]
        write("demo", demos)
        chains = [chain(int(s), tmp) for s in seeds[:3]]
        write("chain", chains)
    show("python demo.py", demos, {
        "CPU seconds, everything": (lambda r: r["cpu_seconds"], "≤ 150", lambda v: v <= 150),
        "wall seconds": (lambda r: r["wall_seconds"], "≤ 120", lambda v: v <= 120),
        "peak memory, MB": (lambda r: r["peak_rss_mb"], "< 1500", lambda v: v < 1500),
        "reward model, held-out accuracy": (lambda r: r["rm_acc"], "≥ 0.80", lambda v: v >= 0.8),
        "… above length-only": (lambda r: r["rm_acc"] - r["rm_acc_len_only"], "≥ 0.10", lambda v: v >= 0.1),
        "gold, PPO − SFT": (lambda r: r["gold_ppo"] - r["gold_sft"], "≥ 1.5", lambda v: v >= 1.5),
        "KL(policy‖SFT), nats per sequence": (lambda r: r["kl_ppo"], "≤ 6", lambda v: v <= 6),
        "unique outputs / SFT's": (lambda r: r["unique_ppo"] / r["unique_sft"], "≥ 0.8", lambda v: v >= 0.8),
        "β = 0: proxy − PPO's": (lambda r: r["proxy_ppo_nokl"] - r["proxy_ppo"], "≥ 0", lambda v: v >= 0),
        "β = 0: gold − PPO's": (lambda r: r["gold_ppo_nokl"] - r["gold_ppo"], "≤ −1", lambda v: v <= -1),
    })
    show("python train_ppo.py --task chain", chains, {
        "sampled accuracy before": (lambda r: r["sampled_before"], "≤ 0.50", lambda v: v <= 0.5),
        "sampled accuracy after": (lambda r: r["sampled_after"], "≥ 0.90", lambda v: v >= 0.9),
        "greedy accuracy before": (lambda r: r["greedy_before"], "≤ 0.2", lambda v: v <= 0.2),
        "greedy accuracy after": (lambda r: r["greedy_after"], "≥ 0.95", lambda v: v >= 0.95),
    })


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
