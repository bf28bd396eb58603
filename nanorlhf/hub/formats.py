"""Files of prompts, demonstrations and preferences in the formats that are about → rows of one shape.

    {"prompt", ["answer"]}               what a policy is to answer, and what is right    (PPO, GRPO)
    {"prompt", "response"}               demonstrations; of pairs, the chosen response    (SFT)
    {"prompt", "chosen", "rejected"}     preferences                                      (RM, DPO)
    {"prompt", "completion", "label"}    one response, liked or not                       (DPO with kto)

A format is known by its keys; of several that fit, the first in the order of `_convert`. A row keeps its
other keys. What its format calls a question, an instruction or a conversation becomes a `Chat`, which a chat
template renders; a "prompt" that is a string is taken as it stands.
"""

import re

from nanorlhf.errors import UserError, require
from nanorlhf.hub.files import check_text, json_type, parse, read_objects
from nanorlhf.tokenizer import Chat

TURN = "\n\nAssistant:"  # of HH-RLHF; the last one starts the response
QUESTIONS = ("prompt", "question", "problem", "instruction")
RESPONSES = ("response", "completion", "output", "solution", "summary")
ANSWERS = ("answer", "final_answer", "ground_truth", "correct")
WANTED = {"prompts": ("prompt",), "demos": ("prompt", "response"), "pairs": ("prompt", "chosen", "rejected")}
WANTED["kto"] = WANTED["pairs"]
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's {"from", "value"}
SHOWN = 20  # line numbers in one message


def read_rows(path, want, flag="--data", skip_bad=False):
    """The rows of a file of any format above, as `files.read_objects` reads it; says which format it is.

    want       "prompts", "demos" or "pairs"; "kto" takes pairs or labelled completions
    skip_bad   drop and count the rows that cannot be read; else the first is a UserError with file and line

    Pairs that answer different prompts are always dropped and counted. It is a UserError when more than half
    of the rows are dropped, and a bad row when it is of another format than those before.
    """
    rows, apart, bad, name = [], [], [], None
    for at, item in read_objects(path, flag, WANTED[want]):
        try:
            raw = parse(item)
            form, found = _convert(raw, want)
            require(form == (name or form), f"the format {form}, in a file of {name}")
        except UserError as e:
            if not skip_bad:
                raise UserError(f"{flag}: {at}: {e}") from None
            bad.append((at, e))
            continue
        name = form
        if found["prompt"] is None:
            apart.append((at, "comparing answers to different questions teaches nothing"))
        else:
            rows.append(raw | found | {"_at": at})
    total = len(rows) + len(apart) + len(bad)
    for dropped, what in ((apart, "pairs answer different prompts"), (bad, "rows are bad")):
        if dropped:
            lines = [at.rpartition(":")[2] for at, _ in dropped]
            more = f" and {len(lines) - SHOWN} more" * (len(lines) > SHOWN)
            said = f"{len(dropped)} of {total} {what} (line {', '.join(lines[:SHOWN])}{more})"
            require(2 * len(dropped) <= total, f"{flag}: {path}: {said}, more than half: {dropped[0][1]}")
            print(f"dropped: {path}: {said}")
    print(f"{path}: {len(rows)} rows of {name}")
    return rows


def _convert(row, want):
    """An object → the name of its format, {the keys that are wanted}; "prompt" is None where a pair has two.

    UserError, without the place, for what cannot be used.
    """
    labelled = isinstance(row.get("label"), bool) or "completion" in row and ("label" in row or want == "kto")
    if labelled and "chosen" not in row and want != "prompts":  # as a demonstration it might be a bad one
        what = 'a labelled completion, not a pair of "chosen" and "rejected"'
        require(want == "kto", f"{what}; train_dpo.py --loss kto reads such rows")
        check_text(row, ("prompt", "completion"), ("prompt",))
        right = isinstance(row.get("label"), bool)
        require(right, f'"label" is {row.get("label")!r}, expected true or false')
        return "prompt + completion + label", {"prompt": row["prompt"]}
    if {"info", "summaries", "choice"} <= row.keys():  # comparisons of OpenAI's TL;DR
        name, found = "info + summaries + choice (TL;DR)", {"prompt": _reddit(row["info"])}
        summaries = row["summaries"] if isinstance(row["summaries"], list) else []
        texts = [s["text"] for s in summaries if isinstance(s, dict) and isinstance(s.get("text"), str)]
        right = len(texts) == 2 and row["choice"] in (0, 1)
        require(right, '"choice" must be 0 or 1, and "summaries" two objects with a "text"')
        sides = texts[row["choice"]], texts[1 - row["choice"]]
        found["chosen"], found["rejected"] = (f" {text.strip()}" for text in sides)
    elif {"chosen", "rejected"} <= row.keys() or want in ("pairs", "kto"):
        name, found = _pair(row)
    elif talk := next((key for key in ("messages", "conversations") if key in row), None):
        name, turns = talk, _messages(row, talk)
        answered = turns[-1]["role"] == "assistant" and len(turns) > 1
        require(answered or want == "prompts", f'the last of "{talk}" is not an answer of the assistant')
        prompt = Chat(turns[:-1] if answered else turns)
        found = {"prompt": prompt, "response": turns[-1]["content"], "turns": turns}
    elif {"post", "summary"} <= row.keys():
        name = "post + summary (TL;DR)"
        found = {"prompt": _reddit(row), "response": f" {str(row['summary']).strip()}"}
    elif want == "demos" and "text" in row and not set(QUESTIONS) & row.keys():
        check_text(row, ("text",), ("text",))
        return "text", {"prompt": "", "response": row["text"]}
    else:
        name, found = _single(row, want)
    if want == "demos" and "chosen" in found:
        name, found["response"] = f"{name}, the chosen ones", found["chosen"]
    more = ("answer", "turns") if want == "demos" else ("answer",)
    return name, {key: found[key] for key in (*WANTED[want], *more) if key in found}


def _pair(row):
    """Strings; transcripts (HH-RLHF); messages (UltraFeedback, TRL), LlamaFactory's conversations."""
    name = "chosen + rejected"
    if isinstance(row.get("chosen"), (list, dict)):
        start = next((key for key in ("conversations", "prompt") if isinstance(row.get(key), list)), None)
        before = _messages(row, start) if start else []
        (*prompt, chosen), (*other, rejected) = (before + _messages(row, key) for key in WANTED["pairs"][1:])
        same, name = prompt == other, f"{start} + {name}" if start else f"{name} messages"
        if same and not prompt:
            check_text(row, ("prompt",), ("prompt",))
            prompt = [{"role": "user", "content": row["prompt"]}]
        prompt, chosen, rejected = Chat(prompt), chosen["content"], rejected["content"]
    elif "prompt" in row or not row.keys() >= {"chosen", "rejected"}:
        check_text(row, WANTED["pairs"], ("prompt",))
        same, name, (prompt, chosen, rejected) = True, f"prompt + {name}", map(row.get, WANTED["pairs"])
    else:
        check_text(row, ("chosen", "rejected"))
        (*prompt, chosen), (*other, rejected) = (row[key].rpartition(TURN) for key in ("chosen", "rejected"))
        require(any(prompt + other), f'no "prompt", and no {TURN!r} to end one')
        same, name, prompt = prompt == other, f"{name} transcripts (HH-RLHF)", _transcript("".join(prompt))
    return name, dict(zip(WANTED["pairs"], (prompt if same else None, chosen, rejected)))


def _transcript(text):
    """A dialogue of HH-RLHF, up to the answer → Chat, of this very text for models without a template."""
    head, *parts = re.split(r"\n\n(Human|Assistant):", text.removesuffix(TURN))
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[1::2])]
    return Chat([{"role": "system", "content": head.strip()}] * bool(head.strip()) + turns, text)


def _messages(row, key):
    """[{"role", "content"}], or ShareGPT's [{"from", "value"}], checked → the former."""
    out = []
    messages = [row[key]] if isinstance(row[key], dict) else row[key]
    right = isinstance(messages, list) and messages
    require(right, f'"{key}" is {json_type(messages)} {messages!r:.40}, expected messages')
    for m in messages:
        m = m if isinstance(m, dict) else {}
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        right = isinstance(role, str) and isinstance(content, str)
        require(right, f'a message of "{key}" has no "role" and "content" (or "from" and "value") of text')
        out.append({"role": ROLES.get(role, role), "content": content})
    return out


def _single(row, want):
    """One question, with a response to imitate or an answer to check; GSM8K's answers serve as both."""
    found = {}
    for name, names in (("prompt", QUESTIONS), ("response", RESPONSES), ("answer", ANSWERS)):
        there = [key for key in names if key in row]
        require(len(there) < 2, f"ambiguous: {' and '.join(there)} could each be the {name}; keep one")
        if there:
            found[name] = there[0]
    used = [found[key] for key in WANTED[want] if key in found]
    if want == "demos" and "response" not in found and "####" in str(row.get("answer")):
        found["response"], used = "answer", [*used, "answer"]
    name = " + ".join(used)
    out = {key: row[source] for key, source in found.items()}
    if isinstance(out.get("prompt"), list):
        out["prompt"] = Chat(_messages(out, "prompt"))
    check_text(out, WANTED[want], ("prompt",))
    if found["prompt"] != "prompt":
        text = "\n\n".join(filter(None, (out["prompt"], str(row.get("input") or ""))))
        choices = row.get("options", row.get("choices"))
        for letter, choice in zip("ABCDEFGHIJ", choices if isinstance(choices, list) else ()):
            text += f"\n{choice}" if re.match(rf"\(?{letter}[).:]", str(choice)) else f"\n{letter}) {choice}"
        out["prompt"] = Chat([{"role": "user", "content": text}], f"{text}\n")
    if found.get("response") == "answer":  # GSM8K: <<48/2=24>> is for a calculator
        name, out["response"] = f"{name} (GSM8K)", re.sub(r"<<[^<>]*>>", "", out["response"])
    return name, out


def _reddit(post):
    """The query of "Learning to summarize from human feedback" (arXiv:2009.01325)."""
    require(isinstance(post, dict), f'"info" is a {json_type(post)}, expected the post')
    check_text(post, ("post",), ("post",))
    subreddit, title = post.get("subreddit") or "", post.get("title") or ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post['post']}\n\nTL;DR:"
