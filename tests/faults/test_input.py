"""Faults of what a user gives: files, folders, flags. Docstrings are rows of docs/reliability.md."""

import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from helpers import tiny
from runs import EACH, metrics
from safetensors.torch import load_file, save_file
from stages import rows_of, words

import evaluate
import sample
import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import generate, hub
from nanorlhf.errors import UserError, visible
from nanorlhf.hub.formats import read_rows
from nanorlhf.run import replay
from nanorlhf.run.cli import parse, run_cli
from nanorlhf.run.folders import describe


@pytest.fixture
def refuse(run, tmp_path):
    """refuse(trainer, flags, *words): exit status 2, one line with the words, and no run."""

    def check(trainer, flags, *words):
        done = run(trainer, **flags)
        assert done.refused(*words) and not (tmp_path / "run/config.json").exists()

    return check


def data(tmp_path, content, name="data.jsonl"):
    """Rows, or bytes → a file's path, as a flag takes it."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(tmp_path / name)


@pytest.fixture
def model(stages, tmp_path):
    """A copy of the SFT model's folder, to be spoilt."""
    return shutil.copytree(stages.folder / "sft/model", tmp_path / "model")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


# models


def test_row_11_pickle_payload(run, stages, model, tmp_path):
    """R | a pickle with a payload as model, as training state, as bad-step file | refused, the payload does
    not run"""
    canary = str(tmp_path / "canary")
    (model / "model.safetensors").unlink()
    torch.save({"w": Canary(canary)}, model / "pytorch_model.bin")
    assert run(train_dpo, init=model).refused("--init", "pytorch_model.bin", "a pickle can run any code")
    (model / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    assert run(train_dpo, init=model).refused("--init", "model.safetensors")
    run(train_sft, "sft")
    for folder in (tmp_path / "sft/state").iterdir():
        torch.save(Canary(canary), folder / "state.pt")
        (folder / "manifest.json").write_text(json.dumps({"files": dict(describe(folder))}))
    assert run(train_sft, "sft", resume="true").refused("step-000006/state.pt", "loading it would run code")
    torch.save(Canary(canary), tmp_path / "bad-step-1.pt")
    with pytest.raises(UserError, match="bad-step-1.pt: cannot be read: .*loading it would run code"):
        replay.load(str(tmp_path / "bad-step-1.pt"))
    assert not (tmp_path / "canary").exists()


def test_row_12_weights_missing(refuse, model):
    """R | pytorch_model.bin only; a missing shard; an index that names ../x | refused by file"""
    weights, index = model / "model.safetensors", model / "model.safetensors.index.json"
    shard = model / "model-00001-of-00002.safetensors"
    names = list(load_file(weights))
    weights.rename(shard)
    for file, word in (("model-00002-of-00002.safetensors", "model-00002-of-00002"), ("../x", "plain name")):
        table = {name: file if i % 2 else shard.name for i, name in enumerate(names)}
        index.write_text(json.dumps({"weight_map": table}))
        refuse(train_dpo, dict(init=model), "--init", str(model), word)
    index.unlink()
    shard.rename(model / "pytorch_model.bin")
    refuse(train_dpo, dict(init=model), "--init", "pytorch_model.bin", "make it safetensors")


HUGE = dict(n_layer=2**30, n_embd=2**30, vocab_size=2**30, n_positions=2**30, n_inner=2**30)


@pytest.mark.parametrize("key", HUGE)
def test_row_45_config_larger_than_its_weights(key, refuse, model):
    """R | a config.json with more layers, or wider, than the weights are | refused by the headers of the
    weight files, before memory is asked for"""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: HUGE[key]}))
    refuse(train_sft, dict(init=model), str(model))


def test_long_contexts_cost_nothing_until_they_are_used(tmp_path):
    """Rotary tables of a billion positions would be 8 GB."""
    hub.save(tiny("llama"), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    long = hub.load(tmp_path)[0]
    tokens = torch.arange(12)[None]
    assert torch.equal(long(tokens), tiny("llama")(tokens))


SETTINGS = [
    ("config.json", "reward_bias", float("nan")), ("config.json", "reward_bias", True),
    ("config.json", "reward_bias", 10**400), ("config.json", "step_ids", 3),
    ("config.json", "step_ids", [1.5]), ("config.json", "step_ids", [-1]),
    ("config.json", "step_ids", [10**9]),
    ("config.json", "layer_norm_epsilon", 10**400), ("config.json", "n_layer", True),
]  # fmt: skip


@pytest.mark.parametrize("file, key, value", SETTINGS)
def test_settings_of_other_types_and_sizes(file, key, value, refuse, model):
    config = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(config | {key: value}))
    refuse(train_sft, dict(init=model), model / file)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_too_deep_to_be_parsed(file, refuse, model):
    (model / file).write_text("{\"a\": " + "[" * 100_000 + "]" * 100_000 + "}")
    refuse(train_sft, dict(init=model), file)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("trainer, flag, kind", [
    (train_sft, "init", "sft"), (train_ppo, "critic_init", "rm"), (train_grpo, "rm", "rm"),
    (train_dpo, "ref", "sft"), (train_distill, "teacher", "teacher"),
], ids=["init", "critic_init", "rm", "ref", "teacher"])  # fmt: skip
def test_row_66_weights_that_are_not_finite(trainer, flag, kind, value, refuse, stages, tmp_path):
    """R | one weight that is NaN or infinite in the folder of a policy, reference, critic, teacher or reward
    model | refused with file and tensor; no loss is NaN for which --lr would be blamed"""
    model, tok = hub.load(stages.folder / kind / "model")
    model.trunk.wte.weight.data[2, 3] = value
    hub.save(model, tok, tmp_path / "spoilt")
    path = tmp_path / "spoilt/model.safetensors"
    words = f"--{flag} {path}", "wte.weight has a weight that is not finite"
    refuse(trainer, {flag: tmp_path / "spoilt"}, *words)


def make_special(path, kind):
    """Put a pipe, a device or a folder where a file is expected."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_row_46_weights_that_are_no_file(kind, refuse, model):
    """R | a pipe, a device or a folder in place of the weights | refused: opening a pipe would wait for
    ever"""
    path = model / "model.safetensors"
    path.unlink()
    make_special(path, kind)
    refuse(train_sft, dict(init=model), path, "no regular file")


@pytest.mark.parametrize("change, word", [
    (dict(model_type="bert"), "model_type 'bert' is not supported"),
    (dict(activation_function="relu"), "activation_function='relu' is not supported"),
    (dict(n_layer=2), "is missing"),
    (dict(n_embd=64), "has shape"),
    (None, "is unknown to this model"),
])  # fmt: skip
def test_row_13_unsupported_model(change, word, refuse, model):
    """R | unsupported model_type, activation or rotary type; missing, extra, mis-shaped tensor | refused,
    file and field named"""
    if change:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | change))
    else:
        tensors = load_file(model / "model.safetensors")
        save_file(tensors | {"extra.weight": torch.ones(2)}, model / "model.safetensors")
    refuse(train_dpo, dict(init=model), "--init", str(model), word)


def test_unsupported_rope(refuse, tmp_path, stages):
    """Row 13: rotary positions of a type we have not, in the words of transformers 4 and 5."""
    tok = hub.load(stages.folder / "sft/model")[1]
    hub.save(tiny("llama", vocab_size=tok.vocab_size), tok, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    for place, key, kind in (("rope_scaling", "type", "yarn"), ("rope_scaling", "rope_type", "dynamic"),
                             ("rope_parameters", "rope_type", "linear")):  # fmt: skip
        other = dict(rope_scaling=None, rope_parameters=None)
        path.write_text(json.dumps(config | other | {place: {key: kind, "factor": 2.0}}))
        words = f"rotary positions of type '{kind}' are not supported"
        refuse(train_dpo, dict(init=tmp_path / "model"), "--init", str(path), words)


def test_row_14_vocabulary(refuse, model, tmp_path):
    """R | the tokenizer has more ids than the model; fewer | refused; an id that is none is never sampled"""
    tok = hub.load(model)[1]
    hub.save(tiny(vocab_size=tok.vocab_size - 1), tok, tmp_path / "small")
    refuse(train_dpo, dict(init=tmp_path / "small"), f"the tokenizer has {tok.vocab_size} ids")
    wide = tiny(vocab_size=tok.vocab_size + 5)
    wide.wte.weight.data[tok.vocab_size :] *= 100  # what is no id would win
    hub.save(wide, tok, tmp_path / "wide")
    policy, _ = hub.load(tmp_path / "wide")
    roll = generate.generate(policy, [[0, 1]], 64, 8, 1.0, tok.eos_id)
    assert roll.tokens[roll.mask].max() < tok.vocab_size


# data


@EACH
def test_row_15_no_data(trainer, refuse, tmp_path):
    """R | data missing, empty, only blank lines | refused, with a row as it should be"""
    for content, word in ((None, "No such file"), (b"", "the file is empty"), (b"\n \n", "only blank lines")):
        path = str(tmp_path / "nowhere") if content is None else data(tmp_path, content)
        refuse(trainer, dict(data=path), f"--data: {path}", word, "expected")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_row_67_data_that_is_no_file(kind, refuse, stages, tmp_path):
    """R | a pipe, a device or a folder as --data, --eval_data or --pairs, or as the --out of evaluate.py |
    refused: a pipe would be waited for, and a device has no end"""
    path = tmp_path / "special"
    make_special(path, kind)
    for flag in ("data", "eval_data"):
        refuse(train_sft, {flag: path}, f"--{flag}: {path}: is no regular file")
    with pytest.raises(UserError, match="^--pairs: .*/special: is no regular file"):
        read_rows(str(path), "pairs", "--pairs")
    if kind != "device":  # /dev/null and /dev/stdout may be written to
        with pytest.raises(UserError, match="^--out .*/special: is no file"):
            evaluate.Config(out=str(path))


@EACH
def test_row_16_bad_rows(trainer, run, refuse, tmp_path):
    """R | bad JSON, no object, unknown keys in line n | refused by file:n; --skip_bad_rows drops
    and counts"""
    good = [json.dumps(row).encode() for row in rows_of(trainer)]
    for bad, word in ((b"{", "bad JSON"), (b"3", "expected one object"), (b'{"promt": "a"}', "missing key")):
        path = data(tmp_path, b"\n".join([good[0], bad, *good[1:]]))
        refuse(trainer, dict(data=path), f"--data: {path}:2:", word)
        done = run(trainer, data=path, skip_bad_rows="true", overwrite="true")
        assert done.status == 0 and f"1 of {len(good) + 1} rows are bad (line 2)" in done.out
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("bend, word", [
    (lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), ""),  # BOM, CRLF
    (lambda text: text.replace(b'"prompt": "', b'"prompt": "\\ud800', 1), ""),  # a lone surrogate
    (lambda text: text + b'{"prompt": "a=", "response": "' + b" " * 10**6 + b'"}\n', ""),
    (lambda text: text.decode().replace('"prompt": "', '"prompt": "é', 1).encode("latin-1"), "not UTF-8"),
    (lambda text: text.replace(b"=", b"\0", 1), "a NUL byte"),
    (lambda text: text.decode().encode("utf-16"), "NUL byte|not UTF-8|bad JSON"),
], ids="bom surrogate spaces latin-1 nul utf-16".split())  # fmt: skip
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_row_17_odd_bytes(bend, word, tokenizer, run, tmp_path):
    """R | BOM, CRLF, lone surrogate, a row of a million spaces; latin-1, NUL, UTF-16 | read;
    refused by line"""
    text = "".join(json.dumps(row) + "\n" for row in words(64)).encode()
    path = data(tmp_path, bend(text))
    done = run(train_sft, data=path, tokenizer=tokenizer, steps=2)
    assert done.status == 0 if not word else done.refused(f"{path}:1")
    assert not word or any(w in done.err[0] for w in word.split("|"))


@EACH
@pytest.mark.parametrize("value", [None, 3, 1.5, True, ["a"], {"a": "b"}], ids=str)
def test_row_18_wrong_type(trainer, value, refuse, tmp_path):
    """R | a field null, a number, of a wrong type | refused, with file and line"""
    rows = rows_of(trainer)
    key = "chosen" if trainer in (train_rm, train_dpo) else "prompt"
    rows[2] = rows[2] | {key: value}
    path = data(tmp_path, rows)
    refuse(trainer, dict(data=path), f"--data: {path}:3:", key)


def test_row_19_pairs_that_teach_nothing(run, refuse, tmp_path):
    """S | equal responses, empty replies, pairs of two prompts | dropped and counted (an empty reply is one:
    EOS); refused when more than half are"""
    good = rows_of(train_dpo)
    for trainer in (train_rm, train_dpo):
        same = [row | {"rejected": row["chosen"]} for row in good]
        done = run(trainer, data=data(tmp_path, good[:50] + same[50:]), overwrite="true", steps=2)
        assert done.status == 0 and "with equal responses" in done.out and "dropped" in done.out
        done = run(trainer, data=data(tmp_path, same[:50] + good[50:]), overwrite="true", steps=2)
        assert done.refused("pairs have equal responses, more than half")
        empty = [row | {"rejected": ""} for row in good]
        assert run(trainer, data=data(tmp_path, empty), overwrite="true", steps=2).status == 0
    turn = "\n\nHuman: {}\n\nAssistant: {}"
    talk = [(f"a{i}", f"{'ab'[i % 4 == 0]}{i}") for i in range(64)]
    talk = [dict(chosen=turn.format(p, "x"), rejected=turn.format(q, "y")) for p, q in talk]
    how = dict(data=data(tmp_path, talk), tokenizer="bpe", max_len=99, steps=2, overwrite="true")
    done = run(train_sft, **how)
    assert done.status == 0 and "16 of 64 pairs answer different prompts" in done.out
    apart = [row | {"rejected": turn.format("c", "y")} for row in talk[:40]] + talk[40:]
    done = run(train_sft, **how | dict(data=data(tmp_path, apart)))
    assert done.refused("different prompts", "more than half")


def test_row_20_labelled_rows(refuse, tmp_path):
    """R | rows of KTO, a completion with a label, in SFT, RM or DPO | refused: --loss kto reads them"""
    rows = [{"prompt": r["prompt"], "completion": r["response"], "label": i % 2 == 0} for i, r in
            enumerate(words(64))]  # fmt: skip
    path = data(tmp_path, rows)
    for trainer in (train_sft, train_rm, train_dpo):
        refuse(trainer, dict(data=path), f"{path}:1:", "--loss kto reads")


def test_row_21_prompts_without_room(run, refuse, tmp_path):
    """S | a prompt that, with its response, exceeds the context | dropped and counted, never cut; refused if
    none is left"""
    long = [row | {"prompt": "a" * 20 + row["prompt"]} for row in words(64)]
    for trainer in (train_ppo, train_grpo, train_sft):
        path = data(tmp_path, words(64)[:40] + long[40:])
        done = run(trainer, data=path, overwrite="true", steps=2)
        assert done.status == 0 and re.search("dropped 2[34] of|24 of 64 .*dropped", done.out)
        shutil.rmtree(tmp_path / "run")
        refuse(trainer, dict(data=data(tmp_path, long)), "longer than", "tokens")


@pytest.mark.parametrize("trainer", [train_sft, train_rm, train_dpo], ids=lambda t: t.__name__)
def test_row_22_replies_that_would_be_masked_away(trainer, run, tmp_path):
    """S | a reply (of a pair: either one) that, cut at the context, would leave no label | its row is dropped
    and counted, never cut; the loss is never NaN"""
    rows = [row | {"prompt": row["prompt"] if i % 2 else "a" * 15 + "="} for i, row in
            enumerate(rows_of(trainer))]  # fmt: skip
    done = run(trainer, data=data(tmp_path, rows), eval_every=1)
    assert done.status == 0 and "longer than the context of 16 tokens" in done.out
    dropped = re.findall(r"dropped (\d+) of .*demonstrations|(\d+) longer than", done.out)
    assert sum(int(n) for found in dropped for n in found if n) == 32, done.out
    for row in metrics(tmp_path / "run"):
        assert all(value == value and "nan" not in value for value in row.values())


@EACH
def test_row_23_sizes_that_do_not_fit(trainer, run, refuse, tmp_path):
    """S | fewer rows than a batch; samples that do not fill the minibatches | rows come again in the next
    epoch; refused with the numbers"""
    few = data(tmp_path, rows_of(trainer)[:12])
    samples = trainer in (train_ppo, train_grpo, train_distill)
    more = dict(prompts_per_step=40) if samples else dict(batch_size=40)
    assert run(trainer, data=few, steps=2, **more).status == 0
    if trainer in (train_ppo, train_grpo):
        shutil.rmtree(tmp_path / "run")
        refuse(trainer, dict(minibatches=99), "--minibatches 99: a step has", "samples only")


def test_row_28_group_of_one(refuse):
    """R | --group_size 1 with GRPO | refused"""
    refuse(train_grpo, dict(group_size=1), "--group_size 1: a group of one has nothing to be compared with")


# flags


def test_row_34_numbers_at_the_edge(refuse, stages, capsys):
    """R | temperature 0, top_p 0, steps 0, negative lr, max_new_tokens 0 in training | refused; sample.py:
    temperature 0 is greedy, top_k above the vocabulary is all, never a division by zero"""
    for trainer, flags in ((train_ppo, dict(temperature=0)), (train_grpo, dict(temperature=0)),
                           (train_ppo, dict(max_new_tokens=0)), (train_grpo, dict(max_new_tokens=0)),
                           *((t, dict(lr=-1e-3)) for t in (train_sft, train_rm, train_ppo, train_dpo)),
                           *((t, dict(steps=0)) for t in (train_sft, train_rm, train_ppo, train_dpo)),
                           (train_ppo, dict(lr=1e38)), (train_ppo, dict(critic_lr=1e38)),
                           *((t, dict(temperature=1e-45)) for t in (train_ppo, train_grpo)),
                           *((t, dict(adam_eps=0)) for t in (train_ppo, train_grpo, train_dpo)),
                           (train_grpo, dict(reward_timeout=1e10)), (train_sft, dict(weight_decay=1e30)),
                           *((t, dict(beta=1e30)) for t in (train_ppo, train_dpo)),
                           *((t, dict(entropy_coef=1e30)) for t in (train_ppo, train_grpo)),
                           *((train_ppo, dict(no_eos_score=x)) for x in (1e30, -1e30)),
                           (train_sft, dict(batch_size=0)), (train_ppo, dict(minibatches=0))):  # fmt: skip
        (name, value), = flags.items()
        refuse(trainer, flags, f"--{name} {value}", "must be")
    base = dict(model=f"{stages.folder}/sft/model", prompt="abc=", max_new_tokens=5)
    seen = []
    for flags in (dict(temperature=0.0), dict(temperature=0.0, seed=1), dict(top_k=10**6), {}):
        sample.main(sample.Config(**base, **flags))
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1] and seen[2] == seen[3]
    for module in (sample, evaluate):
        assert run_cli(module.Config, None, module.__doc__, ["--top_p", "0"]) == 2
        assert "--top_p 0.0: must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["--zzz"], "unknown flag --zzz (see --help)"),
    (["--stepz", "3"], "unknown flag --stepz (did you mean --steps?)"),
    (["--l", "3"], "unknown flag --l (did you mean --lr?)"),
    (["--steps", "many"], "--steps many: must be an integer"),
    (["--resume", "Fals"], "--resume Fals: must be true or false"),
    (["--resume", "False", "x"], "unknown flag x"),
])  # fmt: skip
@EACH
def test_row_35_flags(trainer, argv, says, capsys):
    """R | unknown or misspelt flag, prefix, wrong type | refused with the nearest name; --resume False is
    false"""
    assert trainer.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert parse(trainer.Config, ["--resume", "False"]).resume is False  # not, as with bool("False"), true


@pytest.mark.parametrize("flag", ["out", "data", "task", "init"])
@pytest.mark.parametrize("bad", ["\x1b[2J", "\x07", "\x9b31m", "\u202e"])
def test_row_68_control_sequences_in_flags(flag, bad, capsys):
    """R | a control sequence in a flag, such as the name of a file or folder | refused and shown as its
    escape; what a terminal obeys would be in every message that names the file"""
    assert train_sft.main([f"--{flag}", f"a{bad}b"]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and f"--{flag} a{visible(bad)}b: has a control character" in err
    assert bad not in out + err
    assert parse(sample.Config, ["--prompt", bad]).prompt == bad  # text for the model; it is shown as escapes
    assert parse(train_sft.Config, ["--out", "a\udcff"]).out == "a\udcff"  # a folder named in latin-1


@pytest.mark.parametrize("answer", ["(", "a{99999999999999999999}", "(?:" * 5000 + ")" * 5000], ids=range(3))
def test_answer_that_is_no_pattern(answer, capsys):
    assert run_cli(evaluate.Config, None, "", ["--answer", answer]) == 2
    assert "not a regular expression" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@EACH
def test_row_36_no_gpu(trainer, run, refuse, tmp_path, monkeypatch):
    """R | --device cuda without a GPU; no Triton, bfloat16 on a CPU | refused; torch's kernels are used"""
    refuse(trainer, dict(device="cuda"), "--device cuda: this torch sees no such GPU; use cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run(trainer, dtype="bfloat16", steps=2).status == 0
