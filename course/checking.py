"""What the checks of the weeks are written with, and what turns a student's error into a plain sentence.

A week's check.py has a table POINTS {exercise: points} and for each exercise a function check_EXERCISE, which
takes the student's function and raises Wrong with the first thing that is wrong with it.
"""

import importlib.util
import math
import os
import sys
import traceback

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
WEEKS = range(1, 11)


class Wrong(Exception):
    """A check has failed; the message is a sentence for the student."""


class Skipped(Exception):
    """A check cannot be made on this machine; the message says why."""


# ------------------------------------------------------------------------------------------------------------
# For the checks


def tensor(values):
    """Nested lists → float64 tensor: in float64 a right answer is right to 1e-9, whatever its formula."""
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    """Normal random numbers in float64, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(function, *args, **kwargs):
    """function(*args, **kwargs), with a Wrong if it changes one of its arguments."""
    before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
    out = function(*args, **kwargs)
    for place, (old, new) in enumerate(zip(before, args), start=1):
        if isinstance(new, torch.Tensor) and not torch.equal(old, new.detach()):
            raise Wrong(
                f"the function changes its argument number {place} in place, so that the caller's tensor is "
                "another one afterwards; work on a copy, or write x = x + 1 in place of x += 1"
            )
    return out


def brief(value):
    """A value as short text, tensors with four decimals."""
    if isinstance(value, torch.Tensor):
        if value.dtype.is_floating_point and value.numel() == 1:
            return f"{value.item():.4f}"
        if value.numel() > 24:
            return f"a tensor of shape {tuple(value.shape)}"
        if value.dtype.is_floating_point:
            return str([[*map(brief, row)] if row.dim() else brief(row) for row in value]).replace("'", "")
        return str(value.tolist())
    if isinstance(value, float):
        return f"{value:.4f}"
    return repr(value)


def as_tensor(got, want, where):
    """What the student returned, as a tensor of the shape of `want`; Wrong where it is none."""
    if got is None:
        raise Wrong(f"{where} returns None: the function has no `return` at its end")
    if isinstance(got, (bool, int, float)):
        got = torch.tensor(float(got), dtype=torch.float64)
    if isinstance(got, (list, tuple)) and not any(isinstance(x, torch.Tensor) for x in got):
        got = torch.tensor(got)
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{where} returns a {type(got).__name__}, and not a tensor")
    if got.shape != want.shape:
        expected = "one number (a tensor without dimensions)" if want.dim() == 0 else tuple(want.shape)
        if not got.numel() or math.prod(got.shape) != want.numel():
            hint = "; is a sum or a mean missing, or one too many?"
        else:
            hint = "; look at keepdim, squeeze and None in an index"
        raise Wrong(f"{where} returns the shape {tuple(got.shape)}, and it should be {expected}{hint}")
    return got.detach()


def same(a, b, tol):
    """Equal within tol, relative to the size of b; infinities must be equal."""
    a = a.double()
    b = b.double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol)


def expect(got, want, where, mistakes=None, tol=1e-4):
    """Wrong unless `got` is `want`. A typical mistake is recognised by the value that it gives.

    got        what the student's function returned
    want       the right value: a tensor, or a number
    where      the call, such as "whiten([[1, 3]])"
    mistakes   {sentence: the value that a function with this mistake returns}
    """
    if not isinstance(want, torch.Tensor):
        want = torch.tensor(want, dtype=torch.float64)
    got = as_tensor(got, want, where)
    if same(got, want, tol):
        return
    shows = f"\n    {where}\n    yours: {brief(got)}\n    right: {brief(want)}"
    for sentence, wrong in (mistakes or {}).items():
        if not isinstance(wrong, torch.Tensor):
            wrong = torch.tensor(wrong, dtype=torch.float64)
        if same(got, wrong, tol) and not same(wrong, want, tol):
            raise Wrong(f"{sentence}.{shows}")
    if not got.double().isfinite().all() and want.double().isfinite().all():
        raise Wrong(f"the result is not finite (inf or nan): look for log(0), 0/0 or a large exp.{shows}")
    if same(-got.double(), want, tol):
        raise Wrong(f"the result has the wrong sign.{shows}")
    if got.dim():
        off = (got.double() - want.double()).abs()
        place = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        shows += f"\n    the largest difference is at index {list(place)}"
    raise Wrong(f"the result is another one.{shows}")


def demand(ok, sentence):
    """Wrong with this sentence unless ok."""
    if not ok:
        raise Wrong(sentence)


def gradient(function, x, *others):
    """∂ function(x, *others) / ∂x of a function that returns one number; Wrong where there is none."""
    x = x.detach().clone().requires_grad_()
    out = function(x, *others)
    if out is None:
        raise Wrong("the function returns None: it has no `return` at its end")
    if not isinstance(out, torch.Tensor) or not out.requires_grad:
        raise Wrong(
            "the result carries no gradient, so that nothing could be learnt from it: "
            "avoid .item(), .detach(), float() and torch.no_grad() on the way from the input to the loss"
        )
    demand(out.dim() == 0, f"the loss must be one number, and it has the shape {tuple(out.shape)}")
    grad = torch.autograd.grad(out, x, allow_unused=True)[0]
    return torch.zeros_like(x) if grad is None else grad


# ------------------------------------------------------------------------------------------------------------
# For the command line


def folder_of(week):
    return f"week{week:02}"


def load(path, name):
    """The module of a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton and dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def load_check(week):
    """The checks of a week: course/weekNN/check.py."""
    return load(os.path.join(HERE, folder_of(week), "check.py"), f"course_check_{week:02}")


def is_stub(error):
    """Whether it is the `raise NotImplementedError` of an unsolved exercise; those of torch carry a text."""
    return isinstance(error, NotImplementedError) and not str(error)


def explain(error, path):
    """An exception from a student's file → what happened, where, in plain words."""
    name = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
    if is_stub(error):
        return "not solved yet: the function still raises NotImplementedError"
    if isinstance(error, SyntaxError):
        line = (error.text or "").strip()
        return f"{name}, line {error.lineno}, is not Python: {error.msg} in `{line}`"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    at = f"{name}, line {own[-1].lineno} (`{own[-1].line}`)" if own else name
    text = str(error).strip().split("\n")[0]
    if isinstance(error, RecursionError):
        return f"{at}: the function calls itself without an end"
    if isinstance(error, NameError):
        return f"{at}: {text}; is it misspelt, or an import missing?"
    if isinstance(error, TypeError) and not own:
        return f"{name}: {text}; keep the function's parameters as they were handed out"
    if "dtype" in text:
        text += "; the checks use float64, so make new tensors like the inputs: torch.zeros_like(x)"
    return f"{at}: Python stopped with {type(error).__name__}: {text}"


def judge(check, function, path=""):
    """Run one check on one function → (passed, message); passed is None where it cannot be made here."""
    try:
        check(function)
    except Wrong as wrong:
        return False, str(wrong)
    except Skipped as skipped:
        return None, str(skipped)
    except Exception as error:
        return False, explain(error, path)
    return True, ""
