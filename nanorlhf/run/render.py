"""Chat templates, the Jinja programs of strangers, rendered by a program aside (aside.py) for hub/chat.py."""

import functools
import json
from datetime import datetime

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanorlhf.run import aside

MEMORY = 1 << 30  # bytes that the process may take, of which Python and Jinja need 50 million
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


@functools.lru_cache(4)
def compiled(text):
    """The template, with what transformers gives to templates. In the sandbox no name leads out of it."""
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(text)


def rendered(question):
    """(template, variables) → (text, "") or (None, what is wrong)."""
    template, variables = question
    try:
        text = compiled(template).render(variables)
    except MemoryError:
        return None, f"it takes more than {MEMORY >> 20} MB"
    except Exception as e:  # a stranger's program may raise anything
        return None, str(e) or type(e).__name__
    if len(text) > LONGEST:
        return None, f"it writes {len(text):,} characters, more than {LONGEST:,}"
    return text, ""


if __name__ == "__main__":
    aside.serve(rendered, MEMORY)
