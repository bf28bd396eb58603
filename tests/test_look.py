"""tokens.jsonl.gz against the weights in float64, and the page that shows it."""

import copy
import gzip
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from runs import EACH, metrics, same_run
from stages import TRAINERS

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf.errors import RunError, UserError
from nanorlhf.look import __main__ as look
from nanorlhf.look import page, tokens
from nanorlhf.run.checkpoint import Run

pytestmark = pytest.mark.usefixtures("no_curves", "every_logged_step")
ROOT = Path(__file__).parents[1]
SHARE = tokens.SHARE


@pytest.fixture
def every_logged_step(monkeypatch):
    """Record each of them: of steps as small as these a few rows are a large share."""
    monkeypatch.setattr(tokens, "SHARE", math.inf)


# ------------------------------------------------------------------------------------------------------------
# the numbers, from the weights in float64


@pytest.fixture
def followed(stages, tmp_path, monkeypatch):
    """followed(trainer, **flags): run it → its records, and copies of models and batch at each update."""

    def run(trainer, **flags):
        seen = []
        check = Run.check

        def watched(self, step, loss, gnorm, where, batch, models):
            seen.append((step, copy.deepcopy(batch), [copy.deepcopy(model).double() for model in models]))
            return check(self, step, loss, gnorm, where, batch, models)

        monkeypatch.setattr(Run, "check", watched)
        cfg = stages.config(trainer, tmp_path / "run", look_rows=64, **flags)
        trainer.train(cfg)
        return [r for r in tokens.read(cfg.out) if "rows" in r], seen, cfg

    return run


def distributions(model, row):
    """A row's log-softmax before each token of the mask, (n, V) in float64, and the tokens' ids."""
    ids = torch.tensor([row["ids"]])
    at = [t for t, bit in enumerate(row["mask"]) if bit == "1"]
    with torch.no_grad():
        logits = model(ids)[0] @ model.unembedding.T.double()
    return logits[[t - 1 for t in at]].log_softmax(-1), ids[0, at]


def logps(model, row):
    logs, ids = distributions(model, row)
    return [logs[k, i].item() for k, i in enumerate(ids.tolist())]


def entropies(model, row):
    logs, _ = distributions(model, row)
    return [-sum(x.exp().item() * x.item() for x in line) for line in logs]


def close(found, expected, digits=4):
    """As far as a number of so many significant digits can be right, and fp32 beneath it."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a == pytest.approx(b, rel=0.51 * 10 ** (1 - digits) + 1e-5, abs=2e-5), (found, expected)


def load(folder):
    from nanorlhf import hub

    return hub.load(str(folder))[0].double()


@pytest.mark.parametrize("flags", [{}, dict(beta=0.2, gamma=0.9, lam=0.8)], ids=["default", "beta"])
def test_every_number_of_ppo(followed, stages, flags):
    (first, *_, record), seen, cfg = followed(train_ppo, steps=2, group_size=2, **flags)
    _, _, (policy, critic) = seen[2]  # step 1, before its first update
    ref = load(stages.folder / "sft/model")
    rm = load(stages.folder / "rm/model")
    after = [policy, seen[3][2][0], load(f"{cfg.out}/model")]  # after no update, one, two
    rows = record["rows"]
    assert len(rows) == 16 and record["step"] == 1
    raw_adv = []
    for row in rows:
        ids = torch.tensor([row["ids"]])
        sampled = row["mask"].count("1")
        close(row["old_logp"], logps(policy, row))
        close(row["ref_logp"], logps(ref, row))
        close(row["log_ratio"], [a - b for a, b in zip(logps(policy, row), logps(ref, row))])
        close(row["entropy"], entropies(policy, row))
        for model, ratio in zip(after, row["ratio"], strict=True):
            close(ratio, [math.exp(a - b) for a, b in zip(logps(model, row), logps(policy, row))], 5)
        with torch.no_grad():
            before = critic.trunk(ids)[0] @ critic.score.weight[0].double() + critic.reward_bias
        value = before[-sampled - 1 : -1].tolist()
        close(row["old_value"], value)
        reward = [-cfg.beta * (a - b) for a, b in zip(logps(policy, row), logps(ref, row))]
        score = rm.rewards(ids, torch.tensor([ids.shape[1]])).item()
        close([row["score"]], [score])
        reward[-1] += score if row["finished"] or cfg.no_eos_score is None else cfg.no_eos_score
        close(row["reward"], reward)
        delta = [r + cfg.gamma * v1 - v for r, v, v1 in zip(reward, value, [*value[1:], 0.0])]
        close(row["delta"], delta)
        decay = cfg.gamma * cfg.lam
        adv = [sum(decay**k * d for k, d in enumerate(delta[t:])) for t in range(sampled)]
        close(row["adv_raw"], adv)
        close(row["ret"], [a + v for a, v in zip(adv, value)])
        raw_adv.append(adv)
    everything = [a for adv in raw_adv for a in adv]  # look_rows holds the whole rollout
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((a - mean) ** 2 for a in everything) / len(everything))
    for row, adv in zip(rows, raw_adv):
        close(row["adv"], [(a - mean) / std for a in adv], 3)
    for update in (0, 1):  # w: one part in the tokens of the row's minibatch
        of_update = [row for row in rows if row["update"] == [update]]
        n = sum(row["mask"].count("1") for row in of_update)
        for row in of_update:
            close(row["w"], [1 / n] * row["mask"].count("1"))


def test_every_number_of_grpo(followed, stages):
    records, seen, cfg = followed(train_grpo, steps=2, off_policy_steps=0, kl="k3", beta=0.1)
    record = records[-1]
    _, _, (policy,) = seen[2]
    ref = load(stages.folder / "sft/model")
    after = [policy, seen[3][2][0], load(f"{cfg.out}/model")]
    rows = record["rows"]
    assert record["groups"]["group"] == [row["group"] for row in rows]
    assert record["groups"]["reward"] == [row["reward"] for row in rows]
    for row in rows:
        close(row["old_logp"], logps(policy, row))
        close(row["ref_logp"], logps(ref, row))
        close(row["entropy"], entropies(policy, row))
        for model, ratio in zip(after, row["ratio"], strict=True):
            close(ratio, [math.exp(a - b) for a, b in zip(logps(model, row), logps(policy, row))], 5)
        group = [other["reward"] for other in rows if other["group"] == row["group"]]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        close([row["adv"]], [(row["reward"] - mean) / (std + cfg.std_eps)], 2)  # of rewards in 4 digits
        minibatch = [other for other in rows if other["update"] == row["update"]]
        n = sum(other["mask"].count("1") for other in minibatch)
        close(row["w"], [1 / n] * row["mask"].count("1"))


def test_ratio_of_gspo_is_that_of_the_row(followed):
    """The geometric mean of the tokens' ratios, which is what the loss clips."""
    records, seen, cfg = followed(train_grpo, steps=2, off_policy_steps=0, ratio="sequence")
    _, _, (policy,) = seen[2]
    after = [policy, seen[3][2][0], load(f"{cfg.out}/model")]
    moved = 0
    for row in records[-1]["rows"]:
        old = logps(policy, row)
        for model, ratio in zip(after, row["ratio"], strict=True):
            ratios = [math.exp(a - b) for a, b in zip(logps(model, row), old)]
            close(ratio, [math.prod(ratios) ** (1 / len(old))] * len(old), 5)
            moved = max(moved, *(abs(ratio[0] - own) for own in ratios))
    assert moved > 1e-3, "a token's own ratio is another number"


@pytest.mark.parametrize("critic_lam, shown", [(0.8, True), (1.0, False)])
def test_an_advantage_that_the_page_cannot_explain_is_left_out(critic_lam, shown):
    """Returns of a critic with a λ of its own: R − V is not the policy's advantage."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(2, 4, generator=generator) * mask for _ in range(2))
    _, ret = train_ppo.gae(reward, value, mask, 0.9, critic_lam)
    tensors = {"mask": mask, "old_value": value, "reward": reward, "ret": ret}
    found = tokens._before_whitening(tensors, 0.9, 0.8)
    assert ("adv_raw" in found) == shown


def test_every_number_of_dpo(followed, stages):
    records, seen, cfg = followed(train_dpo, steps=3)
    step, batch, (policy,) = seen[-1]
    ref = load(stages.folder / "sft/model")
    rows = records[-1]["rows"]
    assert len(rows) == 2 * len(batch["examples"]) and records[-1]["step"] == 2
    margins = []
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        for row, side in ((chosen, "chosen"), (rejected, "rejected")):
            assert row["side"] == side and row["pair"] == chosen["pair"]
            close(row["logp"], logps(policy, row))
            close(row["ref_logp"], logps(ref, row))
            close(row["entropy"], entropies(policy, row))
            close(row["log_ratio"], [a - b for a, b in zip(logps(policy, row), logps(ref, row))])
            close([row["h"]], [sum(logps(policy, row)) - sum(logps(ref, row))])
        margins.append(cfg.beta * (chosen["h"] - rejected["h"]))
    last = metrics(cfg.out)[-1]
    assert sum(margins) / len(margins) == pytest.approx(float(last["margin"]), abs=1e-3)


def test_every_number_of_a_reward_model(followed):
    records, seen, _ = followed(train_rm, steps=3)
    _, batch, (model,) = seen[-1]
    rows = records[-1]["rows"]
    assert [row["side"] for row in rows] == ["chosen", "rejected"] * 8
    for row in rows:
        prompt, *pair = batch["rows"][row["pair"]]
        response = pair[row["side"] == "rejected"]
        assert row["ids"] == prompt + response
        grown = []
        for n in range(1, len(response) + 1):  # each prefix scored on its own, as if it ended there
            ids = prompt + response[:n]
            grown.append(model.rewards(torch.tensor([ids]), torch.tensor([len(ids)])).item())
        close(row["value"], grown)
        assert row["score"] == row["value"][-1]


def test_every_number_of_sft(followed):
    records, seen, _ = followed(train_sft, steps=3)
    _, batch, (model,) = seen[-1]
    for row in records[-1]["rows"]:
        close(row["logp"], logps(model, row))
        close(row["entropy"], entropies(model, row))
    close([records[-1]["w"]], [1 / batch["mask"].sum().item()])


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_every_number_of_distillation(followed, divergence):
    records, seen, _ = followed(train_distill, steps=2, divergence=divergence, jsd_beta=0.3)
    _, _, (student, teacher) = seen[1]
    for row in records[-1]["rows"]:
        p, _ = distributions(student, row)
        q, _ = distributions(teacher, row)
        m = (0.3 * q.exp() + 0.7 * p.exp()).log()
        kl = {name: (a.exp() * (a - b)).sum(1) for name, (a, b) in
              {"reverse": (p, q), "forward": (q, p), "p": (p, m), "q": (q, m)}.items()}  # fmt: skip
        kl["jsd"] = 0.3 * kl["q"] + 0.7 * kl["p"]
        close(row["teacher_logp"], logps(teacher, row))
        close(row["log_ratio"], [a - b for a, b in zip(logps(student, row), logps(teacher, row))])
        close(row["kl"], kl["reverse"].tolist())
        close(row["divergence"], kl[divergence].tolist())


def test_distillation_from_the_teachers_samples(followed):
    """roll.logp is the teacher's: the page must show the student's own, and no ratio of the two."""
    records, seen, _ = followed(train_distill, steps=2, on_policy=False)
    _, _, (student, teacher) = seen[1]
    for row in records[-1]["rows"]:
        close(row["old_logp"], logps(student, row))
        close(row["entropy"], entropies(student, row))
        close(row["log_ratio"], [a - b for a, b in zip(logps(student, row), logps(teacher, row))])
        assert "ratio" not in row


# ------------------------------------------------------------------------------------------------------------
# the file


@EACH
def test_looking_moves_no_number_and_costs_few_passes(trainer, stages, tmp_path, monkeypatch):
    """The same metrics and weights with and without; a pass at a logged step and after its updates."""
    calls = []
    score = tokens.TokenLog._score
    monkeypatch.setattr(tokens.TokenLog, "_score", lambda self: calls.append(self.rows) or score(self))
    flags = dict(sample_every=4) if hasattr(trainer.Config, "sample_every") else {}
    for name, rows in {"with": 3, "without": 0}.items():
        trainer.train(stages.config(trainer, tmp_path / name, look_rows=rows, **flags))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert tokens.read(tmp_path / "without") == []
    records = [r for r in tokens.read(tmp_path / "with") if "rows" in r]
    logged = [0, 4, 5] if flags else [0, 5]
    assert [r["step"] for r in records] == logged
    updates = {train_ppo: 2, train_grpo: 2, train_distill: 1}.get(trainer)
    assert len(calls) == (len(logged) * (1 + updates) if updates else 0)


@pytest.mark.parametrize("flags, n_rows, recorded", [
    ({}, 256, [0, 10, 20, 22]),  # GRPO on chain: 16 of 256 rows, five times, every tenth step
    (dict(prompts_per_step=8, group_size=8, minibatches=4, sample_every=1), 64, [0, 22]),
    (dict(prompts_per_step=8, group_size=8, minibatches=1), 64, [0, 10, 20, 22]),
], ids=["chain", "real", "one update"])  # fmt: skip
def test_the_passes_are_one_percent_of_the_run_at_most(flags, n_rows, recorded, monkeypatch):
    monkeypatch.setattr(tokens, "SHARE", SHARE)
    cfg = train_grpo.Config(steps=23, **flags)
    log = tokens.TokenLog(cfg, None, None)
    logged = [step for step in range(23) if step % cfg.sample_every == 0 or step == 22]
    assert [step for step in logged if log._affordable(step, n_rows)] == recorded
    rows_scored = len(recorded[:-1]) * 16 * (1 + cfg.minibatches)
    assert rows_scored / (5 * n_rows * 20) <= 0.015  # of 20 steps; the first and the last are always there


def test_processes_that_wait_count(monkeypatch):
    """Eight share a step, and seven wait: to be one percent of the run's time a record must be rarer."""
    monkeypatch.setattr(tokens, "SHARE", SHARE)
    log = tokens.TokenLog(train_grpo.Config(steps=2000, sample_every=1), None, None)
    for size in (1, 8):
        monkeypatch.setattr(tokens.dist, "size", lambda size=size: size)
        recorded = sum(log._affordable(step, 256) for step in range(2000))
        passes = recorded * 16 * (1 + log.cfg.minibatches)  # of one row, while the others wait
        assert 0.005 < size * passes / (5 * 256 * 2000) < 0.0105


@pytest.mark.parametrize("budget, n", [(0, 16), (4096, 16), (1000, 10), (99, 1)])
def test_one_pass_takes_no_more_than_a_micro_batch(budget, n):
    """Rows of 100 tokens; of pairs, two rows each."""
    cfg = train_grpo.Config(tokens_per_microbatch=budget)
    log = tokens.TokenLog(cfg, None, None)
    assert log._few([100] * 64) == n
    assert log._few([100, 50, 7]) == min(n, 3)
    assert log._few_pairs([100] * 64) == max(1, n // 2)


@EACH
def test_a_small_micro_batch_bounds_the_rows(trainer, stages, tmp_path, monkeypatch):
    """No pass of the log has more padded tokens than a pass of training may have, but for a single row."""
    trainer.train(stages.config(trainer, tmp_path / "run", steps=1, tokens_per_microbatch=30, look_rows=16))
    for record in tokens.read(tmp_path / "run"):
        rows = record.get("rows", [])
        a_pair = 2 if trainer in (train_rm, train_dpo) else 1
        padded = len(rows) * max((len(row["ids"]) for row in rows), default=0)
        assert padded <= 30 or len(rows) == a_pair


def test_a_cut_file_is_read_up_to_the_cut_and_behind_it(tmp_path):
    records = [{"step": i, "rows": [{"ids": list(range(50))}]} for i in range(4)]
    members = [tokens.pack(record) for record in records]
    path = tmp_path / tokens.FILE
    path.write_bytes(b"".join(members))
    assert tokens.read(tmp_path) == records
    assert [json.loads(line) for line in gzip.open(path)] == records
    for length in (0, 1, 9, len(members[1]) - 1):
        path.write_bytes(members[0] + members[1][:length])
        assert tokens.read(tmp_path) == records[:1]
        path.write_bytes(members[0] + members[1][:length] + members[2] + members[3])
        assert tokens.read(tmp_path) == [records[0], records[2], records[3]]
    path.unlink()
    assert tokens.read(tmp_path) == []


def test_numbers_are_rounded_and_finite():
    assert tokens.rounded([0.123456, 123456.0, -0.0, math.nan, math.inf, 3]) == [
        0.1235, 123500.0, 0.0, None, None, 3]  # fmt: skip
    json.loads(gzip.decompress(tokens.pack({"step": 0, "x": tokens.rounded([math.nan])})))


# ------------------------------------------------------------------------------------------------------------
# the page


def data_of(path):
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@EACH
def test_each_trainer_writes_its_page(trainer, stages, tmp_path, spy):
    out = tmp_path / "run"
    diagnoses = spy(page.doctor, "diagnose")
    trainer.train(stages.config(trainer, out))
    assert len(diagnoses) == 1, "page and console say what was found once"
    text = (out / "look.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]", text.partition("<script>")[0]), "an address in the page"
    (run,) = data_of(out / "look.html")["runs"]
    assert run["trainer"] == f"{trainer.__name__}.py"
    assert [r["step"] for r in run["records"]] == [r["step"] for r in tokens.read(out) if "rows" in r]
    assert run["metrics"]["step"] == list(range(6))
    judged = trainer is not train_distill  # here without --reward, so nothing is scored
    assert bool(run["before_after"]) == judged, "held-out prompts before and after"
    for link in run["links"].values():
        file, _, number = link["text"].partition(":")
        assert (out / link["href"]).resolve() == ROOT / file
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert any(text in line for text in page.LINES[run["kind"]].values())


@EACH
@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_breaks_has_its_page(trainer, step, stages, tmp_path, capsys, monkeypatch):
    """With the tokens of the step that it broke in, whose numbers are those of the models before it."""
    check = Run.check

    def broken(self, now, loss, *more):
        return check(self, now, math.nan if now == step else loss, *more)

    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"step {step}: loss nan"):
        patch.setattr(Run, "check", broken)
        trainer.train(stages.config(trainer, tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "look.html: the run as far as it went" in printed and "doctor: " in printed
    (run,) = data_of(tmp_path / "run/look.html")["runs"]
    assert run["trainer"] == f"{trainer.__name__}.py"
    assert run["metrics"]["step"] == list(range(step))
    record = tokens.read(tmp_path / "run")[-1]
    assert record["step"] == step and run["records"][-1]["step"] == step
    name = {train_rm: "value", train_sft: "logp", train_dpo: "logp"}.get(trainer, "old_logp")
    assert all(math.isfinite(x) for row in record["rows"] for x in row[name])
    trainer.train(stages.config(trainer, tmp_path / "run", resume=True))  # the bug mended
    trainer.train(stages.config(trainer, tmp_path / "whole"))
    same_run(tmp_path / "run", tmp_path / "whole")


def test_every_formula_has_its_line():
    """The text that names a line is found in the trainer: a renamed variable shows here."""
    for kind, lines in page.LINES.items():
        for name, text in lines.items():
            assert page.line_of(f"train_{kind}.py", text), f"{kind}: {name}"


def test_kinds_are_told_by_their_columns():
    import train_prm

    for trainer in [*TRAINERS, train_prm]:
        assert page.kind_of(trainer.COLUMNS) == trainer.__name__.removeprefix("train_")
    before_gap = [name for name in train_grpo.COLUMNS if name != "gap"]  # of a run of an older version
    assert page.kind_of(before_gap) == "grpo"


def a_run(folder, steps, logged, rows, length, text="word "):
    """The files of a PPO run that was never run: every number different."""
    folder.mkdir()
    names = train_ppo.COLUMNS
    lines = [",".join(names)]
    lines += [",".join([str(i)] + [f"{i + k / 7:.6g}" for k in range(1, len(names))]) for i in range(steps)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    flags = {"kl": "k1", "clip": 0.2, "beta": 0.3, "gamma": 1.0, "lam": 0.95, "whiten_advantages": True}
    (folder / "config.json").write_text(json.dumps(flags | {"no_eos_score": -1.0}))
    generator = torch.Generator().manual_seed(0)

    def numbers():
        return tokens.rounded(torch.randn(length, generator=generator).tolist())

    quantities = "old_logp ref_logp log_ratio entropy old_value reward delta adv_raw adv ret".split()
    with open(folder / tokens.FILE, "wb") as f:
        for step in logged:
            some = []
            for i in range(rows):
                row = {name: numbers() for name in quantities} | {"ratio": [numbers(), numbers(), numbers()]}
                ids = list(range(10 + length))
                row |= {"ids": ids, "text": [text] * len(ids), "mask": "0" * 10 + "1" * length}
                row |= {"group": i, "finished": True, "score": 1.0, "update": [0], "w": [0.1] * length}
                some.append(row)
            f.write(tokens.pack({"step": step, "beta": 0.3, "rows": some}))
    return folder


@pytest.mark.parametrize("rows, length", [(16, 40), (16, 500)])
def test_200_steps_take_3_mb_at_most(rows, length, tmp_path):
    logged = list(range(0, 200, 5 if length < 100 else 50)) + [199]
    path = page.write([a_run(tmp_path / "run", 200, logged, rows, length)])
    assert Path(path).stat().st_size <= 3_000_000
    (run,) = data_of(path)["runs"]
    shown = [r["step"] for r in run["records"]]
    assert (shown[0], shown[-1]) == (0, 199) and len(shown) >= min(len(logged), 8) / 2
    left_out = len(shown) < len(logged) or len(run["records"][0]["rows"]) < rows
    assert bool(run["left_out"]) == left_out
    assert left_out or length == 40


def test_a_folder_of_runs_and_a_wrong_one(tmp_path, capsys):
    for name in ("a", "b"):
        a_run(tmp_path / name, 3, [0], 1, 5)
    answers = {"prompt": "</script>", "sft": "1", "ppo": "2", "ppo_nokl": "3"}
    (tmp_path / "before_after.jsonl").write_text(json.dumps(answers) + "\n")
    assert look.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/look.html\n"
    data = data_of(tmp_path / "look.html")
    assert {run["name"] for run in data["runs"]} == {"a", "b"}
    assert data["demo"][0]["answers"] == [[n, {"response": r}] for n, r in
                                          (("SFT", "1"), ("PPO", "2"), ("PPO, β = 0", "3"))]  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert look.main([str(tmp_path / "empty")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert look.main(["--dokter", "x"]) == 2 and "--doctor" in capsys.readouterr().err
    assert look.main([]) == 2
    assert look.main([str(tmp_path / "a"), "--doctor"]) == 0 and "finding" in capsys.readouterr().out
    assert look.main(["--doctor", "a", "b"]) == 2 and "name one run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        look.main(["--plot", "--help"])
    assert "--metric" in capsys.readouterr().out
    (tmp_path / "a/look.html.tmp").mkdir()  # an error of the file system
    assert look.main([str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError):
        page.write([tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["look.html", "look.html.tmp"])
def test_a_planted_link_is_not_followed(name, tmp_path):
    run = a_run(tmp_path / "run", 3, [0], 1, 5)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (run / name).symlink_to(precious)
    with pytest.raises(UserError, match=f"{name} is a link"):
        page.write([run])
    assert precious.read_text() == "precious"


def test_a_page_that_fails_loses_no_report(tmp_path, capsys, monkeypatch):
    """A planted link, a full disk, a damaged log: a warning of one line, and the run ends as it would."""
    run = a_run(tmp_path / "run", 3, [0], 1, 5)
    page.try_write(run)
    assert (run / "look.html").is_file() and capsys.readouterr().out == ""
    (run / "look.html").unlink()
    (run / "look.html").symlink_to(tmp_path / "elsewhere")
    page.try_write(run)
    warned = [capsys.readouterr().out]
    (run / "look.html").unlink()
    for error in (OSError(28, "No space left on device"), KeyError("ids"), ZeroDivisionError("zero")):

        def fail(folders, found, error=error):
            raise error

        monkeypatch.setattr(page, "render", fail)
        page.try_write(run)
        warned.append(capsys.readouterr().out)
    for line, reason in zip(warned, ("is a link", "No space left", "ids", "zero"), strict=True):
        assert line.startswith(f"warning: {run}/look.html could not be written (")
        assert reason in line and line.count("\n") == 1


def test_links_of_a_folder_with_any_name_and_of_a_linked_one(tmp_path):
    odd = a_run(tmp_path / "100% a#b?", 3, [0], 1, 5)
    (run,) = data_of(page.write([odd]))["runs"]
    href = run["links"]["ratio"]["href"]
    assert not set(href) & set("#? ")
    assert (odd / unquote(href)).resolve() == ROOT / "train_ppo.py"
    (tmp_path / "deep/er").mkdir(parents=True)
    linked = tmp_path / "deep/er/link"
    linked.symlink_to(odd)
    (run,) = data_of(page.write([linked]))["runs"]
    href = run["links"]["ratio"]["href"]  # a browser goes up from the address, not from where the link points
    assert os.path.normpath(linked / unquote(href)) == str(ROOT / "train_ppo.py")


def test_a_folder_of_runs_of_which_one_has_no_flags(tmp_path):
    for i, name in enumerate("ba"):
        run = a_run(tmp_path / name, 3, [0], 1, 5)
        os.utime(run / "metrics.csv", (i, i))
    (tmp_path / "b/config.json").unlink()
    assert [Path(run).name for run in page.runs_in(tmp_path)] == ["b", "a"]


def test_samples_of_training_are_no_answers_before_and_after(tmp_path):
    """samples.jsonl of PPO has the prompts of its rollouts; that of SFT the held-out ones."""
    run = a_run(tmp_path / "run", 3, [0], 1, 5)
    lines = [{"step": step, "prompt": "1+1=", "response": str(step)} for step in (0, 2)]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert page.before_and_after(run, "ppo", []) == []
    (found,) = page.before_and_after(run, "sft", [])
    assert (found["before"]["response"], found["after"]["response"]) == ("0", "2")


def test_findings_of_the_doctor_stand_in_the_page(tmp_path, monkeypatch):
    finding = {"title": "KL explodes", "steps": "3 to 5", "meaning": "m", "remedy": "r",
               "page": "docs/reading-curves.md"}  # fmt: skip
    monkeypatch.setattr(page.doctor, "findings", lambda run: [finding])
    run = a_run(tmp_path / "run", 3, [0], 1, 5)
    ((found,),) = [run["findings"] for run in data_of(page.write([run]))["runs"]]
    assert found["title"] == "KL explodes"
    assert (run / found["href"]).resolve() == ROOT / "docs/reading-curves.md"
