"""Runs the labs, one file a paper.

    python -m labs                   the table of all, and what each asks: labs/gallery.py
    python -m labs scaling           one lab: results.csv, verdict.json and figure.png in out/labs/scaling
    python -m labs NAME --smoke      its smallest size, in seconds: shows that the code runs, and nothing else
    python -m labs all               every lab, one after the other
    python -m labs replicate         again on seeds of its own, frozen beforehand: labs/replication.py

A lab is a module with

    PAPER, QUESTION, PREDICTION, STATISTIC, DIFFERS    sentences
    CHANGES, SEEDS                                     a list of what was changed after a full run; 3 or 5
    points(smoke) -> [dict]                            points of the sweep: numbers and short strings
    run(point, seed, smoke) -> [dict]                  rows of one point and one seed
    effects(rows) -> {label: [a value for each seed]}  what is above 0 if the prediction holds
    verdict(rows) -> seen, sentence, {name: number}    from the rows of results.csv alone
    figure(rows, path)

Each (point, seed) is a job; a finished one is a file in parts/, so that an interrupted lab goes on where it
was. A job is done again when the lab's own code changes, except for FREE, its conclusions; a stage
when its trainer or its flags change. After a change in nanorlhf/ delete out/labs.
"""

import ast
import contextlib
import csv
import glob
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from labs import common
from nanorlhf.errors import Interrupted, require
from nanorlhf.look.plots import pyplot
from nanorlhf.run import device
from nanorlhf.run.cli import check_ranges, run_cli

HERE = os.path.dirname(os.path.abspath(__file__))
FREE = "PAPER QUESTION PREDICTION STATISTIC DIFFERS CHANGES SEEDS effects verdict figure".split()
NO_LAB = ("__init__", "__main__", "common", "gallery", "replication", "run")
FILES = ("results.csv", "verdict.json", "figure.png")


@dataclass
class Config:
    smoke: bool = False  # the smallest size, one seed
    seeds: int = 0  # seeds 0, 1, … of each point; 0: as many as the lab asks for
    workers: int = 2  # processes, each with one thread
    out: str = "out/labs"  # folder of all labs and of the stages that they share
    publish: bool = False  # copy the results to labs/results
    seed = 0  # each job has its own

    def __post_init__(self):
        check_ranges(self, ("workers",))
        require(not (self.smoke and self.publish), "--publish: a smoke run shows nothing")


def names():
    files = sorted(glob.glob(f"{HERE}/*.py"))
    stems = [os.path.splitext(os.path.basename(path))[0] for path in files]
    return [name for name in stems if name not in NO_LAB]


def load(name):
    near = ", ".join(names())
    require(name in names(), f"there is no lab {name}; choose one of {textwrap.shorten(near, 400)}")
    return importlib.import_module(f"labs.{name}")


def name_of(statement):
    """Of a top-level statement: the function's, the class's or the variable's, and None of any other."""
    if isinstance(statement, ast.Assign):
        return getattr(statement.targets[0], "id", None)
    return getattr(statement, "name", None)


def source_hash(name):
    """Of what a lab's results come from: its code without comments, sentences, verdict and figure."""
    with open(f"{HERE}/{name}.py", encoding="utf-8") as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body[1:] if name_of(node) not in FREE]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def job(name, point, seed, smoke, root, path):
    """Run one point with one seed and leave its rows, CPU time and stages in the file `path`."""
    common.root = root
    common.used.clear()
    common.made.clear()
    torch.set_num_threads(1)
    device.THREADS = 1  # above a million parameters too: the other cores are for the other jobs
    start = common.cpu_seconds()
    try:
        rows = load(name).run(point, seed, smoke)
    except Interrupted as e:
        raise KeyboardInterrupt from e
    cpu = common.cpu_seconds() - start - sum(common.made.values())
    part = {"rows": rows, "cpu": cpu, "stages": dict(common.used)}
    with open(f"{path}.tmp", "w") as f:
        json.dump(part, f)
    os.replace(f"{path}.tmp", path)


def run_jobs(jobs, workers):
    """Arguments of `job` → all done, with a line for each as it ends."""
    start, todo = time.perf_counter(), [j for j in jobs if not os.path.exists(j[-1])]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are done already")

    def say(done, point, seed):
        spent = time.perf_counter() - start
        left = spent / done * (len(todo) - done) / 60
        what = ", ".join(f"{k} {v}" for k, v in {**point, "seed": seed}.items())
        head = f"[{done}/{len(todo)}] {spent / 60:.1f} min, about {left:.1f} left: "
        print(head + textwrap.shorten(what, 79 - len(head)), flush=True)

    if workers == 1:
        for done, j in enumerate(todo, start=1):
            job(*j)
            say(done, j[1], j[2])
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(job, *j): j for j in todo}
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            say(done, *futures[future][1:3])
    finally:
        pool.shutdown(cancel_futures=True)


def write_csv(path, rows):
    columns = list(dict.fromkeys(k for r in rows for k in r))
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        for r in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, (int, float)) else v for k, v in r.items()})


def read_csv(path):
    """→ rows: numbers are float, text stays text, an empty cell is None."""

    def value(cell):
        with contextlib.suppress(ValueError):
            return float(cell)
        return cell or None

    with open(path, newline="", encoding="utf-8") as f:
        return [{k: value(v) for k, v in r.items()} for r in csv.DictReader(f)]


def conclude(lab, rows):
    """→ {"seen", "verdict", "numbers"} of rows of results.csv; numbers are rounded to 4 digits."""
    seen, sentence, numbers = lab.verdict(rows)
    numbers = {k: float(f"{v:.4g}") for k, v in numbers.items()}
    return {"seen": bool(seen), "verdict": sentence, "numbers": numbers}


def commit():
    """Of the code, with "-dirty" where it has changed since; empty outside a git clone."""
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return ""


def machine():
    return f"{platform.machine()}, one thread a process, torch {torch.__version__}"


def run_points(name, seeds, cfg, out):
    """All jobs of a lab on these seeds, each a file in out/parts → rows, CPU-minutes with all stages."""
    if cfg.smoke:  # what it has to show is that the code runs now
        shutil.rmtree(out, ignore_errors=True)
    os.makedirs(f"{out}/parts", exist_ok=True)
    jobs, code = [], source_hash(name)
    for point in load(name).points(cfg.smoke):
        for seed in seeds:
            key = hashlib.sha256(json.dumps([point, seed, cfg.smoke, code]).encode()).hexdigest()[:16]
            jobs.append((name, point, seed, cfg.smoke, cfg.out, f"{out}/parts/{key}.json"))
    run_jobs(jobs, 1 if cfg.smoke else cfg.workers)
    rows, cpu, stages = [], 0.0, {}
    for _, point, seed, *_, path in jobs:
        with open(path) as f:
            part = json.load(f)
        rows += [{"seed": seed, **point, **row} for row in part["rows"]]
        cpu += part["cpu"]
        stages |= part["stages"]
    return rows, round((cpu + sum(stages.values())) / 60, 2)


def run_lab(name, cfg):
    """All jobs of a lab, then results.csv, verdict.json and figure.png → the dict of verdict.json."""
    lab, smoke = load(name), cfg.smoke
    seeds = 1 if smoke else cfg.seeds or lab.SEEDS
    out = f"{cfg.out}/{name}" + "/smoke" * smoke
    rows, minutes = run_points(name, range(seeds), cfg, out)
    about = {
        "seeds": seeds, "cpu_minutes": minutes,
        "command": f"python -m labs {name}" + " --smoke" * smoke + f" --seeds {seeds}" * (seeds != lab.SEEDS),
        "commit": commit(),
        "machine": machine(),
    }
    return write_results(name, rows, cfg, out, FILES, conclude, about)


def write_results(name, rows, cfg, out, files, judge, about):
    """Write table, verdict and figure into out, with cfg.publish into labs/results as well → the verdict.

    files: their three names. judge(lab, rows as the table has them) → what it concludes. about: how the rows
    were made. Both go into the verdict, beside the sentences of the lab.
    """
    lab = load(name)
    table, verdict_file, picture = files
    write_csv(f"{out}/{table}", rows)
    rows = read_csv(f"{out}/{table}")  # so that the verdict follows from what is published
    verdict = {"lab": name, "paper": lab.PAPER, "prediction": lab.PREDICTION, "statistic": lab.STATISTIC}
    verdict |= judge(lab, rows)
    verdict |= {"smoke": cfg.smoke, "differs": lab.DIFFERS, "changes": lab.CHANGES} | about
    if pyplot():
        lab.figure(rows, f"{out}/{picture}")
    with open(f"{out}/{verdict_file}", "w", encoding="utf-8") as f:
        json.dump(verdict, f, indent=2, ensure_ascii=False)
    if cfg.publish:
        os.makedirs(f"{HERE}/results/{name}", exist_ok=True)
        for file in files:
            shutil.copy(f"{out}/{file}", f"{HERE}/results/{name}/{file}")
    return verdict


def last_line(verdict):
    """'scaling: effect seen, 6.4 CPU-min, 3 seeds'"""
    word = "effect seen" if verdict["seen"] else "effect not seen"
    if verdict["smoke"]:
        word = "smoke run, no evidence"
    return f"{verdict['lab']}: {word}, {verdict['cpu_minutes']:.1f} CPU-min, {verdict['seeds']} seeds"


def show(verdict):
    for key in ("prediction", "statistic", "verdict", "differs"):
        print(textwrap.fill(f"{key}: {verdict[key]}", 80, subsequent_indent="    "))
    for change in verdict["changes"]:
        print(textwrap.fill(f"changed, or chosen on another seed: {change}", 80, subsequent_indent="    "))
    print(last_line(verdict))


def main(argv):
    """The command line → exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    sys.argv[0] = "-m labs"  # what --help and errors call the program
    chosen = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))

    def run(cfg):
        require(chosen, "name a lab, or `all`; `python -m labs` alone prints the table of them")
        for name in names() if chosen == ["all"] else chosen:
            show(run_lab(name, cfg))

    return run_cli(Config, run, __doc__, argv[len(chosen):])

