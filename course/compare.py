"""Two runs side by side: a table in the terminal, a picture, and whether they are the same run."""

import importlib.util
import os

from nanorlhf.look import plots
from nanorlhf.run.log import read_rows

TIMES = ("s", "tok_s")
BLUE = "#1f77b4"
GREY = "#999999"


def values_of(rows, name):
    """The steps and the values of a column where it was measured."""
    measured = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in measured], [row[name] for row in measured]


def columns_of(rows):
    """The columns of a run that were measured at all, times and the step left out."""
    skipped = ("step", *TIMES)
    return [name for name in rows[0] if name not in skipped and values_of(rows, name)[0]]


def largest_difference(ours, yours):
    """→ (difference, column, step): the largest |ours − yours| / (1 + |ours|) of all cells."""
    worst = (0.0, None, None)
    for mine, other in zip(ours, yours):
        for name in columns_of(ours):
            a = mine.get(name)
            b = other.get(name)
            if a is None or b is None:
                continue
            difference = abs(a - b) / (1 + abs(a))
            if difference > worst[0]:
                worst = (difference, name, mine["step"])
    return worst


def table(ours, yours, names, first="ours", second="yours"):
    """Print some columns of both runs at about six steps."""
    last = min(len(ours), len(yours)) - 1
    steps = sorted({round(i * last / 5) for i in range(6)})
    print(f"{'step':>6}" + "".join(f"{name[:14]:>24}" for name in names))
    print(f"{'':>6}" + f"{first:>13}{second:>11}" * len(names))
    for i in steps:
        cells = []
        for name in names:
            for row, width in ((ours[i], 13), (yours[i], 11)):
                value = row.get(name)
                cells.append(f"{'' if value is None else f'{value:.4f}':>{width}}")
        print(f"{ours[i]['step']:>6}" + "".join(cells))


def ends_table(right, other, names, first, second):
    """Print the first and the last value of each column in both runs."""
    print(f"{'column':<16}{'first: ' + first:>16}{second:>14}{'last: ' + first:>20}{second:>14}")
    for name in names:
        cells = []
        for place in (0, -1):
            for rows in (right, other):
                values = values_of(rows, name)[1]
                cells.append(f"{values[place]:.4g}" if values else "")
        print(f"{name:<16}{cells[0]:>16}{cells[1]:>14}{cells[2]:>20}{cells[3]:>14}")


def picture(path, ours, yours, names, first="ours", second="yours"):
    """Draw the columns of both runs, where matplotlib is installed → the path, or an empty string."""
    plt = plots.pyplot()
    if plt is None:
        return ""
    high = -(-len(names) // 3)
    fig, axes = plt.subplots(high, 3, figsize=(12, 2.8 * high), squeeze=False, layout="constrained")
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names):
        for rows, label, colour, width in ((ours, first, GREY, 4), (yours, second, BLUE, 1.5)):
            steps, values = values_of(rows, name)
            ax.plot(steps, values, "o-" if len(steps) < 4 else "-", color=colour, lw=width, label=label)
        ax.set(title=name, xlabel="step")
        ax.grid(alpha=0.25)
    axes.flat[0].legend()
    plots.save_figure(fig, path)
    return path


def say_page(*folders):
    """Name the command that writes one page of these runs, where this repository has such pages."""
    if importlib.util.find_spec("nanorlhf.look.__main__"):
        names = " ".join(os.path.relpath(folder) for folder in folders)
        print(f"both on one page: python -m nanorlhf.look {names}")


def load(folder):
    return read_rows(folder)
