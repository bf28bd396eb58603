"""Reward model: the pairwise loss, where the reward is read, the bias, the pairs, what it learns."""

import json
import math

import pytest
import torch
from stages import jsonl, tastes

import train_rm
import train_sft
from nanorlhf import hub, pairs, tasks
from nanorlhf.errors import UserError
from nanorlhf.hub.files import read_jsonl
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_curves")


def load(run):
    return hub.load(run / "model")


def score(model, tok, prompt, response):
    """The reward by hand: the response alone in its batch, the head on the hidden state of EOS."""
    ids = tok.encode(prompt) + tok.encode(response) + [tok.eos_id]
    hidden = model.trunk(torch.tensor([ids]))[0, -1]
    return (model.score.weight[0].double() @ hidden.double() + model.reward_bias.double()).item()


# loss


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("margin", [-200.0, -30.0, -1.5, 0.0, 1e-3, 2.0, 30.0, 80.0, 200.0])
def test_loss_is_minus_log_sigmoid(margin, dtype, rel):
    """−log(1/(1+e^−x)) = log1p(e^−x), and its derivative −1/(1+e^x), from Python's own functions."""
    chosen = torch.tensor([margin + 3, 3.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([3.0, 3.0], dtype=dtype, requires_grad=True)  # the second pair is a tie: log 2
    loss = train_rm.pairwise_loss(chosen, rejected)
    loss.backward()
    exact = chosen[0].item() - rejected[0].item()  # as rounded to dtype
    assert loss.item() == pytest.approx((math.log1p(math.exp(-exact)) + math.log(2)) / 2, rel=rel)
    slope = [-1 / (1 + math.exp(exact)) / 2, -0.25]
    assert chosen.grad.tolist() == pytest.approx(slope, rel=rel, abs=1e-35)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slope], rel=rel, abs=1e-35)


@pytest.mark.parametrize("budget", [0, 64, 1])
def test_step_is_one_step_however_it_is_cut(budget, stages, tmp_path, gradients):
    """Both steps take all pairs and hardly move: each gradient is that of float64, one pair after another."""
    rows = [dict(prompt="ab=", chosen="a" * i, rejected="bc" * (i % 4) + "d") for i in range(9)]
    rows += [dict(prompt="bed=", chosen="a", rejected="b")]  # held out
    data = jsonl(tmp_path / "p.jsonl", rows)
    flags = dict(data=data, batch_size=9, steps=2, lr=1e-12, tokens_per_microbatch=budget)
    train_rm.train(stages.config(train_rm, tmp_path / "run", **flags))
    model, tok = load(tmp_path / "run")
    model.double().zero_grad()
    loss = 0.0
    for r in rows[:9]:
        w, l = (
            model.rewards(torch.tensor([tok.encode(r["prompt"] + r[key]) + [tok.eos_id]]), torch.tensor([n]))
            for key, n in (("chosen", 4 + len(r["chosen"])), ("rejected", 4 + len(r["rejected"])))
        )
        loss = loss + (1 + (l - w).exp()).log() / 9
    loss.sum().backward()
    exact = [p.grad for p in model.parameters()]
    scale = max(g.abs().max() for g in exact)
    assert len(gradients) == 2
    for step in gradients:
        assert all((g - e).abs().max() < 1e-5 * scale for g, e in zip(step, exact, strict=True))


# where the reward is read, and its zero


def test_reward_is_read_at_eos_and_padding_is_free(stages):
    """A pair beside a much longer one scores as it does alone, by hand, at its EOS."""
    model, tok = load(stages.folder / "rm")
    rows = [dict(prompt="ab=", chosen="ba", rejected=""), dict(prompt="c=", chosen="abcabcabc", rejected="d")]
    triples = pairs.encode_pairs(rows, tok, 16, "training")
    sides = [p + y for p, *pair in triples for y in pair]
    assert all(side[-1] == tok.eos_id and tok.eos_id not in side[:-1] for side in sides)
    together = torch.stack(train_rm.pair_rewards(model, triples)).detach()
    for i, row in enumerate(rows):
        by_hand = [score(model, tok, row["prompt"], row[key]) for key in ("chosen", "rejected")]
        alone = [r.item() for r in train_rm.pair_rewards(model, triples[i : i + 1])]
        assert together[:, i].tolist() == pytest.approx(by_hand, abs=1e-5)
        assert alone == pytest.approx(by_hand, abs=1e-5)
    assert together[0, 0] != together[1, 0]


@pytest.mark.parametrize("kind", ["chosen", "references"])
def test_references_score_zero_on_average_and_the_folder_keeps_it(kind, stages, tmp_path):
    """One by one, by hand, from the saved model; the bias is not at 0, so normalising did something."""
    data = read_jsonl(stages.flags(train_rm, "")["data"], pairs.KEYS)
    rows = [(r["prompt"], r["chosen"]) for r in data if not tasks.held_out(r["prompt"])]
    flags = {}
    if kind == "references":
        rows = [("ab=", "f" * i) for i in range(7)]
        flags = {"references": jsonl(tmp_path / "r.jsonl", [dict(prompt=p, response=y) for p, y in rows])}
    last = train_rm.train(stages.config(train_rm, tmp_path / "run", **flags))
    model, tok = load(tmp_path / "run")
    assert abs(sum(score(model, tok, *row) for row in rows) / len(rows)) < 1e-5
    assert abs(last["eval/reward_reference"]) < 1e-5 and abs(model.reward_bias) > 1e-2


def test_normalising_shifts_and_does_not_scale(stages):
    model, tok = load(stages.folder / "rm")
    rows = [dict(prompt="ab=", chosen="ba", rejected="f")]
    triples = pairs.encode_pairs(rows, tok, 16, "training")
    before = torch.stack(train_rm.pair_rewards(model, triples))
    train_rm.normalise(model, [p + w for p, w, _ in triples])
    shift = torch.stack(train_rm.pair_rewards(model, triples)) - before
    assert torch.allclose(shift, -before[0].expand(2, 1), atol=1e-6)


def test_trunk_starts_from_the_sft_model(stages, tmp_path):
    train_rm.train(stages.config(train_rm, tmp_path / "run", lr=1e-12, steps=1))
    rm, sft = load(tmp_path / "run")[0].trunk.state_dict(), load(stages.folder / "sft")[0].state_dict()
    assert rm.keys() == sft.keys() and all(torch.allclose(rm[k], sft[k], atol=1e-9) for k in rm)


# measuring


@pytest.mark.parametrize(
    "train, test, accuracy",
    [
        ([(3, 1), (3, 1), (1, 3)], [(2, 1), (2, 1), (2, 1), (1, 2)], 0.75),  # longer wins in training
        ([(1, 3), (1, 3), (3, 1)], [(2, 1), (2, 1), (2, 1), (1, 2)], 0.25),  # shorter wins there
        ([(1, 3)], [(1, 2), (5, 9)], 1.0),
        ([(3, 1)], [(2, 2), (2, 2), (2, 1), (1, 2)], 0.5),  # a tie is a coin
    ],
)
def test_length_only(train, test, accuracy):
    rows = [[([1], [0] * w, [0] * l) for w, l in part] for part in (train, test)]
    assert train_rm.length_only(*rows) == accuracy


def test_accuracy_is_that_of_the_saved_model(stages, tmp_path):
    last = train_rm.train(stages.config(train_rm, tmp_path / "run", steps=2))
    model, tok = load(tmp_path / "run")
    rows = [r for r in read_jsonl(stages.flags(train_rm, "")["data"], ()) if tasks.held_out(r["prompt"])]
    margins = [score(model, tok, r["prompt"], r["chosen"]) - score(model, tok, r["prompt"], r["rejected"])
               for r in rows]  # fmt: skip
    right = sum(m > 0 for m in margins)
    assert 0 < right < len(rows) and last["eval/acc"] == pytest.approx(right / len(rows))
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / len(rows)
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-4)


def test_samples_are_held_out_pairs_with_the_rewards_of_the_saved_model(stages, tmp_path):
    """At each evaluation the same four pairs, chosen first; at the last one, the bias is set already."""
    train_rm.train(stages.config(train_rm, tmp_path / "run", eval_every=3))
    model, tok = load(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    rows = [r for r in read_jsonl(stages.flags(train_rm, "")["data"], ()) if tasks.held_out(r["prompt"])][:4]
    shown = [(r["prompt"], r[key]) for r in rows for key in ("chosen", "rejected")]
    assert [(s["prompt"], s["response"]) for s in lines] == shown * 2
    assert [s["step"] for s in lines] == [2] * 8 + [5] * 8
    assert [s["reward"] for s in lines[8:]] == pytest.approx([score(model, tok, *p) for p in shown], abs=1e-3)
    assert lines[0]["reward"] != lines[8]["reward"]


# pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on reviews that makes its own pairs, with a gold that raises as soon as they are made."""
    folder, make = tmp_path_factory.mktemp("made"), pairs.make_pairs

    def make_then_forbid(*args):
        paths = make(*args)
        for name in ("gold", "gold_parts", "prefer"):
            monkeypatch.setattr(tasks, name, lambda *args: pytest.fail("gold was read in training"))
        return paths

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("nanorlhf.look.plots.pyplot", lambda: None)
        monkeypatch.setattr(pairs, "make_pairs", make_then_forbid)
        size = dict(n_layer=1, d_model=32, demos=400, max_len=96, steps=60, batch_size=16, lr=0.02)
        train_sft.train(train_sft.Config(out=f"{folder}/sft", eval_every=0, **size))
        flags = dict(init=f"{folder}/sft/model", pairs=300, steps=2, batch_size=8)
        train_rm.train(train_rm.Config(out=f"{folder}/run", **flags))
    return [read_jsonl(f"{folder}/run/{name}.jsonl", pairs.KEYS) for name in ("pairs", "pairs_heldout")]


def gap(row):
    return tasks.gold(row["prompt"], row["chosen"]) - tasks.gold(row["prompt"], row["rejected"])


def test_gold_is_read_only_while_pairs_are_made(made):
    """The fixture's gold raised from then on, and training went on; the prompts never meet."""
    train, test = made
    assert len(train) > 200 and not any(tasks.held_out(r["prompt"]) for r in train)
    assert len(test) > 200 and all(tasks.held_out(r["prompt"]) for r in test)


def test_held_out_pairs_stand_in_the_exact_order_of_gold(made):
    assert all(gap(r) > 0 for r in made[1])


def test_training_labels_are_a_bradley_terry_draw(made):
    """Of the pairs that gold tells apart, as many are in its order as Σ σ(gap/tau) says, within 4 sigma."""
    p = [1 / (1 + math.exp(-abs(gap(r)) / 0.5)) for r in made[0] if gap(r)]
    right = sum(gap(r) > 0 for r in made[0])
    assert abs(right - sum(p)) < 4 * math.sqrt(sum(x * (1 - x) for x in p)) and sum(p) < 0.97 * len(p)


def test_unusable_pairs_are_dropped_and_counted(capsys):
    tok = Tokenizer.from_chars("ab=")
    texts = [("a", "b"), ("a", "a"), ("a", "bbbb"), ("aaaa", "b"), ("", "a"), ("aaaaa", "aaaaa")]
    rows = [dict(prompt="b=", chosen=w, rejected=l) for w, l in texts]
    triples = pairs.encode_pairs(rows, tok, 6, "training")
    assert triples == [([1, 2], [0, 3], [1, 3]), ([1, 2], [3], [0, 3])]
    says = "dropped 4 of 6 training pairs: 2 with equal responses, 2 longer than the context of 6 tokens"
    assert says in capsys.readouterr().out


# learning


@pytest.mark.parametrize("sign, low, high", [(1, 0.9, 1.0), (-1, 0.0, 0.4)])
def test_learns_a_preference_that_depends_on_the_prompt(sign, low, high, tmp_path, monkeypatch):
    torch.manual_seed(0)
    tok = Tokenizer.from_chars("+-abcdef:xy")
    size = dict(n_layer=1, n_head=2, d_model=32, max_len=16)
    hub.save(GPT(GPTConfig.gpt2(tok.vocab_size, **size)), tok, tmp_path / "init")
    right = train_rm.pairwise_loss
    monkeypatch.setattr(train_rm, "pairwise_loss", lambda *args: sign * right(*args))
    data = jsonl(tmp_path / "p.jsonl", tastes(1500))
    flags = dict(steps=100, batch_size=64, lr=3e-3, save_every=0, eval_every=0, threads=1)
    flags |= dict(data=data, init=f"{tmp_path}/init", out=f"{tmp_path}/run")
    last = train_rm.train(train_rm.Config(**flags))
    assert low <= last["eval/acc"] <= high and abs(last["eval/acc_len_only"] - 0.5) < 0.1


# bad input


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(init="nothing"), "nothing does not exist$"),
        (dict(init="rm"), "is a reward model, must be a language model"),
        (dict(task="chain", data=""), "has a reward function, no preferences"),
        (dict(data=[dict(prompt="a=", chosen="b")]), 'jsonl:1: missing key "rejected"'),
        (dict(data=[dict(prompt="a=", chosen="b", rejected="!")]), "jsonl:1: .*character '!'"),
        (dict(data=[dict(prompt="a=", chosen="b", rejected="b")]), "1 of 1 training pairs have equal"),
        (dict(data=[dict(prompt="bed=", chosen="b", rejected="a")]), "0 training and 1 held-out pairs"),
        (dict(references=[dict(prompt="a=", response="b" * 20)]), "--references: all 1 .* longer than .* 16"),
        (dict(references=[dict(prompt="a=")]), '--references: .*jsonl:1: missing key "response"'),
    ],
)  # fmt: skip
def test_bad_input_is_named(flags, says, stages, tmp_path):
    for name, value in flags.items():
        if isinstance(value, list):
            flags = flags | {name: jsonl(tmp_path / "x.jsonl", value)}
        elif name == "init":
            flags = flags | {name: f"{stages.folder}/{value}" + "/model" * (value == "rm")}
    with pytest.raises(UserError, match=says):
        train_rm.train(stages.config(train_rm, tmp_path / "run", **flags))


def test_one_row_a_step_with_the_columns_of_the_contract(stages, tmp_path):
    train_rm.train(stages.config(train_rm, tmp_path / "run", eval_every=3))
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert lines[0].split(",") == train_rm.COLUMNS and [int(r["step"]) for r in rows] == list(range(6))
    assert [bool(r["eval/acc_len_only"]) for r in rows] == [False, False, True] * 2
    assert [bool(r["eval/reward_reference"]) for r in rows] == [False] * 5 + [True]
