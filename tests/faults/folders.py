"""Hostile model folders: each is loaded, sampled from and saved in a process of its own (fuzz.py runs them).

A case is a good folder of some family with one to three changes: a value in one of its JSON files, an entry
in the header of its weights, a number in a tensor, or a file that became a pipe, a folder, a link to a
device. Where the `tokenizers` package is installed, some folders have a tokenizer that only it can run.
"""

import dataclasses
import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import torch

from nanorlhf import hub
from nanorlhf.generate import generate
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.tokenizer import Chat, Tokenizer
from tests.faults import gguf_files, limits

GOLDEN = Path(__file__).parents[1] / "golden"
DEEP = "[" * 100_000 + "]" * 100_000
ODD = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**53, 2**63, 2**64, 10**29, 10**400,
    -(2**70), 1.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "x", "1", "\0", "\ud800", "\x1b[2J", "a" * 5000, "../../x",
    "/dev/zero", [], {}, [[]], [1, 2], [None], {"a": 1}, "DEEP",
]  # fmt: skip
TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ messages[9].content }}", "{% if %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('\x1b[31mno') }}",
    "{{ 10**10**10 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__ }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "{{ 'a'.join(['b'] * 10**9) }}", "",
    "{{ [0] * 10**10 }}", "{{ '%0999999999d' % 1 }}", "{{ 'a'.ljust(10**10) }}", "{% include 'x' %}",
    "{{ '{:999999999}'.format(1) }}", "{{ strftime_now('%Y' * 9999999) }}",
    "{{ cycler.__init__.__globals__ }}",
]  # fmt: skip
PATTERNS = [r"(a+)+$", r"(\w+\s?)*$", "(", r"\p{Nonsense}", "(?R)", r"(x*)*", r"(?<=a{1,99999})b", ""]


ADDED = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
PIECES = ["<unk>", "\u2581", *"abc=", "\u2581a", "ab", "[UNK]"]
SPECIAL = [ADDED | {"id": len(PIECES), "content": "</s>"}]
LIBRARY = {  # tokenizers that only the `tokenizers` package can run → (tokenizer.json, the text that ends)
    "unigram": ({
        "version": "1.0", "added_tokens": SPECIAL,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
        "post_processor": None, "decoder": {"type": "Metaspace", "replacement": "\u2581"},
        "model": {"type": "Unigram", "unk_id": 0,
                  "vocab": [[piece, -float(i)] for i, piece in enumerate(PIECES)]},
    }, "</s>"),
    "wordpiece": ({
        "version": "1.0", "added_tokens": SPECIAL,
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "clean_text": True,
                       "handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(PIECES)}},
    }, "</s>"),
    "sentencepiece": ({
        "version": "1.0", "added_tokens": SPECIAL,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False,
                  "vocab": {piece: i for i, piece in enumerate(PIECES)},
                  "merges": [["\u2581", "a"], ["a", "b"]]},
    }, "</s>"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# good folders


def larger(golden):
    """A model like a golden one, which has 29 ids and 12 positions, but with room for the tokenizers."""
    model = GPT(dataclasses.replace(golden.cfg, vocab_size=400, max_len=64))
    return ScalarModel(model) if isinstance(golden, ScalarModel) else model


def good_folders(folder):
    """A small folder of each family and each kind of tokenizer, below `folder` → their paths."""
    specs = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))
    kinds = [kind for kind in specs if isinstance(specs[kind], dict) and "spec" in specs[kind]]
    library = LIBRARY if importlib.util.find_spec("tokenizers") else {}
    made = []
    for source in sorted(path for path in GOLDEN.iterdir() if (path / "config.json").exists()):
        for kind in [*kinds, "bytes", "chars", *library]:
            model = larger(hub.load(source)[0])
            target = folder / f"{source.name}-{kind}"
            tok = None
            if kind == "bytes":
                tok = Tokenizer.from_bytes()
            elif kind == "chars":
                tok = Tokenizer.from_chars("".join(map(chr, range(32, 127))) + "\n")
            hub.save(model, tok, target)
            if tok is None:
                spec, eos = library[kind] if kind in library else (specs[kind]["spec"], specs[kind]["eos"])
                names = {"eos_token": eos, "chat_template": TEMPLATES[9]}
                (target / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
                (target / "tokenizer_config.json").write_text(json.dumps(names))
            made.append(target)
    return made + gguf_files.good_files(made)


# ------------------------------------------------------------------------------------------------------------
# changes


def change(rng, folder):
    """One change to a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not files:
        return
    path = rng.choice(files)
    kind = rng.choice(["inside", "inside", "inside", "inside", "bytes", "special"])
    if kind == "special":
        _special(rng, path)
    elif path.suffix == ".gguf":
        gguf_files.bend(rng, path, ODD)
    elif kind == "bytes" or path.suffix not in (".json", ".safetensors"):
        damage_bytes(rng, path)
    elif path.suffix == ".json":
        bend_json(rng, path)
    else:
        _weights(rng, path)


def _special(rng, path):
    """The file becomes something that is no regular file, or is gone."""
    path.unlink()
    kind = rng.choice(["gone", "pipe", "folder", "itself", "device", "endless", "nowhere"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "itself":
        path.symlink_to(path.name)
    elif kind in ("device", "endless", "nowhere"):
        path.symlink_to({"device": "/dev/null", "endless": "/dev/zero", "nowhere": "/nowhere"}[kind])


def damage_bytes(rng, path):
    """Some bytes flipped, cut out, put in, or all behind a place left out."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(["flip", "cut", "put", "end"])
    if kind == "flip" and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at : at + rng.randint(1, 9)]
    elif kind == "put":
        data[at:at] = rng.choice([b"\0", b"\xff", b"{", b'"', b"[", b"1e9", b"\xed\xa0\x80", b"NaN"])
    else:
        del data[at:]
    path.write_bytes(data)


def bend_json(rng, path):
    """One value somewhere in a JSON file exchanged, left out or put in."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):  # an earlier change damaged it
        return damage_bytes(rng, path)
    value = _bent(rng, value, path.name)
    text = json.dumps(value).replace('"DEEP"', DEEP)
    path.write_text(text, "utf-8")


def _bent(rng, value, name=""):
    """A parsed JSON value with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if key == "chat_template" and kind < 0.8:
            return value | {key: rng.choice(TEMPLATES)}
        if key == "Regex" and kind < 0.8:
            return value | {key: rng.choice(PATTERNS)}
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {rng.choice([*value, "reward_bias", "step_ids", "eos_token_id"]): rng.choice(ODD)}
        return value | {key: _bent(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.3:
            return [*value, value[at]]
        return [*value[:at], _bent(rng, value[at]), *value[at + 1 :]]
    if type(value) in (int, float) and abs(value) < 1e300 and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, value * 2, value * 1000, -value, value + 0.5])
    return rng.choice(ODD)


def _weights(rng, path):
    """A change in the header of a safetensors file, or in its numbers."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        if not isinstance(header, dict) or len(header) < 2:
            raise ValueError("no header")
    except (ValueError, RecursionError):  # an earlier change damaged it
        return damage_bytes(rng, path)
    body = bytearray(data[8 + size :])
    kind = rng.random()
    if kind < 0.25 and len(body) >= 4:
        at = rng.randrange(0, len(body) - 3, 4)
        odd = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]  # NaN, inf, 3e38 in fp32
        body[at : at + 4] = rng.choice(odd)
        header.pop("__metadata__", None)  # with the checksum
    elif kind < 0.5:
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        header[rng.choice(["x", name + ".0", "lm_head.weight", *names])] = header.pop(name)
    else:
        header = _bent(rng, header)
    text = json.dumps(header).replace('"DEEP"', DEEP).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# ------------------------------------------------------------------------------------------------------------
# a case, in a process of its own


def use(folder, out):
    """What a user does with a model folder: load it, read a text and a chat, sample, save."""
    single = folder / "model.gguf"
    model, tok = hub.load(single if os.path.lexists(single) else folder)
    prompts = [[0, 1], [1]]
    if tok is not None:
        tok.decode(tok.encode("abc=" * 20))
        ids = tok.encode_prompt(Chat([{"role": "user", "content": "abc"}]))
        prompts = [ids[:8] or [0]]
    if hasattr(model, "scores"):
        model.logits(torch.tensor(prompts[:1]))
    else:
        generate(model, prompts, n=2, max_new_tokens=3, eos_id=0, seed=0)
    hub.save(model, tok, out)


def attack(goods, number, seed, room):
    """Make case `number` of a seed below the folder `room` and run it → its outcome."""
    rng = random.Random(f"{seed}:{number}")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    folder = room / "model"
    shutil.copytree(rng.choice(goods), folder)
    for _ in range(rng.randint(1, 3)):
        change(rng, folder)
    return limits.watched(room, lambda: use(folder, room / "saved"), may_change=[room / "saved"])
