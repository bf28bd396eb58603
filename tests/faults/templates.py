"""Hostile chat templates: random Jinja programs, rendered and tokenized as a chat's would be (fuzz.py runs them).

A template is built from a grammar: loops in loops, huge ranges, recursion, macros, imports, filters and
methods with huge arguments, ways out of the sandbox by attributes, undefined names, exceptions, megabytes of
text, control characters, half characters. Half of them are damaged afterwards, by a few characters.
"""

import os
import random

from nanorlhf.hub.chat import Template
from nanorlhf.tokenizer import Chat, Tokenizer
from tests.faults import limits

NUMBERS = ["0", "1", "-1", "3", "10**4", "10**7", "10**9", "10**10**10", "2**63", "1e308", "0.1", "messages|length"]
STRINGS = ["'x'", "''", "'<|im_end|>'", "'\\x1b[2J'", "'\\ud800'", "'\\udfff'", "'\\u202e'", "'{{ x }}'", "'%s'", "'{}'",
           "'{0.__class__}'", "'é' * 1000", "'a' * 10**6", "'\\x00'", "'</think>'", "'\\r\\n'"]  # fmt: skip
NAMES = ["messages", "messages[0]", "messages[0].content", "messages[0]['role']", "messages[-1].content", "eos_token",
         "add_generation_prompt", "tools", "nothing", "loop", "self", "cycler", "joiner", "namespace()", "range",
         "lipsum", "dict", "strftime_now", "raise_exception", "caller", "varargs", "true", "none", "messages[9]"]  # fmt: skip
ATTRIBUTES = """__class__ __mro__ __subclasses__ __globals__ __init__ __builtins__ __import__ __code__ __dict__ __base__
    gi_frame f_globals format format_map content role append pop clear update items keys index mro x _TemplateReference__context
    __getattribute__ __reduce_ex__ func_globals tb_frame""".split()
FILTERS = """upper trim tojson length list join('x') sort reverse string replace('a','b'*9999) center(10**9) indent(10**8)
    wordwrap(1) batch(2) slice(10**9) truncate(10) map('upper') map(attribute='__class__') select tojson(indent=10**8)
    attr('__class__') format(1) default('x') first last sum random urlize xmlattr groupby('role') unique int float
    round(10**9) filesizeformat pprint escape safe striptags list|list d|d batch(10**9,'x') nothing""".split()
METHODS = """upper() split('') strip() ljust(10**9) zfill(10**8) replace('','x'*999) join(['x']*10**7) format(1) encode()
    format_map({}) expandtabs(10**8) splitlines() translate({}) count('') startswith('x') center(10**10) items()
    append(1) __class__() mro() __init__() index(9)""".split()
TESTS = "defined none string mapping sequence iterable sameas(1) divisibleby(0) eq(1) in('x') nothing callable".split()


def template(rng, depth=0):
    """A random template."""
    parts = [part(rng, depth) for _ in range(rng.randint(1, 4))]
    return "".join(parts)


def part(rng, depth):
    """Text, an expression or a statement."""
    kind = rng.choice(["text", "value", "value", "value", "for", "for", "if", "set", "macro", "import", "other", "good"])
    if depth > 4:
        kind = rng.choice(["text", "value"])
    inside = template(rng, depth + 1) if kind in ("for", "if", "macro", "other") else ""
    value = expression(rng)
    if kind == "text":
        return rng.choice(["x", " ", "\n", "<|im_start|>", "\x1b[31m", "\u202e", "\x00", "{", "}}", "{#", "#}", "é" * 50,
                           "x" * 100_000])  # fmt: skip
    if kind == "value":
        return "{{" + rng.choice(["", "-"]) + value + rng.choice(["", "-"]) + "}}"
    if kind == "for":
        rows = rng.choice(["messages", "messages", f"range({rng.choice(NUMBERS)})", value, "range(9999)"])
        more = rng.choice(["", "", " recursive", f" if {value}"])
        end = rng.choice(["", "", "{% break %}", "{% continue %}", "{{ loop(messages) }}", "{% else %}x"])
        return "{% for m in " + rows + more + " %}" + inside + end + "{% endfor %}"
    if kind == "if":
        return "{% if " + value + " is " + rng.choice(TESTS) + " %}" + inside + "{% else %}" + "{% endif %}"
    if kind == "set":
        return rng.choice(["{% set x = " + value + " %}", "{% set ns = namespace(x=" + value + ") %}{% set ns.x = ns.x ~ ns.x %}"])
    if kind == "macro":
        return "{% macro f(a) %}" + inside + "{{ f(a) }}" * rng.choice([0, 1, 2]) + "{% endmacro %}{{ f(" + value + ") }}"
    if kind == "import":
        return rng.choice(["{% import 'os' as os %}", "{% include '/etc/passwd' %}", "{% extends 'x' %}",
                           "{% from 'x' import y %}", "{% include messages %}", "{% block x %}{{ self.x() }}{% endblock %}",
                           "{% generation %}x{% endgeneration %}", "{% generation %}", "{% do x %}"])  # fmt: skip
    if kind == "good":
        return "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return "{% filter " + rng.choice(FILTERS) + " %}" + inside + "{% endfilter %}"


def expression(rng, depth=0):
    """A random expression, mostly of things that exist."""
    kind = rng.choice(["name", "string", "number", "attribute", "filter", "filter", "method", "call", "binary", "item", "list"])
    if depth > 3 or kind == "name":
        return rng.choice(NAMES)
    if kind == "string":
        return rng.choice(STRINGS)
    if kind == "number":
        return rng.choice(NUMBERS)
    left = expression(rng, depth + 1)
    right = expression(rng, depth + 1)
    if kind == "attribute":
        return f"({left})." + ".".join(rng.choices(ATTRIBUTES, k=rng.randint(1, 4)))
    if kind == "filter":
        return f"({left})|" + "|".join(rng.choices(FILTERS, k=rng.randint(1, 3)))
    if kind == "method":
        return f"({left})." + rng.choice(METHODS)
    if kind == "call":
        return f"{rng.choice(NAMES)}({rng.choice(['', right, '*' + right, '**' + right])})"
    if kind == "binary":
        return f"({left} {rng.choice(['+', '*', '~', '**', '//', '%', 'in', '==', 'and', '<', '-'])} {right})"
    if kind == "item":
        return f"({left})[{rng.choice([right, ':', '::-1', '-1'])}]"
    return rng.choice([f"[{left}, {right}]", f"{{'a': {left}}}", f"({left} if {right} else {left})", f"[{left}] * 10**8"])


def damaged(rng, text):
    """The text with a few characters cut out or put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.5:
            text = text[:at] + text[at + rng.randint(1, 5) :]
        else:
            text = text[:at] + rng.choice(["{%", "%}", "{{", "}}", "'", "(", "\x1b", "\0", "-", "|", ".", "\ud800"]) + text[at:]
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
    if rng.random() < 0.3:
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
