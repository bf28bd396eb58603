"""Files of others: every format by a row of it, every mistake by file and line, and the real files whole."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from nanorlhf import answers
from nanorlhf.errors import UserError
from nanorlhf.hub.formats import read_rows
from nanorlhf.tokenizer import Chat

DATA = Path(__file__).resolve().parents[2] / "shared/data"
SIDES = {"chosen": "yes", "rejected": "no"}
HI, YES, NO = ({"role": role, "content": text} for role, text in (
    ("user", "hi"), ("assistant", "yes"), ("assistant", "no")))  # fmt: skip
BE = {"role": "system", "content": "be"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
POST = {"subreddit": "x", "title": "t", "post": "p"}
QUERY = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: yes",
      "rejected": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: no"}  # fmt: skip
HH_PROMPT = HH["chosen"][: -len(" yes")]
HH_TURNS = [HI, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
CHAT = "User:\nhi\n\nAssistant:\n"
THOUGHT = "<think>\nso\n</think>\n\nyes"
OFF = {"train": False}
CHAT3 = "User:\nhi\n\nAssistant:\nno\n\n" + CHAT
CHAT_YES = CHAT3.replace("no", "yes")
ABC = "".join(f"{letter.upper()}) {letter}\n" for letter in "abcdefghijkl")
GSM8K = {"question": "hi", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}

# want, row → prompt, its messages (None: a plain string), the other keys
FORMATS = [
    ("prompts", {"prompt": "p"}, "p", None, {}),
    ("prompts", {"prompt": "p", "ground_truth": "5"}, "p", None, {"answer": "5"}),
    ("prompts", {"prompt": [BE, HI]}, "System:\nbe\n\n" + CHAT, [BE, HI], {}),
    ("prompts", GSM8K, "hi\n", [HI], {"answer": GSM8K["answer"]}),
    ("prompts", {"problem": "hi", "solution": "s", "answer": 7}, "hi\n", [HI], {"answer": 7}),
    ("prompts", {"question": "hi", "options": ["A)1", "2"], "correct": "B"}, "hi\nA)1\nB) 2\n",
     [{"role": "user", "content": "hi\nA)1\nB) 2"}], {"answer": "B"}),
    ("prompts", {"messages": [HI]}, CHAT, [HI], {}),
    ("prompts", {"messages": [HI, YES]}, CHAT, [HI], {}),
    ("prompts", {"prompt": "p", "completion": "c", "label": True}, "p", None, {}),
    ("prompts", HH, HH_PROMPT, HH_TURNS, {}),
    ("prompts", POST | {"summary": "s"}, QUERY, None, {}),
    ("demos", {"prompt": "p", "response": "r"}, "p", None, {"response": "r"}),
    ("demos", {"prompt": "p", "completion": "r"}, "p", None, {"response": "r"}),
    ("demos", {"prompt": "p", "messages": [BE, HI, YES]}, "System:\nbe\n\n" + CHAT, [BE, HI],
     {"response": "yes", "turns": [BE, HI, YES]}),
    ("demos", {"conversations": [HUMAN, GPT]}, CHAT, [HI], {"response": "yes", "turns": [HI, YES]}),
    ("demos", {"instruction": "hi", "input": "", "output": "yes"}, "hi\n", [HI], {"response": "yes"}),
    ("demos", {"instruction": "hi", "input": "x", "output": "yes"}, "hi\n\nx\n",
     [{"role": "user", "content": "hi\n\nx"}], {"response": "yes"}),
    ("demos", GSM8K, "hi\n", [HI], {"response": "48/2 = 24\n#### 1,024", "answer": GSM8K["answer"]}),
    ("demos", POST | {"summary": "s"}, QUERY, None, {"response": " s"}),
    ("demos", {"text": "t"}, "", None, {"response": "t"}),
    ("demos", HH, HH_PROMPT, HH_TURNS, {"response": " yes"}),
    ("pairs", {"prompt": "p"} | SIDES, "p", None, SIDES),
    ("pairs", HH, HH_PROMPT, HH_TURNS, {"chosen": " yes", "rejected": " no"}),
    ("pairs", {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO], "messages": [HI, YES]}, CHAT, [HI],
     SIDES),  # UltraFeedback
    ("pairs", {"chosen": [BE, HI, YES], "rejected": [BE, HI, NO]}, "System:\nbe\n\n" + CHAT, [BE, HI],
     SIDES),
    ("pairs", {"prompt": [HI], "chosen": [YES], "rejected": [NO]}, CHAT, [HI], SIDES),
    ("pairs", {"prompt": "hi", "chosen": [YES], "rejected": [NO]}, CHAT, [HI], SIDES),
    ("pairs", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "no"}}, CHAT, [HI],
     SIDES),  # LlamaFactory
    ("pairs", {"info": POST, "summaries": [{"text": " no"}, {"text": "yes"}], "choice": 1}, QUERY, None,
     {"chosen": " yes", "rejected": " no"}),
    ("kto", {"prompt": "p", "completion": "c", "label": False}, "p", None,
     {"label": False, "completion": "c"}),
    # keys that change what is learnt
    ("demos", {"messages": [HI, YES | {"reasoning_content": "so", "tool_calls": []}]}, CHAT, [HI],
     {"response": THOUGHT, "turns": [HI, YES | {"content": THOUGHT}]}),
    ("demos", {"conversations": [HUMAN, GPT | {"thinking": " so\n"}]}, CHAT, [HI], {"response": THOUGHT,
     "turns": [HI, YES | {"content": THOUGHT}]}),
    ("demos", {"question": "hi", "reasoning": "so", "response": "yes"}, "hi\n", [HI], {"response": THOUGHT}),
    ("demos", {"messages": [HI, NO | {"weight": 0}, HI, YES | {"weight": 1}], "tools": None}, CHAT3,
     [HI, NO | OFF, HI],
     {"response": "yes", "turns": [HI, NO | OFF, HI, YES]}),
    ("demos", {"messages": [HI | {"train": False}, YES, HI, NO | {"train": False}]}, CHAT_YES,
     [HI, YES, HI],
     {"turns": [HI, YES, HI, NO | OFF]}),
    ("prompts", {"question": "hi", "options": None, "choices": ["x"], "system": None}, "hi\nA) x\n",
     [HI | {"content": "hi\nA) x"}], {}),
    ("demos", {"conversations": [HUMAN, GPT], "system": "be"}, "System:\nbe\n\n" + CHAT, [BE, HI],
     {"response": "yes", "turns": [BE, HI, YES]}),
    ("demos", {"messages": [BE, HI, YES], "system": "be"}, "System:\nbe\n\n" + CHAT, [BE, HI],
     {"turns": [BE, HI, YES]}),
    ("demos", {"instruction": "hi", "output": "yes", "system": "be", "history": []}, "System:\nbe\n\n" + CHAT,
     [BE, HI], {"response": "yes"}),
    ("demos", {"system_prompt": "be", "question": "hi", "response": "yes"}, "System:\nbe\n\n" + CHAT,
     [BE, HI],
     {"response": "yes"}),  # OpenOrca
    ("pairs", {"system": "be", "question": "hi"} | SIDES, "System:\nbe\n\n" + CHAT, [BE, HI], SIDES),  # Orca
    ("pairs", {"prompt": [HI]} | SIDES, CHAT, [HI], SIDES),
    # roles
    *(("demos", {"conversations": [{"from": human, "value": "hi"}, {"from": gpt, "value": "yes"}]}, CHAT,
      [HI],
       {"response": "yes", "turns": [HI, YES]})
      for human,
       gpt in (("User", "Assistant"), ("human", "chatgpt"), ("prompter", "model"), ("user", " GPT"))),
    ("prompts", {"messages": [{"role": "developer", "content": "be"}, HI]}, "System:\nbe\n\n" + CHAT,
     [BE, HI], {}),
    # an answer never stays in a prompt
    ("prompts", {"prompt": [HI, YES], "answer": "5"}, CHAT, [HI], {"answer": "5"}),
    ("prompts", {"prompt": [HI, {"role": "model", "content": "yes"}]}, CHAT, [HI], {}),
    ("prompts", {"messages": [HI, YES, NO]}, CHAT, [HI], {}),
    ("prompts", {"conversations": [HUMAN, {"from": "Assistant", "value": "yes"}]}, CHAT, [HI], {}),
    ("prompts", {"prompt": [HI], "completion": [YES]}, CHAT, [HI], {}),
    ("prompts", {"question": "hi", "output": "yes"}, "hi\n", [HI], {}),
    # sides that repeat the prompt
    ("pairs", {"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]}, CHAT, [HI], SIDES),
    ("pairs", {"prompt": [BE, HI], "chosen": [BE, HI, YES], "rejected": [NO]}, "System:\nbe\n\n" + CHAT,
     [BE, HI],
     SIDES),
    ("pairs", {"prompt": "hi", "chosen": [BE, HI, YES], "rejected": [BE, HI, NO]}, "System:\nbe\n\n" + CHAT,
     [BE, HI], SIDES),
    ("pairs", {"system": "be", "chosen": [HI, YES], "rejected": [HI, NO]}, "System:\nbe\n\n" + CHAT, [BE, HI],
     SIDES),
    ("pairs", {"prompt": "a=", "chosen": "a=b", "rejected": "a=c"}, "a=", None, {"chosen": "a=b"}),
    # TRL, with messages
    ("demos", {"prompt": [BE, HI], "completion": [YES]}, "System:\nbe\n\n" + CHAT, [BE, HI],
     {"response": "yes", "turns": [BE | OFF, HI | OFF, YES]}),
    ("demos", {"prompt": [HI, NO, HI], "completion": [YES, HI, NO]},
     "User:\nhi\n\nAssistant:\nno\n\nUser:\nhi\n\n"
     "Assistant:\nyes\n\n" + CHAT, [HI, NO, HI, YES, HI],
     {"response": "no", "turns": [HI | OFF, NO | OFF, HI | OFF, YES, HI, NO]}),
    ("demos", {"prompt": "hi", "completion": [YES]}, CHAT, [HI],
     {"response": "yes", "turns": [HI | OFF, YES]}),
    ("demos", {"prompt": [HI], "completion": "yes"}, CHAT, [HI], {"response": "yes"}),
    ("kto", {"prompt": [HI], "completion": [YES], "label": True}, CHAT, [HI],
     {"label": True, "completion": "yes"}),
    ("kto", {"messages": [HI, YES], "label": False}, CHAT, [HI], {"label": False, "completion": "yes"}),
    ("kto", {"conversations": [HUMAN, GPT], "kto_tag": True}, CHAT, [HI],
     {"label": True, "completion": "yes"}),
    ("kto", {"instruction": "hi", "output": "yes", "label": True}, "hi\n", [HI],
     {"label": True, "completion": "yes"}),
    # choices
    ("prompts", {"question": "hi", "options": {"A": "x", "B": "y", "C": None}, "answer_idx": "B"},
     "hi\nA) x\nB) y\n",
     [HI | {"content": "hi\nA) x\nB) y"}], {}),  # MedQA
    ("prompts", {"question": "hi", "choices": {"text": ["x", 2], "label": ["1", "2"]}, "answerKey": "2"},
     "hi\n1) x\n2) 2\n", [HI | {"content": "hi\n1) x\n2) 2"}], {"answer": "2"}),  # ARC
    ("prompts", {"question": "hi", "options": list("abcdefghijkl")}, "hi\n" + ABC,
     [HI | {"content": "hi\n" + ABC[:-1]}],
     {}),
    ("prompts", {"prompt": "hi? A) x B) y", "options": ["x", "y"]}, "hi? A) x B) y", None, {}),
]  # fmt: skip


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("want, row, prompt, messages, more", FORMATS, ids=str)
def test_formats(want, row, prompt, messages, more, tmp_path, capsys):
    (got,) = read_rows(write(tmp_path / "x.jsonl", row), want)
    assert got["prompt"] == prompt and got["_at"].endswith("x.jsonl:1")
    assert getattr(got["prompt"], "messages", None) == messages
    assert {key: got.get(key) for key in more} == more
    assert ("turns" in got) == ("turns" in more)
    assert capsys.readouterr().out.startswith(f"{tmp_path}/x.jsonl: 1 rows of ")


def test_files(tmp_path, monkeypatch):
    """Lines, one array, gzip of either, whatever they are called; rows are named by line or by number."""
    rows = [{"prompt": "a"}, {"prompt": "é\u2028"}]
    lines = "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\n\n"
    array = json.dumps(rows, indent=1, ensure_ascii=False)
    for name, text in (("a.jsonl", lines), ("b.json", array), ("c.txt", " \n" + array)):
        for data in (text.encode(), gzip.compress(text.encode())):
            (tmp_path / name).write_bytes(data)
            got = read_rows(tmp_path / name, "prompts")
            assert [r["prompt"] for r in got] == ["a", "é\u2028"]
            assert got[1]["_at"] == f"{tmp_path / name}:" + ("2" if name == "a.jsonl" else "row 2")
    (tmp_path / "b.json").write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(UserError, match="b.json:row 2: a JSON number; expected one object"):
        read_rows(tmp_path / "b.json", "prompts")
    (tmp_path / "b.json").write_text('[{"prompt": "a"},\n {"prompt": ')
    with pytest.raises(UserError, match="b.json: bad JSON at line 2, column"):
        read_rows(tmp_path / "b.json", "prompts")


OTHER_FILES = {
    b"\xfd7zXZ\0...": " an xz archive; unpack it first: unxz",
    b"PK\3\4...": " a zip archive; unpack it first: unzip",
    b"BZh91AY": " a bzip2 archive; unpack it first: bunzip2",
    b"\x28\xb5\x2f\xfd...": " a zstd archive; unpack it first: unzstd",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n": " a Git LFS pointer.*git lfs pull",
    b"<!DOCTYPE html><html>": " a web page or XML, no JSON; download",
    b'\n{\n  "prompt": "p"\n}\n{\n  "prompt": "q"\n}\n': "2: bad JSON at column 2.*each object on one line",
    b'{\n  "data": [\n  {"prompt": "p"}]}': "1: bad JSON.*each object on one line",
    b'{"prompt": "p",\r\n "answer": 3}\n': "1: bad JSON.*each object on one line",
    b'{"messages": [\n {}]}\n': "1: bad JSON.*each object on one line",
    b'{"prompt": "p"},\n{"prompt": "q"}\n': "1: bad JSON at column 16 .Extra data",
    b"question,answer\n1+1,2\n": "1: bad JSON at column 1 .*expected an object",
}


@pytest.mark.parametrize("data", OTHER_FILES)
def test_a_file_of_another_kind_names_its_cure(data, tmp_path):
    for packed in (data, gzip.compress(data)):
        (tmp_path / "x.json").write_bytes(packed)
        with pytest.raises(UserError, match=f"^--data: {tmp_path}/x.json:{OTHER_FILES[data]}") as e:
            read_rows(tmp_path / "x.json", "prompts")
        assert "\n" not in str(e.value)


def test_parquet(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1....PAR1")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="x.parquet: a Parquet file: pip install pyarrow, .*to_json"):
            read_rows(tmp_path / "x.parquet", "prompts")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(UserError, match="x.parquet: damaged Parquet file"):
        read_rows(tmp_path / "x.parquet", "prompts")
    table = {"chosen": [[HI, YES]], "rejected": [[HI, NO]], "score": [0.5]}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    (row,) = read_rows(tmp_path / "x.parquet", "pairs")
    assert (row["prompt"], row["chosen"], row["rejected"], row["score"]) == (CHAT, "yes", "no", 0.5)


@pytest.mark.parametrize("want, row, says", [
    ("demos", {"messages": [HI, YES], "reasoning_content": "so"}, '"reasoning_content" stands beside'),
    ("pairs", {"prompt": "p", "thinking": "so"} | SIDES, '"thinking" stands beside'),
    ("demos", {"prompt": [HI], "completion": [YES], "reasoning": "so"}, '"reasoning" stands beside'),
    ("kto", {"messages": [HI, YES], "label": True, "reasoning": "so"}, '"reasoning" stands beside'),
    ("prompts", {"text": "t"}, 'missing key "prompt"'),
    ("prompts", {"prompt": "p", "question": "q"}, "ambiguous: prompt and question could each be the prompt"),
    ("demos", {"prompt": "p", "output": "q", "completion": "r"}, "ambiguous: completion and output"),
    ("demos", {"prompt": "p", "answer": "5"}, 'missing key "response"'),
    ("demos", {"prompt": "p", "completion": "c", "label": False}, "a labelled completion.*--loss kto reads"),
    ("demos", {"messages": [HI, YES], "label": False}, "label"),
    ("demos", {"messages": [YES, HI]}, 'the last of "messages" is not an answer'),
    ("demos", {"messages": [YES]}, 'the last of "messages" is not an answer'),
    ("demos", {"messages": []}, '"messages" is list .., expected messages'),
    ("demos", {"messages": "hi"}, '"messages" is string .hi., expected messages'),
    ("pairs", {"chosen": [HI, YES]}, '"rejected" is null None, expected messages'),
    ("prompts", {"question": "p", "choices": {"text": 3, "label": 4}}, '"choices" is .*expected at most 26'),
    ("demos", {"messages": [HI, {"role": "assistant", "content": None}]},
     '"content" of message 2 of "messages" is a null, expected one string'),
    ("demos", {"conversations": [HUMAN, {"from": "gpt", "value": [{"type": "text", "text": "yes"}]}]},
     '"value" of message 2 of "conversations" is a list, expected one string .of a list of parts'),
    ("demos", {"messages": [HI, 3]}, 'message 2 of "messages" has no "role" and "content"'),
    ("demos", {"messages": [HI, {"role": "assistant"}]},
     'message 2 of "messages" has no "role" and "content"'),
    ("demos", {"prompt": ["p"], "response": "r"}, 'message 1 of "prompt" has no'),
    ("demos", {"instruction": "i", "output": None}, '"output" is a null'),
    ("prompts", {"question": 3, "answer": "5"}, '"question" is a number'),
    ("demos", {"prompt": 3, "response": "r"}, '"prompt" is a number'),
    ("demos", {"text": " "}, '"text" is empty'),
    *(("demos", {"messages": [HI, YES | {key: value}]},
      f'"{key}" of message 2 of "messages" is not supported')
      for key,
       value in {"tool_calls": [{}], "function_call": {"name": "f"}, "loss_mask": 0,
        "images": ["x.png"]}.items()),
    *(("prompts", {"messages": [HI], key: value}, f'"{key}" of the row is not supported') for key, value in
      {"tools": "[{}]", "functions": [{}], "history": [["a", "b"]], "image": "x.png"}.items()),
    ("demos", {"messages": [HI, YES | {"weight": 0.5}]},
     '"weight" of message 2 of "messages" is 0.5; an answer has 0'),
    ("demos", {"messages": [HI | {"train": True}, YES]}, '"train" of message 1 of "messages" is True'),
    ("demos", {"messages": [HI, YES | {"weight": 0}]}, 'no answer of "messages" is to be learnt .weight 0'),
    ("demos", {"prompt": "p", "response": "r", "weight": 0}, '"weight" of the row is 0; drop the row'),
    ("demos", {"prompt": "p", "response": "r", "train": False}, '"train" of the row is False'),
    ("demos", {"messages": [HI, YES | {"thinking": "a", "reasoning": "b"}]},
     "thinking and reasoning: expected one"),
    ("demos", {"messages": [HI, YES | {"thinking": ["a"]}]}, "thinking: expected one thought, of text"),
    ("demos", {"messages": [HI, YES | {"thinking": "a", "content": "<think>b</think>c"}]},
     "thinking: expected one"),
    *(("demos", {"messages": [HI, {"role": role, "content": "x"}, YES]},
       f"the role '{role}' of message 2 of \"messages\" is unknown; expected user, assistant or system")
      for role in ("function", "tool", "observation", "ipython", "")),
    ("prompts", {"prompt": "p", "system": "be"}, '"system" is no part of the prompt; .*call it "question"'),
    ("pairs", HH | {"system": "be"}, '"system" is no part of the prompt'),
    ("prompts", {"prompt": "p", "options": ["x", "y"]}, "the list of choices is no part of the prompt"),
    *(("prompts", {"question": "p", "options": options}, '"options" is .*expected at most 26 choices of text')
      for options in ({"text": ["x", "y"], "label": ["A"]}, [{"key": "A", "text": "x"}], "A) x B) y",
       list("ab" * 14), [None, "x"], {"A": ["x"]},
       3)),
    ("prompts", {"messages": [YES]}, 'the last turn of "messages" is not one of the user'),
    ("prompts", {"messages": [BE, YES]}, 'the last turn of "messages" is not one of the user'),
    ("demos", {"prompt": [HI, NO], "response": "yes"}, 'the last turn of "prompt" is not one of the user'),
    ("demos", {"prompt": [HI], "completion": [HI]}, 'the last of "completion" is not an answer'),
    ("demos", {"prompt": [HI], "completion": [BE, YES]},
     '"completion" begins with a turn of the system, behind one of the'),
    ("pairs", {"chosen": [HI, YES, HI], "rejected": [HI, NO, HI]}, 'the last of "chosen" is not an answer'),
    ("pairs", {"prompt": [HI], "chosen": [HI], "rejected": [HI]}, 'the last of "chosen" is not an answer'),
    ("pairs", {"prompt": [BE, HI], "chosen": [HI, YES], "rejected": [HI, NO]},
     '"chosen" begins with a turn of the user'),
    ("pairs", {"prompt": "x", "chosen": [HI, YES], "rejected": [HI, NO]},
     '"chosen" begins with a turn of the user'),
    ("pairs", {"prompt": [HI], "chosen": [YES | {"weight": 0}], "rejected": [NO]},
     'no answer of "chosen" is to be'),
    ("demos", {"prompt": "p", "response": "r", "label": 0},
     '"label" beside "response" is a labelled completion'),
    ("demos", {"instruction": "p", "output": "r", "label": True},
     '"label" beside "output" is a labelled completion'),
    ("pairs", {"prompt": [HI], "completion": [YES], "label": True},
     '"label" beside "completion".*--loss kto reads'),
    ("kto", {"prompt": "p", "response": "r", "label": 1}, '"label" is 1, expected true or false'),
    ("kto", {"prompt": [HI], "completion": [HI], "label": True}, 'the last of "completion" is not an answer'),
    ("pairs", {"prompt": "p", "response": "r"}, 'missing key "chosen"'),
    ("pairs", {"prompt": "p", "chosen": 3, "rejected": "b"}, '"chosen" is a number'),
    ("pairs", {"chosen": None, "rejected": "b"}, '"chosen" is a null'),
    ("pairs", {"chosen": [HI, YES], "rejected": "b"}, '"rejected" is string'),
    ("pairs", {"chosen": [YES], "rejected": [NO]}, 'the last of "chosen" is not an answer'),
    ("pairs", {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, '"choice" must be'),
    ("pairs", {"info": POST, "summaries": [{"text": "a"}], "choice": 0}, '"choice" must be'),
    ("pairs", {"info": POST, "summaries": 3, "choice": 0}, '"choice" must be'),
    ("pairs", {"info": 3, "summaries": [], "choice": 0}, '"info" is a number'),
    ("pairs", {"info": {"post": 3}, "summaries": [], "choice": 0}, '"post" is a number'),
], ids=str)  # fmt: skip
def test_a_wrong_row_is_named(want, row, says, tmp_path, capsys):
    """By file and line; --skip_bad_rows drops and counts it, unless most rows are like it."""
    good = next(r for w, r, *_ in FORMATS if w == want)
    path = write(tmp_path / "x.jsonl", good, good, row)
    with pytest.raises(UserError, match=f"^--my_data: {tmp_path}/x.jsonl:3: .*{says}") as e:
        read_rows(path, want, "--my_data")
    assert "\n" not in str(e.value)
    assert len(read_rows(path, want, skip_bad=True)) == 2
    assert "dropped: " in (out := capsys.readouterr().out) and "1 of 3 rows are bad (line 3)" in out
    with pytest.raises(UserError, match=r"x.jsonl: 2 of 3 rows are bad \(line 1, 2\), more than half: "):
        read_rows(write(path, row, row, good), want, skip_bad=True)


def test_two_formats_in_one_file(tmp_path, capsys):
    rows = [{"prompt": "p", "response": "r"}] * 3 + [{"instruction": "i", "output": "o"}, "no object"]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(UserError, match=r"x.jsonl:4: the format instruction \+ output, in a file of prompt"):
        read_rows(path, "demos")
    assert len(read_rows(path, "demos", skip_bad=True)) == 3
    assert "2 of 5 rows are bad (line 4, 5)" in capsys.readouterr().out


@pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")
def test_real_files(capsys):
    gsm8k = read_rows(DATA / "gsm8k_train.jsonl", "prompts")
    assert len(gsm8k) == 7473 and "7473 rows of question\n" in capsys.readouterr().out
    for row in gsm8k:  # every answer parses, to a whole number, and is right about itself
        number = answers.parse_number(answers.final_answer(row["answer"]))
        assert number is not None and number.denominator == 1
        assert answers.numeric_answer(row["prompt"], row["answer"], row) == 1
        assert answers.numeric_answer(row["prompt"], str(number + 1), row) == 0
    demos = read_rows(DATA / "gsm8k_train.jsonl", "demos")
    assert "7473 rows of question + answer (GSM8K)\n" in capsys.readouterr().out
    assert not any("<<" in row["response"] for row in demos)
    assert all(answers.numeric_answer(row["prompt"], row["response"], row) for row in demos)
    hh = read_rows(DATA / "hh_harmless_test.jsonl.gz", "pairs")
    assert len(hh) == 2307 and sum(len(r["prompt"].messages) > 1 for r in hh) > 1600
    for row in hh:
        assert isinstance(row["prompt"], Chat) and row["prompt"].messages[-1]["role"] == "user"
        assert row["prompt"].endswith("\n\nAssistant:")
    out = capsys.readouterr().out
    assert "5 of 2312 pairs answer different prompts" in out
    assert "2307 rows of chosen + rejected transcripts (HH-RLHF)\n" in out
