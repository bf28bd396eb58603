"""Rows of the benchmark: what was measured, the verdict, the CSV, the tables on the console and in the docs.

A row is one thing measured, of ours beside one peer. `ratio` says how many times as fast ours is; `share` is
our peak memory divided by the peer's. A goal that is met is PASS, one that is not MISS; a row without its
peer, or without a GPU, has empty cells.
"""

import csv
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import textwrap
import time
from importlib import metadata

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "bench", "results")
QUICK = os.path.join(ROOT, "out", "bench")  # where --quick writes: its figures mean nothing
COLUMNS = (
    "row unit ours ours_low ours_high ours_wall peer theirs theirs_low theirs_high theirs_wall ratio goal "
    "verdict ours_mib theirs_mib share share_goal share_verdict tokens note origin"
).split()
PACKAGES = "torch transformers trl liger-kernel numpy".split()


def row(name, unit, ours=None, peer="", theirs=None, goal=None, mib=(None, None), share_goal=None, **more):
    """One row. `ours` and `theirs` are the values of all rounds; None: not measured, or no such peer.

    unit       a time ("s", "ms"), which is better low, or a rate ("tok/s"), which is better high
    goal       least ratio; a string "≤ 1.4" is a bound on our own value, for rows whose goal is no ratio
    share_goal largest share of the peer's memory; with "≤ 300" a bound on our own MiB
    """
    out = {"row": name, "unit": unit, "peer": peer, "goal": goal, "share_goal": share_goal, **more}
    for who, values in (("ours", ours), ("theirs", theirs)):
        if values:
            out |= {who: statistics.median(values), f"{who}_low": min(values), f"{who}_high": max(values)}
    out["ours_mib"], out["theirs_mib"] = mib
    if ours and theirs:
        a, b = out["ours"], out["theirs"]
        out["ratio"] = a / b if unit.endswith("/s") or unit == "share" else b / a
    if None not in mib:
        out["share"] = mib[0] / mib[1]
    out["verdict"] = _verdict(goal, out.get("ours"), out.get("ratio"), least=True)
    out["share_verdict"] = _verdict(share_goal, mib[0], out.get("share"), least=False)
    return out


def _verdict(goal, own, ratio, least):
    """PASS or MISS; "" without a goal, or where what it is about was not measured."""
    if goal is None:
        return ""
    value, bound = ratio, goal
    if isinstance(goal, str):
        value, (sign, bound) = own, goal.split()
        least, bound = sign == "≥", float(bound.rstrip("%")) / (100 if bound.endswith("%") else 1)
    if value is None:
        return ""
    return "PASS" if (value >= bound if least else value <= bound) else "MISS"


# ------------------------------------------------------------------------------------------------------------
# files


def about():
    """Machine, versions and commit of a run."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "-"
    found = {"cpu": f"{cpu}, {os.cpu_count()} cores", "gpu": "-", "versions": versions}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found |= {"commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else "")}
    return found | {"date": time.strftime("%Y-%m-%d")}


@functools.cache
def origin():
    """Machine and commit of what is measured now: rows of several runs may stand in one table."""
    return origin_of(about())


def origin_of(run):
    """The same of a run in about.json; "" for None."""
    if not run:
        return ""
    machine = run["cpu"] if run["gpu"] == "-" else run["gpu"]
    return f"{machine}, {run['commit']}"


def _git(*command):
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def save(part, kind, rows, folder):
    """Rows of one part → PART_KIND.csv."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{part}_{kind}.csv"), "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for r in rows:
            r = {"origin": origin()} | r
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()})


def save_about(part, kind, folder):
    """Where and with what a part was measured → about.json."""
    path = os.path.join(folder, "about.json")
    runs = load_about(folder) | {f"{part}_{kind}": about()}
    with open(path, "w", encoding="utf-8") as f:
        json.dump(dict(sorted(runs.items())), f, indent=1, ensure_ascii=False)
        f.write("\n")


def load(part, kind, folder):
    """Rows of a part as they were saved, numbers as floats; [] where it has not been run."""
    path = os.path.join(folder, f"{part}_{kind}.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as f:
        rows = [{k: _number(v) for k, v in r.items()} for r in csv.DictReader(f)]
    older = origin_of(load_about(folder).get(f"{part}_{kind}"))  # of files without this column
    return [r | {"origin": r.get("origin") or older} for r in rows]


def merge(part, rows, kind="gpu", folder=RESULTS):
    """Put these rows of a part into its CSV, in place of those of the same name and peer."""
    if part != "kernels":  # that one has written its own
        new = {(r["row"], r["peer"]) for r in rows}
        old = [r for r in load(part, kind, folder) if (r["row"], r["peer"]) not in new]
        save(part, kind, old + rows, folder)
    save_about(part, kind, folder)


def load_about(folder):
    path = os.path.join(folder, "about.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def _number(text):
    try:
        return float(text) if text else None
    except ValueError:
        return text


# ------------------------------------------------------------------------------------------------------------
# tables


def figure(x, unit=""):
    """Three digits, and thousands with a comma; a share as a percentage."""
    if x is None or unit == "share":
        return "-" if x is None else f"{x:.0%}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" if abs(x) < 1 else f"{x:.{1 if abs(x) >= 10 else 2}f}"


def spread(r, who):
    """Half the range of the rounds, as a share of the median; "" for a single round."""
    low, high, mid = (r.get(f"{who}{k}") for k in ("_low", "_high", ""))
    return f" ±{50 * (high - low) / mid:.0f}%" if mid and high is not None and high > low else ""


def cells(r):
    """The cells of a row, as text."""
    goal, share = r.get("goal"), r.get("share_goal")
    ours = "not measured" if r.get("note") == "not measured" else "-"
    if r.get("ours") is not None:
        ours = figure(r["ours"], r["unit"]) + spread(r, "ours")
    return [
        r["row"], r["unit"], ours,
        r.get("peer") or "", figure(r.get("theirs"), r["unit"]) + spread(r, "theirs"),
        "-" if r.get("ratio") is None else f"{r['ratio']:.2f}×",
        "" if goal is None else goal if isinstance(goal, str) else f"≥ {goal:.3g}×", r.get("verdict") or "",
        figure(r.get("ours_mib")), figure(r.get("theirs_mib")),
        "-" if r.get("share") is None else f"{r['share']:.{1 if r['share'] < 0.1 else 0}%}",
        "" if share is None else share if isinstance(share, str) else f"≤ {share:.0%}",
        r.get("share_verdict") or "", r.get("origin") or "",
    ]  # fmt: skip


TITLES = "row|unit|ours|peer|theirs|ratio|goal||MiB|theirs|share|goal||measured on".split("|")


def progress(r):
    """One measured row at once, in a long run."""
    print("  ".join(x for x in cells(r)[:-1] if x), flush=True)


def _used(rows):
    """Titles and cells without the columns that are empty in every row."""
    if len({r.get("origin") for r in rows}) < 2:  # else the line below the table says it
        rows = [r | {"origin": ""} for r in rows]
    table = [cells(r) for r in rows]
    keep = [i for i in range(len(TITLES)) if any(c[i] not in ("", "-") for c in table)]
    return [TITLES[i] for i in keep], [[c[i] for i in keep] for c in table]


def console(title, rows, run=None):
    """The table as text; columns as wide as they must be."""
    titles, table = _used(rows)
    widths = [max(len(line[i]) for line in [titles, *table]) for i in range(len(titles))]
    gap = "  " if sum(widths) + 2 * len(widths) <= 110 else " "
    left = {i for i, t in enumerate(titles) if t in ("row", "peer", "unit")}
    lines = [title, *textwrap.wrap(where(run), 100)]
    for line in [titles, *table]:
        text = (f"{x:<{w}}" if i in left else f"{x:>{w}}" for i, (x, w) in enumerate(zip(line, widths)))
        lines.append(gap.join(text).rstrip())
    return "\n".join(lines)


def markdown(rows, run=None):
    """The table for the docs."""
    titles, table = _used(rows)
    lines = [titles, ["---"] * len(titles), *table]
    out = "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines)
    return f"{out}\n\n{where(run)}" if run else out


def where(run):
    """Machine, versions, commit and day of a run in one line; "" for None."""
    if not run:
        return ""
    gpu = "" if run["gpu"] == "-" else f", {run['gpu']}"
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v != "-")
    return f"{run['cpu']}{gpu}; {versions}; commit {run['commit']}, {run['date']}."


def fill(path, blocks):
    """Replace what stands between <!-- bench NAME --> and <!-- end --> in a page; other names stay as is."""
    with open(path, encoding="utf-8") as f:
        old = f.read()

    def block(m):
        return f"{m[1]}\n{blocks[m[2]]}\n{m[4]}" if m[2] in blocks else m[0]

    new = re.sub(r"(<!-- bench (\S+) -->)(.*?)(<!-- end -->)", block, old, flags=re.S)
    if new != old:
        with open(path, "w", encoding="utf-8") as f:
            f.write(new)
