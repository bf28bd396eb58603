"""First contact with a GPU: is it right, does it run, how fast is it? At most ten minutes, in this order.

    python -m bench contact             on the GPU; out/contact gets results.jsonl, and a log per step
    python -m bench contact --fake      on a CPU, at toy sizes, with the pretended GPU of tests/fake_device.py
    python -m bench contact --only tokens     the steps whose name has this in it
    python -m bench contact --overwrite       from the start; else, what is done with this machine and commit
                                              is not repeated

    kernels   both designs, forward and backward, bf16, fp16 and fp32, on 12 shapes, against float64
    trainers  two steps of every trainer in fp32 and bf16, then evaluate.py and sample.py
    tokens    greedy tokens on the GPU and on the CPU; the same rows with graphs, without, through few slots
    chain     20 steps of GRPO on `chain`: the rewards of the CPU, within their noise
    roofline  what the card does at most: a copy, a matmul
    timings   the rows of `python -m bench --gpu`, the most telling first, as many as fit

Every step is a process of its own with a time limit: an illegal address ends one step and not the others.
Every check is one JSON line {"step", "row", "value", "unit", "bound", "ok", ...}; ok is null for a figure
without a bound. Needs torch, triton, numpy, safetensors, regex, tiktoken and jinja2, and no network.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import traceback

from bench import table
from nanorlhf.errors import require

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, "out", "contact")
TOTAL = 595  # seconds for everything
LIMITS = dict(kernels=150, trainers=130, tokens=60, chain=90, roofline=20, timings=300)  # or what is left


# ------------------------------------------------------------------------------------------------------------
# the parent: one process after the other


def run(fake=False, only="", overwrite=False, folder=OUT):
    """Run the steps → True if no check failed."""
    os.makedirs(folder, exist_ok=True)
    results = os.path.join(folder, "results.jsonl")
    here = table.origin()
    other = [row["row"] for row in read(results) if row["step"] == "machine" and row["row"] != here]
    if os.path.exists(results) and (overwrite or other):  # rows of two commits are not one table
        os.remove(results)
    if not read(results):
        write(results, step="machine", row=here, ok=None)
    start = time.monotonic()
    for step, limit in LIMITS.items():
        left = TOTAL - (time.monotonic() - start)
        if only not in step or step in finished(results):
            continue
        if left < 10:
            write(results, step=step, row="skipped: no time left", ok=None)
            continue
        run_step(step, min(limit, left), fake, folder, results)
    rows = read(results)
    print(summary(rows))
    return not any(row["ok"] is False for row in rows)


def run_step(step, limit, fake, folder, results):
    """One step in a process of its own, killed at its limit (a fake GPU has no limit: CPUs differ)."""
    drop(results, step)
    command = [sys.executable, "-m", "bench.contact", step, folder, f"{limit:.0f}"]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if fake:
        env |= {"NANORLHF_FAKE_GPU": "1", "CUDA_VISIBLE_DEVICES": "-1", "TRITON_INTERPRET": "1"}
    start = time.monotonic()
    with open(os.path.join(folder, f"{step}.log"), "w") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=None if fake else limit)  # fmt: skip
            ended = "finished" if done.returncode == 0 else f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {limit:.0f} s"
    seconds = round(time.monotonic() - start, 1)
    write(results, step=step, row=ended, value=seconds, unit="s", ok=ended == "finished")


def write(path, **row):
    """Append one line, also to the console."""
    line = json.dumps(row)
    with open(path, "a") as f:
        f.write(line + "\n")
    print(line, flush=True)


def read(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.strip()]


def finished(path):
    return {row["step"] for row in read(path) if row["row"] == "finished"}


def drop(path, step):
    """Remove what an earlier, unfinished try of this step has left."""
    kept = [row for row in read(path) if row["step"] != step]
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in kept)


def summary(rows):
    """The table at the end: what failed first, then the rest."""
    failed = [row for row in rows if row["ok"] is False]
    lines = [f"\n{len(rows)} rows, {len(failed)} failed"]
    for row in failed + [row for row in rows if row["ok"] is not False]:
        mark = {True: "ok", False: "FAIL", None: ""}[row["ok"]]
        bound = f"bound {row['bound']:.3g}" if row.get("bound") is not None else ""
        value = row.get("value")
        figure = "" if value is None else f"{value:.4g} {row.get('unit', '')}"
        error = row.get("error", "")
        lines.append(
            f"{mark:4} {row['step']:9} {row['row'][:60]:60} {figure:>16} {bound:15} {error[:90]}".rstrip()
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# the child: one step


class Step:
    """Where a step's rows go: say(row, value, ...) writes one."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = folder
        self.fake = bool(os.environ.get("NANORLHF_FAKE_GPU"))
        self.start = time.monotonic()

    def say(self, row, value=None, unit="", bound=None, at_least=False, ok=None, **more):
        """bound: the value must not be above it, or with at_least not below; NaN fails."""
        if bound is not None:
            ok = bool(value >= bound if at_least else value <= bound)
        t = round(time.monotonic() - self.start, 1)
        path = os.path.join(self.folder, "results.jsonl")
        write(path, step=self.name, row=row, value=value, unit=unit, bound=bound, ok=ok, t=t, **more)

    @contextlib.contextmanager
    def guarded(self, row):
        """An exception becomes a failed row; after a CUDA error nothing here means anything."""
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            last = traceback.extract_tb(e.__traceback__)[-1]
            at = f"{os.path.basename(last.filename)}:{last.lineno}"
            self.say(row, ok=False, error=f"{type(e).__name__}: {str(e)[:300]}", at=at)
            if "CUDA error" in str(e):
                sys.exit(3)


BF, FP, HALF = "bfloat16", "float32", "float16"
SHAPES = [  # N, D, V, dtype, design (None: by the rule), bias
    (200, 768, 50257, BF, None, False), (1500, 768, 50257, BF, None, False),  # from 1,024 rows on tuned
    (300, 1000, 5003, BF, None, False), (2048, 96, 544, BF, None, True), (1024, 1024, 50304, BF, None, False),
    (700, 768, 50257, FP, None, False), (200, 768, 5003, FP, "fused", False),
    (1500, 2048, 50257, BF, None, False), (300, 4096, 50257, BF, None, False),
    (1100, 768, 5003, HALF, None, False),
]  # fmt: skip
TINY_SHAPES = [(17, 32, 101, BF, None, True), (9, 48, 70, FP, None, False), (9, 32, 70, FP, "fused", False)]
KL_SHAPES = [(1200, 768, 50257, BF), (300, 256, 5003, FP)]
TINY_KL_SHAPES = [(9, 32, 70, BF)]


def kernels(step):
    import torch

    from bench.gpu import tolerance
    from nanorlhf import kernels
    from nanorlhf.kernels import reference, triton_backend

    def operands(N, D, V, dtype, seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(N, D, generator=g)
        w = torch.randn(V, D, generator=g) * 6 / D**0.5  # logits of standard deviation 6
        y = torch.randint(V, (N,), generator=g)
        up = torch.randn(2, N, generator=g)
        return x.to("cuda", dtype), w.to("cuda", dtype), y.to("cuda"), up.to("cuda")

    def apart(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    def logprob(N, D, V, dtype, design, with_bias):
        x, w, y, up = operands(N, D, V, dtype)
        bias = (
            torch.randn(V, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
            if with_bias
            else None
        )
        wide = [t.double().requires_grad_() for t in (x, w)]
        want = reference.linear_logprob(*wide, y, 0.9, None if bias is None else bias.double())
        wants = torch.autograd.grad(want, wide, list(up.double()))
        bound = tolerance(D, dtype)
        grad_bound = 1e-4 if dtype == torch.float32 else 1e-2
        triton_backend.DESIGN = design

        def loss(logp, entropy, rows):
            return (up[0][rows] * logp + up[1][rows] * entropy).sum(), {}

        for way in ("two passes", "one pass"):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            start = time.monotonic()
            if way == "two passes":
                got = kernels.linear_logprob(*leaves, y, 0.9, bias=bias, backend="triton")
                grads = torch.autograd.grad(got, leaves, list(up))
            else:
                total, _, *got = kernels.linear_logprob(
                    *leaves, y, 0.9, bias=bias, backend="triton", loss=loss
                )
                grads = torch.autograd.grad(total, leaves)
            torch.cuda.synchronize()
            first_call = round(time.monotonic() - start, 2)  # with compiling and tuning
            name = f"{N} × {D} × {V} {str(dtype)[6:]} {design or ''} {way}"
            logp = (got[0].double() - want[0]).abs().max().item()
            step.say(f"logp {name}", logp, "nats", bound, seconds=first_call)
            step.say(f"entropy {name}", (got[1].double() - want[1]).abs().max().item(), "nats", 5 * bound)
            for what, a, b in zip(("dhidden", "dweight"), grads, wants):
                step.say(f"{what} {name}", apart(a, b), "relative", grad_bound)
        triton_backend.DESIGN = None

    def kl(N, D, V, dtype):
        x, w, _, up = operands(N, D, V, dtype)
        rx, rw, _, _ = operands(N, D, V, dtype, seed=1)
        for reverse in (False, True):
            wide = [t.double().requires_grad_() for t in (x, w)]
            want = reference.linear_kl(*wide, rx.double(), rw.double(), 1.0, reverse)
            wants = torch.autograd.grad(want, wide, up[0].double())
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            got = kernels.linear_kl(*leaves, rx, rw, 1.0, reverse, backend="triton")
            grads = torch.autograd.grad(got, leaves, up[0])
            name = f"{'reverse ' if reverse else ''}KL {N} × {D} × {V} {str(dtype)[6:]}"
            step.say(
                name, ((got.double() - want).abs() / want.abs().clamp(min=1)).max().item(), "relative", 1e-4
            )
            for what, a, b in zip(("dhidden", "dweight"), grads, wants):
                step.say(f"{what} {name}", apart(a, b), "relative", 1e-4 if dtype == torch.float32 else 1e-2)

    for *shape, dtype, design, bias in TINY_SHAPES if step.fake else SHAPES:
        with step.guarded(f"log-probs {shape}"):
            logprob(*shape, getattr(torch, dtype), design, bias)
    for *shape, dtype in TINY_KL_SHAPES if step.fake else KL_SHAPES:
        with step.guarded(f"KL {shape}"):
            kl(*shape, getattr(torch, dtype))


def trainers(step):
    import stages

    import evaluate
    import sample

    data = os.path.join(step.folder, "stages")
    os.makedirs(data, exist_ok=True)
    made = stages.Stages(data)  # on the CPU
    for dtype in ("float32", "bfloat16"):
        for trainer in stages.TRAINERS:
            name = trainer.__name__
            with step.guarded(f"{name} {dtype}"):
                out = os.path.join(step.folder, "runs", f"{name}-{dtype}")
                flags = dict(device="cuda", dtype=dtype, steps=2, save_every=0, overwrite=True)
                last = trainer.train(made.config(trainer, out, **flags))
                gnorm = last.get("gnorm", last.get("policy_gnorm", math.nan))
                step.say(f"{name} {dtype}: gradient norm", gnorm, ok=math.isfinite(gnorm))
    model = os.path.join(step.folder, "runs", "train_sft-float32", "model")
    with step.guarded("evaluate.py"):
        data = f"{made.folder}/train_ppo.jsonl"
        cfg = evaluate.Config(
            model=model, ref=model, data=data, n=2, k=[1], prompts=4, max_new_tokens=4, device="cuda"
        )
        step.say("evaluate.py", len(evaluate.evaluate(cfg)), "figures", 1, at_least=True)
    with step.guarded("sample.py"):
        cfg = sample.Config(model=model, prompt="abc=", max_new_tokens=4, device="cuda")
        step.say("sample.py", len(sample.main(cfg)), "answers", 1, at_least=True)


def tokens(step):
    import copy
    from unittest import mock

    import torch

    from nanorlhf.generate import generate
    from nanorlhf.kernels import slots
    from nanorlhf.model import GPT, GPTConfig

    size = dict(n_layer=2, n_head=4, d_model=64, max_len=160)
    if step.fake:
        size |= dict(n_layer=1, n_head=2, d_model=32, max_len=32)
    styles = {
        "gpt2": GPTConfig.gpt2(101, **size),
        "llama": GPTConfig.llama(101, n_kv_head=2, tied=False, **size),
    }
    g = torch.Generator().manual_seed(3)
    lengths = (1, 5, 3) if step.fake else (1, 5, 9, 30, 5, 2, 17, 3)
    prompts = [torch.randint(1, 100, (n,), generator=g).tolist() for n in lengths]
    args = dict(n=1 if step.fake else 4, max_new_tokens=4 if step.fake else 100, eos_id=7, seed=5)

    def share(a, b):
        """The share of rows that are equal; NaN where even the shapes differ."""
        if a.tokens.shape != b.tokens.shape:
            return math.nan
        return (a.tokens.cpu() == b.tokens.cpu()).all(1).float().mean().item()

    for style, cfg in styles.items():
        torch.manual_seed(0)
        cpu = GPT(cfg).requires_grad_(False)
        gpu = copy.deepcopy(cpu).to("cuda")
        with step.guarded(f"{style}: tokens"):
            for temperature in (0.0, 1.0):
                want = generate(cpu, prompts, temperature=temperature, **args)
                got = generate(gpu, prompts, temperature=temperature, **args)
                name = f"{style}, temperature {temperature}"
                # fp32 rounding may turn a draw on an edge, and all that follow in its row
                step.say(f"{name}: rows equal to the CPU's", share(got, want), "share", 0.9, at_least=True)
                few = generate(gpu, prompts, temperature=temperature, slots=2, **args)
                step.say(
                    f"{name}: rows equal through two slots", share(few, got), "share", 0.9, at_least=True
                )
                with mock.patch.object(slots.Slots, "run", slots.Slots.step):
                    eager = generate(gpu, prompts, temperature=temperature, **args)
                step.say(f"{name}: rows equal without graphs", share(eager, got), "share", 1.0, at_least=True)
                if temperature:
                    gap = (gpu.logprobs(got.tokens, got.mask)[0] - got.logp).abs().max().item()
                    step.say(f"{name}: sampled and scored log-probs apart", gap, "nats", 1e-4)
            gpu.compute_dtype = torch.bfloat16
            got = generate(gpu, prompts, **args)
            gap = (gpu.logprobs(got.tokens, got.mask)[0] - got.logp).abs().max().item()
            step.say(f"{style}, bf16: sampled and scored log-probs apart", gap, "nats", 5e-2)


def chain(step):
    from unittest import mock

    import train_grpo
    import train_sft

    sft = dict(
        task="chain", out=os.path.join(step.folder, "runs", "chain-sft"), device="cuda", overwrite=True
    )
    grpo = dict(
        task="chain", init=f"{sft['out']}/model", steps=20, overwrite=True, save_every=0, eval_prompts=8
    )
    if step.fake:
        sft |= dict(steps=6, d_model=32, n_layer=1, n_head=2, batch_size=4)
        grpo |= dict(steps=2, prompts_per_step=4, group_size=4, max_new_tokens=6)
        train_grpo.pass_gate = mock.Mock()  # six steps of SFT teach nobody to think
    train_sft.train(train_sft.Config(**sft))
    curves = {}
    for device in ("cpu", "cuda"):
        out = os.path.join(step.folder, "runs", f"chain-{device}")
        curves[device] = train_grpo.train(train_grpo.Config(device=device, out=out, **grpo)).rows
    for i in range(0, len(curves["cpu"]), 5):
        part = {device: rows[i : i + 5] for device, rows in curves.items()}
        means = {device: sum(row["reward"] for row in rows) / len(rows) for device, rows in part.items()}
        errors = [row.get("reward_se") or 0.0 for rows in part.values() for row in rows]
        noise = math.sqrt(sum(e * e for e in errors)) / len(part["cpu"])
        last = i + len(part["cpu"])
        step.say(f"reward, steps {i + 1} to {last}: GPU and CPU apart", abs(means["cuda"] - means["cpu"]),
                 "reward", 4 * noise + 0.02, **means)  # fmt: skip


def roofline(step):
    from bench import gpu

    for row in gpu.roofline_rows(quick=step.fake):
        step.say(row["row"], row["ours"], row["unit"])


def timings(step, seconds):
    from bench import gpu

    said = set()

    def keep(part, rows):
        for row in rows:
            if row["row"] in said and row.get("theirs") is None:  # a row for each peer that is not installed
                continue
            said.add(row["row"])
            value = row.get("ours")
            step.say(
                f"{part}: {row['row']}", value, row["unit"], peer=row.get("peer"), theirs=row.get("theirs")
            )

    folder = os.path.join(step.folder, "bench")
    left_out = gpu.run_jobs(seconds - 15, quick=step.fake, folder=folder, keep=keep)
    for name, reason in left_out:
        step.say(f"not measured: {name}", ok=None, error=reason)


def command(argv):
    """python -m bench contact: exit status 0 if no check failed."""
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    fake = overwrite = False
    only, folder = "", OUT
    args = iter(argv)
    for x in args:
        if x == "--fake":
            fake = True
        elif x == "--overwrite":
            overwrite = True
        elif x in ("--only", "--out"):
            value = next(args, "")
            require(value, f"{x} needs a value")
            only, folder = (value, folder) if x == "--only" else (only, os.path.abspath(value))
        else:
            require(
                False, f"contact {x}: no such flag; there are --fake, --only STEP, --overwrite, --out FOLDER"
            )
    steps = ", ".join(LIMITS)
    require(any(only in step for step in LIMITS), f"--only {only}: no step has this in its name: {steps}")
    if fake and folder == OUT:
        folder += "-fake"
    if not run(fake, only, overwrite, folder):
        sys.exit(1)


def main(name, folder, limit):
    from bench import gpu

    step = Step(name, folder)
    with gpu.device(step.fake, triton=name in ("kernels", "tokens")):
        if name == "timings":
            return timings(step, float(limit))
        globals()[name](step)


if __name__ == "__main__":
    sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
    main(*sys.argv[1:])
