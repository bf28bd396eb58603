"""What the lab rl_forgets_less reads off a run, and the answers that it trains on, by hand."""

import pytest

from labs import rl_forgets_less as lab


def test_old_task_is_read_where_the_new_one_first_passes_the_level():
    path = [{"new": 0.5, "old": 1.0}, {"new": 0.7, "old": 0.8}, {"new": 0.9, "old": 0.4},
            {"new": 0.6, "old": 0.3}, {"new": 1.0, "old": 0.0}]  # fmt: skip
    assert lab.old_at(path, 0.6) == pytest.approx(0.9)
    assert lab.old_at(path, 0.75) == pytest.approx(0.7)
    assert lab.old_at(path, 0.95) == pytest.approx(0.0375)
    assert lab.old_at(path[:4], 0.95) == lab.old_at([], 0.5) == 0


def rows_of(method, seed, olds):
    """At each learning rate a run to 0.8, 0.9 and 0.98, with these accuracies on the old task."""
    rows = []
    for lr, factor in zip(lab.ROLLOUTS, (1, 0.5)):
        news = (0.6, 0.8, 0.9, 0.98)
        for i, (new, old) in enumerate(zip(news, (1, *olds))):
            figures = {"new": new, "old": factor * old, "kl": 1 - factor * old, "reverse_kl": i}
            rows.append({"method": method, "seed": seed, "lr": lr, "updates": i} | figures)
    return rows


def test_effects_take_the_better_rate_and_pair_the_seeds():
    rows = []
    for seed in (0, 1):
        rows += rows_of("RL", seed, (0.9, 0.8, 0.7 + 0.06 * seed))
        rows += rows_of("labels", seed, (0.6, 0.5, 0.4))
    found = lab.effects(rows)
    assert found["old task, RL less SFT"] == pytest.approx([0.3, 0.32])
    assert found["correlation of the KL"] == pytest.approx([0.2, 0.2])


def test_base_model_is_right_in_six_of_ten_and_labels_always():
    rows = lab.habits(2000, 0)
    right = [lab.parity(row["prompt"], row["response"], row) for row in rows]
    assert sum(right) / 2000 == pytest.approx(0.6, abs=0.04)
    digits = [row["response"] for row in rows]
    often = sorted((digits.count(digit) for digit in "02468"), reverse=True)
    assert often[0] == pytest.approx(2 * often[1], rel=0.25)  # half as frequent as the one before
    labelled = lab.practice("labels", "", 50, 0)
    assert all(row["response"] == str(int(row["prompt"][-2]) % 2) for row in labelled)
    assert [lab.parity("p000004=", text, {}) for text in ("2", "3", "24", "")] == [1, 0, 0, 0]
