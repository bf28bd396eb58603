"""Reward functions of the user: which parameters they may have, and the process that calls them.

This file imports no torch, so that the process is ready after 0.1 seconds and not after 3.
"""

import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from nanorlhf.errors import UserError, blame, require
from nanorlhf.run import aside

SIGNATURES = (
    "(prompt, response, row) nor (prompt, response) nor (prompt, response, answer), where answer may be any "
    "keys of the row; nor TRL's (prompts, completions, **kwargs), nor verl's (data_source, solution_str, "
    "ground_truth, extra_info)"
)
FP32_MAX = 3.4028234663852886e38  # rewards become fp32
# What a run adds to a row: its place in the file, the tokens of its prompt, and those with its response.
PRIVATE = ("_at", "_ids", "_pair")
# An annotation: dict, dict[str, str], "dict", Optional[dict], Mapping[str, Any]; but not list[dict]
DICT = re.compile(r"(<class ')?(typing\.)?(Optional\[)?(typing\.|collections\.abc\.)?([Dd]ict|Mapping)\b")
# Names of what is no prompt and no response: as the first two parameters they would get those, and never pay.
GOLDS = set("row answer gold label target solution reference ground_truth final_answer expected".split())


class RewardFunction(NamedTuple):
    """A reward function with its name in the logs and its weight in the sum of the run's rewards."""

    name: str
    weight: float
    call: Callable  # (prompt, response, row) → float


def reward_name(reward):
    """The name of a reward in config.json: what --reward says, or that of a Python function."""
    if isinstance(reward, str):
        return reward
    return getattr(reward, "__name__", type(reward).__name__)


class UserFunction:
    """A user's function, called as (prompt, response, row) whichever of the SIGNATURES it has.

    UserError for any other signature. The first two parameters may have names of their own, such as (p, r). A
    further one gets the key of the row that it is named after, or the row if it is called `row` or annotated
    as a dict. **kwargs get all keys. TRL's functions are given one completion at a time.

    >>> function = UserFunction(lambda prompt, response, answer: float(response == answer))
    >>> function("1+1=", "2", {"prompt": "1+1=", "answer": "2"})
    1.0
    """

    def __init__(self, function):
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # no function; and some builtins, max for one, have no signature
            raise UserError(f"takes neither {SIGNATURES}") from None
        names = list(signature.parameters)
        self.function = function
        self.gold = getattr(function, "gold", None)  # of the checkers in answers.py: reads a row's answer
        self.trl = "completions" in names
        self.verl = "solution_str" in names
        self.ours = not (self.trl or self.verl)
        self.first = names[:2] if self.ours else []  # by position; the others by name
        later = [signature.parameters[name] for name in names[len(self.first) :]]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in later)
        self.named = [p for p in later if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # (response, answer) would be called with the prompt as its response, and never fail
        swapped = {"response", "completion"} & set(self.first[:1]) or {"prompt"} & set(self.first[1:])
        fits = not swapped and not GOLDS & set(self.first)
        try:
            prompt_and_response = ("", "") if self.ours else ()
            signature.bind(*prompt_and_response, **{p.name: None for p in self.named})
        except TypeError:
            fits = False
        require(fits, f"takes neither {SIGNATURES}; its parameters are {signature}")

    def __call__(self, prompt, response, row):
        values = self.values(prompt, response, row)
        if not self.takes_all:
            values = {p.name: values[p.name] for p in self.named if p.name in values}
        if self.ours:
            return self.function(prompt, response, **values)
        returned = self.function(**values)
        if self.verl and isinstance(returned, dict):
            return returned.get("score")
        if self.trl and isinstance(returned, list) and len(returned) == 1:
            return returned[0]
        return returned  # two numbers for one completion are no number: an error

    def values(self, prompt, response, row):
        """→ {name: value} of all that the function may have parameters for, besides the first two."""
        row = {key: value for key, value in row.items() if key not in PRIVATE}  # the JSONL object alone
        values = {key: value for key, value in row.items() if key not in self.first}
        if self.trl:  # lists of one
            messages = getattr(prompt, "messages", None)  # of a prompt that is a conversation
            answer = [{"role": "assistant", "content": response}]
            values |= {"prompts": messages or prompt, "completions": answer if messages else response}
            return {key: [value] for key, value in values.items()}
        if self.verl:
            values = {"data_source": "", "extra_info": None, "solution_str": response} | values
            if "answer" in row:
                values.setdefault("ground_truth", row["answer"])
            nested = row.get("reward_model")  # {"style": "rule", "ground_truth": "42"}
            return values | (nested if isinstance(nested, dict) else {})
        annotated = [p.name for p in self.named if DICT.match(str(p.annotation))]
        return dict.fromkeys(annotated, row) | values | {"row": row}

    def missing(self, row):
        """The parameters without a default for which the row has no key."""
        values = self.values("", "", row)
        return [p.name for p in self.named if p.default is p.empty and p.name not in values]


def load_reward(spec: str) -> RewardFunction:
    """`path/to/file.py:name` or `path/to/file.py:name*0.2` → RewardFunction. Raises UserError for mistakes.

    The file is run, and may import the files beside it.
    """
    where = f"--reward {spec}"
    path, _, rest = str(spec).rpartition(":")  # the last colon: C:\rewards.py:name has two
    name, star, factor = rest.partition("*")
    require(path and name, f"{where}: expected path/to/file.py:name or path/to/file.py:name*0.2")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        weight = math.nan
    finite = abs(weight) <= FP32_MAX  # nan is not, either
    require(finite, f"{where}: what stands after * is not a finite number")
    require(os.path.isfile(path), f"{where}: there is no file {path}")
    # The file's own name would not do: a/r.py and b/r.py are two modules.
    module_name = f"reward_{hash(os.path.abspath(path))}"
    own_import = getattr(sys.modules.get(module_name), "is_loading", False)  # this call comes from it
    hint = 'write `if __name__ == "__main__":` before that, or give the function itself: reward=[score]'
    require(not own_import, f"{where}: the file trains when it is imported; {hint}")
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    require(module_spec, f"{where}: {path} is not a .py file")
    module = importlib.util.module_from_spec(module_spec)
    module.is_loading = True
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    # The file may import its neighbours. Its helpers.py comes before one of the same name from elsewhere.
    folder = os.path.dirname(os.path.abspath(path))
    beside = [file[:-3] for file in os.listdir(folder) if file.endswith(".py")]
    others = {name: sys.modules.pop(name) for name in beside if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does at import
        problem = f"importing {path} fails: {type(error).__name__}: {error}"
        raise UserError(f"{where}: {problem}") from error
    finally:
        module.is_loading = False
        sys.modules.update(others)
    function = getattr(module, name, None)
    require(function is not None, f"{where}: {path} defines no {name}")
    with blame(where):
        return RewardFunction(name, weight, UserFunction(function))


def number(returned):
    """What a function returned → (float, "") or (None, what is wrong). The string "1" is not a number."""
    try:
        value = float(returned)
    except Exception:
        value = math.nan
    if not isinstance(returned, (str, bytes)) and abs(value) <= FP32_MAX:  # nan is not
        return value, ""
    try:
        return None, f"returned {returned!r:.80}"
    except Exception:  # an integer of 5,000 digits has no text
        return None, f"returned a {type(returned).__name__}"


# ------------------------------------------------------------------------------------------------------------
# In the other process

FUNCTIONS = []  # those of --reward; None for one that the trainer calls itself


def load_all(specs):
    """Load what --reward says, "" for a function that the trainer calls itself → "", or what is wrong."""
    try:
        FUNCTIONS.extend(load_reward(spec).call if spec else None for spec in specs)
    except UserError as e:
        return str(e)
    return ""


def called(question):
    """(number of a function, its arguments) → (value, why), as `number`. Before all others: (None, specs)."""
    i, arguments = question
    if i is None:
        return load_all(arguments)
    try:
        return number(FUNCTIONS[i](*arguments))
    except BaseException as e:  # sys.exit and KeyboardInterrupt among them
        return 0.0, f"raised {type(e).__name__}: {e}"[:1000]


if __name__ == "__main__":
    aside.serve(called)
