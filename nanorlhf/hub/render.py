"""A chat template, run in a process of its own: a stranger's program may loop for ever or ask for terabytes.

`chat.py` starts this file as a program. It imports nothing of ours and no torch, so that it starts in a tenth
of a second. From standard input it reads JSON, a line each: the template, then the variables of each text to
be rendered. For each of those it writes one line, {"text": …} or {"error": …}.
"""

import contextlib
import functools
import json
import math
import sys
import time
from datetime import datetime

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY = 1 << 30  # bytes that the process may take, of which Python and Jinja need 50 million
SECONDS = 5  # of the processor's time, for one text
LONGEST = 10_000_000  # characters of a text


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks answers of the assistant; what is between is rendered."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(x, ensure_ascii=False, **options):
    return json.dumps(x, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(1)
def compiled(text):
    """The template, with what transformers gives to templates. In the sandbox no name leads out of it."""
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(text)


def answer(template, variables):
    """→ {"text": …} or {"error": …}."""
    try:
        text = compiled(template).render(variables)
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB"}
    except Exception as e:  # a stranger's program may raise anything
        return {"error": f"{e or type(e).__name__}"}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text):,} characters, more than {LONGEST:,}"}
    return {"text": text}


def limit(name, most):
    """Set a limit of this process. Windows has none, and macOS not all: there chat.py waits, and ends it."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        resource.setrlimit(number, (most, hard))


def main():
    limit("RLIMIT_AS", MEMORY)
    template = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        limit("RLIMIT_CPU", math.ceil(time.process_time()) + SECONDS)  # beyond it the process is ended
        print(json.dumps(answer(template, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
