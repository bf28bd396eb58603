"""Hostile run folders: each is resumed, replaced, or read by another program (fuzz.py runs them).

A case is the folder of a finished or an interrupted run of some trainer with one to three changes: a value in
its JSON, a torn or huge line in its logs, a checkpoint that is truncated, of another pickle, with other keys,
dtypes or steps, a planted `lock` or `*.tmp`, a link, a pipe, a device, a folder in place of a file or a file
in place of a folder, a file that may not be read. Then a trainer goes on with it (--resume), replaces it
(--overwrite) or is given its model, or sample.py, evaluate.py, the page of figures or the labs read it.
"""

import contextlib
import io
import json
import os
import random
import shutil

import torch

import evaluate
import sample
from labs import common
from nanorlhf.errors import UserError
from nanorlhf.run import replay
from nanorlhf.run.cli import run_cli
from nanorlhf.run.folders import describe
from nanorlhf.run.log import read_rows
from tests.faults import limits
from tests.faults.folders import DEEP, ODD, bend_json, damage_bytes

LOGS = "metrics.csv", "samples.jsonl"
CELLS = [
    "", "nan", "inf", "-inf", "1e999", "x", "\x1b[2J", "9" * 5000, "1_0", "²", '"', "\0", "é", "-1",
    "1" * 200_000,
]  # fmt: skip
PLANTED = [
    "lock", "config.json.tmp", "metrics.csv.tmp", "samples.jsonl.tmp", "curves.png", "model.tmp", "model.old",
    "state/step-000002.tmp", "state/step-000002.old", "state/step-99", "state/step-x1", "state/step--3",
    "state/step-²", "state/step-1e9", "bad-step-3.pt", "bad-step-3.pt.tmp", "state/latest",
]  # fmt: skip
KINDS = "json json log log state state state bytes special plant mode".split()
BECOMES = "gone pipe other itself device endless nowhere foreign another".split()


# ------------------------------------------------------------------------------------------------------------
# good folders


def good_runs(stages, trainers):
    """Of each trainer a finished run, and one killed at its last checkpoint → [(trainer, folder)]."""
    made = []
    for trainer in trainers:
        for name, save_every in (("finished", 2), ("cut", 0)):
            out = stages.folder / f"{trainer.__name__}-{name}"
            more = dict(online=2, pairs=16, group_size=2, rm=f"{stages.folder}/rm/model")
            more = more if trainer.__name__ == "train_dpo" and name == "cut" else {}
            trainer.train(stages.config(trainer, out, steps=4, save_every=save_every or 2, **more))
            if name == "cut":  # as if it had been killed while it wrote its last checkpoint
                newest = max(out.glob("state/step-*"))
                newest.rename(f"{newest}.tmp")
            made.append((trainer, out))
    return made


# ------------------------------------------------------------------------------------------------------------
# changes


def change(rng, run, foreign):
    """One change to a run folder; links lead to the file `foreign`, which nothing may write to."""
    everything = [path for path in sorted(run.rglob("*")) if not path.is_symlink()]
    files = [path for path in everything if path.is_file()]
    kind = rng.choice(KINDS)
    if kind == "plant":
        return _plant(rng, run, foreign)
    if kind == "special" or not files:
        return _special(rng, rng.choice(everything), foreign)
    if kind == "mode":
        return rng.choice(everything).chmod(rng.choice([0, 0o200, 0o400, 0o500]))
    wanted = {"json": ".json", "state": ".pt"}.get(kind)
    if kind == "log":
        files = [path for path in files if path.name in LOGS] or files
    elif wanted:
        files = [path for path in files if path.suffix == wanted] or files
    path = rng.choice(files)
    if kind == "json" and path.suffix == ".json":
        bend_json(rng, path)
    elif kind == "log":
        _log(rng, path)
    elif kind == "state" and path.suffix == ".pt":
        _state(rng, path)
    else:
        damage_bytes(rng, path)


def _special(rng, path, foreign):
    """A file or folder becomes something else, or is gone."""
    was_folder = path.is_dir()
    if was_folder:
        shutil.rmtree(path)
    else:
        path.unlink()
    kind = rng.choice(BECOMES)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "other" and was_folder:
        path.write_text("a file")
    elif kind == "other":
        path.mkdir()
    elif kind == "another":
        path.symlink_to(foreign.parent)
    elif kind != "gone":
        targets = {"itself": path.name, "device": "/dev/null", "endless": "/dev/zero", "nowhere": "/nowhere"}
        path.symlink_to(targets.get(kind, foreign))


def _plant(rng, run, foreign):
    """Something under a name that a run writes, or that looks like one of its own."""
    path = run / rng.choice(PLANTED)
    if not path.parent.is_dir() or os.path.lexists(path):
        return
    kind = rng.choice(["file", "folder", "full folder", "pipe", "link", "link to a folder"])
    if kind == "file":
        path.write_bytes(rng.choice([b"", b"x", b"{}", b"\0" * 100]))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(foreign)
    elif kind == "link to a folder":
        path.symlink_to(foreign.parent)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "state.pt").write_bytes(b"x")
            (path / "inner").symlink_to(foreign)


def _log(rng, path):
    """A line of a log torn, lost, doubled, or a cell of it exchanged."""
    lines = path.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.choice(["torn", "lost", "doubled", "cell", "cell", "cell", "long", "deep", "bytes"])
    odd = rng.choice(CELLS).encode()
    if kind == "torn":
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    elif kind == "lost":
        del lines[at]
    elif kind == "doubled":
        lines[at:at] = [lines[at]] * rng.choice([1, 3, 5000])
    elif kind == "cell":
        cells = lines[at].split(b",")
        cells[rng.randrange(len(cells))] = odd
        lines[at] = b",".join(cells)
    elif kind == "long":
        lines[at] = b"x" * 3_000_000
    elif kind == "deep":
        lines[at] = DEEP.encode()
    else:
        lines[at:at] = [b"\xff\xfe\0"]
    path.write_bytes(b"\n".join(lines))


def _state(rng, path):
    """A checkpoint as another program, or a damaged one, would have written it; its checksums are right."""
    try:
        saved = torch.load(path, weights_only=True)
    except Exception:  # an earlier change damaged it
        return damage_bytes(rng, path)
    if rng.random() < 0.1:
        saved = rng.choice([[], {}, None, 3, torch.zeros(3), [saved], {"step": 2}])
    else:
        saved = _bent(rng, saved)
    with contextlib.suppress(RuntimeError, OverflowError):  # what torch cannot write stays as it was
        torch.save(saved, path)
    manifest = path.parent / "manifest.json"
    if manifest.is_file() and rng.random() < 0.95:
        manifest.write_text(json.dumps({"files": dict(describe(path.parent))}))


def _bent(rng, value):
    """A nested dict, list or tensor with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.12:
            return {name: x for name, x in value.items() if name != key}
        if kind < 0.2:
            return value | {rng.choice([*value, "x", 0, "step"]): rng.choice(_VALUES)}
        return value | {key: _bent(rng, value[key])}
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.8:
        value = list(value)
        at = rng.randrange(len(value))
        value[at] = _bent(rng, value[at])
        return value
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        kind = rng.choice(["dtype", "shape", "nan", "meta", "sparse", "scalar", "huge"])
        if kind == "dtype":
            kinds = [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
            return value.to(rng.choice(kinds))
        if kind == "shape":
            return value.flatten()[:1].repeat(rng.choice([0, 1, 7]))
        if kind == "nan":
            return torch.full_like(value, rng.choice([float("nan"), float("inf"), 1e38]))
        if kind == "sparse":
            return value.to_sparse()
        if kind == "huge":
            return torch.zeros(1).expand(10**6)
        return torch.empty_like(value, device="meta") if kind == "meta" else value.new_zeros(())
    if type(value) in (int, float) and abs(value) < 1e300 and rng.random() < 0.6:
        odd = [-3, 10**9, 10**30, float("nan"), float("inf"), str(value)]
        return rng.choice([value + 1, value - 1, value + 0.5, *odd])
    return rng.choice(_VALUES)


_VALUES = [x for x in ODD if x != "DEEP"] + [torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 3)]


# ------------------------------------------------------------------------------------------------------------
# a case, in a process of its own


def use(rng, kind, stages, trainer, run):
    """Go on with the run folder, replace it, or read it → "used", "refused …", or what is wrong."""
    flags = stages.flags(trainer, run, steps=rng.choice([4, 5]), save_every=2)
    if kind in ("resume", "overwrite"):
        return _status(lambda argv: trainer.main(argv), flags | {kind: "true"})
    if kind == "neither":
        return _status(lambda argv: trainer.main(argv), flags)
    model = f"{run}/model"
    if kind == "sample":
        flags = dict(model=model, prompt="abc=", max_new_tokens=3)
        return _status(lambda argv: run_cli(sample.Config, sample.main, "", argv), flags)
    data = f"{stages.folder}/train_ppo.jsonl"
    if kind == "evaluate":
        rm = f"{stages.folder}/rm/model"
        flags = dict(model=model, data=data, rm=rm, max_new_tokens=3, n=2, k=1, prompts=4)
        if rng.random() < 0.5:
            flags |= dict(model=f"{stages.folder}/sft/model", rm=model)
        return _status(lambda argv: run_cli(evaluate.Config, evaluate.evaluate, "", argv), flags)
    if kind == "init":
        other = next(t for t in stages.trainers if t.__name__ == "train_dpo")
        flags = stages.flags(other, run.parent / "out", steps=1, init=model)
        return _status(lambda argv: other.main(argv), flags)
    return _read(trainer, run)


def _read(trainer, run):
    """What programs read of a finished run: its rows, its figures for a lab, a step that was not finite."""
    for path in sorted(run.glob("bad-step-*.pt")):
        with contextlib.suppress(UserError):
            replay.load(str(path))
    common.logged(str(run), "step", trainer.SHOW[0])
    read_rows(run)


def _status(main, flags):
    """Call a program's main(argv) and look at its status and its stderr."""
    argv = [f"--{key}={value}" for key, value in flags.items()]
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    if limits.CONTROL.search(out.getvalue().replace("\r", "")):
        return f"control characters in {out.getvalue()[-300:]!r}"
    if status == 0:
        return f"said, though all is well: {lines}" if lines else "used"
    if status not in (1, 2) or len(lines) != 1:
        return f"status {status} with {lines}"
    return limits.judged(lines[0])


def attack(goods, stages, number, seed, room):
    """Make case `number` of a seed below the folder `room` and run it → its outcome."""
    rng = random.Random(f"run:{seed}:{number}")
    _remove(room)
    room.mkdir()
    foreign = room / "foreign/precious"
    foreign.parent.mkdir()
    foreign.write_text("precious")
    trainer, good = rng.choice(goods)
    run = room / "run"
    shutil.copytree(good, run)
    for _ in range(rng.randint(1, 3)):
        change(rng, run, foreign)
    kind = rng.choice(["resume"] * 5 + ["overwrite"] * 2 + ["neither", "sample", "evaluate", "init", "read"])
    may_change = [room / "out"]
    if kind in ("resume", "overwrite") or kind == "neither" and not (run / "config.json").exists():
        may_change.append(run)
    return limits.watched(room, lambda: use(rng, kind, stages, trainer, run), may_change)


def _remove(room):
    """Remove a folder, also what may not be read in it."""
    for parent, _, _ in os.walk(room):
        os.chmod(parent, 0o700)
    shutil.rmtree(room, ignore_errors=True)
