"""The errors that end a run, and the seeds of its random numbers. This file imports nothing of ours.

`run/cli.py` prints a UserError or a RunError as one line. Other exceptions are bugs and keep their traceback.
"""

import contextlib
import hashlib


class UserError(Exception):
    """A user's mistake, in one line: the flag, or file and line, and what would be right. Exit status 2."""


class RunError(Exception):
    """A run that cannot go on, in one line: a loss that is not finite, a full disk. Exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, raised when the step is finished and saved. `code` is the exit status: 130, 143."""

    def __init__(self, signum):
        super().__init__("interrupted; the checkpoint is saved, --resume goes on from it")
        self.code = 128 + signum


def require(ok, message):
    """UserError with this message unless ok."""
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def blame(where, *errors):
    """Inside, a UserError, or one of these other errors, becomes the UserError "where: message"."""
    try:
        yield
    except (UserError, *errors) as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


def derive_seed(seed, *purpose):
    """A seed of 63 bits for one purpose, by hashing: no two purposes share random numbers.

    A run that is resumed at step 7 draws what it would have drawn, as nothing but (seed, purpose, 7) counts.

    >>> derive_seed(0, "rollout", 7) == derive_seed(0, "rollout", 7)
    True
    >>> derive_seed(0, "rollout", 7) == derive_seed(0, "rollout", 8)
    False
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
