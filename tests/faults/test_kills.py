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
KILLS, STEPS = 30 if FULL else 3, 12
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


def begun(process, phases):
    """Wait for a process's first word."""
    while process.is_alive() and phases.read_bytes() == b".":
        time.sleep(0.001)


@posix
@pytest.mark.slow
@EACH
def test_row_01_kill_at_any_moment(trainer, stages, tmp_path, monkeypatch):
    """S | kill -9 at 30 random moments of each trainer, in rollout, update and save, resumed each time | no
    failed restart; weights, metrics.csv and samples.jsonl bit-equal to the uninterrupted run"""
    phases, rng = tmp_path / "phase", random.Random(trainer.__name__)
    whole = start(trainer, flags_of(trainer, stages, tmp_path / "whole"), phases)
    begun(whole, phases)
    length = time.monotonic()
    whole.join()
    length = time.monotonic() - length
    assert whole.exitcode == 0, Path(f"{phases}.txt").read_text()
    hits, runs = Counter(), 0
    while sum(hits.values()) < KILLS:
        out, runs, ended = tmp_path / f"run{runs}", runs + 1, False
        while not ended:
            target = PHASES[sum(hits.values()) % 3]
            more = {} if not (out / "config.json").exists() else dict(resume="true")
            process = start(trainer, flags_of(trainer, stages, out) | more, phases)
            if sum(hits.values()) < KILLS:
                begun(process, phases)
                process.join(rng.uniform(0, 0.7 * length))
                while process.is_alive() and phases.read_bytes() != target[:1].encode():
                    time.sleep(0.0002)  # after a random time, when this phase comes next, and a little later
                process.join(rng.uniform(0, 0.002))
                process.kill()
            process.join()
            assert process.exitcode in (0, -9), Path(f"{phases}.txt").read_text()
            if process.exitcode == -9:  # it was at work: what it said last is where it died
                hits[phases.read_bytes().decode()] += 1
            ended = process.exitcode == 0
        compare(tmp_path / "whole", out)
    found = {phase: hits[phase[0]] for phase in PHASES}
    print(f"\n{trainer.__name__}: {sum(hits.values())} kills landed in {runs} runs: {found}, "
          f"{hits['-'] + hits['.']} elsewhere; every run ended bit-equal")  # fmt: skip
    assert all(found.values()) or not FULL


def compare(a, b):
    assert metrics(a) == metrics(b) and len(metrics(a)) == STEPS
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert snapshot(a / "model") == snapshot(b / "model")
    assert not list(b.glob("**/*.tmp"))
