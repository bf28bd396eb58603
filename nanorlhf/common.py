"""Plumbing that never moves a learning curve: errors, config → command line, seeds, the log."""

import contextlib
import csv
import dataclasses
import difflib
import errno
import hashlib
import inspect
import json
import math
import os
import re
import sys
import textwrap
import time
import traceback
import types
import typing

import torch
from tqdm import tqdm

from nanorlhf import dist


class UserError(Exception):
    """A mistake of the user's: one line (flag, or file and line, and what would be right), exit status 2."""


class RunError(Exception):
    """A run that cannot go on (non-finite loss, full disk): one line, exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the step was finished and saved. `code` is the exit status, 130 or 143."""

    def __init__(self, signum):
        super().__init__("interrupted; the checkpoint is saved, --resume goes on from it")
        self.code = 128 + signum


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


def require(ok, message):
    if not ok:
        raise UserError(message)


@contextlib.contextmanager
def blame(where, *errors):
    """A UserError from within, or one of these other errors, becomes the UserError "where: what it says"."""
    try:
        yield
    except (UserError, *errors) as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


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


# ------------------------------------------------------------------------------------------------------------
# learning rate, seeds


def lr_at(step, steps, peak):
    """Learning rate: linear warm-up over the first 5% of the steps, then linear down to peak/10."""
    warmup = max(1, round(0.05 * steps))
    return peak * min((step + 1) / warmup, 1 - 0.9 * step / steps)


def derive_seed(seed, *path):
    """Hash of (seed, purpose): streams never overlap, and a run's random state is its step alone."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# ------------------------------------------------------------------------------------------------------------
# the log


class Log:
    """metrics.csv (one row a step), samples.jsonl, an aligned console line within 80 columns, a bar with ETA.

    A full disk here must not end the run: it is said once and training goes on. `start` > 0 (resuming) drops
    the rows of steps that will be run again. Of several processes only the first writes.
    """

    def __init__(self, out, columns, show, steps, start=0, wandb="", config=None):
        self.columns, self.out = columns, out
        self.widths = {"step": 8} | {name: max(9, len(name) + 2) for name in show}
        self.every, self.printed, self.warned = max(1, steps // 20), 0, False
        self.last, self.writes = {}, dist.rank() == 0
        self._keep_before(start)
        self.bar = tqdm(total=steps, initial=start, disable=None, leave=False, dynamic_ncols=True,
                        desc=os.path.basename(out), file=sys.stdout)
        self.steps = steps
        wandb, project = import_wandb(wandb), wandb
        self.wandb = None
        if wandb and self.writes:
            self.wandb = wandb.init(project=project, name=os.path.basename(out), config=config)

    def _keep_before(self, start):
        """Both logs without the steps from `start` on, and without lines that a crash or a full disk tore."""
        path = os.path.join(self.out, "metrics.csv")
        rows = []
        if start and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                names, *lines = (line.split(",") for line in f.read().splitlines() or [""])
            for row in (dict(zip(names, cells)) for cells in lines if len(cells) == len(names)):
                with contextlib.suppress(ValueError, KeyError):
                    if int(row["step"]) < start and [float(cell or 0) for cell in row.values()]:
                        rows.append(row)
        for row in rows:  # a run resumed at its very end still knows its figures
            self.last.update({k: float(v) for k, v in row.items() if v and k != "step"})
        if not self.writes:
            return
        with open(path + ".tmp", "w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)
        path = os.path.join(self.out, "samples.jsonl")
        lines = []
        if start and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as f:
                for line in f:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        if json.loads(line)["step"] < start:
                            lines.append(line)
        with open(path + ".tmp", "w", encoding="utf-8", newline="") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)

    def _append(self, name, text):
        if not self.writes:
            return
        try:
            path = os.path.join(self.out, name)
            # A lone surrogate has no UTF-8; what backslashreplace makes of it is its JSON escape.
            with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="") as f:
                f.write(text)
        except OSError as e:
            if not self.warned:
                where = f"{self.out}/{name}"
                self.say(f"warning: cannot write {where} ({e.strerror}); training goes on without it")
            self.warned = True

    def sync(self):
        """Make what was written so far outlast a power cut."""
        for name in ("metrics.csv", "samples.jsonl"):
            with contextlib.suppress(OSError), open(os.path.join(self.out, name), "rb+") as f:
                os.fsync(f.fileno())  # a full disk has been said by _append

    def say(self, text):
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def row(self, step, metrics):
        """Write one step. Values are plain numbers, None where nothing was measured."""
        assert set(metrics) <= set(self.columns), set(metrics) - set(self.columns)
        unknown = {name for name, value in metrics.items() if value is None}
        metrics = {name: value for name, value in metrics.items() if name not in unknown}
        self.last = {k: v for k, v in self.last.items() if k not in unknown} | metrics
        cells = ["" if metrics.get(c) is None else f"{metrics[c]:.6g}" for c in self.columns]
        cells[0] = str(step)
        self._append("metrics.csv", ",".join(cells) + "\n")
        self.bar.update(1)
        if step % self.every == 0 or step == self.steps - 1:
            if self.printed % 25 == 0:
                self.say("".join(f"{name:>{w}}" for name, w in self.widths.items()))
            self.printed += 1
            values = metrics | {"step": step}
            self.say("".join(f"{_cell(values.get(name)):>{w}}" for name, w in self.widths.items()))
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def samples(self, step, rows, texts, score):
        """A step's prompts (the rows they come from), responses and scores (B,) or None → samples.jsonl."""
        lines = [{"step": step, "prompt": row["prompt"], "response": text} for row, text in zip(rows, texts)]
        for line, s in zip(lines, [] if score is None else score.tolist()):
            line["reward"] = round(s, 4)
        self._append("samples.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))

    def close(self, panels=()):
        self.bar.close()
        if panels and self.writes:
            plot_curves(self.out, panels)
        if self.wandb:
            self.wandb.finish()


def _cell(value):
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    if 1e-7 < abs(value) < 1e-3:
        return f"{value:.0e}"
    value = round(value, 3) + 0.0  # no −0.000
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"


def import_wandb(project):
    """The optional hook, `pip install wandb` and `--wandb PROJECT`: the module, or None without the flag."""
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    return wandb


def plot_curves(out, panels):
    """Draw metrics.csv into curves.png, one small panel per column (or tuple of columns)."""
    plt = pyplot()
    if plt is None:
        return
    with open(os.path.join(out, "metrics.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    panels = [p if isinstance(p, tuple) else (p,) for p in panels]
    panels = [p for p in panels if any(r.get(c) for r in rows for c in p)]
    wide = min(3, len(panels)) or 1
    high = math.ceil(len(panels) / wide) or 1
    fig, axes = plt.subplots(high, wide, figsize=(4 * wide, 2.8 * high), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels):
        for column in panel:
            points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
            ax.plot(*zip(*points), label=column, marker="." if len(points) < 15 else None)
        ax.set(title=", ".join(panel), xlabel="step")
        if len(panel) > 1:
            ax.legend()
    save_figure(fig, os.path.join(out, "curves.png"))


def pyplot():
    """matplotlib.pyplot on a backend without a screen, or None (said once) where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        if not pyplot.__dict__.get("said"):
            print("matplotlib is not installed: no curves are drawn (pip install matplotlib)")
        pyplot.said = True
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    import matplotlib.pyplot as plt

    try:
        fig.savefig(path, dpi=110)
    except OSError as e:
        print(f"warning: cannot write {path} ({e.strerror})")
    plt.close(fig)


class Clock:
    """Seconds and tokens of a step, for the columns `s` and `tok_s`."""

    def __init__(self):
        self.start = time.perf_counter()

    def columns(self, tokens):
        s = time.perf_counter() - self.start
        return {"tok_s": tokens / s, "s": s}
