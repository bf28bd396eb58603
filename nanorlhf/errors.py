"""The ground everything stands on: the errors a run ends with, and the seeds. It imports nothing of ours.

A user's mistake is a UserError, a run that cannot go on a RunError; `run/cli.py` prints either as one line.
"""

import contextlib
import hashlib


class UserError(Exception):
    """A mistake of the user's: one line (flag, or file and line, and what would be right), exit status 2."""


class RunError(Exception):
    """A run that cannot go on (non-finite loss, full disk): one line, exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the step was finished and saved. `code` is the exit status, 130 or 143."""

    def __init__(self, signum):
        super().__init__("interrupted; the checkpoint is saved, --resume goes on from it")
        self.code = 128 + signum


def require(ok, message):
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def blame(where, *errors):
    """A UserError from within, or one of these other errors, becomes the UserError "where: what it says"."""
    try:
        yield
    except (UserError, *errors) as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


def derive_seed(seed, *path):
    """Hash of (seed, purpose): streams never overlap, and a run's random state is its step alone."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
