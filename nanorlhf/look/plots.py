"""Figures: the curves of a run, drawn with matplotlib where it is installed."""

import functools
import math
import os

WORDS = {  # column of metrics.csv → what the y axis says; docs/00-notation.md has the rest
    "loss": "loss of the batch",
    "reward": "mean score",
    "kl": "KL, nats a response",
    "entropy": "nats a token",
    "len": "tokens a response",
    "dead": "share of prompts",
    "clip": "share of tokens",
    "explained_var": "share of variance",
    "acc": "share in order",
    "margin": "score difference",
    "logp_chosen": "nats a response",
    "gnorm": "gradient norm",
    "lr": "learning rate",
}


def plot_curves(out, rows, panels):
    """Draw the rows of metrics.csv into out/curves.png: one small panel a column, or a tuple of columns."""
    plt = pyplot()
    if plt is None:
        return
    panels = [panel if isinstance(panel, tuple) else (panel,) for panel in panels]
    panels = [panel for panel in panels if any(row.get(name) is not None for row in rows for name in panel)]
    n_high = max(1, math.ceil(len(panels) / 3))
    size = (12, 2.8 * n_high)
    fig, axes = plt.subplots(n_high, 3, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        for name in panel:
            measured = [row for row in rows if row.get(name) is not None]
            steps = [row["step"] for row in measured]
            values = [row[name] for row in measured]
            marker = "." if len(steps) < 15 else None  # a curve of one point would not be seen
            ax.plot(steps, values, label=name, marker=marker)
        ax.set(title=", ".join(panel), xlabel="step", ylabel=WORDS.get(panel[0], panel[0]))
        ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # there is no step 0.5
        if "kl" in panel:
            nats(ax)
        if len(panel) > 1:
            ax.legend()
    save_figure(fig, os.path.join(out, "curves.png"))


def nats(ax):
    """Make a KL axis readable to a nat: a line at each up to 10; above, the scale is logarithmic."""
    high = ax.get_ylim()[1]
    if high < 2:  # there is no whole nat to read
        return
    if high > 11:
        ax.set_yscale("symlog", linthresh=10, linscale=2)
    ticks = [tick for tick in (*range(11), 20, 50, 100, 200) if tick <= high]
    ax.set_yticks(ticks, map(str, ticks), fontsize=8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_ylim(min(ax.dataLim.y0, 0) - 0.5, high)


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
