"""Other people's machines: a Mac, whose GPU has no float64; a GPU that is busy; another torch."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import session
import torch
from fake_device import OnDevice, pretended
from runs import EACH, metrics
from stages import TRAINERS, jsonl

import evaluate
import sample
import train_dpo
import train_grpo
import train_ppo
import train_prm
from nanorlhf import hub
from nanorlhf.exact import Tree
from nanorlhf.metrics import Figures, mean_se

ROOT = Path(__file__).parents[1]
MORE = {  # flags with which a trainer takes its longest way
    train_dpo: dict(online=2, online_ref="round", pairs=16, judge="self"),
    train_grpo: dict(kl="k3", beta=0.1, off_policy_steps=0),
}


def test_the_pretended_mac_refuses_float64_on_its_gpu_alone():
    with pretended("mps"):
        layer = torch.nn.Linear(2, 1).to("mps")
        x = torch.ones(3, 2, device="mps")
        y = layer(x).sum()
        y.backward()
        assert {t.device.type for t in (x, y, *layer.parameters(), layer.weight.grad)} == {"mps"}
        for refused in (lambda: x.double(), lambda: x.sum(dtype=torch.float64), lambda: x.to(torch.float64),
                        lambda: torch.zeros(1, dtype=torch.float64, device="mps")):  # fmt: skip
            with pytest.raises(TypeError, match="float64"):
                refused()
        assert x.cpu().double().sum() == 6 and type(x.to("cpu")) is torch.Tensor
        assert isinstance(torch.ones(1).to("mps"), OnDevice)
        assert layer.weight.grad.tolist() == [[3.0, 3.0]]


@pytest.fixture
def on_mac(stages, tmp_path, no_curves):
    """on_mac(program, flags) → what it returns on the pretended Mac, by --device auto."""

    def run(program, cfg):
        assert cfg.device == "auto"
        with pretended("mps"):
            return program(cfg)

    return run


def figures(out):
    """Each row of metrics.csv as numbers, without its empty columns."""
    return [{name: float(value) for name, value in row.items() if value} for row in metrics(out)]


@pytest.mark.parametrize("trainer", [*TRAINERS, train_prm], ids=lambda t: t.__name__)
def test_every_trainer_runs_on_a_mac(trainer, on_mac, stages, tmp_path, spy):
    """And its figures are those of the CPU, up to the order of sums."""
    flags = dict(device="auto", steps=3) | MORE.get(trainer, {})
    if trainer is train_prm:
        steps = dict(response="bcadbb", labels=[1, None, 0, 1, 0])
        rows = [dict(prompt=f"{letter}b=", **steps) for letter in "abcdef"]
        flags |= dict(step_end="bd", data=jsonl(tmp_path / "steps.jsonl", rows))
    devices = spy(trainer, "setup")
    on_mac(trainer.train, stages.config(trainer, tmp_path / "mac", **flags))
    trainer.train(stages.config(trainer, tmp_path / "cpu", **flags))
    assert [device.type for _, device in devices] == ["mps", "cpu"]
    for mac, cpu in zip(figures(tmp_path / "mac"), figures(tmp_path / "cpu"), strict=True):
        assert mac == pytest.approx(cpu, rel=1e-3, abs=1e-5)


def test_a_run_goes_on_on_a_mac(on_mac, stages, tmp_path):
    """Also one that the CPU began: the reference is known by a sum that does not depend on the device."""
    train_ppo.train(stages.config(train_ppo, tmp_path / "run", steps=2))
    flags = dict(device="auto", resume=True)
    for steps in (3, 4):
        on_mac(train_ppo.train, stages.config(train_ppo, tmp_path / "run", steps=steps, **flags))
    assert len(figures(tmp_path / "run")) == 4


def test_evaluate_and_sample_run_on_a_mac(on_mac, stages):
    """With everything that evaluate can measure: rewards, win rate, KL, accuracy on pairs."""
    model, rm = f"{stages.folder}/sft/model", f"{stages.folder}/rm/model"
    flags = dict(model=model, ref=model, rm=rm, pairs=f"{stages.folder}/train_rm.jsonl", n=4, k=[1, 4])
    cfg = evaluate.Config(**flags, data=f"{stages.folder}/train_ppo.jsonl", max_new_tokens=5)
    found = on_mac(evaluate.evaluate, cfg)
    assert found.keys() >= {"reward", "win", "kl", "rm_acc", "implicit_acc"}
    assert found == pytest.approx(evaluate.evaluate(cfg), rel=1e-3, abs=1e-4)
    cfg = sample.Config(model=model, prompt="abc=", max_new_tokens=5)
    ((ids, logp),) = on_mac(sample.main, cfg)
    ((want_ids, want_logp),) = sample.main(cfg)
    assert ids == want_ids and logp == pytest.approx(want_logp, rel=1e-4)


@torch.no_grad()
def test_the_oracle_reads_a_model_on_a_mac(stages):
    model, tok = hub.load(f"{stages.folder}/sft/model")
    tree = Tree(tok.vocab_size, 2, tok.eos_id)
    want = tree.table(model, [1, 2])
    with pretended("mps"):
        got = tree.table(model.to("mps"), [1, 2])
    assert got.dtype == torch.float64 and torch.allclose(got, want, atol=1e-6)


def test_means_are_float64_wherever_the_numbers_are():
    """A mean of thirds has 53 bits, and not the 24 of fp32."""
    x = torch.tensor([0.1, 0.2, 0.4])
    with pretended("mps"):
        on_gpu = mean_se(x.to("mps"))
    mean = sum(x.tolist()) / 3
    variance = sum((value - mean) ** 2 for value in x.tolist()) / 2
    assert on_gpu == mean_se(x) == pytest.approx((mean, (variance / 3) ** 0.5), rel=1e-14)


def test_wins_are_exact():
    score = torch.tensor([0.0, 1.0, 2.0])
    assert evaluate.wins(score, torch.ones(3)).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.skipif(session.TEST_GPU, reason="NANORLHF_TEST_GPU=1")
def test_no_test_sees_a_gpu():
    """Nor a process that a test starts: CUDA reads this variable."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
    assert not torch.cuda.is_available() and not torch.backends.mps.is_available()


def test_with_a_gpu_only_the_tests_marked_gpu_run(monkeypatch):
    def item(*marks):
        return SimpleNamespace(get_closest_marker=lambda name: name if name in marks else None)

    def collected():
        items, dropped = [*everyone], []
        hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
        session.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        return items, dropped

    everyone = item("gpu"), item(), item("slow", "gpu"), item("slow")
    monkeypatch.setattr(session, "TEST_GPU", False)
    assert collected() == ([*everyone], [])
    monkeypatch.setattr(session, "TEST_GPU", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert collected() == ([everyone[0], everyone[2]], [everyone[1], everyone[3]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="sees no GPU"):
        collected()


def test_progress_is_told_by_time_and_not_by_tests(monkeypatch):
    """Of test_dist.py's 50 s each of 50 tests has one; the two others have 3 s together: 53 s in all."""
    monkeypatch.setattr(session, "SECONDS", {"test_dist.py": 50})
    monkeypatch.setattr(session, "OTHERS", 3)
    dist = [f"tests/test_dist.py::test_{i}" for i in range(50)]
    others = ["tests/test_a.py::test_1", "tests/test_a.py::test_2"]
    lines, now = [], [0.0]
    progress = session.Progress([*dist, *others], 1, lines.append, clock=lambda: now[0])
    assert lines == ["52 tests, about 1 minutes on 1 slow core"]
    for nodeid in (*others, *dist):
        now[0] += 60
        progress.pytest_runtest_logfinish(nodeid)
    assert lines[1] == "11% of the work after 5.0 minutes, about 39.2 to go"  # (3 + 3) of 53 s
    assert len(lines) == 9 and "to go" in lines[-1] and progress.seconds == {}
    session.Progress([*dist, *others], 2, lines.append)
    assert lines[-1] == "52 tests, about 0 minutes on two slow cores"


def test_every_file_that_the_estimate_names_is_there():
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert session.SECONDS.keys() <= names


def test_workers_begin_with_the_slowest_files():
    items = [SimpleNamespace(nodeid=f"tests/{name}.py::test") for name in ("test_a", "test_dpo", "test_dist")]
    a, dpo, dist = items
    session.pytest_collection_modifyitems(SimpleNamespace(), items)
    assert items == [a, dpo, dist]
    session.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    assert items == [dist, dpo, a]


def test_an_installed_torch_stays():
    """pyproject's range has no upper end: pip would replace a newer CUDA build by an older CPU one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (torch_range,) = re.findall(r'"torch([^"]*)"', text)
    assert torch_range == ">=2.6"
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert all("==" in line for line in pins.splitlines() if line and not line.startswith("#"))


@EACH
def test_a_micro_batch_reads_no_number(trainer, stages, tmp_path, monkeypatch, no_curves):
    """A GPU's host would wait there until all its work is done: figures are read when the step ends."""
    inside = []
    read = []
    item = torch.Tensor.item

    def noticed(tensor):
        if inside:
            read.append(tensor)
        return item(tensor)

    def gradient(*args, **kwargs):
        inside.append(True)
        return plain(*args, **kwargs)

    def finish(figures):
        pieces.append(len(figures.unread))
        inside.clear()
        return finish_plainly(figures)

    plain = trainer.gradient
    finish_plainly = Figures.read
    pieces = []
    monkeypatch.setattr(torch.Tensor, "item", noticed)
    monkeypatch.setattr(trainer, "gradient", gradient)
    monkeypatch.setattr(Figures, "read", finish)
    trainer.train(stages.config(trainer, tmp_path / "run", steps=1, save_every=0, tokens_per_microbatch=8))
    assert read == [] and max(pieces) > 1
