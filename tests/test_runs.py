"""Run folders: what is in them, resuming, stopping, refusing, and every way in which a disk can fail."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from runs import EACH, Crash, crash, disk_full, equal, flip, metrics, same_run, snapshot, state, states
from stages import TRAINERS, jsonl

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import hub, tasks
from nanorlhf.errors import Interrupted, RunError, UserError
from nanorlhf.hub.files import write_jsonl
from nanorlhf.look import plots
from nanorlhf.run import checkpoint, folders
from nanorlhf.run.checkpoint import NEW_RUN, Run, damage
from nanorlhf.run.folders import new_folder, restore
from nanorlhf.run.log import Log


@pytest.fixture(autouse=True)
def quick(no_curves, monkeypatch):
    """No curves, and no fsync: neither is what these tests are about, and both are slow."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# what a run leaves


@EACH
def test_contents(trainer, stages, tmp_path, monkeypatch):
    monkeypatch.undo()  # with curves
    cfg = stages.config(trainer, tmp_path / "run")
    last = trainer.train(cfg)
    have = {p.name for p in (tmp_path / "run").iterdir()}
    files = {"config.json", "metrics.csv", "samples.jsonl", "curves.png", "model", "state"}
    files |= {"tokens.jsonl.gz", "look.html"}
    assert have == files | ({"critic"} if trainer is train_ppo else set())
    assert json.loads((tmp_path / "run/config.json").read_text()) == dataclasses.asdict(cfg)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples and all(s.keys() >= {"step", "prompt", "response"} for s in samples)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list("012345")
    assert list(rows[0]) == [c for c in trainer.COLUMNS if c not in ("s", "tok_s")]
    assert all(float(rows[-1][k]) == pytest.approx(v, rel=1e-5) for k, v in last.items() if k in rows[-1])
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert states(tmp_path / "run") == ["step-000004", "step-000006"]  # the newest two
    model, _ = hub.load(tmp_path / "run/model")
    saved = state(tmp_path / "run")["models"]["policy" if trainer in (train_ppo, train_grpo) else "model"]
    assert equal(dict(model.state_dict()), saved)


def test_samples_hold_what_ppo_saw(stages, tmp_path):
    train_ppo.train(stages.config(train_ppo, tmp_path / "run", group_size=2, sample_every=2))
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [step for step in (0, 2, 4, 5) for _ in range(16)]
    assert all(rows[i]["prompt"] == rows[i + 1]["prompt"] for i in range(0, len(rows), 2))
    mean = sum(r["reward"] for r in rows[:16]) / 16
    assert mean == pytest.approx(float(metrics(tmp_path / "run")[0]["reward"]), abs=1e-3)


@EACH
def test_a_single_step_draws_its_curves(trainer, stages, tmp_path, monkeypatch):
    monkeypatch.undo()
    trainer.train(stages.config(trainer, tmp_path / "run", steps=1))
    assert (tmp_path / "run/curves.png").stat().st_size > 1000 and len(metrics(tmp_path / "run")) == 1


# resuming


@EACH
@pytest.mark.parametrize(
    "stop, error, resumed",
    [
        (lambda: signal.raise_signal(signal.SIGTERM), Interrupted, 4),
        (lambda: signal.raise_signal(signal.SIGINT), Interrupted, 4),
        (crash, Crash, 2),  # step 2 was logged and is run again
    ],
    ids=["SIGTERM", "SIGINT", "crash"],
)
def test_resuming_is_bit_exact(trainer, stop, error, resumed, stages, tmp_path, at_step, capsys):
    """6 steps at a time, and the same broken off in the middle of step 3: not one bit of difference."""
    more = dict(kl_target=0.05) if trainer is train_ppo else {}  # beta is part of the state
    trainer.train(stages.config(trainer, tmp_path / "whole", **more))
    undo = at_step(3, stop)
    with pytest.raises(error):
        trainer.train(stages.config(trainer, tmp_path / "run", **more))
    undo()
    assert len(metrics(tmp_path / "run")) < 6
    torch.manual_seed(123)  # nothing may hang on the global generator
    trainer.train(stages.config(trainer, tmp_path / "run", resume=True, **more))
    assert f"resume: {tmp_path}/run from step {resumed}\n" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "run")
    if more:
        assert len({row["beta"] for row in metrics(tmp_path / "run")}) == 6


@EACH
def test_deterministic_changes_no_number_on_the_cpu(trainer, stages, tmp_path, recwarn):
    """The flag reaches torch, which has repeatable algorithms for all we call, and the runs are equal."""
    trainer.train(stages.config(trainer, tmp_path / "without"))
    assert not torch.are_deterministic_algorithms_enabled()
    trainer.train(stages.config(trainer, tmp_path / "with", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not recwarn.list
    torch.use_deterministic_algorithms(False)
    same_run(tmp_path / "with", tmp_path / "without")


def test_resuming_a_finished_run_changes_nothing(stages, tmp_path):
    last = train_sft.train(stages.config(train_sft, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    again = train_sft.train(stages.config(train_sft, tmp_path / "run", resume=True))
    after = snapshot(tmp_path / "run")
    before.pop("config.json"), after.pop("config.json")  # says "resume" now
    assert after == before and again == pytest.approx({k: v for k, v in last.items() if k in again}, rel=1e-5)


def test_more_steps_than_before(stages, tmp_path, capsys):
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=2))
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=5, resume=True))
    assert "resume: --steps was 2, is now 5" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run")] == list("01234")


def test_resume_before_the_first_checkpoint_starts_anew(stages, tmp_path, at_step, capsys):
    undo = at_step(1, crash)
    with pytest.raises(Crash):
        train_sft.train(stages.config(train_sft, tmp_path / "run"))
    undo()
    for out in ("run", "whole"):
        train_sft.train(stages.config(train_sft, tmp_path / out, resume=True))
    same_run(tmp_path / "whole", tmp_path / "run")
    assert capsys.readouterr().out.count("no complete checkpoint yet; starting at step 0") == 2


def test_torn_log_lines_are_dropped_on_resume(stages, tmp_path):
    """A crash or a full disk can cut the last line of a log short."""
    train_ppo.train(stages.config(train_ppo, tmp_path / "whole"))
    train_ppo.train(stages.config(train_ppo, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/state/step-000006")
    for name, torn in (("metrics.csv", b"6,0.1,0."), ("samples.jsonl", b'{"step": 3, "prompt": "\xc3')):
        with open(tmp_path / "run" / name, "ab") as f:
            f.write(torn)
    train_ppo.train(stages.config(train_ppo, tmp_path / "run", resume=True))
    same_run(tmp_path / "whole", tmp_path / "run")


# refusing


@EACH
@pytest.mark.parametrize("flags, says", [
    (dict(data="bad.jsonl"), r'bad.jsonl:1: missing key'),
    (dict(init="nowhere"), "--init nowhere does not exist"),
    (dict(wandb="project"), "--wandb needs the wandb package: pip install wandb"),
])  # fmt: skip
def test_a_mistaken_overwrite_loses_nothing(trainer, flags, says, stages, tmp_path, monkeypatch):
    trainer.train(stages.config(trainer, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_jsonl("bad.jsonl", [{"promt": ""}])
    with pytest.raises(UserError, match=says):
        trainer.train(stages.config(trainer, tmp_path / "run", overwrite=True, **flags))
    assert snapshot(tmp_path / "run") == before


def test_a_gate_that_refuses_loses_nothing(stages, tmp_path):
    """PPO on chain from a policy that cannot add: refused, and the run that stood there is still whole."""
    flags = dict(task="chain", demos=64, steps=1, batch_size=8, d_model=32, eval_every=0)
    train_sft.train(train_sft.Config(out=f"{tmp_path}/sft", **flags))
    train_ppo.train(stages.config(train_ppo, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    flags = dict(init=f"{tmp_path}/sft/model", out=f"{tmp_path}/run", overwrite=True)
    with pytest.raises(UserError, match="--task chain: .* has not passed SFT's phase transition"):
        train_ppo.train(train_ppo.Config("chain", **flags))
    assert snapshot(tmp_path / "run") == before


def test_overwrite_leaves_nothing_of_the_old_run(stages, tmp_path):
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=8, seed=1))
    for out in ("run", "new"):
        train_sft.train(stages.config(train_sft, tmp_path / out, overwrite=True))
    same_run(tmp_path / "new", tmp_path / "run")
    assert states(tmp_path / "run") == states(tmp_path / "new")


# damage


def test_all_checkpoints_damaged(stages, tmp_path):
    train_sft.train(stages.config(train_sft, tmp_path / "run"))
    for name in states(tmp_path / "run"):
        flip(tmp_path / "run/state" / name / "state.pt")
    before = snapshot(tmp_path / "run")
    newest = "step-000006/state.pt: wrong checksum, or missing; --overwrite starts anew"
    with pytest.raises(UserError, match=f"every checkpoint in .* is damaged; the newest: .*{newest}"):
        train_sft.train(stages.config(train_sft, tmp_path / "run", resume=True))
    assert snapshot(tmp_path / "run") == before


def test_damaged_config(stages, tmp_path):
    train_sft.train(stages.config(train_sft, tmp_path / "run"))
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged: it is not JSON; --overwrite starts anew"):
        train_sft.train(stages.config(train_sft, tmp_path / "run", resume=True))


@pytest.mark.parametrize("power", [True, False], ids=["crash", "disk full"])
def test_a_new_folder_is_all_or_nothing(power, tmp_path, monkeypatch):
    """Broken at its first, second, … call of the operating system, it leaves the old folder or the whole new
    one (after a crash `restore` finds it), and the next write succeeds."""
    folder, old, new = tmp_path / "f", {"a": b"1", "b": b"2"}, {"a": b"3", "c": b"4"}
    left = None  # calls until it breaks

    def breaking(fn):
        def call(*args, **kw):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash if power else OSError(errno.ENOSPC, "No space left on device")
            return fn(*args, **kw)

        return call

    def write_folder(folder, files):
        with new_folder(folder) as tmp:
            for name, data in files.items():
                Path(tmp, name).write_bytes(data)

    seen, whole = [], False
    for k in range(1, 40):
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, old)
        with monkeypatch.context() as patch:
            left = k
            for name in ("rename", "makedirs", "fsync"):
                patch.setattr(os, name, breaking(getattr(os, name)))
            patch.setattr(folders, "open", breaking(open), raising=False)
            patch.setattr(Path, "write_bytes", breaking(Path.write_bytes))
            if power:
                patch.setattr(shutil, "rmtree", breaking(shutil.rmtree))
            with contextlib.suppress(Crash, RunError):
                write_folder(folder, new)
                whole = True
        if power:  # a full disk must leave things in order by itself
            restore(folder)
        assert folder.is_dir() and (power or not (tmp_path / "f.tmp").exists())
        seen.append(snapshot(folder))
        write_folder(folder, new)
        assert snapshot(folder) == new and not (tmp_path / "f.old").exists()
        if whole:
            break
    assert whole and k > 8 and all(s in (old, new) for s in seen) and old in seen and seen[-1] == new


def test_crash_between_the_renames_of_model(stages, tmp_path, monkeypatch):
    """model/ is then called model.old/: it loads, a failing save leaves it, the next one replaces it."""
    train_sft.train(stages.config(train_sft, tmp_path / "run"))
    before = snapshot(tmp_path / "run/model")
    os.rename(tmp_path / "run/model", tmp_path / "run/model.old")
    loaded = hub.load(tmp_path / "run/model")
    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot save"):
        patch.setattr(os, "fsync", disk_full)
        hub.save(*loaded, tmp_path / "run/model")
    hub.load(tmp_path / "run/model")
    hub.save(*loaded, tmp_path / "run/model")
    assert snapshot(tmp_path / "run/model") == before and not (tmp_path / "run/model.old").exists()


# a full disk


def test_damaged_newer_checkpoints_do_not_push_out_the_one_that_is_whole(stages, tmp_path, monkeypatch):
    """--resume goes on from step 1, past damage: what it saves at 2 can be resumed in its turn."""
    run = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "KEEP", 4)
    train_sft.train(stages.config(train_sft, run, steps=4, save_every=1))
    for name in states(run)[1:]:
        flip(run / "state" / name / "state.pt")
    monkeypatch.setattr(checkpoint, "KEEP", 1)
    train_sft.train(stages.config(train_sft, run, steps=2, resume=True))
    assert damage(run / "state/step-000002") is None


def test_disk_full_when_resuming_keeps_the_logs(stages, tmp_path, monkeypatch):
    train_ppo.train(stages.config(train_ppo, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    opened = {"w": disk_full}  # config.json is written anew
    full = lambda path, mode="r", **kw: opened.get(mode, open)(path, mode, **kw)  # noqa: E731
    monkeypatch.setattr(folders, "open", full, raising=False)
    with pytest.raises(UserError, match="cannot be used as a run folder .No space left"):
        train_ppo.train(stages.config(train_ppo, tmp_path / "run", resume=True, steps=8))
    assert snapshot(tmp_path / "run") == before


# stopping


def test_weights_that_the_last_update_spoilt_are_not_saved(stages, tmp_path, monkeypatch):
    def spoil(opt):
        opt.param_groups[0]["params"][0].data[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    cfg = stages.config(train_sft, tmp_path / "run", steps=1)
    with pytest.raises(RunError, match="not finite; lower --lr"):
        train_sft.train(cfg)
    assert states(tmp_path / "run") == [] and not (tmp_path / "run/model").exists()


@EACH
def test_a_model_lost_at_the_last_step_is_made_by_resume(trainer, stages, tmp_path, monkeypatch, at_step):
    """A full disk while the last step's model/ is written: --resume must not find the run complete."""
    cfg = stages.config(trainer, tmp_path / "run", save_every=0)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot save"):
        at_step(cfg.steps - 1, lambda: patch.setattr(os, "fsync", disk_full))
        trainer.train(cfg)
    trainer.train(stages.config(trainer, tmp_path / "run", save_every=0, resume=True))
    assert hub.load(tmp_path / "run/model")


@pytest.mark.parametrize("trainer", [train_ppo, train_grpo], ids=lambda t: t.__name__)
def test_resume_refuses_another_reference(trainer, stages, tmp_path):
    """Retrained meanwhile, the folder of --ref would move the KL in silence."""
    ref = shutil.copytree(stages.folder / "sft/model", tmp_path / "ref")
    trainer.train(stages.config(trainer, tmp_path / "run", steps=2, ref=str(ref)))
    model, tok = hub.load(ref)
    model.wte.weight.data += 0.01
    hub.save(model, tok, ref)
    with pytest.raises(UserError, match="reference is not the one"):
        trainer.train(stages.config(trainer, tmp_path / "run", steps=4, ref=str(ref), resume=True))


@EACH
def test_resume_on_changed_data_goes_on_only_with_a_flag(trainer, stages, tmp_path, capsys):
    """Steps take rows by their numbers. The same bytes under another name are the same data."""
    data = Path(stages.config(trainer, "").data)
    mine = tmp_path / "mine.jsonl"
    shutil.copy(data, mine)
    trainer.train(stages.config(trainer, tmp_path / "run", steps=2))
    trainer.train(stages.config(trainer, tmp_path / "run", steps=3, data=str(mine), resume=True))
    rows = mine.read_bytes().splitlines(keepends=True)
    mine.write_bytes(b"".join([*rows[1:], rows[0]]))  # the same rows in another order
    before = snapshot(tmp_path / "run")
    more = dict(steps=4, data=str(mine), resume=True)
    then, now = (hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (data, mine))
    changed = f"--data {mine} is not what {tmp_path}/run was trained on (sha256 {then} then, {now} now)"
    with pytest.raises(UserError) as error:
        trainer.train(stages.config(trainer, tmp_path / "run", **more))
    assert str(error.value).startswith(f"--resume: {changed}; put the old file back, or add --new_data")
    assert snapshot(tmp_path / "run") == before, "nothing was touched"
    capsys.readouterr()
    trainer.train(stages.config(trainer, tmp_path / "run", new_data=True, **more))
    assert f"resume: {changed}\n" in capsys.readouterr().out and len(metrics(tmp_path / "run")) == 4
    trainer.train(stages.config(trainer, tmp_path / "run", **more | dict(steps=5)))  # its data from now on
    assert "sha256" not in capsys.readouterr().out


def test_resume_without_the_data_it_had(stages, tmp_path):
    """A run of a file is not resumed on the task's own rows, nor is --new_data a flag of a new run."""
    flags = dict(task="countdown", tokenizer="chars")
    rows = tasks.get("countdown").demonstrations(40, 0)
    data = jsonl(tmp_path / "data.jsonl", rows)
    train_sft.train(stages.config(train_sft, tmp_path / "run", **flags, data=data, steps=2))
    with pytest.raises(UserError, match="^--resume: --data none is not what "):
        train_sft.train(stages.config(train_sft, tmp_path / "run", **flags, data="", demos=40, resume=True))
    with pytest.raises(UserError, match="^--new_data: belongs to --resume$"):
        train_sft.train(stages.config(train_sft, tmp_path / "new", new_data=True))


def test_resume_and_overwrite_together_are_refused(stages, tmp_path):
    train_sft.train(stages.config(train_sft, tmp_path / "run"))
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match="--resume and --overwrite"):
        train_sft.train(stages.config(train_sft, tmp_path / "run", resume=True, overwrite=True))
    assert snapshot(tmp_path / "run") == before


def test_ctrl_c_in_the_last_step_is_not_forgotten(stages, tmp_path, at_step):
    """The demo must not go on to its next stage; the run itself is complete."""
    cfg = stages.config(train_sft, tmp_path / "run")
    at_step(cfg.steps - 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train_sft.train(cfg)
    assert states(tmp_path / "run")[-1] == f"step-{cfg.steps:06d}" and hub.load(tmp_path / "run/model")


def test_ctrl_c_in_the_last_save_is_not_forgotten(stages, tmp_path, monkeypatch):
    def save(model, tok, folder):
        signal.raise_signal(signal.SIGINT)

    cfg = stages.config(train_sft, tmp_path / "run", save_every=0)
    monkeypatch.setattr(hub, "save", save)
    with pytest.raises(Interrupted):
        train_sft.train(cfg)
    assert states(tmp_path / "run") == [f"step-{cfg.steps:06d}"]


def test_checkpoints_are_ordered_by_number(stages, tmp_path):
    """As text, step-1000000 stands before step-999999."""
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=2))
    for step in ("999999", "1000000"):
        shutil.copytree(tmp_path / "run/state/step-000002", tmp_path / f"run/state/step-{step}")
    run = Run(stages.config(train_sft, tmp_path / "run", resume=True), [], [], [])
    assert run._steps() == [2, 999999, 1000000]


def test_handlers_are_put_back_whatever_happens(stages, tmp_path, at_step):
    mine = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        before = [signal.getsignal(s) for s in mine]
        during = []
        undo = at_step(1, lambda: during.extend(signal.getsignal(s) for s in mine))
        train_sft.train(stages.config(train_sft, tmp_path / "a"))
        undo()
        at_step(1, crash)
        with pytest.raises(Crash):
            train_sft.train(stages.config(train_sft, tmp_path / "b"))
        assert [signal.getsignal(s) for s in mine] == before and not set(during) & set(before)
    finally:
        for s, handler in mine.items():
            signal.signal(s, handler)


def test_train_in_a_thread_sets_no_handlers(stages, tmp_path, at_step):
    before, during, results = signal.getsignal(signal.SIGINT), [], []
    at_step(1, lambda: during.append(signal.getsignal(signal.SIGINT)))
    cfg = stages.config(train_sft, tmp_path / "run")
    thread = threading.Thread(target=lambda: results.append(train_sft.train(cfg)))
    thread.start()
    thread.join()
    assert results and during == [before]
    train_sft.train(stages.config(train_sft, tmp_path / "main"))
    same_run(tmp_path / "main", tmp_path / "run")


# what need not be there


def test_without_matplotlib_it_says_so_once(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "pyplot", functools.cache(plots.pyplot.__wrapped__))  # not yet asked for
    for name in "ab":
        train_sft.train(stages.config(train_sft, tmp_path / name))
        assert len(metrics(tmp_path / name)) == 6 and not (tmp_path / name / "curves.png").exists()
    assert capsys.readouterr().out.count("matplotlib is not installed: no curves are drawn") == 1


def test_wandb_gets_every_row(stages, tmp_path, monkeypatch):
    calls, rows, finished = [], [], []

    class FakeRun:
        log = staticmethod(lambda row, step: rows.append((step, row)))
        finish = staticmethod(lambda: finished.append(1))

    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or FakeRun)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = stages.config(train_sft, tmp_path / "run", wandb="project")
    train_sft.train(cfg)
    assert calls == [dict(project="project", name="run", config=dataclasses.asdict(cfg))] and finished == [1]
    for (step, row), line in zip(rows, metrics(tmp_path / "run"), strict=True):
        assert step == int(line["step"]) and row["loss"] == pytest.approx(float(line["loss"]), rel=1e-5)


# the console


def test_console_stays_within_80_columns(tmp_path, capsys):
    """Aligned columns, about twenty lines a run, for numbers of every size."""
    for trainer in TRAINERS:
        cfg = types.SimpleNamespace(out=str(tmp_path), steps=100, wandb="", look_rows=0)
        log = Log(cfg, trainer.COLUMNS, trainer.SHOW, NEW_RUN)
        for step in range(100):
            values = dict.fromkeys(trainer.SHOW, (-1) ** step * 10.0 ** (step % 9 - 4))
            log.row(step, values)
        log.close()
        lines = capsys.readouterr().out.splitlines()
        assert 20 <= len(lines) <= 25 and max(map(len, lines)) <= 80
        assert len({len(line) for line in lines}) == 1 and "-0.000" not in "".join(lines)


@pytest.mark.parametrize("trainer", [train_sft, train_grpo], ids=["sft", "grpo"])
@pytest.mark.parametrize("lr, moves", [(1e-8, False), (1e-2, True)])
def test_weights_kept_in_bfloat16_lose_small_steps(trainer, lr, moves, stages, tmp_path):
    """Those near 0 aside, a bias that starts there: floating-point numbers are dense around it."""
    init, out = f"{stages.folder}/sft/model", tmp_path / "run"
    trainer.train(stages.config(trainer, out, init=init, dtype="bf16_weights", lr=lr, steps=2))
    old, new = (hub.load(folder)[0].parameters() for folder in (init, out / "model"))
    pairs = [(a.bfloat16().float(), b) for a, b in zip(old, new, strict=True)]
    assert all(torch.equal(b, b.bfloat16().float()) for _, b in pairs)
    assert any(((a != b) & (a.abs() > 0.01)).any() for a, b in pairs) == moves


def test_resuming_with_other_columns_is_refused(stages, tmp_path):
    """Rows of another length under the old header would shift every figure by a column."""
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=2))
    path = tmp_path / "run/metrics.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head.replace("loss", "loss,more", 1), *lines]))
    with pytest.raises(UserError, match="metrics.csv has other columns"):
        train_sft.train(stages.config(train_sft, tmp_path / "run", steps=3, resume=True))


def test_a_run_on_other_data_is_not_overwritten_on_advice(stages, tmp_path):
    """A run of a task and one of --data in the same folder: no word of --overwrite."""
    flags = dict(task="chain", data="", max_len=32)
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="holds a run of --data .*; name another folder") as e:
        train_sft.train(stages.config(train_sft, tmp_path / "run", steps=2, demos=100, **flags))
    assert "--overwrite" not in str(e.value)


# the update, in every trainer


@EACH
def test_the_gradient_is_clipped(trainer, stages, tmp_path, monkeypatch):
    """What reaches the optimizer is no longer than --max_grad_norm, policy and critic each on its own."""
    norms, step = [], torch.optim.AdamW.step

    def record(opt, *args):
        for group in opt.param_groups:
            grads = [p.grad.norm() for p in group["params"] if p.grad is not None]
            norms.append(torch.stack(grads).norm().item())
        return step(opt, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    trainer.train(stages.config(trainer, tmp_path / "run", steps=2, max_grad_norm=1e-4))
    assert len(norms) >= 2 and 1e-6 < max(norms) < 1.001e-4
    assert all(float(row["gnorm"]) > 1e-3 for row in metrics(tmp_path / "run"))  # before it was clipped


LINE_TO_A_TENTH = [train_sft, train_rm, train_dpo, train_distill]


@pytest.mark.parametrize("trainer", LINE_TO_A_TENTH, ids=lambda t: t.__name__)
def test_the_learning_rate_of_each_step(trainer, stages, tmp_path, monkeypatch):
    """One step of warm-up out of six, then 15% less with each: in the optimizer, and in the log."""
    rates, step = [], torch.optim.AdamW.step

    def record(opt, *args):
        rates.append({group["lr"] for group in opt.param_groups})
        return step(opt, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    trainer.train(stages.config(trainer, tmp_path / "run"))
    want = [0.01, 0.0085, 0.007, 0.0055, 0.004, 0.0025]
    assert [rate for (rate,) in rates] == pytest.approx(want)
    assert [float(row["lr"]) for row in metrics(tmp_path / "run")] == pytest.approx(want)


def test_a_critic_that_the_last_update_spoilt_is_not_saved(stages, tmp_path, monkeypatch):
    """The policy is whole; the critic, the second of the models, is not."""

    def spoil(opt):
        opt.param_groups[1]["params"][0].data[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(RunError, match="weights of the critic not finite"):
        train_ppo.train(stages.config(train_ppo, tmp_path / "run", steps=1, minibatches=1))
    assert states(tmp_path / "run") == [] and not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("trainer", [train_ppo, train_dpo], ids=lambda t: t.__name__)
def test_resume_refuses_a_reference_that_is_nearly_the_same(trainer, stages, tmp_path):
    """One weight of all moved by a hundredth."""
    ref = shutil.copytree(stages.folder / "sft/model", tmp_path / "ref")
    trainer.train(stages.config(trainer, tmp_path / "run", steps=2, ref=str(ref)))
    model, tok = hub.load(ref)
    model.wte.weight.data[0, 0] += 0.01
    hub.save(model, tok, ref)
    with pytest.raises(UserError, match="reference is not the one"):
        trainer.train(stages.config(trainer, tmp_path / "run", steps=4, ref=str(ref), resume=True))
