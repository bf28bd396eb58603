"""Reward functions: called one by one, those of the user's own in a process of their own."""

import contextlib
import hashlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from tqdm import tqdm

from nanorlhf.errors import RunError, UserError, require
from nanorlhf.run import dist

START = 120  # seconds in which the process of the reward functions must have imported them


def call_reward(name, fn, prompt, text, row):
    """One call of a reward function, in this process → float; RunError naming the sample if that fails."""
    try:
        returned = fn(prompt, text, row)
    except UserError as e:  # a built-in reward meets a prompt that is not of its task
        raise UserError(f"{row.get('_at', name)}: {e}") from None
    except (Exception, SystemExit) as e:
        raise RunError(f"reward {name} raised {type(e).__name__}: {e} {_sample(prompt, text)}") from e
    value, wrong = _number(returned)
    if wrong:
        raise RunError(f"reward {name} {wrong} {_sample(prompt, text)}; it must be a finite number")
    return value


def _sample(prompt, text):
    return f"(prompt {prompt!r}, response {text!r})"


def _number(returned):
    """→ float, "" or None, what is wrong. A string is no number, whatever it says."""
    try:
        value = math.nan if isinstance(returned, (str, bytes)) else float(returned)
    except Exception:
        value = math.nan
    return (value, "") if math.isfinite(value) else (None, f"returned {returned!r:.80}")


class Rewards(list):
    """The reward functions of a run as (name, weight, function): those of --reward, else the task's own.

    Used in `with`. Those of --reward run in one process of their own: what hangs, exits or crashes there ends
    there. A call that raises, takes more than --reward_timeout seconds or ends the process scores 0 and is
    counted; if more than half of a function's calls on one batch (of several processes: on one's share of it)
    do, or one returns no finite number, that is a RunError. This holds accidents, not malice. With
    --reward_timeout 0 all are called in this process.
    """

    def __init__(self, cfg, task):
        loaded = [load_reward(spec) for spec in cfg.reward]  # here too, to say what is wrong with them
        super().__init__(loaded or [(task.name, 1.0, task.reward)])
        names = [name for name, *_ in self]
        for name in names:
            require(names.count(name) == 1, f"--reward: two are called {name}, their logs would be mixed")
        self.specs, self.timeout, self.process = cfg.reward, cfg.reward_timeout, None
        self.guarded = bool(loaded and self.timeout)
        self.calls = self.failures = 0
        self.warned = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end()

    def values(self, i, texts, rows):
        """What function i gives each of the texts, as a list of floats."""
        name, _, fn = self[i]
        pairs = list(zip(texts, rows, strict=True))
        if not self.guarded:
            return [call_reward(name, fn, row["prompt"], text, row) for text, row in pairs]
        values, failures, first = [], 0, ""
        for text, row in pairs:
            value, why = self._call(i, row["prompt"], text, row)
            said = f"reward {name} {why} {_sample(row['prompt'], text)}"
            if value is None:
                raise RunError(f"{said}; it must be a finite number")
            values.append(value)
            if not why:
                continue
            failures, first = failures + 1, first or said
            if failures > len(pairs) / 2:
                raise RunError(f"more than half of {len(pairs)} calls failed; the first: {first}")
            if not self.warned:
                said = f"warning: {said}: scored 0; column reward_failed counts such calls"
                tqdm.write(said, file=sys.stderr if dist.rank() else None)  # the others' stdout is not shown
            self.warned = True
        self.calls, self.failures = self.calls + len(pairs), self.failures + failures
        return values

    def share_failed(self):
        """Of the calls since this was asked last; None where there were none in the process."""
        calls, failures = map(sum, zip(*dist.gather((self.calls, self.failures))))
        share = failures / calls if calls else None
        self.calls = self.failures = 0
        return share

    def _call(self, i, *args):
        """→ (value, ""), (0.0, why) for a call that failed, (None, why) for a value that is no number."""
        if self.process is None:
            self._start()
        try:
            self.pipe.send((i, args))
            if self.pipe.poll(self.timeout):
                return self.pipe.recv()
            why = f"took more than {self.timeout:g} s (--reward_timeout)"
        except (EOFError, OSError):
            self.process.join(1)
            why = f"ended its process (status {self.process.exitcode})"
        self._end()
        return 0.0, why

    def _start(self):
        spawn = multiprocessing.get_context("spawn")  # fork would copy the locks of our threads, and CUDA
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, self.specs))
        self.process.start()
        theirs.close()
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(START) and self.pipe.recv() == "ready":  # importing is not on the call's clock
                return
        self._end()
        raise RunError(f"--reward: the process that imports {', '.join(self.specs)} ended or hangs")

    def _end(self):
        if self.process is None:
            return
        with contextlib.suppress(OSError, AttributeError):  # Windows has no groups of processes
            os.killpg(self.process.pid, signal.SIGKILL)  # before join: until then the number is its own
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()
        self.process = None


def _serve(pipe, specs):
    """The process of the reward functions: answers (value, why) to (index, arguments) until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    if hasattr(os, "setsid"):
        os.setsid()  # what the functions start can then be ended together with them
    os.dup2(2, 1)  # what they print does not get between the lines of the log
    threading.Thread(target=_end_with_parent, daemon=True).start()
    functions, me = [load_reward(spec)[2] for spec in specs], os.getpid()
    pipe.send("ready")
    while True:
        try:
            i, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = _number(functions[i](*args))
        except BaseException as e:  # sys.exit and KeyboardInterrupt among them
            answer = 0.0, " ".join(f"raised {type(e).__name__}: {e}".split())
        if os.getpid() != me:
            os._exit(0)  # a fork that the function made has come back here: only one may answer
        pipe.send(answer)


def _end_with_parent():
    """A function that hangs does not see the pipe end when the trainer is killed."""
    multiprocessing.parent_process().join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def sum_rewards(texts, rows, rewards, parts=None, device="cpu"):
    """Weighted sum of `rewards`, a list of (name, weight, function) → (B,); `parts` as in score_responses."""
    score, mine = torch.zeros(len(texts), device=device), dist.my_part(len(texts))
    pairs = list(zip(texts, rows, strict=True))[mine]  # of several processes each calls its share
    texts, rows = [text for text, _ in pairs], [row for _, row in pairs]
    for i, (name, weight, fn) in enumerate(rewards):
        if isinstance(rewards, Rewards):
            values = rewards.values(i, texts, rows)
        else:
            values = [call_reward(name, fn, r["prompt"], t, r) for t, r in pairs]
        part = torch.zeros_like(score)
        part[mine] = torch.tensor(values, device=device)
        part = dist.summed(part)
        score += weight * part
        if parts is not None:
            parts[name] = part
    return score


# ------------------------------------------------------------------------------------------------------------
# rewards that run what a model wrote

GUARD = """
import os, resource, sys
path, memory, size, seconds = sys.argv[1], *map(int, sys.argv[2:])
for what, limit in (("AS", memory), ("FSIZE", size), ("CPU", seconds), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
here = os.path.realpath(os.curdir) + os.sep
WRITES = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_CREAT
starts = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill",
          "os.killpg", "socket.connect", "socket.bind", "socket.sendto"}
paths = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
         "os.truncate", "os.utime", "shutil.rmtree", "shutil.move"}

def hook(event, args):
    if event in starts:
        raise PermissionError(event + " is not for a program under test")
    if event == "open":
        writes = any(c in args[1] for c in "wax+") if isinstance(args[1], str) else args[2] & WRITES
        names = args[:1] if writes else ()
    else:
        names = args[:2] if event in paths else ()
    for name in names:
        if isinstance(name, (str, bytes)) and not os.path.realpath(os.fsdecode(name)).startswith(here):
            raise PermissionError(f"{event} outside of the program's own folder: {name!r}")

with open(path) as f:
    code = compile(f.read(), "program.py", "exec")
sys.argv = ["program.py"]
sys.addaudithook(hook)
exec(code, {"__name__": "__main__"})
"""


def run_program(code, stdin="", timeout=5.0, memory_mb=512, output_bytes=1 << 16):
    """Run a Python program → (its exit status, or None where it took too long; what it printed).

    In a process of its own, in an empty folder that is then removed, without this process's environment:
    `timeout` seconds, `memory_mb` MiB of address space, `output_bytes` printed and in each file that it
    writes. It cannot open a file for writing elsewhere, start a process or connect, as long as it asks
    Python. This holds accidents, and what a model does to pass a test. It is not a security sandbox: native
    code, ctypes say, gets around it, and every file of yours can be read. POSIX only.
    """
    with tempfile.TemporaryDirectory() as folder:
        where, work = Path(folder), Path(folder, "work")
        work.mkdir()
        (where / "program.py").write_text(code, encoding="utf-8", errors="replace")
        (where / "stdin").write_text(stdin, encoding="utf-8", errors="replace")
        limits = map(str, (memory_mb << 20, output_bytes, math.ceil(timeout) + 1))
        argv = [sys.executable, "-I", "-c", GUARD, str(where / "program.py"), *limits]
        env = {"PATH": os.defpath, "HOME": str(work), "LANG": "C.UTF-8"}
        with open(where / "stdin", "rb") as given, open(where / "stdout", "wb") as printed:
            process = subprocess.Popen(argv, cwd=work, env=env, stdin=given, stdout=printed,
                                       stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                process.wait()
        with open(where / "stdout", "rb") as f:
            return status, f.read(output_bytes).decode("utf-8", "replace")


def load_reward(spec: str):
    """`path/to/file.py:name` or `path/to/file.py:name*0.2` → (name, weight, reward(prompt, response, row)).

    The file is run. A function that cannot take three arguments is called with (prompt, response).
    """

    def wrong(what):
        return UserError(f"--reward {spec}: {what}")

    path, colon, rest = spec.rpartition(":")  # the last colon: C:\rewards.py:name has two
    name, star, weight = rest.partition("*")
    if not colon or not path or not name:
        raise wrong("expected path/to/file.py:name or path/to/file.py:name*0.2")
    try:
        weight = float(weight) if star else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise wrong("what stands after * is not a finite number")
    if not os.path.isfile(path):
        raise wrong(f"there is no file {path}")
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:8]  # two files may have one stem
    module_spec = importlib.util.spec_from_file_location(f"reward_{digest}", path)
    if module_spec is None:
        raise wrong(f"{path} is not a .py file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does at import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise wrong(f"importing {path} fails: {reason}") from error
    function = getattr(module, name, None)
    if function is None:
        raise wrong(f"{path} defines no {name}")
    if not callable(function):
        raise wrong(f"{name} in {path} is not a function")
    if _wants_row(function):
        return name, weight, function
    if _takes(function, 2):
        return name, weight, lambda prompt, response, row: function(prompt, response)
    raise wrong(f"{name} takes neither (prompt, response, row) nor (prompt, response)")


def _wants_row(function) -> bool:
    """Whether a third argument is the row: not where it is an option of the function's own, `scale=1.0`."""
    if _takes(function, 3) and _takes(function, 2):
        names = list(inspect.signature(function).parameters) if callable(function) else []
        return len(names) > 2 and names[2] == "row"
    return _takes(function, 3)


def _takes(function, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature: let the call itself tell
        return True
    return True
