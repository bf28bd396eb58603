"""Files of prompts, demonstrations and preferences, in the formats that others publish → rows of one shape.

    {"prompt", ["answer"]}               a prompt, and its right answer                   (PPO, GRPO)
    {"prompt", "response"}               demonstrations, or the chosen response of a pair (SFT)
    {"prompt", "chosen", "rejected"}     preferences                                      (RM, DPO)
    {"prompt", "completion", "label"}    one response, liked or not                       (DPO with kto)

A format is known by its keys; where several fit, the first in the order of `_recognise` counts. A row keeps
its other keys. A question, an instruction or a conversation becomes a `Chat`, which a chat template renders;
a "prompt" that is a string is taken as it stands.
"""

import re

from nanorlhf.errors import UserError, require
from nanorlhf.hub.files import check_text, json_type, parse, read_objects
from nanorlhf.tokenizer import Chat

TURN = "\n\nAssistant:"  # of HH-RLHF; the last one starts the response
QUESTIONS = ("prompt", "question", "problem", "instruction")
RESPONSES = ("response", "completion", "output", "solution", "summary")
ANSWERS = ("answer", "final_answer", "ground_truth", "correct")
WANTED = {
    "prompts": ("prompt",),
    "demos": ("prompt", "response"),
    "pairs": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "chosen", "rejected"),
}
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's {"from", "value"}
LETTERS = "ABCDEFGHIJ"  # of choices
SHOWN = 20  # line numbers in one message


def read_rows(path, want, flag="--data", skip_bad=False, check=None):
    """The rows of a file of any format above, as `files.read_objects` reads it; says which format it is.

    want       "prompts", "demos" or "pairs"; "kto" takes pairs or labelled completions
    skip_bad   drop and count the rows that cannot be read; else the first is a UserError with file and line
    check      check(row) raises a UserError for a row that cannot be used: rewards read its answer

    Pairs that answer different prompts are always dropped and counted. It is a UserError when more than half
    of the rows are dropped, and a bad row when it is of another format than those before.
    """
    rows = []
    apart = []  # pairs whose sides answer different prompts
    bad = []
    name = None
    for at, item in read_objects(path, flag, WANTED[want]):
        try:
            raw = parse(item)
            form, found = _convert(raw, want)
            require(form == (name or form), f"the format {form}, in a file of {name}")
            if check:
                check(raw | found)
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
    for dropped, reason in ((apart, "pairs answer different prompts"), (bad, "rows are bad")):
        if dropped:
            lines = [at.rpartition(":")[2] for at, _ in dropped]
            shown = ", ".join(lines[:SHOWN])
            if len(lines) > SHOWN:
                shown += f" and {len(lines) - SHOWN} more"
            message = f"{path}: {len(dropped)} of {total} {reason} (line {shown})"
            half = 2 * len(dropped) <= total
            require(half, f"{flag}: {message}, more than half: {dropped[0][1]}")
            print(f"dropped: {message}")
    print(f"{path}: {len(rows)} rows of {name}")
    return rows


def _convert(row, want):
    """An object → the name of its format, {the keys that are wanted}; "prompt" is None where a pair has two.

    UserError, without the place, for a row that cannot be used.
    """
    name, found = _recognise(row, want)
    if want == "demos" and "chosen" in found:
        name = f"{name}, the chosen ones"
        found["response"] = found["chosen"]
    _read_answer(row, found)
    keys = [*WANTED[want], "answer"]
    if want == "demos":
        keys.append("turns")
    return name, {key: found[key] for key in keys if key in found}


def _read_answer(row, found):
    """Set found["answer"]: verl nests it in {"reward_model": {"ground_truth"}}, MMLU has a choice's index."""
    nested = row.get("reward_model")
    if isinstance(nested, dict) and "ground_truth" in nested:
        answer = found.setdefault("answer", nested["ground_truth"])
        same = answer == nested["ground_truth"]
        require(same, 'ambiguous: "reward_model" and the row have two different answers; keep one')
    answer = found.get("answer")
    choices = row.get("options", row.get("choices"))
    if type(answer) is int and isinstance(choices, list):
        require(0 <= answer < len(choices), f'"answer" is {answer}, expected the index of a choice, from 0')
        found["answer"] = LETTERS[answer]


def _recognise(row, want):
    labelled = isinstance(row.get("label"), bool)
    if "completion" in row:
        labelled = labelled or "label" in row or want == "kto"
    if labelled and "chosen" not in row and want != "prompts":
        return _labelled(row, want)
    if row.keys() >= {"info", "summaries", "choice"}:
        return _comparison(row)
    if want in ("pairs", "kto") or row.keys() >= {"chosen", "rejected"}:
        return _pair(row)
    for key in ("messages", "conversations"):
        if key in row:
            return _conversation(row, key, want)
    if row.keys() >= {"post", "summary"}:
        response = f" {str(row['summary']).strip()}"
        return "post + summary (TL;DR)", {"prompt": _reddit(row), "response": response}
    if want == "demos" and "text" in row and row.keys().isdisjoint(QUESTIONS):
        check_text(row, ("text",), ("text",))
        return "text", {"prompt": "", "response": row["text"]}
    return _single(row, want)


def _labelled(row, want):
    """One completion, liked or not. As a demonstration it might be a bad one, so only KTO takes it."""
    message = 'a labelled completion, not a pair of "chosen" and "rejected"'
    require(want == "kto", f"{message}; train_dpo.py --loss kto reads such rows")
    check_text(row, ("prompt", "completion"), ("prompt",))
    label = row.get("label")
    require(isinstance(label, bool), f'"label" is {label!r}, expected true or false')
    return "prompt + completion + label", {"prompt": row["prompt"]}


def _comparison(row):
    """Comparisons of OpenAI's TL;DR."""
    found = {"prompt": _reddit(row["info"])}
    texts = []
    for summary in row["summaries"] if isinstance(row["summaries"], list) else []:
        if isinstance(summary, dict) and isinstance(summary.get("text"), str):
            texts.append(f" {summary['text'].strip()}")
    right = len(texts) == 2 and row["choice"] in (0, 1)
    require(right, '"choice" must be 0 or 1, and "summaries" two objects with a "text"')
    found["chosen"] = texts[row["choice"]]
    found["rejected"] = texts[1 - row["choice"]]
    return "info + summaries + choice (TL;DR)", found


def _conversation(row, key, want):
    turns = _messages(row, key)
    last = turns[-1]
    prompt = turns
    if last["role"] == "assistant" and len(turns) > 1:
        prompt = turns[:-1]
    else:
        require(want == "prompts", f'the last of "{key}" is not an answer of the assistant')
    return key, {"prompt": Chat(prompt), "response": last["content"], "turns": turns}


def _pair(row):
    """Strings, messages or transcripts."""
    if isinstance(row.get("chosen"), (list, dict)):
        return _pair_of_messages(row)
    if "prompt" not in row and row.keys() >= {"chosen", "rejected"}:
        return _pair_of_transcripts(row)
    check_text(row, WANTED["pairs"], ("prompt",))
    return "prompt + chosen + rejected", {key: row[key] for key in WANTED["pairs"]}


def _pair_of_messages(row):
    """UltraFeedback and TRL, where each side may repeat the prompt; LlamaFactory's conversations."""
    name = "chosen + rejected messages"
    before = []
    for key in ("prompt", "conversations"):
        if isinstance(row.get(key), list):
            name = f"{key} + chosen + rejected"
            before = _messages(row, key)
    *prompt, chosen = before + _messages(row, "chosen")
    *other, rejected = before + _messages(row, "rejected")
    found = {"prompt": None, "chosen": chosen["content"], "rejected": rejected["content"]}
    if prompt == other:
        if not prompt:
            check_text(row, ("prompt",), ("prompt",))
            prompt = [{"role": "user", "content": row["prompt"]}]
        found["prompt"] = Chat(prompt)
    return name, found


def _pair_of_transcripts(row):
    """HH-RLHF: both sides are the whole dialogue; the last TURN starts the response."""
    check_text(row, ("chosen", "rejected"))
    prompt, turn, chosen = row["chosen"].rpartition(TURN)
    other, other_turn, rejected = row["rejected"].rpartition(TURN)
    require(turn or other_turn, f'no "prompt", and no {TURN!r} to end one')
    same = prompt + turn == other + other_turn
    chat = _transcript(prompt + turn) if same else None
    return "chosen + rejected transcripts (HH-RLHF)", dict(prompt=chat, chosen=chosen, rejected=rejected)


def _transcript(text):
    """A dialogue of HH-RLHF, up to the answer → Chat, of this very text for models without a template."""
    head, *parts = re.split(r"\n\n(Human|Assistant):", text.removesuffix(TURN))
    turns = []
    if head.strip():
        turns.append({"role": "system", "content": head.strip()})
    for name, content in zip(parts[::2], parts[1::2]):
        role = "user" if name == "Human" else "assistant"
        turns.append({"role": role, "content": content.strip()})
    return Chat(turns, text)


def _messages(row, key):
    """[{"role", "content"}], or ShareGPT's [{"from", "value"}], checked → the former."""
    messages = row[key]
    if isinstance(messages, dict):
        messages = [messages]
    right = isinstance(messages, list) and messages
    require(right, f'"{key}" is {json_type(messages)} {messages!r:.40}, expected messages')
    out = []
    for m in messages:
        if not isinstance(m, dict):
            m = {}
        role = m.get("role", m.get("from"))
        content = m.get("content", m.get("value"))
        right = isinstance(role, str) and isinstance(content, str)
        require(right, f'a message of "{key}" has no "role" and "content" (or "from" and "value") of text')
        out.append({"role": ROLES.get(role, role), "content": content})
    return out


def _single(row, want):
    """One question, with a response to imitate or an answer to check; GSM8K's answers serve as both."""
    keys = {}
    for part, names in (("prompt", QUESTIONS), ("response", RESPONSES), ("answer", ANSWERS)):
        there = [key for key in names if key in row]
        require(len(there) < 2, f"ambiguous: {' and '.join(there)} could each be the {part}; keep one")
        if there:
            keys[part] = there[0]
    used = [keys[part] for part in WANTED[want] if part in keys]
    gsm8k = want == "demos" and "response" not in keys and "####" in str(row.get("answer"))
    if gsm8k:
        keys["response"] = "answer"
        used.append("answer (GSM8K)")
    found = {part: row[key] for part, key in keys.items()}
    if isinstance(found.get("prompt"), list):
        found["prompt"] = Chat(_messages(found, "prompt"))
    check_text(found, WANTED[want], ("prompt",))
    if keys["prompt"] != "prompt":
        found["prompt"] = _question(row, found["prompt"])
    if gsm8k:  # <<48/2=24>> is for a calculator
        found["response"] = re.sub(r"<<[^<>]*>>", "", found["response"])
    return " + ".join(used), found


def _question(row, text):
    """A question with its input and its choices, as Alpaca and multiple-choice files have them → Chat."""
    if row.get("input"):
        text = f"{text}\n\n{row['input']}"
    choices = row.get("options", row.get("choices"))
    if isinstance(choices, list):
        for letter, choice in zip(LETTERS, choices):
            lettered = re.match(rf"\(?{letter}[).:]", str(choice))
            text += f"\n{choice}" if lettered else f"\n{letter}) {choice}"
    return Chat([{"role": "user", "content": text}], f"{text}\n")


def _reddit(post):
    """The query of "Learning to summarize from human feedback" (arXiv:2009.01325)."""
    require(isinstance(post, dict), f'"info" is a {json_type(post)}, expected the post')
    check_text(post, ("post",), ("post",))
    subreddit = post.get("subreddit") or ""
    title = post.get("title") or ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post['post']}\n\nTL;DR:"
