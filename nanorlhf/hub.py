"""Hugging Face folders, in and out: config.json, model.safetensors, and our tokenizer beside them.

Two families so far: GPT-2 and Llama. For each one table, from our parameter names to theirs, read in both
directions. A saved folder loads in transformers as it is. Reward models and critics are saved as
*ForSequenceClassification with one label; their `reward_bias` stands in config.json, and transformers ignores
it (its scores are ours minus reward_bias).
"""

import json
import os

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from nanorlhf.checkpoint import write_folder
from nanorlhf.common import UserError
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.tokenizer import FILE, Tokenizer

# Our name → theirs. {i} is the layer. "T": GPT-2 stores the transpose. "QKV": three of ours, one of theirs.
GPT2 = {
    "wte.weight": "transformer.wte.weight",
    "wpe.weight": "transformer.wpe.weight",
    "blocks.{i}.norm1": "transformer.h.{i}.ln_1",
    "blocks.{i}.attn.qkv": "transformer.h.{i}.attn.c_attn",
    "blocks.{i}.attn.o": "transformer.h.{i}.attn.c_proj",
    "blocks.{i}.norm2": "transformer.h.{i}.ln_2",
    "blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "lm_head.weight": "lm_head.weight",
}
LLAMA = {
    "wte.weight": "model.embed_tokens.weight",
    "blocks.{i}.norm1": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attn.q": "model.layers.{i}.self_attn.q_proj",
    "blocks.{i}.attn.k": "model.layers.{i}.self_attn.k_proj",
    "blocks.{i}.attn.v": "model.layers.{i}.self_attn.v_proj",
    "blocks.{i}.attn.o": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.norm2": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head.weight": "lm_head.weight",
}


def _names(table, cfg):
    """The table written out: (our name, their name) of every module or parameter of this model."""
    for ours, theirs in table.items():
        if ours == "lm_head.weight" and cfg.tied:
            continue
        for i in range(cfg.n_layer) if "{i}" in ours else [0]:
            yield ours.format(i=i), theirs.format(i=i)


def _to_hf(state, cfg, family):
    """Our state dict → theirs."""
    out = {}
    for ours, theirs in _names(GPT2 if family == "gpt2" else LLAMA, cfg):
        if ours.endswith(".weight"):
            out[theirs] = state[ours]
            continue
        for kind in ("weight", "bias"):
            if ours.endswith("attn.qkv"):
                tensor = torch.cat([state[f"{ours[:-3]}{x}.{kind}"] for x in "qkv"])
            elif f"{ours}.{kind}" in state:
                tensor = state[f"{ours}.{kind}"]
            else:
                continue
            transpose = family == "gpt2" and kind == "weight" and tensor.dim() == 2  # GPT-2 stores (in, out)
            out[f"{theirs}.{kind}"] = tensor.T if transpose else tensor
    return out


def _from_hf(tensors, model, family, weights):
    """Their tensors → our state dict, through the same table. UserError unless they fit."""
    cfg = model.cfg
    state = model.state_dict()
    want = {k: tuple(v.shape) for k, v in _to_hf(state, cfg, family).items()}
    have = {k: tuple(v.shape) for k, v in tensors.items()}
    for name in sorted(set(want) | set(have)):
        if want.get(name) != have.get(name):
            what = f"has shape {have.get(name)}, config.json says {want.get(name)}"
            if name not in have or name not in want:
                what = "is missing" if name not in have else "is unknown to this model"
            raise UserError(f"{weights}: tensor {name} {what}")
    for ours, theirs in _names(GPT2 if family == "gpt2" else LLAMA, cfg):
        if ours.endswith(".weight"):
            state[ours] = tensors[theirs]
            continue
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" not in tensors:
                continue
            tensor = tensors[f"{theirs}.{kind}"]
            if family == "gpt2" and kind == "weight" and tensor.dim() == 2:
                tensor = tensor.T
            if ours.endswith("attn.qkv"):
                for x, part in zip("qkv", tensor.chunk(3)):
                    state[f"{ours[:-3]}{x}.{kind}"] = part
            else:
                state[f"{ours}.{kind}"] = tensor
    return state


def _family(cfg):
    """Which architecture of theirs this configuration is, exactly; anything in between cannot be exported."""
    kind = (cfg.norm, cfg.pos, cfg.mlp)
    if kind == ("layer", "learned", "gelu") and cfg.bias and cfg.n_kv_head == cfg.n_head \
            and cfg.head_dim * cfg.n_head == cfg.d_model:
        return "gpt2"
    if kind == ("rms", "rope", "swiglu"):
        return "llama"
    raise UserError(
        f"no Hugging Face architecture has norm={cfg.norm}, pos={cfg.pos}, mlp={cfg.mlp}, bias={cfg.bias}: "
        "use GPTConfig.gpt2 or GPTConfig.llama"
    )


def _write_config(model, tok):
    cfg, scalar = model.cfg, isinstance(model, ScalarModel)
    family = _family(cfg)
    head = "ForSequenceClassification" if scalar else "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    out = {
        "architectures": [("GPT2" if family == "gpt2" else "Llama") + head],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": tok and tok.eos_id,
        "eos_token_id": tok and tok.eos_id,
        "pad_token_id": tok and tok.pad_id,
    }
    if family == "gpt2":
        out |= {
            "n_embd": cfg.d_model,
            "n_layer": cfg.n_layer,
            "n_head": cfg.n_head,
            "n_positions": cfg.max_len,
            "n_inner": cfg.d_ff,
            "layer_norm_epsilon": cfg.norm_eps,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    else:  # both spellings of the rotary settings: transformers 4 reads the one, 5 the other
        out |= {
            "hidden_size": cfg.d_model,
            "num_hidden_layers": cfg.n_layer,
            "num_attention_heads": cfg.n_head,
            "num_key_value_heads": cfg.n_kv_head,
            "head_dim": cfg.head_dim,
            "intermediate_size": cfg.d_ff,
            "max_position_embeddings": cfg.max_len,
            "rms_norm_eps": cfg.norm_eps,
            "hidden_act": "silu",
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            "attention_bias": cfg.bias,
            "mlp_bias": cfg.bias,
        }
    if scalar:
        out |= {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "reward_bias": model.reward_bias.item(),
        }
    return out


def _read_config(raw, where):
    """config.json → (GPTConfig, family). What we could not represent exactly is refused by name."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: is not a JSON object")
    family = raw.get("model_type")
    if family not in ("gpt2", "llama"):
        raise UserError(f"{where}: model_type {family!r} is not supported (gpt2 and llama are)")
    try:
        if family == "gpt2":
            must = {
                "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
                "scale_attn_by_inverse_layer_idx": (False, (False,)),
                "scale_attn_weights": (True, (True,)),
            }
            cfg = GPTConfig.gpt2(
                raw["vocab_size"],
                n_layer=raw["n_layer"],
                n_head=raw["n_head"],
                d_model=raw["n_embd"],
                d_ff=raw.get("n_inner") or 0,
                max_len=raw.get("n_positions", 1024),
                norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
                tied=raw.get("tie_word_embeddings", True),
            )
        else:
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            bias = raw.get("attention_bias", False)
            must = {"hidden_act": ("silu", ("silu",)), "mlp_bias": (False, (bias,))}
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                raise UserError(
                    f"{where}: rotary positions of type {rope.get('rope_type', rope.get('type'))!r} are not "
                    "supported"
                )
            cfg = GPTConfig.llama(
                raw["vocab_size"],
                n_layer=raw["num_hidden_layers"],
                n_head=raw["num_attention_heads"],
                d_model=raw["hidden_size"],
                n_kv_head=raw.get("num_key_value_heads") or 0,
                head_dim=raw.get("head_dim") or 0,
                d_ff=raw["intermediate_size"],
                max_len=raw.get("max_position_embeddings", 2048),
                bias=bias,
                norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                tied=raw.get("tie_word_embeddings", False),
                rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            )
    except KeyError as e:
        raise UserError(f"{where}: the field {e} is missing") from None
    except UserError as e:  # a size that is none, or sizes that do not go together
        raise UserError(str(e) if where in str(e) else f"{where}: {e}") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: damaged ({e})") from None
    for key, (default, allowed) in must.items():
        if raw.get(key, default) not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise UserError(f"{where}: {key}={raw.get(key, default)!r} is not supported (must be {choice})")
    return cfg, family


def save(model, tok, folder):
    """Write a GPT or ScalarModel and its tokenizer (or None) as a Hugging Face folder, all or nothing."""
    scalar = isinstance(model, ScalarModel)
    trunk = model.trunk if scalar else model
    config = _write_config(model, tok)
    tensors = _to_hf(trunk.state_dict(), trunk.cfg, config["model_type"])
    if scalar:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = model.score.weight
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    files = {"config.json": json.dumps(config, indent=2).encode(),
             "model.safetensors": safetensors.save(tensors, metadata={"format": "pt"})}
    if tok is not None:
        files |= tok.files()
    write_folder(os.path.normpath(folder), files)


def load(folder, flag="--init", hint="", kind=""):
    """Read a folder → (model, tokenizer). model is a ScalarModel for *ForSequenceClassification, else a GPT;
    the tokenizer is None where the folder has none. Raises UserError, naming `flag` and the file, for
    anything missing or unfitting.
    """
    folder = os.path.normpath(folder)  # "model/" and a Path too
    if not os.path.isdir(folder) and os.path.isdir(f"{folder}.old"):
        folder += ".old"  # what a crash in mid-save leaves
    if os.path.isfile(os.path.join(folder, "model", "config.json")):
        raise UserError(f"{flag} {folder} is a run folder; give {os.path.join(folder, 'model')}")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        what = "has no config.json" if os.path.isdir(folder) else "does not exist"
        run, name = os.path.split(folder)
        out = f" --out {run}" if run and name == "model" else ""
        raise UserError(f"{flag} {folder} {what}" + (f"; make it with: {hint}{out}" if hint else ""))
    try:
        model, tok = _read(folder)
    except UserError as e:
        raise UserError(f"{flag} {e}") from None
    is_a = "reward model" if isinstance(model, ScalarModel) else "language model"
    if kind and kind != is_a:
        raise UserError(f"{flag} {folder}: is a {is_a}, must be a {kind}")
    if kind and tok is None:
        raise UserError(f"{flag} {folder}: has no tokenizer ({FILE})")
    return model, tok


def _read(folder):
    """A folder → (model, tokenizer or None), or a UserError that begins with the file at fault."""
    where, weights = os.path.join(folder, "config.json"), os.path.join(folder, "model.safetensors")
    try:
        with open(where, encoding="utf-8") as f:
            raw = json.load(f)
    except (ValueError, OSError) as e:
        raise UserError(f"{where}: {e}") from None
    cfg, family = _read_config(raw, where)
    try:
        tensors = safetensors.load_file(weights)
    except (ValueError, OSError, SafetensorError) as e:
        raise UserError(f"{weights}: {e}") from None
    scalar = (raw.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    score = tensors.pop("score.weight", None) if scalar else None
    if scalar:
        cfg.tied = True  # no unembedding of its own: `score` is the head
    model = GPT(cfg)
    model.load_state_dict(_from_hf(tensors, model, family, weights))
    if scalar:
        model = ScalarModel(model)
        if score is None or score.shape != model.score.weight.shape:
            raise UserError(f"{weights}: score.weight is missing or not of shape (1, {cfg.d_model})")
        bias = raw.get("reward_bias", 0.0)
        if not isinstance(bias, (int, float)):
            raise UserError(f"{where}: reward_bias={bias!r} must be a number")
        model.load_state_dict({"score.weight": score, "reward_bias": torch.tensor(float(bias))}, strict=False)
    tok = Tokenizer.load(folder) if os.path.exists(os.path.join(folder, FILE)) else None
    if tok and tok.vocab_size > cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tok.vocab_size} ids, the model only {cfg.vocab_size}")
    return model, tok
