"""What a fault test needs: runs of 50 ms through the command line's own main(argv)."""

import os
from typing import NamedTuple

import pytest
from runs import to_argv


class Done(NamedTuple):
    """status, what was printed, and the lines on stderr."""

    status: int
    out: str
    err: list[str]

    def refused(self, *words):
        """One line, exit status 2, with these words in it."""
        return self._line(2, "error", words)

    def stopped(self, *words):
        """One line, exit status 1."""
        return self._line(1, "stopped", words)

    def _line(self, status, kind, words):
        assert (self.status, len(self.err)) == (status, 1), self
        assert f": {kind}: " in self.err[0] and all(str(w) in self.err[0] for w in words), self.err[0]
        return True


@pytest.fixture(autouse=True)
def quick(no_curves, monkeypatch):
    """No curves, and no fsync: neither is what these tests are about, and both are slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def cli(capsys):
    """cli(trainer, flags) → Done, by main(argv)."""

    def call(trainer, flags):
        capsys.readouterr()
        status = trainer.main(to_argv(flags))
        out, err = capsys.readouterr()
        return Done(status, out, err.splitlines())

    return call


@pytest.fixture
def run(cli, stages, tmp_path):
    """run(trainer, name, **flags) → Done, of a run into tmp_path/name."""
    return lambda trainer, name="run", **more: cli(trainer, stages.flags(trainer, tmp_path / name, **more))
