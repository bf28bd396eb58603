"""What it costs before anything is trained: importing a trainer, and installing what it needs."""

import json
import re
import subprocess
import sys
from importlib import metadata

from bench import table

ENTRY = """
import json, sys, time
{what}
with open("/proc/self/status") as f:
    peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
print(json.dumps([time.process_time(), peak / 1024, len(sys.modules)]))
"""


def import_rows(quick=False, gpu=False, rounds=0, only=""):
    """CPU seconds from the start of the interpreter, peak memory and modules, in turn."""
    what = {"ours": "import train_grpo", "torch": "import torch", "TRL": "from trl import GRPOTrainer"}
    found = {name: [] for name in what if name != "TRL" or present("trl")}
    for i in range(1 if quick else 1 + (rounds or 5)):  # the first warms the disk's cache
        for name in found:
            command = [sys.executable, "-c", ENTRY.format(what=what[name])]
            done = subprocess.run(command, cwd=table.ROOT, capture_output=True, text=True, check=True)
            if i or quick:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    times, mibs, modules = zip(*found["ours"])
    out = []
    for peer in ("TRL", "torch"):
        t, m, n = zip(*found[peer]) if found.get(peer) else (None, None, None)
        goal = peer == "TRL"  # once is enough
        mib = max(mibs), m and max(m)
        out.append(table.row("import of a trainer", "s", times, peer, t, goal and "≤ 1.4" or None, mib,
                             goal and "≤ 300" or None))  # fmt: skip
        out.append(table.row("… modules", "modules", modules, peer, n, goal and "≤ 1250" or None))
    return out


def install_rows(quick=False, gpu=False, rounds=0, only=""):
    """Distributions and MB on disk that a plain install brings beyond torch's own, by their metadata. What
    `extra`s would add does not count, nor what is not installed here."""
    with open(f"{table.ROOT}/pyproject.toml", encoding="utf-8") as f:
        listed = re.search(r"^dependencies = \[(.*?)^\]", f.read(), re.M | re.S)[1]
    torch = closure(["torch"])
    ours = closure(re.findall(r'"([\w-]+)', listed)) - torch
    theirs = closure(["trl"]) - torch if present("trl") else None
    sizes = [[sum(map(megabytes, x))] if x is not None else None for x in (ours, theirs)]
    counts = [[len(x)] if x is not None else None for x in (ours, theirs)]
    return [
        table.row("distributions beyond torch", "packages", counts[0], "TRL", counts[1], "≤ 12"),
        table.row("… on disk", "MB", sizes[0], "TRL", sizes[1], "≤ 200", note=" ".join(sorted(ours))),
    ]


def present(name):
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def closure(names):
    """Names of these distributions and of all that they need, as far as they are installed."""
    seen, queue = set(), list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name not in seen and present(name):
            seen.add(name)
            needs = (r for r in metadata.requires(name) or () if "extra ==" not in r)
            queue += [re.match(r"[\w.-]+", r)[0] for r in needs]
    return seen


def megabytes(name):
    files = (f.locate() for f in metadata.files(name) or ())
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6
