"""The lab on self-rewarding: the rubric, the labels, the pairs and the judge's accuracy, by hand."""

import pytest

from labs import self_rewarding as lab
from nanorlhf import tasks

PROMPT = "Hotel: The bed was good."


@pytest.mark.parametrize("response, marks", [
    (" The pool was great. I loved the view. We went on a Friday. I would go again.", "4006"),  # mean 1.75
    (" The bed was awful. The soup was great. The pool was bad.", "3113"),  # told before; another topic
    ("", "0004"),
    (" The pool was truly terrible." * 12, "9094"),  # eleven are repeated, but no mark is above 9
])  # fmt: skip
def test_rubric_by_hand(response, marks):
    assert lab.rubric(PROMPT, response) == marks


def test_labels_are_gold_with_noise():
    response = " The pool was great. I loved the view. We went on a Friday. I would go again."
    gold = tasks.gold(PROMPT, response)
    rows = [{"prompt": PROMPT, "response": response, "asked": "?", "gold": gold}] * 500
    grades = [int(row["response"]) for row in lab.labelled(rows, "digit", 0)]
    assert sum(grades) / 500 == pytest.approx((gold + 4) / 7 * 9, abs=0.1) and len(set(grades)) > 2
    thought = [row["response"] for row in lab.labelled(rows, "thought", 0)]
    assert thought == [f"4006{grade}" for grade in grades]


def test_best_against_worst_of_the_answers_that_ended():
    texts = "abcdefgh"
    ended = [True, True, True, False, True, True, True, True]
    rows = [{"prompt": p, "response": r, "ended": e} for p, r, e in zip("ppppqqqq", texts, ended)]
    pairs = lab.best_against_worst(rows, [1.0, 3.0, 2.0, 9.0, 5.0, 5.0, 5.0, 5.0])
    assert pairs == [{"prompt": "p", "chosen": "b", "rejected": "a"}]  # the second group is of one mind


def test_accuracy_counts_a_tie_of_the_judge_as_half_and_leaves_out_gold_ties(monkeypatch):
    gold = [1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(lab, "judged", lambda *args: [5.0, 4.0, 5.0, 4.0, 3.0, 3.0, 1.0, 2.0])
    assert lab.accuracy("", [{"gold": g} for g in gold], "digit") == pytest.approx(0.5)
    monkeypatch.setattr(lab, "judged", lambda *args: gold)
    assert lab.accuracy("", [{"gold": g} for g in gold], "digit") == 1
