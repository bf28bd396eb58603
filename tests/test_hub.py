"""Hugging Face folders: against transformers' own files and figures, round trips, bad folders, full disks.

golden/ was written by transformers (golden/make_hf.py); the tests marked `live` run where it is installed.
"""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import STYLES, V, randint, tiny
from safetensors.torch import load_file, save_file

from nanorlhf import checkpoint, hub
from nanorlhf.common import RunError, UserError
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.tokenizer import FILE, Tokenizer

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOKENS = torch.tensor(EXPECTED["tokens"])
TOK = Tokenizer.from_chars("abcdefghijk")  # 11 characters, EOS and pad: V ids
families = pytest.mark.parametrize("name", ["gpt2", "llama", "llama_bias_reward"])


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
def test_golden_tensors_come_back(name, tmp_path):
    """Loaded and saved again: the same tensors under the same names, and the same settings."""
    hub.save(hub.load(GOLDEN / name)[0], None, tmp_path / "model")
    want, got = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "model"))
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    before, after = read(GOLDEN / name), read(tmp_path / "model")
    assert before["architectures"] == after["architectures"]
    no_model = {"dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "n_inner"}
    for key in (before.keys() & after.keys()) - no_model:
        assert before[key] == after[key] or key.endswith("pdrop"), key


OLD_LLAMA = dict(
    rope_parameters=None, rope_theta=50.0, rope_scaling="null", torch_dtype="float32", dtype=None,
    head_dim=None, attention_bias=None, mlp_bias=None,
)  # fmt: skip
OLD_GPT2 = dict(
    n_inner=None, scale_attn_weights=None, scale_attn_by_inverse_layer_idx=None, dtype=None,
    tie_word_embeddings=None, n_ctx=12, task_specific_params={"text-generation": {}},
)  # fmt: skip


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
    ],
)
def test_dialects_of_config(name, change, tmp_path):
    """What older releases wrote, or left out because it is the default, is the same model."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (GOLDEN / name).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit(copy, **change)
    assert (scores(hub.load(copy)[0]) - torch.tensor(EXPECTED[name])).abs().max() < 1e-5


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_both_spellings_of_rope_are_written(spelling, tmp_path):
    """transformers 4 reads the one, 5 the other: each alone is enough."""
    model = tiny("llama", rope_theta=50.0)
    hub.save(model, None, tmp_path / "m")
    edit(tmp_path / "m", **{spelling: None})
    assert hub.load(tmp_path / "m")[0].cfg == model.cfg


def test_golden_files_say_their_versions():
    assert EXPECTED["transformers"] == "5.23.0" and EXPECTED["torch"].startswith("2.13.0")
    assert sum(f.stat().st_size for f in GOLDEN.rglob("*") if f.is_file()) < 100_000


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


@families
def test_live_transformers_agrees_with_the_golden_figures(name, tmp_path):
    """What we save of the golden folders gives the golden figures in any release of transformers.

    The folders themselves do in 5 alone: 4 does not read the rotary base that 5 wrote, ours has both.
    """
    hf = pytest.importorskip("transformers")
    auto = hf.AutoModelForSequenceClassification if name.endswith("reward") else hf.AutoModelForCausalLM
    hub.save(hub.load(GOLDEN / name)[0], None, tmp_path / "model")
    edit(tmp_path / "model", pad_token_id=28)  # saved without a tokenizer; a batch of scores needs one
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
        (Tokenizer.train_bpe("to be or not to be" * 3, 262), "to be or not é"),
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
    """A bf16 model is saved in fp32, losing nothing; a bf16 file of theirs loads into fp32 weights."""
    model = tiny("llama").bfloat16()
    hub.save(model, None, tmp_path / "m")
    again = hub.load(tmp_path / "m")[0]
    file = tmp_path / "m" / "model.safetensors"
    assert all(x.dtype == torch.float32 for x in load_file(file).values())
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), again.parameters()))
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    assert torch.equal(hub.load(tmp_path / "m")[0].wte.weight, again.wte.weight)


def test_untied_head_is_left_out_of_a_reward_model(tmp_path):
    """A reward model on an untied trunk has no unembedding in its file, and needs none."""
    hub.save(scalar("gpt2-untied"), TOK, tmp_path / "m")
    names = load_file(tmp_path / "m" / "model.safetensors").keys()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    "mix",
    [
        dict(norm="rms"),
        dict(pos="rope"),
        dict(mlp="swiglu"),
        dict(bias=False),
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


CONFIG, WEIGHTS = "config.json", "model.safetensors"
FAULTS = [  # style, fault, file named, what the line says
    ("gpt2", remove(CONFIG), "", "has no config.json; make it with: python x.py --out"),
    ("gpt2", write(CONFIG, b"{not json"), CONFIG, "Expecting"),
    ("gpt2", write(CONFIG, b"\xff\xfe{}"), CONFIG, "decode"),
    ("gpt2", write(CONFIG, b"[1, 2]"), CONFIG, "not a JSON object"),
    ("gpt2", write(CONFIG, b""), CONFIG, "Expecting"),
    ("gpt2", fields(model_type="bert"), CONFIG, "model_type 'bert' is not supported"),
    ("gpt2", fields(model_type=None), CONFIG, "model_type None"),
    ("gpt2", fields(n_layer=None), CONFIG, "field 'n_layer' is missing"),
    ("gpt2", fields(n_head=0), CONFIG, "n_head=0"),
    ("gpt2", fields(n_head=3), CONFIG, "n_head=3 must divide d_model=16"),
    ("gpt2", fields(n_embd="16"), CONFIG, "d_model='16'"),
    ("gpt2", fields(layer_norm_epsilon="tiny"), CONFIG, "'tiny'"),
    ("gpt2", fields(activation_function="relu"), CONFIG, "activation_function='relu' is not supported"),
    ("gpt2", fields(scale_attn_by_inverse_layer_idx=True), CONFIG, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", fields(scale_attn_weights=False), CONFIG, "scale_attn_weights=False"),
    ("llama", fields(hidden_act="gelu"), CONFIG, "hidden_act='gelu'"),
    ("llama", fields(mlp_bias=True), CONFIG, "mlp_bias=True"),
    ("llama", fields(attention_bias=True, mlp_bias=None), CONFIG, "mlp_bias=False"),
    ("llama", fields(rope_parameters={"rope_type": "llama3", "factor": 8.0}), CONFIG, "type 'llama3'"),
    ("llama", fields(rope_parameters=None, rope_scaling={"type": "linear"}), CONFIG, "type 'linear'"),
    ("llama", fields(rope_parameters={"rope_type": "yarn"}), CONFIG, "'yarn'"),
    ("llama", fields(rope_parameters=[1]), CONFIG, "damaged"),
    ("llama", fields(rope_theta="big"), CONFIG, "'big'"),
    ("llama", fields(num_key_value_heads=3), CONFIG, "n_kv_head=3 must divide n_head=4"),
    ("llama", fields(head_dim=3), CONFIG, "even head_dim, got 3"),
    ("gpt2", fields(vocab_size=V + 1), WEIGHTS, r"wte.weight has shape \(13, 16\), config.json says"),
    ("llama", fields(num_hidden_layers=1), WEIGHTS, "model.layers.1.* is unknown to this model"),
    ("gpt2", fields(n_layer=3), WEIGHTS, "transformer.h.2.* is missing"),
    ("llama", fields(tie_word_embeddings=False), WEIGHTS, "lm_head.weight is missing"),
    ("gpt2", remove(WEIGHTS), WEIGHTS, "No such file"),
    ("gpt2", write(WEIGHTS, b""), WEIGHTS, "header"),
    ("gpt2", cut(WEIGHTS, 0.5), WEIGHTS, "incomplete|header|buffer"),
    ("gpt2", cut(WEIGHTS, 0.01), WEIGHTS, "header"),
    ("llama", tensors(model__norm__weight=None), WEIGHTS, "model.norm.weight is missing"),
    ("llama", tensors(extra__weight=torch.ones(2)), WEIGHTS, "extra.weight is unknown to this model"),
    ("llama", tensors(model__norm__weight=torch.ones(9)), WEIGHTS, r"has shape \(9,\), .* says \(16,\)"),
    ("gpt2", tensors(score__weight=torch.ones(1, 16)), WEIGHTS, "score.weight is unknown to this model"),
    ("reward", tensors(score__weight=None), WEIGHTS, "score.weight is missing"),
    ("reward", tensors(score__weight=torch.ones(2, 16)), WEIGHTS, r"score.weight .* shape \(1, 16\)"),
    ("reward", fields(reward_bias="high"), CONFIG, "reward_bias='high'"),
    ("reward", lambda folder: None, "", "is a reward model, must be a language model"),
    ("gpt2", remove(FILE), FILE, "no tokenizer"),
    ("gpt2", write(FILE, b"{}"), FILE, "damaged"),
    ("gpt2", Tokenizer.from_bytes().save, "", "tokenizer has 258 ids, the model only 13"),
]  # fmt: skip


@pytest.mark.parametrize("style, fault, file, says", FAULTS, ids=[f"{f[0]}-{f[3][:30]}" for f in FAULTS])
def test_bad_folder(style, fault, file, says, tmp_path):
    """Each fault is one line: the flag, the file (or its folder), what is wrong."""
    folder = tmp_path / "model"
    hub.save(scalar() if style == "reward" else tiny(style), TOK, folder)
    fault(folder)
    with pytest.raises(UserError, match=says) as error:
        hub.load(folder, "--some_flag", "python x.py", "language model")
    line = str(error.value)
    assert line.startswith("--some_flag ") and str(folder) in line and file in line and "\n" not in line


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="--rm .*no does not exist; make it with: python train_rm.py"):
        hub.load(tmp_path / "no", "--rm", "python train_rm.py")
    with pytest.raises(UserError, match="--rm .*no does not exist$"):
        hub.load(tmp_path / "no", "--rm")


def test_wrong_kind_the_other_way_round(tmp_path):
    hub.save(tiny(), TOK, tmp_path / "m")
    with pytest.raises(UserError, match="--rm .*is a language model, must be a reward model"):
        hub.load(tmp_path / "m", "--rm", kind="reward model")


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
SAVES = [(os, "makedirs", 0), *((owner, name, i) for owner, name in ((checkpoint, "open"), (os, "fsync"))
                                for i in range(3))]  # fmt: skip
RENAMES = [(os, "rename", 0), (os, "rename", 1)]
LAST = [(os, "fsync", 3)] * hasattr(os, "O_DIRECTORY")  # of the parent folder, where there is such a thing


@pytest.mark.parametrize("owner, name, call", [*SAVES, *RENAMES])
def test_disk_full_keeps_the_old_folder(owner, name, call, tmp_path, monkeypatch):
    """Whichever step of a save fails: one line, the old folder loads as it was, nothing is left over."""
    folder = tmp_path / "model"
    hub.save(tiny(seed=1), TOK, folder)
    with monkeypatch.context() as patch:
        fail(patch, owner, name, call, FULL)
        with pytest.raises(RunError, match="cannot save .*model .*No space left on device.* is kept"):
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
    done = (name, call) == ("fsync", 3)  # the new one is in place
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
