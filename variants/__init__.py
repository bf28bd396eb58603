"""An algorithm is a diff: each file here is a published method, as the lines that it changes in a trainer.

    python -m variants                            all methods and their papers
    python -m variants apo_zero                   the diff
    python -m variants apo_zero run --steps 50    the changed trainer, all flags
    python -m variants apo_zero export FILE       the changed trainer as a file

    import variants                               in labs, bench and notebooks
    trainer = variants.load("apo_zero")
    trainer.train(trainer.Config(steps=50))

A method's file has a docstring (title and paper in the first line, the formula, when it helps), TRAINER,
CHANGES and GOLDEN, the origin of its numbers in golden/. CHANGES are pairs of lines of the trainer and of
what stands in their place. The old lines must occur exactly once: if the trainer has changed there, the
method is refused, not applied to something else.
"""

import difflib
import importlib
import linecache
import sys
import types
from pathlib import Path

from nanorlhf.errors import blame, require
from nanorlhf.run.cli import Flags, run_cli

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in ROOT.glob("variants/[a-z]*.py"))
# The flag that says in config.json, in --help and in the default --out which method a run has. No other value
# is allowed.
FLAG = '    # run\n    variant: Literal["{name}"] = "{name}"  # the method of variants/ in this trainer\n\n'
COLOURS = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}  # of a terminal: green, red, cyan


def method(name):
    """The file of a method as a module. UserError, with the nearest name, for an unknown one."""
    near = difflib.get_close_matches(name, NAMES, 1) or ["none; python -m variants lists them"]
    require(name in NAMES, f"no variant is called {name}; the nearest: {near[0]}")
    return importlib.import_module(f"variants.{name}")


def sources(name):
    """→ the source of the trainer, and that with the method's changes."""
    trainer = method(name).TRAINER
    source = changed = (ROOT / trainer).read_text("utf-8")
    for old, new in method(name).CHANGES:
        found = changed.count(old)
        require(found == 1, f"variants/{name}.py: {trainer} holds these lines {found} times, not once: {old}")
        changed = changed.replace(old, new)
    return source, changed


def named(name):
    """→ the changed source whose Config has the flag that names the method."""
    changed = sources(name)[1].replace("typing import ClassVar\n", "typing import ClassVar, Literal\n")
    return changed.replace("    def __post_init__", FLAG.format(name=name) + "    def __post_init__")


def load(name):
    """→ the changed trainer as a module, train_grpo_sapo for one.

    A checkpoint says which module made it, so the trainer and its variants refuse to resume each other's
    runs. The module has no file: linecache gives its lines to tracebacks and to --help.
    """
    title = f"{Path(method(name).TRAINER).stem}_{name}"
    source = named(name)
    module = types.ModuleType(title)
    module.__file__ = str(ROOT / f"{title}.py")
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
    sys.modules[title] = module  # dataclasses look their module up there, and so does pickle
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def act(name="", action="show", *words):
    """Do what the words of the command line say."""
    if name in ("", "-h", "--help"):
        print(__doc__.split("\n\n")[1])
        for m in map(method, NAMES):
            print(f"\n{m.__name__[9:]}, {m.TRAINER}\n  {m.__doc__.splitlines()[0]}".replace(" (", "\n  ("))
    elif action == "show":
        print(method(name).__doc__)
        source, changed = sources(name)
        for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm=""):
            colour = COLOURS.get(line[:1]) if sys.stdout.isatty() else None
            print(f"{colour}{line}\033[0m" if colour else line)
    elif action == "run":
        sys.exit(load(name).main(list(words)))
    else:
        require(action == "export" and len(words) == 1, f"{name} {action}: must be run FLAGS or export FILE")
        with blame(f"{name} export", OSError), open(words[0], "x", encoding="utf-8") as file:
            file.write(named(name))


def main(argv):
    """The command line → exit status. A user's mistake is one line, as it is in the trainers."""
    sys.argv[0] = " ".join(["-m variants", *argv[:2]])  # what --help and errors call the program
    return run_cli(Flags, lambda no_flags: act(*argv), __doc__, [])
