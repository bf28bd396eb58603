"""GGUF: the names and the order of llama.cpp, read into the numbers that transformers computes; refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_sft
from nanorlhf import generate, hub
from nanorlhf.errors import UserError
from nanorlhf.hub import __main__ as command
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import defaults
from nanorlhf.tokenizer import Chat

gguf = pytest.importorskip("gguf")
from tests.faults import gguf_files  # noqa: E402

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOKENIZERS = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))
REAL = os.environ.get("NANORLHF_SMOLLM2", "")
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    path = gguf_files.convert(GOLDEN / name, tmp_path / "model.gguf")
    model, tok = hub.load(path)
    logits = model.logits(torch.tensor(EXPECTED["tokens"]))
    assert tok is None and (logits - torch.tensor(EXPECTED[name])).abs().max() < 1e-5
    assert model.cfg == hub.load(GOLDEN / name)[0].cfg


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0", "MXFP4"])
@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_quantised_weights(kind, style, tmp_path):
    """The weights are those of the folder, each rounded as its kind of quantisation does, row by row."""
    build = GPTConfig.llama if style == "llama" else GPTConfig.gpt2
    torch.manual_seed(0)
    model = GPT(build(40, d_model=64, n_head=4, n_kv_head=2 if style == "llama" else 4, d_ff=96, max_len=12))
    hub.save(model, None, tmp_path / "folder")
    found = hub.load(gguf_files.convert(tmp_path / "folder", tmp_path / "model.gguf", kind))[0]
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, weight in model.named_parameters():
        want = weight.detach()
        if want.dim() == 2:
            stored = gguf.quants.quantize(want.numpy(), quantisation)
            want = torch.tensor(gguf.quants.dequantize(stored, quantisation))
        assert torch.equal(found.get_parameter(name), want), name
    assert found.source.config["gguf"]["file"] == "model.gguf"
    assert found.source.config["gguf"]["quantisation"][kind] > 5


def larger(family):
    """A model like the golden one of a family, with room for the tokenizers and for a chat."""
    return GPT(dataclasses.replace(hub.load(GOLDEN / family)[0].cfg, vocab_size=400, max_len=64))


@pytest.mark.parametrize("tokenizer, family", [
    ("gpt2", "gpt2"), ("smollm2", "llama"), ("qwen", "qwen2"), ("qwen", "qwen3"), ("llama3", "llama"),
])  # fmt: skip
def test_tokenizer_has_the_ids_of_the_tokenizers_package(tokenizer, family, tmp_path):
    folder = tmp_path / "folder"
    hub.save(larger(family), None, folder)
    more = {"tokenizer.chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"}
    path = gguf_files.convert(folder, tmp_path / "model.gguf", tokenizer=tokenizer, **more)
    command.main(["convert", str(path), str(tmp_path / "out")])
    for place in (path, tmp_path / "out"):
        model, tok = hub.load(place)
        golden = TOKENIZERS[tokenizer]
        assert [tok.encode(text) for text in TOKENIZERS["texts"]] == golden["ids"]
        assert tok.decode([tok.eos_id]) == golden["eos"] and model.stop_ids == (tok.eos_id,)
        assert tok.vocab_size <= 400 == model.cfg.vocab_size
        assert tok.decode(tok.encode_prompt(Chat([{"role": "user", "content": "hat"}]))) == "<user>hat"
        bos = ["<|begin_of_text|>"] if tokenizer == "llama3" else []
        assert [tok.decode([i]) for i in tok.bos_ids] == bos
    assert tok == hub.load(path)[1]  # a reward model of the folder judges a policy of the file


def slower(dim, theta, factor, low=1.0, high=4.0, original=8192):
    """rope_freqs.weight as convert_hf_to_gguf.py computes it, in float64: by wavelengths."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * 3.141592653589793 * theta ** (i / dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_settings_of_llama_3_1(factor, tmp_path):
    cfg = GPTConfig.llama(40, d_model=128, n_head=2, d_ff=32, n_layer=1, rope_theta=500000.0)
    hub.save(GPT(cfg), None, tmp_path / "folder")
    settings = gguf_files.settings_of(tmp_path / "folder")
    tensors = gguf_files.tensors_of(tmp_path / "folder")
    tensors["rope_freqs.weight"] = slower(64, 500000.0, factor)
    path = gguf_files.write(tmp_path / "model.gguf", settings, tensors)
    assert hub.load(path)[0].cfg.rope_scaling == (factor, 1.0, 4.0, 8192)
    tensors["rope_freqs.weight"] = slower(64, 500000.0, factor, original=4096)
    gguf_files.write(path, settings, tensors)
    with pytest.raises(UserError, match="model.gguf: rope_freqs.weight is not supported"):
        hub.load(path)


def test_an_unembedding_in_the_file_is_one_of_its_own(tmp_path):
    """Also where it equals the embedding, as in the GPT-2 files that llama.cpp wrote up to 2024."""
    tensors = gguf_files.tensors_of(GOLDEN / "gpt2")
    settings = gguf_files.settings_of(GOLDEN / "gpt2")
    for scale in (1, 2):
        tensors["output.weight"] = tensors["token_embd.weight"] * scale
        model = hub.load(gguf_files.write(tmp_path / "model.gguf", settings, tensors))[0]
        want = scale * torch.tensor(EXPECTED["gpt2"])
        assert (model.logits(torch.tensor(EXPECTED["tokens"])) - want).abs().max() < 2e-5
        assert not model.cfg.tied and hub.load(GOLDEN / "gpt2")[0].cfg.tied


@pytest.mark.parametrize("more, says", [
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
    ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
    ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window=4096 is not supported"),
    ({"llama.rope.dimension_count": 2}, "key_length=4 is not supported where head_dim=2"),
    ({"llama.attention.head_count": [4, 4]}, r"num_attention_heads=\[4, 4\]|n_head=\[4, 4\]"),
    ({"tokenizer.ggml.model": "llama"}, "the tokenizer 'llama' is not supported"),
    ({"tokenizer.ggml.pre": "tekken"}, "the pre-tokenizer 'tekken' is not supported"),
    ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token is not supported"),
])  # fmt: skip
def test_what_cannot_be_exact_is_refused_by_name(more, says, tmp_path):
    folder = tmp_path / "folder"
    hub.save(larger("llama"), None, folder)
    more = {"llama.attention.key_length": 4} | more
    path = gguf_files.convert(folder, tmp_path / "model.gguf", tokenizer="smollm2", **more)
    with pytest.raises(UserError, match=says) as caught:
        hub.load(path)
    assert str(caught.value).startswith(str(path)) and "/tmp/tmp" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path):
    settings = gguf_files.settings_of(GOLDEN / "llama") | {"general.architecture": "gemma3"}
    path = gguf_files.write(tmp_path / "model.gguf", settings, gguf_files.tensors_of(GOLDEN / "llama"))
    with pytest.raises(UserError, match="architecture 'gemma3' is not supported"):
        hub.load(path)


def test_what_no_published_llama_has_is_refused(tmp_path):
    """Biases, and the tensors of a part of a model that llama.cpp has split, which are missing."""
    tensors = gguf_files.tensors_of(GOLDEN / "llama")
    tensors["blk.0.attn_q.bias"] = tensors["blk.0.attn_norm.weight"]
    settings = gguf_files.settings_of(GOLDEN / "llama")
    path = gguf_files.write(tmp_path / "model.gguf", settings, tensors)
    with pytest.raises(UserError, match="blk.0.attn_q.bias is unknown"):
        hub.load(path)
    tensors = {name: tensor for name, tensor in tensors.items() if "bias" not in name and "blk.1" not in name}
    gguf_files.write(path, settings, tensors)
    with pytest.raises(UserError, match="model.gguf: tensor blk.1.attn_k.weight is missing"):
        hub.load(path)


def test_a_large_one_has_the_learning_rate_of_large_models(tmp_path, monkeypatch):
    """Not the one of the toys, which would destroy it. A damaged file is named by the loader, later."""
    path = gguf_files.convert(GOLDEN / "llama", tmp_path / "model.gguf", "F16")
    size = sum(p.numel() for p in hub.load(path)[0].parameters())
    assert defaults.n_parameters(path) == size
    assert train_sft.Config(init=str(path)).lr == train_sft.Config().lr
    monkeypatch.setattr(defaults, "LARGE", size - 1)
    full, adapters, _ = defaults.REAL["sft"]
    assert train_sft.Config(init=str(path)).lr == adapters == 2e-4
    assert train_sft.Config(init=str(path), lora_rank=0).lr == full == 2e-5
    (tmp_path / "damaged.gguf").write_bytes(path.read_bytes()[:99])
    assert defaults.n_parameters(tmp_path / "damaged.gguf") == 0


def test_command(tmp_path, capsys):
    path = str(gguf_files.convert(GOLDEN / "qwen3", tmp_path / "model.gguf", "F16"))
    out = str(tmp_path / "out")
    assert command.main(["convert", path, out]) == 0
    assert capsys.readouterr().out.startswith(out)
    tokens = torch.tensor(EXPECTED["tokens"])
    assert torch.equal(hub.load(out)[0](tokens), hub.load(path)[0](tokens))
    assert json.loads((tmp_path / "out/config.json").read_text())["gguf"]["file"] == "model.gguf"
    assert command.main(["convert", path, out]) == 2  # never over a folder that is there
    assert "is there already" in capsys.readouterr().err
    assert command.main(["convert", str(tmp_path / "no.gguf"), out + "2"]) == 2
    assert "no.gguf does not exist" in capsys.readouterr().err
    assert command.main(["convert", path]) == 2 and "usage" in capsys.readouterr().err


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    path = gguf_files.convert(GOLDEN / "llama", tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="model.gguf: .*pip install gguf$"):
        hub.load(path)


def test_sample_from_a_gguf(tmp_path):
    """sample.py takes one as --model; nothing is left of the folder that its settings were written into."""
    folder = tmp_path / "folder"
    hub.save(larger("qwen3"), None, folder)
    path = gguf_files.convert(folder, tmp_path / "model.gguf", tokenizer="qwen")
    command = [sys.executable, "sample.py", "--model", str(path), "--prompt", "the cat", "--device", "cpu"]
    command += ["--max_new_tokens", "3"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    room = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=room)
    assert done.returncode == 0, done.stderr
    assert "after 3 tokens" in done.stdout or "EOS" in done.stdout
    assert not list(temporary.glob("tmp*"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="NANORLHF_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
def test_smollm2_as_published():
    """Ids, logits and greedy text of transformers 5.24, by its own reading of that file."""
    golden = json.loads((GOLDEN / "smollm2.json").read_text("utf-8"))
    model, tok = hub.load(REAL)
    for text, ids in golden["texts"]:
        assert tok.encode(text) == ids and tok.decode(ids) == text
    for chat in golden["chats"]:
        prompt = tok.encode_prompt(Chat([{"role": "user", "content": chat["prompt"]}]))
        assert prompt == chat["ids"]
        logits = model.logits(torch.tensor([prompt]))[0, -1]
        apart = (logits[::4096] - torch.tensor(chat["logits"])).abs().max()
        assert apart < 2e-5 * chat["max"]
        greedy = generate.generate(model, [prompt], 1, max_new_tokens=16, temperature=0.0, eos_id=tok.eos_id)
        assert greedy.tokens[0, len(prompt) :].tolist()[: len(chat["greedy"])] == chat["greedy"]


def test_like_a_folder_for_load(tmp_path):
    """A language model where a reward model is wanted is refused; --dry_run reads no weights."""
    path = gguf_files.convert(GOLDEN / "llama", tmp_path / "model.gguf")
    with pytest.raises(UserError, match="model.gguf: is a language model, must be a reward model"):
        hub.load(path, "reward model")
    assert hub.load(path, weights=False)[0].device.type == "meta"
    sharded = hub.load(path, shard=True)[0].to_empty(device="cpu")
    sharded.fill(sharded)
    tokens = torch.tensor(EXPECTED["tokens"])
    assert torch.equal(sharded(tokens), hub.load(path)[0](tokens))
