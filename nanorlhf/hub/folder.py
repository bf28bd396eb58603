"""Hugging Face folders, in and out: config.json, safetensors, and the tokenizer's files beside them.

GPT-2, Llama 2 to 3.2, SmolLM2, Qwen2, Qwen2.5, Qwen3 and Pythia, by config.json alone. What a folder says and
we could not represent exactly is refused by name. A saved folder loads in transformers 4 and 5 as it is; the
other fields of the config.json that a model came from, its tokenizer's files and its generation settings
travel with it. Reward models and critics are saved as *ForSequenceClassification with one label; their
`reward_bias` stands in config.json, and transformers ignores it (its scores are ours minus reward_bias).

One table per family, in one direction: ours → theirs. The other direction is derived from it. Of a tensor of
theirs `_views` gives the parts that are ours, to be read or to be written; and a family can hold a
configuration exactly if what we write for it, read again, is that configuration.
"""

import contextlib
import hashlib
import json
import os
import re
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import lora
from nanorlhf.errors import UserError, blame, require
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.run import dist, sharding
from nanorlhf.run.device import to_device
from nanorlhf.run.folders import tensor_bytes, write_folder
from nanorlhf.tokenizer import FILE, Tokenizer, beside, stop_ids

DAMAGE = ValueError, OSError, SafetensorError  # what reading a damaged file raises
REDUNDANT = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # constants
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Family(NamedTuple):
    name: str  # of their classes
    head: str  # how the class of the language model goes on
    prefix: str  # of the trunk's tensors; the file of a bare trunk does without
    acts: dict  # their activation → our mlp
    keys: dict  # our setting → their key of config.json
    fixed: dict  # our settings that this family does not leave open
    absent: dict  # their key → what it means that it is absent; every other key must be there
    must: dict  # their key → its only value that we can represent, and what it means that it is absent
    tensors: dict  # our module → theirs; {i} is the layer, "qkv" three modules of ours in one of theirs


SIZES = dict(vocab_size="vocab_size", n_layer="num_hidden_layers", n_head="num_attention_heads",
             d_model="hidden_size", d_ff="intermediate_size", max_len="max_position_embeddings",
             mlp="hidden_act", tied="tie_word_embeddings")  # fmt: skip
GQA = dict(n_kv_head="num_key_value_heads", head_dim="head_dim", norm_eps="rms_norm_eps")
BIASES = dict(qkv_bias="attention_bias", o_bias="attention_bias")

GPT2 = Family(
    "GPT2", "LMHeadModel", "transformer.", GELU,
    keys=dict(vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", d_model="n_embd", d_ff="n_inner",
              max_len="n_positions", norm_eps="layer_norm_epsilon", mlp="activation_function",
              tied="tie_word_embeddings"),
    fixed={},
    absent=dict(n_inner=0, n_positions=1024, layer_norm_epsilon=1e-5, activation_function="gelu_new",
                tie_word_embeddings=True),
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, quantization_config=None),
    tensors={
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "blocks.{i}.norm1": "transformer.h.{i}.ln_1",
        "blocks.{i}.attn.qkv": "transformer.h.{i}.attn.c_attn",
        "blocks.{i}.attn.o": "transformer.h.{i}.attn.c_proj",
        "blocks.{i}.norm2": "transformer.h.{i}.ln_2",
        "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
        "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)  # fmt: skip
NEOX = Family(
    "GPTNeoX", "ForCausalLM", "gpt_neox.", GELU,
    keys=SIZES | BIASES | dict(norm_eps="layer_norm_eps", parallel="use_parallel_residual"),
    fixed=dict(pos="rope"),
    absent=dict(rotary_pct=0.25, layer_norm_eps=1e-5, hidden_act="gelu", max_position_embeddings=2048,
                attention_bias=True, use_parallel_residual=True, tie_word_embeddings=False),
    must=dict(quantization_config=None),
    tensors={
        "wte": "gpt_neox.embed_in",
        "blocks.{i}.norm1": "gpt_neox.layers.{i}.input_layernorm",
        "blocks.{i}.attn.qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "blocks.{i}.attn.o": "gpt_neox.layers.{i}.attention.dense",
        "blocks.{i}.norm2": "gpt_neox.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "blocks.{i}.mlp.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
)  # fmt: skip
LLAMA = Family(
    "Llama", "ForCausalLM", "model.", {"silu": "swiglu"},
    keys=SIZES | GQA | BIASES | dict(mlp_bias="mlp_bias"),
    fixed=dict(norm="rms", pos="rope"),
    absent=dict(num_key_value_heads=0, head_dim=0, rms_norm_eps=1e-6, hidden_act="silu",
                max_position_embeddings=2048, attention_bias=False, mlp_bias=False,
                tie_word_embeddings=False),
    must=dict(quantization_config=None),
    tensors={
        "wte": "model.embed_tokens",
        "blocks.{i}.norm1": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attn.q": "model.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attn.k": "model.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attn.v": "model.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
        "blocks.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
        "blocks.{i}.attn.o": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.norm2": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
        "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
    },
)  # fmt: skip
QWEN = LLAMA._replace(
    absent=dict(head_dim=0, rms_norm_eps=1e-6, max_position_embeddings=32768, hidden_act="silu",
                attention_bias=False, tie_word_embeddings=False),
    must=dict(use_sliding_window=False, quantization_config=None),
)  # fmt: skip
QWEN2 = QWEN._replace(
    name="Qwen2", keys=SIZES | GQA, fixed=LLAMA.fixed | dict(qkv_bias=True, o_bias=False, mlp_bias=False)
)
QWEN3 = QWEN._replace(
    name="Qwen3", keys=SIZES | GQA | BIASES, absent=QWEN.absent | dict(head_dim=128),
    fixed=LLAMA.fixed | dict(qk_norm=True, mlp_bias=False),
)  # fmt: skip
FAMILIES = dict(gpt2=GPT2, llama=LLAMA, qwen2=QWEN2, qwen3=QWEN3, gpt_neox=NEOX)

# ------------------------------------------------------------------------------------------------------------
# config.json


def _read_config(raw):
    """config.json → (GPTConfig, its family). What we could not represent exactly is refused by name."""
    require(isinstance(raw, dict), "is not a JSON object")
    family = next((f for name, f in FAMILIES.items() if name == raw.get("model_type")), None)
    require(family, f"model_type {raw.get('model_type')!r} is not supported ({', '.join(FAMILIES)} are)")
    have = family.absent | family.must | {key: value for key, value in raw.items() if value is not None}
    for key in family.keys.values():
        require(key in have, f"the field {key!r} is missing")
    act, layers = family.keys["mlp"], have.get("layer_types", [])
    allowed = {key: [value] for key, value in family.must.items()} | {act: list(family.acts)}
    if layers:
        allowed["layer_types"] = [["full_attention"] * (len(layers) if isinstance(layers, list) else 1)]
    for key, values in allowed.items():
        what = f"{key}={have[key]!r} is not supported (must be {' or '.join(map(repr, values))})"
        require(have[key] in values, what)
    settings = {ours: have[key] for ours, key in family.keys.items()}
    settings["mlp"] = family.acts[settings["mlp"]]
    if family.fixed.get("pos") == "rope":
        settings |= _read_rope(raw, family)
    return GPTConfig(**family.fixed | settings), family


def _read_rope(raw, family):
    """The rotary settings from either dialect, or from both where they do not contradict each other."""
    places = [raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}, raw]
    require(all(isinstance(place, dict) for place in places), "damaged: its rotary settings are no object")

    def said(absent, *keys):
        found = [place[key] for place in places for key in keys if place.get(key) is not None] or [absent]
        require(found.count(found[0]) == len(found), f"{keys[0]} has two values, {found[0]!r} and another")
        return found[0]

    kind = said("default", "rope_type", "type")
    require(kind in ("default", "llama3"), f"rotary positions of type {kind!r} are not supported")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3}
    for key in {*places[0], *places[1]} - known:
        raise UserError(f"the rotary setting {key!r} is not supported")
    share = said(family.absent.get("rotary_pct", 1.0), "partial_rotary_factor", "rotary_pct")
    require(share == 1 or family is NEOX, f"partial_rotary_factor={share!r} is not supported (must be 1.0)")
    scaling = [said(None, key) for key in LLAMA3] if kind == "llama3" else []
    for key, value in zip(LLAMA3, scaling):
        require(value is not None, f"the field {key!r} of its rotary settings is missing")
    theta = said(10000.0, "rope_theta", "rotary_emb_base")
    return dict(rope_theta=theta, rope_share=share, rope_scaling=tuple(scaling))


def _write_settings(cfg, kind):
    """A configuration in a family's words, in the dialects of transformers 4 and 5 at once."""
    family = FAMILIES[kind]
    out = {"model_type": kind} | {key: getattr(cfg, ours) for ours, key in family.keys.items()}
    acts = {ours: theirs for theirs, ours in reversed(family.acts.items())}  # the first of their names for it
    out[family.keys["mlp"]] = acts.get(cfg.mlp, "none")
    if cfg.pos == "rope":
        scaled = dict(zip(LLAMA3, cfg.rope_scaling))
        rope = {"rope_type": "llama3" if scaled else "default", **scaled}
        out |= {"rope_theta": cfg.rope_theta, "rope_scaling": rope if scaled else None}
        out["rope_parameters"] = rope | {"rope_theta": cfg.rope_theta}
        if family is NEOX:
            out |= {"rotary_emb_base": cfg.rope_theta, "rotary_pct": cfg.rope_share}
            out["rope_parameters"]["partial_rotary_factor"] = cfg.rope_share
    return out


def _fit(cfg):
    """→ (settings, family) of the family that can hold this configuration exactly, or UserError."""
    for kind, family in FAMILIES.items():
        settings = _write_settings(cfg, kind)
        with contextlib.suppress(UserError):
            if _read_config(settings)[0] == cfg:
                return settings, family
    raise UserError(f"no Hugging Face architecture is exactly this one: {cfg}")


def _write_config(model, tok, source, dtype):
    """→ config.json, its family: our settings on top of the other fields of the file that they came from."""
    settings, family = _fit(model.cfg)
    kept = source.config if source else {}
    no_dropout = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if family is GPT2 and not source else ()
    settings |= dict.fromkeys(no_dropout, 0.0)
    if tok:
        ids = dict(bos_token_id=tok.eos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
        came_with = source and source.fits(tok)
        settings |= {key: x for key, x in ids.items() if not came_with or kept.get(key) is None}
    if isinstance(model, ScalarModel):
        bias = model.reward_bias.item()
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "reward_bias": bias}
        settings |= {} if model.step_ids is None else {"step_ids": model.step_ids}
    head = "ForSequenceClassification" if isinstance(model, ScalarModel) else family.head
    precision = str(dtype).removeprefix("torch.")
    settings |= {"architectures": [family.name + head], "dtype": precision, "torch_dtype": precision}
    return kept | settings, family


# ------------------------------------------------------------------------------------------------------------
# tensors


def _tensors(model, family):
    """The table written out: (their name, our parameters in it) of every tensor of this model."""
    trunk = getattr(model, "trunk", model)
    ours, scalar = dict(trunk.named_parameters()), isinstance(model, ScalarModel)
    for module, theirs in family.tensors.items():
        names = [module[:-3] + x for x in "qkv"] if module.endswith("qkv") else [module]
        for i in range(trunk.cfg.n_layer) if "{i}" in module else [0]:
            for kind in ("weight", "bias"):
                parts = [ours.get(f"{name}.{kind}".format(i=i)) for name in names]
                if parts[0] is not None and not (scalar and module == "lm_head"):
                    yield f"{theirs}.{kind}".format(i=i), parts
    if scalar:
        yield "score.weight", [model.score.weight]


def _transposed(name, parts):
    return ".c_" in name and parts[0].dim() == 2  # GPT-2 stores these as (in, out)


def _shape(name, parts):
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return shape[::-1] if _transposed(name, parts) else shape


def _views(tensor, name, parts, cfg):
    """A tensor of theirs → its views that are ours, one for each of `parts`."""
    if _transposed(name, parts):
        tensor = tensor.T
    if "query_key_value" in name:  # GPT-NeoX goes head by head: q, k, v of the first, q, k, v of the next
        return tensor.view(cfg.n_head, 3, cfg.head_dim, *tensor.shape[1:]).unbind(1)
    return tensor.chunk(len(parts))


def _join(name, parts, cfg):
    """Our parameters → the tensor of theirs that they make up."""
    if len(parts) == 1 and not _transposed(name, parts):
        return parts[0]
    tensor = parts[0].new_empty(_shape(name, parts))
    for part, view in zip(parts, _views(tensor, name, parts, cfg)):
        view.copy_(part.view(view.shape))
    return tensor


@torch.no_grad()
def _fill(model, family, folder):
    """Copy a folder's tensors into the model, one at a time. UserError unless every one has its place."""
    trunk = getattr(model, "trunk", model)
    want, seen, head = dict(_tensors(model, family)), set(), None
    for file in _files(folder):
        with blame(file, *DAMAGE), safe_open(file, "pt") as f:
            said, digest = (f.metadata() or {}).get("sha256"), hashlib.sha256()
            for key in sorted(f.keys()):
                name = key if key in want or key.startswith(family.prefix) else family.prefix + key
                tensor = f.get_tensor(key)
                if said:
                    _add(digest, key, tensor)
                if name not in want and key == family.tensors["lm_head"] + ".weight" and trunk.cfg.tied:
                    head = tensor  # some files hold the embedding twice
                    continue
                if name not in want and REDUNDANT.search(key):
                    continue
                require(name in want, f"tensor {key} is unknown to this model")
                require(name not in seen, f"tensor {key} is there twice")
                exact = tensor.is_floating_point() and tensor.element_size() > 1
                require(exact, f"tensor {key} is quantised ({tensor.dtype})")
                have, shape = tuple(tensor.shape), _shape(name, want[name])
                require(have == shape, f"tensor {key} has shape {have}, config.json says {shape}")
                for part, view in zip(want[name], _views(tensor, name, want[name], trunk.cfg)):
                    sharding.local(part).copy_(sharding.piece(view.reshape(part.shape), part))
                seen.add(name)
            require(said in (None, digest.hexdigest()), "wrong checksum: damaged after it was saved")
    for name in sorted(want.keys() - seen):
        raise UserError(f"{file}: tensor {name} is missing")
    ours = sharding.local(trunk.wte.weight)
    if head is not None and not torch.equal(sharding.piece(head, trunk.wte.weight).to(ours), ours):
        raise UserError(f"{file}: the unembedding is not the embedding, although config.json says that it is")


def _add(digest, name, tensor):
    """safetensors loads a file with a flipped bit in silence; a hash of names and tensors does not."""
    digest.update(name.encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())


def _write_weights(tensors, path):
    """A safetensors file with a checksum in its header, where no other program minds it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    about = {"format": "pt", "sha256": digest.hexdigest()}
    safetensors.save_file(tensors, path, about)
    with open(path, "rb+") as f:  # which of the two stands first is left to chance: the same bytes every time
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size)) | {"__metadata__": about}
        f.seek(8)
        f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _files(folder):
    """The weight files of a folder: model.safetensors, or the shards that its index names."""
    single = os.path.join(folder, "model.safetensors")
    index, pickle = f"{single}.index.json", os.path.join(folder, "pytorch_model.bin")
    if not os.path.exists(single) and os.path.exists(index):
        with blame(index, *DAMAGE), open(index, encoding="utf-8") as f:
            table = json.load(f)
            table = table.get("weight_map") if isinstance(table, dict) else None
            require(isinstance(table, dict) and table, "damaged: it has no weight_map")
            names = set(map(str, table.values()))
            for name in names:
                plain = re.fullmatch(r"[\w.-]+\.safetensors", name)
                require(plain, f"shard {name!r} must be the plain name of a .safetensors file")
        return [os.path.join(folder, name) for name in sorted(names)]
    if not os.path.exists(single) and (os.path.exists(pickle) or os.path.exists(f"{pickle}.index.json")):
        convert = "make it safetensors (in transformers: from_pretrained, then save_pretrained)"
        raise UserError(f"{pickle}: a pickle can run any code and is not read; {convert}")
    return [single]


# ------------------------------------------------------------------------------------------------------------
# folders


class Source(NamedTuple):
    """What a model's folder held beside the weights; `save` passes it on."""

    config: dict
    files: dict  # name → bytes
    tok: Tokenizer | None

    def fits(self, tok):
        """Whether a model is saved with the tokenizer that it came with (or with none)."""
        return tok is None or tok == self.tok

    def __deepcopy__(self, memo):  # never written to: a copy of a model, a reference say, shares it
        return self


def save(model, tok, folder):
    """Write a GPT or ScalarModel and its tokenizer (or None) as a Hugging Face folder, all or nothing.

    Weights keep their precision (float64 becomes float32); adapters are merged into them.
    """
    adapted = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, lora.Adapted)}
    trunk = getattr(model, "trunk", model)
    source, dtype = trunk.source, trunk.wte.weight.dtype
    dtype = torch.float32 if dtype == torch.float64 else dtype
    config, family = _write_config(model, tok, source, dtype)
    tensors = {}
    def merged(layer):
        weight, A, B = map(sharding.full, (layer.weight, layer.A, layer.B))
        return lora.merge(weight, A, B, layer.scale)

    for name, parts in _tensors(model, family):
        # of a sharded model: by all processes together
        parts = [merged(adapted[id(p)]) if id(p) in adapted else sharding.full(p.detach()) for p in parts]
        if dist.rank() == 0:
            tensors[name] = _join(name, parts, trunk.cfg).to("cpu", dtype).contiguous()
    files = {"config.json": json.dumps(config, indent=2).encode(),
             "model.safetensors": lambda path: _write_weights(tensors, path)}  # fmt: skip
    if source and source.fits(tok):
        files |= source.files
    if tok is not None:
        files |= tok.files()
    if dist.rank() == 0:
        write_folder(os.path.normpath(folder), files, size=tensor_bytes(tensors))


def load(folder, flag="--init", hint="", kind="", dtype=torch.float32, like=None, shard=False):
    """Read a folder → (model, tokenizer). model is a ScalarModel for *ForSequenceClassification, else a GPT;
    the tokenizer is None where the folder has none. dtype is that of the weights; tensors are read one at a
    time, so that no second copy of the model is ever in memory. like: the tokenizer that the folder must
    have. shard: leave the weights on the meta device until dist.spread has cut the model; each process then
    keeps its pieces of the tensors it reads. Raises UserError, naming `flag` and the file, for anything
    missing or unfitting.
    """
    folder = os.path.normpath(folder)  # "model/" and a Path too
    if not os.path.isdir(folder) and os.path.isdir(f"{folder}.old"):
        folder += ".old"  # what a crash in mid-save leaves
    if os.path.isfile(os.path.join(folder, "model", "config.json")):
        raise UserError(f"{flag} {folder} is a run folder; give {os.path.join(folder, 'model')}")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        what = "is a file, must be a folder" if os.path.isfile(folder) else "does not exist"
        what = "has no config.json" if os.path.isdir(folder) else what
        run, name = os.path.split(folder)
        out = f" --out {run}" if run and name == "model" else ""
        raise UserError(f"{flag} {folder} {what}" + (f"; make it with: {hint}{out}" if hint else ""))

    def fill(model):
        with _named(flag):
            _fill(model, family, folder)

    with _named(flag):
        model, tok, family = _read(folder, dtype, shard)
    if shard:
        model.fill = fill
    else:
        fill(model)
    is_a = "reward model" if isinstance(model, ScalarModel) else "language model"
    if kind and kind != is_a:
        raise UserError(f"{flag} {folder}: is a {is_a}, must be a {kind}")
    if kind and tok is None:
        raise UserError(f"{flag} {folder}: has no tokenizer (tokenizer.json or {FILE})")
    if like is not None and tok != like:
        raise UserError(f"{flag} {folder}: not the vocabulary of the other models; all need one SFT run")
    return model, tok


@contextlib.contextmanager
def _named(flag):
    try:
        yield
    except UserError as e:
        raise UserError(f"{flag} {e}") from None


class _Drawing(TorchDispatchMode):
    """Inside, on the meta device, random numbers are drawn and dropped, one tensor at a time: those that are
    drawn next, for a new head, are then what they are where whole models are made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            func(torch.empty_like(args[0], device="cpu"), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def load_models(cfg, device):
    """→ policy, reference, reward model (None without --rm, --ref none), tokenizer, the models on the device.

    All must share one vocabulary. With adapters (cfg.lora_rank) the policy's frozen self is the reference,
    unless that is another folder or is to follow the policy (cfg.ref_every).
    """
    sft, pairs = f"python train_sft.py --task {cfg.task}", f"python train_rm.py --task {cfg.task}"
    policy, tok = load(cfg.init, "--init", sft, "language model", shard=cfg.shard)
    how = dict(like=tok, shard=cfg.shard)
    ref = load(cfg.ref, "--ref", sft, "language model", **how)[0] if cfg.ref != "none" else None
    rm = load(cfg.rm, "--rm", pairs, "reward model", **how)[0] if cfg.rm else None
    frozen = lora.add(policy, cfg.lora_rank, cfg.dtype)
    if frozen and cfg.ref == cfg.init and not getattr(cfg, "ref_every", 0):
        ref = frozen
    to_device(cfg, device, policy, ref, rm)
    return policy, ref, rm, tok


def _read(folder, dtype, shard):
    """A folder → (model, tokenizer or None, family), or a UserError that begins with the file at fault."""
    where = os.path.join(folder, "config.json")
    with blame(where, *DAMAGE):
        with open(where, encoding="utf-8") as f:
            raw = json.load(f)
        cfg, family = _read_config(raw)
        for name, value in vars(cfg).items():
            require(not isinstance(value, int) or value < 2**31, f"{name}={value} is no size")
        bias = raw.get("reward_bias", 0.0)
        scalar = "ForSequenceClassification" in str(raw.get("architectures"))
        require(isinstance(bias, (int, float)), f"reward_bias={bias!r} must be a number")
    if scalar:
        cfg.tied = True  # no unembedding of its own: `score` is the head
    tok = Tokenizer.load(folder) if Tokenizer.present(folder) else None
    if tok and tok.vocab_size > cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tok.vocab_size} ids, the model only {cfg.vocab_size}")

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.ExitStack() as stack:
            for mode in (torch.device("meta"), _Drawing()) if shard else ():
                stack.enter_context(mode)
            trunk = GPT(cfg)
        model = ScalarModel(trunk) if scalar else trunk
    finally:
        torch.set_default_dtype(default)
    if scalar:
        model.reward_bias.fill_(bias)
        model.step_ids = raw.get("step_ids")
    trunk.n_ids = tok.vocab_size if tok else cfg.vocab_size
    with blame(folder, OSError):
        trunk.stop_ids = tuple(stop_ids(folder))
        trunk.source = Source(raw, beside(folder), tok)
    return model, tok, family
