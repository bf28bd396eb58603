"""The command line: every field of a trainer's Config is a flag, and its comment is the flag's help."""

import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import sys
import textwrap
import traceback
import types
import typing

import torch

from nanorlhf.errors import Interrupted, RunError, UserError, require
from nanorlhf.run import dist

# ------------------------------------------------------------------------------------------------------------
# config → command line


@dataclasses.dataclass(kw_only=True)
class Flags:
    """The flags that every trainer has and that are no part of its algorithm.

    By keyword only: Config("chain") names the task.
    """

    skip_bad_rows: bool = False  # drop and count the rows of --data that cannot be read
    resume: bool | typing.Literal["auto"] = False  # go on with the run in --out; auto: past damaged ones
    overwrite: bool = False  # replace the run in --out
    keep: int = 2  # checkpoints kept in OUT/state, the newest ones
    seed: int = 0  # every random number of the run is derived from it
    device: typing.Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: typing.Literal["float32", "bfloat16", "bf16_weights"] = "float32"  # of activations, or of weights
    frozen_dtype: typing.Literal["float32", "bfloat16"] = "float32"  # matrices of reference and reward model
    offload: bool = False  # reference and reward model stay in the CPU's memory while they are not used
    checkpoint_activations: bool = False  # keep a block's input only, and run it again in the backward pass
    compile: bool = False  # torch.compile the blocks; slow to start: for long runs of large models on a GPU
    shard: bool = False  # under torchrun: cut weights and optimizer over the processes (FSDP2), not only rows
    threads: int = 0  # CPU threads; 0: one below a million parameters, else torch's own choice
    deterministic: bool = False  # on a GPU: fixed kernels, for the same numbers in every run; slower
    wandb: str = ""  # project name, to log to Weights & Biases as well

    def fill_by_task(self, recipe=None, defaults=None):
        """Give every field that is None its value from the tables {field: value}, the first that has one.

        In this order: recipe, the class's table BY_TASK[task], defaults. What was given explicitly stays.
        """
        require(self.task in self.BY_TASK, f"--task {self.task}: must be one of {', '.join(self.BY_TASK)}")
        for values in (recipe or {}, self.BY_TASK[self.task], defaults or {}):
            for field, value in values.items():
                if getattr(self, field) is None:
                    setattr(self, field, value)


def check_ranges(cfg, above_zero, any_sign=("seed",)):
    """UserError for a number out of range: those named must be above 0, the others not below it."""
    for f, kind in _field_types(type(cfg)):
        value = getattr(cfg, f.name)
        if f.name == "keep":
            require(value > 0, f"--keep {value}: must be at least 1")
        if kind not in (int, float) or value is None or f.name in any_sign:
            continue
        least = "must be at least 1" if kind is int else "must be above 0"
        require(value > 0 or f.name not in above_zero, f"--{f.name} {value}: {least}")
        require(value >= 0, f"--{f.name} {value}: must not be negative")
    require(-(2**63) <= cfg.seed < 2**63, f"--seed {cfg.seed}: must fit into 64 bits")


def _field_types(Config):
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = hints[f.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kinds = [k for k in kind.__args__ if k is not type(None)]  # None: a default from a table
            kind = kinds[0] if len(kinds) == 1 else kind
        yield f, kind


def _switch(kind):
    """The words that a flag takes which may stand alone, and what they mean; None for other kinds."""
    words = {"true": True, "1": True, "false": False, "0": False}
    more = [k.__args__ for k in getattr(kind, "__args__", ()) if typing.get_origin(k) is typing.Literal]
    return words | {w: w for (w,) in more} if kind is bool or more else None


def _convert(flag, kind, text):
    """One flag's text → value of the field's type; UserError says what would be right."""
    if words := _switch(kind):
        if text.lower() in words:
            return words[text.lower()]
        raise UserError(f"{flag} {text}: must be {' or '.join(w for w in words if w.isalpha())}")
    if typing.get_origin(kind) is typing.Literal:
        if text in kind.__args__:
            return text
        near = difflib.get_close_matches(text, kind.__args__, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{flag} {text}: must be one of {', '.join(filter(None, kind.__args__))}{hint}")
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            example = "an integer such as 100" if kind is int else "a number such as 3e-4"
            raise UserError(f"{flag} {text}: must be {example}") from None
        if not math.isfinite(value):
            raise UserError(f"{flag} {text}: must be a finite number")
        return value
    return text


def _comments(Config):
    """Field name → the comment behind it, which is its --help text: written once, read in both places."""
    found = {}
    for line in "".join(map(inspect.getsource, Config.__mro__[:-1])).splitlines():
        if m := re.match(r"    (\w+): .*?  # (.*)$", line):
            found[m[1]] = m[2]
    return found


def help_text(Config, doc, prog):
    """--help: the docstring's first paragraph, then every field with its comment and default; 80 columns."""
    about = textwrap.wrap(doc.strip().split("\n\n")[0], 80)
    dry = " [--dry_run]" * prog.startswith("train_")
    lines = [*about, "", f"usage: python {prog}{dry} [--name value ...]", f"equations and examples: {prog}"]
    lines += ["--dry_run: read data and tokenizer, print memory and FLOPs, and stop"] * bool(dry) + [""]
    comments = _comments(Config)
    fields = sorted(_field_types(Config), key=lambda x: x[0].name not in Config.__annotations__)  # own first
    for f, kind in fields:
        default = [] if f.default is dataclasses.MISSING else f.default
        if default is None and f.name in getattr(Config, "DEFAULTS", {}):
            default = Config.DEFAULTS[f.name]
        elif default is None:
            default = ", ".join(f"{v[f.name]} for {task}" for task, v in Config.BY_TASK.items())
        text = comments[f.name] + ("" if default in ("", []) else f" (default: {default})")
        if typing.get_origin(kind) is typing.Literal:
            text = f"[{'|'.join(filter(None, kind.__args__))}] {text}"
        head = f"  --{f.name}"
        indent = " " * 26
        lines += textwrap.wrap(text, 80, initial_indent=f"{head:<26}" if len(head) < 26 else f"{head}  ",
                               subsequent_indent=indent)
    return "\n".join(lines)


def parse(Config, argv, doc="", prog="train.py"):
    """`--name value`, `--name=value`, `-` for `_`; a bool may stand alone; a list may be repeated → Config.

    Unknown and ill-typed flags raise UserError naming the nearest flag, or what the value must be.
    """
    kinds = {f.name: kind for f, kind in _field_types(Config)}
    values, i = {}, 0
    while i < len(argv):
        flag, eq, text = argv[i].partition("=")
        i += 1
        if flag in ("-h", "--help"):
            print(help_text(Config, doc, prog))
            raise SystemExit(0)
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UserError(f"unknown flag {flag} ({hint})")
        kind = kinds[name]
        if not eq:
            follows = i < len(argv) and not argv[i].startswith("--")
            if _switch(kind) and not follows:
                text = "true"
            elif not follows:
                raise UserError(f"{flag} needs a value")
            else:
                text = argv[i]
                i += 1
        if typing.get_origin(kind) is list:
            values.setdefault(name, []).append(_convert(flag, kind.__args__[0], text))
        else:
            values[name] = _convert(flag, kind, text)
    return Config(**values)


def _line(error):
    """What it says on one line, whatever a user's value that it quotes holds."""
    return r"\n".join(str(error).splitlines())


def _smaller(cfg):
    """Which flags to lower when the memory is full, the one that costs least first."""
    flags = "tokens_per_microbatch batch_size prompts_per_step group_size max_new_tokens".split()
    now = [f"--{name} (now {getattr(cfg, name)})" for name in flags if hasattr(cfg, name)]
    return f"lower {', then '.join(now)}; --dry_run prints what a run needs, --resume goes on with it"


def run_cli(Config, train, module_doc, argv=None, dry_run=None):
    """Run a trainer from the command line → status: 2 for a user's mistake, 1 for a run that had to stop.

    dry_run(cfg) is what --dry_run calls in place of train(cfg). It is no field of Config, as it decides
    nothing about a run.
    """
    prog, cfg = os.path.basename(sys.argv[0]), None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows writes to a pipe in a code page without β and │
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        argv = sys.argv[1:] if argv is None else argv
        dry = [x for x in argv if dry_run and x.replace("-", "_") == "__dry_run"]
        cfg = parse(Config, [x for x in argv if x not in dry], module_doc, prog)
        (dry_run if dry else train)(cfg)
        dist.finish()  # here: if another rank fails now, it is that one which speaks
        said, status = "", 0
    except UserError as e:
        said, status = f"error: {_line(e)}", 2
    except RunError as e:
        said, status = f"stopped: {_line(e)}", 1
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        said, status = "", 1
    except Interrupted as e:  # on all ranks after the same step
        dist.finish()
        said, status = str(e), e.code
    except KeyboardInterrupt as e:
        said, status = "interrupted at once; checkpoints saved before are kept", e.args[0] if e.args else 130
    except Exception as e:
        what = str(e).partition("\n")[0]
        short = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in what
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            said, status = f"stopped: the disk is full ({e})", 1
        elif isinstance(e, (MemoryError, RuntimeError)) and short:
            said, status = f"stopped: out of memory: {what}; {_smaller(cfg)}", 1
        elif dist.launched():
            said, status = traceback.format_exc(), 1
        else:
            raise
    if not status:
        return 0
    if dist.speaks_first() and said:
        print(f"{prog}: {said}", file=sys.stderr)
    dist.leave(status)
    return status



