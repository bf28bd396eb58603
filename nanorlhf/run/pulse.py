"""A sign of life where the next line of the log is long in coming, as in the first step of a large model."""

import time

from tqdm import tqdm

SILENCE = 15.0  # seconds
_last = [time.monotonic()]  # when a line was printed


def is_late():
    """Whether nothing was printed for SILENCE seconds."""
    return time.monotonic() - _last[0] > SILENCE


def printed():
    """Somebody prints a line."""
    _last[0] = time.monotonic()


def sign(text):
    """Print a line such as "sampling: token 40 of 64" if none was printed for SILENCE seconds."""
    if is_late():
        printed()
        tqdm.write(f"  … {text}")
