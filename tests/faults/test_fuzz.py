"""Malformed rows, flags and folders, thousands of them: never a traceback, one line, exit status 2.

    pytest tests/faults/test_fuzz.py                   300 in this process, 3 in processes of their own
    FAULTS_FULL=1 pytest tests/faults/test_fuzz.py     10,000 and 100
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from runs import to_argv
from stages import TRAINERS, rows_of

FULL = bool(os.environ.get("FAULTS_FULL"))
ROOT = Path(__file__).parents[2]
ODD = st.sampled_from([
    "", " ", "nan", "inf", "-inf", "-1", "0", "1e999", "1.5", "0x10", "²", "１２", "true", "none", "null",
    "auto", "x", "\u0000", "\ud800", "é", "a" * 300, "--", "-", "=", "*", "../x", "/dev/null", "~", "%s",
    "{}", "a.py:f", "2,1", "1,2", ",", str(2**63), str(-(2**70)), "True", "1_0", "\n", "a\nb", "[1]",
])  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.just(2**70), st.floats(), ODD, st.text()),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(ODD, x, max_size=3)), max_leaves=5,
)  # fmt: skip
BIG = {"d_model", "n_layer", "vocab_size", "max_len", "steps", "demos", "pairs", "eval_prompts", "batch_size",
       "group_size", "prompts_per_step", "max_new_tokens", "epochs", "online", "threads",
       "off_policy_steps", "lora_rank", "minibatches", "n_head"}  # fmt: skip


def bend_flags(draw, trainer, flags):
    """One to three flags changed, left out, misspelt, or given twice → argv."""
    names = [f.name for f in dataclasses.fields(trainer.Config)]
    argv = to_argv(flags)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        value = draw(ODD)
        if name in BIG and value in ("１２", "1_0", str(2**63)):
            value = "0"  # a number that is right, if large, makes a long run and no mistake
        if name in ("out", "task", "init", "data", "rm", "ref") and value in ("", "."):
            value = "x"  # these mean the default there
        if draw(st.booleans()):
            name = name[: draw(st.integers(1, len(name)))] + draw(st.sampled_from(["", "s", "-", "_"]))
        argv.insert(draw(st.integers(0, len(argv))), draw(st.sampled_from([
            f"--{name}={value}", f"--{name}", value, f"-{name}"])))  # fmt: skip
    return argv


def bend_bytes(draw, data):
    """Bytes flipped, cut out, repeated, or others put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, n = draw(st.integers(0, len(data))), draw(st.integers(1, 9))
        what = draw(st.sampled_from(["flip", "cut", "put", "end"]))
        if what == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + n]
        elif what == "put":
            odd = [b"\0", b"\xff", b"{", b'"', b"[", b"\n", b"1e9", b"\xed\xa0\x80"]
            data[at:at] = draw(st.sampled_from(odd))
        else:
            del data[at:]
    return bytes(data)


def bend_json(draw, value):
    """One value somewhere in it exchanged, left out, or another put in."""
    value = json.loads(json.dumps(value))
    where = value
    while isinstance(where, dict) and where:
        key = draw(st.sampled_from(sorted(where)))
        if isinstance(where[key], dict) and draw(st.booleans()):
            where = where[key]
            continue
        if draw(st.booleans()):
            where[key] = draw(VALUES)
        else:
            del where[key]
            where[draw(ODD)] = draw(VALUES)
        break
    return value


def bend_rows(draw, trainer, path):
    rows = rows_of(trainer)
    for i in draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3)):
        rows[i] = bend_json(draw, rows[i])
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(bend_bytes(draw, lines) if draw(st.booleans()) else lines)


def bend_folder(draw, folder):
    """A file of a model or run folder removed, its bytes or its JSON bent."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = draw(st.sampled_from(files))
    what = draw(st.sampled_from(["gone", "bytes", "json"]))
    if what == "gone":
        path.unlink()
    elif what == "json" and path.suffix == ".json":
        path.write_text(json.dumps(bend_json(draw, json.loads(path.read_text()))))
    else:
        path.write_bytes(bend_bytes(draw, path.read_bytes()))


@st.composite
def case(draw):
    """(trainer, kind, what `prepare` draws from: it needs folders)."""
    kinds = st.sampled_from(["flags", "rows", "folder", "run"])
    return draw(st.sampled_from(TRAINERS)), draw(kinds), draw(st.data())


def prepare(trainer, kind, data, stages, folder):
    """Bend what there is to bend in `folder` → argv."""
    flags = stages.flags(trainer, folder / "run", steps=1)
    if kind == "flags":
        return bend_flags(data.draw, trainer, flags)
    if kind == "rows":
        bend_rows(data.draw, trainer, folder / "data.jsonl")
        return to_argv(flags | dict(data=folder / "data.jsonl"))
    if kind == "folder":
        name = "rm" if "rm" in flags and data.draw(st.booleans()) else "init"
        shutil.copytree(stages.folder / ("rm" if name == "rm" else "sft") / "model", folder / "model")
        bend_folder(data.draw, folder / "model")
        return to_argv(flags | {name: folder / "model"})
    shutil.copytree(stages.folder / f"fuzz-{trainer.__name__}", folder / "run")
    bend_folder(data.draw, folder / "run")
    return to_argv(flags | dict(steps=2, resume="true"))


def judge(status, err, argv):
    """0 where it happens to be right, else 2 and one line; 1 and one line where a run had to stop."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert status in (0, 1, 2) and "Traceback" not in err, (argv, err)
    if status:
        kind = {1: ": stopped: ", 2: ": error: "}[status]
        assert len(lines) == 1 and kind in lines[0], (argv, err)


@pytest.fixture(scope="module")
def cases(stages):
    """The runs to be resumed."""
    for trainer in TRAINERS:
        trainer.train(stages.config(trainer, stages.folder / f"fuzz-{trainer.__name__}", steps=1))
    return stages


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Relative paths that a flag is bent to lead into an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_malformed_input_in_this_process(cases, elsewhere):
    counts = {}

    @settings(max_examples=10_000 if FULL else 300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case())
    def fuzz(drawn):
        trainer, kind, data = drawn
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            argv = prepare(trainer, kind, data, cases, Path(folder))
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    status = trainer.main(argv)
                except SystemExit as e:  # --help
                    status = e.code or 0
            judge(status, err.getvalue(), argv)
            counts[kind, status] = counts.get((kind, status), 0) + 1

    fuzz()
    print("\n(kind, exit status): cases", dict(sorted(counts.items())))


@pytest.mark.slow
def test_malformed_input_in_real_processes(cases, elsewhere):
    @settings(max_examples=100 if FULL else 3, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case())
    def fuzz(drawn):
        trainer, kind, data = drawn
        with tempfile.TemporaryDirectory() as folder:
            argv = prepare(trainer, kind, data, cases, Path(folder))
            argv = [x.replace("\0", "") for x in argv]  # no operating system passes it on
            command = [sys.executable, str(ROOT / f"{trainer.__name__}.py")]
            command += [x.encode("utf-8", "replace") for x in argv]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            judge(done.returncode, done.stderr, argv)

    fuzz()
