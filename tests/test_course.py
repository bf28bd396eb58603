"""The course holds what it promises: solutions pass, stubs fail, and a wrong answer hears what is wrong."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course import checking, cli, grading

ROOT = Path(__file__).resolve().parents[1]
WEEKS = [week for week in checking.WEEKS if (ROOT / "course" / checking.folder_of(week)).is_dir()]
each_week = pytest.mark.parametrize("week", WEEKS)


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercise(week, folder="course"):
    return ROOT / folder / checking.folder_of(week) / "exercise.py"


def verdict(week, name, function):
    return checking.judge(getattr(checking.load_check(week), f"check_{name}"), function)


def wrong_answers():
    for week in WEEKS:
        for number, (name, words, function) in enumerate(wrong_of(week)):
            yield pytest.param(week, name, words, function, id=f"{week}-{number}-{name}")


def wrong_of(week):
    return load(ROOT / "tests/course_wrong" / f"{checking.folder_of(week)}.py").WRONG


@each_week
def test_solutions_pass(week):
    solution = load(exercise(week, "course/solutions"))
    for name in checking.load_check(week).POINTS:
        passed, message = verdict(week, name, getattr(solution, name))
        assert passed or passed is None, message


@each_week
def test_stubs_fail_and_say_so(week):
    stub = load(exercise(week))
    for name in checking.load_check(week).POINTS:
        passed, message = verdict(week, name, getattr(stub, name))
        assert passed is False and message.startswith("not solved yet")


@each_week
def test_three_wrong_answers_for_each_exercise(week):
    names = [name for name, *_ in wrong_of(week)]
    few = [name for name in checking.load_check(week).POINTS if names.count(name) < 3]
    assert not few


@pytest.mark.parametrize("week, name, words, function", list(wrong_answers()))
def test_a_wrong_answer_hears_what_is_wrong(week, name, words, function):
    passed, message = verdict(week, name, function)
    assert passed is False
    assert words in message
