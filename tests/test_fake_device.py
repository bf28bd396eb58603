"""The pretended GPU refuses what a GPU refuses; every program runs on it from start to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_device import OnDevice, pretended
from runs import metrics
from stages import TRAINERS

import evaluate
import sample
import train_dpo
import train_grpo
import train_sft
from bench import contact
from nanorlhf.run import cli, device

FAST = train_sft, train_grpo
ROOT = Path(__file__).parents[1]
MORE = {  # flags with which a trainer takes its longest way
    train_dpo: dict(online=2, online_ref="round", pairs=16, judge="self"),
    train_grpo: dict(off_policy_steps=0),
}


@pytest.fixture
def on_gpu(no_curves):
    """on_gpu(program, flags) → what it returns on the pretended GPU, its kernels in plain torch."""

    def run(program, cfg):
        with pretended("cuda", triton=False):
            return program(cfg)

    return run


def refused(match, function):
    with pytest.raises(RuntimeError, match=match):
        function()


def test_two_places_and_wrong_dtypes_are_refused():
    with pretended("cuda"):
        x = torch.ones(2, 2, device="cuda")
        on_cpu = torch.ones(2, 2)
        refused("same device", lambda: x + on_cpu)
        refused("same device", lambda: x @ on_cpu)
        assert (x * torch.tensor(3.0)).sum() == 12  # a number may stay on the CPU
        assert x[torch.tensor([0])].is_cuda  # and so may indices
        refused("not implemented", lambda: x.long() @ x.long())
        refused("out_dtype", lambda: torch.mm(x, x, out_dtype=torch.float32))
        half = x.bfloat16()
        assert torch.mm(half, half, out_dtype=torch.float32).dtype == torch.float32
        assert x.double().dtype == torch.float64  # a Mac alone has none


def test_what_moves_and_what_stays():
    with pretended("cuda"):
        model = torch.nn.Linear(2, 1).to("cuda")
        y = model(torch.ones(3, 2, device="cuda").bfloat16().float()).sum()
        y.backward()
        assert all(t.is_cuda for t in (y, model.weight, model.weight.grad, torch.zeros_like(y)))
        frozen = torch.nn.Linear(2, 1).to("cuda")
        frozen.weight.data = frozen.weight.data.bfloat16()
        assert frozen.weight.content.dtype == torch.bfloat16
        assert type(torch.nn.Linear(2, 1).to("cuda").to("cpu").weight.data) is torch.Tensor
        assert isinstance(torch.tensor([1.0], device="cuda"), OnDevice)


def test_a_graph_is_recorded_and_replayed():
    with pretended("cuda"):
        x = torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
            x += y
        assert x.tolist() == [0, 0, 0]  # recorded, not run
        graph.replay()
        graph.replay()
        assert x.tolist() == [3, 3, 3] and y.tolist() == [2, 2, 2]  # 0 → 1 → 3; the same memory again
        x = torch.zeros(3, device="cuda")
        graph.replay()  # reads the old memory
        assert x.tolist() == [0, 0, 0] and y.tolist() == [4, 4, 4]


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: x.__setitem__(x > 0, 1.0), lambda x: bool(x.any()),
    lambda x: torch.tensor([1.0], device="cuda"), lambda x: torch.cuda.synchronize(),
])  # fmt: skip
def test_nobody_waits_inside_a_capture(wait):
    with pretended("cuda"):
        x = torch.ones(3, device="cuda")
        wait(x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused("capture", lambda: wait(x))


def figures(out):
    return [{name: float(value) for name, value in row.items() if value} for row in metrics(out)]


@pytest.mark.parametrize("trainer", [
    train_sft, train_grpo, *(pytest.param(t, marks=pytest.mark.slow) for t in TRAINERS if t not in FAST)
], ids=lambda t: t.__name__)  # fmt: skip
def test_every_trainer_runs_on_a_gpu(trainer, on_gpu, stages, tmp_path):
    """Sampling by graphs, fused AdamW; and the figures are those of the CPU, up to the order of sums."""
    flags = dict(steps=2, save_every=0) | MORE.get(trainer, {})
    on_gpu(trainer.train, stages.config(trainer, tmp_path / "gpu", device="auto", **flags))
    trainer.train(stages.config(trainer, tmp_path / "cpu", **flags))
    for gpu, cpu in zip(figures(tmp_path / "gpu"), figures(tmp_path / "cpu"), strict=True):
        assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "bf16_weights"])
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)
def test_every_trainer_runs_on_a_gpu_in_bf16(trainer, dtype, on_gpu, stages, tmp_path):
    flags = dict(steps=2, save_every=0, save_memory=dtype == "bfloat16") | MORE.get(trainer, {})
    last = on_gpu(trainer.train, stages.config(trainer, tmp_path, device="auto", dtype=dtype, **flags))
    assert all(value == value for value in last.values() if isinstance(value, float))


def test_evaluate_and_sample_run_on_a_gpu(on_gpu, stages):
    model, rm = f"{stages.folder}/sft/model", f"{stages.folder}/rm/model"
    flags = dict(model=model, ref=model, rm=rm, pairs=f"{stages.folder}/train_rm.jsonl", n=4, k=[1, 4])
    cfg = evaluate.Config(**flags, data=f"{stages.folder}/train_ppo.jsonl", max_new_tokens=5)
    assert on_gpu(evaluate.evaluate, cfg) == pytest.approx(evaluate.evaluate(cfg), rel=1e-3, abs=1e-4)
    cfg = sample.Config(model=model, prompt="abc=", max_new_tokens=5)
    ((ids, logp),) = on_gpu(sample.main, cfg)
    ((want_ids, want_logp),) = sample.main(cfg)
    assert ids == want_ids and logp == pytest.approx(want_logp, rel=1e-4)


def test_what_a_gpu_gets_by_default(on_gpu, capsys):
    """Larger micro-batches and a hint of bf16; what was asked for stays, and a CPU notices nothing."""
    of_a_cpu = train_sft.Config.tokens_per_microbatch
    for flags, tokens, hint in ((dict(), device.ON_GPU, True), (dict(tokens_per_microbatch=77), 77, True),
                                (dict(dtype="bfloat16"), device.ON_GPU, False),
                                (dict(device="cpu"), of_a_cpu, False),
                                (f"--tokens_per_microbatch={of_a_cpu}", of_a_cpu, True)):  # fmt: skip
        typed = isinstance(flags, str)  # what was typed stays, though it be a CPU's default
        cfg = cli.parse(train_sft.Config, [flags]) if typed else train_sft.Config(**flags)
        on_gpu(device.setup, cfg)
        assert cfg.tokens_per_microbatch == tokens
        assert ("--dtype bfloat16" in capsys.readouterr().out) == hint


# ------------------------------------------------------------------------------------------------------------
# python -m bench contact


def test_contact_keeps_within_ten_minutes_and_goes_on(tmp_path, monkeypatch, capsys):
    """A step that is done is not repeated; one that fails is, and leaves one row."""
    ran = []

    def run_step(step, limit, fake, folder, results):
        contact.drop(results, step)
        ran.append(step)
        ok = step != "tokens" or ran.count("tokens") > 1
        contact.write(results, step=step, row="finished" if ok else "ended with status 1", ok=ok)

    monkeypatch.setattr(contact, "run_step", run_step)
    assert not contact.run(folder=tmp_path)
    assert contact.run(folder=tmp_path)
    assert ran == [*contact.LIMITS, "tokens"]
    assert len(contact.read(tmp_path / "results.jsonl")) == 1 + len(contact.LIMITS)  # one names the machine
    assert contact.run(folder=tmp_path) and len(ran) == len(contact.LIMITS) + 1
    with monkeypatch.context() as m:
        m.setattr(contact.table, "origin", lambda: "another commit")
        assert not contact.run(only="tokens", folder=tmp_path) or ran.pop() == "tokens"
        assert {row["step"] for row in contact.read(tmp_path / "results.jsonl")} == {"machine", "tokens"}
    monkeypatch.setattr(contact, "TOTAL", 5)
    contact.run(folder=tmp_path, overwrite=True)
    assert len(ran) == len(contact.LIMITS) + 1 and "no time left" in capsys.readouterr().out
    assert sum(contact.LIMITS.values()) - contact.LIMITS["timings"] < 500 < 600  # which takes what is left


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's interpreter comes for Linux")
def test_contact_runs_on_the_pretended_gpu(tmp_path):
    command = [sys.executable, "-m", "bench", "contact", "--fake", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, [row for row in rows if row["ok"] is False]
    assert [row["step"] for row in rows if row["row"] == "finished"] == list(contact.LIMITS)
    assert not any("not measured" in row["row"] for row in rows) and len(rows) > 60
