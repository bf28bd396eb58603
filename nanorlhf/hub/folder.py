"""Hugging Face folders, in and out: config.json, safetensors, and the tokenizer's files beside them. GGUF in.

A saved folder loads in transformers 4 and 5 as it is; the other fields of the config.json that a model came
from, its tokenizer's files and its generation settings travel with it. Reward models and critics are saved as
*ForSequenceClassification with one label. Their `reward_bias` stands in config.json; transformers ignores it,
so its scores are ours minus reward_bias.
"""

import json
from os.path import isdir, isfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from nanorlhf import lora
from nanorlhf.errors import UserError, blame, require
from nanorlhf.hub import families, tokenizer_files
from nanorlhf.hub import weights as weight_files
from nanorlhf.hub.files import LFS, OTHER_FILES, read_json
from nanorlhf.hub.gguf import Gguf, json_folder
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.run import dist, sharding
from nanorlhf.run.folders import new_folder
from nanorlhf.tokenizer import Tokenizer


class Missing(UserError):
    """There is no model in that folder; `run/models.py` adds the command that makes one."""


class Source(NamedTuple):
    """The config.json and the tokenizer that a model came with; `save` passes on what the former says."""

    config: dict
    tok: Tokenizer | None

    def __deepcopy__(self, memo):  # never written to: a copy of a model, a reference say, shares it
        return self


@torch.no_grad()
def save(model, tok, folder):
    """Write a GPT or ScalarModel and its tokenizer (or None) as a Hugging Face folder, all or nothing.

    Weights keep their precision (float64 becomes float32); adapters are merged into them.
    """
    trunk = model.trunk
    dtype = trunk.wte.weight.dtype
    if dtype == torch.float64:
        dtype = torch.float32
    config, family = families.write_config(model, tok, trunk.source, dtype)
    adapted = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, lora.Adapted)}

    def full(weight):
        """With --shard all processes put the weight together; one process has it all."""
        layer = adapted.get(id(weight))
        if layer is None:
            return sharding.full(weight.detach())
        return lora.merge(sharding.full(weight), sharding.full(layer.A), sharding.full(layer.B), layer.scale)

    tensors = {}
    for name, parts in weight_files.tensors_of(model, family):
        parts = [full(part) for part in parts]
        if dist.rank() == 0:
            tensor = weight_files.join(name, parts, trunk.cfg)
            tensors[name] = tensor.to("cpu", dtype).contiguous()
    if dist.rank() > 0:
        return
    files = tokenizer_files.files(tok) if tok else {}
    files["config.json"] = json.dumps(config, indent=2).encode()
    with new_folder(Path(folder)) as tmp:
        weight_files.write(tensors, f"{tmp}/model.safetensors")
        for name, data in files.items():
            Path(tmp, name).write_bytes(data)


def load(folder, kind="", like=None, shard=False, weights=True):
    """Read a folder or a .gguf → (model, tokenizer). UserError, which begins with its path, where that fails.

    The model is a ScalarModel for *ForSequenceClassification, else a GPT, in torch's default dtype (fp32 if
    nobody has set another); the tokenizer is None where the folder has none. Tensors are read one at a time,
    so no second copy of the model is ever in memory.

    kind      "language model" or "reward model": what the folder must hold, with a tokenizer; "" takes both
    like      the tokenizer that the folder must have
    shard     leave the weights on the meta device until dist.spread has cut the model; model.fill(model) then
              reads this process's pieces of the tensors
    weights   False: leave the weights on the meta device and do not read their files (--dry_run)
    """
    place = find(folder)
    with json_folder(place) as folder:
        model, tok = _build(folder, place, shard, weights)
    is_a = "reward model" if isinstance(model, ScalarModel) else "language model"
    require(kind in ("", is_a), f"{place}: is a {is_a}, must be a {kind}")
    missing = f"{place}: has no tokenizer (tokenizer.json or {tokenizer_files.FILE})"
    require(tok or not kind, missing)
    fits = like is None or tok == like
    require(fits, f"{place}: not the vocabulary of the other models; all need one tokenizer")
    return model, tok


def find(folder):
    """The path of a folder with a config.json, or an open GGUF. Missing where there is neither."""
    folder = Path(folder)
    if folder.suffix == ".gguf" and isfile(folder):
        return Gguf(folder)
    old = Path(f"{folder}.old")  # a crash in mid-save leaves it
    if not isdir(folder) and isdir(old):
        folder = old
    inner = folder / "model"
    require(not isfile(inner / "config.json"), f"{folder} is a run folder; give {inner}")
    if isfile(folder / "config.json"):
        for file in folder.iterdir():
            if file.suffix in (".json", ".safetensors") and isfile(file):
                with blame(file, OSError), open(file, "rb") as f:
                    require(f.read(len(LFS)) != LFS, OTHER_FILES[LFS])
        return folder
    if isfile(folder):
        raise Missing(f"{folder} is a file, must be a folder or a .gguf")
    if isdir(folder):
        raise Missing(f"{folder} has no config.json")
    raise Missing(f"{folder} does not exist")


class _OnMeta(TorchFunctionMode):
    """What a model on the meta device does with the random numbers of its weights, which it cannot hold.

    draw=True draws them all the same, one tensor at a time: a new head is drawn after its trunk, and would
    have other numbers with --shard. draw=False leaves them out. torch's own way imports 900 modules.
    """

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **kwargs)
        tensor = kwargs.pop("tensor")
        if self.draw:
            func(torch.empty_like(tensor, device="cpu"), *args, **kwargs)
        return tensor


def _build(folder, place, shard, weights):
    """A folder of JSON files, and what holds the weights → (model, tokenizer or None)."""
    config = folder / "config.json"
    raw = read_json(config)
    with blame(config, ValueError):
        cfg, family = families.read_config(raw)
        if isinstance(place, Gguf):
            family = place.family(family)
        bias = raw.get("reward_bias", 0.0)
        number = type(bias) in (int, float) and -1e30 < bias < 1e30  # not NaN, which would spoil every reward
        require(number, f"reward_bias={bias!r} must be a number below 1e30")
    scalar = "ForSequenceClassification" in str(raw.get("architectures"))
    if scalar:
        cfg.tied = True  # no unembedding of its own: `score` is the head
    tok = tokenizer_files.load(folder)
    n_ids = tok.vocab_size if tok else cfg.vocab_size
    too_many = f"{folder}: the tokenizer has {n_ids} ids, the model only {cfg.vocab_size}"
    require(n_ids <= cfg.vocab_size, too_many)
    step_ids = raw.get("step_ids")
    if step_ids is not None:
        good = isinstance(step_ids, list) and all(type(id) is int and 0 <= id < n_ids for id in step_ids)
        require(good, f"{config}: step_ids must be a list of ids from 0 to {n_ids - 1}")

    with torch.device("meta"), _OnMeta(draw=False):
        trunk = GPT(cfg)
        outline = ScalarModel(trunk) if scalar else trunk
    if weights:  # the files are checked before the memory for them is asked for
        places = weight_files.match(outline, family, place)
        if shard:
            with torch.device("meta"), _OnMeta(draw=True):
                trunk = GPT(cfg)
        else:
            trunk = GPT(cfg)
    model = trunk
    if scalar:
        model = ScalarModel(trunk)
        model.reward_bias.fill_(float(bias))  # torch takes no integer beyond 64 bits
        model.step_ids = step_ids
    if not weights:
        model.to("meta")
    trunk.n_ids = n_ids
    trunk.stop_ids = tuple(tokenizer_files.stop_ids(folder))
    trunk.source = Source(raw, tok)
    if shard and weights:
        model.fill = lambda model: weight_files.fill(model, family, places)
    elif weights:
        weight_files.fill(model, family, places)
    return model, tok
