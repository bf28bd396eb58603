"""Every recipe of train_grpo on *chain*, from the same SFT models: what each choice does at this size.

    python bench/grpo_variants.py           about 7 minutes; writes bench/results/grpo_variants.csv, grpo.csv
    python bench/grpo_variants.py grpo      these rows only, printed and not written

One row per variant and seed (five seeds of the defaults, three of the others): held-out accuracy after
training (sampled and greedy), entropy, share of dead groups and length of the wrong answers over the last ten
steps, CPU seconds. All variants share learning rate, steps, prompts and group size: it is a comparison of
losses, not of tunings.
"""

import csv
import statistics
import sys
import tempfile

from main_job import run, write

RECIPES = "grpo dr_grpo rloo reinforce++ gspo cispo scalerl r1_zero deepscaler"
VARIANTS = {
    "default": "",
    **{name: f"--recipe {name}" for name in RECIPES.split()},
    "scalerl": "--recipe scalerl --constant_lr_after 5",  # in 50 steps its warm-up would not end
    "dapo": "--recipe dapo --max_new_tokens 16",  # room above the 11 tokens of a thought
    "dapo, limit 11": "--recipe dapo",  # its soft penalty then costs a thought all its reward
    "clip-higher": "--clip_high 0.28",
    "k2 in the loss": "--kl k2 --beta 0.05",
    "k3 × ratio": "--kl k3 --beta 0.05",
    "exact KL": "--kl exact --beta 0.05",
    "k1 in the reward": "--kl k1 --kl_in reward --beta 0.05",
    "two epochs": "--epochs 2 --minibatches 2",
    "4 steps stale": "--off_policy_steps 4",
    "4 steps stale, cispo": "--off_policy_steps 4 --loss cispo",
}


def measure(folder):
    with open(f"{folder}/metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    wrong = [float(r["len_wrong"]) for r in rows[-10:] if r["len_wrong"]]
    last = rows[-1]
    return {
        "sampled_before": float(rows[0]["eval/reward"]), "sampled": float(last["eval/reward"]),
        "greedy_before": float(rows[0]["eval/greedy"]), "greedy": float(last["eval/greedy"]),
        "entropy": statistics.mean(float(r["entropy"]) for r in rows[-10:]),
        "dead": statistics.mean(float(r["dead"]) for r in rows[-10:]),
        "len_before": float(rows[0]["len"]), "len": float(last["len"]),
        "len_wrong": statistics.mean(wrong) if wrong else float("nan"),
        "rounds": statistics.mean(float(r["rounds"]) for r in rows),
    }


def main():
    names = sys.argv[1:] or list(VARIANTS)
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        cpu_sft = {}
        for name in names:
            for s in range(5 if name == "default" else 3):
                sft, out = f"{tmp}/sft{s}", f"{tmp}/{len(rows)}"
                if s not in cpu_sft:
                    cpu_sft[s] = run("train_sft.py", "--task", "chain", "--seed", str(s), "--out", sft)
                common = ["--seed", str(s), "--init", f"{sft}/model", "--out", out, "--save_every", "0"]
                cpu = run("train_grpo.py", *common, *VARIANTS[name].split())
                row = {"variant": name, "seed": s, **measure(out)}
                rows.append(row | {"cpu_sft": cpu_sft[s], "cpu_grpo": cpu, "cpu": cpu_sft[s] + cpu})
            mine = [r for r in rows if r["variant"] == name]
            show = ("sampled", "greedy", "entropy", "dead", "len_wrong", "cpu_grpo")
            cells = "  ".join(f"{key} {statistics.median(r[key] for r in mine):.3g}" for key in show)
            print(f"{name:<22}{cells}", flush=True)
    if len(sys.argv) == 1:
        write("grpo_variants", rows)
        write("grpo", [r for r in rows if r["variant"] == "default"])



if __name__ == "__main__":
    main()
