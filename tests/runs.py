"""What the tests of run folders share: what is in them, bit for bit, and ways to break a run."""

import csv
import errno
from pathlib import Path

import pytest
import torch
from stages import TRAINERS

EACH = pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)


def snapshot(folder):
    """{path: contents} of everything in a folder."""
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def metrics(out):
    """The rows of metrics.csv without the two columns that are times."""
    with open(Path(out) / "metrics.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("s", "tok_s")} for row in csv.DictReader(f)]


def same_run(a, b):
    a, b = Path(a), Path(b)
    assert metrics(a) == metrics(b)
    for name in ("samples.jsonl", "tokens.jsonl.gz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert snapshot(a / "model") == snapshot(b / "model")
    assert states(a)[-1] == states(b)[-1] and equal(state(a), state(b))


def states(out):
    return sorted(p.name for p in (Path(out) / "state").iterdir())


def state(out, name=None):
    """A run's state, without what depends on the clock: the bytes of the logs, and the last figures."""
    saved = torch.load(Path(out) / "state" / (name or states(out)[-1]) / "state.pt", weights_only=True)
    assert saved.pop("sizes").keys() == {"metrics.csv", "samples.jsonl", "tokens.jsonl.gz"}
    assert saved.pop("last")
    return saved


def equal(a, b):
    """Nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Crash(BaseException):
    """A power cut: nothing catches it."""


def crash():
    raise Crash


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def disk_full(*args, **kw):
    raise OSError(errno.ENOSPC, "No space left on device")


def to_argv(flags):
    """{name: value, or a list of values} → a command line."""
    argv = []
    for key, value in flags.items():
        argv += [f"--{key}={x}" for x in (value if isinstance(value, list) else [value])]
    return argv
