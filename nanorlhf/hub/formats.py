"""Files of prompts, demonstrations and preferences, in the formats that others publish → rows of one shape.

    {"prompt", ["answer"]}               a prompt, and its right answer           (PPO, GRPO, distillation)
    {"prompt", "response"}               demonstrations, or the chosen response of a pair (SFT)
    {"prompt", "chosen", "rejected"}     preferences                                      (RM, DPO)
    {"prompt", "completion", "label"}    one response, liked or not                       (DPO with kto)

A format is known by its keys; where several fit, the first in the order of `_recognise` counts. A row keeps
its other keys. A question, an instruction or a conversation becomes a `Chat`, which a chat template renders;
a "prompt" that is a string is taken as it stands. A key that changes what is learnt is used or refused.
"""

import itertools
import re

from nanorlhf.errors import UserError, memory_for, require
from nanorlhf.hub.files import check_text, json_type, parse, read_objects
from nanorlhf.tokenizer import Chat

TURN = "\n\nAssistant:"  # of HH-RLHF; the last one starts the response
QUESTIONS = ("prompt", "question", "problem", "instruction")
RESPONSES = ("response", "completion", "output", "solution", "summary")
ANSWERS = ("answer", "final_answer", "ground_truth", "correct", "answerKey")
WANTED = {
    "prompts": ("prompt",),
    "demos": ("prompt", "response"),
    "pairs": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "chosen", "rejected"),
}
CHATS = ("messages", "conversations")
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "system",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
REFUSED = """tools functions tool_calls function_call tool_call_id documents chat_template_kwargs history
    prefix mask masks loss loss_mask trainable train_detail image images video videos audio audios""".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
    with memory_for(f"{flag}: {path}", "take a smaller file, or split it"):
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
    _refuse_keys(row, "the row")
    for key in ("weight", "train"):
        require(row.get(key) in (None, 1), f'"{key}" of the row is {row.get(key)!r}; drop the row or the key')
    name, found = _recognise(row, want)
    if want == "demos" and "chosen" in found:
        name = f"{name}, the chosen ones"
        found["response"] = found["chosen"]
    prompt = found["prompt"]
    cure = 'is no part of the prompt; a "prompt" of text is taken as it stands, call it "question"'
    if prompt is not None:
        told = [turn["content"] for turn in getattr(prompt, "messages", [])]
        require(all(turn["content"] in told for turn in _system(row)), f'"system" {cure}')
        require(all(text in prompt for _, text in _choices(row)), f"the list of choices {cure}")
    _read_answer(row, found)
    keys = [*WANTED[want], "answer", "completion", "label"]
    if want == "demos":
        keys.append("turns")
    return name, {key: found[key] for key in keys if key in found}


def _refuse_keys(item, place):
    """UserError for a key with which others would render, or learn, other tokens than we do."""
    for key in REFUSED:
        empty = item.get(key) in (None, "", "[]", [], {})
        require(empty, f'"{key}" of {place} is not supported; drop the row, or remove the key')


def _read_answer(row, found):
    """Set found["answer"]: verl nests it in {"reward_model": {"ground_truth"}}, MMLU has a choice's index."""
    nested = row.get("reward_model")
    if isinstance(nested, dict) and "ground_truth" in nested:
        answer = found.setdefault("answer", nested["ground_truth"])
        same = answer == nested["ground_truth"]
        require(same, 'ambiguous: "reward_model" and the row have two different answers; keep one')
    answer = found.get("answer")
    choices = _choices(row)
    if type(answer) is int and choices:
        require(0 <= answer < len(choices), f'"answer" is {answer}, expected the index of a choice, from 0')
        found["answer"] = choices[answer][0]


def _recognise(row, want):
    label = row.get("label", row.get("kto_tag"))
    labelled = isinstance(label, bool)
    if not row.keys().isdisjoint(RESPONSES):
        labelled = labelled or label in (0, 1) or want == "kto"
    if labelled and "chosen" not in row and want != "prompts":
        return _labelled(row, want, label)
    if row.keys() >= {"info", "summaries", "choice"}:
        return _comparison(row)
    if want in ("pairs", "kto") or row.keys() >= {"chosen", "rejected"}:
        if want != "prompts":
            _refuse_thought(row, "chosen")
        return _pair(row)
    for key in CHATS:
        if key in row:
            return _conversation(row, key, want)
    if row.keys() >= {"post", "summary"}:
        response = f" {str(row['summary']).strip()}"
        return "post + summary (TL;DR)", {"prompt": _reddit(row), "response": response}
    if want == "demos" and "text" in row and row.keys().isdisjoint(QUESTIONS):
        check_text(row, ("text",), ("text",))
        return "text", {"prompt": "", "response": row["text"]}
    return _single(row, want)


def _labelled(row, want, label):
    """One completion, liked or not. As a demonstration it might be a bad one, so only KTO takes it."""
    key = _first(row, (*RESPONSES, *CHATS))
    message = f'"label" beside "{key}" is a labelled completion, not a pair of "chosen" and "rejected"'
    require(want == "kto", f"{message}; train_dpo.py --loss kto reads such rows")
    require(isinstance(label, bool), f'"label" is {label!r}, expected true or false')
    name, found = _conversation(row, key, "demos") if key in CHATS else _single(row, "demos")
    if "turns" in found:
        _require_learnt(found["turns"][-1:], key)
    return f"{name} + label", found | {"completion": found["response"], "label": label}


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
    turns = _behind(_system(row), _messages(row, key), key)
    if want == "prompts":
        return key, {"prompt": _open(turns, key, want)}
    _refuse_thought(row, key)
    found = _answered(turns, key)
    _require_learnt(turns[1:], key)
    return key, found


def _open(turns, key, want):
    """The Chat that the assistant is to answer. In a file of prompts the answers behind it are left out."""
    while want == "prompts" and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    asks = turns and turns[-1]["role"] == "user"
    require(asks, f'the last turn of "{key}" is not one of the user, which could be answered')
    return Chat(turns)


def _answered(turns, key):
    """Turns that end in an answer → the prompt before it, the response, and all turns."""
    *prompt, last = turns
    right = prompt and last["role"] == "assistant"
    require(right, f'the last of "{key}" is not an answer of the assistant to a turn before it')
    return {"prompt": Chat(prompt), "response": last["content"], "turns": turns}


def _require_learnt(turns, key):
    learnt = any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns)
    require(learnt, f'no answer of "{key}" is to be learnt (weight 0 or train false); drop the row')


def _behind(before, turns, key):
    """The turns before and these, which may repeat those before."""
    if turns[: len(before)] == before:
        return turns
    last = before[-1]["role"]
    first = turns[0]["role"]
    fits = (last == "user") == (first == "assistant")
    require(fits, f'"{key}" begins with a turn of the {first}, behind one of the {last}')
    return before + turns


def _pair(row):
    """Strings, messages or transcripts."""
    if isinstance(row.get("chosen"), (list, dict)):
        return _pair_of_messages(row)
    key = _first(row, QUESTIONS)
    if key not in row and row.keys() >= {"chosen", "rejected"}:
        return _pair_of_transcripts(row)
    prompt = _prompt(row, key, "pairs")
    check_text(row, ("chosen", "rejected"))
    found = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    return f"{key} + chosen + rejected", found


def _pair_of_messages(row):
    """UltraFeedback and TRL, where each side may repeat the prompt; LlamaFactory's conversations."""
    name = "chosen + rejected messages"
    before = _system(row)
    for key in ("prompt", "conversations"):
        if isinstance(row.get(key), list):
            name = f"{key} + chosen + rejected"
            before = _behind(before, _messages(row, key), key)
    found = {}
    prompts = []
    for key in ("chosen", "rejected"):
        turns = _messages(row, key)
        asked = {"role": "user", "content": row.get("prompt")}
        if isinstance(asked["content"], str) and asked not in turns:
            turns = _behind([asked], turns, key)
        turns = _behind(before, turns, key)
        side = _answered(turns, key)
        _require_learnt(turns[-1:], key)
        found[key] = side["response"]
        prompts.append(side["prompt"])
    prompt, other = prompts
    found["prompt"] = prompt if prompt.messages == other.messages else None
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
    """[{"role", "content"}], or ShareGPT's [{"from", "value"}], checked → the former.

    A thought becomes part of the content. "train": False marks an answer that is not to be learnt.
    """
    messages = row.get(key)
    if isinstance(messages, dict):
        messages = [messages]
    right = isinstance(messages, list) and messages
    require(right, f'"{key}" is {json_type(messages)} {messages!r:.40}, expected messages')
    return [_message(m, f'message {n} of "{key}"') for n, m in enumerate(messages, start=1)]


def _message(m, place):
    m = m if isinstance(m, dict) else {}
    _refuse_keys(m, place)
    name = m.get("role", m.get("from"))
    right = isinstance(name, str) and not m.keys().isdisjoint(("content", "value"))
    require(right, f'{place} has no "role" and "content" (or "from" and "value")')
    key = _first(m, ("content", "value"))
    text = m.get(key)
    cure = 'expected one string (of a list of parts their joined text, "" for null)'
    require(isinstance(text, str), f'"{key}" of {place} is a {json_type(text)}, {cure}')
    role = ROLES.get(name.strip().lower())
    require(role, f'the role {name!r} of {place} is unknown; expected user, assistant or system')
    message = {"role": role, "content": _with_thought(m, text)}
    for key in ("weight", "train"):
        right = m.get(key) in (None, 0, role == "assistant")
        require(right, f'"{key}" of {place} is {m.get(key)!r}; an answer has 0 or 1, other messages 0')
        if m.get(key) == 0 and role == "assistant":
            message["train"] = False
    return message


def _with_thought(item, text):
    """An answer behind its thought, as models write it that think."""
    there = [key for key in THOUGHTS if item.get(key)]
    if not there:
        return text
    thought = item[there[0]]
    right = len(there) == 1 and isinstance(thought, str) and "</think>" not in text + thought
    require(right, f"{' and '.join(there)}: expected one thought, of text, and none in the answer itself")
    return f"<think>\n{thought.strip()}\n</think>\n\n{text.lstrip()}"


def _refuse_thought(row, key):
    """UserError for a thought of the row beside several answers: whose it is, is not said."""
    there = _first(row, THOUGHTS)
    require(not row.get(there), f'"{there}" stands beside "{key}"; put it into the message that has it')


def _system(row):
    """The system's turn, if it stands in a key of its own."""
    key = _first(row, ("system", "system_prompt"))
    if not row.get(key):
        return []
    check_text(row, (key,))
    return [{"role": "system", "content": row[key]}]


def _first(row, names):
    """The first of these keys that has a value."""
    return next((name for name in names if row.get(name)), names[0])


def _single(row, want):
    """One question, with a response to imitate or an answer to check; GSM8K's answers serve as both."""
    keys = {}
    for part, names in (("prompt", QUESTIONS), ("response", RESPONSES), ("answer", ANSWERS)):
        there = [key for key in names if key in row]
        require(len(there) < 2, f"ambiguous: {' and '.join(there)} could each be the {part}; keep one")
        if there:
            keys[part] = there[0]
    gsm8k = want == "demos" and "response" not in keys and "####" in str(row.get("answer"))
    if gsm8k:
        keys["response"] = "answer"
    names = [keys.get(part, part) for part in WANTED[want]]
    check_text(row, [name for name in names if not isinstance(row.get(name), list)])
    form = " + ".join(names)
    found = {part: row[key] for part, key in keys.items()}
    found["prompt"] = _prompt(row, keys["prompt"], want)
    if want == "demos" and isinstance(found["response"], list):
        _refuse_thought(row, keys["response"])
        found |= _completed(found["prompt"], _messages(row, keys["response"]), keys["response"])
    elif want == "demos":
        found["response"] = _with_thought(row, found["response"])
    if gsm8k:  # <<48/2=24>> is for a calculator
        form += " (GSM8K)"
        found["response"] = re.sub(r"<<[^<>]*>>", "", found["response"])
    return form, found


def _completed(prompt, completion, key):
    """TRL's prompt and completion of messages. The answers in the prompt are not learnt."""
    before = getattr(prompt, "messages", [{"role": "user", "content": prompt}])
    found = _answered(_behind(before, completion, key), key)
    learnt = found["turns"][len(before) :]
    _require_learnt(learnt, key)
    found["turns"] = [turn | {"train": False} for turn in before] + learnt
    return found


def _prompt(row, key, want):
    """A string as it stands; messages, or a question with its input and choices, as a Chat."""
    if isinstance(row.get(key), list):
        return _open(_behind(_system(row), _messages(row, key), key), key, want)
    check_text(row, (key,), (key,))
    text = row[key]
    if key == "prompt":
        return text
    if row.get("input"):
        text = f"{text}\n\n{row['input']}"
    for label, choice in _choices(row):
        lettered = re.match(rf"\(?{re.escape(label)}[).:]", choice)
        text += f"\n{choice}" if lettered else f"\n{label}) {choice}"
    turns = [*_system(row), {"role": "user", "content": text}]
    return Chat(turns, f"{text}\n" if len(turns) == 1 else None)


def _choices(row):
    """[(label, text)] of a list, of an object {"A": text}, or of ARC's {"text": [...], "label": [...]}."""
    key = _first(row, ("options", "choices"))
    choices = row.get(key)
    if not choices:
        return []
    pairs = []
    if isinstance(choices, list) and len(choices) <= len(LETTERS):
        pairs = list(zip(LETTERS, choices))
    elif isinstance(choices, dict) and choices.keys() == {"text", "label"}:
        labels = choices["label"]
        texts = choices["text"]
        if isinstance(labels, list) and isinstance(texts, list):
            pairs = list(itertools.zip_longest(labels, texts))
    elif isinstance(choices, dict):
        pairs = [(label, text) for label, text in choices.items() if text is not None]
    right = pairs and all(isinstance(x, (str, int, float)) for pair in pairs for x in pair)
    require(right, f'"{key}" is {choices!r:.40}, expected at most {len(LETTERS)} choices of text')
    return [(str(label), str(text)) for label, text in pairs]


def _reddit(post):
    """The query of "Learning to summarize from human feedback" (arXiv:2009.01325)."""
    require(isinstance(post, dict), f'"info" is a {json_type(post)}, expected the post')
    check_text(post, ("post",), ("post",))
    subreddit = post.get("subreddit") or ""
    title = post.get("title") or ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post['post']}\n\nTL;DR:"
