"""Hostile model folders, run folders and chat templates by the thousand: no traceback, hang, foreign write.

    python -m tests.faults.fuzz                             500 cases, a third of each kind
    python -m tests.faults.fuzz --cases 20000 --seed 1      a night's worth
    python -m tests.faults.fuzz --kind runs --only 17       one case again, with its outcome

Each case runs in a process of its own, which may use 5 seconds of the processor's time and 2 GB beyond what
Python and torch take. It must end well, or with one line of at most 500 characters, and no file outside the
folder that it writes to may change. A case that fails is printed with its kind and number.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # stages.py, as pytest finds it

from stages import TRAINERS, Stages

from nanorlhf.look import plots
from tests.faults import folders, run_folders, templates

KINDS = "models", "runs", "templates"


def attacks(kind, seed, folder):
    """The function that runs case number n of this kind, once what it needs has been made in `folder`."""
    room = folder / "room"
    if kind == "models":
        goods = folders.good_folders(folder / "models")
        return lambda number: folders.attack(goods, number, seed, room)
    if kind == "templates":
        return lambda number: templates.attack(number, seed, room)
    stages = Stages(folder / "stages")
    stages.trainers = TRAINERS
    goods = run_folders.good_runs(stages, TRAINERS)
    return lambda number: run_folders.attack(goods, stages, number, seed, room)


def main(argv=None):
    """Run the cases, print those that failed and the numbers of each outcome → 1 if some failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="this kind alone")
    parser.add_argument("--only", type=int, help="this case alone, of a --kind")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plots.pyplot = lambda: None  # a figure takes longer than a tiny run, and so does a disk
    os.fsync = lambda fd: None
    kinds = [args.kind] if args.kind else KINDS
    failed = 0
    for kind in kinds:
        numbers = range(args.cases // len(kinds)) if args.only is None else [args.only]
        counts = {"used": 0, "refused": 0, "failed": 0}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("models", "stages"):
                Path(folder, name).mkdir()
            attack = attacks(kind, args.seed, Path(folder))
            start = time.perf_counter()
            for number in numbers:
                said = attack(number)
                outcome = said.split()[0]
                counts[outcome if outcome in counts else "failed"] += 1
                if outcome not in counts or args.only is not None:
                    print(f"{kind} {number}: {said}", flush=True)
                if number % 1000 == 999:  # a night's worth that is broken off has shown something
                    print(f"{kind}, {number + 1} cases so far: {counts}", flush=True)
            seconds = time.perf_counter() - start
        print(f"{kind}: {counts}, {seconds / max(1, len(numbers)):.2f} s a case", flush=True)
        failed += counts["failed"]
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
