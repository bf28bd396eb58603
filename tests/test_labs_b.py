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
def test_lengthened_problems_and_their_demonstrations(split):
    """A slip turns a share of the answers wrong, more of them in long thoughts; the rest are right."""
    lab = context_lengthening
    rows = lab.problems(2000, 0, split)
    right = {False: [], True: []}
    for row in rows:
        long = len(row["response"]) > 22
        right[long].append(lab.accuracy(row["prompt"], row["response"], row))
    # a thought of r tokens is right in 0.1 + 0.9 * 0.96**r: 0.65 at 12 tokens, 0.41 at 26
    assert sum(right[False]) / len(right[False]) > 0.55 > 0.5 > sum(right[True]) / len(right[True]) > 0.25
    assert {len(row["prompt"]) for row in rows} == {lab.WIDTH}
    assert max(len(row["response"]) for row in rows) < lab.LONG  # EOS is one more
    assert {tasks.held_out(row["prompt"]) for row in rows} == {split == "test"}


def test_a_thought_without_slips_is_the_running_sums(monkeypatch):
    lab = context_lengthening
    monkeypatch.setattr(lab, "SLIP", 0.0)
    for row in lab.problems(200, 0, "train"):
        digits = [int(x) for x in row["prompt"].rstrip("=")]
        sums = [str(sum(digits[:i]) % 10) for i in range(1, len(digits) + 1)]
        written = row["response"][1 : row["response"].index(">")]
        assert written[: len(sums)] == "".join(sums) and set(written[len(sums) :]) <= {sums[-1]}
        assert lab.accuracy(row["prompt"], row["response"], row) == 1
    assert lab.accuracy("34============", "|7", None) == 0  # the lab's answers think
    assert lab.accuracy("34============", "<37>|7", None) == 1


def run_of(seed, limits, points, end):
    rows = []
    for tokens, accuracy in points:
        rows.append({"seed": seed, "limits": limits, "tokens": tokens, "accuracy": accuracy})
    rows[-1]["accuracy_long"] = end
    return rows


def test_accuracy_at_equal_tokens_by_hand():
    """The lengthened run has 0.8, between 0.7 and 0.9; the long one 0.5, the short one 0.6 at its end."""
    lab = context_lengthening
    rows = []
    for seed in (0, 1):
        shift = 0.1 * seed
        main = [(0, 0.1), (60_000, 0.7 + shift), (100_000, 0.9 + shift)]
        rows += run_of(seed, lab.MAIN, main, 0.95)
        rows += run_of(seed, "43 throughout", [(0, 0.1), (80_000, 0.5), (130_000, 0.9)], 0.9)
        rows += run_of(seed, "14 throughout", [(0, 0.1), (130_000, 0.3)], 0.6)
    assert lab.at_budget(rows[:3], 30_000) == pytest.approx(0.4)
    assert lab.at_budget(rows[:3], 200_000) == 0.9
    found = lab.effects(rows)
    assert found["lengthened less 43 throughout"] == pytest.approx([0.3, 0.4])
    assert found["lengthened less 14 throughout"] == pytest.approx([0.2, 0.3])
    seen, _, numbers = lab.verdict(rows)
    assert not seen  # two values 0.1 apart: the interval is 0.64 wide on each side
    assert numbers["accuracy 43 throughout"] == 0.5


def test_spurious_rewards_by_hand():
    row, lab = {"prompt": "697470=", "answer": "3"}, spurious_rewards
    cases = {
        "<652633>|3": (1, 1, 0), "<652633>3": (1, 0, 0), "3": (1, 0, 0), "|3": (1, 1, 0), "|8": (0, 1, 1),
        "<8>|8": (0, 1, 1), "8": (0, 0, 1), "<652633": (0, 0, 0), "33": (0, 0, 0),
    }  # fmt: skip
    for text, want in cases.items():
        found = [reward(row["prompt"], text, row) for reward in (lab.true, lab.format, lab.wrong)]
        assert tuple(found) == want
    assert [r1_zero.format("", text, row) for text in ("<652633>|3", "|3", "<>|3")] == [1, 0, 0]
    flips = [lab.coin(row["prompt"], "|3", row) for _ in range(2000)]
    assert sum(flips) == pytest.approx(1000, abs=90)


@pytest.mark.parametrize("family", spurious_rewards.FAMILIES)
def test_habits_of_the_two_families(family):
    lab = spurious_rewards
    rows = lab.problems(2000, 0, "train", family)
    assert all(lab.true(row["prompt"], row["response"], row) == 1 for row in rows)
    for odd, share in ((0, 0.95), (1, 0.35)):
        taken = [row["response"].startswith("<") for row in rows if int(row["prompt"][0]) % 2 == odd]
        assert sum(taken) / len(taken) == pytest.approx(share, abs=0.05)
    assert sum("|" in row["response"] for row in rows) == pytest.approx(1600, abs=60)
    for row in rows:
        digits = row["prompt"].rstrip("=")
        sums = "".join(str(sum(map(int, digits[: i + 1])) % 10) for i in range(len(digits)))
        if row["response"].startswith("<"):
            assert row["response"][1:].startswith((sums if family == "code-like" else digits) + ">")


def test_gain_of_a_coin_by_hand():
    lab = spurious_rewards
    gains = {("code-like", lab.CLIP): 0.3, ("prose-like", lab.CLIP): 0.1, ("code-like", lab.OFF): 0.9}
    rows = []
    for (family, clip), gain in gains.items():
        for seed in (0, 1):
            point = {"family": family, "reward": "coin", "clip": clip}
            rows.append({"seed": seed, **point, "gain": gain + seed / 10})
    rows.append({"seed": 0, "family": "code-like", "reward": "true", "clip": lab.CLIP, "gain": 0.7})
    found = lab.effects(rows)
    assert found["coin's gain, code-like"] == pytest.approx([0.3, 0.4])
    assert found["code-like less prose-like"] == pytest.approx([0.2, 0.2])


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
