"""The trainers from Python: what train() returns, rewards that are functions, --eval_data, a cell."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from runs import EACH, metrics
from stages import jsonl, rows_of, words

import train_dpo
import train_grpo
import train_prm
import train_rm
import train_sft
from nanorlhf import hub, tasks
from nanorlhf.errors import UserError
from nanorlhf.rewards import load_prompts
from nanorlhf.run.log import Result
from nanorlhf.run.worker import Rewards
from nanorlhf.tokenizer import Tokenizer

# what train() returns


@EACH
def test_train_returns_the_rows_of_the_run(trainer, stages, tmp_path, no_curves):
    """A dict of the last figures; .rows has every cell of metrics.csv, as a number or None."""
    out = trainer.train(stages.config(trainer, tmp_path / "run"))
    assert isinstance(out, dict) and out.path == str(tmp_path / "run")
    assert [row["step"] for row in out.rows] == list(range(6))
    with open(tmp_path / "run/metrics.csv", newline="") as f:
        table = list(csv.DictReader(f))
    for row, line in zip(out.rows, table, strict=True):
        assert row.keys() == line.keys()
        shown = {name: "" if x is None else f"{x:.6g}" for name, x in row.items()}
        assert shown == line
    last = {name: x for name, x in out.rows[-1].items() if x is not None and name != "step"}
    assert last and all(f"{out[name]:.6g}" == f"{x:.6g}" for name, x in last.items())
    assert json.loads(json.dumps(out)) == out


def test_a_resumed_run_has_the_rows_of_all_of_it(stages, tmp_path, no_curves):
    whole = train_sft.train(stages.config(train_sft, tmp_path / "whole"))
    train_sft.train(stages.config(train_sft, tmp_path / "run", steps=4))
    with open(tmp_path / "run/metrics.csv", "a") as f:
        f.write("4,0.5,")  # torn by a crash after the checkpoint
    out = train_sft.train(stages.config(train_sft, tmp_path / "run", steps=6, resume=True))
    assert [row["step"] for row in out.rows] == list(range(6)) and out.path == str(tmp_path / "run")
    assert [row.keys() for row in out.rows] == [row.keys() for row in whole.rows]
    assert out.rows[0]["loss"] == whole.rows[0]["loss"]
    assert [f"{row['loss']:.6g}" for row in out.rows] == [line["loss"] for line in metrics(tmp_path / "run")]
    again = train_sft.train(stages.config(train_sft, tmp_path / "run", steps=6, resume=True))  # nothing to do
    assert [row["step"] for row in again.rows] == list(range(6)) and again.keys() == out.keys()


def test_a_result_is_a_dict_like_any_other():
    assert Result(loss=1.0) == {"loss": 1.0} and Result().rows == () and Result().path == ""


# a notebook

CELL = """
import train_grpo

def f(prompt, response, row):
    calls.append(row)
    return response.count("a") / 3

out = train_grpo.train(train_grpo.Config(**flags, reward=[f]))
"""


def test_a_cell_with_its_own_reward(stages, tmp_path, no_curves, capsys):
    """As a cell runs: exec, without a file. The function sees the rows, and config.json has its name."""
    flags = stages.flags(train_grpo, tmp_path / "run", steps=2, rm="")
    cell = dict(calls=[], flags=flags, __name__="__main__")
    exec(CELL, cell)
    out = cell["out"]
    assert [row["step"] for row in out.rows] == [0, 1]
    assert out.rows[1]["reward"] == pytest.approx(out["reward"], rel=1e-5)
    assert "reward_failed" not in out and not any(key.startswith("_") for row in cell["calls"] for key in row)
    assert json.loads((tmp_path / "run/config.json").read_text())["reward"] == ["f"]
    assert capsys.readouterr().out.count("reward f is called in this process") == 1
    flags |= dict(steps=3, resume=True)
    exec(CELL, cell)
    assert "--reward was" not in capsys.readouterr().out and len(cell["out"].rows) == 3


def test_the_function_and_the_file_are_one_reward(stages, tmp_path, no_curves):
    """The same numbers whether a function runs here or, from a file, in its own process."""
    (tmp_path / "r.py").write_text("def f(prompt, response): return response.count('a') / 3\n")
    runs = []
    for reward in (lambda prompt, response: response.count("a") / 3), f"{tmp_path}/r.py:f":
        out = tmp_path / f"run{len(runs)}"
        more = dict(rm="", reward=[reward], reward_timeout=60.0, steps=2)
        runs.append(train_grpo.train(stages.config(train_grpo, out, **more)).rows)
    for row in runs[0] + runs[1]:
        del row["s"], row["tok_s"], row["reward_failed"]
    assert runs[0] == runs[1]


def test_a_reward_that_lacks_a_key_stops_before_the_run(stages, tmp_path):
    def f(prompt, response, answer):
        return 0.0

    cfg = stages.config(train_grpo, tmp_path / "run", rm="", reward=[f])
    with pytest.raises(UserError, match=r"train_grpo.jsonl:[12]: reward f takes neither .*has no answer"):
        train_grpo.train(cfg)
    assert not (tmp_path / "run").exists()


# --eval_data


def test_eval_data_is_measured_in_place_of_a_share_of_the_data(stages, tmp_path, no_curves, capsys):
    """All rows of --data train, all rows of the other file are scored."""
    held_out = ["bad=", "fed=", "ace="]
    path = jsonl(tmp_path / "e.jsonl", [{"prompt": prompt} for prompt in held_out])
    trained, measured = [], []

    def f(prompt, response):
        (measured if prompt in held_out else trained).append(prompt)
        return 0.0

    data = [row for row in rows_of(train_grpo, 40) if row["prompt"] not in held_out]
    more = dict(data=jsonl(tmp_path / "d.jsonl", data), rm="", reward=[f], prompts_per_step=40, steps=1)
    out = train_grpo.train(stages.config(train_grpo, tmp_path / "run", eval_data=path, **more))
    assert measured == 4 * held_out  # sampled and greedy, before and after
    assert set(trained) == {row["prompt"] for row in data} and any(map(tasks.held_out, trained))
    assert out["eval/reward"] == 0.0
    said = capsys.readouterr().out
    assert f"{path}: 3 rows of prompt" in said and "held out (3 prompts)" in said and "warning" not in said


def test_eval_data_is_measured_whole(stages, tmp_path, no_curves, capsys):
    """All 150 rows, where of a share of --data 128 would be; --eval_prompts takes fewer."""
    path = jsonl(tmp_path / "e.jsonl", words(150, seed=1))
    more = dict(rm="", reward=[lambda prompt, response: 0.0], steps=1)
    flags = stages.flags(train_grpo, tmp_path / "run", eval_data=path, **more)
    del flags["eval_prompts"]
    train_grpo.train(train_grpo.Config(**flags))
    assert "held out (150 prompts)" in capsys.readouterr().out
    train_grpo.train(train_grpo.Config(**flags | dict(eval_prompts=5, overwrite=True)))
    assert "held out (5 prompts)" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", [train_sft, train_rm, train_dpo], ids=lambda t: t.__name__)
def test_every_trainer_takes_eval_data(trainer, stages, tmp_path, no_curves, capsys):
    rows = rows_of(trainer, 40)
    path = jsonl(tmp_path / "e.jsonl", rows[:7])
    data = jsonl(tmp_path / "d.jsonl", rows[5:])
    out = trainer.train(stages.config(trainer, tmp_path / "run", data=data, eval_data=path, steps=1))
    own = trainer.train(stages.config(trainer, tmp_path / "own", data=data, steps=1))
    column = "logp_chosen" if trainer is train_dpo else "loss"  # DPO's first loss is log 2 with any rows
    assert out["eval/loss"] != own["eval/loss"] and out[column] != own[column]
    both = len({row["prompt"] for row in rows[:5]} & {row["prompt"] for row in rows[5:]})
    said = capsys.readouterr().out
    assert f"warning: {2 + both} of 7 prompts of {path} are in {data} too" in said


def test_labelled_steps_of_eval_data(tmp_path):
    tok = Tokenizer.from_chars("abcdef=")
    letters = "abcdef"
    rows = [{"prompt": f"{letter}=", "response": "ab", "labels": [1]} for letter in letters]
    data = jsonl(tmp_path / "d.jsonl", rows)
    held_out = jsonl(tmp_path / "e.jsonl", [{"prompt": "ff=", "response": "a", "labels": [0]}])
    cfg = train_prm.Config(data=data, eval_data=held_out)
    train, test = train_prm.load_judged(cfg, tok, [], 9)
    assert [row[0] for row in train] == [tok.encode(f"{letter}=") for letter in letters]
    assert test == [(tok.encode("ff="), [0, tok.eos_id], [-1, -1, -1, -1, 0])]


def test_the_held_out_loss_is_that_of_the_file(stages, tmp_path, no_curves):
    """By hand, of the model that SFT leaves: the mean over all response tokens of the file."""
    rows = rows_of(train_sft, 300)
    path = jsonl(tmp_path / "e.jsonl", rows)
    out = train_sft.train(stages.config(train_sft, tmp_path / "run", eval_data=path, steps=2))
    model, tok = hub.load(tmp_path / "run/model")
    total, n = 0.0, 0
    with torch.no_grad():
        for row in rows:
            prompt, response = tok.encode(row["prompt"]), [*tok.encode(row["response"]), tok.eos_id]
            logp = model.logits(torch.tensor([prompt + response]))[0].log_softmax(-1)
            for i, token in enumerate(response):
                total -= logp[len(prompt) + i - 1, token].item()
            n += len(response)
    assert out["eval/loss"] == pytest.approx(total / n, rel=1e-4)


def test_eval_data_needs_data_and_is_named_in_its_errors(stages, tmp_path):
    with pytest.raises(UserError, match="^--eval_data e.jsonl: needs --data"):
        train_sft.Config(eval_data="e.jsonl")
    path = jsonl(tmp_path / "e.jsonl", [{"prompt": "a=", "response": "a"}, {"prompt": 3, "response": "a"}])
    for trainer in (train_sft, train_prm):
        data = f"{stages.folder}/train_sft.jsonl"
        cfg = stages.config(trainer, tmp_path / "run", data=data, eval_data=path)
        with pytest.raises(UserError, match='^--eval_data: .*e.jsonl:2: "prompt" is a number'):
            (train_sft.load_demonstrations(cfg, None) if trainer is train_sft else
             train_prm.load_judged(cfg, None, [], 9))  # fmt: skip


def test_the_prompts_that_eval_prompts_leaves_out_are_counted(tmp_path, capsys):
    tok = Tokenizer.from_chars("abcdef=")
    data = jsonl(tmp_path / "d.jsonl", [{"prompt": "a="}])
    held_out = jsonl(tmp_path / "e.jsonl", [{"prompt": f"{letter}="} for letter in "bcdef"])
    cfg = SimpleNamespace(data=data, eval_data=held_out, skip_bad_rows=False, seed=0, eval_prompts=3,
                          own_data=False)  # fmt: skip
    train, test = load_prompts(cfg, tasks.get("reviews"), tok, 12, 5, Rewards([]))
    assert [[row["prompt"] for row in rows] for rows in (train, test)] == [["a="], ["b=", "c=", "d="]]
    assert "held out: the first 3 of 5 prompts are used (--eval_prompts)" in capsys.readouterr().out
