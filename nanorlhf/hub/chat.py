"""Chat templates of published models: Jinja programs of strangers, run in a sandbox of their own process.

A template writes a conversation as one text, control tokens and all. A user's message must not hold one, so
every control token in a message is broken by a MARK, which `Tokenizer.encode` takes out again.
"""

import regex

from nanorlhf.errors import require
from nanorlhf.run.aside import Aside
from nanorlhf.tokenizer import MARK, any_of

RENDERER = Aside("nanorlhf.run.render", seconds=2)


class Template:
    """text: the Jinja program; names: its variables, such as eos_token; control: texts of control tokens."""

    def __init__(self, text, names, control):
        self.text = text
        self.names = names
        self.forbidden = any_of(set(control) - {"<think>", "</think>"})  # an answer may hold its thought

    def render(self, messages, add_generation_prompt):
        """The text for these messages, as `apply_chat_template` of transformers has it, but for the MARKs.

        UserError for what the template refuses, or for any error in it.
        """
        safe = [{key: self._disarm(message[key]) for key in ("role", "content")} for message in messages]
        variables = dict(
            messages=safe,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
        text, error = RENDERER.ask([self.text, variables | self.names]) or (None, "it takes too long")
        require(not error, f"chat template: {error}")
        return text

    def render_response(self, messages, response):
        """The text of the prompt for these messages, and of the response behind it with its end.

        UserError unless prompt and response are what the policy would read and write. Where the prompt opens
        a thought, and the template drops thoughts (R1), the response itself stands behind that opening; its
        end is then written as the template ends the answer.
        """
        before = self.render(messages, True)
        answered = self.render([*messages, {"role": "assistant", "content": response}], False)
        text = self._disarm(response).removeprefix("<think>")
        parts = [part.strip() for part in text.split("</think>")]  # a template may write other white space
        after = answered.removeprefix(before)
        kept = all(part in after for part in parts) and (len(parts) == 1 or "</think>" in after)
        if answered.startswith(before) and kept:
            return before, after
        opening = before[before.rfind("<think>") :]
        opens = opening.strip() == "<think>"
        shown = f"{response[:40]!r} behind its generation prompt, {before[-40:]!r}"
        require(opens, f"chat template: it does not write the response {shown}")
        require(len(parts) > 1, f"chat template: no thought, ended by </think>, in the response {shown}")
        if opening.endswith("\n"):
            text = text.removeprefix("\n")
        any_answer = {"role": "assistant", "content": "\ufdd0"}  # no character: its one place shows the end
        end = self.render([*messages, any_answer], False).rpartition("\ufdd0")[2]
        return before, text + end

    def _disarm(self, text):
        """A text of a message with a MARK behind the first character of every control token in it."""
        text = regex.sub("[\ud800-\udfff]", "\ufffd", text)
        while self.forbidden.search(text):  # again where two of them overlap
            text = self.forbidden.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text
