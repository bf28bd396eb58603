"""A long run and the memory that it takes: GRPO on a tiny model, its reward function in another process.

    python -m tests.faults.soak                     10,000 steps
    python -m tests.faults.soak --steps 1000        fewer

Ten times in the run it prints the memory of the trainer and of the process of the rewards, in MB, and the
objects that Python holds. The first fifth of the run warms up, because caches fill and the allocator gets to
know the sizes of the tensors. After that neither process may grow by more than 5 MB.
"""

import argparse
import gc
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # stages.py, as pytest finds it

from stages import Stages

import train_grpo
from nanorlhf.look import plots
from nanorlhf.run.log import Log
from nanorlhf.run.worker import Rewards

GROWTH = 5 << 20  # bytes that each process may grow by
REWARD = """
def score(prompt, response, row):
    return float(len(response) % 3)
"""


def resident(pid="self"):
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def objects():
    """→ {type: objects of it that Python's collector knows}, and the blocks of memory in use, of any type."""
    gc.collect()
    found = Counter(type(x).__name__ for x in gc.get_objects())
    found["blocks"] = sys.getallocatedblocks()
    return found


def soak(stages, out, steps, marks, look):
    """Run GRPO for so many steps → what look(pid of the rewards' process) returns at `marks` moments."""
    reward = Path(out).parent / "soak_reward.py"
    reward.write_text(REWARD)
    small = dict(prompts_per_step=2, group_size=2, minibatches=1, off_policy_steps=0, sample_every=50)
    judge = dict(rm="", reward=[f"{reward}:score"], reward_timeout=60)
    cfg = stages.config(train_grpo, out, steps=steps, lr=1e-5, save_every=steps // 5, **small, **judge)
    seen = []
    workers = []
    row = Log.row
    call = Rewards._call

    def remember(rewards, i, *args):
        answer = call(rewards, i, *args)
        workers[:] = [rewards.process.process.pid]
        return answer

    def watch(log, step, metrics):
        row(log, step, metrics)
        if (step + 1) % (steps // marks) == 0:
            seen.append(look(workers[0]))

    Log.row = watch
    Rewards._call = remember
    try:
        train_grpo.train(cfg)
    finally:
        Log.row = row
        Rewards._call = call
    return seen


def main(argv=None):
    """Print what each tenth of the run takes → 1 where a process grew by more than GROWTH, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plots.pyplot = lambda: None
    os.fsync = lambda fd: None

    def look(pid):
        found = resident(), resident(pid), objects()["blocks"]
        print(f"soak: trainer {found[0] / 1e6:.2f} MB, rewards {found[1] / 1e6:.2f} MB, "
              f"{found[2]:,} blocks of Python", flush=True)  # fmt: skip
        return found

    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Path(folder))
        seen = soak(stages, f"{folder}/run", args.steps, 10, look)
    settled = seen[1:]  # behind the first fifth
    failed = 0
    for i, name in enumerate(("trainer", "process of the rewards")):
        growth = max(mark[i] for mark in settled) - settled[0][i]
        print(f"{name}: {growth / 1e6:+.2f} MB from step {args.steps // 5} on")
        failed |= growth > GROWTH
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
