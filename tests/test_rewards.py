"""Rewards of whole responses: a function's errors, sums, the reward model's place; which prompts are kept."""

import re
from types import SimpleNamespace

import pytest
import torch
from stages import words

from nanorlhf import generate, hub, tasks
from nanorlhf.common import RunError, UserError
from nanorlhf.data import write_jsonl
from nanorlhf.rewards import call_reward, evaluate, load_prompts, score_responses
from nanorlhf.tokenizer import Tokenizer

TOK = Tokenizer.from_chars("abcdef=")


@pytest.fixture(scope="module")
def models(stages):
    """policy, tokenizer, reward model."""
    return *hub.load(stages.folder / "sft" / "model"), hub.load(stages.folder / "rm" / "model")[0]


# one call


@pytest.mark.parametrize(
    "returns, value", [(1, 1.0), (0.25, 0.25), (True, 1.0), (torch.tensor(2.0), 2.0), ("3", 3.0)]
)
def test_call_reward_gives_a_float(returns, value):
    got = call_reward("f", lambda *args: returns, "p", "t", {})
    assert type(got) is float and got == value


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda p, t, row: row["answer"], "reward f raised KeyError: 'answer' (prompt 'a=', response 'b')"),
        (lambda p, t, row: 1 / 0, "reward f raised ZeroDivisionError: division by zero ("),
        (lambda p, t, row: None, "reward f raised TypeError: "),
        (lambda p, t, row: "good", "reward f raised ValueError: "),
        (lambda p, t, row: float("nan"), "reward f returned nan (prompt 'a=', response 'b'); it must"),
        (lambda p, t, row: -1e999, "reward f returned -inf "),
    ],
)  # fmt: skip
def test_call_reward_names_the_sample(function, says):
    with pytest.raises(RunError, match="^" + re.escape(says)):
        call_reward("f", function, "a=", "b", {})


def test_ctrl_c_in_a_reward_is_no_error_of_the_reward():
    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward("f", interrupted, "a=", "b", {})


# a rollout


def rollout(models, n=6):
    policy, tok, _ = models
    rows = words(n)
    rolls, texts = generate.respond(policy, tok, [r["prompt"] for r in rows], 1, 5, seed=3)
    return rolls[0], texts, rows


def test_several_rewards_are_summed_with_their_weights(models):
    """Each function sees its own row, prompt and text: the sum by hand, per sample."""
    roll, texts, rows = rollout(models)
    rewards = [
        ("length", 0.5, lambda prompt, text, row: len(text)),
        ("first", -2.0, lambda prompt, text, row: ord(prompt[0])),
        ("answer", 1.0, lambda prompt, text, row: ord(row["response"][0]) * (row["prompt"] == prompt)),
    ]
    score = score_responses(roll, texts, rows, None, rewards)
    want = [0.5 * len(t) - 2 * ord(r["prompt"][0]) + ord(r["prompt"][2]) for t, r in zip(texts, rows)]
    assert score.shape == (6,) and score.dtype == torch.float32 and score.tolist() == want
    assert len(set(want)) > 3


def test_rows_and_texts_must_agree(models):
    roll, texts, rows = rollout(models)
    with pytest.raises(ValueError):
        score_responses(roll, texts, rows[:-1], None, [("f", 1.0, lambda *args: 0)])


def test_reward_model_scores_each_row_at_its_last_token(models):
    """Alone and unpadded: the head on the hidden state of the last sampled token, EOS or not."""
    roll, texts, rows = rollout(models, 40)
    rm = models[2]
    score = score_responses(roll, texts, rows, rm, [])
    assert not score.requires_grad and roll.finished.any() and not roll.finished.all()
    for i, n in enumerate(roll.lengths.tolist()):
        alone = rm.trunk(roll.tokens[i : i + 1, :n])[0, -1] @ rm.score.weight[0] + rm.reward_bias
        assert score[i].item() == pytest.approx(alone.item(), abs=1e-5)


# held-out evaluation


def greedy(model, tok, prompt, new):
    """Greedy decoding with nothing but logits: no cache, no batch."""
    ids = tok.encode(prompt)
    start = len(ids)
    while len(ids) < start + new:
        ids.append(model.logits(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == tok.eos_id:
            return tok.decode(ids[start:-1])
    return tok.decode(ids[start:])


def test_evaluate_means_over_all_prompts_whatever_the_batches(models):
    """600 prompts are more than one batch: each text meets its own row; greedy against plain argmax."""
    policy, tok, _ = models
    seen = []

    def reward(prompt, text, row):
        assert prompt == row["prompt"]
        seen.append((prompt, text))
        return sum(map(ord, text)) / 100

    cfg = SimpleNamespace(temperature=0.7, max_new_tokens=5, seed=0)
    rows = words(600)
    out = evaluate(policy, tok, cfg, rows, None, [("f", 1.0, reward)])
    sampled, best = seen[:600], seen[600:]
    assert [p for p, _ in sampled] == [p for p, _ in best] == [r["prompt"] for r in rows]
    by_hand = {prompt: greedy(policy, tok, prompt, 5) for prompt in {r["prompt"] for r in rows}}
    assert all(text == by_hand[prompt] for prompt, text in best) and sampled != best
    for name, pairs in (("eval/reward", sampled), ("eval/greedy", best)):
        mean = sum(sum(map(ord, text)) / 100 for _, text in pairs) / 600
        assert out[name] == pytest.approx(mean, rel=1e-5)
    assert evaluate(policy, tok, cfg, rows, None, [("f", 1.0, reward)]) == out  # same seed, same figures


# prompts


def prompts_cfg(**more):
    return SimpleNamespace(**dict(data="", seed=0, eval_prompts=100, max_new_tokens=5) | more)


def load(tmp_path, rows, max_len=12, tok=TOK, **more):
    write_jsonl(tmp_path / "p.jsonl", rows)
    return load_prompts(prompts_cfg(data=f"{tmp_path}/p.jsonl", **more), tasks.get("reviews"), tok, max_len)


def test_prompts_are_split_by_their_text_and_keep_their_rows(tmp_path):
    rows = [{**r, "answer": i} for i, r in enumerate(words(200))]
    train, test = load(tmp_path, rows)
    assert sorted(r["answer"] for r in train + test) == list(range(200))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test} and 10 < len(test) < 60
    assert all(tasks.held_out(r["prompt"]) for r in test)
    short = load(tmp_path, rows, eval_prompts=3)
    assert short == (train, test[:3])


def test_builtin_prompts_do_not_meet():
    task = tasks.get("chain")
    train, test = load_prompts(prompts_cfg(), task, Tokenizer.from_chars(task.alphabet), 32)
    assert len(train) == 3000 and len(test) == 100 and "answer" in train[0]
    assert not any(tasks.held_out(r["prompt"]) for r in train)
    assert all(tasks.held_out(r["prompt"]) for r in test)


def test_prompts_without_room_for_a_response_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": "a" * n + "="} for n in range(1, 12)]
    train, test = load(tmp_path, rows)
    assert max(len(r["prompt"]) for r in train + test) <= 12 - 5 and len(train + test) == 6
    says = "5 of 11 prompts are longer than 7 tokens (the context of 12 less --max_new_tokens 5); dropped"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, says",
    [
        ([], "the file is empty"),
        ([{"prompt": "a="}, {"text": "b="}], 'p.jsonl:2: missing key "prompt"'),
        ([{"prompt": "a="}, {"prompt": 3}], 'p.jsonl:2: "prompt" is a number, expected a string'),
        ([{"prompt": "a="}, {"prompt": " "}], 'p.jsonl:2: "prompt" is empty'),
        ([{"prompt": "a="}, {"prompt": "é="}], "p.jsonl:2: tokenizer: character 'é' is not in alphabet"),
        ([{"prompt": "a" * 9}] * 2, "no training prompt is left: 2 of 2 prompts are longer than 7 tokens"),
        ([{"prompt": "bed="}], "no training prompt is left: 1 are held out (15% of all prompts, by a hash)"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_by_file_and_line(rows, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        load(tmp_path, rows)


def test_a_task_that_the_model_has_no_tokens_for():
    with pytest.raises(UserError, match="--task: tokenizer: character '[0-9]' is not in alphabet"):
        load_prompts(prompts_cfg(), tasks.get("chain"), TOK, 32)
