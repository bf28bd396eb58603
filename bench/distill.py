"""Distillation from a larger teacher against GRPO, at equal sampled tokens; and which divergence does what.

    python bench/distill.py                   five seeds, two at a time → bench/results/distill.csv
    python bench/distill.py --seeds 0,1       other seeds; what is in --out already is not made again
    python bench/distill.py --smoke           a few steps of everything, printed and not written
    python bench/distill.py --toy             the toy alone, 1 CPU-minute → bench/results/distill_toy.csv

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

The toy is enumerable: six prompts of one letter, one token of ten as the response. For each prompt the
teacher gives 0.45 to two tokens each and shares the rest. The student's last hidden states have three
numbers, so its logits have rank three and it cannot give every prompt two tokens of its own. `kept` is the
student's mass on the teacher's two tokens, `covered` the smaller of its two probabilities over 0.45; both are
means over the prompts.
"""

import contextlib
import csv
import io
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
from nanorlhf import hub  # noqa: E402
from nanorlhf.model import GPT, GPTConfig  # noqa: E402
from nanorlhf.tokenizer import Tokenizer  # noqa: E402

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


TOK = Tokenizer.from_chars("abcdefgh")
PROMPTS = "abcdef"
KINDS = {"reverse": {}, "forward": {"divergence": "forward"}, "jsd": {"divergence": "jsd"}}


def model_of_width(width, seed, n_layer=1):
    torch.manual_seed(seed)
    shape = dict(n_layer=n_layer, n_head=1, d_model=width, max_len=2, tied=False)
    return GPT(GPTConfig.gpt2(TOK.vocab_size, **shape))


def distributions(model):
    """The model's distribution of the one token of a response, after each prompt: (6, V)."""
    tokens = torch.tensor([TOK.encode(letter) for letter in PROMPTS])
    return model.logits(tokens)[:, -1].double().log_softmax(-1)


def two_modes(seed):
    """(6, V): 0.45 for each of two tokens, drawn for every prompt; the others share 0.1."""
    p = torch.full((len(PROMPTS), TOK.vocab_size), 0.1 / (TOK.vocab_size - 2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in p:
        row[torch.randperm(8, generator=generator)[:2]] = 0.45
    return p


def toy_seed(seed, folder, steps):
    want = two_modes(seed)
    teacher = model_of_width(32, seed)
    opt = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(500):
        opt.zero_grad()
        (-want * distributions(teacher)).sum().backward()
        opt.step()
    hub.save(teacher, TOK, f"{folder}/teacher")
    hub.save(model_of_width(3, seed), TOK, f"{folder}/student")
    with open(f"{folder}/prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": letter}) + "\n" for letter in PROMPTS)
    with open(f"{folder}/none.jsonl", "w") as f:
        f.write(json.dumps({"prompt": "h"}) + "\n")
    row = {"seed": seed}
    with torch.no_grad():
        logq = distributions(teacher)
    for kind, flags in KINDS.items():
        cfg = train_distill.Config(
            data=f"{folder}/prompts.jsonl", eval_data=f"{folder}/none.jsonl", init=f"{folder}/student",
            teacher=f"{folder}/teacher", out=f"{folder}/{kind}", steps=steps, lr=1e-2, prompts_per_step=6,
            group_size=32, max_new_tokens=1, eval_prompts=0, save_every=0, sample_every=10**6, seed=seed,
            **flags,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            train_distill.train(cfg)
        with torch.no_grad():
            logp = distributions(hub.load(f"{folder}/{kind}/model")[0])
        p = logp.exp()
        modes = want > 0.4
        both = p[modes].view(len(PROMPTS), 2)
        row[f"reverse_kl_{kind}"] = (p * (logp - logq)).sum(-1).mean().item()
        row[f"forward_kl_{kind}"] = (logq.exp() * (logq - logp)).sum(-1).mean().item()
        row[f"kept_{kind}"] = both.sum(1).mean().item()
        row[f"covered_{kind}"] = (both.amin(1) / 0.45).mean().item()
        row[f"entropy_{kind}"] = -(p * logp).sum(-1).mean().item()
    return row


def toy(steps=300, seeds=5):
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(toy_seed(seed, folder, steps))
    return rows


def main():
    args = sys.argv[1:]
    smoke = "--smoke" in args
    torch.set_num_threads(1)
    rows = toy(steps=3, seeds=1) if smoke else toy() if "--toy" in args else []
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
