"""GGUF files made of Hugging Face folders by the package `gguf`, and hostile ones for `folders.py`.

The names of tensors come from the package's table, the order of rotary pairs from llama.cpp's
convert_hf_to_gguf.py: nothing of nanorlhf/hub/gguf.py is used here but to read a file that is to be bent.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from nanorlhf.errors import UserError
from nanorlhf.hub.gguf import Gguf

KEYS = {  # theirs → the keys of config.json, GPT-2's last
    "block_count": ["num_hidden_layers", "n_layer"],
    "context_length": ["max_position_embeddings", "n_positions"],
    "embedding_length": ["hidden_size", "n_embd"],
    "feed_forward_length": ["intermediate_size", "n_inner"],
    "attention.head_count": ["num_attention_heads", "n_head"],
    "attention.head_count_kv": ["num_key_value_heads"],
    "attention.layer_norm_rms_epsilon": ["rms_norm_eps"],
    "attention.layer_norm_epsilon": ["layer_norm_epsilon"],
}
HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
KINDS = {"gpt2": "gpt-2", "smollm2": "smollm", "qwen": "qwen2", "llama3": "llama-bpe"}  # of tokenizers.json


def settings_of(folder):
    """What llama.cpp's converter writes of a config.json, but for the tokenizer."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config["model_type"]
    settings = {"general.architecture": kind, "general.name": folder.name}
    for key, names in KEYS.items():
        for name in names:
            if config.get(name):
                settings[f"{kind}.{key}"] = config[name]
    if kind == "gpt2":
        settings.setdefault("gpt2.feed_forward_length", 4 * config["n_embd"])
    else:
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        rope = config.get("rope_parameters") or config
        settings[f"{kind}.rope.freq_base"] = float(rope["rope_theta"])
        if kind == "llama":
            settings["llama.rope.dimension_count"] = dim
        if kind == "qwen3":
            settings |= {"qwen3.attention.key_length": dim, "qwen3.attention.value_length": dim}
    return settings


def tokenizer_of(spec, pre, eos, rows):
    """The settings of a tokenizer.json; ids up to `rows`, which no token has, are filled up."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocab = spec["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [5] * rows
    for text, i in vocab.items():
        tokens[i] = text
        types[i] = 1
        if text in added:
            types[i] = 3 if added[text]["special"] else 4
    settings = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    settings["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    settings["eos_token_id"] = vocab[eos]
    if pre == "llama-bpe":
        settings["bos_token_id"] = vocab["<|begin_of_text|>"]
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items()}


def permuted(weight, heads):
    """The rows of queries or keys as llama.cpp wants them: the two channels of a rotary pair side by side."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def tensors_of(folder):
    """{their name: array} of a folder's safetensors file."""
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config["model_type"]
    arch = gguf.MODEL_ARCH[kind.upper()]
    names = gguf.get_tensor_name_map(arch, config.get("num_hidden_layers") or config.get("n_layer"))
    tensors = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if kind == "gpt2" and array.ndim == 2 and ".c_" in name:
            array = array.T
        if kind == "llama" and "q_proj" in name:
            array = permuted(array, config["num_attention_heads"])
        if kind == "llama" and "k_proj" in name:
            array = permuted(array, config["num_key_value_heads"])
        tensors[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(array)
    return tensors


def write(path, settings, tensors, kind="F32"):
    """Write a GGUF; tensors of two dimensions are quantised as `kind`, others stay in fp32."""
    import gguf

    writer = gguf.GGUFWriter(path, settings["general.architecture"])
    for key, value in settings.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        if array.dtype == np.uint8:  # quantised already
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif array.ndim == 2 and kind != "F32":
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(folder, path, kind="F32", tokenizer="", **more):
    """A GGUF of a folder, with the tokenizer of this name in golden/tokenizers.json, and more settings."""
    settings = settings_of(folder)
    tensors = tensors_of(folder)
    if tokenizer:
        golden = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))[tokenizer]
        rows = len(tensors["token_embd.weight"])
        settings |= tokenizer_of(golden["spec"], KINDS[tokenizer], golden["eos"], rows)
    return write(path, settings | more, tensors, kind)


# ------------------------------------------------------------------------------------------------------------
# hostile files


def good_files(folders):
    """A folder with nothing but model.gguf for each of these that llama.cpp could hold; none without gguf."""
    made = []
    if importlib.util.find_spec("gguf") is None:
        return made
    for folder in folders:
        family, _, tokenizer = folder.name.partition("-")
        if tokenizer in KINDS and family in ("gpt2", "llama", "qwen2", "qwen3"):
            target = folder.with_name(f"{folder.name}-gguf")
            target.mkdir()
            template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
            more = {"tokenizer.chat_template": template}
            convert(folder, target / "model.gguf", tokenizer=tokenizer, **more)
            made.append(target)
    return made


def bend(rng, path, values):
    """One change in a GGUF: a number in its header, or one of its settings, tensors or their sizes."""
    data = bytearray(path.read_bytes())
    kind = rng.random()
    if kind < 0.5:
        size = rng.choice([1, 4, 8])
        at = rng.choice([rng.randrange(32), rng.randrange(len(data)), len(data) // 50])
        odd = [0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**6]
        data[at : at + size] = (rng.choice(odd) % 2 ** (8 * size)).to_bytes(size, "little")
        path.write_bytes(data)
        return
    try:
        settings = Gguf(path).settings
    except UserError:  # an earlier change damaged it
        return
    keys = [key for key in settings if key != "general.architecture"]
    if len(keys) == len(settings) or not keys:  # an earlier change renamed or hid what the writer needs
        return
    key = rng.choice(keys)
    value = rng.choice(values)
    if isinstance(settings[key], list) and settings[key] and rng.random() < 0.8:
        value = list(settings[key])
        at = rng.randrange(len(value))
        value[at] = rng.choice([value[at - 1], "", "a b c", 0, 1, 2, 3, 4, 5, 6])
    _rewrite(path, settings | {key: value})


def _rewrite(path, settings):
    """The file with other settings, where the package can write them."""
    import gguf

    old = Gguf(path)
    tensors = {}
    for name in old.tensors:
        stored = np.array(old._bytes(name))
        if stored.shape[-1] % 4:  # an earlier change: no fp32
            return
        tensors[name] = stored.view(np.float32)
    del old  # or the file below would be written into the map
    for key, value in settings.items():
        if isinstance(value, int) and abs(value) > 2**31 or value is None or isinstance(value, dict):
            settings[key] = 1
    try:
        write(path, settings, tensors)
    except (ValueError, TypeError, OverflowError, gguf.gguf_writer.struct.error):
        return
