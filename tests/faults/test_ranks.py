"""Faults of one process among several. Docstrings are rows of docs/reliability.md."""

import os
import sys
from pathlib import Path

import pytest
from runs import metrics, states
from test_dist import NEVER, ROOT, torchrun

import train_grpo
from nanorlhf.run.checkpoint import damage

REWARD = """
import os
calls = 0
def score(prompt, text):
    global calls
    calls += 1
    open(os.path.join(os.path.dirname(__file__), "pid-" + os.environ["RANK"]), "w").write(str(os.getpid()))
    if os.environ["RANK"] == "1" and calls > 50:
        raise ValueError("no score from rank 1")
    return float(len(text))
"""


KILLED = """
import os, signal
calls = 0
def score(prompt, text):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(text))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there")
def test_row_51_one_process_of_two_is_killed(stages, tmp_path):
    """X | kill -9 of one process among several, as the kernel does when the memory is full | the others end,
    with one line; the last checkpoint is whole"""
    (tmp_path / "reward.py").write_text(KILLED)
    out = tmp_path / "run"
    flags = stages.flags(train_grpo, out, steps=1000, off_policy_steps=0, save_every=1)
    flags |= dict(reward=f"{tmp_path}/reward.py:score", reward_timeout=0, rm="")
    job = torchrun(ROOT / "train_grpo.py", *(f"--{k}={v}" for k, v in flags.items() if v != ""))
    _, errors = job.communicate(timeout=NEVER)
    assert job.returncode == 1 and errors.count("train_grpo.py: ") <= 1, errors
    assert "train_grpo.py: stopped: another process of this run has ended" in errors
    assert errors.count("Traceback") == 1, errors  # torchrun's own
    saved = [name for name in states(out) if not name.endswith(".tmp")]
    assert saved and damage(f"{out}/state/{saved[-1]}") is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pids are asked for as POSIX has it")
def test_row_42_two_processes(stages, tmp_path):
    """X | with --shard one process has fewer rows and micro-batches, and shorter responses, than the other;
    then it raises | the steps before end as ever; both end within seconds, the error is said once, by the
    process that met it, and the last checkpoint is whole"""
    (tmp_path / "reward.py").write_text(REWARD)
    out, how = tmp_path / "run", dict(off_policy_steps=0, tokens_per_microbatch=20, save_every=1, shard=True)
    flags = stages.flags(train_grpo, out, steps=1000, prompts_per_step=3, minibatches=1, **how)
    flags |= dict(reward=f"{tmp_path}/reward.py:score", reward_timeout=0, rm="")
    job = torchrun(ROOT / "train_grpo.py", *(f"--{k}={v}" for k, v in flags.items() if v != ""))
    _, errors = job.communicate(timeout=NEVER)
    assert job.returncode == 1 and errors.count("train_grpo.py: ") == 1, errors
    assert "stopped: reward score raised ValueError: no score from rank 1" in errors
    done, saved = len(metrics(out)), [name for name in states(out) if not name.endswith(".tmp")]
    assert done > 1 and saved[-1] in (f"step-{done:06d}", f"step-{done - 1:06d}")
    assert damage(f"{out}/state/{saved[-1]}") is None
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(f"{tmp_path}/pid-{rank}").read_text()), 0)
