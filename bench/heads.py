"""The kernels' part: bench/kernels.py measures, here its CSV becomes rows with goals: tokens × width × words.

ours reads and writes a tile of logits twice (two passes: any loss), or once where the loss is a sum over
tokens (one pass). Goals are in times of the naive log-softmax on a CPU, and of bare matmuls on a GPU.
"""

import csv
import os

from bench import kernels, table

PEERS = ("naive", "naive, compiled", "Liger", "TRL")


def rows(quick=False, gpu=False, rounds=0, only="", folder=table.RESULTS):
    device = "cuda" if gpu else "cpu"
    kernels.run(device, rounds or (1 if quick else 3), only, folder=folder, quick=quick)
    return [r for r in from_csv(folder, "gpu" if gpu else "cpu") if only in r["row"]]


def from_csv(folder, kind):
    """Rows of kernels_KIND.csv; [] where there is none."""
    path = os.path.join(folder, f"kernels_{kind}.csv")
    if not os.path.exists(path):
        return []
    shapes = {}
    with open(path, newline="", encoding="utf-8") as f:
        for r in csv.DictReader(f):
            shapes.setdefault((int(r["N"]), int(r["D"]), int(r["V"])), {})[r["variant"]] = r
    out = []
    older = table.origin_of(table.load_about(folder).get(f"kernels_{kind}"))
    for (N, D, V), found in shapes.items():
        for ours, passes in (("ours", "two passes"), ("ours, one pass", "one pass")):
            if ours in found:
                name = f"{N:,} × {D:,} × {V:,}, {passes}"
                out += [compare(name, found[ours], found.get(peer), peer, *goals(kind, ours, peer, D, V))
                        for peer in PEERS]  # fmt: skip
                if kind == "gpu":
                    least = goals(kind, ours, "", D, V)
                    out.append(compare(name, found[ours], found["matmul"], "3 matmuls", *least))
                for r in out:
                    r.setdefault("origin", found[ours].get("origin") or older)
    return out


def goals(kind, ours, peer, D, V):
    """Least ratio and largest share of memory, or None."""
    one = ours == "ours, one pass"
    if kind == "cpu":
        large = peer == "naive" and V > 1000
        return (1 / 0.75 if one else 1.0, 0.08 if one else 0.05) if large else (None, None)
    if peer == "TRL":
        return (1 / 0.75 if one else None), None
    return (1 / 1.5 if D <= 1024 else 1 / 1.15 if D == 4096 else None) if one and not peer else None, None


def compare(name, ours, theirs, peer, goal, share):
    def times(r):
        if not r or not r["total_ms"]:
            return None
        if r["variant"] == "matmul":
            return [3 * float(r["forward_ms"])]
        return [float(r[f"total{k}_ms"]) for k in ("_low", "", "_high")]

    def mib(r):
        return float(r["peak_mib"]) if r and r["peak_mib"] else None

    return table.row(name, "ms", times(ours), peer, times(theirs), goal, (mib(ours), mib(theirs)), share)
