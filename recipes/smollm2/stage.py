"""Run one stage of a recipe, and write down what it took.

    python -m recipes.smollm2.stage RUN NAME COMMAND ...

adds a row to RUN/stages.csv: when the stage began (seconds of the epoch), its wall and CPU seconds, the
most memory of one process in MB, and, where COMMAND has an --out, after how many seconds its metrics.csv
had the first row. The exit status is that of COMMAND; a stage that fails gets no row. SIGTERM, Ctrl-C and
SIGHUP are handed on to COMMAND, and a trainer saves. The death of the shell that runs the recipe counts as
SIGTERM: the trainer would go on alone.
"""

import csv
import os
import resource
import signal
import subprocess
import sys
import time

from recipes.smollm2 import command

STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
COLUMNS = ("stage", "began", "seconds", "cpu_seconds", "peak_mb", "first_row")


def has_row(path, began):
    """Whether a metrics.csv that was written since then has a row below its header."""
    if not os.path.exists(path) or os.path.getmtime(path) < began:
        return False
    with open(path, encoding="utf-8") as f:
        return f.read().count("\n") > 1


def add_row(path, row):
    is_new = not os.path.exists(path)
    with open(path, "a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main(run, name, program, *arguments):
    metrics = ""
    if "--out" in arguments[:-1]:
        folder = arguments[arguments.index("--out") + 1]
        metrics = os.path.join(folder, "metrics.csv")
    began = time.time()
    first_row = ""
    shell = os.getppid()
    received = []  # signals to hand on
    for signum in STOP:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup asks to ignore SIGHUP
            signal.signal(signum, lambda signum, frame: received.append(signum))
    # In a session of its own, COMMAND gets a signal from here alone: the second one ends a trainer unsaved
    child = subprocess.Popen([program, *arguments], start_new_session=True)
    stopping = False
    while True:
        ended = child.poll() is not None
        if not first_row and has_row(metrics, began):
            first_row = f"{time.time() - began:.1f}"
        if ended:  # only now: on a busy machine the child may have ended within one sleep
            break
        is_alone = os.getppid() != shell
        time.sleep(0.1)  # what ended the shell may have been sent to this process too, and counts once
        if is_alone and not stopping and not received:
            received.append(signal.SIGTERM)
        while received:
            stopping = True
            os.killpg(child.pid, received.pop(0))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    if child.returncode == 0:
        seconds = time.time() - began
        cpu_seconds = used.ru_utime + used.ru_stime
        peak_mb = used.ru_maxrss / unit
        figures = [f"{began:.1f}", f"{seconds:.1f}", f"{cpu_seconds:.1f}", f"{peak_mb:.0f}", first_row]
        add_row(os.path.join(run, "stages.csv"), dict(zip(COLUMNS, [name, *figures])))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    command(main, __doc__)
