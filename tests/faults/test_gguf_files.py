"""Faults of GGUF files. Docstrings are rows of docs/reliability.md."""

import struct
from pathlib import Path

import pytest

import train_sft
from tests.faults import gguf_files

pytest.importorskip("gguf")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def refuse(run, tmp_path):
    """refuse(settings, bend, *words): such a file, its bytes bent, is refused in one line with the words."""

    def check(settings, bend, *words):
        tensors = gguf_files.tensors_of(GOLDEN / "llama")
        path = gguf_files.write(tmp_path / "model.gguf", settings, tensors)
        path.write_bytes(bend(path.read_bytes()))
        done = run(train_sft, init=path)
        assert done.refused(str(path), *words) and not (tmp_path / "run/config.json").exists()

    return check


def replaced(old, new):
    """A function of bytes that replaces these, which must be there once, by as many others."""

    def bend(data):
        assert data.count(old) == 1 and len(old) == len(new)
        return data.replace(old, new)

    return bend


def text(name):
    return struct.pack("<Q", len(name)) + name


ALIGNED = b"general.alignment" + struct.pack("<II", 5, 32)
LIST = b"padding" + struct.pack("<II", 9, 5)
DAMAGE = {
    "empty": (lambda data: b"", "damaged"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 9, "is no GGUF"),
    "version": (lambda data: data[:4] + b"\1" + data[5:], "version 1"),
    "big_endian": (lambda data: data[:4] + data[4:8][::-1] + data[8:], "version 50331648"),
    "cut_header": (lambda data: data[:200], "damaged"),
    "cut_tensors": (lambda data: data[:-2000], "damaged"),
    "tensors": (lambda data: data[:8] + b"\xff" * 8 + data[16:], "damaged"),
    "settings": (lambda data: data[:16] + b"\xff" * 8 + data[24:], "damaged"),
    "length": (replaced(text(b"general.name"), b"\xff" * 8 + b"general.name"), "damaged"),
    "type": (replaced(b"general.name" + struct.pack("<I", 8), b"general.name" + b"\7\7\7\7"), "damaged"),
    "array": (replaced(LIST + struct.pack("<Q", 3), LIST + struct.pack("<Q", 2**60)), f"a list of {2**60}"),
    "alignment": (replaced(ALIGNED, ALIGNED[:-4] + b"\0\0\0\0"), "damaged"),
    "twice": (replaced(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"), "has a tensor twice"),
    "name": (replaced(b"blk.0.attn_k.weight", b"blk.0.attn_\xff.weight"), "damaged"),
    "quantisation": (replaced(b"output.weight" + struct.pack("<IQQI", 2, 16, 29, 0),
                              b"output.weight" + struct.pack("<IQQI", 2, 16, 29, 99)), "damaged"),
    "shape": (replaced(b"output.weight" + struct.pack("<IQQ", 2, 16, 29),
                       b"output.weight" + struct.pack("<IQQ", 2, 2**40, 2**40)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_row_31_damaged_gguf(kind, refuse):
    """R | a GGUF that is empty, cut off or a Git LFS pointer; with a length, a type or an offset that leads
    out of it | one line, before memory is asked for"""
    settings = gguf_files.settings_of(GOLDEN / "llama") | {"padding": [1, 2, 3], "general.alignment": 32}
    bend, says = DAMAGE[kind]
    refuse(settings, bend, says)


@pytest.mark.parametrize("key, value, says", [
    ("llama.expert_count", 8, "llama.expert_count=8"),
    ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type='yarn'"),
    ("general.architecture", "gemma3", "architecture 'gemma3'"),
    ("llama.attention.head_count", "4", "n_head='4'"),
    ("llama.block_count", 2000, "2000 layers"),
    ("llama.embedding_length", 10**6, "has shape (8, 16)"),
    ("tokenizer.ggml.model", "llama", "the tokenizer 'llama'"),
])  # fmt: skip
def test_row_63_gguf_that_cannot_be_exact(key, value, says, refuse):
    """R | a GGUF of another architecture, with experts, scaled positions or a SentencePiece tokenizer |
    one line that names the setting"""
    refuse(gguf_files.settings_of(GOLDEN / "llama") | {key: value}, bytes, says)
