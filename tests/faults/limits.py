"""A case of the fuzzers in a process of its own, under limits, with a watch on the files around it."""

import hashlib
import os
import re
import resource
import select
import signal
import traceback

from nanorlhf.errors import RunError, UserError

SECONDS = 5  # of the processor's time
WAIT = 120  # seconds in all; a machine under load is slow, but a pipe that nobody writes to is for ever
BYTES = 2 << 30  # beyond what Python and torch take
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def watched(room, action, may_change=()):
    """Run action() under the limits → "used", "refused …", or what went wrong.

    Wrong is also a changed file in the folder `room`, unless it is one of `may_change` or lies below.
    """
    before = snapshot(room)
    said = limited(action)
    after = snapshot(room)
    for path in before.keys() | after.keys():
        free = any(path == folder or folder in path.parents for folder in may_change)
        if not free and before.get(path) != after.get(path):
            return f"changed {path.relative_to(room)} ({said})"
    return said


def limited(action):
    """Run action() in a fork under the limits → "used", "refused …", or what went wrong."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(action, send)
    os.close(send)
    said = ""
    if select.select([receive], [], [], WAIT)[0]:
        said = os.read(receive, 4000).decode("utf-8", "replace")
    else:
        os.kill(pid, signal.SIGKILL)
        said = f"waits for ever, or {WAIT} s"
    os.close(receive)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        said = f"busy for {SECONDS} s"
    return said or f"died with status {status}"


def _child(action, pipe):
    """Run the action under the limits and write its outcome into the pipe. Never returns."""
    os.setsid()  # no terminal, so that nothing is asked there
    with open("/proc/self/statm") as f:
        taken = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        said = action() or "used"
    except (UserError, RunError) as e:
        said = judged(str(e))
    except BaseException:
        said = f"traceback {traceback.format_exc()[-1500:]}"
    os.write(pipe, said.encode("utf-8", "replace")[:4000])
    os._exit(0)


def judged(message):
    """An error message → "refused …", or what is wrong with it."""
    if "\n" in message or len(message) > 500 + 40:  # 40: the program's name before it
        return f"no single short line {message[:300]!r}"
    if CONTROL.search(message):
        return f"control characters {message!r}"
    return f"refused {message}"


def snapshot(folder):
    """{path: kind, digest or target} of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[path] = path.lstat().st_mode
    return found
