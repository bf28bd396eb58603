"""Faults of saving and resuming. Docstrings are rows of docs/reliability.md."""

import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import EACH, crash, equal, metrics, same_run, snapshot, state, states, to_argv
from stages import LOSS

import evaluate
import sample
import train_distill
import train_grpo
import train_ppo
import train_sft
from nanorlhf import hub
from nanorlhf.errors import UserError
from nanorlhf.hub import files, weights
from nanorlhf.run import replay
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import _flags_to_lower
from nanorlhf.run.folders import describe

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these signals nor limits")


# row 1 is in test_kills.py


def test_row_02_kill_inside_the_checkpoint_write(run, stages, tmp_path, monkeypatch):
    """S | killed inside a checkpoint's write | the half-written folder is removed, the one before is used"""
    assert run(train_sft, "whole").status == 0
    real = torch.save

    def cut_short(state, f):
        real(state, f)
        if state["step"] == 4:
            f.truncate(1000)
            crash()

    with monkeypatch.context() as patch, pytest.raises(BaseException, match="^$"):
        patch.setattr(torch, "save", cut_short)
        run(train_sft)
    assert states(tmp_path / "run") == ["step-000002", "step-000004.tmp"]
    done = run(train_sft, resume="true", steps=2)  # nothing is left to do
    assert "step-000004 was never completed; removed" in done.out
    assert states(tmp_path / "run") == ["step-000002"]
    assert "from step 2" in run(train_sft, resume="true").out
    same_run(tmp_path / "whole", tmp_path / "run")
    assert states(tmp_path / "run") == ["step-000004", "step-000006"]


HANGS = """
import sys, time, torch, train_sft
torch.save = lambda *args: (print("x", flush=True), time.sleep(3600))
sys.argv[0] = "train_sft.py"
sys.exit(train_sft.main())
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("first, more", [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_row_03_signals(first, more, stages, tmp_path):
    """S | Ctrl-C, SIGTERM, or SIGHUP of a terminal that is closed | the step is finished and saved, status
    130, 143 or 129; a second one ends it at once"""
    flags = stages.flags(train_sft, tmp_path / "run", steps=10**6, save_every=0)
    argv = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{k}={v}" for k, v in flags.items())]
    if more:  # the second one comes while the first one's checkpoint hangs
        argv[1:2] = ["-c", HANGS]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.csv"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    process.send_signal(first)
    if more:
        while "x\n" not in process.stdout.readline():
            pass
        process.send_signal(first)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + first
    ends = "interrupted at once; checkpoints saved before are kept" if more else \
        "interrupted; the checkpoint is saved, --resume goes on from it"  # fmt: skip
    assert err == f"train_sft.py: {ends}\n"
    done = len(metrics(tmp_path / "run"))
    if not more:
        assert states(tmp_path / "run") == [f"step-{done:06d}"] and hub.load(tmp_path / "run/model")
        train_sft.train(stages.config(train_sft, tmp_path / "run", resume=True, steps=done + 1, save_every=0))
        assert [int(row["step"]) for row in metrics(tmp_path / "run")] == list(range(done + 1))


@posix
@EACH
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_to_each_trainer(trainer, signum, run, tmp_path, at_step, request):
    """Row 3, in this process: resumed it ends bit-equal to the uninterrupted run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the run would ignore it, as it should
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    run(trainer, "whole")
    at_step(2, lambda: os.kill(os.getpid(), signum))
    done = run(trainer)
    assert done.status == 128 + signum and "interrupted; the checkpoint is saved" in done.err[0]
    assert len(done.err) == 1 and states(tmp_path / "run")[-1] == "step-000003"
    assert run(trainer, resume="true").status == 0
    same_run(tmp_path / "whole", tmp_path / "run")


@posix
@EACH
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_row_04_disk_full_while_saving(trainer, share, run, tmp_path, at_step):
    """X | disk full (RLIMIT_FSIZE) while saving | path and bytes are named, nothing half-written stays, the
    older checkpoint goes on to the same end"""
    run(trainer, "whole")
    size = (tmp_path / "whole/state/step-000006/state.pt").stat().st_size
    model = (tmp_path / "whole/model/model.safetensors").stat().st_size
    limit = int(share * (model if share < 0.5 else size))  # in the model folder, or behind it in the state
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    undo = at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1])))
    try:
        done = run(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    undo()
    where = "run/state/step-000004" if share > 0.5 else "run/"
    assert done.stopped("cannot save", where, "File too large")
    assert re.search(r"\([\d,]{5,} bytes are free\)", done.err[0])
    assert not list((tmp_path / "run").rglob("*.tmp")) and hub.load(tmp_path / "run/model")
    assert states(tmp_path / "run") == ["step-000002"]
    assert run(trainer, resume="true").status == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_row_05_disk_full_on_the_log(run, tmp_path, monkeypatch):
    """S | disk full on metrics.csv | said once, training goes on"""
    from nanorlhf.run import log

    run(train_ppo, "whole")

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def no_room(path, mode="r", **kw):
        return Full(path, mode) if mode == "ab" else open(path, mode, **kw)

    monkeypatch.setattr(log, "open", no_room, raising=False)
    done = run(train_ppo)
    assert done.status == 0 and done.out.count("warning: cannot write") == 1
    assert metrics(tmp_path / "run") == []
    assert snapshot(tmp_path / "run/model") == snapshot(tmp_path / "whole/model")


@EACH
def test_row_06_out_that_cannot_be_used(trainer, run, tmp_path):
    """R | --out is a file, lies in a read-only folder, cannot be made, or holds a run | named, nothing is
    touched; --resume or --overwrite"""
    (tmp_path / "file").write_text("mine")
    assert run(trainer, "file").refused("--out", "file", "cannot be used as a run folder")
    assert run(trainer, "file/below").refused("--out", "cannot be used as a run folder")
    assert (tmp_path / "file").read_text() == "mine"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK) and sys.platform == "linux":
        locked = Path("/sys")  # read-only for root, too
    for out in (locked, locked / "run"):
        assert run(trainer, out).refused("--out", out, "cannot be used as a run folder")
    run(trainer)
    before = snapshot(tmp_path / "run")
    assert run(trainer, seed=1).refused("holds a run: add --resume to go on with it, --overwrite to")
    assert snapshot(tmp_path / "run") == before


def damage(path, rng):
    """One bit flipped, the end cut off, or emptied."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "empty"])
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data if how == "flip" else data[: rng.randrange(len(data)) if how == "cut" else 0])


def test_row_07_damaged_checkpoint(run, tmp_path, capsys):
    """S | a file of a checkpoint truncated, emptied, or one bit flipped, 100 times at random | skipped by
    name ("checksum"), and the next older one is used; refused if all are damaged"""
    run(train_sft, "whole")
    rng = random.Random(0)
    files = ["state.pt"] * 3 + ["manifest.json"]
    for case in range(100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        name = rng.choice(files)
        damage(tmp_path / "run/state/step-000006" / name, rng)
        if case % 10 == 0:
            done = run(train_sft, resume="true")
            assert done.status == 0 and "from step 4" in done.out
            out = done.out
            same_run(tmp_path / "whole", tmp_path / "run")
        else:  # the same decision, without training
            flags = json.loads((tmp_path / "run/config.json").read_text())
            flags |= {"resume": True, "out": f"{tmp_path}/run"}
            cfg = train_sft.Config(**flags)
            with Run(cfg, train_sft.COLUMNS, [], []) as opened:
                model, _ = hub.load(tmp_path / "run/model")
                matrices = [[p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False)]
                step, _ = opened.start({"model": model}, torch.optim.AdamW([{"params": m} for m in matrices]))
            assert step == 4
            out = capsys.readouterr().out
        assert re.search("warning: .* skipped as damaged: .*step-000006/.*checksum", out), (case, name)
    weights = tmp_path / "whole/model/model.safetensors"
    data, want = weights.read_bytes(), hub.load(tmp_path / "whole/model")[0].state_dict()
    for case in range(50):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        weights.write_bytes(flipped)
        try:  # a flip in what the header says of checksums themselves leaves the weights as they were
            assert equal(dict(hub.load(tmp_path / "whole/model")[0].state_dict()), dict(want)), case
        except UserError as e:
            assert "model.safetensors" in str(e)


def test_row_08_newest_checkpoint_incomplete(run, tmp_path):
    """S | the newest checkpoint was never completed | removed, and the next older one is used"""
    run(train_sft, "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = tmp_path / "run/state/step-000006"
    (newest / "manifest.json").unlink()
    newest.rename(f"{newest}.tmp")
    ours = ["config.json.tmp", "look.html.tmp", "bad-step-3.pt.tmp"]
    ours += [".pairs-round-1.jsonl.77.tmp", ".pairs.jsonl.8.tmp"]
    foreign = ["notes.tmp", ".notes.77.tmp", "pairs.tmp"]
    for name in ours + foreign:
        (tmp_path / "run" / name).write_text("{")
    done = run(train_sft, resume="true")
    assert done.status == 0 and "step-000006 was never completed; removed" in done.out
    assert "from step 4" in done.out
    assert sorted(path.name for path in (tmp_path / "run").glob("*.tmp")) == sorted(foreign)
    same_run(tmp_path / "whole", tmp_path / "run")


def change_state(out, change):
    """Change the newest checkpoint of a run and its list of checksums, as its own program would have."""
    folder = out / "state" / states(out)[-1]
    saved = change(torch.load(folder / "state.pt", weights_only=True))
    torch.save(saved, folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps({"files": describe(folder)}))


def without_moments(saved):
    saved["optimizer"]["state"][0].pop("exp_avg")
    return saved


def with_moments_of_another_shape(saved):
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    return saved


FOREIGN = {
    "a step of −3": lambda saved: saved | {"step": -3},
    "a step of 1e9": lambda saved: saved | {"step": 10**9},
    "a step that is no number": lambda saved: saved | {"step": "6"},
    "no optimizer": lambda saved: {k: v for k, v in saved.items() if k != "optimizer"},
    "no models": lambda saved: {k: v for k, v in saved.items() if k != "models"},
    "models in a list": lambda saved: saved | {"models": []},
    "a list": lambda saved: [saved],
    "a tensor": lambda saved: torch.zeros(3),
    "no step": lambda saved: {k: v for k, v in saved.items() if k != "step"},
    "another optimizer": lambda saved: saved | {"optimizer": {"state": {0: {"momentum": torch.zeros(3)}}}},
    "moments of other weights": lambda saved: saved | {"optimizer": {"state": {99: {}}}},
    "moments missing": without_moments,
    "moments of another shape": with_moments_of_another_shape,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_row_47_checkpoint_of_another_program(kind, run, tmp_path):
    """R | a checkpoint of another version or program, or of a step that is not its folder's | one line that
    names the file; nothing is trained"""
    run(train_sft)
    before = metrics(tmp_path / "run")
    change_state(tmp_path / "run", FOREIGN[kind])
    assert run(train_sft, resume="true", steps=8).refused("--resume", "state.pt", "--overwrite starts anew")
    assert metrics(tmp_path / "run") == before


def test_resume_beyond_steps(run, tmp_path):
    """With --steps below the checkpoint's step there is nothing to do, which nobody means."""
    run(train_sft)
    assert run(train_sft, resume="true", steps=3).refused("at step 6, beyond --steps 3")


@posix
@pytest.mark.parametrize("name", [
    "config.json.tmp", "metrics.csv", "samples.jsonl", "tokens.jsonl.gz", "curves.png", "model.tmp",
    "state/step-000002.tmp",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_row_48_links_in_a_run_folder(kind, name, run, tmp_path):
    """R | a link or a pipe in the run folder, where the run writes | refused by name; the file that the link
    points to stays as it is"""
    foreign = tmp_path / "foreign"
    foreign.write_text("precious")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(foreign)
    else:
        os.mkfifo(path)
    for flags in ({}, {"overwrite": "true"}, {"resume": "true"}):
        assert run(train_sft, **flags).refused("--out", path)
    assert foreign.read_text() == "precious"


@pytest.mark.parametrize("flags, says", [
    (dict(d_model=64), "size mismatch for wte.weight: copying a param with shape torch.Size([9, 32])"),
    (dict(n_layer=2), 'Missing key(s) in state_dict: "blocks.1.'),
    (dict(tokenizer="bytes"), "from checkpoint, the shape in current model is torch.Size([258, 32])"),
])  # fmt: skip
def test_row_09_resume_with_another_model(flags, says, run, tmp_path):
    """R | --resume with another shape, vocabulary or algorithm | the flags and tensors that differ are
    listed"""
    run(train_sft)
    before = snapshot(tmp_path / "run")
    (name, value), = flags.items()
    assert run(train_sft, resume="true", **flags).refused(says, f"--{name} was", f"is now {value}")
    assert run(train_grpo, resume="true").refused("is a run of train_sft.py")
    assert snapshot(tmp_path / "run") == before


@EACH
def test_row_10_resume_with_another_learning_rate(trainer, run, tmp_path, spy):
    """S | --resume with another learning rate, batch size, weight decay, beta, number of steps | printed, and
    used"""
    more = {train_ppo: dict(beta=0.7, critic_lr=1e-9), train_grpo: {}, train_distill: {}}
    more = more.get(trainer, dict(weight_decay=0.5))
    batch, was = "batch_size", 8
    if trainer in (train_ppo, train_grpo, train_distill):
        batch, was = "prompts_per_step", 4 if trainer is train_grpo else 8
    more[batch] = was + 2
    drawn = spy(trainer, "epoch_batches")
    run(trainer, steps=2)
    done = run(trainer, steps=4, lr=1e-9, resume="true", **more)
    assert "--lr was 0.01, is now 1e-09" in done.out and "--steps was 2, is now 4" in done.out
    assert f"--{batch} was {was}, is now {was + 2}" in done.out
    assert [len(rows) for _, rows in (drawn[0], drawn[-1])] == [was, was + 2]
    last = metrics(tmp_path / "run")[-1]
    assert float(last["lr"]) <= 1e-9 and float(last.get("beta", 0.7)) == 0.7
    groups = state(tmp_path / "run", "step-000004")["optimizer"]["param_groups"]
    if trainer is train_ppo:
        assert groups[1]["peak"] == 1e-9
    elif trainer not in (train_grpo, train_distill):
        assert groups[0]["weight_decay"] == 0.5


def finite_gradient(file):
    """Replay the step in a bad-step file: are the gradients finite now?"""
    trainer, models, batch, cfg = replay.load(file)
    trainer.gradient(*models, batch, cfg)
    grads = [p.grad for model in models for p in model.parameters() if p.grad is not None]
    assert grads
    return all(grad.isfinite().all() for grad in grads)


@EACH
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_row_32_loss_that_is_not_finite(trainer, where, value, run, tmp_path, monkeypatch):
    """X | NaN or infinity in the loss, or in the gradient alone | before the update, weights and Adam's
    moments as saved before; the batch goes to bad-step-N.pt, which nanorlhf.run.replay reproduces"""
    loss, models, optimizers, start = getattr(trainer, LOSS[trainer]), {}, [], Run.start

    def spoilt(*args, **kw):
        out = loss(*args, **kw)
        if not (tmp_path / "run/state/step-000002").exists():  # not yet step 2
            return out
        if where == "loss":
            return (out[0] * value, *out[1:]) if isinstance(out, tuple) else out * value
        x = out[0] if isinstance(out, tuple) else out
        if x.requires_grad:
            x.register_hook(lambda grad: grad * value)
        return out

    monkeypatch.setattr(trainer, LOSS[trainer], spoilt)
    def spy(run, m, optimizer, *args, **kw):
        models.update(m)
        optimizers.append(optimizer)
        return start(run, m, optimizer, *args, **kw)

    monkeypatch.setattr(Run, "start", spy)
    done = run(trainer, save_every=1)
    assert done.stopped("this update was not made", "metrics.csv", "--lr", "bad-step-2.pt holds the batch")
    found = re.search(r"stopped: step 2: loss (\S+), gradient norm (\S+) ", done.err[0])
    assert math.isfinite(float(found[1])) if where == "gradient" else found[1].lstrip("-") == f"{value:g}"
    assert not math.isfinite(float(found[2]))
    saved = state(tmp_path / "run", "step-000002")
    assert all(equal(dict(models[name].state_dict()), saved["models"][name]) for name in models)
    moments = optimizers[0].state_dict()["state"]
    assert moments and equal(moments, saved["optimizer"]["state"])
    assert len(metrics(tmp_path / "run")) == 2 and hub.load(tmp_path / "run/model")
    file = f"{tmp_path}/run/bad-step-2.pt"
    assert not finite_gradient(file)
    monkeypatch.setattr(trainer, LOSS[trainer], loss)  # the bug mended
    assert finite_gradient(file)
    _, models, batch, cfg = replay.load(file)
    with torch.autograd.detect_anomaly(check_nan=True):  # the recipe of the page runs
        trainer.gradient(*models, batch, cfg)


@pytest.mark.parametrize("trainer, then", [
    (train_grpo, "--prompts_per_step (now 4)"), (train_sft, "--batch_size (now 8)")],
    ids=["train_grpo", "train_sft"])  # fmt: skip
def test_row_37_out_of_memory(trainer, then, run, tmp_path, at_step):
    """X | out of memory in a step | sizes, and the flags to lower; the checkpoint is kept"""
    budget = trainer.Config.tokens_per_microbatch
    allocate = lambda: torch.empty(1 << 60)  # noqa: E731
    for error, words in ((allocate, ["4611686018427387904 bytes"]), (None, ["3 MiB"])):
        undo = at_step(3, error or (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("3 MiB\nmore"))))
        done = run(trainer, overwrite="true")
        undo()
        lower = f"lower --tokens_per_microbatch (now {budget}), then {then}"
        assert done.stopped("out of memory", lower, *words)
        assert states(tmp_path / "run") == ["step-000002"]
    assert run(trainer, resume="true").status == 0


def test_out_of_memory_by_place(run, stages, tmp_path, monkeypatch):
    """Row 37: where data or a model is read, no flag of the step helps; each program has its own flags."""

    def no_memory(*args, **kw):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(files, "_load", no_memory)
        done = run(train_sft)
    assert done.stopped("--data: ", "train_sft.jsonl: out of memory", "take a smaller file")
    assert "--batch_size" not in done.err[0]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "fill", no_memory)
        done = run(train_grpo)
    assert done.stopped("--init ", "sft/model: out of memory", "take a smaller model")
    assert "--prompts_per_step" not in done.err[0]
    cfg = evaluate.Config(model="x", n=3, k=[1], prompts=5, task="chain")
    assert _flags_to_lower(cfg) == "lower --max_new_tokens (now 11), then --n (now 3), then --prompts (now 5)"
    assert _flags_to_lower(sample.Config()) == "take a smaller model, or a shorter prompt"
    assert _flags_to_lower(sample.Config(max_new_tokens=9)) == "lower --max_new_tokens (now 9)"


@EACH
def test_row_38_same_seed_same_run(trainer, run, tmp_path):
    """S | one seed twice; one micro-batch or many; resumed or not | bit-equal; first step within 1e-5;
    bit-equal"""
    how = dict(lr=1e-4, tokens_per_microbatch=0)
    for name, more in (("a", {}), ("b", {}), ("cut", dict(tokens_per_microbatch=1))):
        assert run(trainer, name, **how | more).status == 0
    same_run(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/state/step-000006")
    assert run(trainer, "b", **how, resume="true").status == 0
    same_run(tmp_path / "a", tmp_path / "b")
    whole, cut = (metrics(tmp_path / name)[0] for name in ("a", "cut"))  # later Adam divides noise by noise
    for key in filter(whole.get, whole):
        assert float(cut[key]) == pytest.approx(float(whole[key]), rel=1e-5, abs=1e-6), key


@posix
@pytest.mark.slow
def test_row_39_two_processes_on_one_folder(run, stages, tmp_path, at_step):
    """R | a second trainer on the same --out, even with --overwrite | refused; the first one goes on
    untouched; a dead one's lock is free"""
    run(train_sft, "alone")
    flags = stages.flags(train_sft, tmp_path / "run", overwrite="true")

    def second():
        before = snapshot(tmp_path / "run")
        argv = [sys.executable, str(ROOT / "train_sft.py"), *to_argv(flags)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert snapshot(tmp_path / "run") == before
        seen.append((done.returncode, done.stderr.splitlines()))

    seen = []
    at_step(3, second)
    assert run(train_sft).status == 0
    (status, lines), = seen
    assert status == 2 and len(lines) == 1, seen
    assert "in use by another process" in lines[0]
    same_run(tmp_path / "alone", tmp_path / "run")
    assert run(train_sft, resume="true", steps=8).status == 0
