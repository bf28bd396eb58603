"""The frozen threshold of the lab distillation, and what its arms learn from."""

import itertools
import json

import pytest

from labs import common, distillation
from nanorlhf import tasks


def rows_of(pass1, pass64, other):
    """Rows of five seeds: each argument is {model: its figure}, to which a seed's own part is added."""
    rows = []
    for seed, (k, passed) in itertools.product(range(5), ((1, pass1), (64, pass64))):
        for model in ("grpo", "reverse", "sft"):
            own = 0.01 * seed + 0.001 * (model == "reverse") * seed
            rows.append({"seed": seed, "model": model, "k": k, "pass": passed[model] + own,
                         "other": other[model] + own})  # fmt: skip
    return rows


ENOUGH = {"grpo": 0.4, "reverse": 0.45, "sft": 0.4}
EQUAL = {"grpo": 0.9, "reverse": 0.9, "sft": 0.9}
KEPT = {"grpo": 0.5, "reverse": 0.9, "sft": 0.3}


@pytest.mark.parametrize("change, seen", [
    ({}, True),
    ({"pass1": ENOUGH | {"reverse": 0.42}}, False),  # above 0 in every seed, and less than 0.03
    ({"pass64": EQUAL | {"reverse": 0.885}}, True),
    ({"pass64": EQUAL | {"reverse": 0.875}}, False),
    ({"other": KEPT | {"sft": 0.95}}, False),
])  # fmt: skip
def test_threshold_is_the_frozen_one(change, seen):
    rows = rows_of(**{"pass1": ENOUGH, "pass64": EQUAL, "other": KEPT} | change)
    assert distillation.verdict(rows)[0] == seen


def test_void_where_the_teacher_is_no_better():
    rows = rows_of(ENOUGH, EQUAL, KEPT)
    above = [r | {"model": "teacher", "pass": r["pass"] + 0.1} for r in rows if r["model"] == "grpo"]
    same = [r | {"model": "teacher"} for r in rows if r["model"] == "grpo"]
    assert "void" in distillation.verdict(rows + same)[1]
    assert "void" not in distillation.verdict(rows + above)[1]


def test_teacher_learns_right_answers_and_the_student_wrong_ones_too(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "root", str(tmp_path))
    task = tasks.get("countdown")
    shares = []
    for right in (True, False):
        with open(distillation.demonstrations(400, 0, right)) as f:
            rows = [json.loads(line) for line in f]
        other = [row for row in rows if row["prompt"].startswith("r")]
        assert len(other) == 200 and all(row["response"] == row["prompt"][-2:0:-1] for row in other)
        scores = [task.reward(row["prompt"], row["response"]) for row in rows if row not in other]
        shares.append(sum(scores) / len(scores))
    assert shares[0] == 1 and shares[1] == pytest.approx(0.73, abs=0.08)
