"""What the doctor says of broken runs, and of healthy ones.

    python bench/doctor.py                  its column in docs/broken-runs.md, from docs/data/broken_*.csv
    python bench/doctor.py RUN [RUN ...]    the findings in run folders, and how many of them have any

The second form is how the thresholds were tried on seeds that they were not chosen on; broken runs of other
seeds are made by `python bench/broken_runs.py --seed 3`.
"""

import re
import sys

from broken_runs import FAULTS
from curves import DATA, ROOT, rows_of

import train_grpo
from nanorlhf.look import doctor
from nanorlhf.run.cli import parse, to_json

PAGE = ROOT / "docs/broken-runs.md"


def of_fault(fault):
    """The findings in docs/data/broken_NAME.csv, and in tokens.jsonl.gz where that is kept."""
    config = to_json(parse(train_grpo.Config, fault.flags.split()))
    tokens = doctor.read_tokens(DATA / f"broken_{fault.name}")
    return doctor.diagnose(rows_of(f"broken_{fault.name}"), config, tokens)


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


def main(folders):
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
