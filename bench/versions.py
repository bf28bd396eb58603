"""The oldest and the newest torch, numpy and triton that pyproject.toml allows, each in a fresh environment.

    python bench/versions.py                              oldest and newest, for this Python
    python bench/versions.py oldest --python python3.10   one of them, for another Python
    python bench/versions.py torch==2.9.1 numpy==2.3.5    these, and of the rest what pip takes
    python bench/versions.py --report                     no run: write the table into docs/reliability.md

Each run makes an environment in a temporary folder, 1 to 6 GB with a CUDA build of torch, copies the last
commit there, runs the core tests and deletes both. A row goes to bench/results/versions.csv; a row of the
same Python, torch, numpy and triton is replaced.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench import table  # noqa: E402

PATH = os.path.join(table.RESULTS, "versions.csv")
COLUMNS = "run python torch numpy triton passed skipped failed seconds commit date note".split()
KEY = "python torch numpy triton".split()
TOOLS = ["pytest>=8", "hypothesis>=6"]
CORE = [f"tests/test_{name}.py" for name in
        "model kernels triton decode generate slots sft rm dpo grpo ppo distill dist".split()]  # fmt: skip
FOUND = """
import json, sys, numpy, torch
try:
    import triton
    triton = triton.__version__
except ImportError:
    triton = "-"
python = ".".join(map(str, sys.version_info[:3]))
print(json.dumps(dict(python=python, torch=torch.__version__, numpy=numpy.__version__, triton=triton)))
"""


def dependencies():
    """What pyproject.toml asks for, such as ["torch>=2.6", ...]."""
    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as f:
        listed = re.search(r"^dependencies = \[(.*?)^\]", f.read(), re.M | re.S)[1]
    return re.findall(r'"([^"]+)"', listed)


def requirements(run):
    """What pip is asked to install: `oldest`, `newest`, or the requirements in `run` before our ranges.

    >>> requirements("torch==2.9.1")[:2]
    ['torch==2.9.1', 'torch>=2.6']
    """
    ranges = dependencies()
    if run == "oldest":
        ranges = [x.replace(">=", "==") + ".*" for x in ranges]
    chosen = [] if run in ("oldest", "newest") else run.split()
    return chosen + ranges + TOOLS


def count(report):
    """A JUnit report → passed, skipped, failed and the names of what failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = [{part.tag for part in case} for case in cases]
    failed = [f"{case.get('name')}" for case, kind in zip(cases, kinds) if kind & {"failure", "error"}]
    skipped = sum("skipped" in kind for kind in kinds)
    return dict(passed=len(cases) - skipped - len(failed), skipped=skipped, failed=len(failed),
                note="; ".join(failed)[:300])  # fmt: skip


def check(run, python):
    """Install, run the core tests → a row."""
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([python, "-m", "venv", f"{tmp}/venv"], check=True)
        own = f"{tmp}/venv/bin/python"
        wanted = requirements(run)
        print(f"{run}: installing {' '.join(wanted)}", flush=True)
        subprocess.run([own, "-m", "pip", "install", "--quiet", *wanted], check=True)
        found = subprocess.run([own, "-c", FOUND], capture_output=True, text=True, check=True)
        versions = json.loads(found.stdout)
        print(f"{run}: {versions}", flush=True)
        copy = f"{tmp}/copy"
        os.mkdir(copy)
        about = table.about()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", copy], input=archive.stdout, check=True)
        report = f"{tmp}/report.xml"
        tests = [
            own,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        start = time.perf_counter()
        subprocess.run([*tests, *CORE], cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = f"{time.perf_counter() - start:.0f}"
        more = dict(run=run, seconds=seconds, commit=about["commit"].rstrip("+"), date=about["date"])
        return more | versions | count(report)


def rows():
    if not os.path.exists(PATH):
        return []
    with open(PATH, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def keep(row):
    """Write a row, in place of one of the same versions."""
    kept = [old for old in rows() if any(old[k] != str(row[k]) for k in KEY)]
    with open(PATH, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, row])


def markdown():
    shown = [*KEY, "passed", "skipped", "failed", "commit", "note"]
    lines = [shown, ["---"] * len(shown)]
    lines += [[row[k] for k in shown] for row in sorted(rows(), key=lambda row: version(row["torch"]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def version(text):
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]


def main(argv):
    python = sys.executable
    if "--python" in argv:
        at = argv.index("--python")
        python = argv[at + 1]
        argv = argv[:at] + argv[at + 2 :]
    if argv != ["--report"]:
        pinned = [" ".join(x for x in argv if "==" in x)] if any("==" in x for x in argv) else []
        named = [x for x in argv if x in ("oldest", "newest")]
        for run in pinned + named or ["oldest", "newest"]:
            keep(check(run, python))
    table.fill(os.path.join(ROOT, "docs", "reliability.md"), {"versions": markdown()})
    print(markdown())


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main(sys.argv[1:])
