"""Reward functions: how --reward names them, and how they are called, in a process of their own.

A reward function is reward(prompt, response, row) → float, where row is the prompt's own row of the data.
"""

import contextlib
import importlib.util
import inspect
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from nanorlhf.errors import RunError, UserError, blame, require
from nanorlhf.run import dist

FP32_MAX = 3.4028234663852886e38  # rewards become fp32
EXPECTED = "it must be a finite number that fp32 can hold"
START = 120  # seconds in which the process of the reward functions must have imported them


class RewardFunction(NamedTuple):
    """A reward function with its name in the logs and its weight in the sum of the run's rewards."""

    name: str
    weight: float
    call: Callable  # (prompt, response, row) → float


def call_reward(name, fn, prompt, text, row):
    """Call a reward function in this process → float. Raises RunError, with the sample, if the call fails."""
    try:
        returned = fn(prompt, text, row)
    except UserError as e:  # a task's own reward refuses a prompt of another task
        raise UserError(f"{row.get('_at', name)}: {e}") from None
    except (Exception, SystemExit) as e:
        raise RunError(f"reward {name} raised {type(e).__name__}: {e} {_sample(prompt, text)}") from e
    value, wrong = _number(returned)
    if wrong:
        raise RunError(f"reward {name} {wrong} {_sample(prompt, text)}; {EXPECTED}")
    return value


def _sample(prompt, text):
    return f"(prompt {prompt!r}, response {text!r})"


def _number(returned):
    """What a function returned → (float, "") or (None, what is wrong). The string "1" is not a number."""
    try:
        value = float(returned)
    except Exception:
        value = math.nan
    if isinstance(returned, (str, bytes)) or not abs(value) <= FP32_MAX:
        return None, f"returned {returned!r:.80}"
    return value, ""


def rewards_of(task, specs, timeout=0.0):
    """The reward functions of a run: those of --reward (specs), else the task's own → Rewards.

    With a timeout those of --reward run in a process of their own; they are loaded here too, to report
    mistakes at once.
    """
    functions = [load_reward(spec) for spec in specs]
    if not functions and task.reward:
        functions = [RewardFunction(task.name, 1.0, task.reward)]
    return Rewards(functions, specs, timeout)


class Rewards:
    """Reward functions, a list of RewardFunction. Use it in a `with` statement where there are specs.

    With specs (what --reward says) and a timeout in seconds the functions run in another process, so that one
    that hangs, exits or crashes cannot stop the run: such a call scores 0 and is counted, as is a call that
    raises or takes longer than the timeout. A RunError follows if more than half of a function's calls on one
    batch fail (with several processes: on one process's share of it), or if a function returns something
    other than a finite number. This protects from accidents, not from malice. Without a timeout the functions
    are called in this process.
    """

    def __init__(self, functions, specs=(), timeout=0.0):
        names = [function.name for function in functions]
        for name in names:
            require(names.count(name) == 1, f"--reward: two are called {name}, their logs would be mixed")
        self.functions = functions
        self.specs = specs
        self.timeout = timeout
        self.process = None
        self.calls = 0
        self.failures = 0
        self.warned = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end()

    def check(self, row):
        """UserError for a row whose answer a function cannot read; `call.gold` of answers.py reads it."""
        for function in self.functions:
            if hasattr(function.call, "gold"):
                with blame(function.name):
                    function.call.gold(row)

    def values(self, i, texts, rows):
        """Call function i on every text, a response to its row's prompt → its values, a list of floats."""
        name, _, call = self.functions[i]
        pairs = list(zip(texts, rows, strict=True))
        if not (self.specs and self.timeout):
            return [call_reward(name, call, row["prompt"], text, row) for text, row in pairs]
        values = []
        failures = 0
        for text, row in pairs:
            value, why = self._call(i, row["prompt"], text, row)
            message = f"reward {name} {why} {_sample(row['prompt'], text)}"
            if value is None:
                raise RunError(f"{message}; {EXPECTED}")
            values.append(value)
            if not why:
                continue
            failures += 1
            if failures > len(pairs) / 2:
                raise RunError(f"more than half of {len(pairs)} calls failed; the last: {message}")
            if not self.warned:
                file = sys.stderr if dist.rank() else None  # torchrun shows stdout of rank 0 only
                tqdm.write(f"warning: {message}: scored 0; column reward_failed counts such calls", file=file)
                self.warned = True
        self.calls += len(pairs)
        self.failures += failures
        return values

    def columns(self):
        """Columns of metrics.csv, one for each function where there are several."""
        if len(self.functions) == 1:
            return []
        return [f"reward/{function.name}" for function in self.functions]

    def figures(self, roll):
        """What the log says of a Rollout's rewards: the share of failed calls, and each function's mean."""
        figures = {"reward_failed": self.share_failed()}
        for i, column in enumerate(self.columns()):
            figures[column] = roll.reward_parts[:, i].mean().item()
        return figures

    def share_failed(self):
        """The share of calls that failed since the last time, over all processes. None without any calls."""
        counts = dist.gather((self.calls, self.failures))
        self.calls = 0
        self.failures = 0
        calls = sum(calls for calls, _ in counts)
        failures = sum(failures for _, failures in counts)
        return failures / calls if calls else None

    def _call(self, i, *args):
        """→ (value, ""), (0.0, why) for a call that failed, (None, why) for a value that is not a number."""
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
        self.pipe, child_pipe = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(child_pipe, self.specs))
        self.process.start()
        child_pipe.close()
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(START) and self.pipe.recv():  # it is ready; --reward_timeout counts from here
                return
        self._end()
        raise RunError(f"--reward: the process that imports {', '.join(self.specs)} ended or hangs")

    def _end(self):
        if self.process is None:
            return
        with contextlib.suppress(OSError, AttributeError):  # Windows has no groups of processes
            os.killpg(self.process.pid, signal.SIGKILL)  # before join, which frees the number for others
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()
        self.process = None


def _serve(pipe, specs):
    """Main loop of the other process: answer (index, arguments) with (value, why) until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: killpg then also ends what the functions start
    os.dup2(2, 1)  # the functions' prints go to stderr, not between the lines of the log
    threading.Thread(target=_end_with_parent, daemon=True).start()
    functions = [load_reward(spec).call for spec in specs]
    me = os.getpid()
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
            os._exit(0)  # the function called os.fork, and this is the child: only the parent may answer
        pipe.send(answer)


def _end_with_parent():
    """End this process when the trainer is killed. A function that hangs never sees the closed pipe."""
    multiprocessing.parent_process().join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# Functions from a user's file


def load_reward(spec: str) -> RewardFunction:
    """`path/to/file.py:name` or `path/to/file.py:name*0.2` → RewardFunction. Raises UserError for mistakes.

    The file is run. A function that cannot take three arguments is called with (prompt, response).
    """

    def wrong(problem):
        return UserError(f"--reward {spec}: {problem}")

    path, _, rest = spec.rpartition(":")  # the last colon: C:\rewards.py:name has two
    name, star, factor = rest.partition("*")
    if not path or not name:
        raise wrong("expected path/to/file.py:name or path/to/file.py:name*0.2")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        weight = math.nan
    if not abs(weight) <= FP32_MAX:  # nan is not, either
        raise wrong("what stands after * is not a finite number")
    if not os.path.isfile(path):
        raise wrong(f"there is no file {path}")
    # The file's own name would not do: a/r.py and b/r.py are two modules.
    module_name = f"reward_{hash(os.path.abspath(path))}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None:
        raise wrong(f"{path} is not a .py file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does at import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise wrong(f"importing {path} fails: {reason}") from error
    function = getattr(module, name, None)
    if function is None:
        raise wrong(f"{path} defines no {name}")
    if _wants_row(function):
        return RewardFunction(name, weight, function)
    if _takes(function, 2):
        return RewardFunction(name, weight, lambda prompt, response, row: function(prompt, response))
    raise wrong(f"{name} takes neither (prompt, response, row) nor (prompt, response)")


def _wants_row(function) -> bool:
    """Whether to pass the row. A third parameter with a default, as in f(prompt, response, scale=1.0), is an
    option of the function's own unless its name is `row`."""
    if not _takes(function, 3):
        return False
    names = list(inspect.signature(function).parameters)
    return names[2:3] == ["row"] or not _takes(function, 2)


def _takes(function, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):  # ValueError: some builtins, max for one, have no signature
        return False
    return True
