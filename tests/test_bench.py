"""python -m bench: verdicts, CSV, tables, and the parts that need no peer; no figure is tested."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench import generation, gpu, heads, install, kernels, table, training, versions
from bench.steps import ragged
from nanorlhf.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("unit, ours, theirs, ratio", [("s", 2.0, 3.0, 1.5), ("tok/s", 200.0, 100.0, 2.0)])
def test_a_ratio_above_one_is_in_our_favour(unit, ours, theirs, ratio):
    r = table.row("x", unit, [ours], "peer", [theirs], goal=ratio + 0.01)
    assert r["ratio"] == ratio and r["verdict"] == "MISS"
    assert table.row("x", unit, [ours], "peer", [theirs], goal=ratio - 0.01)["verdict"] == "PASS"


def test_goals_of_memory_and_of_our_own_value():
    r = table.row("x", "s", [1.0, 3.0, 2.0], goal="≤ 1.9", mib=(50.0, 100.0), share_goal=0.5)
    assert (r["ours"], r["ours_low"], r["ours_high"]) == (2.0, 1.0, 3.0)
    assert (r["verdict"], r["share"], r["share_verdict"]) == ("MISS", 0.5, "PASS")
    r = table.row("x", "share", [0.5], goal="≥ 50%", mib=(301.0, None), share_goal="≤ 300")
    assert (r["verdict"], r["share_verdict"]) == ("PASS", "MISS")


def test_without_a_peer_there_is_no_ratio_and_no_verdict():
    r = table.row("x", "s", [1.0], "TRL", None, goal=1.1, mib=(5.0, None), share_goal=0.5)
    assert "ratio" not in r and not r["verdict"] and not r["share_verdict"]
    assert table.cells(r)[4:6] == ["-", "-"]
    later = table.row("x", "s", None, "TRL", None, goal=1.1, note="not measured")
    assert table.cells(later)[2] == "not measured"


def test_rows_survive_the_csv_and_reach_the_page(tmp_path):
    rows = [table.row("GRPO | a", "s", [1.0, 1.5, 2.0], "TRL tuned", [3.0], 1.6, (100.0, 200.0), 0.55),
            table.row("SFT", "s", [1.0], "TRL tuned", None, 1.1)]  # fmt: skip
    table.save("steps", "cpu", rows, tmp_path)
    table.save_about("steps", "cpu", tmp_path)
    found = bench.tables(tmp_path)
    title, back, run = found["steps_cpu"]
    assert [table.cells(r)[:-1] for r in back] == [table.cells(r)[:-1] for r in rows]
    assert run["versions"]["torch"] and {r["origin"] for r in back} == {table.origin_of(run)}
    (memory,) = found["memory_cpu"][1]
    assert (memory["row"], memory["share"], memory["share_verdict"]) == ("GRPO | a", 0.5, "PASS")
    page = tmp_path / "page.md"
    blocks = (f"{x}\n<!-- bench {x} -->\nold\n<!-- end -->\n" for x in ("steps_cpu", "other"))
    page.write_text("".join(blocks))
    table.fill(page, {"steps_cpu": table.markdown(back, run)})
    lines = page.read_text().splitlines()
    assert lines[0] == "steps_cpu" and lines[-4:] == ["other", "<!-- bench other -->", "old", "<!-- end -->"]
    first = "| GRPO \\| a | s | 1.50 ±33% | TRL tuned | 3.00 | 2.00× | ≥ 1.6× | PASS | 100 | 200 | 50% |"
    assert lines[4].startswith(first) and lines.count("old") == 1


def test_the_kernels_csv_becomes_rows_with_goals(tmp_path):
    head = "N,D,V,variant,forward_ms,total_ms,total_low_ms,total_high_ms,peak_mib\n"
    ours = "ours,9,30,29,31,5", '"ours, one pass",20,22,21,23,9'
    rows = ("matmul,10,40,40,40,", *ours, "naive,8,30,30,30,100")
    (tmp_path / "kernels_cpu.csv").write_text(head + "".join(f"8,4,50257,{r}\n" for r in rows))
    found = {(r["row"][-10:], r["peer"]): r for r in heads.from_csv(tmp_path, "cpu")}
    two, one = found["two passes", "naive"], found[", one pass", "naive"]
    assert (two["ratio"], two["verdict"], two["share_verdict"]) == (1.0, "PASS", "PASS")
    assert (one["ratio"], one["verdict"], one["share_verdict"]) == (30 / 22, "PASS", "MISS")
    assert not found["two passes", "TRL"]["verdict"] and len(found) == 2 * len(heads.PEERS)


@pytest.mark.slow
def test_quick_measures_what_needs_no_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "QUICK", str(tmp_path))
    monkeypatch.setattr(install, "present", lambda name, known=install.present: name != "trl" and known(name))
    bench.main(["import", "install", "--quick"])
    ours = table.load("import", "cpu", tmp_path)
    assert ours[0]["ours"] > 0 and ours[0]["ours_mib"] > 50 and ours[1]["ours"] > 500  # s, MiB, modules
    packages, size = table.load("install", "cpu", tmp_path)
    assert {"tiktoken", "numpy", "tqdm"} <= set(size["note"].split()) and 5 <= packages["ours"] < 50
    assert "torch" not in size["note"].split() and "A whole step" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_does_a_step_when_it_is_told_to(monkeypatch):
    """Ours alone, in a process of its own: the peers of this row are not installed, or not asked for."""
    monkeypatch.setattr(training, "QUICK", [("tiny", {training.NANOGPT: None}, "tiny", 0)])
    (r,) = training.rows(quick=True)
    assert r["ours"] > 0 and r["ours_mib"] > 50 and r["tokens"] == 64 and r["theirs_mib"] is None


def test_planned_lengths():
    even, skewed = ragged(64, 64), ragged(64, 64, mean=12)
    assert (min(even), max(even), sum(even)) == (1, 64, 64 * 65 // 2)
    assert min(skewed) == 1 and max(skewed) <= 64 and 11 < sum(skewed) / 64 < 13


def test_the_gap_between_sampled_and_recomputed_log_probs(monkeypatch):
    """A sampler that reports one log-prob 0.01 too low is found out."""
    shape = dict(generation.CPU, vocab_size=64, n_layer=2, n_head=2, d_model=32, max_len=32)
    model = generation.build(shape)
    prompts = [[1, 2, 3, 4]] * 4
    right = generation.gap_row(model, prompts, 16, "≤ 1e-4")
    assert right["row"].endswith("float32") and right["verdict"] == "PASS", right
    assert generation.gap_row(copy.deepcopy(model).bfloat16(), prompts, 16, "≤ 1")["row"].endswith("bfloat16")
    sampler = generation.ours

    def too_low(*args, **kwargs):
        roll = sampler(*args, **kwargs)
        roll.logp[0, 5] -= 0.01
        return roll

    monkeypatch.setattr(generation, "ours", too_low)
    wrong = generation.gap_row(model, prompts, 16, "≤ 1e-4")
    assert wrong["ours"] == pytest.approx(0.01, abs=1e-4) and wrong["verdict"] == "MISS", wrong


def test_rows_of_another_machine_say_so(tmp_path):
    """--only puts new rows among old ones; what was saved before this column came gets its run's origin."""
    old = table.row("a", "s", [1.0], origin="H100, abc1234")
    table.save("steps", "gpu", [old], tmp_path)
    table.merge("steps", [table.row("b", "s", [2.0])], "gpu", tmp_path)
    rows = table.load("steps", "gpu", tmp_path)
    assert [r["origin"] for r in rows] == ["H100, abc1234", table.origin()]
    text = table.markdown(rows)
    assert "measured on" in text and "H100, abc1234" in text
    assert "measured on" not in table.markdown(rows[:1])
    path = tmp_path / "steps_gpu.csv"
    head, *lines = path.read_text().splitlines()
    older = [head.removesuffix(",origin"), *(line.rpartition(',"')[0] for line in lines)]
    path.write_text("\n".join(older))
    assert table.load("steps", "gpu", tmp_path)[0]["origin"] == table.origin()  # from about.json


def test_jobs_of_a_gpu_run_in_order_of_value_while_there_is_time(tmp_path, monkeypatch):
    """What does not fit in time or memory is listed with the reason, a failure too; all others are kept."""
    now, kept = [0.0], []

    def measure(seconds, error=None):
        def rows(quick, gpu, rounds, only):
            now[0] += seconds
            if error:
                raise error
            return [table.row(only, "s", [1.0])]

        return rows

    parts = dict(roofline=measure(10), steps=measure(30), training=measure(5, RuntimeError("out of memory")))
    jobs = [("roofline", "copy", 10, 1), ("training", "1.5B", 5, 1), ("steps", "big", 20, 999),
            ("steps", "GRPO", 40, 1), ("steps", "late", 20, 1)]  # fmt: skip
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "JOBS", jobs)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def run(**more):
        kept.clear()
        now[0] = 0.0
        return gpu.run_jobs(60, keep=lambda part, rows: kept.append((part, rows[0]["row"])), **more)

    left_out = dict(run())
    assert kept == [("roofline", "copy"), ("steps", "GRPO")]
    assert list(left_out) == ["training: 1.5B", "steps: big", "steps: late"]
    assert "out of memory" in left_out["training: 1.5B"] and "needs 999 GiB" in left_out["steps: big"]
    assert "15 s are left" in left_out["steps: late"]
    assert run(only="GRPO") == [] and kept == [("steps", "GRPO")]
    assert run(parts=["roofline"]) == [] and kept == [("roofline", "copy")]


def test_every_job_names_rows_that_exist():
    """A piece of a name that no row has would measure nothing, in silence."""
    shapes = [" × ".join(f"{n:,}" for n in shape) for shape in kernels.GPU_SHAPES]
    rows = {"kernels": shapes, "training": [gpu.SHARE], "steps": ["GRPO, 124M", "GRPO, 0.5B"],
            "generation": ["124M, 256 rows", "124M, 64 rows", "1.5B, 64 rows", "1.5B, 256 rows",
                           "ragged lengths"]}  # fmt: skip
    for part, name, *_ in gpu.JOBS:
        assert any(name in row for row in rows.get(part, [""])), (part, name)
    measured = [(part, name) for part, name, *_ in gpu.JOBS]
    assert len(set(measured)) == len(measured)
    assert {name for part, name in measured if part == "kernels"} == set(shapes)
    for kind, limit in ((torch.bfloat16, 2.7e-4), (torch.float32, 1e-4)):
        assert limit / 2 <= gpu.tolerance(4096, kind) <= 2 * limit
    assert gpu.tolerance(64, torch.bfloat16) == 2e-5


def test_mistakes_are_named():
    for argv, said in ((["stepz"], "stepz"), (["--rounds"], "--rounds"), (["--rounds", "x"], "--rounds x"),
                       (["--minutes", "8"], "--minutes: goes together"), (["--gpu"], "sees no GPU"),
                       (["steps", "--fake"], "--fake"), (["contact", "--nope"], "--nope"),
                       (["contact", "--only", "x"], "no step")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            bench.main(argv)
    done = subprocess.run([sys.executable, "-m", "bench", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_the_oldest_versions_are_those_of_the_ranges():
    oldest, newest = versions.requirements("oldest"), versions.requirements("newest")
    assert "torch==2.6.*" in oldest and "torch>=2.6" in newest and len(oldest) == len(newest)
    pinned = versions.requirements("torch==2.9.1 numpy==2.3.5")
    assert pinned[:3] == ["torch==2.9.1", "numpy==2.3.5", "torch>=2.6"]
    ordered = ["2.6.0", "2.9.1", "2.13.0+cpu"]
    assert sorted(reversed(ordered), key=versions.version) == ordered


def test_a_report_of_tests_becomes_a_row(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
                      '<testcase name="c"><failure/></testcase></testsuite></testsuites>')
    assert versions.count(report) == dict(passed=1, skipped=1, failed=1, note="c")
