"""Runs the checks of a week on a student's file, in a process of its own with a time limit for each check."""

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass

from course.checking import HERE, folder_of, load_check
from nanorlhf.errors import require

START = 120.0  # seconds that Python and torch may take to start
LIMIT = 20.0  # seconds of one check
SPOKEN = "the check of {name} was still running after {limit:g} seconds: is there a loop that never ends?"


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


def run_worker(folder, week, names, limit):
    """Check these exercises in one process → {exercise: (passed, message)} of those that it came to."""
    command = [sys.executable, "-m", "course.worker", folder, str(week), *names]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    lines = lines_of(process)
    found = {}
    running = None
    try:
        while True:
            try:
                line = lines.get(timeout=START if running is None else limit)
            except queue.Empty:
                name = running or names[0]
                told = SPOKEN.format(name=name, limit=limit)
                break
            if line is None:
                told = "the program ended in the middle of a check: does your code call exit() or quit()?"
                break
            report = json.loads(line)
            if "start" in report:
                running = report["start"]
            else:
                found[report["exercise"]] = (report["passed"], report["message"])
    finally:
        process.kill()
        process.wait()
    if len(found) < len(names):
        stopped_at = running if running in names else None
        for name in names if stopped_at is None else [stopped_at]:
            found[name] = (False, told)
    return found


def check_week(week, mine, limit=LIMIT):
    """Check the file of one week in the folder `mine` (laid out as course/ is) → list of Result."""
    points = load_check(week).POINTS
    folder = os.path.join(os.path.abspath(mine), folder_of(week))
    path = os.path.join(folder, "exercise.py")
    require(os.path.isfile(path), f"--mine {mine}: there is no {folder_of(week)}/exercise.py in this folder")
    found = {}
    while len(found) < len(points):  # one round, and one more after each check that had to be ended
        left = [name for name in points if name not in found]
        found |= run_worker(folder, week, left, limit)
    return [Result(name, points[name], *found[name]) for name in points]


def summary(results):
    """Results → passed exercises, exercises, points, possible points; those that cannot be checked are out."""
    counted = [r for r in results if r.passed is not None]
    passed = [r for r in counted if r.passed]
    return {
        "passed": len(passed),
        "exercises": len(counted),
        "points": sum(r.points for r in passed),
        "of": sum(r.points for r in counted),
    }
