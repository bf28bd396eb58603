"""kill -9 at random moments. FAULTS_FULL=1 pytest tests/faults/test_kills.py -s: 30 of each trainer."""

import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from runs import EACH, metrics, snapshot, to_argv
from victim import PHASES, train

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_sft

FULL = bool(os.environ.get("FAULTS_FULL"))
KILLS, STEPS = 30 if FULL else 4, 12
posix = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there")


def flags_of(trainer, stages, out):
    """A run of about a second that samples, updates and saves all the time."""
    flags = stages.flags(trainer, out, steps=STEPS, save_every=1, lr=1e-3)
    if trainer is train_sft:
        return flags | dict(eval_every=1)  # its samples are what a rollout is to others
    if trainer is train_dpo:
        online = dict(online=STEPS, pairs=8 * STEPS, group_size=2, eval_every=1)
        return flags | online | dict(rm=f"{stages.folder}/rm/model")
    if trainer in (train_ppo, train_grpo, train_distill):
        return flags
    if not (sft := out.parent / "sft").exists():
        size = dict(n_layer=1, n_head=2, d_model=16, demos=60, vocab_size=400, max_len=128, steps=1)
        train_sft.train(train_sft.Config("reviews", out=str(sft), eval_every=0, **size))
    flags.pop("data")  # the reward model's pairs are sampled, at the start
    return flags | dict(init=f"{sft}/model", pairs=64)


def start(trainer, flags, phases):
    """→ the running process; forked by a server that has torch imported, so that it begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nanorlhf.hub", "nanorlhf.run.checkpoint", trainer.__name__])
    phases.write_bytes(b".")  # starting
    process = context.Process(target=train, args=(trainer.__name__, to_argv(flags), str(phases)))
    process.start()
    return process


def saved(out):
    """Whether a run folder has a complete checkpoint."""
    return any(not path.suffix for path in (out / "state").glob("step-*"))


def begun(process, phases):
    """Wait for a process's first word."""
    while process.is_alive() and phases.read_bytes() == b".":
        time.sleep(0.001)


@posix
@pytest.mark.slow
@EACH
def test_row_01_kill_at_any_moment(trainer, stages, tmp_path, monkeypatch):
    """S | kill -9 at 30 random moments of each trainer behind its first checkpoint, in rollout, reward,
    update and saving, resumed each time | no failed restart; weights, metrics.csv and samples.jsonl bit-equal
    to the uninterrupted run"""
    phases, rng = tmp_path / "phase", random.Random(trainer.__name__)
    whole = start(trainer, flags_of(trainer, stages, tmp_path / "whole"), phases)
    begun(whole, phases)
    length = time.monotonic()
    whole.join()
    length = time.monotonic() - length
    assert whole.exitcode == 0, Path(f"{phases}.txt").read_text()
    hits, runs, tries = Counter(), 0, 0
    scores = trainer in (train_ppo, train_grpo, train_dpo)
    phases_here = [phase for phase in PHASES if scores or phase != "reward"]
    while hits.total() < KILLS:
        out, runs, ended = tmp_path / f"run{runs}", runs + 1, False
        while not ended:
            target = PHASES[phases_here[tries % len(phases_here)]]
            tries += 1  # not every try hits: RM samples only at its start
            more = {} if not (out / "config.json").exists() else dict(resume="true")
            process = start(trainer, flags_of(trainer, stages, out) | more, phases)
            if hits.total() < KILLS:
                begun(process, phases)
                while process.is_alive() and not saved(out):  # before the first one there is nothing to lose
                    time.sleep(0.001)
                process.join(rng.choice([0, rng.uniform(0, 0.5 * length)]))
                while process.is_alive() and phases.read_bytes() != target.encode():
                    time.sleep(0.0002)  # after a random time, when this phase comes next, and a little later
                process.join(rng.uniform(0, 0.002))
                process.kill()
            process.join()
            assert process.exitcode in (0, -9), Path(f"{phases}.txt").read_text()
            if process.exitcode == -9:  # it was at work: what it said last is where it died
                hits[phases.read_bytes().decode()] += 1
            ended = process.exitcode == 0
        compare(tmp_path / "whole", out)
    found = {phase: hits[PHASES[phase]] for phase in phases_here}
    print(f"\n{trainer.__name__}: {hits.total()} kills behind a checkpoint, in {runs} runs: "
          f"{found}, {hits['-'] + hits['.']} elsewhere; every run ended bit-equal")  # fmt: skip
    assert all(found.values()) or not FULL


def compare(a, b):
    assert metrics(a) == metrics(b) and len(metrics(a)) == STEPS
    for name in ("samples.jsonl", "tokens.jsonl.gz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert snapshot(a / "model") == snapshot(b / "model")
    assert not list(b.glob("**/*.tmp"))
