"""The doctor over many runs: what it says of broken ones and of healthy ones.

    python bench/doctor.py                   docs/data/broken_*.csv: a line each, and the column of the page
    python bench/doctor.py RUN [RUN ...]     run folders, such as runs/seed0/*: how many have findings

The second line is how the thresholds were tried on seeds that they were not chosen on. To make the runs:

    for s in 0 1 2 3 4; do python train_sft.py --seed $s --out runs/seed$s/sft; done        and so on
    python bench/broken_runs.py --seed 1 --keep runs/broken1
"""

import sys
from pathlib import Path

from broken_runs import FAULTS
from curves import DATA, ROOT

from nanorlhf.look import doctor
from nanorlhf.look.folder import read_config, read_rows
from nanorlhf.run.cli import parse, to_json

SAYS = {fault.name: fault.says for fault in FAULTS} if hasattr(FAULTS[0], "says") else {}


def flags_of(fault):
    """The flags of a broken run as its config.json has them."""
    import train_grpo

    return to_json(parse(train_grpo.Config, fault.flags.split()))


def diagnosed(fault):
    """The findings in docs/data/broken_NAME.csv."""
    from nanorlhf.look.folder import rows_of

    return doctor.diagnose(rows_of(DATA / f"broken_{fault.name}.csv"), flags_of(fault))


def main(folders):
    for fault in FAULTS if not folders else ():
        found = diagnosed(fault)
        print(f"{fault.name:12s} {'; '.join(f['title'] for f in found[:3])}")
    for folder in folders:
        found = doctor.findings(folder)
        print(f"{folder:40s} {len(found)} {'; '.join(f['title'] + ' — ' + f['steps'] for f in found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
