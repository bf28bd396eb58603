"""variants/: every method fits its trainer, computes its golden vectors and trains; and the command line."""

import difflib
import json
import linecache
import re
import shutil
import traceback

import pytest
import stages as st
import test_style
import torch

import variants
from nanorlhf.errors import UserError
from nanorlhf.run import replay
from variants import main

EACH = pytest.mark.parametrize("name", variants.NAMES)
# Flags without which a method's smoke run would not come to its own lines.
SMOKE = {
    # The reward model's scores may be negative, and are no reward function's.
    "gdpo": dict(rm="", reward=[f"{__file__}:has_a", f"{__file__}:length"]),
    "maxrl": dict(rm="", reward=[f"{__file__}:has_a"]),
    "pass_at_k": dict(rm="", reward=[f"{__file__}:has_a"]),
}


def has_a(prompt, response):
    return float("a" in response)


def length(prompt, response):
    return float(len(response))


def golden(name):
    return json.loads((variants.ROOT / f"variants/golden/{name}.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------------------
# Each method


@EACH
def test_fits_its_trainer(name):
    """Each old text occurs once in the trainer as it is, the result is Python, and few lines are new."""
    method = variants.method(name)
    source = (variants.ROOT / method.TRAINER).read_text("utf-8")
    for old, new in method.CHANGES:
        assert source.count(old) == 1, old
        assert old.endswith("\n") and new.endswith("\n"), "a change is of whole lines"
    compile(variants.named(name), name, "exec")
    assert 0 < new_lines(name) <= 15
    assert 'variant: Literal["' + name in variants.named(name)


@EACH
def test_docstring(name):
    """The first line has title and paper, a formula follows, and a sentence says when the method helps."""
    doc = variants.method(name).__doc__
    assert re.fullmatch(r".+ \([^()]+\)\.", doc.splitlines()[0])
    assert re.search(r"^    .*=", doc, re.M) and "When it helps: " in doc


def new_lines(name):
    """Lines of the changed trainer that the trainer has not."""
    source, changed = variants.sources(name)
    return sum(line.startswith("+ ") for line in difflib.ndiff(source.splitlines(), changed.splitlines()))


def tensor(value):
    """Nested lists of a JSON file → a tensor, numbers with a point in float64; other values stay."""
    if not isinstance(value, list):
        return value
    x = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if x.is_floating_point() else x


def close(x, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert x.shape == expected.shape
    assert (x.double() - expected).abs().max() <= 1e-6


@EACH
def test_golden(name):
    """Value and gradient are those of the published code, or of the reference, that the file names.

    A call: function, inputs {parameter: nested list or plain value}, config {flag: value} if the function
    takes a cfg, value (of a tuple the first) and gradient of its sum {parameter: nested list}.
    """
    trainer = variants.load(name)
    found = golden(name)
    assert variants.method(name).GOLDEN in found["origin"] and found["calls"]
    for call in found["calls"]:
        inputs = {key: tensor(value) for key, value in call["inputs"].items()}
        for key in call["gradient"]:
            inputs[key].requires_grad_()
        if "config" in call:
            inputs["cfg"] = trainer.Config(**call["config"])
        value = getattr(trainer, call["function"])(**inputs)
        value = value[0] if isinstance(value, tuple) else value
        close(value.detach(), call["value"])
        if call["gradient"]:
            value.sum().backward()
        for key, expected in call["gradient"].items():
            close(inputs[key].grad, expected)


@EACH
def test_golden_is_not_the_trainer(name):
    """The trainer as it is does not compute the golden vectors, or lacks the function or a parameter."""
    trainer = __import__(variants.method(name).TRAINER.removesuffix(".py"))
    differs = False
    for call in golden(name)["calls"]:
        inputs = {key: tensor(value) for key, value in call["inputs"].items()}
        try:
            if "config" in call:
                inputs["cfg"] = trainer.Config(**call["config"])
            value = getattr(trainer, call["function"])(**inputs)
            value = value[0] if isinstance(value, tuple) else value
            close(value, call["value"])
        except (AttributeError, TypeError, AssertionError):
            differs = True
    assert differs


def flags(name, stages, out, **more):
    trainer = next(t for t in st.TRAINERS if f"{t.__name__}.py" == variants.method(name).TRAINER)
    return stages.flags(trainer, out, **dict(steps=2, save_every=0) | SMOKE.get(name, {}) | more)


@EACH
def test_trains(name, stages, tmp_path, no_curves):
    """Two steps; config.json says which method it was."""
    trainer = variants.load(name)
    trainer.train(trainer.Config(**flags(name, stages, tmp_path / "run")))
    assert json.loads((tmp_path / "run/config.json").read_text())["variant"] == name


# ------------------------------------------------------------------------------------------------------------
# The machinery


def test_at_most_60_lines():
    files = [variants.ROOT / f"variants/{name}.py" for name in ("__init__", "__main__")]
    assert test_style.total(files)["lines"] <= 60


def test_a_trainer_that_has_changed_is_refused(tmp_path, monkeypatch):
    """One changed character in a replaced line is enough; the message has the file and the line."""
    (tmp_path / "variants").mkdir()
    shutil.copy(variants.ROOT / "variants/dpo_length_norm.py", tmp_path / "variants")
    source = (variants.ROOT / "train_dpo.py").read_text("utf-8")
    (tmp_path / "train_dpo.py").write_text(source.replace("h_w = logp_w - ref_w", "h_w = logp_w - ref_w + 0"))
    monkeypatch.setattr(variants, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"dpo_length_norm.py: train_dpo.py holds these lines 0 times.*h_w ="):
        variants.sources("dpo_length_norm")


def test_every_trainer_can_have_the_flag(monkeypatch):
    """Which stands in config.json and takes no other value."""
    for trainer in variants.ROOT.glob("train_*.py"):
        text = trainer.read_text("utf-8")
        monkeypatch.setattr(variants, "sources", lambda name, text=text: (text, text))
        source = variants.named("x")
        compile(source, "x", "exec")
        assert source.count(variants.FLAG.format(name="x")) == 1
        assert re.search(r"^from typing import .*Literal$", source, re.M)


def test_folder_and_checkpoint_say_the_variant(stages, tmp_path, no_curves, capsys):
    """runs/reviews-NAME by default; trainer and variant refuse to resume each other's runs."""
    trainer = variants.load("dpo_length_norm")
    assert trainer.Config().out == "runs/reviews-dpo_length_norm"
    assert trainer.Config(data="a/b.jsonl").out == "runs/b-dpo_length_norm"
    assert trainer.Config(out="here").out == "here"
    run = tmp_path / "run"
    trainer.train(trainer.Config(**flags("dpo_length_norm", stages, run)))
    with pytest.raises(UserError, match="is a run of train_dpo_dpo_length_norm.py"):
        st.train_dpo.train(stages.config(st.train_dpo, run, resume=True))
    plain = tmp_path / "plain"
    st.train_dpo.train(stages.config(st.train_dpo, plain, steps=2))
    with pytest.raises(UserError, match="is a run of train_dpo.py"):
        trainer.train(trainer.Config(**flags("dpo_length_norm", stages, plain, resume=True)))
    trainer.train(trainer.Config(**flags("dpo_length_norm", stages, run, resume=True, steps=3)))
    assert "from step 2" in capsys.readouterr().out


def test_a_bad_step_of_a_variant_can_be_replayed(stages, tmp_path, no_curves):
    trainer = variants.load("dpo_length_norm")
    cfg = trainer.Config(**flags("dpo_length_norm", stages, tmp_path / "run", lr=1e30))
    with pytest.raises(Exception, match="bad-step"):
        trainer.train(cfg)
    module, models, batch, cfg = replay.load(next((tmp_path / "run").glob("bad-step-*.pt")))
    assert module is trainer and cfg.variant == "dpo_length_norm"


def test_traceback_shows_the_changed_lines():
    trainer = variants.load("dpo_length_norm")
    try:
        trainer.preference_loss(*torch.zeros(4, 1), beta=1.0)
    except TypeError as error:
        text = "".join(traceback.format_exception(error))
    assert "h_w = (logp_w - ref_w) / len_w" in text and "train_dpo_dpo_length_norm.py" in text
    linecache.checkcache()
    assert linecache.getline(trainer.__file__, 1)


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_list(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main([]) == 0
    out = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == out
    line = next(line for line in out.splitlines() if line.startswith("dpo_length_norm  "))
    assert "train_dpo.py" in line and "arXiv 2411.15124" in line and "Length-normalised DPO" in line
    assert all(f"\n{name}" in out for name in variants.NAMES)


def test_diff_is_coloured_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main(["dpo_length_norm"]) == 0
    out = capsys.readouterr().out
    assert "-        h_w = logp_w - ref_w\n" in out and "\033" not in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["dpo_length_norm"]) == 0
    out = capsys.readouterr().out
    assert "\033[31m-        h_w = logp_w - ref_w\033[0m\n" in out
    assert "\033[32m+        h_w = (logp_w - ref_w) / len_w\033[0m\n" in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("dpo_lenght_norm", "the nearest: dpo_length_norm"),
        ("zzz run", "python -m variants lists them"),
        ("dpo_length_norm exprot a.py", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export a b", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export no/such/folder.py", "No such file or directory"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error and message in error


@pytest.mark.parametrize(
    "flag, message",
    [("--stps=3", "did you mean --steps"), ("--variant=other", "must be one of dpo_length_norm")],
)
def test_mistakes_in_flags_are_one_line(flag, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    with pytest.raises(SystemExit) as end:
        main(["dpo_length_norm", "run", flag])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("-m variants dpo_length_norm run: error: ") and message in error


def test_run(stages, tmp_path, no_curves, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    argv = [f"--{key}={value}" for key, value in flags("dpo_length_norm", stages, tmp_path / "run").items()]
    with pytest.raises(SystemExit) as end:
        main(["dpo_length_norm", "run", *argv])
    assert end.value.code == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["variant"] == "dpo_length_norm"


def test_help_has_all_flags(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    with pytest.raises(SystemExit):
        main(["dpo_length_norm", "run", "--help"])
    out = capsys.readouterr().out
    assert "usage: python -m variants dpo_length_norm run" in out
    assert "--variant" in out and "the method of variants/" in out and "--beta" in out


def test_export(tmp_path, capsys, monkeypatch):
    """The file is the changed trainer and can be imported; nothing is overwritten."""
    monkeypatch.setattr("sys.argv", ["variants"])
    file = tmp_path / "fork.py"
    assert main(["dpo_length_norm", "export", str(file)]) == 0
    assert file.read_text("utf-8") == variants.named("dpo_length_norm")
    monkeypatch.syspath_prepend(tmp_path)
    import fork

    assert fork.Config().out == "runs/reviews-dpo_length_norm"
    before = file.read_bytes()
    assert main(["dpo_length_norm", "export", str(file)]) == 2
    assert "File exists" in capsys.readouterr().err and file.read_bytes() == before
