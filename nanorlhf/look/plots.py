"""Figures: the curves of a run, and of many, drawn with matplotlib where it is installed."""

import argparse
import functools
import math
import os
import re
import statistics

from nanorlhf.errors import UserError, require, visible
from nanorlhf.hub.files import read_json
from nanorlhf.run.folders import read_rows, require_plain

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
NO_MATTER = ("out", "overwrite", "resume", "new_data", "wandb", "threads")  # flags that move no curve
# Student's t at 97.5% for 2 to 12 values; T975[0] belongs to two.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


def plot_curves(out, rows, panels):
    """Draw the rows of metrics.csv into out/curves.png: one small panel a column, or a tuple of columns."""
    plt = pyplot()
    if plt is None or not rows:
        return
    panels = [panel if isinstance(panel, tuple) else (panel,) for panel in panels]
    panels = [panel for panel in panels if any(values_at(rows, name) for name in panel)]
    fig, axes = grid(plt, len(panels))
    for ax, panel in zip(axes, panels):
        for name in panel:
            draw(ax, values_at(rows, name), name)
        name_axes(ax, panel)
        if len(panel) > 1:
            ax.legend()
    save_figure(fig, os.path.join(out, "curves.png"))


def grid(plt, n):
    """→ a figure, and axes for n panels, three in a row."""
    n_high = max(1, math.ceil(n / 3))
    size = (12, 2.8 * n_high)
    fig, axes = plt.subplots(n_high, 3, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        ax.axis("off")
    return fig, list(axes.flat[:n])


# ------------------------------------------------------------------------------------------------------------
# many runs


def main_plot(argv):
    """python -m nanorlhf.look --plot RUN RUN ...: one panel a metric, one curve a run or a group of seeds."""
    about = "Draw metrics of several runs: the mean over seeds, with its 95% interval."
    parser = argparse.ArgumentParser(prog="python -m nanorlhf.look --plot", description=about)
    parser.error = _refuse
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--metric", default="", help="columns of metrics.csv, such as reward,kl; else many")
    seeds = "seeds: runs that differ by --seed alone are one curve; none: each run is one"
    parser.add_argument("--group", default="seeds", type=str.lower, choices=("seeds", "none"), help=seeds)
    parser.add_argument("--out", default="", help="the picture, without .png; else RUN/plot of the first")
    args = parser.parse_args(argv)
    runs = {}
    for folder in args.runs:
        runs[folder] = (read_rows(folder), read_json(os.path.join(folder, "config.json")))
    measured = {name for rows, _ in runs.values() for row in rows for name in row if row[name] is not None}
    names = args.metric.split(",") if args.metric else [name for name in WORDS if name in measured]
    for name in names:
        require(name in measured, f"--metric {name}: not measured; there are {', '.join(sorted(measured))}")
    if not args.out:  # plot.png may be a link to a file of somebody else's
        require_plain(args.runs[0])
    if pyplot() is None:
        return
    fig = compare(group_runs(runs, args.group == "seeds"), names)
    base = args.out.removesuffix(".png") or os.path.join(args.runs[0], "plot")
    for path in (f"{base}.png", f"{base}.svg"):
        save_figure(fig, path)
        if os.path.isfile(path):
            print(visible(path))


def _refuse(message):
    raise UserError(message)  # argparse's own way prints three lines more, and obeys control sequences


def group_runs(runs, by_seed=True):
    """{folder: (rows, config)} → {label: the rows of each run in a group}.

    by_seed: runs whose flags are equal but for --seed are one group. Paths that hold the run's own seed, such
    as runs/seed3/sft/model, count as equal. A label has the flags that differ between the groups, or the
    folder where none do, or more than four.
    """
    flags = {folder: without_seed(config) for folder, (_, config) in runs.items()}
    seeds = {folder: config.get("seed") for folder, (_, config) in runs.items()}
    groups = {}  # the folders of each
    for folder, (_, config) in runs.items():
        key = str(sorted(flags[folder].items())) if by_seed and config else folder
        known = [seeds[other] for other in groups.get(key, ())]
        if seeds[folder] in known:  # the same run again, of another version say, is no second seed
            key = folder
        groups.setdefault(key, []).append(folder)
    differ = differing([flags[folders[0]] for folders in groups.values()])
    labelled = {}
    for folders in groups.values():
        first = folders[0]
        words = ", ".join(f"{name} {flags[first][name]}" for name in differ)
        label = words if 0 < len(differ) <= 4 else first
        if label in labelled:  # two runs may differ by their seed alone, with --group none, or by nothing
            label = first
        if len(folders) > 1:
            label += f" ({len(folders)} seeds)"
        labelled[label] = [runs[folder][0] for folder in folders]
    return labelled


def without_seed(config):
    """The flags that decide a curve, the run's own seed in a path replaced by #."""
    seed = rf"(?<!\d){config.get('seed')}(?!\d)"
    flags = {name: value for name, value in config.items() if name not in (*NO_MATTER, "seed")}
    paths = [name for name, value in flags.items() if isinstance(value, str) and os.sep in value]
    return flags | {name: re.sub(seed, "#", flags[name]) for name in paths}


def differing(configs):
    """Names of the flags that all of them have and that are not the same in all."""
    common = [name for name in configs[0] if all(name in flags for flags in configs)]
    return [name for name in common if any(flags[name] != configs[0][name] for flags in configs)]


def mean_ci(x):
    """Mean, and half the width of its 95% interval by Student's t; nan for a single value."""
    if len(x) < 2:
        return (x[0] if x else math.nan), math.nan
    quantile = T975[min(len(x), 12) - 2]  # from 13 values on a little too wide
    return statistics.mean(x), quantile * statistics.stdev(x) / math.sqrt(len(x))


def compare(groups, names):
    """{label: [rows of a run, ...]} and columns → a figure: a panel a column, a curve a label.

    Of several runs the curve is their mean, and the band its 95% interval, at steps that all have measured.
    """
    fig, axes = grid(pyplot(), len(names))
    for ax, name in zip(axes, names):
        for label, runs in groups.items():
            curves = [values_at(rows, name) for rows in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            found = [mean_ci([curve[step] for curve in curves]) for step in steps]
            means = [mean for mean, _ in found]
            colour = draw(ax, dict(zip(steps, means)), label)
            if len(runs) > 1:
                low = [mean - half for mean, half in found]
                high = [mean + half for mean, half in found]
                ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        ax.grid(alpha=0.25)
        name_axes(ax, [name])
    if len(groups) > 1:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


# ------------------------------------------------------------------------------------------------------------
# drawing


def values_at(rows, name):
    """Rows of metrics.csv and a column → {step: value}, the steps at which it was measured."""
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def draw(ax, value_at, label):
    """Draw {step: value} as one line → its colour."""
    marker = "." if len(value_at) < 15 else None  # a curve of one point would not be seen
    (line,) = ax.plot(list(value_at), list(value_at.values()), label=label, marker=marker)
    return line.get_color()


def name_axes(ax, columns):
    """Title and axes of a panel of these columns of metrics.csv."""
    first = columns[0]
    ax.set(title=", ".join(columns), xlabel="step", ylabel=WORDS.get(first, first))
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # there is no step 0.5
    if "kl" in columns:
        nats(ax)


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
