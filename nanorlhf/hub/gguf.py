"""GGUF, llama.cpp's model in one file: tensors under other names, the settings of model and tokenizer.

`Gguf` gives the tensors, which the package `gguf` dequantises to fp32. `json_folder` writes the settings as
the JSON files of a Hugging Face folder, which the rest of hub reads like those of any other folder. A setting
that they could not hold exactly is refused by name.

The header is read here, not by the package: that one makes 245,000 arrays, 160 MB, of SmolLM2's tokens and
merges, and where a damaged length goes beyond the end of the file it reads on until the memory is full.
"""

import contextlib
import json
import math
import mmap
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import torch

from nanorlhf.errors import UserError, require
from nanorlhf.hub import families
from nanorlhf.hub.tokenizer_files import DIGITS, GPT2, QWEN, TOKEN, make_spec
from nanorlhf.model import rope_table

NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # types of values, as `struct` has them
U32 = 4
U64 = 10
TEXT = 8
ARRAY = 9
# Types of tokens.
NORMAL = 1
CONTROL = 3
WORD = 4  # an added token that is no control token, as <think>
UNUSED = 5  # fills up a vocabulary that has fewer tokens than the embedding has rows
TOKEN_TYPES = NORMAL, CONTROL, WORD, UNUSED

TENSORS = {  # our module → theirs
    "wte": "token_embd",
    "wpe": "position_embd",
    "blocks.{i}.norm1": "blk.{i}.attn_norm",
    "blocks.{i}.attn.qkv": "blk.{i}.attn_qkv",
    "blocks.{i}.attn.q": "blk.{i}.attn_q",
    "blocks.{i}.attn.k": "blk.{i}.attn_k",
    "blocks.{i}.attn.v": "blk.{i}.attn_v",
    "blocks.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attn.o": "blk.{i}.attn_output",
    "blocks.{i}.norm2": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.gate": "blk.{i}.ffn_gate",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_up",
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
SETTINGS = {  # theirs, behind the architecture's name → ours
    "vocab_size": "vocab_size",
    "block_count": "n_layer",
    "context_length": "max_len",
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
}
ARCHITECTURES = "llama", "qwen2", "qwen3", "gpt2"
ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
ENDS = [ROLES["eos_token"], "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]  # of a response

# A GGUF only names the pattern that cuts text. What stands behind a name is listed in llama.cpp.
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS, "qwen2": QWEN, "llama-bpe": LLAMA3}


class Tensor(NamedTuple):
    """Where a tensor lies. Its methods are those of a tensor's header in safetensors."""

    shape: list
    kind: object  # how it is quantised
    offset: int

    def get_shape(self):
        return self.shape

    def get_dtype(self):
        return "F32"  # as get_tensor gives it


@contextlib.contextmanager
def _reading(path):
    """Inside, any error becomes a UserError that begins with the path: a damaged file may lead to any."""
    try:
        yield
    except Exception as e:
        problem = str(e) if isinstance(e, UserError) else f"damaged ({e!r:.200})"
        raise UserError(f"{path}: {problem}") from None


class Gguf:
    """An open GGUF: its settings, and its tensors by the methods that an open safetensors file has."""

    def __init__(self, path):
        try:
            import gguf
        except ImportError:
            raise UserError(f"{path}: a GGUF needs a package that dequantises it: pip install gguf") from None
        self.package = gguf
        self.path = path
        self.settings = {}
        self.tensors = {}
        with _reading(path):
            with open(path, "rb") as f:
                self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()

    def __str__(self):
        return str(self.path)

    def family(self, family):
        """The family with the names that its tensors have here."""
        return family._replace(prefix="", tensors={ours: TENSORS[ours] for ours in family.tensors})

    def _read_header(self):
        magic, version, n_tensors, n_settings = struct.unpack_from("<4sIQQ", self.data)
        require(magic == b"GGUF", "is no GGUF (a Git LFS pointer, or a download that broke off?)")
        require(version in (2, 3), f"version {version} of the format is not supported (2 and 3 are)")
        self.at = 24
        for _ in range(n_settings):
            key = self._value(TEXT)
            self.settings[key] = self._value(self._value(U32))
        for _ in range(n_tensors):
            name = self._value(TEXT)
            shape = [self._value(U64) for _ in range(self._value(U32))]
            kind = self.package.GGMLQuantizationType(self._value(U32))
            self.tensors[name] = Tensor(shape[::-1], kind, self._value(U64))  # theirs begins with the columns
        require(len(self.tensors) == n_tensors, "has a tensor twice")
        alignment = self.settings.get("general.alignment", 32)
        self.start = math.ceil(self.at / alignment) * alignment
        for name in self.tensors:
            self._bytes(name)  # UserError for an end that is missing, before the model takes its memory

    def _value(self, kind):
        """The next value of the header."""
        if kind == ARRAY:
            inner = self._value(U32)
            count = self._value(U64)
            require(count < 1 << 22, f"damaged: a list of {count} values")
            return [self._value(inner) for _ in range(count)]
        form = f"<{self._value(U64)}s" if kind == TEXT else f"<{NUMBERS[kind]}"
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        if kind == 6:
            return float(str(np.float32(value)))  # 1e-5 is 9.999999747378752e-06 in fp32
        return value.decode() if kind == TEXT else value

    def _bytes(self, name):
        """A tensor as it is stored: one row of bytes for each of its rows."""
        tensor = self.tensors[name]
        shape = self.package.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        return np.frombuffer(self.data, np.uint8, math.prod(shape), self.start + tensor.offset).reshape(shape)

    def keys(self):
        return self.tensors.keys() - {"rope_freqs.weight"}  # a setting: `_rope_scaling` reads it

    def metadata(self):
        return {}

    def get_slice(self, name):
        return self.tensors[name]

    def get_tensor(self, name):
        array = self.package.quants.dequantize(self._bytes(name), self.tensors[name].kind)
        tensor = torch.from_numpy(array.astype(np.float32))
        heads = self.settings.get("llama.attention.head_count")
        if ".attn_k." in name:
            heads = self.settings.get("llama.attention.head_count_kv", heads)
        if heads and regex.search(r"attn_[qk]\.", name):
            # llama.cpp's rotary pairs are channels 2i and 2i + 1 of a head, Llama's are i and i + head_dim/2.
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor


# ------------------------------------------------------------------------------------------------------------
# settings


@contextlib.contextmanager
def json_folder(place):
    """`with json_folder(place) as folder:` a folder with the JSON files of a model: `place`, if it is one.

    Those of an open GGUF are written into a temporary folder. Errors call it by the GGUF's path.
    """
    if not isinstance(place, Gguf):
        yield place
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with _reading(place):
            files = {"config.json": _config(place)}
            if "tokenizer.ggml.model" in place.settings:
                files["tokenizer.json"], files["tokenizer_config.json"] = _tokenizer(place.settings)
        for name, contents in files.items():
            (folder / name).write_text(json.dumps(contents), "utf-8")
        try:
            yield folder
        except UserError as e:
            raise UserError(str(e).replace(temporary, str(place))) from None


def _config(gguf):
    """The config.json of an open GGUF."""
    kind = gguf.settings.get("general.architecture")
    require(kind in ARCHITECTURES, f"architecture {kind!r} is not supported ({', '.join(ARCHITECTURES)} are)")
    family = families.FAMILIES[kind]
    ours = dict(
        vocab_size=gguf.tensors["token_embd.weight"].shape[0],
        mlp=list(family.acts)[0],
        tied="output.weight" not in gguf.tensors,
    )
    for key, value in gguf.settings.items():
        name = key.removeprefix(f"{kind}.")
        if name in SETTINGS:
            same = ours.setdefault(SETTINGS[name], value) == value
            require(same, f"{key}={value!r} is not supported where {SETTINGS[name]}={ours[SETTINGS[name]]!r}")
        elif name != key:
            require(value in (0, "none"), f"{key}={value!r} is not supported")
    config = {"model_type": kind, "rope_theta": ours.get("rope_theta")}
    for name, key in family.keys.items():
        if name in ours:
            config[key] = ours[name]
    if "rope_freqs.weight" in gguf.tensors:
        config["rope_scaling"] = _rope_scaling(gguf.get_tensor("rope_freqs.weight"), ours["rope_theta"])
    for role, key in ROLES.items():
        config[f"{role}_id"] = gguf.settings.get(key)
    config["eos_token_id"] = [gguf.settings[key] for key in ENDS if key in gguf.settings]
    quantisation = dict(Counter(tensor.kind.name for tensor in gguf.tensors.values()))
    config["gguf"] = {"file": gguf.path.name, "quantisation": quantisation}
    return config


def _rope_scaling(slower, theta):
    """Llama 3.1's rotary settings. A GGUF has only what they lead to: how much slower each pair turns."""
    scaling = (slower.max().item(), 1.0, 4.0, 8192)  # of Llama 3.1 to 3.3, which differ in the first
    dim = 2 * len(slower)
    plain = rope_table(dim, 2, theta, "cpu")[1][1].asin()  # the angles that the pairs turn in one step
    scaled = rope_table(dim, 2, theta, "cpu", scaling)[1][1].asin()
    same = torch.allclose(plain / scaled, slower, rtol=1e-5, atol=0)
    require(same, "rope_freqs.weight is not supported: it is not that of Llama 3.1, 3.2 or 3.3")
    return dict(zip(families.LLAMA3, scaling), rope_type="llama3")


def _tokenizer(settings):
    """→ (tokenizer.json, tokenizer_config.json)."""
    model = settings["tokenizer.ggml.model"]
    require(model == "gpt2", f"the tokenizer {model!r} is not supported (gpt2, a byte-level BPE, is)")
    pre = settings.get("tokenizer.ggml.pre")
    known = ", ".join(PATTERNS)
    require(pre in list(PATTERNS), f"the pre-tokenizer {pre!r} is not supported ({known} are)")
    for key in ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"):
        require(not settings.get(key), f"{key} is not supported")
    tokens = settings["tokenizer.ggml.tokens"]
    vocab = {}
    added = []
    for i, (text, kind) in enumerate(zip(tokens, settings["tokenizer.ggml.token_type"], strict=True)):
        require(kind in TOKEN_TYPES, f"the token {text!r} of type {kind} is not supported")
        if kind == UNUSED:
            continue
        require(vocab.setdefault(text, i) == i, f"the token {text!r} is there twice")
        if kind != NORMAL:
            added.append(TOKEN | {"id": i, "content": text, "special": kind == CONTROL})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["chat_template"] = settings.get("tokenizer.chat_template")
    for role, key in ROLES.items():
        if key in settings:
            config[role] = tokens[settings[key]]
    llama3 = pre == "llama-bpe"
    merges = settings["tokenizer.ggml.merges"]
    spec = make_spec(vocab, merges, added, PATTERNS[pre], nfc=pre == "qwen2", ignore_merges=llama3)
    if settings.get("tokenizer.ggml.add_bos_token", llama3):
        bos = config["bos_token"]
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }
    return spec, config
