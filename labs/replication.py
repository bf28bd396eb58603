"""The labs on seeds that no run has used, with statistic and number of seeds fixed beforehand.

    python -m labs replicate --freeze      what each lab is held to → labs/replication.json, to be committed
    python -m labs replicate               every lab in that file, on seeds 2000, 2001, …
    python -m labs replicate scaling       one of them → out/labs/replication/scaling; --publish copies it
                                           to labs/results: then `python -m labs gallery` renews the page
    python -m labs replicate --smoke       their smallest size: shows that the code runs, and nothing else

A lab of this kind has, besides what labs/run.py lists,

    effects(rows) -> {label: [a value for each seed]}    above 0 on the average, says the prediction

The effect is seen if the 95% interval of every label lies above 0. --freeze takes the labs that are not in
the file, or those that it is given. A lab with rows of earlier seeds in labs/results gets as many seeds as
give the effect seen there a power of 80%, within the limits below; any other lab gets its own SEEDS.
"""

import ast
import datetime
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import torch

from labs import common, run
from nanorlhf.errors import require
from nanorlhf.hub.files import read_json
from nanorlhf.look.plots import T975
from nanorlhf.run.cli import check_ranges, run_cli

FIRST_SEED = 2000
POWER = 0.8  # of all intervals of a lab together
FEWEST, MOST = 3, 12  # seeds
MINUTES = 20  # of CPU time a lab
THRESHOLD = "the 95% interval by Student's t of each label lies above 0"
RULE = (
    f"Seeds from {FIRST_SEED} on. Number of seeds: the fewest from {FEWEST} to {MOST} at which all intervals "
    f"lie above 0 with a probability of {POWER:.0%} if mean and deviation are those of the earlier rows, in "
    f"at most {MINUTES} CPU-minutes a lab at the cost of the earlier run (a stage that labs share counts in "
    "each of them, and is trained once). A lab without earlier rows of this set-up has its own SEEDS. Each "
    "hash is of code without comments and layout."
)
FILES = ("replication.csv", "replication.json", "replication.png")


@dataclass
class Config:
    freeze: bool = False  # write what the labs are held to into labs/replication.json; run no lab
    smoke: bool = False  # the smallest size, one seed
    workers: int = 2  # processes, each with one thread
    out: str = "out/labs"  # folder of all labs and of the stages that they share
    publish: bool = False  # copy the results to labs/results
    seed = 0  # each job has its own

    def __post_init__(self):
        check_ranges(self, ("workers",))
        require(not (self.smoke and self.publish), "--publish: a smoke run shows nothing")
        require(not (self.freeze and self.publish), "--publish: --freeze runs no lab")


# ------------------------------------------------------------------------------------------------------------
# what a lab is held to


def frozen_path():
    return f"{run.HERE}/replication.json"


def read_frozen():
    """→ {name: entry} of labs/replication.json."""
    return read_json(frozen_path()).get("labs", {})


def plain(node):
    """A syntax tree as nested lists; empty fields are left out, which other versions of Python add."""
    if isinstance(node, list):
        return [plain(x) for x in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, plain(x)] for name, x in ast.iter_fields(node) if x is not None and x != []]
    return [type(node).__name__, fields]


def code_hash(name, wanted):
    """Of the top-level statements of a lab whose name `wanted` accepts; the docstring is no part of it."""
    with open(f"{run.HERE}/{name}.py", encoding="utf-8") as f:
        statements = ast.parse(f.read()).body[1:]
    kept = [plain(x) for x in statements if wanted(run.name_of(x))]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def identity(name):
    """What must be the same when a lab is frozen and when it is run."""
    lab = run.load(name)
    require(hasattr(lab, "effects"), f"labs/{name}.py has no effects(rows)")
    return {
        "prediction": lab.PREDICTION,
        "statistic": lab.STATISTIC,
        "hash_of_effects_and_verdict": code_hash(name, lambda x: x in ("effects", "verdict")),
        "hash_of_other_code": code_hash(name, lambda x: x not in run.FREE),
    }


def frozen_entry(name):
    """The entry of a lab, which must be frozen as it is now."""
    run.load(name)  # a name that is none is told so
    entry = read_frozen().get(name)
    command = f"`python -m labs replicate {name} --freeze`, then commit labs/replication.json"
    require(entry, f"{name} is not frozen; {command}")
    for key, value in identity(name).items():
        changed = f"{name}: its {key.replace('_', ' ')} is not the one that labs/replication.json froze"
        require(entry[key] == value, changed)
    return entry


def power_of_one(effect, n):
    """Probability that the interval of n normal values lies above 0; effect: their mean / their deviation.

    It does where mean > quantile · s / √n. Given s the mean is normal, and s² is χ² with n − 1 degrees of
    freedom: the integral is over s, in units of the deviation.
    """
    df = n - 1
    s = torch.linspace(1e-6, 6, 20_001, dtype=torch.float64)
    log_density = (df - 1) * s.log() - df * s.square() / 2
    log_factor = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    above = torch.special.ndtr(math.sqrt(n) * effect - T975[n - 2] * s)
    return torch.trapezoid((log_density + log_factor).exp() * above, s).item()


def power(effects, n):
    """Of n seeds for all labels at once, however they hang together: 1 less the sum of their misses."""
    misses = 0.0
    for values in effects.values():
        misses += 1 - power_of_one(statistics.mean(values) / statistics.stdev(values), n)
    return max(0.0, 1 - misses)


def enough_seeds(effects, minutes_a_seed):
    """→ number of seeds, and what their power is, in words."""
    affordable = max(FEWEST, min(MOST, int(MINUTES / minutes_a_seed)))
    for n in range(FEWEST, affordable + 1):
        if power(effects, n) >= POWER:
            return n, f"{power(effects, n):.0%} for the effect of the earlier rows"
    limit = f"{MOST} seeds" if affordable == MOST else f"{MINUTES} CPU-minutes"
    words = f"{power(effects, affordable):.0%} for the effect of the earlier rows, below {POWER:.0%}: "
    return affordable, words + f"more do not fit in {limit}"


def new_entry(name, out):
    lab, folder = run.load(name), f"{run.HERE}/results/{name}"
    fixed = identity(name)
    minutes = None
    if os.path.exists(f"{folder}/results.csv"):
        before = read_json(f"{folder}/verdict.json")
        effects = lab.effects(run.read_csv(f"{folder}/results.csv"))
        minutes_a_seed = before["cpu_minutes"] / before["seeds"]
        seeds, words = enough_seeds(effects, minutes_a_seed)
        minutes = round(seeds * minutes_a_seed, 1)
    else:
        run.run_lab(name, run.Config(smoke=True, out=out))
        effects = lab.effects(run.read_csv(f"{out}/{name}/smoke/results.csv"))
        seeds, words = lab.SEEDS, "unknown: there are no earlier rows of this set-up"
    plan = {"labels": list(effects), "threshold": THRESHOLD, "first_seed": FIRST_SEED, "seeds": seeds}
    return fixed | plan | {"expected_cpu_minutes": minutes, "power": words}


def freeze(chosen, out):
    """Write the entries of these labs, or of all that have none yet."""
    entries = read_frozen()
    for name in chosen or [x for x in run.names() if x not in entries and hasattr(run.load(x), "effects")]:
        done = f"{run.HERE}/results/{name}/replication.json"
        require(not os.path.exists(done), f"{name} is replicated already: what it was held to stays as it is")
        entries[name] = new_entry(name, out)
    content = {"rule": RULE, "labs": {name: entries[name] for name in sorted(entries)}}
    with open(frozen_path(), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, ensure_ascii=False)
        f.write("\n")
    print(f"{'lab':<21}{'seeds':>6}{'CPU-min':>9}  power")
    for name, entry in content["labs"].items():
        minutes = entry["expected_cpu_minutes"]
        head = f"{name:<21}{entry['seeds']:>6}{'?' if minutes is None else minutes:>9}  "
        print(textwrap.fill(head + entry["power"], 80, subsequent_indent=" " * 38))
    known = [entry["expected_cpu_minutes"] or 0 for entry in content["labs"].values()]
    print(f"{'together':<21}{sum(e['seeds'] for e in content['labs'].values()):>6}{sum(known):>9.1f}")


# ------------------------------------------------------------------------------------------------------------
# the replication


def require_committed():
    """In a git clone the file must be committed as it is: else nothing shows that it was there first."""
    command = ["git", "status", "--porcelain", "--", frozen_path()]
    try:
        changed = subprocess.run(command, cwd=run.HERE, capture_output=True, text=True).stdout
    except OSError:  # no git
        changed = ""
    require(not changed, "labs/replication.json is not committed: commit it before the first run")


def intervals(effects):
    """Of each label the mean, half the 95% interval and the one-sided p, rounded to 4 digits."""
    found = {}
    for label, values in effects.items():
        mean, half = common.mean_ci(values)
        row = {"mean": mean, "half": half, "p": common.one_sided_p(values)}
        found[label] = {k: float(f"{v:.4g}") for k, v in row.items()}
    return found


def conclude(lab, rows):
    """→ what `run.conclude` finds, and the intervals of all labels; p of the lab is the largest one."""
    effects = lab.effects(rows)
    found = run.conclude(lab, rows) | {"seen": common.seen(effects), "effects": intervals(effects)}
    return found | {"p": max(row["p"] for row in found["effects"].values())}


def replicate(name, cfg):
    """All jobs of a lab on its frozen seeds, then its three files → the dict of replication.json."""
    entry = frozen_entry(name)
    first = entry["first_seed"]
    seeds = range(first, first + (1 if cfg.smoke else entry["seeds"]))
    out = f"{cfg.out}/replication/{name}" + "/smoke" * cfg.smoke
    rows, minutes = run.run_points(name, seeds, cfg, out)
    about = {"first_seed": first, "seeds": len(seeds), "cpu_minutes": minutes}
    about |= {"command": f"python -m labs replicate {name}" + " --smoke" * cfg.smoke}
    about |= {"commit": run.commit(), "date": str(datetime.date.today()), "machine": run.machine()}
    return run.write_results(name, rows, cfg, out, FILES, conclude, about)


def show(verdict):
    print(textwrap.fill(f"verdict: {verdict['verdict']}", 80, subsequent_indent="    "))
    for label, row in verdict["effects"].items():
        print(f"    {label}: {common.pm(row['mean'], row['half'])}, p = {row['p']:.2g}")
    print(run.last_line(verdict))


def main(argv):
    """The command line behind `python -m labs replicate` → exit status, as that of run.main."""
    sys.argv[0] = "-m labs replicate"  # what --help and errors call the program
    chosen = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))

    def replicate_all(cfg):
        if cfg.freeze:
            freeze(chosen, cfg.out)
            return
        names = chosen or list(read_frozen())
        require(names, "labs/replication.json holds no lab: `python -m labs replicate --freeze` writes it")
        for name in names:
            frozen_entry(name)  # all of them before the first takes its minutes
        if not cfg.smoke:
            require_committed()
        for name in names:
            show(replicate(name, cfg))
        if cfg.publish:
            print("published; `python -m labs gallery` renews labs/README.md and the forest plot")

    return run_cli(Config, replicate_all, __doc__, argv[len(chosen):])
