"""Figures: the curves of a run, drawn with matplotlib where it is installed."""

import csv
import functools
import math
import os


def plot_curves(out, panels):
    """Draw out/metrics.csv into out/curves.png: one small panel per column, or per tuple of columns."""
    plt = pyplot()
    if plt is None:
        return
    with open(os.path.join(out, "metrics.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    panels = [panel if isinstance(panel, tuple) else (panel,) for panel in panels]
    panels = [panel for panel in panels if any(row.get(name) for row in rows for name in panel)]
    n_high = max(1, math.ceil(len(panels) / 3))
    size = (12, 2.8 * n_high)
    fig, axes = plt.subplots(n_high, 3, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        for name in panel:
            measured = [row for row in rows if row.get(name)]
            steps = [int(row["step"]) for row in measured]
            values = [float(row[name]) for row in measured]
            marker = "." if len(steps) < 15 else None  # a curve of one point would not be seen
            ax.plot(steps, values, label=name, marker=marker)
        ax.set(title=", ".join(panel), xlabel="step")
        if len(panel) > 1:
            ax.legend()
    save_figure(fig, os.path.join(out, "curves.png"))


@functools.cache
def pyplot():
    """matplotlib.pyplot, drawing without a screen; None, and one message a process, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no curves are drawn (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    """Write a figure and close it. A disk that is full is said, and does not end the run."""
    try:
        fig.savefig(path, dpi=110)
    except OSError as e:
        print(f"warning: cannot write {path} ({e.strerror})")
    pyplot().close(fig)
