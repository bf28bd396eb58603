"""Runs the checks of weeks on a student's files, in a process of its own with a time limit for each check."""

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass

from course.checking import HERE, folder_of, load_check
from nanorlhf.errors import require

START = 300.0  # seconds that Python and torch may take to start
LIMIT = 20.0  # seconds of one check
ENDLESS = (
    "it was still running after {limit:g} seconds: a loop that never ends, or one that is slow? "
    "(--seconds 60 gives it more)"
)
EXITED = "the program ended in the middle of this check: does your code call exit() or quit()?"


@dataclass
class Result:
    exercise: str
    points: int
    passed: bool | None  # None: it cannot be checked on this machine
    message: str


def lines_of(process):
    """A queue of the lines that a process prints, None at its end."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_worker(mine, items, limit):
    """Check items ("3:pairwise_loss") in one process → {item: (passed, message)} of those it came to.

    A check that takes longer than the limit, or that ends the process, is the last of them, and has failed.
    """
    command = [sys.executable, "-m", "course.worker", mine, *items]
    root = os.path.dirname(HERE)
    environment = os.environ | {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=mine, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    lines = lines_of(process)
    found = {}
    running = items[0]
    seconds = START
    message = EXITED
    try:
        while len(found) < len(items):
            line = lines.get(timeout=seconds)
            if line is None:
                break
            report = json.loads(line)
            if "start" in report:
                running = report["start"]
                seconds = limit
            else:
                found[report["item"]] = (report["passed"], report["message"])
    except queue.Empty:
        message = ENDLESS.format(limit=seconds)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if len(found) < len(items):
        found[running] = (False, message)
    return found


def check_weeks(weeks, mine, limit=LIMIT):
    """Check the files of some weeks in the folder `mine` (laid out as course/) → {week: list of Result}."""
    mine = os.path.abspath(mine)
    points = {week: load_check(week).POINTS for week in weeks}
    items = [f"{week}:{name}" for week in weeks for name in points[week]]
    found = {}
    left = items
    while left:  # one round, and one more after each check that had to be ended
        found |= run_worker(mine, left, limit)
        left = [item for item in items if item not in found]
    results = {}
    for week in weeks:
        results[week] = []
        for name, worth in points[week].items():
            passed, message = found[f"{week}:{name}"]
            results[week].append(Result(name, worth, passed, message))
    return results


def require_file(week, mine):
    path = os.path.join(mine, folder_of(week), "exercise.py")
    require(os.path.isfile(path), f"--mine {mine}: there is no {folder_of(week)}/exercise.py in this folder")


def summary(results):
    """Results → passed exercises, exercises, points, possible points; what cannot be checked is left out."""
    counted = [r for r in results if r.passed is not None]
    passed = [r for r in counted if r.passed]
    return {
        "passed": len(passed),
        "exercises": len(counted),
        "points": sum(r.points for r in passed),
        "of": sum(r.points for r in counted),
    }
