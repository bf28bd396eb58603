"""The ladder: from REINFORCE to DPO in six programs, each a short step from the one before.

    python course/ladder/1_reinforce.py        runs in seconds and prints its curve
    python -m course diff 2                    what 2_baseline.py changes in it

They import torch and nothing of ours, and tests/test_ladder.py compares their losses with the trainers'.
"""

import difflib
import re
from pathlib import Path

HERE = Path(__file__).parent
GREEN = "\033[32m"
RED = "\033[31m"
PLAIN = "\033[0m"
FUNCTION = re.compile(r"^def (\w+)\(.*\n(?:(?:    .*)?\n)*", re.M)  # with its indented and its blank lines


def steps():
    """The six programs, in order."""
    return sorted(HERE.glob("[0-9]_*.py"))


def diff(step, colour=False):
    """What program `step`, 2 to 6, changes in the one before → a unified diff, in colour if asked.

    A function that is removed as a whole takes one line, "-def gae(…  # 8 lines": the others need no reading.
    """
    old, new = steps()[step - 2 : step]
    after = new.read_text(encoding="utf-8")
    kept = {m[1] for m in FUNCTION.finditer(after)}

    def fold(m):
        if m[1] in kept:
            return m[0]
        body = m[0].rstrip().count("\n")
        return f"def {m[1]}(…  # {body + 1} lines\n"

    before = FUNCTION.sub(fold, old.read_text(encoding="utf-8"))
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), old.name, new.name, n=1, lineterm=""
    )
    shown = []
    for line in lines:
        paint = {"+": GREEN, "-": RED}.get(line[0])
        shown.append(f"{paint}{line}{PLAIN}" if colour and paint else line)
    return "\n".join(shown)
