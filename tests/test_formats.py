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
    ("kto", {"prompt": "p", "completion": "c", "label": False}, "p", None, {"label": False}),
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
    ("demos", {"messages": [HI, {"role": "assistant", "content": None}]}, 'a message of "messages" has no'),
    ("demos", {"messages": [HI, 3]}, 'a message of "messages" has no'),
    ("demos", {"prompt": ["p"], "response": "r"}, 'a message of "prompt" has no'),
    ("demos", {"prompt": 3, "response": "r"}, '"prompt" is a number'),
    ("demos", {"text": " "}, '"text" is empty'),
    ("pairs", {"prompt": "p", "response": "r"}, 'missing key "chosen"'),
    ("pairs", {"prompt": "p", "chosen": 3, "rejected": "b"}, '"chosen" is a number'),
    ("pairs", {"chosen": None, "rejected": "b"}, '"chosen" is a null'),
    ("pairs", {"chosen": [HI, YES], "rejected": "b"}, '"rejected" is string'),
    ("pairs", {"chosen": [YES], "rejected": [NO]}, 'missing key "prompt"'),
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
