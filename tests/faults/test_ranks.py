"""Faults of one process among several. Docstrings are rows of docs/reliability.md."""

import os
import random
import signal
import sys
import time

import pytest
import torch
from runs import equal, metrics, same_run, states
from test_dist import NEVER, ROOT, torchrun
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train_grpo
from nanorlhf.checkpoint import damage

posix = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there, nor pids as POSIX has them")
REWARD = """
import os
calls = 0
def score(prompt, text):
    global calls
    calls += 1
    open(os.path.join(os.path.dirname(__file__), "pid-" + os.environ["RANK"]), "w").write(str(os.getpid()))
    if os.environ["RANK"] == "1" and calls > LIMIT:
        raise ValueError("no score from rank 1")
    return float(len(text))
"""


def start(stages, out, limit=10**9, **more):
    """→ a job of two processes, where their numbers stand. The second one raises after `limit` rewards."""
    score = out.parent / "reward.py"
    score.write_text(f"LIMIT = {limit}\n{REWARD}")
    more |= dict(reward=f"{score}:score", reward_timeout=0)
    flags = stages.flags(train_grpo, out, off_policy_steps=0, tokens_per_microbatch=20, save_every=1, **more)
    job = torchrun(ROOT / "train_grpo.py", *(f"--{k}={v}" for k, v in flags.items() if k != "rm"))
    return job, [out.parent / f"pid-{rank}" for rank in (0, 1)]


def pieces(out):
    """The tensors of the last sharded checkpoint, put together."""
    dcp_to_torch_save(f"{out}/state/{states(out)[-1]}/shards", f"{out}/whole.pt")
    return torch.load(f"{out}/whole.pt", weights_only=True)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_killed_at_any_moment(shard, stages, tmp_path):
    """Row 1: resumed by two processes, the run ends bit-equal to the uninterrupted one of two processes."""
    out = tmp_path / "run"
    job, _ = start(stages, tmp_path / "whole", shard=shard, steps=8)
    _, errors = job.communicate(timeout=NEVER)
    assert job.returncode == 0, errors
    job, pids = start(stages, out, shard=shard, steps=8)
    while job.poll() is None and not ((out / "metrics.csv").exists() and len(metrics(out)) > 2):
        time.sleep(0.01)
    time.sleep(random.Random(shard).uniform(0, 0.2))
    for pid in pids:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    job.communicate(timeout=NEVER)
    assert job.returncode != 0 and 2 < len(metrics(out)) < 8
    job, _ = start(stages, out, shard=shard, steps=8, resume="auto")
    printed, errors = job.communicate(timeout=NEVER)
    assert job.returncode == 0 and "resume: " in printed, errors
    same_run(tmp_path / "whole", out)
    if shard:
        assert equal(pieces(tmp_path / "whole"), pieces(out))


@posix
@pytest.mark.slow
def test_row_42_two_processes(stages, tmp_path):
    """X | with --shard one process has fewer rows and micro-batches, and shorter responses, than the other;
    then it raises | the steps before end as ever; both end within seconds, the error is said once, by the
    process that met it, and the last checkpoint is whole"""
    out = tmp_path / "run"
    job, pids = start(stages, out, 50, shard=True, steps=1000, prompts_per_step=3, minibatches=1)
    _, errors = job.communicate(timeout=NEVER)
    assert job.returncode == 1 and errors.count("train_grpo.py: ") == 1, errors
    assert "stopped: reward score raised ValueError: no score from rank 1" in errors
    done, saved = len(metrics(out)), [name for name in states(out) if not name.endswith(".tmp")]
    assert done > 1 and saved[-1] in (f"step-{done:06d}", f"step-{done - 1:06d}")
    assert damage(f"{out}/state/{saved[-1]}") is None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
