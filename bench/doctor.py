"""What the doctor says of broken runs, and of healthy ones.

    python bench/doctor.py                  its column in docs/broken-runs.md, from docs/data/broken_*.csv
    python bench/doctor.py RUN [RUN ...]    the findings in run folders, and how many of them have any
    python bench/doctor.py --keep RUN ...   these runs, into bench/results/doctor.jsonl.gz, for the tests

Thresholds were chosen on seeds 0 and 1 of default runs and seed 0 of the broken ones, and tried on others:
default runs of all trainers, and broken ones made by `python bench/broken_runs.py --seed 3`. The tests read
what was kept of them.
"""

import gzip
import json
import re
import sys
from pathlib import Path

from broken_runs import FAULTS
from curves import BENCH, DATA, ROOT, rows_of

import train_grpo
from nanorlhf.hub.files import read_json
from nanorlhf.look import doctor
from nanorlhf.look.tokens import read as read_tokens
from nanorlhf.run.cli import parse, to_json
from nanorlhf.run.folders import read_rows

PAGE = ROOT / "docs/broken-runs.md"
KEPT = BENCH / "doctor.jsonl.gz"
UNREAD = set("lr rounds sampled limit value_loss critic_gnorm len_wrong".split())  # by any rule


def of_fault(fault):
    """The findings in docs/data/broken_NAME.csv, and in tokens.jsonl.gz where that is kept."""
    config = to_json(parse(train_grpo.Config, fault.flags.split()))
    records = read_tokens(DATA / f"broken_{fault.name}")
    return doctor.diagnose(rows_of(f"broken_{fault.name}"), config, records)


def with_column(page):
    """The text of the page, the last cell of each fault's row written anew: the titles of three findings."""
    says = {}
    for fault in FAULTS:
        titles = [finding["title"] for finding in of_fault(fault)[:3]]
        says[fault.name] = "; ".join(titles) or "nothing"
    lines = []
    for line in page.split("\n"):
        name = re.match(r"\| \*\*.*?\(data/broken_(\w+)\.csv", line)
        if name:
            line = f"{line[: line.rindex('|', 0, -1)]}| {says[name[1]]} |"
        lines.append(line)
    return "\n".join(lines)


def small(rows):
    """Rows without what no rule reads; all but the first with four digits and without times."""
    kept = []
    for i, row in enumerate(rows):
        dropped = UNREAD | ({"s", "tok_s"} if i else set())
        row = {name: x for name, x in row.items() if name not in dropped}
        if i:
            row |= {name: float(f"{x:.4g}") for name, x in row.items() if isinstance(x, float)}
        kept.append(row)
    return kept


def keep(folders):
    """Write the runs as JSON lines: {"run": the last two parts of the path, "config", "columns", "rows"}."""
    lines = []
    for folder in sorted(folders):
        rows = small(read_rows(folder))
        first = list(rows[0])
        table = [[row.get(name) for name in first] for row in rows]
        name = "/".join(Path(folder).parts[-2:])
        config = read_json(Path(folder, "config.json"))
        for flag, value in config.items():
            if isinstance(value, str) and value.startswith("/"):
                config[flag] = "/".join(Path(value).parts[-3:])  # without the folders of this machine
        lines.append(json.dumps({"run": name, "config": config, "columns": first, "rows": table}) + "\n")
    KEPT.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def kept():
    """→ what `keep` has written, the rows as read_rows gives them."""
    with gzip.open(KEPT, "rt", encoding="utf-8") as f:
        runs = [json.loads(line) for line in f]
    for run in runs:
        run["rows"] = [dict(zip(run["columns"], row)) for row in run["rows"]]
    return runs


def main(folders):
    if folders[:1] == ["--keep"]:
        return keep(folders[1:])
    if not folders:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_column(page), encoding="utf-8")
    ill = 0
    for folder in folders:
        found = doctor.findings(folder)
        ill += bool(found)
        print(folder, *(f"{finding['title']} [{finding['steps']}]" for finding in found), sep="\n    ")
    if folders:
        print(f"{ill} of {len(folders)} runs have findings")


if __name__ == "__main__":
    main(sys.argv[1:])
