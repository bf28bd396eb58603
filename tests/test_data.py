"""Files by their faults, batches by their properties."""

import gzip
import json
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import tasks
from nanorlhf.data import (
    encode_demonstration,
    encode_demonstrations,
    encode_pair,
    epoch_batches,
    microbatches,
    pack,
    pad,
    response_mask,
    split_by_hash,
)
from nanorlhf.errors import UserError
from nanorlhf.hub.files import read_jsonl, write_jsonl
from nanorlhf.tokenizer import Tokenizer

KEYS = ("prompt", "chosen")
GOOD = b'{"prompt": "p", "chosen": "c", "n": 3}\n'


# read_jsonl, write_jsonl, split_by_hash


def test_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    last = '{"prompt": "é\u2028", "chosen": ""}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n  \r\n" + last)
    rows = read_jsonl(str(path), KEYS)
    assert rows == [
        {"prompt": "p", "chosen": "c", "n": 3, "_at": f"{path}:1"},
        {"prompt": "é\u2028", "chosen": "", "_at": f"{path}:4"},
    ]


def test_read_gzip(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 2))
    assert [row["_at"] for row in read_jsonl(path, KEYS)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(gzip.compress(GOOD * 2)[:-12])
    with pytest.raises(UserError, match="damaged gzip"):
        read_jsonl(path, KEYS)


@pytest.mark.parametrize(
    "content, line, says",
    [
        (b"", None, "empty"),
        (b"\xef\xbb\xbf", None, "blank lines"),
        (b"\n \r\n\n", None, "blank lines"),
        (b"PAR1...", None, "Parquet"),
        (b"\x1f\x8b\x08nonsense....", None, "gzip"),
        (GOOD + b"\n{", 3, "bad JSON"),
        (GOOD + b"{'prompt': 1}", 2, "bad JSON"),
        (GOOD + b'{"prompt": NaN}', 2, "NaN"),
        (GOOD + b"9" * 5000, 2, "bad JSON"),
        (GOOD + b"[" * 100_000, 2, "bad JSON"),
        (GOOD[:-1] + GOOD, 1, "bad JSON"),
        (GOOD + b"[1]", 2, "list"),
        (b"null", 1, "null"),
        (b"3.5", 1, "number"),
        (b'"text"', 1, "string"),
        (GOOD + b'{"prompt": "\xe9"}', 2, "UTF-8"),
        (GOOD + b'{"prompt": "a\0b"}', 2, "NUL"),
        (GOOD.decode().encode("utf-16"), 1, "NUL"),
        (b'{"prompt": "p"}', 1, 'missing key "chosen"'),
        (b'{"prompt": "p", "chosen": 3}', 1, '"chosen" is a number'),
        (b'{"prompt": "p", "chosen": null}', 1, '"chosen" is a null'),
        (b'{"prompt": "p", "chosen": true}', 1, '"chosen" is a boolean'),
        (b'{"prompt": ["p"], "chosen": "c"}', 1, '"prompt" is a list'),
        (b'{"prompt": " \\n", "chosen": "c"}', 1, '"prompt" is empty'),
    ],
)
def test_read_refuses(content, line, says, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as e:
        read_jsonl(path, KEYS, nonempty=("prompt",))
    message = str(e.value)
    assert message.startswith(f"--data: {path}:" + (f"{line}:" if line else ""))
    assert says in message and "\n" not in message and len(message) < 400


def test_the_message_shows_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(b"\n" * 16 + b'{"prompt": ""}')
    with pytest.raises(UserError) as e:
        read_jsonl("pairs.jsonl", ("prompt", "chosen", "rejected"))
    row = '{"prompt": …, "chosen": …, "rejected": …}'
    assert str(e.value) == f'--data: pairs.jsonl:17: missing key "chosen" (a row is {row})'


def test_missing_file_and_folder(tmp_path):
    for path in [tmp_path / "none.jsonl", tmp_path]:
        with pytest.raises(UserError, match="--data: "):
            read_jsonl(path, KEYS)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.dictionaries(st.text(), st.text(st.characters()) | st.integers() | st.none())))
def test_write_then_read(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("w") / "rows.jsonl"
    rows = [{**row, "prompt": "é\u2028\n\ud800"} for row in rows] or [{"prompt": ""}]
    write_jsonl(path, rows)
    again = read_jsonl(path, ("prompt",))
    assert [row.pop("_at") for row in again] == [f"{path}:{i + 1}" for i in range(len(rows))]
    assert again == rows
    write_jsonl(path, read_jsonl(path, ("prompt",)))
    assert "_at" not in json.loads(path.read_bytes().split(b"\n")[0])


def test_write_is_atomic(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"prompt": "old"}])

    def fails():
        yield {"prompt": "new"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, fails())
    with pytest.raises(ValueError):
        write_jsonl(path, [{"reward": float("nan")}])
    assert read_jsonl(path, ("prompt",))[0]["prompt"] == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_split_by_hash(monkeypatch):
    monkeypatch.setattr(tasks, "held_out", lambda prompt: prompt == "a")
    rows = [{"prompt": p, "n": n} for n, p in enumerate("abcab")]
    train, test = split_by_hash(rows)
    assert [r["n"] for r in train] == [1, 2, 4] and [r["n"] for r in test] == [0, 3]


# pad, encode_pair, response_mask


def test_pad():
    tokens, lengths = pad([[1, 2, 3], [], [4]], pad_id=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]] and lengths.tolist() == [3, 0, 1]
    assert tokens.dtype == lengths.dtype == torch.int64
    tokens, lengths = pad([], 9)
    assert tokens.shape == (0, 0) and lengths.shape == (0,)


def test_encode_pair():
    tok = Tokenizer.train_bpe(["ab" * 9], 257)
    assert tok.encode("ab") == [256]
    pair = encode_pair(tok, "a", "b", 3)  # apart: "ab" does not become one token
    assert pair == ([97], [98, tok.eos_id])
    assert encode_pair(tok, "a", "b", 2) is None
    assert encode_pair(tok, "a", "", 2) == ([97], [tok.eos_id])
    assert encode_pair(tok, "", "ab", 9) == ([tok.eos_id], [256, tok.eos_id])  # a document
    with pytest.raises(UserError, match="^x.jsonl:4: .*'c'"):
        encode_pair(Tokenizer.from_chars("ab"), "a", "c", 9, at="x.jsonl:4")


def test_encode_demonstration():
    """The mask is True on the response and its EOS, of a conversation on every answer."""
    tok = Tokenizer.from_bytes()
    row = {"prompt": "ab", "response": "cde"}
    ((ids, mask),) = encode_demonstration(tok, row)
    assert ids == [*b"abcde", tok.eos_id] and mask == [False] * 2 + [True] * 4
    assert encode_demonstrations([row, {"prompt": "ab", "response": "cd"}], tok, 5) == [
        ([*b"abcd", tok.eos_id], [False] * 2 + [True] * 3)]  # fmt: skip
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    rows = encode_demonstration(tok, {"turns": talk, "_at": "x.jsonl:1"})
    assert [bytes(i for i, m in zip(*row) if m and i < 256) for row in rows] == [b"b", b"d"]
    assert encode_demonstrations([{"turns": talk}], tok, len(rows[0][0])) == rows[:1]
    with pytest.raises(UserError, match=r"^x.jsonl:1: .* character '.n' is not"):
        encode_demonstration(Tokenizer.from_chars("ab"), {"turns": talk, "_at": "x.jsonl:1"})


def test_response_mask():
    mask = response_mask(torch.tensor([1, 2, 0]), torch.tensor([3, 2, 4]), 4)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    for prompt_lens, lengths in [([1], [5]), ([3], [2]), ([-1], [2])]:
        with pytest.raises(ValueError):
            response_mask(torch.tensor(prompt_lens), torch.tensor(lengths), 4)


def test_mask_counts_the_eos():
    tok = Tokenizer.from_bytes()
    pairs = [encode_pair(tok, p, r, 99) for p, r in [("ab", "cde"), ("a", "")]]
    tokens, lengths = pad([p + r for p, r in pairs], tok.pad_id)
    mask = response_mask(torch.tensor([len(p) for p, _ in pairs]), lengths, tokens.shape[1])
    assert [tokens[b][mask[b]].tolist() for b in range(2)] == [r for _, r in pairs]


# epoch_batches, microbatches, pack


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 12), batch=st.integers(1, 30), seed=st.integers(-5, 2**64), steps=st.integers(1, 9))
def test_every_epoch_holds_each_index_once(n, batch, seed, steps):
    batches = [epoch_batches(n, batch, seed, step) for step in range(steps)]
    assert all(len(b) == batch for b in batches)
    walked = list(chain(*batches))
    for start in range(0, len(walked), n):
        epoch = walked[start : start + n]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n))
    # The stream does not depend on how it is cut into batches.
    assert walked == epoch_batches(n, len(walked), seed, 0)


def test_epochs_and_seeds_differ():
    first, second = epoch_batches(100, 100, 0, 0), epoch_batches(100, 100, 0, 1)
    assert first != second != epoch_batches(100, 100, 1, 1)
    assert first != list(range(100)) and all(type(i) is int for i in first)
    assert epoch_batches(5, 5, 0, 0) == epoch_batches(5, 5, 0, 0)
    assert len(epoch_batches(7, 3, 0, 10**12)) == 3
    for n, batch, step in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        with pytest.raises(ValueError):
            epoch_batches(n, batch, 0, step)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 50), max_size=40), budget=st.integers(0, 200))
def test_microbatches(lengths, budget):
    groups = microbatches(lengths, budget)
    assert sorted(chain(*groups)) == list(range(len(lengths)))
    assert all(groups)
    walked = [lengths[i] for i in chain(*groups)]
    assert walked == sorted(walked, reverse=True)
    for group in groups:
        assert budget == 0 or len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    if budget == 0:
        assert len(groups) <= 1
    assert groups == microbatches(torch.tensor(lengths, dtype=torch.int64), budget)


def test_microbatches_by_hand():
    assert microbatches([2, 5, 2, 9, 2], 6) == [[3], [1], [0, 2, 4]]
    with pytest.raises(UserError, match="--tokens_per_microbatch"):
        microbatches([1], -1)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 20), max_size=30))
def test_pack(lengths):
    """Every row once and whole; packed rows are no longer than the longest, and no two would fit into one."""
    rows = [[100 * i + t for t in range(n)] for i, n in enumerate(lengths)]
    tokens, length = pad(rows, 9999)
    mask = tokens % 3 == 0
    packed, counted, used, doc = pack(tokens, mask, length)
    for i, row in enumerate(rows):
        r, t = (doc == i).nonzero(as_tuple=True)
        assert packed[r, t].tolist() == row and len(set(r.tolist())) == 1 and t[-1] - t[0] == len(row) - 1
        assert counted[r, t].tolist() == [x % 3 == 0 for x in row]
    assert (doc >= 0).sum(1).tolist() == used.tolist() and used.sum() == sum(lengths)
    assert not counted[doc < 0].any() and packed.shape == (len(used), max(lengths, default=0))
    assert len(used) < 2 or sum(sorted(used.tolist())[:2]) > max(lengths)


def test_pack_by_hand():
    tokens, lengths = pad([[1], [2, 2, 2], [3, 3, 3, 3, 3], [4, 4], [5]], 0)
    packed, _, used, doc = pack(tokens, tokens > 0, lengths)
    assert packed.tolist() == [[3, 3, 3, 3, 3], [2, 2, 2, 4, 4], [1, 5, 0, 0, 0]]
    assert used.tolist() == [5, 5, 2]
    assert doc.tolist() == [[2, 2, 2, 2, 2], [1, 1, 1, 3, 3], [0, 4, -1, -1, -1]]
