"""The worst cases that the fuzzers have found, one a row, and the fuzzers and the soak run at their smallest.

    FAULTS_FULL=1 pytest tests/faults/test_found.py -m slow -s      20,000 cases, 10,000 steps
"""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from runs import same_run, snapshot
from test_saving import change_state

import demo
import train_grpo
import train_ppo
import train_sft
from labs import common
from nanorlhf import hub
from nanorlhf.errors import UserError
from nanorlhf.hub import tokenizer_files
from nanorlhf.hub.__main__ import main as convert
from nanorlhf.look import __main__ as look
from nanorlhf.run import replay
from nanorlhf.run.log import read_rows
from nanorlhf.tokenizer import Tokenizer
from tests.faults import soak

FULL = bool(os.environ.get("FAULTS_FULL"))
ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")


@pytest.mark.parametrize("line", [
    "²,1,1", "x", "\x1b[2J,,", "9" * 5000 + ",1,1", "1" * 200_000, '"', "1.5,1", "nan,1,1", "é",
], ids=range(9))  # fmt: skip
def test_row_52_damaged_lines_in_a_log(line, run, tmp_path):
    """S | a line of metrics.csv torn, of letters, of 200,000 digits, no UTF-8 | the run goes on from its
    checkpoint, and leaves the line out of its rows and figures"""
    run(train_sft)
    path = tmp_path / "run/metrics.csv"
    header, first, *rest = path.read_text().splitlines()
    columns = header.split(",")
    cells = line.split(",") + [""] * (len(columns) - line.count(",") - 1)
    for damaged in (line, ",".join(cells)):
        text = "\n".join([header, first, damaged, *rest]) + "\n"
        path.write_bytes(text.encode("utf-8") + b"\xff\xfe\n")
        rows = read_rows(tmp_path / "run")
        assert [row["step"] for row in rows] == list(range(6))
        assert common.logged(tmp_path / "run", "step", "loss")[0] == list(range(6))
        sizes = {"metrics.csv": path.stat().st_size, "samples.jsonl": 0}
        change_state(tmp_path / "run", lambda saved, sizes=sizes: saved | {"sizes": sizes})
        assert run(train_sft, resume="true").status == 0


def with_nan_weights(saved):
    next(iter(saved["models"]["model"].values()))[0] = math.nan
    return saved


def with_moment(name, value):
    def change(saved):
        moments = saved["optimizer"]["state"][0]
        moments[name] = torch.full_like(moments[name], value)
        return saved

    return change


def with_integer_weights(saved):
    saved["models"]["model"] = {name: x.long() for name, x in saved["models"]["model"].items()}
    return saved


def with_a_huge_checksum(saved):
    return saved | {"frozen": [10**400], "sizes": {"metrics.csv": 1.5}}


@pytest.mark.parametrize("change", [
    with_a_huge_checksum, with_nan_weights, with_integer_weights, with_moment("exp_avg", math.inf),
    with_moment("exp_avg_sq", -1.0), with_moment("step", math.nan),
], ids=["checksum", "weights", "integers", "first moment", "second moment", "step"])  # fmt: skip
def test_row_53_numbers_in_a_checkpoint(change, run, tmp_path):
    """R | a checkpoint whose weights or moments are NaN, infinite, integers, below 0 where they are squares |
    refused, before a step is trained and --lr is blamed"""
    run(train_sft)
    change_state(tmp_path / "run", change)
    assert run(train_sft, resume="true").refused("--resume", "state.pt", "--overwrite starts anew")


@pytest.mark.parametrize("name", ["step-x1", "step--3", "step-99", "step-1e9", "latest", "step-²"])
def test_row_54_other_names_among_the_checkpoints(name, run, tmp_path):
    """S | a folder or file in state/ whose name is none of ours | left alone, and the newest checkpoint is
    used"""
    run(train_sft)
    (tmp_path / "run/state" / name).mkdir()
    done = run(train_sft, resume="true", steps=8)
    assert done.status == 0 and "from step 6" in done.out
    assert (tmp_path / "run/state" / name).exists()


@pytest.mark.parametrize("trainer, extra", [
    (train_ppo, {"beta": math.nan}), (train_ppo, {"beta": "1"}), (train_ppo, {}),
    (train_grpo, {"drawn": -3}), (train_grpo, {"drawn": 10**30}), (train_grpo, {"history": []}),
    (train_grpo, {"history": {"12=": 3}}), (train_grpo, {"history": {"12=": (0, 0)}}),
    (train_grpo, {"history": {"12=": (3, 2)}}), (train_grpo, {"history": {"12=": ("1", "2")}}),
    (train_grpo, {"history": {"12=": (1, math.nan)}}),
    (train_grpo, {"past": [{}]}), (train_grpo, {"past": [3]}), (train_grpo, {"past": None}),
], ids=str)  # fmt: skip
def test_row_55_progress_of_another_type(trainer, extra, run, tmp_path):
    """R | PPO's β or GRPO's place in the data is NaN, negative or of another type in a checkpoint | refused
    in one line"""
    run(trainer)
    kept = (lambda saved: saved["extra"]) if extra else (lambda saved: {})
    change_state(tmp_path / "run", lambda saved: saved | {"extra": kept(saved) | extra})
    assert run(trainer, resume="true", steps=8).refused("--resume", "state.pt")


@pytest.mark.parametrize("kind", ["deep", "no files", "a list"])
def test_row_56_list_of_checksums(kind, run, tmp_path):
    """S | manifest.json nested 100,000 deep, or of other contents | its checkpoint counts as damaged, the
    older one is used"""
    run(train_sft)
    text = {"deep": "[" * 100_000 + "]" * 100_000, "no files": "{}", "a list": "[1]"}[kind]
    (tmp_path / "run/state/step-000006/manifest.json").write_text(text)
    done = run(train_sft, resume="true")
    assert done.status == 0 and "step-000006/manifest.json: no list of checksums" in done.out
    assert "from step 4" in done.out


@pytest.mark.parametrize("name", ["model", "model.tmp", "model.old", "state/step-000002.tmp"])
def test_row_57_files_in_place_of_folders(name, run, tmp_path):
    """S | a file under the name of a folder that a run writes, or of its temporary name | replaced; the run
    is not lost at its end"""
    run(train_sft, "whole")
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run" / name).write_text("a file")
    assert run(train_sft).status == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_row_58_control_sequences_in_a_run_folder(run, tmp_path):
    """S | a value of config.json or of a checkpoint's list, or the name of a half-written file, that would
    clear the screen | shown as its escape, cut to 500 characters"""
    run(train_sft)
    (tmp_path / "run/state/\x1b[2J.tmp").mkdir()
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer": "\x1b[2J" + "x" * 10**6}))
    manifest = tmp_path / "run/state/step-000006/manifest.json"
    manifest.write_text(json.dumps({"files": {"\x1b[2J": {}}}))
    done = run(train_sft, resume="true")
    assert done.status == 0 and "\x1b" not in done.out and "\\u001b[2J" in done.out
    assert "state/\\u001b[2J was never completed" in done.out
    assert max(map(len, done.out.splitlines())) < 600


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "trainer", "config", "models"])
def test_row_59_bad_step_of_another_program(kind, tmp_path):
    """R | a bad-step file that is a pipe, or of another program | one line; nothing is waited for or run"""
    path = tmp_path / "bad-step-1.pt"
    content = {"trainer": "train_sft", "config": {}, "models": [], "batch": {}, "step": 1}
    other = {"trainer": {"trainer": "train_no"}, "config": {"config": {"zzz": 1}}, "models": {"models": [3]}}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        torch.save(content | other[kind], path)
    with pytest.raises(UserError, match="^" + re.escape(str(path))):
        replay.load(str(path))


@posix
@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_row_60_log_without_an_end(target, tmp_path):
    """R | a metrics.csv that is a pipe or a device, read by a lab | refused: it has no end"""
    if target == "pipe":
        os.mkfifo(tmp_path / "metrics.csv")
    else:
        (tmp_path / "metrics.csv").symlink_to(target)
    with pytest.raises(UserError, match="metrics.csv: is no file"):
        common.logged(str(tmp_path), "step")


DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGED_RUNS = {
    "tokens.jsonl.gz": [gzip.compress(x) for x in (DEEP, b"[1]", b'{"step": 0, "groups": "x"}')],
    "samples.jsonl": [DEEP, b'{"prompt": "a", "response": "b", "step": {}}'],
    "config.json": [b'{"group_size": "x", "prompts_per_step": null}', b'{"beta": NaN}', DEEP],
    "metrics.csv": [b"", b"a,b\n1,2\n", b"step,reward\n" + b"".join(b"%d,1e308\n" % i for i in range(20))],
}


@pytest.mark.parametrize("file", DAMAGED_RUNS)
def test_row_69_damaged_run_looked_at(file, run, tmp_path, capsys):
    """R | tokens.jsonl.gz, samples.jsonl, config.json or metrics.csv of other types, with NaN or nested
    100,000 deep, read by python -m nanorlhf.look | what can be left out is left out, else one line"""
    assert run(train_grpo, steps=2).status == 0
    out = str(tmp_path / "run")
    whole = Path(out, file).read_bytes()
    for content in DAMAGED_RUNS[file]:
        Path(out, file).write_bytes(content)
        for words in ([out], ["--doctor", out]):
            status = look.main(words)
            lines = capsys.readouterr().err.splitlines()
            assert (status, len(lines)) in ((0, 0), (2, 1)), content[:60]
            assert status == 0 or out in lines[0]
        if content is DEEP and file in ("tokens.jsonl.gz", "samples.jsonl"):
            assert status == 0
    Path(out, file).write_bytes(whole)
    assert look.main([out]) == 0


@pytest.mark.parametrize("argv", [
    ["--plot"], ["--plot", "x", "--\x1b[2J"], ["\x1b[2J"], ["/" + "a" * 5000],
], ids=range(4))  # fmt: skip
def test_mistakes_in_a_look_are_one_short_line(argv, capsys):
    assert look.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line and len(line) < 540


def test_row_70_tokenizers_without_measure(tmp_path):
    """R | a tokenizer.json with a token of 20,000 characters, an added token of none, or a split pattern that
    is broken, of 10^9 repetitions, or cuts empty pieces | refused at once, before it takes minutes or all
    memory, or gives wrong ids"""
    tok = Tokenizer.from_bytes()
    hub.save(tiny(vocab_size=400), tok, tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text("utf-8"))
    vocab = good["model"]["vocab"] | {"a" * 20_000: 300}
    empty = good["added_tokens"][0] | {"content": "", "id": 300, "special": False}
    steps = good["pre_tokenizer"]["pretokenizers"]

    def cut_by(pattern):
        split = steps[0] | {"pattern": {"Regex": pattern}}
        return {"pre_tokenizer": good["pre_tokenizer"] | {"pretokenizers": [split, *steps[1:]]}}

    for change, word in (
        ({"model": good["model"] | {"vocab": vocab}}, "its tokens are too long"),
        ({"added_tokens": [*good["added_tokens"], empty]}, "an added token is empty"),
        (cut_by(r"(?:(?:(?:a{1000}){1000}){1000})|[\s\S]"), "its split pattern is too large"),
        (cut_by(r"[\s\S]{0,5}?(?:)|[\s\S]"), "has empty pieces"),
        *((cut_by(broken), "expected a tokenizer's file") for broken in ("(", "(?&x)|a", r"\p{Nonsense}")),
    ):
        path.write_text(json.dumps(good | change), "utf-8")
        with pytest.raises(UserError, match=word):
            hub.load(tmp_path)


def test_a_panic_of_the_tokenizers_package():
    """A panic of Rust is no Exception: the test's own stands for it where the package is not installed."""

    class PanicException(BaseException):
        pass

    with pytest.raises(UserError, match="the tokenizers package cannot use it"), tokenizer_files._no_panic():
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), tokenizer_files._no_panic():
        raise KeyboardInterrupt


def test_row_62_checkpoints_without_a_config(run, tmp_path):
    """R | --out has checkpoints, a model/ or a metrics.csv, but no config.json | it holds a run, or files of
    the user: nothing is replaced without a flag"""
    run(train_sft)
    (tmp_path / "run/config.json").unlink()
    before = snapshot(tmp_path / "run")
    assert run(train_sft).refused("holds a run: add --resume")
    assert snapshot(tmp_path / "run") == before
    assert run(train_sft, resume="true", steps=8).status == 0
    for name in ("model/notes.txt", "metrics.csv", "samples.jsonl"):
        own = tmp_path / "own" / name
        own.parent.mkdir(parents=True)
        own.write_text("precious")
        assert run(train_sft, "own").refused("holds a run: add --resume")
        assert own.read_text() == "precious"
        shutil.rmtree(tmp_path / "own")


def test_names_beside_a_converted_folder(stages, tmp_path, capsys):
    """FOLDER.old, where one has put an older model, would be moved to FOLDER and then removed."""
    for name in ("new.old", "new.tmp", "new"):
        own = tmp_path / name / "notes.txt"
        own.parent.mkdir()
        own.write_text("precious")
        assert convert(["convert", f"{stages.folder}/sft/model", str(tmp_path / "new")]) == 2
        assert f"{name} is there already" in capsys.readouterr().err
        assert own.read_text() == "precious"
        shutil.rmtree(own.parent)
    (tmp_path / "new").symlink_to("nowhere")
    assert convert(["convert", f"{stages.folder}/sft/model", str(tmp_path / "new")]) == 2


@posix
def test_links_in_the_folder_of_the_demo(tmp_path):
    """report.json is written by way of report.json.tmp; a link there may lead to a file of the user's."""
    own = tmp_path / "own"
    own.write_text("precious")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/report.json.tmp").symlink_to(own)
    with pytest.raises(UserError, match="report.json.tmp is a link"):
        demo.train(demo.Config(out=str(tmp_path / "demo"), overwrite=True))
    for samples in (4, 10**9):
        with pytest.raises(UserError, match="--samples"):
            demo.train(demo.Config(out=str(tmp_path / "other"), samples=samples))


@posix
@pytest.mark.parametrize("name", ["merges.txt", "vocab.json"])
def test_tokenizer_file_that_is_a_pipe(name, tmp_path):
    """Only a pipe's other end says when it ends."""
    hub.save(tiny(vocab_size=300), None, tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "merges.txt":
        with pytest.raises(UserError, match="merges.txt is no file"):
            hub.load(tmp_path)
    else:
        assert hub.load(tmp_path)[1] is None


def test_row_61_reference_that_is_missing(run, tmp_path):
    """R | --resume without the reference that the run was started with | refused; it was not compared"""
    run(train_grpo, kl="k3", beta=0.1)
    done = run(train_grpo, resume="true", ref="none", steps=8)
    assert done.refused("--resume: the reference is not the one that")


# ------------------------------------------------------------------------------------------------------------
# the fuzzers and the soak run


@posix
@pytest.mark.slow
def test_hostile_folders_and_templates():
    """No traceback, no hang, no message of many lines, no foreign file changed: tests/faults/fuzz.py."""
    cases = "20000" if FULL else "500"
    command = [sys.executable, "-m", "tests.faults.fuzz", "--cases", cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    kinds = ("models:", "runs:", "templates:")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith(kinds)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks into /proc")
@pytest.mark.slow
def test_objects_of_a_run_do_not_grow(stages, tmp_path):
    """240 steps of GRPO with a reward process: Python holds at the end what it holds after 120 steps."""
    seen = soak.soak(stages, tmp_path / "run", 240, 4, lambda pid: soak.objects())
    growth = {name: n - seen[1][name] for name, n in seen[-1].items()}
    blocks = growth.pop("blocks")
    assert blocks < 600, growth  # 5 a step; each row that is kept would be more
    assert sum(n for n in growth.values() if n > 0) < 120, {name: n for name, n in growth.items() if n}


def numbers(settings, path=()):
    """The paths of the numbers in a config.json."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif type(value) in (int, float):
            yield *path, key


@pytest.mark.parametrize("family", ["gpt2", "llama3", "llama_bias_reward", "pythia_reward"])
def test_row_64_integers_that_torch_cannot_take(family, tmp_path):
    """R | config.json: a number that is a whole one beyond 64 bits | one line that names it; a `reward_bias`
    below 1e30 is used"""
    golden = ROOT / "tests/golden" / family
    settings = json.loads((golden / "config.json").read_text())
    shutil.copytree(golden, tmp_path / "model")
    for path in [*numbers(settings), ("reward_bias",)]:
        for value in (2**64, 10**29, -(2**64)):
            changed = json.loads(json.dumps(settings))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (tmp_path / "model/config.json").write_text(json.dumps(changed))
            try:
                model, _ = hub.load(tmp_path / "model")
            except UserError as error:
                assert path[-1] != "reward_bias" and str(value) in str(error), path
                continue
            if path == ("reward_bias",) and hasattr(model, "reward_bias"):
                assert model.reward_bias.item() == pytest.approx(value)
