"""The demo at its smallest: one run, and its report recomputed from what lies in the folder."""

import contextlib
import csv
import io
import json
import math
import statistics

import pytest
import torch

import demo
import train_ppo
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import UserError, derive_seed

POLICIES = {"sft": "SFT", "ppo": "PPO", "ppo_nokl": "PPO, β = 0"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """→ folder, the dict that train returned, what it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
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
    assert have == {"sft", "rm", "ppo", "ppo_nokl", "report.png", "report.json", "before_after.jsonl"}
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
    steps, gold = demo.gold_along(f"{ran[0]}/ppo")
    rows = [json.loads(line) for line in (ran[0] / "ppo/samples.jsonl").read_text().splitlines()]
    assert steps == sorted({r["step"] for r in rows}) and len(steps) >= 2
    for step, mean in zip(steps, gold):
        scores = [tasks.gold(r["prompt"], r["response"]) for r in rows if r["step"] == step]
        assert len(scores) == 16 and mean == pytest.approx(statistics.fmean(scores))


def test_the_terminal_shows_the_table_and_five_prompts(ran):
    _, report, printed = ran
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if "gold" in line and "KL to SFT" in line)
    table = {line[:12].strip(): line for line in lines[head + 1 : head + 4]}
    assert set(table) == set(POLICIES.values()) and max(map(len, lines[head:-1])) <= 80  # but for the paths
    for name, title in POLICIES.items():
        for figure in ("gold", "proxy", "kl"):
            mean, se = (round(report[f"{figure}_{name}{end}"], 2) + 0.0 for end in ("", "_se"))
            assert f"{mean:.2f} ± {se:.2f}" in table[title]
        assert table[title].split()[-1] == f"{report[f'unique_{name}']:.2f}"
    shown = [line for line in lines[head:] if line.split(":")[0] in tasks.TOPICS]
    assert len(shown) == 5 == len(set(shown)) and all(map(tasks.held_out, shown))
    assert [line.split(" │ ")[0].strip() for line in lines if " │ " in line][0] == "SFT"
    assert all(printed.count(f"── {i}/4") == 1 for i in range(1, 5))


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
    assert demo.column(tmp_path, "x") == [(0, 2), (1.5, 2.5)] and demo.column(tmp_path, "y") == [(), ()]
