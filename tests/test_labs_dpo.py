"""DPO's lab: its frontier, the table of a reward model, and how lacks are compared at equal KL."""

import math

import numpy
import pytest
import torch

from labs import dpo_frontier as lab
from nanorlhf import hub
from nanorlhf.model import GPT, GPTConfig, ScalarModel


def test_no_policy_lies_above_the_optima_and_interpolation_finds_them():
    torch.manual_seed(0)
    shape = (len(lab.TRAIN), len(lab.TEXTS))
    ref = torch.randn(shape, dtype=torch.float64).log_softmax(-1)
    worth = torch.randn(shape, dtype=torch.float64)
    best = lab.optima(ref, worth, worth)
    assert all(a["kl"] < b["kl"] and a["reward"] < b["reward"] for a, b in zip(best, best[1:]))
    for noise in (0.3, 1.0):  # a tilt by a wrong reward
        other = (ref + worth + noise * torch.randn(shape, dtype=torch.float64)).log_softmax(-1)
        found = lab.measured(other, ref, worth)
        assert lab.reward_at(found["kl"], best) > found["reward"] + 0.01
    between = (ref + worth / 0.95).log_softmax(-1)  # no β of the list
    found = lab.measured(between, ref, worth)
    assert lab.reward_at(found["kl"], best) == pytest.approx(found["reward"], abs=2e-3)


def test_scores_are_those_of_single_responses(tmp_path):
    torch.manual_seed(0)
    size = dict(n_layer=1, n_head=4, d_model=8, max_len=2 + lab.LIMIT)
    model = ScalarModel(GPT(GPTConfig.gpt2(lab.TOK.vocab_size, **size)))
    hub.save(model, lab.TOK, str(tmp_path))
    found = lab.scores(str(tmp_path))
    assert found.shape == (len(lab.TRAIN), len(lab.TEXTS))
    assert (found[:, ~lab.ENDED] == lab.UNENDED).all()
    for p, text in ((0, ""), (5, "abca"), (12, "d")):
        tokens = lab.TOK.encode(lab.TRAIN[p] + text) + [lab.TOK.eos_id]
        alone = model.rewards(torch.tensor([tokens]), torch.tensor([len(tokens)])).item()
        assert found[p, lab.TEXTS.index(text)].item() == pytest.approx(alone, abs=1e-5)


def test_lacks_are_compared_at_equal_kl_whatever_kls_the_runs_reach():
    """A lack of a·√KL is found at every level, from two runs or from three; PPO's a is larger by 0.1."""
    rows = []
    for seed in (0, 1):
        for pairs in lab.PAIRS:
            a = 0.2 + seed / 10 + pairs / 10**5
            for kl in (0.3, 1.2, 3.0):
                rows.append(dict(seed=seed, method="dpo", pairs=pairs, width=32, kl=kl, lack=a * kl**0.5))
            for kl in (0.6, 2.4):
                lack = (a + 0.1) * kl**0.5
                rows.append(dict(seed=seed, method="ppo", pairs=pairs, width=32, kl=kl, lack=lack))
                rows.append(dict(seed=seed, method="ppo", pairs=pairs, width=4, kl=kl, lack=9.0))
    mean_root = numpy.mean([math.sqrt(kl) for kl in lab.LEVELS])
    wanted = [(0.2 + seed / 10 + 500 / 10**5) * mean_root for seed in (0, 1)]
    assert lab.lacking(rows, "DPO", 500) == pytest.approx(wanted)
    assert lab.effects(rows) == {"PPO lacks more than DPO": pytest.approx([0.1 * mean_root] * 2)}
