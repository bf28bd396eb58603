"""Families of published models: GPT-2, Llama 2 to 3.2, SmolLM2, Qwen2, Qwen2.5, Qwen3 and Pythia.

There is one table a family, in one direction: our names → theirs. Reading turns it round. A family can hold a
configuration exactly if the config.json that we write for it, read again, is that configuration; a setting of
a config.json that we could not represent exactly is refused by name.
"""

import contextlib
from dataclasses import fields
from typing import NamedTuple

from nanorlhf.errors import UserError, require
from nanorlhf.model import GPTConfig, ScalarModel

GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Family(NamedTuple):
    name: str  # first part of the names of their classes
    head: str  # last part of the name of their language model's class
    prefix: str  # of the trunk's tensors; the file of a bare trunk does without
    acts: dict  # their activation → our mlp
    keys: dict  # our setting → their key of config.json
    fixed: dict  # our settings that are the same in every model of the family
    absent: dict  # their key → its value where it is absent; any other key must be there
    must: dict  # their key → the only value that we can represent, and its value where it is absent
    tensors: dict  # our module → theirs; {i} is the layer; "qkv": our q, k and v are one module of theirs


SIZES = dict(
    vocab_size="vocab_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    d_model="hidden_size",
    d_ff="intermediate_size",
    max_len="max_position_embeddings",
    mlp="hidden_act",
    tied="tie_word_embeddings",
)
GQA = dict(n_kv_head="num_key_value_heads", head_dim="head_dim", norm_eps="rms_norm_eps")
BIASES = dict(qkv_bias="attention_bias", o_bias="attention_bias")
COMMON = dict(
    head_dim=0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    tie_word_embeddings=False,
)

GPT2 = Family(
    "GPT2",
    "LMHeadModel",
    "transformer.",
    GELU,
    keys=dict(
        vocab_size="vocab_size",
        n_layer="n_layer",
        n_head="n_head",
        d_model="n_embd",
        d_ff="n_inner",
        max_len="n_positions",
        norm_eps="layer_norm_epsilon",
        mlp="activation_function",
        tied="tie_word_embeddings",
    ),
    fixed={},
    absent=dict(
        n_inner=0,
        n_positions=1024,
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        tie_word_embeddings=True,
    ),
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
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
)
NEOX = Family(
    "GPTNeoX",
    "ForCausalLM",
    "gpt_neox.",
    GELU,
    keys=SIZES | BIASES | dict(norm_eps="layer_norm_eps", parallel="use_parallel_residual"),
    fixed=dict(pos="rope"),
    absent=dict(
        rotary_pct=0.25,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        max_position_embeddings=2048,
        attention_bias=True,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    ),
    must={},
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
)
LLAMA = Family(
    "Llama",
    "ForCausalLM",
    "model.",
    {"silu": "swiglu"},
    keys=SIZES | GQA | BIASES | dict(mlp_bias="mlp_bias"),
    fixed=dict(norm="rms", pos="rope"),
    absent=COMMON | dict(num_key_value_heads=0, max_position_embeddings=2048, mlp_bias=False),
    must={},
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
)
QWEN = LLAMA._replace(
    absent=COMMON | dict(max_position_embeddings=32768),
    must=dict(use_sliding_window=False),
)
QWEN2 = QWEN._replace(
    name="Qwen2",
    keys=SIZES | GQA,
    fixed=LLAMA.fixed | dict(qkv_bias=True, o_bias=False, mlp_bias=False),
)
QWEN3 = QWEN._replace(
    name="Qwen3",
    keys=SIZES | GQA | BIASES,
    absent=QWEN.absent | dict(head_dim=128),
    fixed=LLAMA.fixed | dict(qk_norm=True, mlp_bias=False),
)
FAMILIES = dict(gpt2=GPT2, llama=LLAMA, qwen2=QWEN2, qwen3=QWEN3, gpt_neox=NEOX)

# ------------------------------------------------------------------------------------------------------------
# config.json, read


def read_config(raw):
    """A parsed config.json → (GPTConfig, Family). UserError, by name, for what we could not represent."""
    kind = raw.get("model_type")
    known = f"{', '.join(FAMILIES)} are"
    require(kind in list(FAMILIES), f"model_type {kind!r} is not supported ({known})")
    family = FAMILIES[kind]
    must = family.must | {"quantization_config": None}
    found = family.absent | must
    for key, value in raw.items():
        if value is not None:
            found[key] = value
    for key in family.keys.values():
        require(key in found, f"the field {key!r} is missing")
    allowed = {key: [value] for key, value in must.items()}
    allowed[family.keys["mlp"]] = list(family.acts)
    layers = found.get("layer_types")
    if layers:
        count = len(layers) if isinstance(layers, list) else 1
        allowed["layer_types"] = [["full_attention"] * count]
    for key, values in allowed.items():
        choices = " or ".join(map(repr, values))
        require(found[key] in values, f"{key}={found[key]!r} is not supported (must be {choices})")
    settings = {ours: found[theirs] for ours, theirs in family.keys.items()}
    settings["mlp"] = family.acts[settings["mlp"]]
    if family.fixed.get("pos") == "rope":
        settings |= _read_rope(raw, family)
    _check_types(settings)
    require(settings["n_layer"] <= 1000, f"{settings['n_layer']} layers: no model has more than 1,000")
    return GPTConfig(**family.fixed | settings), family


def _read_rope(raw, family):
    """The rotary settings from either dialect, or from both where they do not contradict each other."""
    new = raw.get("rope_parameters") or {}  # of transformers 5
    old = raw.get("rope_scaling") or {}  # of transformers 4, which has rope_theta in config.json itself
    objects = isinstance(new, dict) and isinstance(old, dict)
    require(objects, "damaged: its rotary settings are no object")

    def find(default, *keys):
        values = []
        for place in (new, old, raw):
            values += [place[key] for key in keys if place.get(key) is not None]
        if not values:
            return default
        same = values.count(values[0]) == len(values)
        require(same, f"{keys[0]} has two values, {values[0]!r} and another")
        return values[0]

    kind = find("default", "rope_type", "type")
    require(kind in ("default", "llama3"), f"rotary positions of type {kind!r} are not supported")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3}
    for key in {*new, *old} - known:
        raise UserError(f"the rotary setting {key!r} is not supported")
    share = find(family.absent.get("rotary_pct", 1.0), "partial_rotary_factor", "rotary_pct")
    require(share == 1 or family is NEOX, f"partial_rotary_factor={share!r} is not supported (must be 1.0)")
    scaling = []
    if kind == "llama3":
        for key in LLAMA3:
            value = find(None, key)
            require(value is not None, f"the field {key!r} of its rotary settings is missing")
            _check_number(key, value)
            scaling.append(value)
        _, low, high, _ = scaling
        require(low < high, f"low_freq_factor={low!r} must be below high_freq_factor={high!r}")
    theta = find(10000.0, "rope_theta", "rotary_emb_base")
    return dict(rope_theta=theta, rope_share=share, rope_scaling=tuple(scaling))


def _check_types(settings):
    """UserError for a setting that is no number, no truth value: a damaged config.json may hold anything."""
    types = {field.name: field.type for field in fields(GPTConfig)}
    for name, value in settings.items():
        expected = types[name]
        if expected is bool:
            require(isinstance(value, bool), f"{name}={value!r} must be true or false")
        elif expected is int:
            least = 0 if name in ("n_kv_head", "head_dim", "d_ff") else 1  # 0: as GPTConfig says
            good = type(value) is int and least <= value < 2**31
            require(good, f"{name}={value!r} must be a positive whole number below 2**31")
        elif expected is float:
            _check_number(name, value)


def _check_number(name, value):
    good = type(value) in (int, float) and 0 < value < 1e18  # torch takes no integer beyond 64 bits
    require(good, f"{name}={value!r:.40} must be a positive number below 1e18")


# ------------------------------------------------------------------------------------------------------------
# config.json, written


def _settings(cfg, kind):
    """A configuration in a family's words, in the dialects of transformers 4 and 5 at once."""
    family = FAMILIES[kind]
    settings = {"model_type": kind}
    for ours, theirs in family.keys.items():
        settings[theirs] = getattr(cfg, ours)
    names = [theirs for theirs, ours in family.acts.items() if ours == cfg.mlp]
    settings[family.keys["mlp"]] = names[0] if names else "none"
    if cfg.pos == "rope":
        scaling = dict(zip(LLAMA3, cfg.rope_scaling))
        rope = {"rope_type": "llama3" if scaling else "default", **scaling}
        settings["rope_theta"] = cfg.rope_theta
        settings["rope_scaling"] = rope if scaling else None
        settings["rope_parameters"] = rope | {"rope_theta": cfg.rope_theta}
        if family is NEOX:
            settings["rotary_emb_base"] = cfg.rope_theta
            settings["rotary_pct"] = cfg.rope_share
            settings["rope_parameters"]["partial_rotary_factor"] = cfg.rope_share
    return settings


def fit(cfg):
    """→ (settings, Family) of the family that can hold this configuration exactly, or UserError."""
    for kind, family in FAMILIES.items():
        settings = _settings(cfg, kind)
        with contextlib.suppress(UserError):
            if read_config(settings)[0] == cfg:
                return settings, family
    raise UserError(f"no Hugging Face architecture is exactly this one: {cfg}")


def write_config(model, tok, source, dtype):
    """→ (config.json, Family) of a model: our settings, and the other fields of the file it came from."""
    settings, family = fit(model.cfg)
    kept = source.config if source else {}
    if family is GPT2 and not source:
        settings |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    if tok:
        ids = dict(bos_token_id=tok.eos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
        own = source and tok == source.tok
        for key, value in ids.items():
            if not own or kept.get(key) is None:
                settings[key] = value
    head = family.head
    if isinstance(model, ScalarModel):
        head = "ForSequenceClassification"
        settings |= dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
        settings["reward_bias"] = model.reward_bias.item()
        if model.step_ids is not None:
            settings["step_ids"] = model.step_ids
    precision = str(dtype).removeprefix("torch.")
    settings |= dict(architectures=[family.name + head], dtype=precision, torch_dtype=precision)
    return kept | settings, family
