"""Rewards that compare a response with its row's "answer", or that check the form of a response.

    --reward nanorlhf/answers.py:numeric_answer

docs/data.md has a table of what each of them accepts. Their `gold(row)` is the right answer, or a UserError
where the row has none that the reward can read: a run reads all of them before its first step.
"""

import re
from fractions import Fraction
from functools import partial

from nanorlhf.errors import require
from nanorlhf.run import formulas

MARK = re.compile(
    r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?P<brace>\{)?"
    r"|(?P<tag><answer>)"
    r"|(?P<hashes>####)"  # of GSM8K
)
DEEP = 20  # marks within marks; Python's recursion ends at 1,000
NUMBER = (
    r"([-+]?)\$?("
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?"  # 1,234 or 1234
    r"(?:\.[0-9]+)?"  # .50
    r"(?:[eE][-+]?[0-9]{1,2})?"  # e3
    r"(?:/[0-9]+)?)"  # /4
)
# A number in a text, but for those inside a formula; a mixed one, 1 1/2, is taken whole and is none.
IN_PROSE = r"(?<![\w./{}^_\\\u2013])(?:[0-9]+ (?=[0-9]+/))?" + NUMBER + r"(?![\w^{\\])"
LETTER = r"(?is)(?:the answer is:? )?\(?([a-j])(?:[.):]?|[.):]\s(.*))"
# Another letter in the text of a choice. Neither an article ("a cat") nor a unit ("10 J") is one.
OTHER = r"(?i)(?<![\w°'-])(?:(?<!\d )|(?=.[.):]))(?:[b-hj]|[ai](?! [a-z]))(?![\w'-])"
IN_TEXT = r"(?s)\\(?:text|textbf|mathrm|mathbf)\{(.*)\}"


def given_answers(text: str) -> list:
    r"""All answers that a response marks: <answer>…</answer>, \boxed{…}, \fbox{…}, #### to the end of a line.

    Without any mark it is the whole text. Only the text after the last </think> counts. "", which no reward
    accepts, stands for a mark that is not closed, for what stands beside a mark within a mark, and for all
    that follows a <think> which is not closed.

    >>> given_answers(r"<think>2 + 3</think> \boxed{\frac{\sqrt{3}}{2}} or \fbox{5}")
    ['\\frac{\\sqrt{3}}{2}', '5']
    >>> given_answers(r"<think>hmm \boxed{5}"), given_answers(r"\boxed{5} and \boxed{")
    ([''], ['5', ''])
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return [""]
    return _marked(text)[0] or [text.strip()]


def _marked(text, depth=0):
    r"""→ the texts of the innermost marks, and the text without marks. "" stands for text beside a mark."""
    answers = []
    bare = ""
    at = 0
    while match := MARK.search(text, at):
        bare += text[at : match.start()]
        start = match.end()
        end = _end(text, match)
        if end < 0 or depth == DEEP:
            return [*answers, ""], bare
        inside, content = _marked(text[start:end], depth + 1)
        answers += inside
        if not inside:
            answers.append(content.strip())
        elif content.strip(" \n$.*") not in inside:  # <answer>3 or \boxed{5}</answer>
            answers.append("")
        bare += content
        at = end
        if match["brace"]:
            at += len("}")
        elif match["tag"]:
            at += len("</answer>")
    bare += text[at:]
    return answers, bare


def _end(text, match):
    """Where the content of a mark ends; -1 if the mark is not closed."""
    start = match.end()
    if match["tag"]:
        return text.find("</answer>", start)
    if match["hashes"]:
        return re.compile("$", re.M).search(text, start).start()
    if not match["brace"]:  # \boxed 5
        return re.compile(r"[^\s{}$]*").match(text, start).end()
    depth = 1
    for token in re.compile(r"\\.|[{}]").finditer(text, start):  # an escaped brace, \{, is no brace
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth == 0:
            return token.start()
    return -1


def final_answer(text: str, read=str.strip):
    r"""The one answer of a solution, as `read` reads it. None for two that differ: listing all is not right.

    >>> final_answer(r"\boxed{0.5} #### 1/2", parse_number), final_answer(r"\boxed{0.5} #### 1/2")
    (Fraction(1, 2), None)
    """
    values = {read(answer) for answer in given_answers(text)}
    value = values.pop()
    return None if values else value


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


def _gold(row, read, expected):
    """What `read` finds in row["answer"], a text or a JSON number. UserError if it finds nothing there."""
    require("answer" in row, f'the row has no "answer", expected {expected}')
    answer = row["answer"]
    gold = final_answer(str(answer), read) if type(answer) in (str, int, float) else None
    # Without this no response could be right, or an empty one would be.
    require(gold is not None and gold != "", f'"answer" is {answer!r:.80}, expected {expected}')
    return gold


def _last(text):
    last = None
    text = text.replace("\u2212", "-")
    for match in re.finditer(IN_PROSE, text):
        if match[2]:
            last = parse_number(match[0])
            before = text[: match.start()]
    if last is None or re.search(r"\b(?:or|and)\W*$", before):  # "5 or 6" is two answers
        return None
    return last


def _letter(text):
    text = text.strip(" *$")
    inner = re.fullmatch(IN_TEXT, text)
    match = re.fullmatch(LETTER, inner[1].strip() if inner else text)
    if match is None:
        return None
    letter = match[1].upper()
    described = match[2] or ""
    named = {letter, *re.findall(OTHER, described.upper())}
    return letter if len(named) == 1 else None


def exact_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's answer is the text of row["answer"], but for outer white space, else 0."""
    return _is_right(prompt, response, row, exact_answer, str.strip)


exact_answer.gold = partial(_gold, read=str.strip, expected="one answer")


def numeric_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's answer and row["answer"] are the same number, however written, else 0.

    >>> numeric_answer("", "so it is <answer>1,234.0</answer>", {"answer": "#### 1234"})
    1.0
    """
    return _is_right(prompt, response, row, numeric_answer, parse_number)


numeric_answer.gold = partial(_gold, read=parse_number, expected="a number")


def last_number(prompt: str, response: str, row: dict) -> float:
    """1 if the last number of the response is that of row["answer"], else 0: for models that mark no answer.

    Where answers are marked, the last number of each must be right.

    >>> last_number("", "5 eggs at $2 make 10 dollars.", {"answer": 10})
    1.0
    """
    return _is_right(prompt, response, row, last_number, _last)


last_number.gold = partial(_gold, read=parse_number, expected="a number")


def choice_answer(prompt: str, response: str, row: dict) -> float:
    """1 if the response's answer is the letter row["answer"] of a multiple choice, else 0.

    `B`, `(B)`, `B.`, `b)`, `B) with its text` and `the answer is B` are the letter B. A longer text is none,
    nor is one that names another letter: `A. or B.`
    """
    return _is_right(prompt, response, row, choice_answer, _letter)


choice_answer.gold = partial(_gold, read=_letter, expected="a letter from A to J")


def formula_gold(row):
    gold = exact_answer.gold(row)
    require(_same_formula(gold, gold), f'"answer" is {gold!r:.80}, expected a formula')
    return gold


def math_answer(prompt: str, response: str, row: dict) -> float:
    r"""1 if each of the response's answers is the formula row["answer"], in any form, else 0.

    \frac{2}{4} is 0.5, and (x+1)^2 is x^2+2x+1. It needs the package math-verify.
    """
    gold = math_answer.gold(row)
    response = _from_thought(prompt, response, row)
    return float(all(_same_formula(gold, answer) for answer in given_answers(response)))


math_answer.gold = formula_gold


def think_format(prompt: str, response: str, row: dict | None = None) -> float:
    """1 if the response is one <think>…</think> and then some text, else 0.

    Behind a prompt that ends in <think>, as those of DeepSeek-R1 do, it must not open another.
    """
    response = _from_thought(prompt, response, row)
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
        return think_format(prompt, response, row)
    return 0.0


def _from_thought(prompt, response, row):
    """The response, with the <think> that its prompt ends in. row["_seen"]: the prompt after its template."""
    seen = (row or {}).get("_seen", prompt)
    return f"<think>{response}" if seen.rstrip().endswith("<think>") else response


def _is_right(prompt, response, row, reward, read):
    gold = reward.gold(row)
    response = _from_thought(prompt, response, row)
    return float(final_answer(response, read) == gold)


def _same_formula(gold, answer):
    """Two numbers are compared exactly, all else by math-verify in a process of its own."""
    right = parse_number(gold)
    number = parse_number(answer)
    if right is None or number is None:
        return formulas.equal(gold, answer)
    return right == number
