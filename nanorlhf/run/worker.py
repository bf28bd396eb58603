"""The reward functions of a run, and the trainer's side of the process that calls them.

A reward function is reward(prompt, response, row) → float, where row is the prompt's own row of the data. The
other signatures are in run/reward_functions.py, with the side of the process that calls them.
"""

import sys

from tqdm import tqdm

from nanorlhf.errors import RunError, UserError, blame, require, shown
from nanorlhf.run import dist
from nanorlhf.run.aside import Aside
from nanorlhf.run.reward_functions import (
    SIGNATURES,
    RewardFunction,
    UserFunction,
    load_reward,
    number,
    reward_name,
)

EXPECTED = "it must be a finite number that fp32 can hold"
START = 120  # seconds in which the process of the reward functions must have imported them


def call_reward(name, fn, prompt, text, row):
    """Call a reward function in this process → float. Raises RunError, with the sample, if the call fails."""
    try:
        returned = fn(prompt, text, row)
    except UserError as e:  # a task's own reward refuses a prompt of another task
        raise UserError(f"{row.get('_at', name)}: {e}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise RunError(f"reward {name} raised {type(e).__name__}: {e} {_sample(prompt, text)}") from e
    value, wrong = number(returned)
    if wrong:
        raise RunError(f"reward {name} {wrong} {_sample(prompt, text)}; {EXPECTED}")
    return value


def _sample(prompt, text):
    return f"(prompt {prompt!r}, response {text!r})"


def rewards_of(task, specs, timeout=0.0):
    """The reward functions of a run: those of --reward (specs), else those of the task (or None) → Rewards.

    With a timeout those of files run in a process of their own; they are loaded here too, to report mistakes
    at once. In Python a spec may be the function itself, which is called in this process.
    """
    right = isinstance(specs, list)
    require(right, f'reward={specs!r}: must be a list, such as ["my_reward.py:score"] or [score]')
    functions = [_from_python(spec) if callable(spec) else load_reward(spec) for spec in specs]
    if not functions and task and task.reward:
        functions = [RewardFunction(task.name, 1.0, task.reward)]
    return Rewards(functions, specs, timeout)


def _from_python(function):
    name = reward_name(function)
    with blame(f"reward {name}"):
        call = UserFunction(function)
    print(f"reward {name} is called in this process, where no --reward_timeout guards it")
    return RewardFunction(name, 1.0, call)


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
        """UserError for a row that a function could not score: it lacks a key, or an answer that it can read.

        Found at the first sample it would end the run after minutes, and --dry_run would not find it.
        """
        for name, _, call in self.functions:
            if not isinstance(call, UserFunction):  # a task's own: refuses a prompt that is not of the task
                call_reward(name, call, row["prompt"], "", row)
                continue
            missing = ", ".join(call.missing(row))
            keys = ", ".join(key for key in row if not key.startswith("_"))
            lacks = f"takes neither {SIGNATURES}; the row has no {missing} (its keys are {keys})"
            require(not missing, f"reward {name} {lacks}")
            if call.gold:
                with blame(name):
                    call.gold(row)

    def values(self, i, texts, rows):
        """Call function i on every text, a response to its row's prompt → its values, a list of floats."""
        name, _, call = self.functions[i]
        pairs = list(zip(texts, rows, strict=True))
        if not self.timeout or not self.specs or callable(self.specs[i]):
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
                message = f"warning: {message}: scored 0; column reward_failed counts such calls"
                tqdm.write(shown(message), file=file)
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
        answer, why = self.process.answer((i, args), self.timeout, " (--reward_timeout)")
        if answer is None:
            self.process = None  # it has ended; the next call starts another
            return 0.0, why
        return answer

    def _start(self):
        self.process = Aside("nanorlhf.run.reward_functions", stderr=None)
        specs = [spec if isinstance(spec, str) else "" for spec in self.specs]
        problem, why = self.process.answer((None, specs), START)
        if why:
            problem = f"--reward: the process that imports {', '.join(specs)} ended or hangs"
        if problem:
            self._end()
            raise RunError(problem)  # without one it is ready: --reward_timeout counts from here

    def _end(self):
        if self.process is not None:
            self.process.end()
            self.process = None
