"""Tensors of published models, in and out of safetensors files.

Reading copies a tensor of theirs into our parameters, by `_copy`. Writing goes the other way, by `join`.
"""

import contextlib
import hashlib
import json
import re
from os.path import exists

import torch
from safetensors import SafetensorError, safe_open

from nanorlhf.errors import UserError, blame, require
from nanorlhf.hub.files import read_json, require_regular
from nanorlhf.hub.gguf import Gguf
from nanorlhf.model import ScalarModel
from nanorlhf.run import sharding

# Raised by the libraries that read a damaged file; the last by gguf for a quantisation that it cannot read.
DAMAGE = ValueError, OSError, SafetensorError, NotImplementedError
FLOATS = "F64", "F32", "F16", "BF16"  # dtypes of weights, in the words of safetensors
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
REDUNDANT = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # constants


def tensors_of(model, family):
    """Pairs (their name, our parameters in it) for every tensor of this model."""
    trunk = model.trunk
    scalar = isinstance(model, ScalarModel)
    ours = dict(trunk.named_parameters())
    for module, theirs in family.tensors.items():
        if scalar and module == "lm_head":
            continue
        modules = [module]
        if module.endswith("qkv"):
            modules = [module.removesuffix("qkv") + letter for letter in "qkv"]
        for i in range(trunk.cfg.n_layer if "{i}" in module else 1):
            for kind in ("weight", "bias"):
                names = [f"{module}.{kind}".format(i=i) for module in modules]
                if names[0] in ours:
                    yield f"{theirs}.{kind}".format(i=i), [ours[name] for name in names]
    if scalar:
        yield "score.weight", [model.score.weight]


def _transposed(name, parts):
    return ".c_" in name and parts[0].dim() == 2  # GPT-2 stores these as (in, out)


def join(name, parts, cfg):
    """Our parameters → the tensor of theirs that they make up."""
    if "query_key_value" in name:
        heads = [part.unflatten(0, (cfg.n_head, cfg.head_dim)) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.T if _transposed(name, parts) else tensor


# ------------------------------------------------------------------------------------------------------------
# files


def match(model, family, folder):
    """Find each tensor of a model on the meta device in a folder's files → {file: {key: our name for it}}.

    Reads the headers of the files only: a config.json that says 1,000 times the true width is refused before
    its memory is asked for. A second copy of the embedding, and constants, have no place. UserError unless
    everything else has one, and its shape.
    """
    trunk = model.trunk
    want = dict(tensors_of(model, family))
    lm_head = family.tensors["lm_head"] + ".weight"
    places = {}
    for file in files_of(folder):
        places[file] = {}
        with blame(file, *DAMAGE), opened(file) as f:
            for key in sorted(f.keys()):
                name = key
                if key not in want and not key.startswith(family.prefix):
                    name = family.prefix + key
                twice = trunk.cfg.tied and key == lm_head  # some files hold the embedding as both
                if name not in want and (REDUNDANT.search(key) or twice):
                    continue
                require(name in want, f"tensor {key} is unknown to this model, or is there twice")
                parts = want.pop(name)
                header = f.get_slice(key)
                dtype = header.get_dtype()
                require(dtype in FLOATS, f"tensor {key} is quantised ({dtype})")
                found = tuple(header.get_shape())
                shape = tuple(join(name, parts, trunk.cfg).shape)
                require(found == shape, f"tensor {key} has shape {found}, config.json says {shape}")
                places[file][key] = name
    for name in sorted(want):
        raise UserError(f"{file}: tensor {name} is missing")
    return places


@torch.no_grad()
def fill(model, family, places):
    """Copy the tensors of a folder into the model, one at a time, from the places that `match` found."""
    trunk = model.trunk
    ours = dict(tensors_of(model, family))
    unembedding = None
    for file, names in places.items():
        with blame(file, *DAMAGE), opened(file) as f:
            checksum = (f.metadata() or {}).get("sha256")
            digest = hashlib.sha256()
            for key in sorted(f.keys()):
                tensor = f.get_tensor(key)
                if checksum:
                    _add(digest, key, tensor)
                if key in names:
                    name = names[key]
                    # one NaN makes every loss NaN, and the run would blame --lr
                    finite = all(end.isfinite() for end in tensor.aminmax())
                    require(finite, f"tensor {key} has a weight that is not finite")
                    _copy(tensor, name, ours[name], trunk.cfg)
                elif not REDUNDANT.search(key):  # the second copy of the embedding
                    unembedding = tensor
            require(checksum in (None, digest.hexdigest()), "wrong checksum: damaged after it was saved")
    if unembedding is not None:
        embedding = sharding.local(trunk.wte.weight)
        same = torch.equal(sharding.piece(unembedding, trunk.wte.weight).to(embedding), embedding)
        require(same, f"{file}: the unembedding is not the embedding, although config.json says that it is")


def _copy(tensor, name, parts, cfg):
    """Copy a tensor of theirs into our parameters, a view of it into each."""
    if _transposed(name, parts):
        tensor = tensor.T
    if "query_key_value" in name:  # GPT-NeoX goes head by head: q, k, v of the first, q, k, v of the next
        views = tensor.unflatten(0, (cfg.n_head, 3, cfg.head_dim)).unbind(1)
    else:
        views = tensor.chunk(len(parts))
    for part, view in zip(parts, views):
        sharding.local(part).copy_(sharding.piece(view.reshape(part.shape), part))


def write(tensors, path):
    """A safetensors file with a checksum in its header, which other programs ignore.

    One tensor after the other, the wider dtypes first as the library has them; the library itself would first
    copy them all: half a gigabyte more for 135M parameters.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    header = {"__metadata__": {"format": "pt", "sha256": digest.hexdigest()}}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    end = 0
    for name in order:
        x = tensors[name]
        start, end = end, end + x.nbytes
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for name in order:
            f.write(_bytes(tensors[name]))


def _add(digest, name, tensor):
    """Hash a tensor and its name: safetensors itself loads a file with a flipped bit without an error."""
    digest.update(name.encode())
    digest.update(_bytes(tensor))


def _bytes(tensor):
    return tensor.flatten().view(torch.uint8).numpy()


def opened(file):
    """An open safetensors file; an open GGUF as it is."""
    return contextlib.nullcontext(file) if isinstance(file, Gguf) else safe_open(file, "pt")


def files_of(folder):
    """The weight files of a folder: model.safetensors, or the shards that its index names. A GGUF is its own.

    UserError for one that is no regular file: opening a pipe would wait for ever.
    """
    if isinstance(folder, Gguf):
        return [folder]
    single = folder / "model.safetensors"
    index = f"{single}.index.json"
    files = [single]
    if not exists(single) and exists(index):
        files = [folder / name for name in _shards(index)]
    for file in files:
        require_regular(file, file)
    pickle = folder / "pytorch_model.bin"
    has_pickle = exists(pickle) or exists(f"{pickle}.index.json")
    if has_pickle and not exists(files[0]):
        convert = "make it safetensors (in transformers: from_pretrained, then save_pretrained)"
        raise UserError(f"{pickle}: a pickle can run any code and is not read; {convert}")
    return files  # opening one that is missing says so


def _shards(index):
    """The sorted file names in model.safetensors.index.json. UserError for one that leaves the folder."""
    names = read_json(index).get("weight_map")
    with blame(index):
        require(isinstance(names, dict) and names, "damaged: it has no weight_map")
        shards = sorted(set(map(str, names.values())))
        for name in shards:
            plain = re.fullmatch(r"[\w.-]+\.safetensors", name)
            require(plain, f"shard {name!r} must be the plain name of a .safetensors file")
    return shards
