"""Rewards by answers: what a response gives, what each checker accepts, and golds that nobody can read."""

import json
import pickle
import re
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanorlhf import answers, hub, rewards, tasks
from nanorlhf.errors import RunError, UserError
from nanorlhf.generate import sample_responses
from nanorlhf.hub.chat import Template
from nanorlhf.hub.formats import read_rows
from nanorlhf.run import formulas
from nanorlhf.run.worker import RewardFunction, Rewards, call_reward, load_reward, rewards_of
from nanorlhf.tokenizer import Chat, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data"
FILE = str(ROOT / "nanorlhf/answers.py")



@pytest.mark.parametrize(
    "text, answer",
    {
        "": "", " 5 ": "5", "the answer is 5": "the answer is 5", "5 or 6": "5 or 6",
        r"\boxed{5}": "5", r"so \boxed{ 5 }.": "5", r"\boxed{5} and \boxed{6}": None,
        r"\boxed{5}, again \boxed{5}": "5", r"\boxed{5}\boxed{5.0}": None, r"\boxed{}": "",
        r"\boxed{\frac{1}{2}}": r"\frac{1}{2}", r"\boxed{5": "", r"\boxed5": "5",
        r"\boxed{5} \boxed{\frac{1}{2}}": None, r"\boxed{{5}}": "{5}",
        r"\boxed{\frac{\sqrt{3}}{2}}": r"\frac{\sqrt{3}}{2}", r"\boxed {5}": "5", "\\boxed\n {5}": "5",
        r"\fbox{5}": "5", r"\framebox{5}": "5", r"\fbox{5} \boxed{6}": None, r"\boxed{5} \fbox {5}": "5",
        r"\boxed{\{1, 2\}}": r"\{1, 2\}", r"\boxed{\}5}": r"\}5", r"\boxed{a\\}": "a\\\\", r"\\boxed{5}": "5",
        r"\boxed{\boxed{5}}": "5", r"\boxed{\boxed{3}\boxed{5}}": None, r"\boxed{3 \boxed{5}}": None,
        r"\boxed 5": "5", r"so $\boxed 5$.": "5", r"\boxed 3 \boxed{5}": None, r"\boxed": "",
        r"\boxed{5} \boxed 5": "5", r"\boxedness 5": r"\boxedness 5", r"\mboxed{5}": r"\mboxed{5}",
        r"\boxed{5} and \boxed{": None, r"\boxed{5} and \boxed{6": None, r"\boxed{5\}": "",
        r"\boxed{\frac{\sqrt{2}}{2}} or \boxed{5}": None, r"\boxed{x_{a_{1}}} #### 5": None,
        r"} \boxed{5} {": "5", r"{ \boxed{5}": "5", "#### \\boxed{5\n}": "",
        "2+3\n#### 1,234": "1,234", "####5": "5", "#### 5\n#### 6": None, "#### 5\n#### 5\n": "5",
        "#### 5 or 6": "5 or 6", "#### 5\r\nmore": "5", "### 5": "### 5", "####": "",
        r"\boxed{5} #### 6": None, r"\boxed{5}" + "\n#### 5": "5", r"#### \boxed{5}": "5",
        r"#### \boxed{5} \boxed{6}": None, r"\boxed{#### 5}": "5",
        "<answer> 5 </answer>": "5", "<answer>5</answer><answer>6</answer>": None, "<answer>5": "",
        "<answer>3<answer>5</answer>": "", "<answer>5</answer><answer>": None, "5</answer>": "5</answer>",
        r"<answer>\boxed{5</answer>}": "", r"<answer>3 or \boxed{5}</answer>": None,
        "<answer>5</answer>\n<answer>5</answer>": "5", r"<answer>\boxed{5}</answer>": "5",
        "<answer></answer>": "", "<answer>#### 5</answer>": "5", "<answer>5</answer> #### 6": None,
        "<answer><answer>5</answer>": "",
        r"<think>\boxed{1} #### 2</think> 3": "3", "<think>1</think>": "", "a</think>b</think> 5": "5",
        "<answer>1</answer></think>#### 5": "5", r"<think>hmm \boxed{5}": "", "5 <think>": "",
        "<think>a</think> 5 <think>b": "", "<answer>" * 10**5 + "5</answer>": "", "####" * 10**5: "",
        "\\boxed{" * 10**5 + "5}": "", "\\boxed{{" * 10**5 + "5}}": "", "{" * 10**6: "{" * 10**6,
        "\\" * 10**5 + "boxed{5}": "5",
        "\\boxed{" * 10**4 + "5" + "}" * 10**4: "", r"\boxed{5}" * 10**4: "5",
    }.items(),
    ids=lambda x: ascii(x)[:24],
)  # fmt: skip
def test_final_answer(text, answer):
    """One answer, or None for two; "" for what is not closed: listing several is never right with one."""
    assert answers.final_answer(text) == answer


NO_NUMBER = (
    "", " ", ".", "-", "+", "$", ",", "/", "/2", "e5", "1e", "five", "true", "None", "inf", "-inf", "nan",
    "Infinity", "0x10", "0b1", "1_000", "1j", "5%", "7 apples", "5 6", "5 or 6", "5,6", "5;", "5..", "..5",
    "the answer is 5", "x=5", "=5", "--5", "+-5", "5-", "-\u22125", "$1$2", "$$5", "5$", "$-5", "1,23",
    "12,34", "1234,567", ",123", "1,", "0,123", "00,123", "1,234,56", "1 234", "1'234", "1.234,5", "1.2.3",
    "1/0", "0/0", "1/2/3", "1/-2", "1//2", "1 / 2", "1e999", "1e-999", "1e100", "0.1+0.2", "2+3", "2**3",
    "(5)", "[5]", "5\x00", "5\u200b", "\u0663", "\uff15", "\u00b2", "\u00bd", "\u2164", "\u0be7", "1\u0663",
    "5\n6", "9" * 41, "1" * 10**6, "1/" * 10**5, "," * 10**5, "1," * 10**5, "1e" * 10**5, "-" * 10**5,
)  # fmt: skip


@pytest.mark.parametrize("text", NO_NUMBER, ids=lambda x: ascii(x)[:24])
def test_what_is_no_number(text):
    """Nor is anything of it a right answer, to itself least of all."""
    assert answers.parse_number(text) is None
    assert answers.numeric_answer("", text, {"answer": 5}) == 0
    assert answers.numeric_answer("", text, {"answer": 0}) == 0
    with pytest.raises(UserError, match='"answer" is .*, expected a number'):
        answers.numeric_answer("", text, {"answer": text})


@pytest.mark.parametrize(
    "text, value",
    {
        "5": (5, 1), " 5\n": (5, 1), "+5": (5, 1), "-5": (-5, 1), "\u22125": (-5, 1), "5.": (5, 1),
        "5.0": (5, 1), "$5": (5, 1), "-$5": (-5, 1), "$5.50": (11, 2), "007": (7, 1), "00": (0, 1),
        "-0": (0, 1), ".5": (1, 2), "1,234": (1234, 1), "-1,234.50": (-2469, 2),
        "12,345,678": (12345678, 1), "3/4": (3, 4), "6/8": (3, 4), "-1/2": (-1, 2), "1e3": (1000, 1),
        "1E-2": (1, 100), "2.5e+1": (25, 1), "0.1": (1, 10),
        "0.30000000000000004": (30000000000000004, 10**17), "9" * 40: (10**40 - 1, 1), "1e99": (10**99, 1),
    }.items(),
    ids=lambda x: ascii(x)[:24],
)  # fmt: skip
def test_numbers_are_exact(text, value):
    assert answers.parse_number(text) == Fraction(*value)


@pytest.mark.parametrize(
    "response, answer, exact, numeric",
    [
        ("5", "5", 1, 1), (r"\boxed{5}", "5", 1, 1), (r"\boxed{5} #### 5.0", "5", 0, 1),
        (r"\boxed{0.5} or \boxed{1/2}", "1/2", 0, 1), (r"\boxed{5} #### 5", "5", 1, 1),
        ("5", r"... #### 5", 1, 1), ("5.0", "5", 0, 1),
        ("1,234", "1234", 0, 1), ("007", "7", 0, 1), ("$5", 5, 0, 1), ("1/2", 0.5, 0, 1), ("0.5", 0.5, 1, 1),
        ("50", "5", 0, 0), ("15", "5", 0, 0), ("5 or 6", "5", 0, 0), (r"\boxed{5} \boxed{6}", 5, 0, 0),
        ("the answer is 5", "5", 0, 0), ("0.3", 0.1 + 0.2, 0, 0), ("0.30000000000000004", 0.1 + 0.2, 1, 1),
        ("0.3333", "1/3", 0, 0), ("1e-7", 1e-7, 0, 1), ("1e-07", 1e-7, 1, 1), ("-0", 0, 0, 1), ("", 0, 0, 0),
        ("1.0", 1, 0, 1), ("True", 1, 0, 0), ("one", 1, 0, 0), (" 5 ", 5, 1, 1), (str(2**60), 2**60, 1, 1),
        (str(2**60 + 1), 2**60, 0, 0), (str(2**60 + 1), float(2**60), 0, 0),
    ],
)  # fmt: skip
def test_answers_are_compared_as_text_or_as_numbers(response, answer, exact, numeric):
    """The row's answer may be a JSON number, or a whole solution; no rounding anywhere."""
    row = {"answer": answer}
    assert answers.exact_answer("", response, row) == exact
    assert answers.numeric_answer("", response, row) == numeric


@pytest.mark.parametrize("answer", ["", " ", "####", r"\boxed{}", "#### 1\n#### 2", None, True, [5], {}])
def test_a_row_that_nobody_could_answer_is_named(answer):
    """An empty answer would pay for silence, two answers for nothing."""
    for reward, what in ((answers.exact_answer, "one answer"), (answers.numeric_answer, "a number")):
        with pytest.raises(UserError, match=f'"answer" is .*, expected {what}'):
            reward("", str(answer), {"answer": answer})


CHOICES = {
    "B": 1, "**B**": 1, "$B$": 1, r"\boxed{\text{B}}": 1, r"\boxed{\textbf{(B)}}": 1,
    r"\boxed{\text{B) x}}": 1,
    "B) a cat": 1, "B) A cat": 1, "B) I think so": 1, "B) 25 °C": 1, "B) 10 J": 1, "B) an e-mail": 1,
    "B) B": 1,
    "B) 21\nkm": 1, r"\boxed{B} #### (b)": 1, r"\fbox{B}": 1,
    "B) x\nA) y\nC) z": 0, "A) x\nB) y\nC) z": 0, "A. or B.": 0, "B. or A.": 0, "B. or A": 0, "B) or (c)": 0,
    "B) and C) 22": 0, "B, C": 0, "B/C": 0, "(B)(C)": 0, "(B) (C)": 0, "B) C": 0, "B) 21 C) 22": 0,
    "B: x, C: y": 0,
    "B) x A": 0, "B. Not A.": 0, r"\boxed{\text{B or C}}": 0, r"\boxed{B} \fbox{C}": 0, "<think>B": 0,
    "B\nC": 0,
    r"\boxed{B} and \boxed{": 0, "<answer>A<answer>B</answer>": 0,
    "(B)": 1, "B.": 1, "b)": 1, "B) 21 km": 1, "B: 21": 1, "The answer is B.": 1,
    "the answer is: (b)": 1, r"so \boxed{B}": 1, "<think>A or C</think>B": 1,
    "<answer>(B)</answer>": 1, "... #### B": 1, "\n B \n": 1,
    "A": 0, "": 0, "B or C": 0, "A B": 0, "BB": 0, "Because": 0, "B21": 0, "K": 0, "\u0392": 0, "not B": 0,
    r"\boxed{A} \boxed{B}": 0, "A B C D": 0, "B" * 10**5: 0,
}  # fmt: skip


@pytest.mark.parametrize("response, reward", CHOICES.items(), ids=lambda x: ascii(x)[:24])
def test_choice(response, reward):
    for answer in ("B", "b", "B)", "(B) 21"):
        assert answers.choice_answer("", response, {"answer": answer}) == reward


def test_choice_without_a_letter_is_named():
    for answer in ("21", "", "K", None, 1):
        with pytest.raises(UserError, match='"answer" is .*, expected a letter from A to J'):
            answers.choice_answer("", "A", {"answer": answer})


@pytest.mark.parametrize(
    "response, think, answer",
    [
        ("<think>a</think>b", 1, 0), ("<think></think> 5", 1, 0), (" \n<think>a\nb</think>\n\n5", 1, 0),
        ("<think>a</think>", 0, 0), ("<think>a</think> \n", 0, 0), ("a</think>b", 0, 0), ("<think>a", 0, 0),
        ("x<think>a</think>b", 0, 0), ("<think><think>a</think>b", 0, 0), ("", 0, 0), ("b", 0, 0),
        ("<think>a</think><think>b</think>c", 0, 0), ("</think><think>b", 0, 0), ("<THINK>a</THINK>b", 0, 0),
        ("<think>a</think><answer>5</answer>", 1, 1), ("<think>a</think>\n<answer>\n5\n</answer>\n", 1, 1),
        ("<think>a</think><answer>5</answer>.", 1, 0), ("<think>a</think>so <answer>5</answer>", 1, 0),
        ("<think><answer>5</answer></think>x", 1, 0), ("<think>a</think><answer>5", 1, 0),
        ("<think>a</think><answer>5</answer><answer>5</answer>", 1, 0), ("<answer>5</answer>", 0, 0),
        ("<think><answer></think><answer>5</answer>", 1, 0), ("<think>" * 10**5, 0, 0),
    ],
    ids=lambda x: ascii(x)[:24],
)  # fmt: skip
def test_formats(response, think, answer):
    assert answers.think_format("", response) == answers.think_format("", response, {}) == think
    assert answers.answer_format("", response, {}) == answer




# the same response, every checker

TWO = (  # two answers, or none that is complete; each names 5
    r"\boxed{\frac{\sqrt{2}}{2}} or \boxed{5}", r"\boxed{x_{a_{1}}} #### 5", r"\boxed {3} \boxed{5}",
    "<answer>3<answer>5</answer>", r"\boxed{5} and \boxed{", r"<think>hmm \boxed{5}", r"\fbox{3} \boxed{5}",
    r"\boxed{5} \fbox{3}", r"\boxed{5}, \boxed{3}, \boxed{5}", "<answer>3</answer> #### 5",
    r"<answer>3 \boxed{5}</answer>", r"\boxed{3 \boxed{5}}", r"\boxed{\boxed{3} \boxed{5}}",
    r"\boxed 3 \boxed{5}", r"\boxed{5} #### \frac{1}{2}", "<think>a</think> <think>5", r"\boxed{5",
    r"\fbox{5", "<answer>5", r"\boxed{} \boxed{5}", "#### 5\n#### 3",
    r"#### 5 \boxed{", r"\boxed{5} <answer>", r"<answer>\boxed{5</answer>",
)  # fmt: skip
ONE = (
    "5", r"\boxed{5}", r"\boxed {5}", r"\fbox{5}", "#### 5", "<answer>5</answer>", r"\boxed 5",
    r"\boxed{5} #### 5",
    r"<think>\boxed{3}</think> \boxed{5}", r"<answer>\boxed{5}</answer>",
    r"#### $\boxed{5}$.", "x </think> 5", r"\{ \boxed{5} \}",
)  # fmt: skip
CHECKERS = [answers.exact_answer, answers.numeric_answer, answers.last_number]
if formulas.importlib.util.find_spec("math_verify"):
    CHECKERS.append(answers.math_answer)
each_checker = pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
with_math = pytest.mark.skipif(answers.math_answer not in CHECKERS, reason="needs pip install math-verify")


@each_checker
def test_who_gives_two_answers_is_wrong(checker):
    assert {text: checker("", text, {"answer": "5"}) for text in TWO} == dict.fromkeys(TWO, 0)
    assert {text: checker("", text, {"answer": "5"}) for text in ONE} == dict.fromkeys(ONE, 1)


def rendered(text):
    """A prompt that a template has made this text of."""
    chat = Chat([{"role": "user", "content": "2+3?"}])
    chat.seen = text
    return chat


@each_checker
def test_a_thought_that_the_prompt_opened(checker):
    """What follows is a thought, until it is closed; the template's text counts where there is one."""
    row = {"answer": "5"}
    for prompt in ("2+3? <think>", "2+3?<think>\n", rendered("<|a|><think>\n")):
        assert checker(prompt, r"\boxed{5}", row) == 0
        assert checker(prompt, r"so \boxed{3}</think>\boxed{5}", row) == 1
    for prompt in ("<think>?", rendered("<think>\n\n</think>\n\n")):
        assert checker(prompt, r"\boxed{5}", row) == 1


def test_equal_answers_in_two_forms():
    """One value given twice is one answer where values are compared, but two to exact_answer."""
    row = {"answer": "1/2"}
    assert answers.numeric_answer("", r"\boxed{0.5} #### 1/2", row) == 1
    assert answers.last_number("", r"\boxed{it is 0.5} #### 1/2", row) == 1
    assert answers.exact_answer("", r"\boxed{0.5} #### 1/2", row) == 0
    assert answers.numeric_answer("", r"\boxed{0.5} #### half", row) == 0


@pytest.mark.parametrize(
    "text, number",
    {
        "so it is 18.": 18, "2 and 3 make 5": 5, "10-5=5": 5, "16-5": 5, "= -5": -5, "\u22125": -5,
        "$5.50 each": 5.5, "1,234 apples": 1234, "1, 2, 3": 3, "3/4": 0.75, "5%": 5, "(5)": 5, "x=5": 5,
        "**5**": 5, "5 - x": 5, "so $": None, "5 or 6": None, "either 5, or 6": None, "$5 and $6": None,
        "5, 6": 6,
        "\\boxed{about 5}": 5, "\\boxed{3} \\boxed{5}": None, "<think>5": None, "": None, "none": None,
        "x2": None, "5km": None, r"\frac{1}{2}": None, "2^3": None, r"\sqrt2": None, r"2\sqrt{3}": None,
        "70{,}000": None, "\u20135": None, "1 1/2": None, "3, 1 1/2": None, "1e400": None, "9" * 41: None,
        "\u0665": None,
    }.items(),
)  # fmt: skip
def test_the_last_number(text, number):
    for gold in (number, 7):
        if gold is not None:
            assert answers.last_number("", text, {"answer": gold}) == (gold == number)


# formulas


def hand_written():
    """→ (gold, answer, whether it is right) of the file beside this one."""
    gold = None
    for line in (ROOT / "tests/golden/latex_answers.txt").read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if mark == "gold":
            gold = text
        elif mark in ("=", "!"):
            yield gold, text, mark == "="


@with_math
def test_formulas_written_by_hand():
    """0 wrong paid, 0 right unpaid; every gold is right about itself."""
    rows = list(hand_written())
    assert len(rows) >= 200 and 100 < sum(right for *_, right in rows) < len(rows) - 100
    for gold, text, right in rows:
        row = {"answer": gold}
        assert answers.math_answer("", f"<answer>{text}</answer>", row) == right, (gold, text)
        assert answers.math_answer("", f"\\boxed{{{gold}}}", row) == 1


@with_math
@pytest.mark.parametrize(
    "gold", ["", " ", r"\boxed{1} \boxed{2}", "?", r"\frac{1}{0}", "5}", "1 2", "x" * 501, None]
)
def test_a_gold_that_is_no_formula(gold):
    with pytest.raises(UserError, match='^"answer" is .*, expected (a formula|one answer)$'):
        answers.math_answer("", "5", {"answer": gold})


@with_math
def test_a_comparison_without_end_is_ended_on_every_thread(monkeypatch):
    """No signal handler and no thread could: Python is inside one multiplication."""
    monkeypatch.setattr(formulas.JUDGE, "seconds", 1)
    row = {"answer": r"\frac{1}{3}"}
    got = []

    def check():
        for text in (r"9^{9^{9^{9}}}", r"\frac{2}{6}", r"8^{9^{9^{9}}}", r"\frac{3}{9}"):
            got.append(answers.math_answer("", f"\\boxed{{{text}}}", row))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert got == [0, 1, 0, 1]
    pid = formulas.JUDGE.process.pid
    assert answers.math_answer("", r"\boxed{\frac{4}{12}}", row) == 1 and formulas.JUDGE.process.pid == pid


@with_math
def test_formulas_in_the_process_of_the_rewards():
    """The limit of a comparison is below that of a reward, so a slow one ends no process of rewards."""
    row = {"prompt": "?", "answer": r"\frac{1}{2}"}
    texts = [r"\boxed{\frac{2}{4}}", r"\boxed{7^{7^{7^{7}}}}", r"\boxed{0.5}", "two"]
    # Beside four busy processes the five seconds of the comparison's limit took a minute, of the clock.
    with rewards_of(None, [f"{FILE}:math_answer"], timeout=600.0) as functions:
        assert functions.values(0, texts, [row] * 4) == [1, 0, 1, 0]
        assert functions.share_failed() == 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(formulas.importlib.util, "find_spec", lambda name: None)
    says = "^math_answer needs the package math-verify: pip install math-verify$"
    with pytest.raises(UserError, match=says):
        answers.math_answer.gold({"answer": r"\frac{17}{19}"})


# the table of docs/data.md


def accepted():
    """→ (how it is written, gold, {checker's name: whether it pays}) for each row of the table."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    table = page.partition("| written")[2].partition("\n\n")[0]
    head, _, *lines = table.splitlines()
    names = [name.strip(" `") for name in head.strip("|").split("|")[2:]]
    for line in lines:
        written, gold, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        yield written.strip("`"), gold.strip("`"), dict(zip(names, cells))


def test_the_table_of_the_page():
    rows = list(accepted())
    there = " ".join(written for written, *_ in rows)
    listed = (r"50\%", r"90^\circ", r"12\text{ cm}", "70{,}000", "$5$", "**73**", "–5", r"\frac12", "1 1/2")
    assert all(written in there for written in listed)
    for written, gold, cells in rows:
        for name, cell in cells.items():
            if name == "math_answer" and answers.math_answer not in CHECKERS:
                continue
            try:
                paid = getattr(answers, name)("", f"<answer>{written}</answer>", {"answer": gold})
                assert cell == ("✓" if paid else ""), (written, name)
            except UserError:
                assert cell == "–", (written, name)


# formats behind a prompt that opens a thought


@pytest.mark.parametrize("response, think, answer", [
    ("a</think>b", 1, 0), ("</think> 5", 1, 0), ("\na\n</think>\n<answer>5</answer>", 1, 1), ("a", 0, 0),
    ("", 0, 0), ("a</think>", 0, 0), ("<think>a</think>b", 0, 0),
    ("<think>a</think><answer>5</answer>", 0, 0),
    ("a</think>b</think>c", 0, 0), ("a<think>b</think>c", 0, 0), ("a</think><answer>5", 1, 0),
])  # fmt: skip
def test_formats_behind_an_opened_thought(response, think, answer):
    for prompt, row in (("q<think>", None), ("q <think>\n", {}), (rendered("q<think>\n"), {})):
        assert answers.think_format(prompt, response, row) == think
        assert answers.answer_format(prompt, response, row) == answer
    if response.count("<think>") == 0:
        assert answers.think_format("q", response, {}) == answers.answer_format("q", response, {}) == 0


def test_rewards_see_the_prompt_behind_its_template(stages):
    """A template that opens the thought is in no "prompt" of a file; the Chat has it, pickled too."""
    policy, tok = hub.load(stages.folder / "sft" / "model")
    tok.template = Template("{{ messages[0].content[:3] }}=", {}, [])
    chat = Chat([{"role": "user", "content": "abc, which a template cuts"}])
    row = {"prompt": chat, "_ids": tok.encode_prompt(chat)}
    roll = sample_responses(policy, tok, [row], 2, 3, 1.0, 0)
    assert [row["prompt"].seen for row in roll.rows] == ["abc="] * 2
    assert pickle.loads(pickle.dumps(chat)).seen == "abc="

    tok = Tokenizer.from_bytes()
    tok.template = Template("{{ messages[0].content }}<|a|><think>\n", {}, [])
    chat = Chat([{"role": "user", "content": "2+3?"}])
    assert answers.think_format(chat, "so</think> 5", {}) == 0
    chat.seen = tok.decode(tok.encode_prompt(chat))
    assert answers.think_format(chat, "so</think> 5", {}) == 1


# golds are read before the first step


def load(tmp_path, rows, *names, skip_bad=False):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    functions = Rewards([load_reward(f"{FILE}:{name}") for name in names])
    return read_rows(tmp_path / "x.jsonl", "prompts", skip_bad=skip_bad, check=functions.check)


GOOD = {"prompt": "p", "answer": "5"}
CHOICES_ROW = {"question": "q", "choices": ["w", "x", "y", "z"]}
VERL = {"data_source": "gsm8k", "prompt": [{"role": "user", "content": "q"}], "ability": "math"}


@pytest.mark.parametrize("name, row, says", [
    ("numeric_answer", {"prompt": "p"}, 'numeric_answer: the row has no "answer", expected a number'),
    ("numeric_answer", {"prompt": "p", "answer": None}, '"answer" is None, expected a number'),
    ("numeric_answer", {"prompt": "p", "answer": "five"}, '"answer" is .five., expected a number'),
    ("numeric_answer", {"prompt": "p", "answer": ["5"]}, "expected a number"),
    ("numeric_answer", {"prompt": "p", "answer": {"target": 5}}, "expected a number"),
    ("numeric_answer", {"prompt": "p", "answer": True}, "expected a number"),
    ("numeric_answer", {"prompt": "p", "answer": r"\boxed{5} \boxed{6}"}, "expected a number"),
    ("numeric_answer", {"prompt": "p", "answer": r"\frac12"}, "expected a number"),
    ("last_number", {"prompt": "p", "answer": "5 or 6"}, "last_number: .*expected a number"),
    ("exact_answer", {"prompt": "p", "answer": " "}, "expected one answer"),
    ("exact_answer", {"prompt": "p"}, 'the row has no "answer"'),
    ("choice_answer", {"prompt": "p", "answer": "A or B"}, "expected a letter from A to J"),
    ("choice_answer", CHOICES_ROW | {"answer": "y"}, "expected a letter from A to J"),
    ("choice_answer", CHOICES_ROW | {"answer": 4}, '"answer" is 4, expected the index of a choice, from 0'),
    ("choice_answer", CHOICES_ROW | {"answer": -1}, '"answer" is -1, expected the index of a choice'),
    ("choice_answer", CHOICES_ROW, 'the row has no "answer"'),
    ("numeric_answer", VERL | {"reward_model": {"style": "rule"}}, 'the row has no "answer"'),
    ("numeric_answer", VERL | {"reward_model": {"ground_truth": None}}, "expected a number"),
    ("numeric_answer", VERL | {"reward_model": {"ground_truth": ["5"]}}, "expected a number"),
    ("numeric_answer", VERL | {"answer": 5, "reward_model": {"ground_truth": "6"}}, "two different answers"),
])  # fmt: skip
def test_a_gold_that_cannot_be_read_is_named_by_line(name, row, says, tmp_path, capsys):
    good = {"prompt": "p", "answer": "B" if name == "choice_answer" else "5"}
    if "question" in row:
        good = CHOICES_ROW | good | {"question": "q"}
        del good["prompt"]
    elif "data_source" in row:
        good = VERL | {"reward_model": {"ground_truth": "5"}}
    with pytest.raises(UserError, match=f"^--data: {tmp_path}/x.jsonl:3: .*{says}") as e:
        load(tmp_path, [good, good, row], name)
    assert "\n" not in str(e.value)
    assert len(load(tmp_path, [good, good, row], name, skip_bad=True)) == 2
    assert "1 of 3 rows are bad (line 3)" in capsys.readouterr().out


@pytest.mark.parametrize("row, response, reward", [
    (VERL | {"reward_model": {"style": "rule", "ground_truth": "72"}}, "#### 72", "numeric_answer"),
    (VERL | {"reward_model": {"ground_truth": 72}, "answer": 72}, "72", "numeric_answer"),
    ({"problem": "p", "ground_truth": "72"}, "72", "numeric_answer"),
    ({"messages": VERL["prompt"], "reward_model": {"ground_truth": "72"}}, "72", "numeric_answer"),
    (CHOICES_ROW | {"answer": 1, "subject": "x"}, "B", "choice_answer"),  # MMLU: from 0
    (CHOICES_ROW | {"answer": 0}, "A", "choice_answer"),
    (CHOICES_ROW | {"answer": 3}, "D) z", "choice_answer"),
    (CHOICES_ROW | {"answer": "C"}, "C", "choice_answer"),
    ({"question": "q", "options": ["1", "2"], "answer": 1}, "B", "choice_answer"),
], ids=str)  # fmt: skip
def test_golds_of_others_are_read(row, response, reward, tmp_path):
    (got,) = load(tmp_path, [row], reward, "think_format")
    checker = getattr(answers, reward)
    assert checker(got["prompt"], response, got) == 1 and checker(got["prompt"], "E", got) == 0


def test_golds_of_a_task_are_read_too():
    """countdown's answer is an expression: numeric_answer would have stopped the run at its first sample."""
    functions = Rewards([load_reward(f"{FILE}:numeric_answer")])
    cfg = SimpleNamespace(data="", eval_data="", own_data=False, seed=0, eval_prompts=2, skip_bad_rows=False)
    task = tasks.get("countdown")
    tok = Tokenizer.from_chars(task.alphabet)
    with pytest.raises(UserError, match='^--task: numeric_answer: "answer" is .*, expected a number'):
        rewards.load_prompts(cfg, task, tok, 64, 8, functions)
    task = tasks.get("chain")
    tok = Tokenizer.from_chars(task.alphabet)
    assert len(rewards.load_prompts(cfg, task, tok, 64, 8, functions)[0]) == 3000


@pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")
def test_gsm8k_is_right_about_itself(capsys):
    """Every gold is read, and pays itself and its whole solution, by each checker."""
    checkers = [answers.numeric_answer, CHECKERS[-1]]
    functions = Rewards([load_reward(f"{FILE}:{checker.__name__}") for checker in checkers])
    rows = read_rows(DATA / "gsm8k_train.jsonl", "prompts", check=functions.check)
    assert len(rows) == 7473
    for row in rows:
        gold = answers.final_answer(row["answer"])
        for checker in checkers:
            assert checker("", row["answer"], row) == 1
        assert answers.last_number("", f"It is ${gold}.", row) == 1
        assert answers.numeric_answer("", f"{gold}1", row) == 0


# fp32


@pytest.mark.parametrize("value", [1e300, -1e300, 3.5e38, float("inf"), float("-inf"), float("nan"), 10**400])
def test_a_reward_beyond_fp32_is_named(value, tmp_path):
    says = "^reward f returned .*(prompt 'a=', response 'b'); it must be a finite number that fp32 can hold$"
    with pytest.raises(RunError, match=says.replace("(prompt", r"\(prompt").replace("'b')", r"'b'\)")):
        call_reward("f", lambda *args: value, "a=", "b", {})


def test_the_largest_reward_of_fp32_is_none_too_large():
    largest = torch.finfo(torch.float32).max
    assert call_reward("f", lambda *args: largest, "a=", "b", {}) == largest


def test_a_weight_that_leaves_fp32_is_named(tmp_path):
    (tmp_path / "r.py").write_text("def f(prompt, response): return 1e38")
    with pytest.raises(UserError, match="what stands after . is not a finite number"):
        load_reward(f"{tmp_path}/r.py:f*1e300")
    function = load_reward(f"{tmp_path}/r.py:f*100")
    assert isinstance(function, RewardFunction)
    zeros = torch.zeros(2, 3)
    roll = SimpleNamespace(tokens=zeros, logp=zeros, texts=["", ""], rows=[{"prompt": ""}] * 2)
    with pytest.raises(RunError, match="^100 × f: a reward of inf .prompt '', response ''.; it must"):
        rewards.score_responses(roll, None, Rewards([function]))
