"""The log-prob and KL kernels beside their peers: time, memory, error. One run, all of them in turn.

    python bench/kernels.py                CPU: 6 minutes; a GPU, where there is one: not measured yet
    python bench/kernels.py --rounds 3     fewer rounds than 5
    python bench/kernels.py --device cpu   also on a machine with a GPU
    python bench/kernels.py --only 768     shapes of this width alone, or with this in "8,192 × 768 × 50,257";
                                           added to what the CSV has

Writes bench/results/kernels_cpu.csv (or kernels_gpu.csv) and docs/img/kernels_cpu.png. Everybody gets the
same operands and returns per-token log-probs, with entropy where the variant has it; gradients are those of a
random upstream gradient of the log-probs. Time: on a CPU, CPU seconds on one thread; on a GPU, CUDA events.
Medians, and the lowest and highest, over rounds in which the variants take turns. Memory: the peak above the
inputs, the gradients of both included (`beyond_mib`: without them, and without one fp32 buffer of the
weight's shape). Error: against float64, on 256 rows (GPU: 1,024). `matmul` is a bare x·wᵀ in the operands'
dtype; four of them are what any method that computes its logits twice must do at least.

Peers, if they are installed (pip install trl liger-kernel; neither is needed here): TRL's ChunkedLogProb,
Liger's chunked log-prob of its GRPO loss.
"""

import csv
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench import table  # noqa: E402
from nanorlhf import kernels  # noqa: E402
from nanorlhf.kernels import reference  # noqa: E402
from nanorlhf.look.plots import pyplot  # noqa: E402

CPU_SHAPES = [(4096, 384, 50257), (2048, 96, 512)]
QUICK_SHAPES = [(128, 32, 512)]  # to see that it runs
GPU_SHAPES = [(N, D, V) for V in (50257, 151936) for N in (8192, 65536) for D in (768, 1024, 2048, 4096)]
GPU_SHAPES.insert(1, (8192, 768, 50304))  # beside 50257: what an odd vocabulary costs
MiB = 1 << 20
RESULTS = os.path.join(ROOT, "bench", "results")


# ------------------------------------------------------------------------------------------------------------
# the variants: (x, w, targets) → logp, or logp and entropy


def use(design=None):
    """Triton's design from now on, since the backward pass asks for it too; None: that of the rule."""
    triton_backend = sys.modules.get("nanorlhf.kernels.triton_backend")
    if triton_backend:
        triton_backend.DESIGN = design


def ours(x, w, targets, design=None):
    use(design)
    return kernels.linear_logprob(x, w, targets)


def ours_torch(x, w, targets):
    return kernels.linear_logprob(x, w, targets, backend="torch")


def ours_one_pass(x, w, targets, g):
    """The same for a loss that is a sum over rows, here Σ g·logp: gradients are formed with the logits."""
    return kernels.linear_logprob(x, w, targets, loss=lambda logp, _, rows: ((g[rows] * logp).sum(), {}))


def naive(x, w, targets):
    return F.log_softmax((x @ w.T).float(), -1).gather(1, targets[:, None]).squeeze(1)


def naive_entropy(x, w, targets):
    logp = F.log_softmax((x @ w.T).float(), -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def rows_in_chunks(x, w, targets):
    """The usual remedy: 256 rows at a time, each recomputed in the backward pass."""
    return torch.cat([checkpoint(naive, x[i : i + 256], w, targets[i : i + 256], use_reentrant=False)
                      for i in range(0, len(x), 256)])


def trl(x, w, targets):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(x, w, None, targets, 1.0, 32768, None, 1.0, ("entropy",))[:2]


def liger(x, w, targets):
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(x, w, targets, None, 1.0, 4096)


def variants(device, quick=False):
    found = {"ours": ours, "ours, one pass": ours_one_pass, "naive": naive, "naive + entropy": naive_entropy,
             "naive, compiled": torch.compile(naive, dynamic=False), "rows in chunks": rows_in_chunks,
             "TRL": trl, "Liger": liger}
    if device == "cuda":
        found |= {f"ours, {design}": partial(ours, design=design) for design in ("fused", "stored")}
        found["ours, torch"] = ours_torch
    if quick:
        found = {name: found[name] for name in ("ours", "ours, one pass", "naive")}
    usable = {}
    for name, f in found.items():
        try:
            call(f, *operands(16, 16, 32, device, torch.float32))
            usable[name] = f
        except Exception as e:  # a peer that is missing, or that needs a GPU
            print(f"without {name}: {type(e).__name__}: {str(e).splitlines()[0][:70] if str(e) else ''}")
    return usable


# ------------------------------------------------------------------------------------------------------------
# measuring


def operands(N, D, V, device, dtype):
    """hidden, weight with logits of standard deviation 6, targets, upstream gradient."""
    torch.manual_seed(0)
    x = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    w = (torch.randn(V, D, device=device) * (6 / D**0.5)).to(dtype).requires_grad_()
    return x, w, torch.randint(V, (N,), device=device), torch.randn(N, device=device)


def clock(fn, device):
    """Seconds of one call, and its result."""
    if device == "cpu":
        start = time.process_time()
        result = fn()
        return time.process_time() - start, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, result


def call(f, x, w, targets, g):
    """→ (logp, perhaps entropy), what is to be differentiated, the upstream gradient of that."""
    if f is ours_one_pass:
        total, _, *out = f(x, w, targets, g)
        return out, total, None
    out = f(x, w, targets)
    out = out if isinstance(out, tuple) else (out,)
    return out, out[0], g.to(out[0].dtype)


def passes(f, x, w, targets, g, device):
    """Seconds of the forward pass, and of forward and backward together."""
    forward, (_, loss, up) = clock(lambda: call(f, x, w, targets, g), device)
    backward, _ = clock(lambda: torch.autograd.grad(loss, (x, w), up), device)
    return forward, forward + backward


def matmul(x, w, targets, g, device):
    """Seconds of x·wᵀ, a slice of rows at a time so that it fits, and of four of them."""

    stride = -(-len(w) // 64) * 64  # cuBLAS writes rows of odd length slowly: that would be no floor
    out = torch.empty(min(len(x), 4096), stride, device=x.device, dtype=x.dtype)[:, : len(w)]

    def run():
        with torch.no_grad():
            for i in range(0, len(x), 4096):
                torch.mm(x[i : i + 4096], w.T, out=out[: len(x) - i])

    seconds, _ = clock(run, device)
    return seconds, 4 * seconds


def errors(f, shape, device, dtype):
    """Against float64: largest errors of logp and entropy, relative errors of the gradients (2-norm)."""
    rows = 1024 if device == "cuda" else 256  # blocks are tuned from 1,024 on
    x, w, targets, g = operands(rows, *shape[1:], device, dtype)
    out, loss, up = call(f, x, w, targets, g)
    grads = torch.autograd.grad(loss, (x, w), up)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    want, entropy = reference.linear_logprob(x64, w64, targets)
    wants = torch.autograd.grad(want, (x64, w64), g.double())
    found = {"err_logp": (out[0] - want).abs().max().item(),
             "err_entropy": (out[1] - entropy).abs().max().item() if len(out) > 1 else math.nan}
    for name, a, b in zip(("err_dhidden", "err_dweight"), grads, wants):
        found[name] = ((a.double() - b).norm() / b.norm()).item()
    return found


def peak(name, shape, device, dtype):
    """Peak MiB above the inputs; on a CPU in a process of its own, by its largest resident set."""
    if device == "cpu":
        command = [sys.executable, __file__, "--peak", name, *map(str, shape)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    x, w, targets, g = operands(*shape, device, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    passes(variants_of[name], x, w, targets, g, device)
    return (torch.cuda.max_memory_allocated() - before) / MiB


def peak_here(name, N, D, V):
    """In its own process (Linux): all is called once at a tiny size first, so that libraries do not count."""
    f = {**variants_of, **variants("cpu")}[name]
    x, w, targets, g = operands(N, D, V, "cpu", torch.float32)
    passes(f, *operands(16, D, 32, "cpu", torch.float32), "cpu")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark; ru_maxrss would start at the parent's
    before = high_water()
    passes(f, x, w, targets, g, "cpu")
    return (high_water() - before) / 1024


def high_water():
    """Largest resident set of this process so far, KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def kl_rows(shape, device, dtype, rounds, base):
    """linear_kl and its naive form, forward and backward, in turn; beside ours for log-probs (`base`)."""
    use()
    x, w, _, g = operands(*shape, device, dtype)
    rx, rw = (t.detach().roll(1, 0) for t in (x, w))

    def naive_kl(x, w):
        logp, logq = (F.log_softmax((a @ b.T).float(), -1) for a, b in ((x, w), (rx, rw)))
        return (logp.exp() * (logp - logq)).sum(-1)

    found = {"KL ours": lambda x, w, t: kernels.linear_kl(x, w, rx, rw)}
    if shape[0] * shape[2] * 4 * 8 < (60 << 30 if device == "cuda" else 8 << 30):
        found["KL naive"] = lambda x, w, t: naive_kl(x, w)
    times = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, f in found.items():
            times[name].append(passes(f, x, w, None, g, device))
    return {name: summary(t[1:]) | {"to_logprob": statistics.median(s for _, s in t[1:]) / base}
            for name, t in times.items()}


def summary(times):
    forward, total = zip(*times)
    return {"forward_ms": 1e3 * statistics.median(forward), "total_ms": 1e3 * statistics.median(total),
            "total_low_ms": 1e3 * min(total), "total_high_ms": 1e3 * max(total)}


def measure(shape, device, dtype, rounds):
    x, w, targets, g = operands(*shape, device, dtype)
    times, failed = {name: [] for name in ("matmul", *variants_of)}, set()
    for _ in range(rounds + 1):  # the first round warms up, compiles and tunes
        for name in times:
            if name in failed:
                continue
            try:
                run = matmul(x, w, targets, g, device) if name == "matmul" else None
                times[name].append(run or passes(variants_of[name], x, w, targets, g, device))
            except torch.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
    head = {"device": device, "dtype": str(dtype)[6:], "N": shape[0], "D": shape[1], "V": shape[2]}
    head |= {"origin": table.origin()}
    rows, floor = [], summary(times["matmul"][1:])
    own = statistics.median(t for _, t in times["ours"][1:])
    for name in times:
        row = head | {"variant": name}
        if name in failed:
            rows.append(row | {"note": "out of memory"})
            continue
        row |= summary(times[name][1:])
        row |= {"forward_to_matmul": row["forward_ms"] / floor["forward_ms"],
                "total_to_4_matmuls": row["total_ms"] / floor["total_ms"],
                "to_ours": row["total_ms"] / 1e3 / own}
        if name != "matmul":
            row |= errors(variants_of[name], shape, device, dtype)
            row["peak_mib"] = peak(name, shape, device, dtype)
            row["beyond_mib"] = row["peak_mib"] - (x.nbytes + w.nbytes + 4 * w.numel()) / MiB
        rows.append(row)
        show(row)
    for name, values in kl_rows(shape, device, dtype, rounds, own).items():
        rows.append(head | {"variant": name} | values)
        show(rows[-1])
    return rows


def show(row):
    cells = dict(forward_ms="9.1f", total_ms="9.1f", to_ours="7.2f", peak_mib="9.0f", err_logp="10.1e",
                 err_dhidden="10.1e", err_dweight="10.1e")
    text = (format(row[k], form) if k in row else " " * int(form.split(".")[0]) for k, form in cells.items())
    print(f"{row['variant']:<16}" + "".join(text), flush=True)


def plot(rows, path):
    """Time and memory of the CSV's first shape."""
    plt = pyplot()
    if plt is None:
        return
    size = {k: int(rows[0][k]) for k in "NDV"}
    first = [r for r in rows if all(int(r[k]) == v for k, v in size.items()) and r["peak_mib"]]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    names = [r["variant"] for r in first]
    for ax, key, title in zip(axes, ("total_ms", "peak_mib"), ("forward + backward, ms", "peak memory, MiB")):
        values = [float(r[key]) for r in first]
        ax.barh(names, values, color=["C0" if n.startswith("ours") else "0.7" for n in names])
        for i, v in enumerate(values):
            ax.text(v, i, f" {v:,.0f}", va="center", fontsize=8)
        ax.set_title(f"{title}: N {size['N']:,}, D {size['D']:,}, V {size['V']:,}", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.15)
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def write(path, rows):
    names = list(dict.fromkeys(k for row in rows for k in row))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)


def wanted(only, shape):
    """Whether a shape is asked for: by its width, or by a piece of its name, "8,192 × 768 × 50,257"."""
    name = " × ".join(f"{n:,}" for n in shape)
    return not only or only == str(shape[1]) or only in name


def main(argv):
    options = dict(zip(argv[::2], argv[1::2]))
    device = options.get("--device", "cuda" if torch.cuda.is_available() else "cpu")
    run(device, int(options.get("--rounds", 5)), options.get("--only"))


def run(device, rounds, only=None, folder=RESULTS, quick=False):
    """Measure all shapes, or those that `only` names → kernels_DEVICE.csv in the folder, and the figure."""
    kind = "gpu" if device == "cuda" else "cpu"
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"kernels_{kind}.csv")
    torch.set_num_threads(1)
    variants_of.update(variants(device, quick))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    if only and os.path.exists(path):
        with open(path, newline="") as f:
            rows = [row for row in csv.DictReader(f) if not wanted(only, [int(row[k]) for k in "NDV"])]
    for shape in QUICK_SHAPES if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        if wanted(only, shape):
            print(f"\nN {shape[0]:,}  D {shape[1]:,}  V {shape[2]:,}  {str(dtype)[6:]}, {device}")
            titles = ("fwd ms", "f+b ms", "/ours", "MiB", "logp", "dhidden", "dweight")
            print(" " * 16 + "".join(f"{t:>{w}}" for t, w in zip(titles, (9, 9, 7, 9, 10, 10, 10))))
            torch._dynamo.reset()  # or torch.compile meets a second shape and turns to dynamic ones
            rows += measure(shape, device, dtype, rounds)
            write(path, rows)  # after every shape: a run that is cut short keeps what it has
    if not quick:
        with open(path, newline="") as f:
            plot(list(csv.DictReader(f)), os.path.join(ROOT, "docs", "img", f"kernels_{kind}.png"))


variants_of = {}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        print(peak_here(sys.argv[2], *map(int, sys.argv[3:])))
    else:
        main(sys.argv[1:])
