"""The rollout: its invariants, its responses, and the cutting into micro-batches."""

import pytest
import torch
from helpers import V, randint, tiny

from nanorlhf.generate import generate
from nanorlhf.model import ScalarModel
from nanorlhf.rollout import Rollout

EOS = 3


def fields(**change):
    """Three rows by hand: ended by EOS, cut, and an EOS at once; in the last two the prompt holds an EOS."""
    tokens = [[1, 2, 5, 6, EOS, 0, 0], [EOS, 7, 8, 9, 4, 5, 6], [4, EOS, 5, EOS, 0, 0, 0]]
    mask = [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]]
    good = dict(
        tokens=torch.tensor(tokens),
        mask=torch.tensor(mask).bool(),
        logp=-0.5 * torch.tensor(mask),
        finished=torch.tensor([True, False, True]),
        group=torch.tensor([0, 1, 1]),
        prompt_len=torch.tensor([2, 3, 3]),
    )
    return good | {name: f(good[name]) for name, f in change.items()}


def put(row, col, value):
    def change(x):
        x = x.clone()
        x[row, col] = value
        return x

    return change


BROKEN = {
    "mask with a hole": dict(mask=put(0, 3, False), logp=put(0, 3, 0)),
    "mask on the prompt": dict(mask=put(1, 2, True)),
    "mask off the first token": dict(mask=put(0, 2, False), logp=put(0, 2, 0)),
    "mask behind the end": dict(mask=put(0, 6, True)),
    "log-prob outside the mask": dict(logp=put(0, 5, -1.0)),
    "log-prob on the prompt": dict(logp=put(2, 0, -1.0)),
    "log-prob NaN on a pad": dict(logp=put(2, 6, float("nan"))),
    "prompt length off by one": dict(prompt_len=lambda x: x + torch.tensor([0, 1, 0])),
    "mask of ints": dict(mask=torch.Tensor.long),
    "mask one column short": dict(mask=lambda x: x[:, :-1]),
    "log-probs one column short": dict(logp=lambda x: x[:, :-1]),
    "log-probs one row short": dict(logp=lambda x: x[:-1]),
    "finished one row short": dict(finished=lambda x: x[:-1]),
    "group per token": dict(group=lambda x: x[:, None]),
    "prompt length a number": dict(prompt_len=lambda x: x[0]),
}


def test_a_good_rollout():
    """Lengths, and responses without the EOS that was sampled: prompts' EOS and pads are never looked at."""
    roll = Rollout(**fields())
    assert roll.response_len.tolist() == [3, 4, 1] and roll.lengths.tolist() == [5, 7, 4]
    assert roll.responses() == [[5, 6], [9, 4, 5, 6], []]
    pads = Rollout(**fields(tokens=put(0, 5, EOS)))  # whatever stands right of the mask
    assert pads.responses() == roll.responses()


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_invariants_are_caught(change):
    with pytest.raises(AssertionError):
        Rollout(**fields(**change))


@pytest.fixture(scope="module")
def sampled():
    """A policy and 24 ragged rows sampled from it, of 4 to 14 tokens."""
    model = tiny("llama-gqa-untied")
    prompts = [randint(V, n, seed=n).tolist() for n in (3, 1, 6, 2)]
    return model, generate(model, prompts, n=6, max_new_tokens=8, eos_id=EOS)


def carried(**more):
    """The three rows with the prompts' rows, texts and rewards beside them."""
    return Rollout(
        **fields(),
        rows=[{"prompt": name} for name in "abb"],
        texts=["x", "y", "z"],
        reward=torch.tensor([1.0, 2.0, 3.0]),
        reward_parts=torch.tensor([[0.5], [1.0], [1.5]]),
        **more,
    )


def test_select_carries_everything():
    """Each row keeps its own prompt, text and reward; groups are numbered anew."""
    roll = carried().select(torch.tensor([2, 1]))
    assert roll.texts == ["z", "y"] and [row["prompt"] for row in roll.rows] == ["b", "b"]
    assert roll.reward.tolist() == [3, 2] and roll.reward_parts.tolist() == [[1.5], [1]]
    assert roll.group.tolist() == [0, 0] and roll.prompt_len.tolist() == [3, 3]


def test_cat_carries_everything():
    """Groups of different rollouts stay apart, and what is shorter is padded."""
    short = carried().select(torch.tensor([0]))
    narrow = {name: getattr(short, name)[:, :5] for name in ("tokens", "mask", "logp")}
    short = Rollout(**vars(short) | narrow)
    roll = Rollout.cat([short, carried()])
    assert roll.texts == ["x", "x", "y", "z"] and len(roll) == len(roll.rows) == 4
    assert roll.reward.tolist() == [1, 1, 2, 3] and roll.reward_parts[:, 0].tolist() == [0.5, 0.5, 1, 1.5]
    assert roll.group.tolist() == [0, 1, 2, 2] and roll.tokens[0].tolist() == [1, 2, 5, 6, EOS, 0, 0]


@pytest.mark.parametrize("budget", [0, 1, 20, 64])
def test_per_token_equals_one_big_call(sampled, budget):
    """Scored in any cut, log-probs and values stand where one call on everything puts them; no gradient."""
    model, roll = sampled
    torch.manual_seed(0)
    for fn in (lambda x, m: model.logprobs(x, m)[0], ScalarModel(model).values):
        got, want = roll.per_token(fn, budget), fn(roll.tokens, roll.mask)
        assert got.shape == roll.mask.shape and not got.requires_grad
        assert (got - want).abs().max() < 1e-5 and want.abs().max() > 0.1
        assert torch.equal(got != 0, roll.mask)


def test_per_token_gives_fn_no_more_than_it_needs(sampled):
    """Each micro-batch is cut to its own longest row: pads cost as little as they can."""
    _, roll = sampled
    shapes = []
    roll.per_token(lambda x, m: shapes.append(x.shape) or m.float(), 20)
    assert sum(b for b, _ in shapes) == 24 and len({T for _, T in shapes}) > 3
    assert sum(b * T for b, T in shapes) < roll.tokens.numel()
