"""The table of all labs, and the page labs/README.md, from the results that are committed in labs/results.

    python -m labs               the table: verdicts of the first run and of the replication, effects
    python -m labs gallery       draw labs/results/forest.png, renew the figures and tables of labs/README.md

The page is written by hand, except for what stands between <!-- labs NAME --> and <!-- end -->, which the
second command writes. A lab's section is a title, such a pair of marks, and text; the summary table has the
order of the sections. Run it after `python -m labs replicate --publish`: Holm's p of every lab depends on the
p of all others.
"""

import functools
import hashlib
import io
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass

from labs import common, replication, run
from nanorlhf.errors import require
from nanorlhf.hub.files import read_json
from nanorlhf.look.plots import pyplot
from nanorlhf.run.cli import run_cli

ONE_SIDE = 0.025  # of a 95% interval: it lies above 0 if and only if the one-sided p is below this
ORANGE, BLUE = "#E69F00", "#0072B2"  # of Okabe and Ito: told apart whatever colours an eye sees
SECTION = re.compile(r"^## (.+)\n+<!-- labs (\w+) -->", re.M)


@dataclass
class Config:
    pass  # no flags: there is one way to renew the page


@dataclass
class Result:
    """One lab. exploratory: verdict.json, replicated: replication.json, each empty where there is none."""

    name: str
    exploratory: dict
    replicated: dict
    holm: float  # p of the replication after Holm's correction; None without one

    @functools.cached_property
    def first(self):
        """Intervals of the exploratory rows → {label: {"mean", "half", "p"}}, empty where there are none."""
        if not self.exploratory:
            return {}
        rows = run.read_csv(f"{run.HERE}/results/{self.name}/results.csv")
        return replication.intervals(run.load(self.name).effects(rows))

    @functools.cached_property
    def new(self):
        """The same of the replication."""
        return self.replicated["effects"] if self.replicated else {}

    @property
    def last(self):
        """The dict of the replication, else of the exploratory run, else an empty one."""
        return self.replicated or self.exploratory


def load_results():
    """→ {name: Result} of all labs."""
    folder = f"{run.HERE}/results"
    replicated = {name: read_json(f"{folder}/{name}/replication.json") for name in run.names()}
    holm = common.holm({name: found["p"] for name, found in replicated.items() if found})
    results = {}
    for name, found in replicated.items():
        exploratory = read_json(f"{folder}/{name}/verdict.json")
        results[name] = Result(name, exploratory, found, holm.get(name))
    return results


def decisive(effects):
    """The label with the largest p: the lab's own p is this one, and the effect is seen if this one is."""
    return max(effects, key=lambda label: effects[label]["p"])


# ------------------------------------------------------------------------------------------------------------
# words


def interval(row):
    """'+1.23 ± 0.45', with a third digit where two would say ± 0.01; empty for None."""
    if row is None:
        return ""
    digits = 2 if row["half"] >= 0.02 else 3
    return common.pm(row["mean"], row["half"], digits).replace("-", "−")


def word(verdict):
    if not verdict:
        return "–"
    return "seen" if verdict["seen"] else "not seen"


def seen_after_holm(result):
    return result.replicated["seen"] and result.holm < ONE_SIDE


def adjusted_p(result):
    return "<0.0001" if result.holm < 0.0001 else f"{result.holm:.2g}"


def corrected(result):
    """'seen 0.012': the verdict after Holm's correction and the adjusted p."""
    if not result.replicated:
        return "–"
    return ("seen " if seen_after_holm(result) else "not seen ") + adjusted_p(result)


# ------------------------------------------------------------------------------------------------------------
# the terminal


def show(cfg):
    """The table in 80 columns, then what each lab asks and which effect the table has of it."""
    results = load_results()
    print(f"{'lab':<20}{'exploratory':<12}{'replicated':<11}{'after Holm':<15}{'effect':<15}CPU-min")
    for name, result in results.items():
        size = interval(result.new[decisive(result.new)]) if result.new else "–"
        minutes = f"{result.last['cpu_minutes']:.1f}" if result.last else "–"
        verdicts = f"{word(result.exploratory):<12}{word(result.replicated):<11}{corrected(result):<15}"
        print(f"{name:<20}{verdicts}{size:<15}{minutes:>7}")
    print("\n" + textwrap.fill(explain(results), 80))
    print("\npython -m labs NAME runs a lab, python -m labs replicate NAME on these seeds.")
    for name, result in results.items():
        print("\n" + textwrap.fill(f"{name}: {run.load(name).QUESTION}", 80, subsequent_indent="    "))
        if result.new:
            print(f"    effect: {decisive(result.new)}")


def explain(results):
    """What the columns mean."""
    count = sum(1 for result in results.values() if result.replicated)
    return (
        "Seen: the 95% interval of every effect of the lab lies above 0. The effect in the table is the one "
        "that decides, with the largest p. After Holm: its one-sided p after Holm's correction over the "
        f"{count} replicated labs; the effect is still seen where that is below {ONE_SIDE}."
    )


# ------------------------------------------------------------------------------------------------------------
# the page


def cell(text):
    return text.replace("|", "\\|")


def heading_anchor(title):
    """What GitHub makes of a title: lower case, spaces to hyphens, no other signs."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failures(result):
    """The effects whose interval does not lie above 0 → 'label +0.44 ± 0.52 (exploratory +0.63 ± 0.39); …'"""
    parts = []
    for label, row in result.new.items():
        if not row["mean"] - row["half"] > 0:
            first = result.first.get(label)
            before = f" (exploratory {interval(first)})" if first else ""
            parts.append(f"{label} {interval(row)}{before}")
    return "; ".join(parts)


def headline(result):
    """The verdict of the replication in one line."""
    new = result.replicated
    if not new:
        return f"Not run on new seeds yet: `python -m labs replicate {result.name}`."
    seeds = f"{new['seeds']} seeds, {new['first_seed']} to {new['first_seed'] + new['seeds'] - 1}"
    verdict = f"**Effect {word(new)}** on {seeds}"
    if seen_after_holm(result):
        verdict += ", after Holm's correction, too"
    elif new["seen"]:
        verdict += ", but not after Holm's correction"
    verdict += f" (Holm's p {adjusted_p(result)})."
    return f"{verdict} `{new['command']}`, {new['cpu_minutes']:.1f} CPU-minutes."


def linked(paper):
    """A paper with its number in arXiv as a link."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", paper)


def effects_table(result):
    """One row for each effect: the exploratory and the replicated interval."""
    titles = ["effect"]
    if result.first:
        titles.append(f"exploratory, {result.exploratory['seeds']} seeds")
    if result.new:
        titles.append(f"replicated, {result.replicated['seeds']} seeds")
    rows = []
    for label in result.first | result.new:
        row = [cell(label)]
        if result.first:
            row.append(interval(result.first.get(label)))
        if result.new:
            row.append(interval(result.new.get(label)))
        rows.append(row)
    return table(titles, rows)


def section(result):
    """The generated part of a lab's section: failures, question, paper, verdict, effects, figure, numbers."""
    lab = run.load(result.name)
    parts = []
    if result.replicated and not result.replicated["seen"]:
        was_seen = result.exploratory and result.exploratory["seen"]
        parts.append(f"**{'Did not replicate' if was_seen else 'Not seen'}:** {failures(result)}.")
    parts += [f"*{lab.QUESTION}*", f"{linked(lab.PAPER)}.", headline(result)]
    if result.exploratory or result.replicated:
        parts.append(effects_table(result))
    for file in ("replication.png", "figure.png"):
        if os.path.exists(f"{run.HERE}/results/{result.name}/{file}"):
            parts.append(f"![{lab.QUESTION}](results/{result.name}/{file})")
            break
    if result.last:
        source = "On these seeds" if result.replicated else "In the exploratory run"
        parts.append(f"{source}: {result.last['verdict'].rstrip('.')}.")
    return "\n\n".join(parts)


def summary(results, titles):
    """The table of all labs in the order of their sections; titles: {name: title of the section}."""
    rows = []
    for name, title in titles.items():
        result = results[name]
        effects = result.new or result.first
        label = decisive(effects) if effects else ""
        row = [
            f"[{name}](#{heading_anchor(title)})",
            cell(label),
            f"{word(result.exploratory)} {interval(result.first.get(label))}".strip(),
            f"{word(result.replicated)} {interval(result.new.get(label))}".strip(),
            corrected(result),
            f"{result.last['cpu_minutes']:.1f}, {result.last['seeds']}" if result.last else "–",
        ]
        rows.append(row)
    columns = ["lab", "effect", "exploratory", "replicated", "after Holm", "CPU-minutes, seeds"]
    return "\n\n".join([counts(results), table(columns, rows), explain(results)])


def counts(results):
    """The whole gallery in one sentence."""
    replicated = [result for result in results.values() if result.replicated]
    if not replicated:
        return "No lab has been run on new seeds yet."
    seen = sum(result.replicated["seen"] for result in replicated)
    still = sum(seen_after_holm(result) for result in replicated)
    hours = sum(result.replicated["cpu_minutes"] for result in replicated) / 60
    return (
        f"**On seeds that no run had used {seen} of {len(replicated)} labs see their effect, and {still} "
        f"still do after Holm's correction.** Together they took {hours:.1f} CPU-hours."
    )


def renewed(text, results):
    """The page with every block between its marks as it should be."""
    titles = {name: title for title, name in SECTION.findall(text)}
    for name, result in results.items():
        marks = f"a title, then <!-- labs {name} --> and <!-- end -->"
        require(name in titles or not result.last, f"labs/README.md has no section of {name}: {marks}")
    for name in titles:
        require(name in results, f"labs/README.md has a section of {name}, and there is no such lab")
    blocks = {name: section(results[name]) for name in titles}
    blocks["summary"] = summary(results, titles)

    def block(match):
        require(match[1] in blocks, f"labs/README.md: <!-- labs {match[1]} --> does not follow a title")
        return f"<!-- labs {match[1]} -->\n\n{blocks[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- labs (\w+) -->.*?<!-- end -->", block, text, flags=re.S)


# ------------------------------------------------------------------------------------------------------------
# the forest plot


def farthest_end(intervals):
    """The largest distance from 0 of an end of these intervals: it is at 1 or −1 in the plot."""
    ends = [abs(row["mean"]) + row["half"] for row in intervals if row]
    return max(ends, default=0.0) or 1.0


def draw_interval(ax, y, row, scale, **style):
    mean = row["mean"] / scale
    half = row["half"] / scale
    ax.errorbar(mean, y, xerr=half, ms=4, capsize=2, **style)
    return mean - half


def draw_forest(results, order, path):
    """One row for each effect, each in a scale of its own: units differ, and what counts is the side of 0.

    results: {name: Result}; order: names of the labs from top to bottom.
    """
    rows = [(results[name], label) for name in order for label in results[name].first | results[name].new]
    height = 0.27 * len(rows) + 1.1  # inches
    fig, ax = pyplot().subplots(figsize=(9, height))
    beside = ax.get_yaxis_transform()  # x as a share of the axes, y in rows

    def write(x, y, text, **style):
        ax.text(x, y, text, transform=beside, va="center", fontsize=8, **style)

    lowest = 0.0
    above = None  # lab of the row before
    for y, (result, label) in enumerate(rows):
        first = result.first.get(label)
        new = result.new.get(label)
        scale = farthest_end([first, new])
        if first:
            low = draw_interval(ax, y - 0.17, first, scale, color=ORANGE, fmt="o", mfc="white")
            lowest = min(lowest, low)
            write(1.03, y, interval(first))
        if new:
            low = draw_interval(ax, y + 0.17, new, scale, color=BLUE, fmt="s")
            lowest = min(lowest, low)
            write(1.41, y, interval(new))
        write(-0.03, y, label, ha="right")
        if result is not above:
            write(-1.52, y, result.name, weight="bold")
            ax.plot([-1.52, 1.83], [y - 0.5] * 2, color="0.8", lw=0.8, transform=beside, clip_on=False)
        if result.replicated and not result.replicated["seen"]:
            ax.axhspan(y - 0.5, y + 0.5, color="0.9", zorder=0)
        above = result
    write(1.03, -1, "○ exploratory", weight="bold", color="#A86F00")  # orange letters are too pale to read
    write(1.41, -1, "■ replicated", weight="bold", color=BLUE)
    ax.axvline(0, color="black", lw=1)
    ax.set(yticks=[], ylim=(len(rows) - 0.5, -0.5), xlim=(lowest - 0.05, 1.05))
    unit = "mean and 95% interval, as a share of the row's farthest end"
    reading = "prediction: right of 0; grey: the lab's effect is not seen on new seeds"
    ax.set_xlabel(f"{unit}\n{reading}", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    fig.subplots_adjust(left=0.455, right=0.752, bottom=0.6 / height, top=1 - 0.4 / height)
    save_small(fig, path, content_of(results, order))


def content_of(results, order):
    """A hash of what the forest plot shows. Its file carries it: a test finds a picture of older results."""
    shown = []
    for name in order:
        first = results[name].first
        new = results[name].new
        texts = [[label, interval(first.get(label)), interval(new.get(label))] for label in first | new]
        shown.append([name, word(results[name].replicated), texts])
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def save_small(fig, path, content):
    """A PNG of 64 colours, a third of the size that it has with all of them."""
    from PIL import Image, PngImagePlugin  # which matplotlib brings

    full = io.BytesIO()
    fig.savefig(full, dpi=110)
    pyplot().close(fig)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("content", content)
    image = Image.open(full).convert("RGB").quantize(64)
    image.save(path, optimize=True, pnginfo=notes)


def renew(cfg):
    results = load_results()
    page = f"{run.HERE}/README.md"
    with open(page, encoding="utf-8") as f:
        text = f.read()
    new = renewed(text, results)
    with open(page, "w", encoding="utf-8") as f:
        f.write(new)
    order = [name for _, name in SECTION.findall(new)]
    if pyplot():
        draw_forest(results, order, f"{run.HERE}/results/forest.png")


def main(argv):
    """`gallery` renews the page, no word at all prints the table → exit status."""
    sys.argv[0] = "-m labs gallery" if argv else "-m labs"  # what --help and errors call the program
    return run_cli(Config, renew if argv else show, __doc__, argv[1:])
