"""The tokenizer against references of ten lines: recount every pair, apply the merges in order."""

import json
import socket
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.common import UserError
from nanorlhf.tokenizer import FILE, WORDS, Tokenizer, merge

SHAKESPEARE = Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"
SOME_TEXT = "the cat sat on the mat, the hat sat on the cat. Äpfel, Äpfel! 12 121 1212\n\n  the end  \n" * 3
BYTES = Tokenizer.from_bytes()
BPE = Tokenizer.train_bpe([SOME_TEXT], 280)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
# `regex` and tiktoken differ on what a few rare characters are, so the references see common ones.
plain_text = st.text("abc the\n,.Ä1é🙂 ", max_size=60)


def naive_merges(texts, n):
    """Quadratic: recount all pairs before every merge; the most frequent, then the lowest ids."""
    words = [(list(word.encode()), c) for word, c in Counter(regex.findall(WORDS, "\0".join(texts))).items()]
    pairs_merged = []
    while len(pairs_merged) < n:
        counts = Counter()
        for ids, c in words:
            for pair in zip(ids, ids[1:]):
                counts[pair] += c
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda p: (-counts[p], p))
        words = [(merge(ids, best, 256 + len(pairs_merged)), c) for ids, c in words]
        pairs_merged.append(best)
    return pairs_merged


def naive_tokens(merges):
    tokens = [bytes([b]) for b in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return tokens


def naive_encode(text, merges):
    out = []
    for word in regex.findall(WORDS, text):
        ids = list(word.encode())
        for i, pair in enumerate(merges):
            ids = merge(ids, pair, 256 + i)
        out += ids
    return out


def test_merge_is_left_to_right_without_overlap():
    assert merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


@pytest.mark.parametrize("tok", [BYTES, BPE], ids=lambda t: t.kind)
@settings(deadline=None)
@given(text=any_text)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i < tok.eos_id for i in ids)


@settings(deadline=None)
@given(text=any_text)
def test_bytes_ids_are_the_utf8_bytes(text):
    assert BYTES.encode(text) == list(text.encode())


@settings(deadline=None)
@given(ids=st.lists(st.integers(-3, BPE.vocab_size + 5)))
def test_decode_takes_any_id(ids):
    assert isinstance(BPE.decode(ids), str)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(plain_text, max_size=4), text=plain_text, n=st.integers(0, 40))
def test_bpe_equals_naive_trainer_and_encoder(texts, text, n):
    merges = naive_merges(texts, n)
    tok = Tokenizer.train_bpe(["\0".join(texts)], 256 + n)
    assert tok.tokens == naive_tokens(merges)
    for t in [text, *texts]:
        assert tok.encode(t) == naive_encode(t, merges)


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab", max_size=200))
def test_bpe_on_runs_where_pairs_overlap(text):
    merges = naive_merges([text], 30)
    tok = Tokenizer.train_bpe([text], 286)
    assert tok.tokens == naive_tokens(merges)
    assert tok.encode(text) == naive_encode(text, merges)


def test_training_is_deterministic_and_ignores_the_order_of_texts():
    texts = SOME_TEXT.split(",")
    assert Tokenizer.train_bpe(texts, 290) == Tokenizer.train_bpe(reversed(texts), 290)
    assert Tokenizer.train_bpe(texts, 270) != Tokenizer.train_bpe(texts, 269)


def test_vocab_size_and_early_stop():
    tok = Tokenizer.train_bpe(["abab"], 5000)
    assert tok.tokens[256:] == [b"ab"]  # (ab, ab) occurs once
    assert (tok.eos_id, tok.pad_id, tok.vocab_size) == (257, 258, 259)
    assert Tokenizer.train_bpe([], 256).tokens == BYTES.tokens
    assert Tokenizer.train_bpe("abab", 300) == Tokenizer.train_bpe(["abab"], 300)
    assert len(BPE.tokens) == 280
    with pytest.raises(UserError, match="255"):
        Tokenizer.train_bpe(["a"], 255)


@pytest.mark.parametrize("tok", [BYTES, BPE, Tokenizer.from_chars("<|eospad>hi ")], ids=lambda t: t.kind)
def test_special_text_stays_ordinary(tok):
    text = "hi <|eos|> <|pad|>"
    ids = tok.encode(text)
    assert tok.eos_id not in ids and tok.pad_id not in ids
    assert tok.decode(ids) == text
    hi = tok.encode("hi")
    assert tok.decode([*hi, tok.eos_id, tok.pad_id, tok.vocab_size, -1]) == "hi<|eos|><|pad|>\ufffd\ufffd"


def test_decode_broken_utf8():
    assert BYTES.decode(BYTES.encode("é")[:1]) == "\ufffd"
    assert BYTES.decode([]) == ""


def test_lone_surrogate_is_read_as_the_replacement_character():
    assert BYTES.decode(BYTES.encode("a\ud800")) == "a\ufffd"
    assert isinstance(Tokenizer.train_bpe(["a\ud800a\ud800"], 260), Tokenizer)


def test_chars():
    tok = Tokenizer.from_chars("01é🙂\n")
    assert tok.encode("🙂é\n1") == [3, 2, 4, 1]
    assert tok.decode([3, 2, 4, 1]) == "🙂é\n1"
    assert (tok.eos_id, tok.pad_id, tok.vocab_size) == (5, 6, 7)
    assert tok.encode("") == []
    for text in ["01x", "x", "\ud800", "\ufffd", "è"]:  # è begins with the same byte as é
        with pytest.raises(UserError) as e:
            tok.encode(text)
        assert repr(text[-1]) in str(e.value)


@pytest.mark.parametrize("alphabet, says", [("", "empty"), ("aba", "'a'"), ("a\ud800", "character")])
def test_bad_alphabet(alphabet, says):
    with pytest.raises(UserError, match=says):
        Tokenizer.from_chars(alphabet)


@pytest.mark.parametrize(
    "kind, pattern, tokens",
    [
        ("words", ".", [b"a"]),
        ("bpe", ".", BYTES.tokens[1:]),
        ("bpe", ".", BYTES.tokens + [b"a"]),
        ("chars", ".", [b"ab"]),
        ("chars", ".", [b"\xff"]),
        ("chars", ".", []),
    ],
)
def test_bad_parts(kind, pattern, tokens):
    with pytest.raises(UserError):
        Tokenizer(kind, pattern, tokens)


def test_very_long_runs():
    for text in [" " * 10**6 + "x", "a" * 10**6, "\n " * (5 * 10**5)]:
        for tok in [BYTES, BPE]:
            assert tok.decode(tok.encode(text)) == text
    gpt2_like = Tokenizer("bpe", r"\s+(?!\S)|\s+|\S+", BYTES.tokens)
    assert gpt2_like.encode("a  b") == list(b"a  b")
    with pytest.raises(UserError, match="1000001 characters"):
        gpt2_like.encode(" " * 10**6 + "x")


@pytest.mark.parametrize("tok", [BYTES, BPE, Tokenizer.from_chars("abé ")], ids=lambda t: t.kind)
def test_save_load(tok, tmp_path):
    tok.save(tmp_path / "new" / "folder")
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert again == tok and again.kind == tok.kind
    assert again.encode("abé ab") == tok.encode("abé ab")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [FILE]


def test_equality():
    assert Tokenizer.from_chars("ab") == Tokenizer.from_chars("ab") != Tokenizer.from_chars("ba")
    assert BYTES != BPE and BYTES != "bytes"


def damage(**changes):
    good = {"kind": "chars", "pattern": "(?s).", "tokens": ["YQ==", "Yg=="]}
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        "\xff",
        damage()[:-9],
        damage(kind="x"),
        damage(kind=[]),
        damage(kind="bpe"),
        damage(pattern=3),
        damage(pattern="("),
        damage(tokens=3),
        damage(tokens=[3]),
        damage(tokens=[]),
        damage(tokens=["Y"]),
        damage(tokens=["Y!Q=="]),
        damage(tokens=["YQ==", "YQ=="]),
        damage(tokens=["YWI="]),
        "[" * 100_000,
    ],
    ids=lambda c: c[:60] or "empty",
)
def test_damaged_file(content, tmp_path):
    (tmp_path / FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as e:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / FILE) in str(e.value) and "\n" not in str(e.value)


def test_missing_file(tmp_path):
    for folder in [tmp_path, tmp_path / "none"]:
        with pytest.raises(UserError, match=FILE):
            Tokenizer.load(folder)


def test_no_socket_is_opened(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer must not open a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for tok in [Tokenizer.from_bytes(), Tokenizer.from_chars("ab"), Tokenizer.train_bpe([SOME_TEXT], 280)]:
        tok.save(tmp_path)
        assert Tokenizer.load(tmp_path).decode(tok.encode("abba")) == "abba"


def test_tinyshakespeare():
    if not SHAKESPEARE.exists():
        pytest.skip("tinyshakespeare.txt is not there")
    text = SHAKESPEARE.read_text("utf-8")
    tok = Tokenizer.train_bpe([text], 1024)
    ids = tok.encode(text)
    assert len(tok.tokens) == 1024 and tok.decode(ids) == text
    assert len(ids) < 0.45 * len(text)
    merges = naive_merges([text[:20_000]], 100)
    assert Tokenizer.train_bpe([text[:20_000]], 356).tokens == naive_tokens(merges)
