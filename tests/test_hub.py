"""Hugging Face folders: against transformers' own files and figures, round trips, bad folders, full disks.

golden/ was written by transformers (golden/make_hf.py); the tests marked `live` run where it is installed.
"""

import copy as copy_module
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import STYLES, V, randint, save_tokenizer, tiny
from safetensors.torch import load_file, save_file

import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, hub, lora
from nanorlhf.errors import RunError, UserError
from nanorlhf.hub import families as hub_families
from nanorlhf.hub import weights
from nanorlhf.hub.tokenizer_files import FILE
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.run import folders, models
from nanorlhf.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOKENS = torch.tensor(EXPECTED["tokens"])
TOK = Tokenizer.from_chars("abcdefghijk")  # 11 characters, EOS and pad: V ids
families = pytest.mark.parametrize("name", [name for name in EXPECTED if (GOLDEN / name).is_dir()])


def scores(model):
    """What expected.json holds: logits of a language model, scores at the last token of a reward model."""
    if isinstance(model, ScalarModel):
        return model.rewards(TOKENS, torch.full((len(TOKENS),), TOKENS.shape[1]))
    return model.logits(TOKENS)


def scalar(style="gpt2", bias=0.7):
    """A reward model with a normalising bias."""
    model = ScalarModel(tiny(style))
    model.reward_bias.fill_(bias)
    return model


def read(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def edit(folder, **fields):
    """Overwrite fields of config.json; None removes one (write "null" to set null)."""
    raw = read(folder) | fields
    raw = {k: None if v == "null" else v for k, v in raw.items() if v is not None}
    (Path(folder) / "config.json").write_text(json.dumps(raw))


# ------------------------------------------------------------------------------------------------------------
# golden files of transformers


@families
def test_golden_outputs(name):
    """A folder of transformers' loads here and computes what it computed there."""
    model, tok = hub.load(GOLDEN / name)
    assert tok is None and isinstance(model, ScalarModel) == name.endswith("reward")
    want = torch.tensor(EXPECTED[name])
    assert scores(model).shape == want.shape and (scores(model) - want).abs().max() < 1e-5


@families
def test_golden_decoding(name):
    """Ragged rows, each decoded at its own position, against the golden logits."""
    model, want = hub.load(GOLDEN / name)[0], torch.tensor(EXPECTED[name])
    if isinstance(model, ScalarModel):  # scores: of the last token, reached in one step from the cache
        trunk, start = model.trunk, torch.tensor([11, 11])
    else:
        trunk, start = model, torch.tensor([2, 7])
    cache, rows = trunk.new_cache(2, 12), torch.arange(2)
    trunk(torch.where(torch.arange(12) < start[:, None], TOKENS, 28), cache)
    for t in range(12 - int(start.max())):
        hidden = trunk(TOKENS[rows, start + t][:, None], cache, start + t)[:, 0]
        if trunk is model:
            assert (model.head_logits(hidden) - want[rows, start + t]).abs().max() < 1e-5
        else:
            assert (model.head(hidden) - want).abs().max() < 1e-5


@families
def test_golden_tensors_come_back(name, tmp_path):
    """Loaded and saved again: the same tensors under the same names, and the same settings."""
    hub.save(hub.load(GOLDEN / name)[0], None, tmp_path / "model")
    want, got = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "model"))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    before, after = read(GOLDEN / name), read(tmp_path / "model")
    assert before["architectures"] == after["architectures"]
    assert before.keys() <= after.keys()
    for key in before.keys() - {"tie_word_embeddings", "n_inner"}:  # n_inner: null is written out
        assert before[key] == after[key], key


OLD_LLAMA = dict(
    rope_parameters=None, rope_theta=50.0, rope_scaling="null", torch_dtype="float32", dtype=None,
    head_dim=None, attention_bias=None, mlp_bias=None,
)  # fmt: skip
OLD_GPT2 = dict(
    n_inner=None, scale_attn_weights=None, scale_attn_by_inverse_layer_idx=None, dtype=None,
    tie_word_embeddings=None, n_ctx=12, task_specific_params={"text-generation": {}},
)  # fmt: skip


OLD = dict(rope_parameters=None, dtype=None, torch_dtype="float32")
LLAMA3 = dict(factor=4, low_freq_factor=0.1, high_freq_factor=0.5, original_max_position_embeddings=6)


def copied(name, tmp_path):
    """A copy of a golden folder, to be changed."""
    return Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))


def agrees(folder, name):
    assert (scores(hub.load(folder)[0]) - torch.tensor(EXPECTED[name])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", OLD_LLAMA),
        ("llama", OLD_LLAMA | dict(head_dim="null", tie_word_embeddings=None)),
        ("llama", OLD_LLAMA | dict(rope_scaling={"type": "default"})),
        ("llama", dict(rope_theta=None, rope_scaling="null")),
        ("gpt2", OLD_GPT2),
        ("gpt2", OLD_GPT2 | dict(n_inner="null", activation_function="gelu_pytorch_tanh")),
        ("gpt2", dict(n_inner=64)),
        ("llama3", OLD | dict(rope_theta=50.0, rope_scaling=LLAMA3 | dict(type="llama3"))),
        ("llama3", OLD | dict(rope_theta=50, rope_scaling=LLAMA3 | dict(rope_type="llama3"))),
        ("llama3", dict(rope_theta=50.0, rope_scaling=LLAMA3 | dict(rope_type="llama3"))),
        ("qwen2", OLD | dict(rope_theta=50.0, sliding_window=99, layer_types=None, use_sliding_window=None)),
        ("qwen3", OLD | dict(rope_theta=50.0, rope_scaling="null", sliding_window=4096, attention_bias=None)),
        ("pythia", OLD | dict(rotary_emb_base=50, rotary_pct=0.5, attention_bias=None, hidden_act=None)),
        ("pythia", OLD | dict(rotary_emb_base=50, rope_theta=50, rotary_pct=0.5, use_parallel_residual=None)),
    ],
)
def test_dialects_of_config(name, change, tmp_path):
    """What older releases wrote, or left out because it is the default, is the same model."""
    copy = copied(name, tmp_path)
    edit(copy, **change)
    agrees(copy, name)


def rewrite(folder, change):
    """Pass the tensors of a folder through a function of their dict."""
    file = folder / "model.safetensors"
    save_file({name: x.clone() for name, x in change(load_file(file)).items()}, file)


def bare(tensors):
    """The names of a trunk saved alone, as on the hub's gpt2."""
    return {re.sub(r"^(transformer|model|gpt_neox)\.", "", name): x for name, x in tensors.items()}


def with_buffers(tensors):
    """Constants that older releases stored as tensors."""
    extra = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4),
             "gpt_neox.layers.0.attention.bias": torch.ones(4),
             "layers.0.attention.masked_bias": torch.ones(1),
             "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}  # fmt: skip
    return tensors | extra


def twice(tensors):
    """A tied model whose file holds the embedding as unembedding too."""
    wte = [x for name, x in tensors.items() if name.endswith(("wte.weight", "embed_tokens.weight"))]
    return tensors | {"lm_head.weight": wte[0].clone()}


@pytest.mark.parametrize("change", [bare, with_buffers, lambda x: bare(with_buffers(x))])
@families
def test_dialects_of_tensor_names(name, change, tmp_path):
    copy = copied(name, tmp_path)
    rewrite(copy, change)
    agrees(copy, name)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_a_redundant_unembedding(name, tmp_path):
    """Ignored where it is the embedding; refused where it is not: which of the two is meant?"""
    copy = copied(name, tmp_path)
    rewrite(copy, twice)
    agrees(copy, name)
    rewrite(copy, lambda x: x | {"lm_head.weight": x["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="the unembedding is not the embedding"):
        hub.load(copy)


def shards(folder, n=3):
    """Cut model.safetensors into n files and an index."""
    have = load_file(folder / "model.safetensors")
    names = {key: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, key in enumerate(sorted(have))}
    for file in set(names.values()):
        save_file({key: have[key] for key in have if names[key] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


@families
def test_shards(name, tmp_path):
    """Files that together make a model; saved again it is one file."""
    copy = copied(name, tmp_path)
    shards(copy)
    agrees(copy, name)
    hub.save(hub.load(copy)[0], None, tmp_path / "one")
    want, got = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "one"))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Loading never holds more than the model and a tensor: each is let go before the next is read."""
    hub.save(tiny("qwen3", d_model=64, d_ff=256), None, tmp_path / "m")
    alive, largest, real = [], 0, weights.safe_open

    class Spy:
        def __init__(self, *args):
            self.file = real(*args).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def metadata(self):
            return self.file.metadata()

        def get_slice(self, key):
            return self.file.get_slice(key)

        def get_tensor(self, key):
            nonlocal largest
            tensor = self.file.get_tensor(key)
            alive.append(weakref.ref(tensor))
            largest = max(largest, sum(ref() is not None for ref in alive))
            return tensor

    monkeypatch.setattr(weights, "safe_open", Spy)
    hub.load(tmp_path / "m")
    assert len(alive) > 20 and largest <= 2  # the one that is read, and the last one's name for it


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("dtype, size", [
    (torch.bfloat16, 2),
    pytest.param(torch.float32, 4, marks=pytest.mark.slow),
])
def test_peak_memory_of_load(dtype, size, tmp_path):
    """The model in the dtype asked for and one of its three shards, seen from a process of its own."""
    model = tiny("llama", vocab_size=16000, d_model=512, d_ff=1024, n_layer=4, tied=False).bfloat16()
    hub.save(model, None, tmp_path / "m")
    shard = max((tmp_path / "m" / name).stat().st_size for name in shards(tmp_path / "m").values())
    watch = """import sys, torch
from nanorlhf import hub
def mark(name): return int(open("/proc/self/status").read().split(name)[1].split()[0]) * 1024
torch.ones(1000, 1000).normal_()
before = mark("VmRSS:")
torch.set_default_dtype(getattr(torch, sys.argv[2]))
hub.load(sys.argv[1])
print(mark("VmHWM:") - before)"""
    command = [sys.executable, "-c", watch, str(tmp_path / "m"), str(dtype)[6:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    grown, own = int(done.stdout), size * sum(p.numel() for p in model.parameters())
    assert own < grown < own + 1.5 * shard  # half a shard for what is imported on the way


def test_what_stands_beside_the_weights_travels(tmp_path):
    """Other fields of config.json, tokenizer and generation files: in a copy, and with a scalar head."""
    copy = tmp_path / "copy"
    tok = Tokenizer.from_bytes()
    hub.save(tiny("qwen2", vocab_size=tok.vocab_size), tok, copy)
    edit(copy, initializer_range=0.123, eos_token_id=[3, 5], my_own={"a": [1]})
    beside = {"generation_config.json": b'{"eos_token_id": [5, 7], "temperature": 0.7}', "merges.txt": b"a b",
              "tokenizer_config.json": b'{"eos_token": "<|eos|>"}', "chat_template.jinja": b"{{ x }}",
              "tokenizer.json": (copy / "tokenizer.json").read_bytes()}  # fmt: skip
    for name, data in beside.items() | {"README.md": b"no", "train.bin": b"no"}.items():
        (copy / name).write_bytes(data)
    model, tok = hub.load(copy)
    assert model.stop_ids == (5, 7)
    for saved in (copy_module.deepcopy(model), ScalarModel(model)):
        hub.save(saved, tok, tmp_path / "m")
        names = {"config.json", "model.safetensors", *beside}
        assert set(os.listdir(tmp_path / "m")) == names
        assert all((tmp_path / "m" / name).read_bytes() == data for name, data in beside.items())
        raw = read(tmp_path / "m")
        kept = dict(initializer_range=0.123, eos_token_id=[3, 5], my_own={"a": [1]}, pad_token_id=tok.pad_id)
        assert {key: raw[key] for key in kept} == kept
    assert raw["architectures"] == ["Qwen2ForSequenceClassification"]
    hub.save(model, Tokenizer.from_chars("abc"), tmp_path / "other")  # its own files and ids
    assert set(os.listdir(tmp_path / "other")) == {"config.json", "model.safetensors", FILE}
    assert (read(tmp_path / "other")["eos_token_id"], read(tmp_path / "other")["my_own"]) == (3, {"a": [1]})


@pytest.mark.parametrize("config, generation, want", [
    (7, None, (7,)), ([3, 5], None, (3, 5)), ("null", None, ()), (7, [3, 5], (3, 5)), (7, "absent", (7,)),
])  # fmt: skip
def test_ids_that_end_a_response(config, generation, want, tmp_path):
    """generation_config.json goes before config.json, as in transformers; both may hold a list."""
    copy = copied("qwen3", tmp_path)
    edit(copy, eos_token_id=config)
    if generation:
        settings = {} if generation == "absent" else {"eos_token_id": generation}
        (copy / "generation_config.json").write_text(json.dumps(settings))
    assert hub.load(copy)[0].stop_ids == want


def test_padded_vocabulary(tmp_path):
    """Rows beyond the tokenizer's ids are no tokens: no logits, never sampled; saved as they were."""
    model = tiny("qwen2", vocab_size=V + 7)
    model.wte.weight.data[V:] *= 100  # the most likely of all, were they tokens
    hub.save(model, TOK, tmp_path / "m")
    again = hub.load(tmp_path / "m")[0]
    tokens = randint(V, 2, 6)
    assert torch.equal(again.logits(tokens), model.logits(tokens)[..., :V])
    logp, _ = again.logprobs(tokens, torch.arange(6).expand(2, 6) > 0)
    want = model.logits(tokens)[:, :-1, :V].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    assert (logp[:, 1:] - want).abs().max() < 1e-5
    roll = generate.generate(again, [[1, 2]], 50, 6, temperature=5.0)
    assert roll.tokens.max() < V
    assert (roll.logp - again.logprobs(roll.tokens, roll.mask, 5.0)[0]).abs().max() < 1e-5
    hub.save(again, TOK, tmp_path / "n")
    assert torch.equal(hub.load(tmp_path / "n")[0].wte.weight, model.wte.weight)


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_both_spellings_of_rope_are_written(spelling, tmp_path):
    """transformers 4 reads the one, 5 the other: each alone is enough."""
    model = tiny("llama", rope_theta=50.0)
    hub.save(model, None, tmp_path / "m")
    edit(tmp_path / "m", **{spelling: None})
    assert hub.load(tmp_path / "m")[0].cfg == model.cfg


def test_golden_files_say_their_versions():
    assert EXPECTED["transformers"] == "5.23.0" and EXPECTED["torch"].startswith("2.13.0")
    assert sum(f.stat().st_size for f in GOLDEN.rglob("*") if f.is_file()) < 250_000


def sizes(layers, heads, kv, width, ff, vocab, length, **more):
    """The fields of a config.json of the Llama kind."""
    out = dict(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv)
    out |= dict(hidden_size=width, intermediate_size=ff, vocab_size=vocab, max_position_embeddings=length)
    return out | more


L31 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0,
           original_max_position_embeddings=8192)  # fmt: skip
QWEN = dict(model_type="qwen2", rope_theta=1e6, sliding_window=32768, use_sliding_window=False)
PYTHIA = dict(model_type="gpt_neox", rotary_emb_base=10000, rotary_pct=0.25, use_parallel_residual=True,
              hidden_act="gelu", layer_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
GPT2 = dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024)
SMOL = dict(rope_theta=100000, rope_interleaved=False, rope_scaling=None, is_llama_config=True)
LLAMA31 = dict(rope_theta=500000.0, rope_scaling=L31 | dict(factor=8.0), **UNTIED)
LLAMA32 = dict(rope_theta=500000.0, rope_scaling=L31 | dict(factor=32.0), head_dim=64, **TIED)
QWEN3 = QWEN | dict(model_type="qwen3", sliding_window=None, head_dim=128, attention_bias=False)
PUBLISHED = {  # number of parameters, and what config.json says of the shape
    "gpt2": (124_439_808, GPT2),
    "Llama-2-7b": (6_738_415_616, sizes(32, 32, 32, 4096, 11008, 32000, 4096, rope_scaling=None, **UNTIED)),
    "Llama-3.1-8B": (8_030_261_248, sizes(32, 32, 8, 4096, 14336, 128256, 131072, **LLAMA31)),
    "Llama-3.2-1B": (1_235_814_400, sizes(16, 32, 8, 2048, 8192, 128256, 131072, **LLAMA32)),
    "SmolLM2-135M": (134_515_008, sizes(30, 9, 3, 576, 1536, 49152, 8192, **SMOL, **TIED)),
    "Qwen2.5-0.5B": (494_032_768, sizes(24, 14, 2, 896, 4864, 151936, 32768, **QWEN, **TIED)),
    "Qwen2.5-1.5B": (1_543_714_304, sizes(28, 12, 2, 1536, 8960, 151936, 131072, **QWEN, **TIED)),
    "Qwen2.5-7B": (7_615_616_512, sizes(28, 28, 4, 3584, 18944, 152064, 131072, **QWEN, **UNTIED)),
    "Qwen3-0.6B": (596_049_920, sizes(28, 16, 8, 1024, 3072, 151936, 40960, **QWEN3, **TIED)),
    "pythia-160m": (162_322_944, sizes(12, 12, None, 768, 3072, 50304, 2048, **PYTHIA)),
    "pythia-1b": (1_011_781_632, sizes(16, 8, None, 2048, 8192, 50304, 2048, **PYTHIA)),
    "pythia-2.8b": (2_775_208_960, sizes(32, 32, None, 2560, 10240, 50304, 2048, **PYTHIA)),
    "pythia-6.9b": (6_857_302_016, sizes(32, 32, None, 4096, 16384, 50432, 2048, **PYTHIA)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """Read, they have the published number of parameters; written, they are as they were."""
    count, raw = PUBLISHED[name]
    cfg, _ = hub_families.read_config({"model_type": "llama"} | raw)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(cfg).parameters()) == count
    settings, _ = hub_families.fit(cfg)
    assert settings["model_type"] == raw.get("model_type", "llama")
    assert all(settings[key] == raw[key] for key in settings.keys() & raw.keys() - {"num_key_value_heads"})


# ------------------------------------------------------------------------------------------------------------
# live, where transformers is installed (pip install -e .[hf])


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_live_transformers_reads_what_we_save(style, reward, tmp_path):
    """No key missing or left over; equal logits, or scores equal to ours minus reward_bias, ragged too."""
    hf = pytest.importorskip("transformers")
    model = scalar(style) if reward else tiny(style)
    hub.save(model, TOK, tmp_path / "model")
    auto = hf.AutoModelForSequenceClassification if reward else hf.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == read(tmp_path / "model")["architectures"][0]
    tokens, lengths = randint(V - 2, 3, 10), torch.tensor([10, 4, 7])
    tokens[torch.arange(10) >= lengths[:, None]] = TOK.pad_id
    with torch.no_grad():
        got = theirs.eval()(tokens).logits
        want = model.rewards(tokens, lengths)[:, None] - 0.7 if reward else model.logits(tokens)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (TOK.eos_id, TOK.pad_id)


SMALL = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, initializer_range=0.123)  # fmt: skip
GQA = SMALL | dict(num_key_value_heads=2, rope_theta=50.0, rms_norm_eps=1e-2)
NEOX = SMALL | dict(rotary_emb_base=50.0, rotary_pct=0.5, layer_norm_eps=1e-2)
THEIRS = {  # settings as transformers 4 spells them, which 5 understands
    "gpt2": ("GPT2", dict(vocab_size=29, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
    "gpt2-erf": ("GPT2", dict(vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=64, n_inner=24,
                              activation_function="gelu", tie_word_embeddings=False)),
    "llama2": ("Llama", SMALL),
    "llama3": ("Llama", GQA | dict(rope_scaling=LLAMA3 | dict(rope_type="llama3"), head_dim=8)),
    "llama-bias": ("Llama", GQA | dict(attention_bias=True)),
    "llama-mlp-bias": ("Llama", GQA | dict(mlp_bias=True)),
    "smollm2": ("Llama", GQA | dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", GQA),
    "qwen2-tied": ("Qwen2", GQA | dict(tie_word_embeddings=True, use_sliding_window=False, sliding_window=8)),
    "qwen3": ("Qwen3", GQA | dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3-bias": ("Qwen3", GQA | dict(head_dim=4, attention_bias=True)),
    "pythia": ("GPTNeoX", NEOX),
    "neox-tied": ("GPTNeoX", NEOX | dict(tie_word_embeddings=True, rotary_pct=1.0)),
    "neox-sequential": ("GPTNeoX", NEOX | dict(use_parallel_residual=False, attention_bias=False)),
    "neox-tanh": ("GPTNeoX", NEOX | dict(hidden_act="gelu_fast")),
}  # fmt: skip


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_live_their_models_load_here_and_go_back(name, reward, tmp_path):
    """Random models of theirs, one file in fp32, shards in bf16: equal logits here, and there again."""
    hf = pytest.importorskip("transformers")
    kind, settings = THEIRS[name]
    config = getattr(hf, f"{kind}Config")(**settings, pad_token_id=28, eos_token_id=[3, 5], num_labels=1)
    lm = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    auto = getattr(hf, kind + ("ForSequenceClassification" if reward else lm))
    torch.manual_seed(1)
    theirs = auto(config).eval()
    for key, p in theirs.named_parameters():
        p.data.normal_(1.0 if p.dim() == 1 and "bias" not in key else 0.0, 0.4)
    tokens = randint(27, 3, 64)
    for dtype, size in ((torch.float32, "1GB"), (torch.bfloat16, 2000)):
        for p in theirs.parameters():  # theirs.to(dtype) would round the rotary frequencies, for good
            p.data = p.data.to(dtype)
        theirs.save_pretrained(tmp_path / str(size), max_shard_size=size)
        theirs.float()
        ours = hub.load(tmp_path / str(size))[0]
        hub.save(ours, None, tmp_path / "back")
        again, info = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            want = theirs(tokens).logits.squeeze(-1)
            got = ours.rewards(tokens, torch.full((3,), 64)) if reward else ours.logits(tokens)
            back = again.eval()(tokens).logits.squeeze(-1)
        tol = 2e-5 * want.abs().max()
        assert (got - want).abs().max() <= tol and (back - want).abs().max() <= tol
        before, after = json.loads(config.to_json_string(use_diff=False)), again.config.to_dict()
        assert before["eos_token_id"] == after["eos_token_id"] == [3, 5]
        assert reward or ours.stop_ids == (3, 5)
        assert before.get("initializer_range") == after.get("initializer_range")


@families
def test_live_transformers_agrees_with_the_golden_figures(name, tmp_path):
    """What we save of the golden folders gives the golden figures in any release of transformers.

    The folders themselves do in 5 alone: 4 does not read the rotary base that 5 wrote, ours has both.
    """
    hf = pytest.importorskip("transformers")
    auto = hf.AutoModelForSequenceClassification if name.endswith("reward") else hf.AutoModelForCausalLM
    hub.save(hub.load(GOLDEN / name)[0], None, tmp_path / "model")
    for folder in [tmp_path / "model"] + [GOLDEN / name] * (int(hf.__version__.split(".")[0]) >= 5):
        with torch.no_grad():
            got = auto.from_pretrained(folder).eval()(TOKENS).logits.squeeze(-1)
        assert (got - torch.tensor(EXPECTED[name])).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------
# round trips


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_round_trip(style, reward, tmp_path):
    """Saved and loaded: same configuration, same weights to the bit, same outputs, same tokenizer."""
    model = scalar(style) if reward else tiny(style)
    folder = tmp_path / "deep" / "er" / "model"
    hub.save(model, TOK, folder)
    again, tok = hub.load(folder, kind="reward model" if reward else "language model")
    assert tok == TOK and type(again) is type(model)
    tokens, lengths = randint(V, 3, 10), torch.tensor([10, 1, 5])
    if reward:
        assert torch.equal(model.rewards(tokens, lengths), again.rewards(tokens, lengths))
        assert again.reward_bias.item() == pytest.approx(0.7) and read(folder)["reward_bias"] != 0
    else:
        assert again.cfg == model.cfg and torch.equal(model.logits(tokens), again.logits(tokens))
        assert again.state_dict().keys() == model.state_dict().keys()
    assert sorted(os.listdir(folder)) == sorted([FILE, "config.json", "model.safetensors"])
    assert os.listdir(folder.parent) == ["model"]
    assert (read(folder)["eos_token_id"], read(folder)["pad_token_id"]) == (TOK.eos_id, TOK.pad_id)


@pytest.mark.parametrize(
    "tok, text",
    [
        (None, ""),
        (Tokenizer.from_bytes(), "to bé\0"),
        (Tokenizer.from_chars("añ∑"), "∑añña"),
        (Tokenizer.train_bpe(["to be or not to be" * 3], 262), "to be or not é"),
    ],
    ids=["none", "bytes", "chars", "bpe"],
)
def test_tokenizers_travel_with_the_model(tok, text, tmp_path):
    hub.save(tiny(vocab_size=tok.vocab_size if tok else V), tok, tmp_path / "m")
    again = hub.load(tmp_path / "m")[1]
    assert again == tok
    if tok:
        assert again.encode(text) == tok.encode(text) and again.decode(again.encode(text)) == text
        assert (again.eos_id, again.pad_id, again.kind) == (tok.eos_id, tok.pad_id, tok.kind)


def test_paths_of_every_spelling(tmp_path, monkeypatch):
    """A Path, a string, a trailing slash, spaces and letters from elsewhere; and the folder's old self."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "model/", Path("mödel 2"), f"{tmp_path}/a b/"):
        hub.save(tiny(), TOK, folder)
        assert torch.equal(hub.load(folder)[0].wte.weight, tiny().wte.weight)
    os.rename("model", "model.old")
    for folder in ("model", "model/", Path("model")):
        hub.load(folder)


def test_dtype_of_the_weights(tmp_path):
    """Weights are saved in their own precision and loaded in torch's default, fp32 unless it is set."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = ScalarModel(tiny("qwen3")).to(dtype)
        hub.save(model, None, tmp_path / "m")
        stored = torch.float32 if dtype == torch.float64 else dtype
        assert all(x.dtype == stored for x in load_file(tmp_path / "m" / "model.safetensors").values())
        assert {read(tmp_path / "m")[key] for key in ("dtype", "torch_dtype")} == {str(stored)[6:]}
        for want in (torch.bfloat16, torch.float16, torch.float32):
            torch.set_default_dtype(want)
            again = hub.load(tmp_path / "m")[0]
            assert again.reward_bias.dtype == torch.float32
            for a, b in zip(model.parameters(), again.parameters()):
                assert b.dtype == want and torch.equal(a.to(stored).to(want), b)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("style", ["gpt2", "pythia"])
def test_adapters_in_fused_heads(style, tmp_path):
    """Adapted q, k, v that require gradients are merged into the one tensor of theirs."""
    model = tiny(style)
    lora.add(model, 2)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.k.B)
    hub.save(model, None, tmp_path / "m")
    tokens = randint(V, 2, 6)
    assert (hub.load(tmp_path / "m")[0].logits(tokens) - model.logits(tokens)).abs().max() < 1e-4


def test_untied_head_is_left_out_of_a_reward_model(tmp_path):
    """A reward model on an untied trunk has no unembedding in its file, and needs none."""
    hub.save(scalar("gpt2-untied"), TOK, tmp_path / "m")
    names = load_file(tmp_path / "m" / "model.safetensors").keys()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    "mix",
    [
        dict(norm="rms"),
        dict(pos="rope", qkv_bias=False),
        dict(pos="rope", mlp_bias=False),
        dict(mlp="swiglu"),
        dict(o_bias=False),
        dict(parallel=True),
        dict(qk_norm=True),
        dict(n_kv_head=2),
        dict(head_dim=16),
        dict(norm="rms", mlp="swiglu"),
    ],
    ids=str,
)
def test_a_mix_is_refused(mix, tmp_path):
    """No architecture of theirs is GPT-2 with one setting of Llama's: refused before anything is written."""
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        hub.save(GPT(GPTConfig(V, n_layer=1, d_model=16, **mix)), None, tmp_path / "m")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("trainer, style", [
    (train_sft, "qwen3"), (train_rm, "pythia"), (train_ppo, "qwen2"), (train_grpo, "llama3"),
    (train_dpo, "pythia"),
], ids=lambda x: getattr(x, "__name__", x))  # fmt: skip
def test_through_every_trainer(trainer, style, stages, tmp_path, no_curves):
    """Load, one step on a padded vocabulary, save: the family stays, and transformers agrees."""
    tok = hub.load(stages.folder / "sft/model")[1]
    size = dict(vocab_size=tok.vocab_size + 5, max_len=16)
    for name, model in (("lm", tiny(style, **size)), ("rm", ScalarModel(tiny(style, seed=1, **size)))):
        hub.save(model, tok, tmp_path / name)
        edit(tmp_path / name, initializer_range=0.123)
    flags = stages.flags(trainer, tmp_path / "run", steps=1, init=f"{tmp_path}/lm")
    flags |= dict(rm=f"{tmp_path}/rm") if "rm" in flags else {}
    trainer.train(trainer.Config(**flags))
    before, after = read(tmp_path / "lm"), read(tmp_path / "run/model")
    assert all(before[key] == after[key] for key in before.keys() - {"architectures"})
    model = hub.load(tmp_path / "run/model")[0]
    trunk = getattr(model, "trunk", model)
    assert trunk.cfg.vocab_size == tok.vocab_size + 5 and trunk.n_ids == tok.vocab_size
    assert not torch.equal(trunk.blocks[0].attn.q.weight, tiny(style, **size).blocks[0].attn.q.weight)
    hf = pytest.importorskip("transformers")
    auto = hf.AutoModelForSequenceClassification if trunk is not model else hf.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not any(info.values()), info
    tokens = randint(tok.eos_id, 3, 16)
    with torch.no_grad():
        want = theirs.eval()(tokens).logits[..., : tok.vocab_size].squeeze(-1)
        got = model.rewards(tokens, torch.full((3,), 16)) - model.reward_bias if trunk is not model \
            else model.logits(tokens)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


# ------------------------------------------------------------------------------------------------------------
# bad folders: one line that names flag and file


def tensors(**change):
    """A fault: model.safetensors with tensors set to something else, or left out (None)."""

    def apply(folder):
        have = load_file(folder / "model.safetensors")
        have |= {name.replace("__", "."): x for name, x in change.items()}
        save_file({name: x for name, x in have.items() if x is not None}, folder / "model.safetensors")

    return apply


def fields(**change):
    return lambda folder: edit(folder, **change)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, keep):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return apply


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard(name=None):
    """Cut into three; the second is missing, or the index calls it otherwise."""

    def apply(folder):
        names = shards(folder)
        (folder / "model-00002-of-00003.safetensors").unlink()
        if name is not None:
            names = {key: name if "00002" in file else file for key, file in names.items()}
            (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return apply


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FAULTS = [  # style, fault, file named, what the line says
    ("gpt2", remove(CONFIG), "", "has no config.json$"),
    ("gpt2", write(CONFIG, b"{not json"), CONFIG, "Expecting"),
    ("gpt2", write(CONFIG, b"\xff\xfe{}"), CONFIG, "decode"),
    ("gpt2", write(CONFIG, b"[1, 2]"), CONFIG, "not a JSON object"),
    ("gpt2", write(CONFIG, b""), CONFIG, "Expecting"),
    ("gpt2", fields(model_type="bert"), CONFIG, "model_type 'bert' is not supported"),
    ("gpt2", fields(model_type=None), CONFIG, "model_type None"),
    ("gpt2", fields(n_layer=None), CONFIG, "field 'n_layer' is missing"),
    ("gpt2", fields(n_head=0), CONFIG, "n_head=0"),
    ("gpt2", fields(n_embd=2**70), CONFIG, f"d_model={2**70} must be a positive whole number below"),
    ("gpt2", fields(n_head=3), CONFIG, "n_head=3 must divide d_model=16"),
    ("gpt2", fields(n_embd="16"), CONFIG, "d_model='16'"),
    ("gpt2", fields(n_layer=-1), CONFIG, "n_layer=-1 must be a positive whole number"),
    ("gpt2", fields(n_layer=True), CONFIG, "n_layer=True must be a positive whole number"),
    ("gpt2", fields(n_layer=2.0), CONFIG, "n_layer=2.0 must be a positive whole number"),
    ("gpt2", fields(n_inner=-1), CONFIG, "d_ff=-1 must be a positive whole number"),
    ("gpt2", fields(n_positions=0), CONFIG, "max_len=0"),
    ("gpt2", fields(tie_word_embeddings=1), CONFIG, "tied=1 must be true or false"),
    ("gpt2", fields(layer_norm_epsilon="tiny"), CONFIG, "'tiny'"),
    ("gpt2", fields(layer_norm_epsilon=0.0), CONFIG, "norm_eps=0.0 must be a positive number"),
    ("gpt2", fields(layer_norm_epsilon=True), CONFIG, "norm_eps=True must be a positive number"),
    ("llama", fields(rope_theta=float("nan"), rope_parameters=None), CONFIG, "rope_theta=nan must be"),
    ("llama", fields(rope_theta=float("inf"), rope_parameters=None), CONFIG, "rope_theta=inf must be"),
    ("llama3", fields(rope_parameters=L31 | dict(factor="8"), rope_scaling=None), CONFIG,
     "factor='8' must be a positive number"),
    ("llama3", fields(rope_parameters=L31 | dict(factor=8.0, low_freq_factor=4.0), rope_scaling=None), CONFIG,
     "low_freq_factor=4.0 must be below high_freq_factor="),
    ("gpt2", fields(activation_function="relu"), CONFIG, "activation_function='relu' is not supported"),
    ("gpt2", fields(scale_attn_by_inverse_layer_idx=True), CONFIG, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", fields(scale_attn_weights=False), CONFIG, "scale_attn_weights=False"),
    ("llama", fields(hidden_act="gelu"), CONFIG, "hidden_act='gelu'"),
    ("llama", fields(attention_bias="yes"), CONFIG, "qkv_bias='yes' must be true or false"),
    ("llama", fields(rope_parameters={"rope_type": "llama3", "factor": 8}), CONFIG, "'low_freq_factor'"),
    ("llama", fields(rope_parameters={"full_attention": {"rope_theta": 5.0}}), CONFIG, "'full_attention'"),
    ("llama", fields(rope_parameters={"partial_rotary_factor": 0.5}), CONFIG, "partial_rotary_factor=0.5"),
    ("llama", fields(rope_parameters={"rope_theta": 5.0}), CONFIG, "rope_theta has two values, 5.0"),
    ("llama", fields(quantization_config={"bits": 4}), CONFIG, "quantization_config={'bits': 4} is not"),
    ("llama", fields(layer_types=["full_attention", "sliding_attention"]), CONFIG, "layer_types=.*sliding"),
    ("qwen2", fields(layer_types=7), CONFIG, "layer_types=7 is not supported"),
    ("qwen2", fields(use_sliding_window=True), CONFIG, "use_sliding_window=True is not supported"),
    ("qwen2", fields(num_key_value_heads=None), CONFIG, "field 'num_key_value_heads' is missing"),
    ("pythia", fields(hidden_act="relu"), CONFIG, "hidden_act='relu'"),
    ("pythia", fields(rotary_pct=0.3), CONFIG, "partial_rotary_factor has two values"),
    ("llama", fields(rope_parameters=None, rope_scaling={"type": "linear"}), CONFIG, "type 'linear'"),
    ("llama", fields(rope_parameters={"rope_type": "yarn"}), CONFIG, "'yarn'"),
    ("llama", fields(rope_parameters=[1]), CONFIG, "damaged"),
    ("llama", fields(rope_theta="big", rope_parameters=None), CONFIG, "rope_theta='big'"),
    ("llama", fields(num_key_value_heads=3), CONFIG, "n_kv_head=3 must divide n_head=4"),
    ("llama", fields(head_dim=3), CONFIG, "even head_dim, got 3"),
    ("gpt2", fields(vocab_size=V + 1), WEIGHTS, r"wte.weight has shape \(13, 16\), config.json says"),
    ("llama", fields(num_hidden_layers=1), WEIGHTS, "model.layers.1.* is unknown to this model"),
    ("gpt2", fields(n_layer=3), WEIGHTS, "transformer.h.2.* is missing"),
    ("llama", fields(tie_word_embeddings=False), WEIGHTS, "lm_head.weight is missing"),
    ("gpt2", remove(WEIGHTS), WEIGHTS, "No such file"),
    ("gpt2", pickle, "pytorch_model.bin", "a pickle can run any code and is not read; make it safetensors"),
    ("qwen2", shard(), "model-00002-of-00003.safetensors", "No such file"),
    ("qwen2", shard("../model.safetensors"), INDEX, r"shard '\.\./model.safetensors' must be the plain name"),
    ("qwen2", shard("/etc/passwd"), INDEX, "must be the plain name"),
    ("qwen2", shard("a\\b.safetensors"), INDEX, "must be the plain name"),
    ("qwen2", shard("model.bin"), INDEX, "must be the plain name of a .safetensors file"),
    ("qwen2", shard(7), INDEX, "must be the plain name"),
    ("qwen2", lambda folder: (shards(folder), write(INDEX, b"[1]")(folder)), INDEX, "not a JSON object"),
    ("qwen2", lambda folder: (shards(folder), write(INDEX, b"{}")(folder)), INDEX, "no weight_map"),
    ("qwen2", lambda folder: (shards(folder), write(INDEX, b"{")(folder)), INDEX, "Expecting"),
    ("gpt2", lambda folder: rewrite(folder, lambda x: x | bare(x)), WEIGHTS, "is there twice"),
    ("llama", tensors(model__norm__weight=torch.ones(16, dtype=torch.int8)), WEIGHTS, "is quantised"),
    ("llama", tensors(model__norm__weight=torch.ones(16).to(torch.float8_e4m3fn)), WEIGHTS, "is quantised"),
    ("pythia", tensors(embed_out__weight=None), WEIGHTS, "embed_out.weight is missing"),
    ("qwen3", tensors(model__layers__0__self_attn__q_norm__weight=None), WEIGHTS, "q_norm.weight is missing"),
    ("llama", tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(16)), WEIGHTS, "bias is unknown"),
    ("gpt2", write(WEIGHTS, b""), WEIGHTS, "header"),
    ("gpt2", cut(WEIGHTS, 0.5), WEIGHTS, "incomplete|header|buffer"),
    ("gpt2", cut(WEIGHTS, 0.01), WEIGHTS, "header"),
    ("llama", tensors(model__norm__weight=None), WEIGHTS, "model.norm.weight is missing"),
    ("llama", tensors(extra__weight=torch.ones(2)), WEIGHTS, "extra.weight is unknown to this model"),
    ("llama", tensors(model__norm__weight=torch.ones(9)), WEIGHTS, r"has shape \(9,\), .* says \(16,\)"),
    ("gpt2", tensors(score__weight=torch.ones(1, 16)), WEIGHTS, "score.weight is unknown to this model"),
    ("reward", tensors(score__weight=None), WEIGHTS, "score.weight is missing"),
    ("reward", tensors(score__weight=torch.ones(2, 16)), WEIGHTS, r"score.weight has shape \(2, 16\)"),
    ("reward", fields(reward_bias="high"), CONFIG, "reward_bias='high'"),
    ("reward", lambda folder: None, "", "is a reward model, must be a language model"),
    ("gpt2", remove(FILE), FILE, "no tokenizer"),
    ("gpt2", write(FILE, b"{}"), FILE, "damaged"),
    ("gpt2", lambda folder: (remove(FILE)(folder), save_tokenizer(Tokenizer.from_bytes(), folder)), "",
     "tokenizer has 258 ids, the model only 13"),
]  # fmt: skip


@pytest.mark.parametrize("style, fault, file, says", FAULTS, ids=[f"{f[0]}-{f[3][:30]}" for f in FAULTS])
def test_bad_folder(style, fault, file, says, tmp_path):
    """Each fault is one line: the flag, the file (or its folder), what is wrong."""
    folder = tmp_path / "model"
    hub.save(scalar() if style == "reward" else tiny(style), TOK, folder)
    fault(folder)
    with pytest.raises(UserError, match=says) as error:
        models.load_model("--some_flag", folder, "language model")
    line = str(error.value)
    assert line.startswith("--some_flag ") and str(folder) in line and file in line and "\n" not in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers(name, tmp_path):
    """What a clone without git-lfs leaves in place of a file."""
    folder = copied("llama3", tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(UserError, match=f"^{folder}/{name}: a Git LFS pointer, .*git lfs pull"):
        hub.load(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="--rm .*no does not exist$"):
        models.load_model("--rm", tmp_path / "no")


def test_wrong_kind_the_other_way_round(tmp_path):
    hub.save(tiny(), TOK, tmp_path / "m")
    with pytest.raises(UserError, match="--rm .*is a language model, must be a reward model"):
        models.load_model("--rm", tmp_path / "m", kind="reward model")


def test_without_a_flag_an_error_begins_with_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/no does not exist$"):
        hub.load(tmp_path / "no")
    hub.save(tiny(), TOK, tmp_path / "m")
    with pytest.raises(UserError, match=f"^{tmp_path}/m: not the vocabulary of the other models"):
        hub.load(tmp_path / "m", like=Tokenizer.from_bytes())
    (tmp_path / "m" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}/m/{WEIGHTS}: "):
        hub.load(tmp_path / "m")


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_without_weights(shard, reward, tmp_path):
    """The same model on the meta device, although there is no weight file."""
    model = scalar() if reward else tiny()
    hub.save(model, TOK, tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).unlink()
    again, tok = hub.load(tmp_path / "m", shard=shard, weights=False)
    assert tok == TOK and type(again) is type(model) and not hasattr(again, "fill")
    assert {name: x.shape for name, x in again.state_dict().items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }
    assert all(x.is_meta for x in again.state_dict().values())


def test_the_flag_of_a_model_that_is_read_later(tmp_path):
    """With --shard the files are read when the model has been cut; the error has its flag then too."""
    hub.save(tiny(), TOK, tmp_path / "m")
    model, _ = models.load_model("--init", tmp_path / "m", shard=True)
    (tmp_path / "m" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"^--init {tmp_path}/m/{WEIGHTS}: No such file"):
        model.fill(model)


# ------------------------------------------------------------------------------------------------------------
# all or nothing


def fail(monkeypatch, owner, name, call, error):
    """The call-th call of owner.name (from 0) raises; the others pass."""
    real, calls = getattr(owner, name, open), []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fake, raising=False)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAVES = [(os, "makedirs", 0), (Path, "write_bytes", 0), (weights, "open", 0)]
SAVES += [(owner, name, i) for owner, name in ((folders, "open"), (os, "fsync")) for i in range(3)]
RENAMES = [(os, "rename", 0), (os, "rename", 1)]
LAST = [(os, "fsync", 4)] * hasattr(os, "O_DIRECTORY")  # of the parent folder, where there is such a thing


@pytest.mark.parametrize("owner, name, call", [*SAVES, *RENAMES])
def test_disk_full_keeps_the_old_folder(owner, name, call, tmp_path, monkeypatch):
    """Whichever step of a save fails: one line, the old folder loads as it was, nothing is left over."""
    folder = tmp_path / "model"
    hub.save(tiny(seed=1), TOK, folder)
    with monkeypatch.context() as patch:
        fail(patch, owner, name, call, FULL)
        with pytest.raises(RunError, match="cannot save .*model .*No space left on device.* are kept"):
            hub.save(tiny(seed=2), TOK, folder)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(hub.load(folder)[0].wte.weight, tiny(seed=1).wte.weight)
    hub.save(tiny(seed=2), TOK, folder)  # with room again
    assert torch.equal(hub.load(folder)[0].wte.weight, tiny(seed=2).wte.weight)


@pytest.mark.parametrize("owner, name, call", SAVES)
def test_disk_full_at_the_first_save(owner, name, call, tmp_path, monkeypatch):
    """Without an older folder a failed save leaves nothing at all."""
    fail(monkeypatch, owner, name, call, FULL)
    with pytest.raises(RunError):
        hub.save(tiny(), TOK, tmp_path / "model")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("owner, name, call", [*SAVES, *RENAMES, *LAST])
def test_killed_while_saving(owner, name, call, tmp_path, monkeypatch):
    """After a kill at any moment (no clean-up runs) a complete folder loads, and the next save tidies up."""
    folder = tmp_path / "model"
    hub.save(tiny(seed=1), TOK, folder)
    with monkeypatch.context() as patch:
        fail(patch, owner, name, call, SystemExit(9))
        with pytest.raises(SystemExit):
            hub.save(tiny(seed=2), TOK, folder)
    done = (name, call) == ("fsync", 4)  # the new one is in place
    assert os.path.isdir(f"{folder}.old" if (name, call) == ("rename", 1) else folder)
    assert torch.equal(hub.load(folder)[0].wte.weight, tiny(seed=1 + done).wte.weight)
    hub.save(tiny(seed=3), TOK, folder)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(hub.load(folder)[0].wte.weight, tiny(seed=3).wte.weight)


def test_disk_full_after_a_kill(tmp_path, monkeypatch):
    """Killed between the two renames, then no room for the next save: the old folder is still there."""
    folder = tmp_path / "model"
    hub.save(tiny(seed=1), TOK, folder)
    os.rename(folder, f"{folder}.old")
    fail(monkeypatch, os, "fsync", 1, FULL)
    with pytest.raises(RunError):
        hub.save(tiny(seed=2), TOK, folder)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(hub.load(folder)[0].wte.weight, tiny(seed=1).wte.weight)
