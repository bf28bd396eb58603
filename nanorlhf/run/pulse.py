"""A sign of life where the next line of the log is long in coming, as in the first step of a large model.

Only while a run has its log open: whoever samples in a notebook is told nothing.
"""

import time

from tqdm import tqdm

SILENCE = 15.0  # seconds
_last = [None]  # when a line was printed; None without a run


def is_late():
    """Whether a run has printed nothing for SILENCE seconds."""
    return _last[0] is not None and time.monotonic() - _last[0] > SILENCE


def printed():
    """A run prints a line."""
    _last[0] = time.monotonic()


def end():
    """The run has ended."""
    _last[0] = None


def sign(text):
    """Print a line such as "sampling: token 40 of 64" if none was printed for SILENCE seconds."""
    if is_late():
        printed()
        tqdm.write(f"  … {text}")
