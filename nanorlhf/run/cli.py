"""The command line: every field of a trainer's Config is a flag, and its comment is the flag's help."""

import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import sys
import tempfile
import textwrap
import traceback
import types
import typing
from typing import ClassVar, Literal

from nanorlhf import tasks
from nanorlhf.errors import (
    CONTROLS,
    Interrupted,
    RunError,
    UserError,
    out_of_memory,
    reason_of,
    require,
    shown,
)
from nanorlhf.run import defaults, dist
from nanorlhf.run.device import device_of, larger_microbatches
from nanorlhf.run.reward_functions import reward_name

# ------------------------------------------------------------------------------------------------------------
# the flags that all trainers share

# A comment line in a Config that is one of these words, and nothing else, puts the fields below it under this
# heading of --help.
HEADINGS = "data method optimisation sampling evaluation run".split()


@dataclasses.dataclass(kw_only=True)
class Machine:
    """The flags that every program with a model has. By keyword only: Config("chain") names the task."""

    # run
    seed: int = 0  # every random number is derived from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    threads: int = 0  # CPU threads; 0: one below a million parameters, measured above 50 million


@dataclasses.dataclass(kw_only=True)
class Flags(Machine):
    """The flags that every trainer has and that are no part of its algorithm."""

    # optimisation
    lora_rank: int | None = None  # rank of adapters (nanorlhf/lora.py), of real models 16; 0: all weights

    # data
    eval_data: str = ""  # file of held-out rows for --data; empty: 15% of its prompts are, by a hash
    skip_bad_rows: bool = False  # drop and count the rows of --data that cannot be read

    # evaluation
    look_rows: int = 16  # rows of a logged step whose tokens go to tokens.jsonl.gz; 0: none

    # run
    resume: bool = False  # go on with the run in --out, from its newest checkpoint that is not damaged
    new_data: bool = False  # with --resume: go on although --data is not the file that the run began with
    overwrite: bool = False  # replace the run in --out
    dtype: Literal["auto", "float32", "bfloat16", "bf16_weights"] = "auto"  # of activations, or weights too
    shard: bool = False  # under torchrun: cut weights and optimizer over the processes (FSDP2), not only rows
    save_memory: bool = False  # slower: compute activations twice, keep idle frozen models in CPU memory
    deterministic: bool = False  # on a GPU: fixed kernels, for the same numbers in every run; slower
    wandb: str = ""  # project name, to log to Weights & Biases as well

    DEFAULTS: ClassVar = {}  # those that are the same for all tasks

    def fill(self, method, recipe=None):
        """Give every field that is None its value from the first table {field: value} that has it.

        Order of precedence: command line, recipe, the defaults of a real model (run/defaults.py),
        BY_TASK[task] and DEFAULTS of the class. With --data and no --task the lengths, steps and held-out
        prompts of a task would be those of a toy: they stay None until the data is read. A real model without
        a KL has no reference. `notes` is printed when the run starts.
        """
        recipe = recipe or {}
        self.method = method
        self.own_data = bool(self.data) and not self.task
        self.task = self.task or next(iter(self.BY_TASK))
        require(self.task in self.BY_TASK, f"--task {self.task}: must be one of {', '.join(self.BY_TASK)}")
        needs = "needs --data, the file to train on; a built-in task has held-out rows of its own"
        require(self.data or not self.eval_data, f"--eval_data {self.eval_data}: {needs}")
        starts_from_task = self.own_data and not self.init
        self._name_folders()
        real = defaults.of_real_model(self)
        self.is_real = bool(real)
        self.held_out = 64 if real else 256  # rows that SFT measures its loss on, at most
        unset = [name for name in real if getattr(self, name, 0) is None and name not in recipe]
        for values in (recipe, real, self.BY_TASK[self.task], self.DEFAULTS, {"lora_rank": 0}):
            for name, value in values.items():
                waits = self.own_data and name in defaults.FROM_DATA
                if getattr(self, name, 0) is None and not waits:
                    setattr(self, name, value)
        for name, kind in _kinds(type(self)).items():
            if typing.get_origin(kind) is Literal:
                check_choice(f"--{name}", getattr(self, name), kind.__args__)
        if hasattr(self, "ref") and not self.ref:
            self.ref = self.init
            if real and not defaults.reads_reference(self):
                self.ref = "none"
                unset.append("ref")
        self.notes = defaults.taken(self, unset)
        self.notes += defaults.pick_dtype(self)
        if starts_from_task and self.init:
            self.notes.append(f"--init {self.init}: no other model was given")
        if getattr(self, "recipe", ""):
            self.notes += defaults.recipe_lines(self, recipe)

    def _name_folders(self):
        """--out is runs/NAME-method, by the data file's name or the task's.

        A trainer that is a variant (variants/) has a flag of that name: its runs are in folders of their own.
        """
        file = os.path.basename(self.data).partition(".")[0]
        method = getattr(self, "variant", self.method)
        self.out = self.out or f"runs/{file or self.task}-{method}"
        if self.method != "sft":
            self.init = self.init or f"runs/{self.task}-sft/model"
        if hasattr(self, "teacher") and not self.teacher:
            require(not self.own_data, f"--data {self.data}: name the model to learn from with --teacher")
            self.teacher = f"runs/{self.task}-grpo/model"

    def fill_judge(self):
        """Without --rm and --reward: the task's reward function, or else runs/TASK-rm/model."""
        if self.rm or self.reward:
            return
        judge = "give --reward my_reward.py:score, or a reward model with --rm"
        require(not self.own_data, f"--data {self.data}: prompts of your own need a reward: {judge}")
        if not tasks.get(self.task).reward:
            self.rm = f"runs/{self.task}-rm/model"

    def fill_limit(self, limit):
        """--max_new_tokens, where it waited for the data."""
        self.max_new_tokens = limit
        self.limits = [limit]  # of GRPO, which may lengthen it

    def fill_steps(self, rows):
        """--steps, where it waits for the training rows: three passes in SFT, else one; 100 at least."""
        if self.steps is None:
            batch = getattr(self, "batch_size", 0) or self.prompts_per_step
            passes = 3 if self.method == "sft" else 1
            self.steps = max(defaults.LEAST_STEPS, math.ceil(passes * len(rows) / batch))
            print(f"--steps {self.steps}: from {len(rows):,} rows, {batch} a step")


COMMON = Machine.__annotations__ | Flags.__annotations__


def to_json(cfg):
    """A Config as config.json has it: a reward that is a Python function by its name."""
    flags = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    if "reward" in flags:
        flags["reward"] = [reward_name(reward) for reward in cfg.reward]
    return flags


LARGEST = {"threads": 1024, "n_layer": 1000, "group_size": 10_000, "top_p": 1}
# A run that ends by a large --lr names it, and a --max_grad_norm of 1e30 clips nothing.
LARGEST |= {"lr": 1e30, "critic_lr": 1e30, "max_grad_norm": 1e30}
# All others: 10 million. A --beta of 1e30 would give an infinite loss, and the run would blame --lr.


def check_ranges(cfg, above_zero, any_sign=("seed",)):
    """UserError for a number out of range: those named must be above 0, the others not below it.

    any_sign: those that may be negative; a seed may be any integer of 64 bits.
    """
    for name, kind in _kinds(type(cfg)).items():
        value = getattr(cfg, name)
        if kind not in NUMBERS or value in (None, []) or name == "seed":
            continue
        numbers = value if isinstance(value, list) else [value]
        smallest = min(numbers)
        flag = f"--{name} {_plain(value)}"
        most = LARGEST.get(name, 10_000_000)
        require(max(numbers) <= most, f"{flag}: must be at most {most:g}")
        if name in any_sign:
            require(smallest >= -most, f"{flag}: must be at least {-most:g}")
            continue
        least = "must be above 0" if kind is float else "must be at least 1"
        require(smallest > 0 or name not in above_zero, f"{flag}: {least}")
        require(smallest >= 0, f"{flag}: must not be negative")
        finite = name != "temperature" or value == 0 or value >= 1e-3  # logits / 1e-45 are infinite
        require(finite, f"{flag}: must be at least 0.001")
    require(-(2**63) <= cfg.seed < 2**63, f"--seed {cfg.seed}: must fit into 64 bits")


def check_choice(flag, value, choices):
    """UserError unless the value is one of the choices. Config(loss="clp") would train another loss."""
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    require(value in choices, f"{flag} {value}: must be one of {', '.join(filter(None, choices))}{hint}")


def length_schedule(max_new_tokens, lengthen_at):
    """--max_new_tokens 24,40,64 with --lengthen_at 40,80 → limits [24, 40, 64], one after the other.

    [None] where --max_new_tokens is to be read from the data.
    """
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens]
    rising = limits == [None] or limits and limits[0] > 0 and limits == sorted(set(limits))
    require(rising, f"--max_new_tokens {_plain(limits)}: must be an integer, or rising ones such as 24,40,64")
    lengthenings = len(limits) - 1
    steps = [0, *lengthen_at]
    fits = len(lengthen_at) == lengthenings and steps == sorted(set(steps))
    expected = f"must be {lengthenings} rising steps, one for each lengthening"
    require(fits, f"--lengthen_at {_plain(lengthen_at)!r}: {expected}")
    return limits


# ------------------------------------------------------------------------------------------------------------
# command line → config

NUMBERS = {  # type of a field → what its flag must be
    int: "an integer such as 100",
    float: "a finite number such as 3e-4",
    list[int]: "integers such as 24,40,64",
    int | list[int]: "an integer, or integers such as 24,40,64",
}
FREE_TEXT = "prompt", "answer", "step_end"  # flags that may have control characters; others are printed


def _kinds(Config):
    """{name of a field: its type}. None is left out of a type: it stands for a default from a table."""
    kinds = {}
    for field in dataclasses.fields(Config):
        kind = field.type
        parts = typing.get_args(kind)
        if types.NoneType in parts:
            others = tuple(part for part in parts if part is not types.NoneType)
            kind = typing.Union[others]  # noqa: UP007
        kinds[field.name] = kind
    return kinds


def _plain(value):
    """A value as one writes it on the command line: [24, 40] → 24,40."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _convert(flag, kind, text):
    """One flag's text → value of the field's type; UserError says what would be right."""
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        require(text.lower() in words, f"{flag} {text}: must be true or false")
        return words[text.lower()]
    if typing.get_origin(kind) is Literal:
        check_choice(flag, text, kind.__args__)
    if kind not in NUMBERS:
        return text
    parts = text.split(",") if kind not in (int, float) else [text]
    try:
        numbers = [float(part) if kind is float else int(part) for part in parts]
    except ValueError:
        numbers = [math.nan]
    require(all(abs(number) < math.inf for number in numbers), f"{flag} {text}: must be {NUMBERS[kind]}")
    return numbers if kind == list[int] or len(numbers) > 1 else numbers[0]


def parse(Config, argv):
    """A command line → Config. UserError names the nearest flag, or says what the value must be.

    `--name value` or `--name=value`, with `-` or `_`. A bool may stand alone, integers have commas between
    them (--lengthen_at 40,80), a list of words is a flag that is repeated (--reward a.py:f --reward b.py:g).
    """
    kinds = _kinds(Config)
    values = {}
    words = list(argv)
    while words:
        flag, equals, text = words.pop(0).partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UserError(f"unknown flag {flag} ({hint})")
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            else:
                require(kinds[name] is bool, f"{flag} needs a value")
                text = "true"
        printable = text.encode(errors="ignore").decode()  # without halves: a file's name may be no UTF-8
        plain = name in FREE_TEXT or not CONTROLS.search(printable)
        require(plain, f"{flag} {text}: has a control character, which a terminal would obey")
        if kinds[name] == list[str]:
            values.setdefault(name, []).append(text)
        else:
            values[name] = _convert(flag, kinds[name], text)
    cfg = Config(**values)
    cfg.asked_for = set(values)  # no field: what was typed, though it be the default
    return cfg


# ------------------------------------------------------------------------------------------------------------
# --help


def _comments(Config):
    """→ {field: (heading, the comment behind it)}, read from the source of the class and of its bases.

    The comment is the flag's help: written once, read in both places. Above all headings, the heading is "".
    """
    found = {}
    for cls in Config.__mro__[:-1]:
        heading = ""
        for line in inspect.getsource(cls).splitlines():
            if line.startswith("    # ") and line[6:] in HEADINGS:
                heading = line[6:]
            field = re.match(r"    (\w+): .*?  # (.*)$", line)
            if field:
                found.setdefault(field[1], (heading, field[2]))
    return found


def help_text(Config, doc, prog, plans=False):
    """--help: the docstring's first paragraph, then the flags under their headings; 80 columns.

    Under each heading the flags that all trainers share come last. plans: there is a --dry_run.
    """
    about = doc.strip().split("\n\n")[0]
    lines = textwrap.wrap(about, 80)
    lines += ["", f"usage: python {prog} [--name value ...]", f"equations and examples: {prog}"]
    if plans:
        lines.append("--dry_run: read data and tokenizer, print the memory that a run needs, and stop")
    comments = _comments(Config)
    kinds = _kinds(Config)
    groups = {heading: [] for heading in ("", *HEADINGS)}
    own_first = sorted(dataclasses.fields(Config), key=lambda field: field.name in COMMON)
    for field in own_first:
        heading, comment = comments[field.name]
        groups[heading].append(_entry(Config, field, kinds[field.name], comment))
    for heading, entries in groups.items():
        if entries:
            lines += [f"\n{heading}:" if heading else "", *entries]
    return "\n".join(lines)


def _entry(Config, field, kind, comment):
    """The text of one flag: its name, then choices, comment and default from column 26 on."""
    default = _default(Config, field)
    text = f"{comment} (default: {default})" if default else comment
    if typing.get_origin(kind) is Literal:
        text = f"[{'|'.join(filter(None, kind.__args__))}] {text}"
    name = f"  --{field.name:<21} "
    return textwrap.fill(text, 80, initial_indent=name, subsequent_indent=" " * 26)


def _default(Config, field):
    """A flag's default as --help shows it: "0.3", or "60 for reviews, 200 for chain" from a table, or ""."""
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    if default is None:
        default = Config.DEFAULTS.get(field.name)
    if default is not None:
        return _plain(default)
    by_task = []
    for task, values in Config.BY_TASK.items():
        if field.name in values:
            by_task.append(f"{_plain(values[field.name])} for {task}")
    return ", ".join(by_task)


# ------------------------------------------------------------------------------------------------------------
# a run from the command line, and how it ends


def run_cli(Config, train, module_doc, argv=None, dry_run=None):
    """Run a trainer from the command line → exit status: 0, 2 for a user's mistake, 1 for a run that stopped.

    dry_run(cfg) is what --dry_run calls in place of train(cfg). The flag is no field of Config, as it decides
    nothing about a run.
    """
    prog = shown(os.path.basename(sys.argv[0]))
    argv = sys.argv[1:] if argv is None else argv
    cfg = None
    # All may be closed (<&- >&- 2>&-): files of the run would take their numbers, and get what others print.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        tempfile.gettempdir()
    except OSError:  # no such folder: torch would end the run, for a cache that none of ours is written to
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.curdir)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows writes to a pipe in a code page without β and │
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        flags = [word for word in argv if dry_run is None or word not in ("--dry_run", "--dry-run")]
        if {"-h", "--help"} & set(flags):
            print(help_text(Config, module_doc, prog, plans=dry_run is not None))
            return 0
        cfg = parse(Config, flags)
        if len(flags) == len(argv):
            train(cfg)
        else:
            if device_of(cfg) == "cuda":
                larger_microbatches(cfg)
            for note in cfg.notes:
                print(note)
            dry_run(cfg)
        dist.finish()  # here: if another rank fails now, that rank prints its error
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _ending(error, cfg)
        if not status:
            raise
    if dist.speaks_first():
        print(f"{prog}: {message}", file=sys.stderr)
    dist.leave(status)
    return status


# What gloo and NCCL say when a process was killed, by the kernel for its memory say.
OTHER_ENDED = ("gloo/transport", "remote process exited", "Connection closed by peer")


def _ending(error, cfg):
    """What ended a run → the line to print, the exit status. Status 0: a bug, whose traceback is needed."""
    message = shown(str(error))  # one line, whatever value of the user's it quotes
    first_line = shown(reason_of(error))
    if isinstance(error, UserError):
        return f"error: {message}", 2
    if isinstance(error, RunError):
        return f"stopped: {message}", 1
    if isinstance(error, BrokenPipeError):  # as in `python train_sft.py | head`; Python flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "stopped: nobody reads the output any more", 1
    if isinstance(error, Interrupted):  # on all ranks after the same step
        dist.finish()
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        status = error.args[0] if error.args else 130
        return "interrupted at once; checkpoints saved before are kept", status
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"stopped: the disk is full ({message})", 1
    if out_of_memory(error):
        return f"stopped: out of memory: {first_line}; {_flags_to_lower(cfg)}", 1
    if isinstance(error, RuntimeError) and any(words in str(error) for words in OTHER_ENDED):
        return f"stopped: another process of this run has ended ({first_line}); --resume goes on", 1
    if dist.launched():
        return traceback.format_exc(), 1
    return "", 0


def _flags_to_lower(cfg):
    """What to do when the memory is full: which flags to lower, the one that costs least first."""
    # The last two are flags of evaluate.py and sample.py.
    flags = "tokens_per_microbatch batch_size prompts_per_step group_size max_new_tokens n prompts".split()
    lower = []
    for name in flags:
        value = getattr(cfg, name, None)
        if value not in (None, 0, 1):
            lower.append(f"--{name} (now {_plain(value)})")
    advice = f"lower {', then '.join(lower)}" if lower else "take a smaller model, or a shorter prompt"
    if hasattr(cfg, "resume"):
        advice += "; --dry_run prints what a run needs, --resume goes on with it"
    return advice
