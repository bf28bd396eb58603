"""Hostile chat templates: random Jinja programs, rendered and tokenized as a chat's (fuzz.py runs them).

A template is built from a grammar: loops in loops, huge ranges, recursion, macros, imports, filters and
methods with huge arguments, ways out of the sandbox by attributes, undefined names, exceptions, megabytes of
text, control characters, half characters. A fifth of them is damaged afterwards, by a few characters.
"""

import os
import random

from nanorlhf.hub.chat import Template
from nanorlhf.tokenizer import Chat, Tokenizer
from tests.faults import limits

NUMBERS = ["0", "1", "-1", "3", "10**4", "10**7", "10**9", "10**10**10", "2**63", "1e308", "messages|length"]
STRINGS = [
    "'x'", "''", "'<|im_end|>'", "'\\x1b[2J'", "'\\ud800'", "'\\udfff'", "'\\u202e'", "'{{ x }}'", "'%s'",
    "'{}'", "'{0.__class__}'", "'é' * 1000", "'a' * 10**6", "'\\x00'", "'</think>'", "'\\r\\n'",
]  # fmt: skip
KNOWN = "messages messages[0] messages[0].content messages[0]['role'] messages[-1].content eos_token".split()
NAMES = [
    *KNOWN, "add_generation_prompt", "tools", "nothing", "loop", "self", "cycler", "joiner", "namespace()",
    "range", "lipsum", "dict", "strftime_now", "raise_exception", "caller", "varargs", "true", "none",
    "messages[9]",
]  # fmt: skip
ATTRIBUTES = """__class__ __mro__ __subclasses__ __globals__ __init__ __builtins__ __import__ __code__
    __dict__ __base__ gi_frame f_globals format format_map content role append pop clear update items
    keys index mro x _TemplateReference__context __getattribute__ __reduce_ex__ func_globals
    tb_frame""".split()
MILD = "upper trim tojson length list sort reverse string first last default('x') lower capitalize".split()
FILTERS = """join('x') replace('a','b'*9999) center(10**9) indent(10**8) wordwrap(1) batch(2)
    slice(10**9)
    truncate(10) map('upper') map(attribute='__class__') select tojson(indent=10**8)
    attr('__class__') format(1) sum random urlize xmlattr groupby('role') unique int float round(10**9)
    filesizeformat pprint escape safe striptags list|list d|d batch(10**9,'x') nothing""".split()
METHODS = """upper() split('') strip() ljust(10**9) zfill(10**8) replace('','x'*999) join(['x']*10**7)
    format(1) encode() format_map({}) expandtabs(10**8) splitlines() translate({}) count('')
    startswith('x') center(10**10) items() append(1) __class__() mro() __init__() index(9)""".split()
TESTS = "defined none string mapping sequence iterable sameas(1) divisibleby(0) eq(1) in('x') nothing".split()
TEXTS = [
    "x", " ", "\n", "<|im_start|>", "\x1b[31m", "\u202e", "\x00", "{", "}}", "{#", "#}", "é" * 50,
    "x" * 100_000,
]  # fmt: skip
STATEMENTS = [
    "{% import 'os' as os %}", "{% include '/etc/passwd' %}", "{% extends 'x' %}", "{% from 'x' import y %}",
    "{% include messages %}", "{% block x %}{{ self.x() }}{% endblock %}", "{% do x %}", "{% generation %}",
    "{% generation %}x{% endgeneration %}",
]  # fmt: skip
MARKS = ["{%", "%}", "{{", "}}", "'", "(", "\x1b", "\0", "-", "|", ".", "\ud800"]
GOOD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(rng, depth=0):
    """A random template; every other one does, besides, what a template is for."""
    parts = [part(rng, depth) for _ in range(rng.randint(1, 3))]
    if depth == 0 and rng.random() < 0.5:
        parts = [*parts[:-1], GOOD, GENERATION]
    return "".join(parts)


def part(rng, depth):
    """Text, an expression or a statement."""
    kind = rng.choice("text value value value for for if set macro statement filter".split())
    if depth > 3:
        kind = rng.choice(["text", "value"])
    inside = template(rng, depth + 1) if kind in ("for", "if", "macro", "filter") else ""
    value = expression(rng)
    if kind == "text":
        return rng.choice(TEXTS)
    if kind == "value":
        return "{{" + rng.choice(["", "-"]) + value + rng.choice(["", "-"]) + "}}"
    if kind == "for":
        rows = rng.choice(["messages", "messages", f"range({rng.choice(NUMBERS)})", value, "range(9999)"])
        more = rng.choice(["", "", " recursive", f" if {value}"])
        end = rng.choice(["", "", "{% break %}", "{% continue %}", "{{ loop(messages) }}", "{% else %}x"])
        return "{% for m in " + rows + more + " %}" + inside + end + "{% endfor %}"
    if kind == "if":
        return "{% if " + value + " is " + rng.choice(TESTS) + " %}" + inside + "{% else %}{% endif %}"
    if kind == "set":
        doubled = "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
        once = "{% set x = " + value + " %}"
        return rng.choice([once, "{% set ns = namespace(x=" + value + ") %}" + doubled])
    if kind == "macro":
        calls = "{{ f(a) }}" * rng.choice([0, 1, 2])
        return "{% macro f(a) %}" + inside + calls + "{% endmacro %}{{ f(" + value + ") }}"
    if kind == "filter":
        return "{% filter " + rng.choice(MILD + FILTERS) + " %}" + inside + "{% endfilter %}"
    return rng.choice(STATEMENTS)


def expression(rng, depth=0):
    """A random expression, mostly of things that exist."""
    kinds = "known known name string number attribute mild mild filter method call binary item list"
    kind = rng.choice(kinds.split())
    if depth > 2 or kind == "known":
        return rng.choice(KNOWN)
    if kind == "name":
        return rng.choice(NAMES)
    if kind == "string":
        return rng.choice(STRINGS)
    if kind == "number":
        return rng.choice(NUMBERS)
    left = expression(rng, depth + 1)
    right = expression(rng, depth + 1)
    if kind == "attribute":
        return f"({left})." + ".".join(rng.choices(ATTRIBUTES, k=rng.randint(1, 4)))
    if kind in ("mild", "filter"):
        filters = MILD if kind == "mild" else FILTERS
        return f"({left})|" + "|".join(rng.choices(filters, k=rng.randint(1, 3)))
    if kind == "method":
        return f"({left})." + rng.choice(METHODS)
    if kind == "call":
        return f"{rng.choice(NAMES)}({rng.choice(['', right, '*' + right, '**' + right])})"
    if kind == "binary":
        return f"({left} {rng.choice(['+', '*', '~', '**', '//', '%', 'in', '==', 'and', '<', '-'])} {right})"
    if kind == "item":
        return f"({left})[{rng.choice([right, ':', '::-1', '-1'])}]"
    chosen = f"({left} if {right} else {left})"
    return rng.choice([f"[{left}, {right}]", f"{{'a': {left}}}", chosen, f"[{left}] * 10**8"])


def damaged(rng, text):
    """The text with a few characters cut out or put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.5:
            text = text[:at] + text[at + rng.randint(1, 5) :]
        else:
            text = text[:at] + rng.choice(MARKS) + text[at:]
    return text


def use(text, tok):
    """What a run does with a template: a prompt, a response behind it, a conversation."""
    tok.template = Template(text, {"eos_token": "<|eos|>", "bos_token": ""}, tok.control)
    hi = {"role": "user", "content": "hi <|eos|> \x1b[2J"}
    yes = {"role": "assistant", "content": "yes"}
    tok.decode(tok.encode_prompt(Chat([hi])))
    tok.encode_response(Chat([hi, yes, hi]), "so")
    tok.encode_chat([hi, yes, hi, yes])


def attack(number, seed, room):
    """Run template `number` of a seed, in the empty folder `room` → its outcome."""
    rng = random.Random(f"template:{seed}:{number}")
    text = template(rng)
    if rng.random() < 0.2:
        text = damaged(rng, text)
    room.mkdir(exist_ok=True)

    def action():
        os.chdir(room)
        try:
            use(text, Tokenizer.from_bytes())
        finally:
            stop()

    return limits.watched(room, action)


def stop():
    """End the program that renders: the case's process started it."""
    from nanorlhf.hub.chat import RENDERER

    if RENDERER.process is not None:
        RENDERER.process.kill()
        RENDERER.process.wait()
