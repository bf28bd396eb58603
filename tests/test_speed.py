"""Rates that are measured, and what they decide: the number of threads of real models."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from stages import jsonl, words

import train_sft
from nanorlhf.run import device, speed


def test_a_rate_is_work_by_time(monkeypatch):
    """A clock that moves 1 s with each look: eight products of 2 · 4 · 6 · 10 operations in each second."""
    now = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(now)))
    assert speed.flops(4, 6, 10, seconds=2.5) == 2 * 4 * 6 * 10 * 8
    state = torch.get_rng_state()
    speed.flops(2, 2, 2, seconds=0.0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rates, best", [
    ({1: 100, 2: 50, 4: 20, 6: 10}, 1),  # busy
    ({1: 100, 2: 190, 4: 350, 6: 500}, 6),  # free
    ({1: 10, 2: 50, 4: 105, 6: 100}, 6),  # too close to tell
    ({1: 10, 2: 50, 4: 150, 6: 100}, 4),
])  # fmt: skip
def test_the_fastest_number_of_threads(rates, best, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(speed, "flops", lambda *args, **kw: float(rates[torch.get_num_threads()]))
    assert speed.best_threads(6, 8, 8)[0] == best and torch.get_num_threads() == before


@pytest.fixture
def measured(monkeypatch):
    """A machine of four threads on which two are fastest now, and where 40,000 parameters are many."""
    calls = []

    def best(most, *args):
        calls.append(most)
        return 2, {1: 1e9, 2: 5e9, 4: 3e9}

    monkeypatch.setattr(device, "best_threads", best)
    monkeypatch.setattr(device, "THREADS", 4)
    monkeypatch.setattr(device, "LARGE", 1000)
    before = torch.get_num_threads()
    yield calls
    torch.set_num_threads(before)


def test_threads_of_a_real_model_are_measured_once(measured, stages, tmp_path, capsys, no_curves):
    """Printed, kept in config.json, and the same after --resume; a number that is given is not measured."""
    flags = stages.flags(train_sft, tmp_path / "run", threads=0, data=jsonl(tmp_path / "d.jsonl", words(64)))
    train_sft.train(train_sft.Config(**flags | dict(steps=2)))
    assert measured == [4] and torch.get_num_threads() == 2
    says = "--threads 2: measured just now, 1 GFLOP/s on 1, 5 GFLOP/s on 2, 3 GFLOP/s on 4"
    assert says in capsys.readouterr().out
    train_sft.train(train_sft.Config(**flags | dict(steps=3, resume=True)))
    assert measured == [4] and torch.get_num_threads() == 2
    assert "--threads was" not in capsys.readouterr().out
    train_sft.train(train_sft.Config(**flags | dict(steps=1, threads=1, overwrite=True)))
    assert measured == [4] and torch.get_num_threads() == 1


def test_a_small_model_has_one_thread(measured, monkeypatch):
    monkeypatch.setattr(device, "LARGE", 50_000_000)
    device.to_device(SimpleNamespace(dtype="float32", threads=0, device="cpu"), torch.device("cpu"), tiny())
    assert measured == [] and torch.get_num_threads() == 1
