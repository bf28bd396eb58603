"""A sign of life in long steps, and only there."""

import pytest
from stages import TRAINERS

import train_grpo
import train_sft
from nanorlhf.run import pulse


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)
def test_slow_steps_are_not_silent(trainer, stages, tmp_path, capsys, monkeypatch, no_curves):
    """Each micro-batch, each sampled token and each step prints a line where the last one is too long ago."""
    monkeypatch.setattr(pulse, "SILENCE", -1.0)
    trainer.train(stages.config(trainer, tmp_path / "slow", steps=2, tokens_per_microbatch=16))
    out = capsys.readouterr().out
    assert "… micro-batch 1 of " in out and "… micro-batch 2 of " in out
    assert "… sampling: token 1 of " in out or trainer.__name__ == "train_rm"
    monkeypatch.undo()
    trainer.train(stages.config(trainer, tmp_path / "quick", steps=2))
    assert "…" not in capsys.readouterr().out


def test_a_sign_every_15_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    pulse.printed()
    for second in range(40):
        now[0] = 100.0 + second
        pulse.sign(f"at {second}")
        if second == 20:
            pulse.printed()  # a line of the log
    pulse.end()
    now[0] = 1000.0
    pulse.sign("without a run")
    assert capsys.readouterr().out.split("\n") == ["  … at 16", "  … at 36", ""]


def test_every_slow_step_has_its_line(stages, tmp_path, capsys, monkeypatch, no_curves):
    """Of 60 quick steps every third has one."""
    lines = []
    for silence in (15.0, -1.0):
        monkeypatch.setattr(pulse, "SILENCE", silence)
        cfg = stages.config(train_sft, tmp_path / f"run{silence}", steps=60, save_every=0, eval_every=0)
        train_sft.train(cfg)
        out = capsys.readouterr().out
        lines.append(sum(line.split()[:1] == [str(step)] for step in range(60) for line in out.splitlines()))
    assert lines == [21, 60]


def test_sft_measures_before_its_first_step(stages, tmp_path, capsys, no_curves):
    """The held-out loss of --init; a resumed run has measured it."""
    flags = stages.flags(train_sft, tmp_path / "run", steps=2, lr=1e-12, init=f"{stages.folder}/sft/model")
    last = train_sft.train(train_sft.Config(**flags))
    says = f"held-out loss before the first step: {last['eval/loss']:.3f} ("
    assert says in capsys.readouterr().out
    train_sft.train(train_sft.Config(**flags | dict(steps=3, resume=True)))
    assert "before the first step" not in capsys.readouterr().out
    assert train_grpo.Config().held_out == 256
