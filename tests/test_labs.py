"""The labs' own plumbing, the shape of every lab, and that committed verdicts follow from committed rows."""

import ast
import io
import itertools
import json
import math
import tokenize
from pathlib import Path

import pytest
import torch

import labs
import train_sft
from labs import common, curriculum, nplus, overoptimization, run
from nanorlhf import tasks
from nanorlhf.look.plots import T975

HERE = Path(labs.__file__).parent
PUBLISHED = sorted(p.parent.name for p in HERE.glob("results/*/verdict.json"))
SENTENCES = ("PAPER", "QUESTION", "PREDICTION", "STATISTIC", "DIFFERS")

FAKE = '''"""A lab without training."""
PAPER = QUESTION = PREDICTION = STATISTIC = DIFFERS = "text"
CHANGES, SEEDS = [], 3
from labs import common


def points(smoke):
    return [{"x": x} for x in (1, 2)]


def run(point, seed, smoke):
    with open(__file__ + ".calls", "a") as f:
        f.write("x")
    return [{"y": seed + point["x"], "note": "a,b"}, {"y": seed - 0.5}]


def verdict(rows):
    mean, half = common.paired(common.by_seed(rows, "y", x=2), common.by_seed(rows, "y", x=1))
    return mean - half > 0, common.pm(mean, half), {"mean": mean, "half": half}


def figure(rows, path):
    open(path, "w").close()
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder of labs with one of them, `fake`; results go to its out/."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(run, "HERE", str(tmp_path))
    monkeypatch.setattr(labs, "__path__", [str(tmp_path)])
    monkeypatch.setattr(run.sys, "argv", ["labs"])
    yield tmp_path
    run.sys.modules.pop("labs.fake", None)


def code_lines(path):
    """Lines that hold code: no comments, no docstrings, no blank lines."""
    source = path.read_text(encoding="utf-8")
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            texts |= set(range(node.lineno, node.end_lineno + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skip, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


@pytest.mark.parametrize("name", run.names())
def test_every_lab_has_its_shape(name):
    lab = run.load(name)
    for text in SENTENCES:
        assert isinstance(getattr(lab, text), str) and len(getattr(lab, text)) > 10
    assert lab.SEEDS in (3, 5, 10) and isinstance(lab.CHANGES, list)
    small, full = lab.points(True), lab.points(False)
    assert 0 < len(small) <= len(full) and json.loads(json.dumps(full)) == full
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    for word in (".backward(", "torch.optim", "autograd"):
        assert word not in source, f"{name}: a training loop of its own"
    assert code_lines(HERE / f"{name}.py") <= 165  # 150; the imports of the house and `effects` take more


@pytest.mark.parametrize("name", PUBLISHED)
def test_committed_verdict_follows_from_committed_rows(name):
    folder, lab = HERE / "results" / name, run.load(name)
    published = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    for key, value in run.conclude(lab, run.read_csv(folder / "results.csv")).items():
        if key == "numbers":
            value = pytest.approx(value, rel=1e-3, nan_ok=True)
        assert published[key] == value
    assert not published["smoke"] and published["seeds"] >= 3 and published["cpu_minutes"] <= 16
    assert published["prediction"] == lab.PREDICTION and published["statistic"] == lab.STATISTIC
    assert (folder / "figure.png").stat().st_size <= 100_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_committed_changes_are_those_of_the_lab(name):
    published = json.loads((HERE / "results" / name / "verdict.json").read_text(encoding="utf-8"))
    assert published["changes"] == run.load(name).CHANGES


def test_last_line_of_a_run():
    verdict = {"lab": "rest", "smoke": False, "seen": True, "cpu_minutes": 4.21, "seeds": 3}
    assert run.last_line(verdict) == "rest: effect seen, 4.2 CPU-min, 3 seeds"
    assert run.last_line(verdict | {"seen": False}) == "rest: effect not seen, 4.2 CPU-min, 3 seeds"
    assert run.last_line(verdict | {"smoke": True}) == "rest: smoke run, no evidence, 4.2 CPU-min, 3 seeds"


@pytest.mark.parametrize("n, quantile", list(enumerate(T975, start=2)))
def test_quantiles_of_students_t(n, quantile):
    df, x = n - 1, torch.linspace(0, quantile, 100_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    inside = 2 * torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x).item()
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_paired_interval_takes_out_what_the_seeds_share():
    mean, half = common.paired([101.0, 202.0, 303.0], [100.0, 200.0, 300.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert common.mean_ci([3.0])[0] == 3.0 and math.isnan(common.mean_ci([3.0])[1])


def test_lab_runs_resumes_and_recomputes(fake, capsys):
    out, calls = str(fake / "out"), fake / "fake.py.calls"
    assert run.main(["fake", "--out", out, "--workers", "1"]) == 0
    rows = run.read_csv(f"{out}/fake/results.csv")
    assert rows[:2] == [dict(seed=0.0, x=1.0, y=1.0, note="a,b"), dict(seed=0.0, x=1.0, y=-0.5, note=None)]
    verdict = json.loads((fake / "out/fake/verdict.json").read_text(encoding="utf-8"))
    assert verdict["numbers"] == {"mean": 0.5, "half": 0.0} and verdict["seen"] and verdict["seeds"] == 3
    assert len(calls.read_text()) == 6
    source = FAKE.replace("mean - half > 0", "mean > 1")  # another verdict: the same jobs
    (fake / "fake.py").write_text(source)
    next((fake / "out/fake/parts").iterdir()).unlink()  # one job was interrupted
    run.sys.modules.pop("labs.fake")
    assert run.main(["fake", "--out", out, "--workers", "1", "--publish"]) == 0
    assert len(calls.read_text()) == 7
    published = json.loads((fake / "results/fake/verdict.json").read_text(encoding="utf-8"))
    assert not published["seen"]
    assert capsys.readouterr().out.splitlines()[-1] == "fake: effect not seen, 0.0 CPU-min, 3 seeds"
    (fake / "fake.py").write_text(source.replace("0.5}", "1.5}"))  # another run: all of them again
    run.sys.modules.pop("labs.fake")
    assert run.main(["fake", "--out", out, "--workers", "1"]) == 0
    assert len(calls.read_text()) == 13


def test_smoke_is_no_evidence_and_cannot_be_published(fake, capsys):
    assert run.main(["fake", "--smoke", "--out", str(fake / "out")]) == 0
    assert "no evidence" in capsys.readouterr().out
    for argv in (["fake", "--smoke", "--publish"], ["nothing"], ["fake", "--worker", "1"], ["--smoke"]):
        assert run.main(argv) == 2
        assert "error" in capsys.readouterr().err


def test_a_stage_is_trained_once(tmp_path, monkeypatch, spy, no_curves):
    monkeypatch.setattr(common, "root", str(tmp_path))
    calls = spy(train_sft, "train")
    folders = [common.trained(train_sft, seed=seed, task="chain", demos=40, steps=1) for seed in (0, 0, 1)]
    assert len(calls) == 2 and folders[0] == folders[1] != folders[2]
    (losses,) = common.logged(folders[0], "loss")
    assert common.final(folders[0])["loss"] == pytest.approx(losses[-1], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# single labs


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    torch.manual_seed(0)
    proxy, gold = torch.rand(3, 7), torch.rand(3, 7)
    every = [gold[p, max(subset, key=lambda i, p=p: proxy[p, i])]
             for p in range(3) for subset in itertools.combinations(range(7), n)]  # fmt: skip
    want = torch.stack(every).mean().item()
    assert common.best_of(gold.gather(1, proxy.argsort(1)), n) == pytest.approx(want)


@pytest.mark.parametrize("law, alpha, beta", [(math.log, 0.9, 0.3), (float, 0.6, 0.09)])
def test_laws_of_overoptimization_are_recovered(law, alpha, beta):
    gold = {d: -0.8 + d * (alpha - beta * law(d)) if d else -0.8 for d in (0, 0.1, 1, 2, 4, 9)}
    rows = [{"kl": d * d, "gold": x} for d, x in gold.items()]
    assert overoptimization.fit(rows, law) == (pytest.approx(alpha), pytest.approx(beta))


def test_peak_is_found_on_one_half_and_measured_on_the_other():
    gold = [0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0]
    rows = [{"gold_a": g, "gold_b": g + 10 * (i == 10), "proxy": i} for i, g in enumerate(gold)]
    assert overoptimization.peak(rows) == (14 / 5, 13 / 5, 4)


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_share_of_demonstrations_that_think(share):
    rows = common.thinking_demonstrations(400, 0, share)
    thoughts = [r for r in rows if r["response"].startswith("<")]
    assert len(thoughts) == pytest.approx(400 * share, abs=35)
    assert all(tasks.get("chain").reward(r["prompt"], r["response"]) == 1 for r in rows)
    assert all(len(r["response"]) == 10 for r in thoughts)


def test_dropout_acts_only_where_gradients_do():
    forward, x = nplus.dropped(lambda self, x: 2 * x), torch.ones(10_000)
    with torch.no_grad():
        assert torch.equal(forward(None, x), 2 * x)
    y = forward(None, x)
    assert y.min() == 1 and y.max() == pytest.approx(1 + 1 / 0.9) and y.mean() == pytest.approx(2, abs=0.05)


def test_shares_of_a_curriculum():
    found = {"easy": (0.0, 1.0), "hard": (1.0, 0.5), "harder": (0.0, 0.0), "noise": (0.0, 0.0)}
    assert set(curriculum.shares("uniform", found).values()) == {0.25}
    for name in ("waker", "success"):
        shares = curriculum.shares(name, found)
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0.05
        assert max(shares, key=shares.get) == "hard"
    assert curriculum.shares("success", found)["hard"] == pytest.approx(0.85)
