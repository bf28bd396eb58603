"""The frozen threshold of the lab distillation, and what its arms learn from."""

import itertools

import pytest

from labs import common, distillation
from nanorlhf import tasks


def rows_of(pass1, pass64, other):
    """Rows of five seeds: each argument is {model: its figure}, to which a seed's own part is added."""
    rows = []
    for seed in range(5):
        for model in ("grpo", "reverse", "sft"):
            own = 0.01 * seed + 0.001 * (model == "reverse") * seed
            figures = {"pass@1": pass1[model], "pass@64": pass64[model], "other": other[model]}
            rows.append({"seed": seed, "model": model} | {name: x + own for name, x in figures.items()})
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
    above = [r | {"model": "teacher", "pass@1": r["pass@1"] + 0.1} for r in rows if r["model"] == "grpo"]
    same = [r | {"model": "teacher"} for r in rows if r["model"] == "grpo"]
    assert "void" in distillation.verdict(rows + same)[1]
    assert "void" not in distillation.verdict(rows + above)[1]


def test_first_answer_is_the_first_right_one_by_brute_force():
    for row in tasks.get("countdown").prompts("train", 50, 0):
        numbers, target = row["prompt"].rstrip(":").split("=")
        right = []
        for a, b, c in itertools.permutations(sorted(numbers.split())):
            texts = [f"{a}{x}{b}{y}{c}" for x in "+-*" for y in "+-*"]
            right += [text for text in texts if eval(text) == int(target)]
        assert distillation.first_answer(row["prompt"]) == right[0]


def test_every_way_has_as_many_samples_and_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "root", str(tmp_path))
    monkeypatch.setattr(distillation, "student", lambda *args: "student")
    monkeypatch.setattr(distillation, "teacher", lambda *args: "teacher")
    monkeypatch.setattr(distillation, "teacher_samples", lambda seed, updates, smoke: updates * 128)
    monkeypatch.setattr(common, "trained", lambda trainer, **config: trainer.Config(**config))
    grpo, reverse = (distillation.student_after(name, 0, False) for name in ("grpo", "reverse"))
    assert grpo.steps * grpo.minibatches == reverse.steps == 120
    assert grpo.steps * grpo.prompts_per_step * grpo.group_size == 120 * 128
    assert reverse.steps * reverse.prompts_per_step * reverse.group_size == 120 * 128
