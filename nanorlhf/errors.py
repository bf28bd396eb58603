"""The errors that end a run, and the seeds of its random numbers. This file imports nothing of ours.

`run/cli.py` prints a UserError or a RunError as one line. Other exceptions are bugs and keep their traceback.
"""

import contextlib
import hashlib
import pickle
import re

LONGEST = 500  # characters of an error message


# What a terminal obeys: escape sequences, a carriage return, the marks that turn text from right to left; and
# halves of a character, which cannot be printed.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    """Show control characters as their JSON escapes; newlines and tabs stay.

    >>> print(visible("a" + chr(27) + "[31mb"))
    a\\u001b[31mb
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shown(text, most=LONGEST):
    """A text as one visible line of at most `most` characters: of a longer one the middle is left out.

    A value of a million characters in a message would scroll everything else away.

    >>> shown("0123456789", most=7)
    '01 … 89'
    """
    line = visible(text).replace("\n", r"\n").replace("\t", " ")
    if len(line) <= most:
        return line
    part = (most - 3) // 2
    return f"{line[:part]} … {line[-part:]}"


class OneLine(Exception):
    """An error whose message is printed as one line."""

    def __str__(self):
        return shown(super().__str__())


class UserError(OneLine):
    """A user's mistake: the message names the flag, or file and line, and what is right. Exit status 2."""


class RunError(OneLine):
    """A run that cannot go on: a loss that is not finite, a full disk. Exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, raised when the step is finished and saved. `code` is the exit status: 130, 143."""

    def __init__(self, signum):
        super().__init__("interrupted; the checkpoint is saved, --resume goes on from it")
        self.code = 128 + signum


def reason_of(error):
    """The first line of a library's error; not of torch's refusal of a pickle, which advises to allow it."""
    if isinstance(error, pickle.UnpicklingError):
        return "no file of ours: it is damaged, or loading it would run code"
    return str(error).partition("\n")[0]


def out_of_memory(error):
    """Whether this is an error of a full memory: Python's, torch's of a GPU, or torch's of the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # this file imports no torch
        or isinstance(error, RuntimeError)
        and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def memory_for(name, advice):
    """Inside, a full memory is the RunError that says what was read, and not the flags of a step to lower."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RunError(f"{name}: out of memory: {reason_of(error) or 'no more is left'}; {advice}") from None


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
