"""The table of docs/reliability.md, made of the docstrings of the tests named test_row_NN_…

    python -m tests.faults             print it
    python -m tests.faults --update    write it into the page
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reliability.md"
KINDS = {"R": "refused", "S": "survived", "X": "stopped"}


def rows():
    """→ {row: [(kind, fault, what happens, link to the test)]}."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            number = re.match(r"test_row_(\d\d)_", getattr(node, "name", ""))
            if number:
                text = " ".join((ast.get_docstring(node) or "").split())
                parts = [part.strip() for part in text.split(" | ")]
                assert len(parts) == 3 and parts[0] in KINDS, f"{node.name}: not `R | fault | what happens`"
                where = f"[`{node.name}`](../{path.relative_to(ROOT).as_posix()})"
                found.setdefault(int(number[1]), []).append((*parts, where))
    return found


def table():
    lines = ["| # | what goes wrong | | what happens | test |", "|---|---|---|---|---|"]
    for number, tests in sorted(rows().items()):
        for kind, fault, result, where in tests:
            lines.append(f"| {number} | {fault} | {KINDS[kind]} | {result} | {where} |")
    return "\n".join(lines)


def filled(page):
    """The page with the table as it is now between its two marks."""
    marks = r"(<!-- faults -->\n).*?(\n<!-- /faults -->)"
    return re.sub(marks, lambda m: m[1] + table() + m[2], page, flags=re.S)


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
