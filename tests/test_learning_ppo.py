"""PPO learns, from a reward that depends on the prompt: what ignores the prompt lets most mutants through."""

import csv
import json

import pytest
import torch

from nanorlhf import hub
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tokenizer import Tokenizer
from train_ppo import Config, train

pytestmark = pytest.mark.usefixtures("no_curves")
LETTERS = "abcdef"
TOK = Tokenizer.from_chars(LETTERS + "=")


def second_letter(prompt, response):
    """`cf=` is answered by `f` and EOS: 1 in 81 by chance."""
    return float(response == prompt[1])


def nothing(prompt, response):
    return 0.0


def run(folder, reward, **kw):
    """PPO from a near-uniform policy of one layer → its rows of metrics.csv."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        size = dict(n_layer=1, n_head=2, d_model=32, max_len=8, tied=False)
        model = GPT(GPTConfig.gpt2(TOK.vocab_size, **size))
        model.lm_head.weight.data *= (0.1, 1.0)[seed]
        hub.save(model, TOK, f"{folder}/model{seed}")
    with open(f"{folder}/prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": a + b + "="}) + "\n" for a in LETTERS for b in LETTERS)
    flags = dict(
        data=f"{folder}/prompts.jsonl", reward=[f"{__file__}:{reward.__name__}"], init=f"{folder}/model0",
        out=f"{folder}/run", prompts_per_step=32, group_size=4, max_new_tokens=2, minibatches=4, lr=3e-3,
        critic_lr=1e-2, no_eos_score=0.0, save_every=0, reward_timeout=0,
    )  # fmt: skip
    train(Config(**flags | kw))
    with open(f"{folder}/run/metrics.csv") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def test_learns_to_answer_the_prompt(tmp_path):
    """From chance to nearly always, on prompts never trained on too; seeds 0 to 4 end at 0.94 or more."""
    rows = run(tmp_path, second_letter, steps=60, beta=0.0)
    assert rows[0]["reward"] < 0.05 and rows[0]["eval/reward"] < 0.25
    assert rows[-1]["reward"] > 0.85 and rows[-1]["eval/reward"] > 0.75


def test_the_kl_penalty_holds_the_policy(tmp_path):
    """The same run with a prohibitive β: next to no KL (4 nats without), next to no success."""
    rows = run(tmp_path, second_letter, steps=25, beta=10.0)
    assert max(abs(r["kl"]) for r in rows) < 0.1 and rows[-1]["reward"] < 0.1


def test_the_kl_penalty_draws_the_policy_to_the_reference(tmp_path):
    """No reward at all and another model as reference: KL falls to a fraction, by the penalty alone."""
    rows = run(tmp_path, nothing, steps=30, beta=1.0, ref=f"{tmp_path}/model1")
    first, last = (sum(r["kl"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert first > 0.3 and last < 0.25 * first
