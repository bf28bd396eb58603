"""Our numbers beside the peers': time, memory, and whether the goal is met. One table a part.

    python -m bench                    all parts on the CPU, 20 minutes of a quiet machine
    python -m bench steps import       these parts: kernels, training, generation, steps, import, install
    python -m bench steps --only GRPO  the rows whose name has GRPO in it; the others stay as they were, with
                                       the machine and commit of their own run beside them
    python -m bench --quick            the smallest sizes and one round: to see that it runs, no more
    python -m bench --gpu              what only a GPU can say (bf16), into tables of their own: half an hour
    python -m bench --gpu --minutes 8  as many of its rows as fit, the most telling first; the rest is listed
    python -m bench --gpu --fake       all of it on a CPU, toy sizes on a pretended GPU: to see that it runs
    python -m bench contact            the first ten minutes on a GPU: `python -m bench.contact --help`
    python -m bench --report           no measuring: print all tables, write them into docs/performance.md

Peers (pip install -e ".[peers]"): transformers, TRL, Liger-Kernel; a row whose peer is missing shows "-". Two
more by environment variables: PPO_PYTHON=path/bin/python, that of an environment with trl==1.9.2, the last
that had PPO, and NANOGPT=path/model.py. Times are CPU seconds of the process on one thread, medians over
rounds in which the variants take turns, ± half the range; memory is the largest resident set of a process
that ran one variant alone. A part that is done is kept in bench/results/PART_cpu.csv; machine, versions and
commit stand in about.json.
"""

import os
import sys

if "--fake" in sys.argv:  # before torch and Triton, which read them
    os.environ |= {"NANORLHF_FAKE_GPU": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "-1"}

import torch

from bench import contact, generation, gpu, heads, install, steps, table, training
from nanorlhf.errors import UserError, require

PARTS = {
    "kernels": ("Log-probs from hidden states, forward and backward", heads.rows),
    "training": ("Training step of the bare model, 16 × 128 tokens", training.rows),
    "generation": ("Generation, 64 rows, useful tokens a second", generation.rows),
    "steps": ("A whole step of a trainer", steps.rows),
    "import": ("Import of a trainer, from the start of Python", install.import_rows),
    "install": ("What an install brings beyond torch", install.install_rows),
}
MEMORY = "Peak memory beside the peers' (the rows above that have a goal for it)"
GPU_PARTS = {
    "roofline": ("What this GPU does at most", gpu.roofline_rows),
    "kernels": ("Log-probs from hidden states, forward and backward, bf16", heads.rows),
    "attention": ("Attention on shapes that are new, bf16", gpu.attention_rows),
    "training": ("Training step, sequence 2,048, bf16", gpu.training_rows),
    "generation": ("Generation, bf16", generation.rows),
    "steps": ("A GRPO step, bf16", gpu.step_rows),
}
PAGE, README = (os.path.join(table.ROOT, *x) for x in (("docs", "performance.md"), ("README.md",)))


def measure(parts, quick, rounds, only, folder):
    """Run the parts on the CPU, each kept as soon as it is done."""
    for part in parts or PARTS:
        title, rows = PARTS[part]
        print(f"\n{title} ...", flush=True)
        more = {"folder": folder} if part == "kernels" else {}
        found = rows(quick=quick, rounds=rounds, only=only, **more)
        found = [r for r in found if only in r["row"]]
        if only or part == "kernels":
            table.merge(part, found, "cpu", folder)
        else:
            table.save(part, "cpu", found, folder)
            table.save_about(part, "cpu", folder)


def measure_gpu(parts, quick, rounds, only, folder, minutes):
    """Run the jobs of the parts on the GPU, in order of value; print what was left out."""
    seconds = 60 * minutes if minutes else float("inf")
    with gpu.device(fake=bool(os.environ.get("NANORLHF_FAKE_GPU"))):
        left_out = gpu.run_jobs(seconds, parts, only, quick, rounds, folder)
    for name, reason in left_out:
        print(f"not measured: {name}: {reason}")


def tables(folder):
    """→ {name in the page: (title, rows, run)} of all that has been measured."""
    runs, out = table.load_about(folder), {}
    for kind, known in (("cpu", PARTS), ("gpu", GPU_PARTS)):
        for part, (title, _) in known.items():
            rows = heads.from_csv(folder, kind) if part == "kernels" else table.load(part, kind, folder)
            if kind == "gpu" and not rows:
                rows = gpu.NOT_MEASURED.get(part, [])
            if rows:
                out[f"{part}_{kind}"] = title, rows, runs.get(f"{part}_{kind}")
    memory = [r for name, (_, rows, _) in out.items() if name.endswith("cpu") for r in rows
              if r.get("share_goal") not in (None, "")]  # fmt: skip
    if memory:
        keys = ("row", "peer", "ours_mib", "theirs_mib", "share")
        keys += ("share_goal", "share_verdict")
        out["memory_cpu"] = MEMORY, [{k: r.get(k) for k in keys} | {"unit": "MiB"} for r in memory], None
    return out


def summary(found):
    """The rows of steps and generation that have a goal, one peer each and without the goals."""
    parts = [found[name][1] for name in ("steps_cpu", "generation_cpu") if name in found]
    rows = [r for part in parts for r in part if r["goal"]]
    first = {r["row"]: r for r in reversed(rows)}.values()
    return [r | dict.fromkeys(("goal", "verdict", "share_goal", "share_verdict")) for r in reversed(first)]


def main(argv):
    if argv[:1] == ["contact"]:
        return contact.command(argv[1:])
    options, parts = {"--rounds": "0", "--only": "", "--minutes": "0"}, []
    flags = {"--quick": False, "--gpu": False, "--report": False, "--fake": False}
    known = GPU_PARTS if "--gpu" in argv else PARTS
    args = iter(argv)
    for x in args:
        if x in flags:
            flags[x] = True
        elif x in options:
            options[x] = next(args, "")
            require(options[x], f"{x} needs a value")
        else:
            require(x in known, f"{x}: no such part or flag; parts: {', '.join(known)}, flags: see --help")
            parts.append(x)
    for name in ("--rounds", "--minutes"):
        require(options[name].isdigit(), f"{name} {options[name]}: must be an integer")
    fake = flags["--fake"]
    require(flags["--gpu"] or not fake, "--fake: pretends a GPU, and so goes together with --gpu")
    require(flags["--gpu"] or options["--minutes"] == "0", "--minutes: goes together with --gpu")
    require(torch.cuda.is_available() or fake or not flags["--gpu"], "--gpu: this torch sees no GPU")
    quick = flags["--quick"] = flags["--quick"] or fake
    folder = table.QUICK if quick else table.RESULTS
    wanted = parts, quick, int(options["--rounds"]) or int(fake), options["--only"], folder
    if not flags["--report"]:
        if flags["--gpu"]:
            measure_gpu(*wanted, int(options["--minutes"]))
        else:
            measure(*wanted)
    found = tables(folder)
    if flags["--report"] and not flags["--quick"]:
        table.fill(PAGE, {name: table.markdown(rows, run) for name, (_, rows, run) in found.items()})
        if rows := summary(found):
            table.fill(README, {"summary": table.markdown(rows)})
    for name, (title, rows, run) in found.items():
        part, kind = name.split("_")
        mine = part in (parts or [part]) and (kind == "gpu") == flags["--gpu"]
        if mine or flags["--report"]:
            print("\n" + table.console(title, rows, run))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f"python -m bench: error: {e}", file=sys.stderr)
        sys.exit(2)
