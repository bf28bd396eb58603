"""Checkers of answers: of rows with an "answer", and of a form.

    --reward nanorlhf/answers.py:numeric_answer
"""

import re
from fractions import Fraction

from nanorlhf.errors import UserError


def final_answer(text: str) -> str | None:
    r"""What a solution says in <answer>…</answer>, \boxed{…} or behind #### (GSM8K), else the whole text; in
    all cases behind its last </think>. None if it says two."""
    boxed = r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"  # one level of braces inside: \frac{1}{2}
    text = text.rpartition("</think>")[2]
    found, text = re.findall(boxed, text), re.sub(boxed, r"\1", text)
    tagged = r"(?s)<answer>((?:(?!</?answer>).)*)</answer>"
    found += re.findall(tagged, text) + re.findall(r"####([^\n]*)", re.sub(tagged, r"\1", text))
    answers = {answer.strip() for answer in found or [text]}
    return answers.pop() if len(answers) == 1 else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of `-1,234.50`, `$7`, `3/4` or `1e3`; None for anything else, `50%` and `7 apples` too.

    ASCII digits only, and the whole text: who writes ten numbers must not be right with one of them.
    """
    text = text.strip().removesuffix(".").replace("\u2212", "-")
    digits = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2})?(?:/[0-9]+)?"
    match = re.fullmatch(rf"([-+]?)\$?({digits})", text) if len(text) <= 40 else None
    if match is None:
        return None
    try:
        top, _, bottom = "".join(match.groups()).replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def exact_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer is row["answer"], white space at the ends aside, else 0."""
    return float(final_answer(response) == _wanted(row, final_answer, "one answer"))


def numeric_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer and row["answer"] are the same number, however written, else 0."""

    def number(text):
        return parse_number(final_answer(text) or "")

    return float(number(response) == _wanted(row, number, "a number"))


def choice_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's final answer is the letter row["answer"] of a multiple choice, else 0.

    `B`, `(B)`, `B.`, `b)`, `B) with its text` and `the answer is B` are the letter B; a longer text is none.
    """

    def letter(text):
        said = (final_answer(text) or "").strip()
        match = re.fullmatch(r"(?is)(?:the answer is:? )?\(?([a-j])(?:[.):]?|[.):]\s.*)", said)
        return match and match[1].upper()

    return float(letter(response) == _wanted(row, letter, "a letter from A to J"))


def think_format(prompt: str, response: str, row: dict | None = None) -> float:
    """1 if the response is one <think>…</think> and then some text, else 0."""
    thought, end, rest = response.partition("</think>")
    once = response.count("<think>") == response.count("</think>") == 1
    return float(bool(end) and once and thought.lstrip().startswith("<think>") and bool(rest.strip()))


def answer_format(prompt: str, response: str, row: dict | None = None) -> float:
    """1 if the response is one <think>…</think> and one <answer>…</answer>, else 0 (arXiv:2501.12948)."""
    rest = response.rpartition("</think>")[2].strip()
    once = response.count("<answer>") == response.count("</answer>") == 1
    tagged = once and rest.startswith("<answer>") and rest.endswith("</answer>")
    return think_format(prompt, response) * tagged


def _wanted(row, read, what):
    """What `read` finds in row["answer"], text or JSON number. UserError if nobody could ever be right."""
    answer = row["answer"]
    want = read(str(answer)) if type(answer) in (str, int, float) else None
    if want is None or want == "":
        raise UserError(f'"answer" is {answer!r:.80}, expected {what}')
    return want
