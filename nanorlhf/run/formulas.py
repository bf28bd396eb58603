"""Whether two LaTeX formulas are equal, judged by the package math-verify in a program aside (aside.py).

The package's own time limit is a signal handler, which works on the main thread only and cannot interrupt
`9^{9^{9}}`.
"""

import functools
import importlib.util
import logging
import re

from nanorlhf.errors import require
from nanorlhf.run import aside
from nanorlhf.run.aside import Aside

LONG = 500  # characters; a longer text is no formula that anybody asked for
WORD = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
NAME = r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?"  # x, \theta, x_1, f(x)
AROUND = ("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")
TIDY = (
    ("^[\u2013\u2212]", "-"),  # en dash, minus sign
    (r"^\{([^{}]*)\}$", r"\1"),  # {5}
    (r"\\varnothing", r"\\emptyset"),
    ("~", " "),
    ("°", r"^\\circ"),
    (r"(?<![\d.])(\d+) +(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"^([-\d.]+)[eE]([-+]?\d+)$", r"\1\\cdot 10^{\2}"),
    (r"^([-$\d.,/\\]+) (?!.*\b(?:or|and|not)\b)([A-Za-z ]{3,})$", r"\1\\text{ \2}"),  # 12 square feet
)
EQUALS = r"(?<![<>!:\\])=|\\(?:approx|cong|equiv|simeq?)(?![A-Za-z])"
THOUSANDS = r"(?<![\w.^])\d{1,3}(?:(?:\\[,;! ]| )\d{3})+(?!\d)"  # 70 000, 70\,000


JUDGE = Aside("nanorlhf.run.formulas", seconds=5)


@functools.lru_cache(1 << 16)
def equal(gold, answer):
    """Whether an answer is the formula `gold`; equal(gold, gold) says whether `gold` can be read.

    A text that is no formula equals nothing. Decimals are exact: 0.33 is not 1/3.
    """
    message = "math_answer needs the package math-verify: pip install math-verify"
    require(importlib.util.find_spec("math_verify"), message)
    return bool(JUDGE.ask([gold, answer]))  # None: it took too long


# ------------------------------------------------------------------------------------------------------------
# In the other process


def judged(question):
    """(gold, answer) → whether they are equal; False for what no parser can read."""
    try:
        return bool(compare(*question))
    except Exception:  # of any kind: a parser of foreign text, and of 9/0
        return False


def compare(gold, answer):
    """Whether two texts are the same words or the same formula, in this process and without a limit."""
    from math_verify import verify
    from sympy import FiniteSet

    gold = tidy(gold)
    answer = tidy(answer)
    if words(gold) or words(answer):  # as a product of letters, "listen" would be "silent"
        return words(gold) == words(answer)
    if "%" in gold and "%" not in answer:  # the sign may be left out: 12.5% is 12.5, and 0.125
        if compare(re.sub(r"\\?%", "", gold), answer):
            return True
    if "=" in gold and "=" not in answer and not re.match(NAME + r"\s*=", gold):
        return False  # x = 1 may be answered by 1, but x + y = 1 may not
    expected = read(gold)
    in_units = not expected.free_symbols  # 12 cm reads as 12, but 2ab as a product
    if in_units and units(gold) and units(answer) and units(gold) != units(answer):
        return False
    for side in sides(gold, answer):
        found = read(side)
        # (1, 2) is a pair or an interval, and no set; 5, 5 is a set, and no number.
        same_kind = isinstance(expected, FiniteSet) == isinstance(found, FiniteSet)
        options = dict(numeric_precision=30, allow_set_relation_comp=True, timeout_seconds=None)
        if not (same_kind and verify(expected, found, **options)):
            return False
    return True


def tidy(text):
    r"""A formula without what is around it, its numbers as LaTeX has them. ValueError if it is none.

    >>> tidy("$1 1/2$."), tidy(r"70\,000"), tidy(r"0.1\overline{6}")
    ('1\\frac{1}{2}', '70000', '\\frac{15}{90}')
    """
    text = text.strip().removesuffix(".").strip()
    for left, right in AROUND:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)].strip().removesuffix(".")
    for pattern, replacement in TIDY:
        text = re.sub(pattern, replacement, text)
    text = re.sub(THOUSANDS, lambda match: re.sub(r"[^\d]", "", match[0]), text)
    text = re.sub(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", _fraction, text)
    depth = 0
    for token in re.findall(r"\\.|[{}$]", text):
        depth += (token == "{") - (token == "}")
        if depth < 0 or token in ("$", r"\(", r"\["):
            raise ValueError("two formulas, or half of one")
    if depth or not text or len(text) > LONG or re.search(r"(?<![_^\d])\d+\s+\d", text):
        raise ValueError("no formula")
    return text


def _fraction(match):
    """0.1\\overline{6} = (16 - 1) / 90"""
    before, once, period = match.groups()
    first = int(before + once or 0)
    numerator = first * (10 ** len(period) - 1) + int(period)
    return f"\\frac{{{numerator}}}{{{10 ** len(once) * (10 ** len(period) - 1)}}}"


def words(text):
    r"""A text of words, as \text{No solution}, in lower case; "" for a formula, as xy."""
    plain = re.sub(WORD, r"\1", text).lower()
    plain = " ".join(plain.split()).removesuffix(".")
    is_text = re.fullmatch(r"(?:[^\W\d_]|[ '])+", plain) and re.search(r"[^\W\d_]{3}", plain)
    return plain if is_text else ""


def units(text):
    r"""The unit of a number, and the base of its numeral, as a set: 12\text{ cm}, 12 cm, 1010_2."""
    texts = re.findall(WORD + r"(\s*\^\{?\d)?", text)  # the exponent of \text{ ft}^2 is part of the unit
    found = " ".join(map("".join, texts)).replace("{", "").split()
    bare = re.sub(WORD, "", text)
    found += re.findall(r"^[-\d.,]+\s*([A-Za-z]+)$", bare)
    found += re.findall(r"\d_\{?(\d+)", bare)
    return set(found) - {"and", "or"}


def sides(gold, answer):
    """The sides of `x = 2 + 3 = 5` but for the name: all must be right, or `6 = 5` would be 5.

    So must those of `5 \\approx 6`: an approximation is another answer.
    """
    if "=" in gold or re.search(r"[,;]|\b(?:and|or)\b", answer):
        return [answer]
    found = re.split(EQUALS, answer)
    if len(found) > 1 and re.fullmatch(NAME, found[0].strip()):
        del found[0]
    return found


@functools.lru_cache(4096)
def read(text):
    """A formula → its sympy expression, with decimals as exact fractions. ValueError if it is none."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, I, Rational

    for content in re.findall(WORD, text):  # the package would drop the text of 6\\text{ or 5}
        second = re.search(r"(?<![A-Za-z])\d|\b(?:or|and|not|but)\b", content)
        if second and content.strip() not in ("or", "and") and not re.fullmatch(WORD, text):
            raise ValueError("a second answer in a text")
    extraction = [LatexExtractionConfig(boxed_match_priority=0)]
    box = f"\\boxed{{{text}}}"
    (found,) = parse(box, extraction, fallback_mode="no_fallback", parsing_timeout=None)
    exact = {number: Rational(str(number)) for number in found.atoms(Float)}
    for symbol in found.free_symbols:
        if symbol.name == "i":
            exact[symbol] = I
    return found.xreplace(exact) if exact else found


if __name__ == "__main__":
    logging.disable()  # the package logs that its own time limit is off
    compare("x", "y")  # loads the package and its grammar, which takes a second and does not count
    aside.serve(judged, memory=2 << 30)
