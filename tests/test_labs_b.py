"""What single labs compute: rewards, problems, shares of weights."""

import itertools
import math

import pytest
import torch

from labs import context_lengthening, pass_at_k, r1_zero, sparse_updates, spurious_rewards
from nanorlhf import tasks


def test_guessing_is_a_draw_among_all_expressions(monkeypatch):
    """3 7 2=13: of the 54 texts of these numbers 2*3+7 and its like are right, 4 in all."""
    rows = [{"prompt": "3 7 2=13:"}]
    monkeypatch.setattr(tasks.get("countdown"), "prompts", lambda *args: rows)
    found = {r["k"]: r["pass"] for r in pass_at_k.run({"model": "guess"}, 0, True)}
    every = itertools.product(itertools.permutations("372"), "+-*", "+-*")
    right = sum(eval(f"{a}{x}{b}{y}{c}") == 13 for (a, b, c), x, y in every)
    assert right == 4 and found[1] == pytest.approx(4 / 54) and found[2] == pytest.approx(1 - (50 / 54) ** 2)


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengthened_problems_are_solved_by_their_demonstrations(split):
    rows = context_lengthening.problems(300, 0, split)
    lengths = [len(r["response"]) + 1 for r in rows if r["response"].startswith("<")]
    assert all(context_lengthening.accuracy(r["prompt"], r["response"], r) == 1 for r in rows)
    assert {len(r["prompt"]) for r in rows} == {9} and 100 < len(lengths) < 200
    assert min(lengths) < 11 and 25 < max(lengths) <= context_lengthening.LONGEST
    assert {tasks.held_out(r["prompt"]) for r in rows} == {split == "test"}


def test_spurious_rewards_by_hand():
    row, lab = {"prompt": "697470=", "answer": "3"}, spurious_rewards
    cases = {"<652633>|3": (1, 1, 0), "|3": (1, 1, 0), "|8": (0, 1, 1), "<8>|8": (0, 1, 1), "8": (0, 0, 0)}
    for text, want in cases.items():
        found = [reward(row["prompt"], text, row) for reward in (lab.true, lab.format, lab.wrong)]
        assert tuple(found) == want
    assert [r1_zero.format("", text, row) for text in ("<652633>|3", "|3", "<>|3")] == [1, 0, 0]
    flips = [lab.coin(row["prompt"], "|3", row) for _ in range(2000)]
    assert sum(flips) == pytest.approx(1000, abs=90)


def test_share_that_thinks_and_running_sums():
    rows = spurious_rewards.demonstrations(400, 0, 0.8)
    thinks = [r for r in rows if r["response"].startswith("<")]
    assert len(thinks) == pytest.approx(320, abs=35)
    assert all(tasks.get("chain").reward(r["prompt"], r["response"]) == 1 for r in rows)
    assert all(len(r["response"]) == 10 for r in thinks)


def test_shares_of_unchanged_weights_and_rank():
    """Of ten weights one moves by far, one by less than bfloat16 sees at 1, one by 1e-6 and one by 5e-6.

    The last one differs after rounding too, as it starts at 0, but by less than the tolerance.
    """
    before = {"w": torch.ones(3, 3), "b": torch.zeros(1)}
    after = {"w": before["w"].clone(), "b": torch.full((1,), 5e-6)}
    after["w"][0] += torch.tensor([1.0, 1e-3, 1e-6])
    found = sparse_updates.compare(before, after)
    assert found == pytest.approx({"float32": 0.8, "bf16": 0.9, "size": 1 / 3, "rank": 1 / 3}, rel=1e-3)


def test_methods_are_compared_at_equal_kl():
    """Shares that fall linearly in log KL: RL's lie 0.2 above SFT's, whatever KLs the runs reach."""
    rows = []
    for method, start, kls in (("RL", 0.5, (0.01, 0.2, 1.0)), ("SFT", 0.3, (0.02, 0.5))):
        for seed in (0, 1):
            for kl in kls:
                share = start + seed / 10 - 0.05 * math.log(kl)
                rows.append({"seed": seed, "method": method, "dtype": "float32", "kl": kl, "bf16": share})
    wanted = [0.5 + seed / 10 - 0.05 * math.log(0.03 * 0.1 * 0.3) / 3 for seed in (0, 1)]
    assert sparse_updates.at_equal_kl(rows, "bf16", "RL") == pytest.approx(wanted)
    assert sparse_updates.effects(rows) == {"RL leaves more unchanged": pytest.approx([0.2, 0.2])}
