"""Figures: the curves of a run, drawn with matplotlib where it is installed."""

import csv
import math
import os


def plot_curves(out, panels):
    """Draw metrics.csv into curves.png, one small panel per column (or tuple of columns)."""
    plt = pyplot()
    if plt is None:
        return
    with open(os.path.join(out, "metrics.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    panels = [p if isinstance(p, tuple) else (p,) for p in panels]
    panels = [p for p in panels if any(r.get(c) for r in rows for c in p)]
    wide = min(3, len(panels)) or 1
    high = math.ceil(len(panels) / wide) or 1
    fig, axes = plt.subplots(high, wide, figsize=(4 * wide, 2.8 * high), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        for column in panel:
            points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
            ax.plot(*zip(*points), label=column, marker="." if len(points) < 15 else None)
        ax.set(title=", ".join(panel), xlabel="step")
        if len(panel) > 1:
            ax.legend()
    save_figure(fig, os.path.join(out, "curves.png"))


def pyplot():
    """matplotlib.pyplot on a backend without a screen, or None (said once) where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        if not pyplot.__dict__.get("said"):
            print("matplotlib is not installed: no curves are drawn (pip install matplotlib)")
        pyplot.said = True
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    import matplotlib.pyplot as plt

    try:
        fig.savefig(path, dpi=110)
    except OSError as e:
        print(f"warning: cannot write {path} ({e.strerror})")
    plt.close(fig)
