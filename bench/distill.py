"""Distillation from a larger teacher against GRPO, at equal sampled tokens; and which divergence does what.

    python bench/distill.py                   five seeds, two at a time → bench/results/distill.csv
    python bench/distill.py --seeds 0,1       other seeds; what is in --out already is not made again
    python bench/distill.py --smoke           a few steps of everything, printed and not written
    python bench/distill.py --toy             the toy alone, 20 CPU-seconds → bench/results/distill_toy.csv

*countdown*. The teacher is one model of 4 layers and width 192 (SFT, then 200 steps of GRPO). Each seed's
student has the base size (2 layers, width 96) and its own SFT. From there every arm samples 512 responses of
at most six tokens in each of 200 steps: GRPO with the reward, distillation with the teacher alone. `tenth`
has 20 steps. pass@1 and pass@64 are those of 64 samples for each of 256 held-out prompts.

Estimated before any run: teacher 8 CPU-minutes, a seed 5.5 (SFT 25 s, GRPO 50 s, five distillations of 35 s
and a tenth, evaluations 35 s): 36 CPU-minutes in all, 20 minutes on two cores.

Frozen before any run:
    prediction   `reverse` ends above `grpo` in pass@1, and not below it in pass@64
    statistic    mean over the five seeds of the paired difference reverse − grpo, with its 95% t-interval
    threshold    pass@1: the interval lies above 0, and the mean is at least 0.03.
                 pass@64: the interval's lower end is at least −0.02.
    Void if the teacher's own pass@1 is not 0.05 above the mean of `grpo`: then there is nothing to learn.

The toy is enumerable: six prompts, one token of ten as the response. For each prompt the teacher gives 0.45
to two tokens each and shares the rest. The student's logits have rank two, so it cannot give every prompt two
tokens of its own. Each divergence is descended exactly, from three random starts, and the lowest end counts.
`kept` is the student's mass on the teacher's two tokens, `covered` the smaller of its two probabilities over
0.45; both are means over the prompts.
"""

import csv
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from main_job import ROOT, run, write

sys.path.insert(0, ROOT)

import train_distill  # noqa: E402
from labs.common import paired  # noqa: E402

LARGE = ["--n_layer", "4", "--d_model", "192", "--lr", "1e-3"]
SAMPLES = ["--prompts_per_step", "32", "--group_size", "16"]
ARMS = {
    "grpo": ["train_grpo.py", *SAMPLES],
    "reverse": ["train_distill.py", *SAMPLES],
    "forward": ["train_distill.py", *SAMPLES, "--divergence", "forward"],
    "jsd": ["train_distill.py", *SAMPLES, "--divergence", "jsd"],
    "as_reward": ["train_distill.py", *SAMPLES, "--as_reward"],
    "off_policy": ["train_distill.py", *SAMPLES, "--divergence", "forward", "--on_policy", "0"],
    "tenth": ["train_distill.py", *SAMPLES],
}


# ------------------------------------------------------------------------------------------------------------
# countdown


def made(folder, *command):
    """Run a trainer into `folder`, unless it is whole already → the model's folder."""
    done = f"{folder}/done"
    if not os.path.exists(done):
        run(*command, "--task", "countdown", "--out", folder, "--overwrite", "--threads", "1")
        with open(done, "w") as f:
            f.write(" ".join(command))
    return f"{folder}/model"


def measured(model, folder, prompts):
    """pass@1 and pass@64 of a model, kept in a file beside it."""
    path = f"{folder}/passed.json"
    if not os.path.exists(path):
        flags = ["--task", "countdown", "--n", "64", "--k", "1,64", "--prompts", prompts, "--threads", "1"]
        run("evaluate.py", "--model", model, *flags, "--out", path)
    with open(path) as f:
        found = json.load(f)
    return {"pass@1": found["pass@1"], "pass@64": found["pass@64"]}


def sampled(folder):
    """All tokens that a run has sampled to train on."""
    with open(f"{folder}/metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return sum(512 * float(row["len"]) for row in rows)


def one_seed(seed, out, teacher, steps, prompts):
    """Student and all arms of a seed → its row."""
    student = made(f"{out}/sft{seed}", "train_sft.py", "--seed", seed, *steps["sft"])
    row = {"seed": int(seed)}
    for name, value in measured(student, f"{out}/sft{seed}", prompts).items():
        row[f"sft_{name}"] = value
    for arm, command in ARMS.items():
        folder = f"{out}/{arm}{seed}"
        own = steps["tenth"] if arm == "tenth" else steps["rl"]
        flags = ["--seed", seed, "--init", student, *own]
        if arm != "grpo":
            flags += ["--teacher", teacher]
        model = made(folder, *command, *flags)
        for name, value in measured(model, folder, prompts).items():
            row[f"{arm}_{name}"] = value
        row[f"{arm}_tokens"] = sampled(folder)
        print(f"seed {seed}  {arm:<11}pass@1 {row[f'{arm}_pass@1']:.3f}  pass@64 {row[f'{arm}_pass@64']:.3f}",
              flush=True)  # fmt: skip
    return row


def compare(seeds, out, smoke):
    steps = {"sft": [], "large": [], "rl": ["--steps", "200"], "tenth": ["--steps", "20"]}
    prompts = "256"
    if smoke:
        few = ["--steps", "3", "--eval_prompts", "8"]
        steps = {"sft": ["--steps", "20"], "large": ["--steps", "20"], "rl": few, "tenth": few}
        prompts = "16"
    large = made(f"{out}/teacher-sft", "train_sft.py", "--seed", "100", *LARGE, *steps["large"])
    flags = ["--seed", "100", "--init", large, "--lr", "1.5e-4", *steps["rl"]]
    teacher = made(f"{out}/teacher", "train_grpo.py", *SAMPLES, *flags)
    of_teacher = measured(teacher, f"{out}/teacher", prompts)
    print(f"teacher: pass@1 {of_teacher['pass@1']:.3f}, pass@64 {of_teacher['pass@64']:.3f}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda seed: one_seed(seed, out, teacher, steps, prompts), seeds))
    for row in rows:
        row["teacher_pass@1"] = of_teacher["pass@1"]
        row["teacher_pass@64"] = of_teacher["pass@64"]
    if not smoke:
        write("distill", rows)
    for figure in ("pass@1", "pass@64"):
        grpo = [row[f"grpo_{figure}"] for row in rows]
        for arm in ARMS:
            if arm != "grpo" and len(rows) > 1:
                mean, half = paired([row[f"{arm}_{figure}"] for row in rows], grpo)
                print(f"{figure:<8}{arm:<11}− grpo: {mean:+.3f} ± {half:.3f}")


# ------------------------------------------------------------------------------------------------------------
# the toy


V = 10  # tokens
RANK = 2  # of the student's logits
PROMPTS = range(6)
KINDS = {"reverse": {}, "forward": {"divergence": "forward"}, "jsd": {"divergence": "jsd"}}


def two_modes(seed):
    """(6, V): 0.45 for each of two tokens, drawn for every prompt; the others share 0.1."""
    p = torch.full((len(PROMPTS), V), 0.1 / (V - 2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in p:
        row[torch.randperm(V, generator=generator)[:2]] = 0.45
    return p


def fitted(kind, want, seed, steps):
    """The student's log-probs (6, V) at the end of a descent on the mean divergence, and that divergence."""
    cfg = train_distill.Config(**KINDS[kind])
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(PROMPTS), RANK, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, RANK, generator=generator, dtype=torch.float64).requires_grad_()
    ref_weight = torch.eye(V, dtype=torch.float64)  # so the teacher's logits are its log-probs
    opt = torch.optim.Adam([hidden, weight], lr=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        opt.zero_grad()
        loss = train_distill.divergence(hidden, weight, want.log(), ref_weight, cfg).mean()
        loss.backward()
        opt.step()
    return (hidden @ weight.T).log_softmax(-1).detach(), loss.item()


def toy_seed(seed, steps, starts):
    want = two_modes(seed)
    logq = want.log()
    row = {"seed": seed}
    for kind in KINDS:
        logp, _ = min((fitted(kind, want, start, steps) for start in range(starts)), key=lambda end: end[1])
        p = logp.exp()
        both = p[want > 0.4].view(len(PROMPTS), 2)
        row[f"reverse_kl_{kind}"] = (p * (logp - logq)).sum(-1).mean().item()
        row[f"forward_kl_{kind}"] = (want * (logq - logp)).sum(-1).mean().item()
        row[f"kept_{kind}"] = both.sum(1).mean().item()
        row[f"covered_{kind}"] = (both.amin(1) / 0.45).mean().item()
        row[f"entropy_{kind}"] = -(p * logp).sum(-1).mean().item()
    return row


def toy(steps=300, starts=3, seeds=5):
    return [toy_seed(seed, steps, starts) for seed in range(seeds)]


def main():
    args = sys.argv[1:]
    smoke = "--smoke" in args
    torch.set_num_threads(1)
    rows = toy(steps=3, starts=1, seeds=1) if smoke else toy() if "--toy" in args else []
    if rows and not smoke:
        write("distill_toy", rows)
    for row in rows:
        print(*(f"{name} {value:.3f}" for name, value in row.items() if name != "seed"))
    if "--toy" in args:
        return
    seeds = args[args.index("--seeds") + 1].split(",") if "--seeds" in args else ["0", "1", "2", "3", "4"]
    if smoke:
        with tempfile.TemporaryDirectory() as out:
            compare(seeds[:2], out, smoke)
    else:
        compare(seeds, os.path.join(ROOT, "out", "distill"), smoke)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
