"""The replication: what is frozen, how many seeds, Student's t, and results that follow from both."""

import json
import math
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

import labs
from labs import common, replication, run
from nanorlhf.errors import UserError

HERE = Path(labs.__file__).parent
FROZEN = replication.read_frozen()
EARLIER = sorted(p.parent.name for p in HERE.glob("results/*/results.csv"))
REPLICATED = sorted(p.parent.name for p in HERE.glob("results/*/replication.json"))

FAKE = '''"""A lab without training."""
PAPER = QUESTION = PREDICTION = "text"
STATISTIC = "y at x = 2 less y at x = 1"
DIFFERS = "text"
CHANGES = []
SEEDS = 3
from labs import common


def points(smoke):
    return [{"x": x} for x in (1, 2)]


def run(point, seed, smoke):
    return [{"y": point["x"] * (1 + 0.01 * seed % 0.07) / 3}]


def effects(rows):
    return {"y": common.less(common.by_seed(rows, "y", x=2), common.by_seed(rows, "y", x=1))}


def verdict(rows):
    return common.seen(effects(rows)), "a sentence", {"mean": statistics.mean(effects(rows)["y"])}


def figure(rows, path):
    open(path, "w").close()
'''.replace("from labs", "import statistics\n\nfrom labs")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder of labs with one of them, `fake`; a function that writes it anew and forgets the old one."""
    monkeypatch.setattr(run, "HERE", str(tmp_path))
    monkeypatch.setattr(labs, "__path__", [str(tmp_path)])
    monkeypatch.setattr(run.sys, "argv", ["labs"])
    monkeypatch.setattr(run.sys, "dont_write_bytecode", True)  # two versions in one second would share it

    def write(old="", new=""):
        (tmp_path / "fake.py").write_text(FAKE.replace(old, new) if old else FAKE)
        run.sys.modules.pop("labs.fake", None)

    write()
    yield write
    run.sys.modules.pop("labs.fake", None)


def values_with(t, n):
    """n values whose t statistic is this one."""
    shape = [float(i) for i in range(n)]
    mean, deviation = statistics.mean(shape), statistics.stdev(shape)
    return [(x - mean) / deviation + t / math.sqrt(n) for x in shape]


# ------------------------------------------------------------------------------------------------------------
# Student's t


@pytest.mark.parametrize("df, t, p", [
    (2, 2.920, 0.05), (2, 9.925, 0.005), (3, 3.182, 0.025), (4, 3.747, 0.01), (5, 6.869, 0.0005),
    (9, 1.833, 0.05), (11, 0.697, 0.25), (11, 4.437, 0.0005),
])  # fmt: skip
def test_p_is_that_of_the_tables(df, t, p):
    assert common.one_sided_p(values_with(t, df + 1)) == pytest.approx(p, rel=2e-3)
    assert common.one_sided_p(values_with(-t, df + 1)) == pytest.approx(1 - p, rel=2e-3)


def test_p_of_two_values_is_that_of_cauchy_and_of_equal_ones_zero():
    assert common.one_sided_p(values_with(3.0, 2)) == pytest.approx(0.5 - math.atan(3) / math.pi, rel=1e-6)
    assert common.one_sided_p([0.25, 0.25, 0.25]) == 0.0 and common.one_sided_p([-0.25, -0.25]) == 1.0
    assert math.isnan(common.one_sided_p([1.0])) and math.isnan(common.one_sided_p([]))


def test_an_effect_is_seen_if_every_interval_lies_above_zero():
    """Of 1, 2, 3 the mean is 2 and half the interval 4.303 / √3 = 2.48."""
    assert common.seen({"a": [2.0, 3.0, 4.0]}) and not common.seen({"a": [1.0, 2.0, 3.0]})
    assert not common.seen({"a": [2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0]})
    for nothing in ({}, {"a": []}, {"a": [5.0]}):
        assert not common.seen(nothing)


@pytest.mark.parametrize("n", range(2, 13))
def test_seen_and_p_draw_the_same_line(n):
    edge = common.mean_ci(values_with(0.0, n))[1] * math.sqrt(n)
    for t in (edge - 0.01, edge + 0.01):
        values = values_with(t, n)
        assert common.seen({"a": values}) == (common.one_sided_p(values) < 0.025) == (t > edge)


def test_differences_by_seed():
    assert common.less([3.0, 5.0], [1.0, 1.5]) == [2.0, 3.5]
    assert common.less([], [1.0]) == common.less([1.0], []) == []
    with pytest.raises(ValueError):
        common.less([1.0, 2.0], [1.0])


# ------------------------------------------------------------------------------------------------------------
# number of seeds


@pytest.mark.parametrize("effect, n", [(0.0, 5), (1.1, 9), (2.0, 4), (3.3, 3)])
def test_power_is_the_share_of_drawn_samples_whose_interval_lies_above_zero(effect, n):
    draws = torch.randn(40_000, n, generator=torch.Generator().manual_seed(n)).double() + effect
    half = common.mean_ci(values_with(0.0, n))[1] * draws.std(1)
    share = (draws.mean(1) > half).double().mean().item()
    assert replication.power_of_one(effect, n) == pytest.approx(share, abs=0.008)


def test_power_of_several_labels_is_no_more_than_what_their_misses_leave():
    weak, strong = values_with(2.5, 4), values_with(40.0, 4)
    alone = replication.power({"weak": weak}, 5)
    assert alone == replication.power_of_one(2.5 / 2, 5)
    assert replication.power({"weak": weak, "strong": strong}, 5) == pytest.approx(alone, abs=1e-3)
    assert replication.power({"a": weak, "b": weak}, 5) == pytest.approx(max(0, 2 * alone - 1))


def test_number_of_seeds_by_power_by_limit_and_by_cost():
    strong, weak, none = values_with(40.0, 4), values_with(2.8, 5), values_with(-1.0, 4)
    assert replication.enough_seeds({"a": strong}, 1.0)[0] == 3
    n, words = replication.enough_seeds({"a": weak}, 1.0)
    assert replication.power({"a": weak}, n - 1) < 0.8 <= replication.power({"a": weak}, n)
    assert "below" not in words
    n, words = replication.enough_seeds({"a": none}, 1.0)
    assert n == 12 and "below 80%" in words and "12 seeds" in words
    n, words = replication.enough_seeds({"a": none}, 4.5)  # four of them take 18 minutes
    assert n == 4 and "below 80%" in words and "20 CPU-minutes" in words


# ------------------------------------------------------------------------------------------------------------
# effects of the committed rows

# Of each effect: its name among the verdict's numbers, which come from other code; its sign, what is added.
NUMBERS = {
    "nplus": [("dropout_ratio", 1, 0), ("eos_stop", -1, 0), ("small_gold", -1, 0)],
    "overoptimization": [("fall", 1, 0), ("rise", 1, 0)],
    "r1_zero": [("accuracy large, both", 1, 0), ("length large, both", 1, 0), ("distilled less RL", 1, 0)],
    "scaling": [("error", -1, 0.02)],
    "pass_at_k": [("rl_pass1", 1, 0), ("rl_pass64", -1, 0)],
    "rest": [("first_grow", 1, 0), ("second_grow", 1, 0)],
    "language_adaptation": [("dpo_minus_sft", 1, 0), ("dpo_minus_chosen", 1, 0)],
    "seal": [("sentiment", 1, 0), ("liked", 1, 0), ("resistance", 1, 0), ("turned", 1, 0)],
    "process_reward": [("best 6 acc: lead", 1, 0)],
    "rlhf_scaling": [("plateau", 1, 0)],
    "curriculum": [("waker_uniform", 1, 0)],
}


@pytest.mark.parametrize("name", EARLIER)
def test_effects_say_what_the_committed_verdict_says(name):
    published = json.loads((HERE / f"results/{name}/verdict.json").read_text(encoding="utf-8"))
    effects = run.load(name).effects(run.read_csv(HERE / f"results/{name}/results.csv"))
    assert common.seen(effects) == published["seen"]
    assert {len(values) for values in effects.values()} == {published["seeds"]}
    for values, (number, sign, shift) in zip(effects.values(), NUMBERS[name], strict=True):
        assert statistics.mean(values) == pytest.approx(sign * published["numbers"][number] + shift, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# what is frozen


@pytest.mark.parametrize("name", FROZEN)
def test_labs_are_as_they_were_frozen(name):
    entry = replication.frozen_entry(name)
    assert entry["first_seed"] == 2000 and 3 <= entry["seeds"] <= 12 and entry["labels"]
    if name in EARLIER:
        rows = run.read_csv(HERE / f"results/{name}/results.csv")
        assert entry["labels"] == list(run.load(name).effects(rows))


def test_hash_is_of_code_and_neither_of_layout_nor_of_comments(fake):
    def hashes():
        return replication.identity("fake")

    before = hashes()
    fake("rows):\n    return {", "rows):\n\n    # a comment\n    return {")
    assert hashes() == before
    fake("x=2", "x=1")
    assert {k for k, v in hashes().items() if v != before[k]} == {"hash_of_effects_and_verdict"}
    fake("0.07", "0.08")
    assert {k for k, v in hashes().items() if v != before[k]} == {"hash_of_other_code"}
    fake('"y at x = 2', '"y at x = 3')
    assert {k for k, v in hashes().items() if v != before[k]} == {"statistic"}


def test_nothing_runs_that_is_not_frozen_as_it_is(fake, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]

    def refused(*argv):
        assert replication.main([*argv, *out]) == 2
        assert not (tmp_path / "out/replication").exists()
        return capsys.readouterr().err

    assert "fake is not frozen" in refused("fake") and "holds no lab" in refused()
    assert "there is no lab nothing" in refused("nothing")
    assert replication.main(["--freeze", *out]) == 0
    entry = json.loads((tmp_path / "replication.json").read_text(encoding="utf-8"))["labs"]["fake"]
    assert (entry["labels"], entry["seeds"], entry["first_seed"]) == (["y"], 3, 2000)
    for change in (("x=2", "x=1", "effects"), ("0.07", "0.08", "code"), ('"y at', '"Y at', "statistic")):
        *change, word = change
        fake(*change)
        assert word in refused("fake") and refused("fake").count("\n") == 1
    assert "--publish" in refused("fake", "--smoke", "--publish")
    assert "--publish" in refused("--freeze", "--publish")


def test_replication_twice_gives_the_same_rows(fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert replication.main(["--freeze", "--out", str(out)]) == 0
    for folder in (out, tmp_path / "again"):
        assert replication.main(["fake", "--out", str(folder), "--workers", "1", "--publish"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == "fake: effect seen, 0.0 CPU-min, 3 seeds" and "labs gallery" in said[-1]
    text = (out / "replication/fake/replication.csv").read_bytes()
    assert text == (tmp_path / "again/replication/fake/replication.csv").read_bytes()
    assert text.decode().splitlines()[:2] == ["seed,x,y", "2000,1,0.35"]
    published = json.loads((tmp_path / "results/fake/replication.json").read_text(encoding="utf-8"))
    values = [r["y"] for r in run.read_csv(tmp_path / "results/fake/replication.csv") if r["x"] == 1]
    mean, half = common.mean_ci(values)  # y is x times something: the difference is y at x = 1
    assert published["effects"]["y"]["mean"] == pytest.approx(mean, rel=1e-3)
    assert published["effects"]["y"]["half"] == pytest.approx(half, rel=1e-2)
    assert published["p"] == published["effects"]["y"]["p"] < 1e-3
    assert published["seen"] and (published["first_seed"], published["seeds"]) == (2000, 3)
    assert replication.main(["fake", "--freeze", "--out", str(out)]) == 2
    assert "replicated already" in capsys.readouterr().err


def test_smoke_of_a_replication_is_no_evidence(fake, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert replication.main(["--freeze", *out]) == 0
    assert replication.main(["--smoke", *out]) == 0
    assert "no evidence" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    (row, _) = run.read_csv(tmp_path / "out/replication/fake/smoke/replication.csv")
    assert row["seed"] == 2000


def test_a_file_that_is_not_committed_does_not_count_as_frozen(fake, tmp_path, capsys):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    argv = ["--out", str(tmp_path / "out"), "--workers", "1"]
    git("init")
    assert replication.main(["--freeze", *argv]) == 0
    assert replication.main(argv) == 2 and "not committed" in capsys.readouterr().err
    git("add", "replication.json")
    git("commit", "-m", "Freeze")
    assert replication.main(argv) == 0


# ------------------------------------------------------------------------------------------------------------
# published replications


@pytest.mark.parametrize("name", REPLICATED)
def test_published_replication_follows_from_its_rows(name):
    lab, folder = run.load(name), HERE / "results" / name
    published = json.loads((folder / "replication.json").read_text(encoding="utf-8"))
    rows = run.read_csv(folder / "replication.csv")
    for key, value in replication.conclude(lab, rows).items():
        if key == "numbers":
            value = pytest.approx(value, rel=1e-3, nan_ok=True)
        if key == "effects":
            assert published[key].keys() == value.keys()
            for label, row in value.items():
                assert published[key][label] == pytest.approx(row, rel=1e-3)
            continue
        if key == "p":
            value = pytest.approx(value, rel=1e-3)
        assert published[key] == value
    entry = FROZEN[name]
    seeds = range(2000, 2000 + entry["seeds"])
    assert sorted({r["seed"] for r in rows}) == list(seeds) and published["seeds"] == len(seeds)
    assert list(published["effects"]) == entry["labels"]
    for key in ("prediction", "statistic"):
        assert published[key] == entry[key]
    assert not published["smoke"] and (folder / "replication.png").stat().st_size <= 100_000


def git_says(*words):
    """stdout of git, or None where it cannot say: no git, no clone, no such commit or file."""
    try:
        found = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, encoding="utf-8")
    except OSError:
        return None
    return found.stdout if found.returncode == 0 else None


@pytest.mark.parametrize("name", REPLICATED)
def test_what_a_replication_is_held_to_was_committed_before_its_results(name):
    """The commit before the one that brought the results has the lab's entry as it is now."""
    if (git_says("rev-parse", "--is-shallow-repository") or "").strip() != "false":
        pytest.skip("no history here")
    added = ("log", "--diff-filter=A", "--format=%H", "--")
    commits = git_says(*added, f"results/{name}/replication.json").split()
    before = f"{commits[-1]}^" if commits else "HEAD"
    if git_says("rev-parse", "--verify", before) is None:
        pytest.skip("the history begins with the results")
    frozen = git_says("show", f"{before}:./replication.json")
    assert frozen is not None, f"{name}: labs/replication.json came with the results or after them"
    assert json.loads(frozen)["labs"].get(name) == FROZEN[name]


def test_identity_needs_effects(fake):
    fake("def effects", "def other")
    with pytest.raises(UserError, match="no effects"):
        replication.identity("fake")
