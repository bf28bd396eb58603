"""The demo at its smallest: one run, and its report recomputed from what lies in the folder."""

import contextlib
import csv
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys

import pytest
import torch

import demo
import evaluate
import sample
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import Interrupted, RunError, UserError, derive_seed
from nanorlhf.run.cli import parse

POLICIES = {"sft": "SFT", "ppo": "PPO", "ppo_nokl": "PPO, β = 0"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """With two cores → folder, the dict that train returned, what it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo, "free_cores", lambda: 2)
        report = demo.train(demo.Config(smoke=True, seed=3, out=str(out)))
    return out, report, printed.getvalue()


@pytest.fixture(scope="module")
def samples(ran):
    """What the judge must have seen: fresh samples of every policy by the plain sampler, scored in float64.

    → {policy: rows of (prompt, text, ids, Σ k1)}
    """
    out, found = ran[0], {}
    prompts = [r["prompt"] for r in tasks.get("reviews").prompts("test", 32, derive_seed(3, "judge"))]
    sft = hub.load(out / "sft/model")[0].double()
    for name in POLICIES:
        policy, tok = hub.load(out / name / "model")
        ids = [tok.encode(p) for p in prompts]
        seed = derive_seed(3, "judge")
        roll = generate.reference(policy, ids, 1, 40, 1.0, tok.eos_id, seed)
        policy.double()
        rows = []
        for prompt, text_ids, row, n, start in zip(
            prompts, roll.responses(), roll.tokens, roll.lengths.tolist(), roll.prompt_len.tolist()
        ):
            at = range(start, n), row[start:n]
            logps = [m.logits(row[None, : n - 1])[0].log_softmax(-1) for m in (policy, sft)]
            k1 = sum((logps[0][t - 1, y] - logps[1][t - 1, y]).item() for t, y in zip(*at))
            rows.append((prompt, tok.decode(text_ids), row[:n].tolist(), k1))
        found[name] = rows
    return found


def agrees(report, name, values):
    """Mean and standard error over the prompts."""
    se = statistics.stdev(values) / math.sqrt(len(values))
    assert report[name] == pytest.approx(statistics.fmean(values), rel=1e-3, abs=2e-4)
    assert report[f"{name}_se"] == pytest.approx(se, rel=1e-3, abs=2e-4)


def test_report_is_flat_floats_with_the_promised_keys(ran):
    out, report, _ = ran
    saved = json.loads((out / "report.json").read_text())
    assert saved == report and all(type(v) is float and math.isfinite(v) for v in saved.values())
    promised = "rm_acc rm_acc_len_only kl_ppo kl_ppo_nokl cpu_seconds wall_seconds peak_rss_mb seed".split()
    promised += [f"{figure}_{name}" for figure in ("gold", "proxy") for name in POLICIES]
    assert set(promised) <= set(saved) and saved["seed"] == 3.0
    assert 0 < saved["cpu_seconds"] and 0 < saved["wall_seconds"] and 50 < saved["peak_rss_mb"] < 10**5


def test_files(ran):
    out = ran[0]
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    have = {p.name for p in out.iterdir()}
    assert have == {"sft", "rm", "ppo", "ppo_nokl", "report.png", "report.json",
                    "before_after.jsonl", "look.html"}
    assert json.loads((out / "ppo_nokl/config.json").read_text())["beta"] == 0.0
    assert json.loads((out / "ppo/config.json").read_text())["beta"] == train_ppo.Config().beta > 0


def test_before_and_after_are_the_judged_samples_of_held_out_prompts(ran, samples):
    rows = [json.loads(line) for line in (ran[0] / "before_after.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and all(tasks.held_out(r["prompt"]) for r in rows)
    for name in POLICIES:
        assert [(r["prompt"], r[name]) for r in rows] == [row[:2] for row in samples[name]]


@pytest.mark.parametrize("name", POLICIES)
def test_kl_is_the_mean_over_sequences_of_the_sum_of_k1(ran, samples, name):
    agrees(ran[1], f"kl_{name}", [k1 for *_, k1 in samples[name]])
    assert name == "sft" or abs(ran[1][f"kl_{name}"]) > 1e-3  # the policy did move
    assert name != "sft" or abs(ran[1]["kl_sft"]) < 1e-4


@pytest.mark.parametrize("name", POLICIES)
def test_gold_and_proxy_and_shape_of_the_samples(ran, samples, name):
    out, report, _ = ran
    rm, tok = hub.load(out / "rm/model")
    agrees(report, f"gold_{name}", [tasks.gold(prompt, text) for prompt, text, *_ in samples[name]])
    hidden = [rm.trunk(torch.tensor([ids]))[0, -1] for _, _, ids, _ in samples[name]]
    agrees(report, f"proxy_{name}", [(h @ rm.score.weight[0] + rm.reward_bias).item() for h in hidden])
    lengths = [len(ids) - len(tok.encode(prompt)) for prompt, _, ids, _ in samples[name]]
    assert report[f"len_{name}"] == pytest.approx(statistics.fmean(lengths))
    assert report[f"unique_{name}"] == len({text for _, text, *_ in samples[name]}) / 32


def test_reward_model_accuracy_is_against_gold_without_noise(ran):
    """Recomputed pair by pair from the held-out file, whose order is gold's."""
    out, report, _ = ran
    rm, tok = hub.load(out / "rm/model")
    pairs = [json.loads(line) for line in (out / "rm/pairs_heldout.jsonl").read_text().splitlines()]

    def reward(prompt, text):
        ids = tok.encode(prompt) + tok.encode(text) + [tok.eos_id]
        return rm.rewards(torch.tensor([ids]), torch.tensor([len(ids)])).item(), len(ids)

    right = used = 0
    for pair in pairs[:200]:
        assert tasks.gold(pair["prompt"], pair["chosen"]) > tasks.gold(pair["prompt"], pair["rejected"])
    for pair in pairs:
        (w, n), (l, m) = reward(pair["prompt"], pair["chosen"]), reward(pair["prompt"], pair["rejected"])
        if max(n, m) <= rm.cfg.max_len:
            right, used = right + (w > l), used + 1
    assert report["rm_acc"] == pytest.approx(right / used, abs=2 / used)  # a near tie may fall either way
    assert 0 <= report["rm_acc_len_only"] <= 1


def test_gold_along_the_run_is_that_of_the_logged_samples(ran):
    gold_at = demo.gold_along(f"{ran[0]}/ppo")
    rows = [json.loads(line) for line in (ran[0] / "ppo/samples.jsonl").read_text().splitlines()]
    assert list(gold_at) == sorted({r["step"] for r in rows}) and len(gold_at) >= 2
    for step, mean in gold_at.items():
        scores = [tasks.gold(r["prompt"], r["response"]) for r in rows if r["step"] == step]
        assert len(scores) == 16 and mean == pytest.approx(statistics.fmean(scores))


def test_the_terminal_shows_the_table_and_five_prompts(ran):
    _, report, printed = ran
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if "gold" in line and "KL to SFT" in line)
    table = {line[:12].strip(): line for line in lines[head + 1 : head + 4]}
    assert set(table) == set(POLICIES.values())
    end = next(i for i, line in enumerate(lines) if line.startswith("Written:"))  # behind it are paths
    assert max(map(len, lines[head - 2 : end])) <= 80 and lines[head - 2].startswith("gold: ")
    for name, title in POLICIES.items():
        for figure in ("gold", "proxy", "kl"):
            mean, se = (round(report[f"{figure}_{name}{end}"], 2) + 0.0 for end in ("", "_se"))
            assert f"{mean:.2f} ± {se:.2f}" in table[title]
        assert table[title].split()[-1] == f"{report[f'unique_{name}']:.2f}"
    shown = [line for line in lines[head:] if line.split(":")[0] in tasks.TOPICS]
    assert len(shown) == 5 == len(set(shown)) and all(map(tasks.held_out, shown))
    assert all(printed.count(f"── {i}/4") == 1 for i in range(1, 5))


def test_first_look_is_before_and_after_sft_and_of_the_first_prompt(ran, samples):
    """The SFT model's answer is the one in the table; the untrained weights are those SFT starts from."""
    out, _, printed = ran
    lines = printed.splitlines()
    named = [i for i, line in enumerate(lines) if " │ " in line and line[:9].strip()]
    untrained, sft = named[:2]
    written = next(i for i, line in enumerate(lines) if line.startswith("written:"))
    assert lines[untrained].startswith("untrained │ ") and lines[sft].startswith("      SFT │ ")
    assert untrained < written < sft < next(i for i, line in enumerate(lines) if "── 2/4" in line)
    prompt, text = samples["sft"][0][:2]
    assert lines[untrained - 1] == lines[sft - 1] == prompt
    assert text.split()[0] in lines[sft]
    torch.manual_seed(3)
    saved = json.loads((out / "sft/config.json").read_text())
    model, tok, *_ = train_sft.load(train_sft.Config(**saved), torch.device("cpu"))
    roll = generate.reference(model, [tok.encode(prompt)], 1, 40, 1.0, tok.eos_id, derive_seed(3, "judge"))
    shown = "".join(line.split(" │ ")[1] for line in lines[untrained:written] if " │ " in line)
    answer = tok.decode(roll.responses()[0])
    assert [c for c in answer if c.isalnum()] == [c for c in shown if c.isalnum()]


# ------------------------------------------------------------------------------------------------------------
# two PPO runs at once


def test_the_child_writes_the_numbers_of_a_run_in_this_process(ran, tmp_path):
    """Its flags differ from those of the run here in beta and folder alone; the curve is equal as text."""
    out = ran[0]
    flags = [json.loads((out / name / "config.json").read_text()) for name in ("ppo", "ppo_nokl")]
    assert {k for k in flags[0] if flags[0][k] != flags[1][k]} == {"out", "beta"}
    assert flags[1]["out"] == f"{out}/ppo_nokl"
    train_ppo.train(train_ppo.Config(**flags[1] | {"out": f"{tmp_path}/again"}))
    rows = []
    for folder in (out / "ppo_nokl", tmp_path / "again"):
        with open(folder / "metrics.csv", newline="") as f:
            rows.append([row | {"s": "", "tok_s": ""} for row in csv.DictReader(f)])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    names = ("samples.jsonl", "model/model.safetensors", "critic/model.safetensors")
    assert all((out / "ppo_nokl" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_the_child_counts_in_cpu_seconds_and_memory(ran):
    """Python with torch alone takes above 100 MB and half a second, in each of the two processes."""
    import resource

    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 2**20 if sys.platform == "darwin" else 2**10
    assert usage[1].ru_maxrss / unit > 100 and usage[1].ru_utime > 0.5
    assert demo.peak_rss_mb() == pytest.approx(sum(u.ru_maxrss for u in usage) / unit, rel=0.05)
    assert 200 < ran[1]["peak_rss_mb"] <= demo.peak_rss_mb()


@pytest.mark.parametrize("cores, threads, beside", [(1, 0, 0), (2, 0, 1), (2, 1, 1), (2, 2, 0), (4, 2, 1)])
def test_side_by_side_only_where_each_run_has_its_cores(monkeypatch, tmp_path, cores, threads, beside):
    """Sequential or not, all four runs get the same flags."""
    here, child = [], []
    for trainer in (train_sft, train_rm, train_ppo):
        monkeypatch.setattr(trainer, "train", lambda cfg: here.append(cfg))
    monkeypatch.setattr(train_sft, "load", lambda cfg, device: [None] * 4)
    monkeypatch.setattr(hub, "load", lambda folder: [None] * 2)
    monkeypatch.setattr(demo, "first_look", lambda *args: None)
    monkeypatch.setattr(demo, "free_cores", lambda: cores)
    monkeypatch.setattr(demo, "ppo_side_by_side", lambda a, b: child.append((a, b)) or "")
    demo.train_models(demo.Config(out="d", threads=threads, seed=5), "a prompt", 0, 0.0)
    ppo = dict(seed=5, threads=threads, device="cpu", overwrite=True, save_every=0, init="d/sft/model",
               rm="d/rm/model", sample_every=2, out="d/ppo")
    both = [train_ppo.Config(**ppo), train_ppo.Config(**ppo | {"out": "d/ppo_nokl", "beta": 0.0})]
    assert len(child) == beside and len(here) == (2 if beside else 4)
    assert both == ([train_ppo.Config(**flags) for flags in child[0]] if beside else here[2:])


def test_free_cores_are_those_this_process_may_use():
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        assert demo.free_cores() == 1
        os.sched_setaffinity(0, before)
        assert demo.free_cores() == len(before)
    assert 1 <= demo.free_cores() <= os.cpu_count()


@pytest.fixture
def child(monkeypatch):
    """→ the processes that were started."""
    started, popen = [], subprocess.Popen

    def start(*args, **kw):
        started.append(popen(*args, **kw))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(signal.SIGINT), RunError("loss is nan")])
def test_an_error_here_leaves_no_child_behind(monkeypatch, tmp_path, child, error):
    def stop(cfg):
        raise error

    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.setattr(train_ppo, "__file__", f"{tmp_path}/sleeper.py")
    monkeypatch.setattr(train_ppo, "train", stop)
    with pytest.raises(type(error)) as e:
        demo.ppo_side_by_side({}, {"seed": 1})
    assert e.value is error and child[0].returncode not in (None, 0)  # it was ended, it did not end itself


@pytest.mark.parametrize("program, message", [
    ("import sys; print('x' * 9000); sys.exit('warning\\ntrain_ppo.py: stopped: the loss is nan')",
     "train_ppo.py: stopped: the loss is nan"),
    ("import os; os._exit(7)", "exit status 7"),
])
def test_a_failing_child_stops_the_demo_with_its_message(monkeypatch, tmp_path, child, program, message):
    (tmp_path / "fails.py").write_text(program)
    monkeypatch.setattr(train_ppo, "__file__", f"{tmp_path}/fails.py")
    monkeypatch.setattr(train_ppo, "train", lambda cfg: None)
    with pytest.raises(RunError) as e:
        demo.ppo_side_by_side({}, {})
    assert str(e.value) == f"PPO with β = 0 failed: {message}" and child[0].returncode


def test_next_commands_have_flags_that_exist_and_fit_into_80_columns(ran, monkeypatch, tmp_path):
    """The models they name are there; `.venv/bin/python` only where that is the interpreter."""
    programs = {m.__name__: m for m in (train_dpo, train_grpo, sample, evaluate)}
    commands = ran[2].split("Go on with these models:")[1].replace("\\\n", "").strip().splitlines()
    assert [shlex.split(c)[1] for c in commands] == [f"{name}.py" for name in programs]
    for command in commands:
        python, script, *flags = shlex.split(command)
        cfg = parse(programs[script[:-3]].Config, flags)
        folders = [flag for flag in flags if flag.endswith("/model")]
        assert python in ("python", ".venv/bin/python")
        assert folders and all(os.path.isdir(f) for f in folders)
        assert cfg.task == "reviews" if hasattr(cfg, "task") else cfg.prompt
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert "  python train_dpo.py" in demo.next_commands("runs/demo")
    monkeypatch.setattr(sys, "prefix", f"{tmp_path}/.venv")
    text = demo.next_commands("runs/demo")
    assert text.count("  .venv/bin/python ") == 4 and max(map(len, text.splitlines())) <= 80
    assert "--init 'my runs/sft/model'" not in text and "'my runs'/sft/model" in demo.next_commands("my runs")


def test_a_second_demo_is_refused_and_touches_nothing(ran):
    out = ran[0]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(UserError, match="holds sft, rm, ppo, ppo_nokl, report.json already: add --overwrite"):
        demo.train(demo.Config(smoke=True, out=str(out)))
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_too_few_samples(tmp_path):
    with pytest.raises(UserError, match="--samples 4: must be at least 5"):
        demo.train(demo.Config(samples=4, out=f"{tmp_path}/d"))
    assert not (tmp_path / "d").exists()


def test_column_skips_what_was_not_measured(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as f:
        csv.writer(f).writerows([["step", "x", "y"], [0, 1.5, ""], [1, "", ""], [2, 2.5, ""]])
    assert demo.column(tmp_path, "x") == {0: 1.5, 2: 2.5} and demo.column(tmp_path, "y") == {}
