"""Process reward model: the loss of every labelled step, the product that is the reward, what it learns."""

import json
import random

import pytest
import torch
from runs import Crash, crash, same_run
from stages import jsonl

import train_prm
from nanorlhf import hub
from nanorlhf.data import pad, response_mask
from nanorlhf.errors import UserError
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.rewards import score_responses
from nanorlhf.rollout import Rollout
from nanorlhf.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_curves")


def load(run):
    return hub.load(run / "model")


JUDGED = [
    dict(prompt="ab=", response="bcadbb", labels=[1, None, 0, 1, 0]),  # b, d, b, b, and EOS
    dict(prompt="bd=", response="", labels=[0]),
    dict(prompt="da=", response="acaaaaca", labels=[1]),
    dict(prompt="abcdef=", response="db", labels=[None, None, None]),
    dict(prompt="bed=", response="b", labels=[1, 0]),  # held out
]


def by_hand(model, tok, row, ends="bd"):
    """The logits at the ends of the steps: the response alone in its batch, in float64."""
    ids = tok.encode(row["prompt"] + row["response"]) + [tok.eos_id]
    logit = model.double().trunk(torch.tensor([ids]))[0] @ model.score.weight[0]
    places = [i for i, letter in enumerate(row["response"]) if letter in ends] + [len(row["response"])]
    return logit[[len(row["prompt"]) + i for i in places]]


@pytest.mark.parametrize("budget", [0, 1])
def test_process_loss_is_that_of_every_labelled_step(budget, stages, tmp_path, gradients):
    """−Σ log σ(±logit) over the labels that are not null, by their number; its gradient; what is logged."""
    data = jsonl(tmp_path / "p.jsonl", JUDGED)
    flags = dict(step_end="bd", data=data, batch_size=4, steps=1, lr=1e-12)
    last = train_prm.train(stages.config(train_prm, tmp_path / "run", tokens_per_microbatch=budget, **flags))
    model, tok = load(tmp_path / "run")
    model.double().zero_grad()
    signed = {}
    for row in JUDGED:
        pairs = zip(by_hand(model, tok, row), row["labels"], strict=True)
        signed[row["prompt"]] = [z if label else -z for z, label in pairs if label is not None]
    held_out = torch.stack(signed.pop("bed="))
    margins = torch.stack(sum(signed.values(), []))
    loss = (1 + (-margins).exp()).log().mean()
    loss.backward()
    scale = max(p.grad.abs().max() for p in model.parameters())
    assert all((g - p.grad).abs().max() < 1e-5 * scale for g, p in zip(gradients[0], model.parameters()))
    assert len(margins) == 6 and last["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert last["acc"] == pytest.approx((margins > 0).double().mean().item())
    assert last["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    exact = (1 + (-held_out).exp()).log().mean().item()
    assert last["eval/loss"] == pytest.approx(exact, rel=1e-5)
    assert model.reward_bias == 0 and "eval/reward_reference" not in last


@pytest.mark.parametrize("kind, ends", [("process", "bd"), ("outcome", "")])
def test_reward_is_the_product_over_the_steps(kind, ends, stages, tmp_path):
    """Of the saved model, in one batch; the prompt's letters end no step, the end of a cut response does."""
    rows = [r if kind == "process" else r | {"labels": r["labels"][-1:]} for r in JUDGED]
    data = jsonl(tmp_path / "p.jsonl", rows)
    train_prm.train(stages.config(train_prm, tmp_path / "run", kind=kind, step_end=ends, data=data))
    model, tok = load(tmp_path / "run")
    assert model.step_ids == [tok.encode(letter)[0] for letter in ends]
    ids = [tok.encode(r["prompt"] + r["response"]) + [tok.eos_id] for r in JUDGED] + [tok.encode("ab=bca")]
    tokens, lengths = pad(ids, tok.pad_id)
    prompt = torch.tensor([len(r["prompt"]) for r in JUDGED] + [3])
    mask = response_mask(prompt, lengths, tokens.shape[1])
    finished, group = torch.tensor([True] * 5 + [False]), torch.arange(6)
    roll = Rollout(tokens, mask, torch.zeros(tokens.shape), finished, group, prompt)
    found = score_responses(roll, model, None)
    assert found.tolist() == model.process_rewards(tokens, mask).tolist()
    logits = [by_hand(model, tok, row, ends) for row in JUDGED]
    cut = model.trunk(tokens[5:, :6])[0] @ model.score.weight[0]
    logits.append(cut[[3, 5] if ends else [5]])
    assert found.tolist() == pytest.approx([z.sigmoid().prod().item() for z in logits], rel=1e-4)
    assert len(set(found.tolist())) == 6
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert lines[-1]["response"] == "b" and lines[-1]["reward"] == pytest.approx(found[4].item(), abs=1e-3)


@pytest.mark.parametrize("sign, low, high", [(1, 0.9, 1), (-1, 0, 0.6)])
def test_learns_which_step_is_wrong(sign, low, high, tmp_path, monkeypatch):
    """A copy of the prompt with some letters replaced: a label is the prompt's and its own letter's."""
    torch.manual_seed(0)
    tok, rng, rows = Tokenizer.from_chars("abcd="), random.Random(0), []
    for _ in range(1500):
        word, other = ("".join(rng.choices("abcd", k=4)) for _ in range(2))
        copy = "".join(rng.choice(pair) for pair in zip(word, other))
        labels = [int(x == y) for x, y in zip(word, copy)]
        rows.append(dict(prompt=f"{word}=", response=copy, labels=[*labels, int(word == copy)]))
    hub.save(GPT(GPTConfig.gpt2(tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_len=16)), tok,
             tmp_path / "init")
    right = train_prm.step_loss
    monkeypatch.setattr(train_prm, "step_loss", lambda *args: sign * right(*args))
    flags = dict(step_end="abcd", data=jsonl(tmp_path / "p.jsonl", rows), steps=100)
    flags |= dict(batch_size=64, lr=5e-3, save_every=0, eval_every=0, threads=1, init=f"{tmp_path}/init")
    last = train_prm.train(train_prm.Config(**flags, out=f"{tmp_path}/run"))
    assert low <= last["eval/acc"] <= high


# bad input


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(kind="outcome", data=""), "--kind outcome: give --data, with labels"),
        (dict(kind="outcome", step_end="b"), "--step_end: belongs to --kind process"),
        (dict(kind="outcome", data=[dict(prompt="a=", response="b")]), '"labels" is None, expected 1 of 1'),
        (dict(kind="process", step_end="b", data=[dict(prompt="a=", response="b", labels=[1])]),
         r'jsonl:1: "labels" is \[1\], expected 2 of 1, 0, null'),
        (dict(kind="outcome", data=[dict(prompt="a=", response="b", labels=[[2]])]), r"\[\[2\]\], exp"),
        (dict(kind="outcome", data=[dict(prompt="a=", response="b", labels=[None])]), "0 labels are left"),
    ],
)  # fmt: skip
def test_bad_input_is_named(flags, says, stages, tmp_path):
    if isinstance(flags.get("data"), list):
        flags = flags | {"data": jsonl(tmp_path / "x.jsonl", flags["data"])}
    with pytest.raises(UserError, match=says):
        train_prm.train(stages.config(train_prm, tmp_path / "run", **flags))


def test_one_row_a_step_with_its_columns(stages, tmp_path):
    data = jsonl(tmp_path / "p.jsonl", JUDGED)
    train_prm.train(stages.config(train_prm, tmp_path / "run", step_end="bd", data=data, eval_every=3))
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert lines[0].split(",") == train_prm.COLUMNS and [int(r["step"]) for r in rows] == list(range(6))
    assert [bool(r["eval/acc"]) for r in rows] == [False, False, True] * 2


def test_a_killed_run_goes_on_bit_for_bit(stages, tmp_path, monkeypatch):
    flags = dict(step_end="bd", data=jsonl(tmp_path / "p.jsonl", JUDGED))
    train_prm.train(stages.config(train_prm, tmp_path / "whole", **flags))
    gradient, calls = train_prm.gradient, []

    def until_the_fourth_step(*args):
        calls.append(args)
        return gradient(*args) if len(calls) < 4 else crash()

    monkeypatch.setattr(train_prm, "gradient", until_the_fourth_step)
    with pytest.raises(Crash):
        train_prm.train(stages.config(train_prm, tmp_path / "killed", **flags))
    monkeypatch.undo()
    train_prm.train(stages.config(train_prm, tmp_path / "killed", resume=True, **flags))
    same_run(tmp_path / "whole", tmp_path / "killed")
