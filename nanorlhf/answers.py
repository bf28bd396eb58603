"""Rewards that compare a response with its row's "answer", or that check the form of a response.

    --reward nanorlhf/answers.py:numeric_answer
"""

import re
from fractions import Fraction

from nanorlhf.errors import UserError

BOXED = r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"  # takes one level of braces inside: \boxed{\frac{1}{2}}
TAGGED = r"(?s)<answer>((?:(?!</?answer>).)*)</answer>"
MARKED = r"####([^\n]*)"  # of GSM8K
NUMBER = (
    r"([-+]?)\$?("
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?"  # 1,234 or 1234
    r"(?:\.[0-9]+)?"  # .50
    r"(?:[eE][-+]?[0-9]{1,2})?"  # e3
    r"(?:/[0-9]+)?)"  # /4
)
LETTER = r"(?is)(?:the answer is:? )?\(?([a-j])(?:[.):]?|[.):]\s.*)"


def final_answer(text: str) -> str | None:
    r"""The answer that a solution gives in <answer>…</answer>, \boxed{…} or after ####, else the whole text.

    Only the text after the last </think> counts. None if there are two different answers: a response that
    lists all candidates must not be right with one of them.

    >>> final_answer(r"<think>2 + 3</think> The sum is \boxed{5}.")
    '5'
    >>> final_answer("#### 5\n#### 6") is None
    True
    """
    text = text.rpartition("</think>")[2]
    found = re.findall(BOXED, text)
    text = re.sub(BOXED, r"\1", text)  # without this, "#### \boxed{5}" would give two answers
    found += re.findall(TAGGED, text)
    text = re.sub(TAGGED, r"\1", text)
    found += re.findall(MARKED, text)
    if not found:
        found = [text]
    answers = {answer.strip() for answer in found}
    return answers.pop() if len(answers) == 1 else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number such as `-1,234.50`, `$7`, `3/4` or `1e3`.

    None if the whole text is not one number: for `50%`, `7 apples` and `5 or 6`. Digits are ASCII.

    >>> parse_number("-1,234.50"), parse_number("7 apples")
    (Fraction(-2469, 2), None)
    """
    text = text.strip().removesuffix(".").replace("\u2212", "-")  # U+2212 is the minus sign of typesetting
    if len(text) > 40:  # a number of a million digits would take minutes
        return None
    match = re.fullmatch(NUMBER, text)
    if match is None:
        return None
    number = (match[1] + match[2]).replace(",", "")
    numerator, _, denominator = number.partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


def exact_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer is the text of row["answer"], but for outer white space, else 0."""
    right = _right_answer(row, final_answer, "one answer")
    return float(final_answer(response) == right)


def numeric_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer and row["answer"] are the same number, however written, else 0.

    >>> numeric_answer("", "so it is <answer>1,234.0</answer>", {"answer": "#### 1234"})
    1.0
    """
    right = _right_answer(row, _number, "a number")
    return float(_number(response) == right)


def choice_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer is the letter row["answer"] of a multiple choice, else 0.

    `B`, `(B)`, `B.`, `b)`, `B) with its text` and `the answer is B` are the letter B; a longer text is none.
    """
    right = _right_answer(row, _letter, "a letter from A to J")
    return float(_letter(response) == right)


def think_format(prompt: str, response: str, row: dict | None = None) -> float:
    """1 if the response is one <think>…</think> and then some text, else 0."""
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return 0.0
    thought, _, rest = response.partition("</think>")
    starts_with_it = thought.lstrip().startswith("<think>")
    has_more = rest.strip() != ""
    return float(starts_with_it and has_more)


def answer_format(prompt: str, response: str, row: dict | None = None) -> float:
    """1 if the response is one <think>…</think> and one <answer>…</answer>, else 0 (arXiv:2501.12948)."""
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return 0.0
    rest = response.rpartition("</think>")[2].strip()
    if rest.startswith("<answer>") and rest.endswith("</answer>"):
        return think_format(prompt, response)
    return 0.0


def _number(text):
    return parse_number(final_answer(text) or "")


def _letter(text):
    answer = final_answer(text) or ""
    match = re.fullmatch(LETTER, answer.strip())
    return match[1].upper() if match else None


def _right_answer(row, read, expected):
    """What `read` finds in row["answer"], a text or a JSON number. UserError if it finds nothing there."""
    answer = row["answer"]
    want = read(str(answer)) if type(answer) in (str, int, float) else None
    if want is None or want == "":  # no response could be right, or an empty one would be
        raise UserError(f'"answer" is {answer!r:.80}, expected {expected}')
    return want
