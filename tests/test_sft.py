"""SFT: its loss and gradient against float64, what counts in it, what it learns, what it reads."""

import copy
import csv

import pytest
import torch
from helpers import STYLES, tiny
from stages import words
from test_tokenizer import CHATML, TALK, folder_of

import train_sft
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import UserError
from nanorlhf.hub import tokenizer_files
from nanorlhf.hub.files import write_jsonl
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run.device import lr_at
from nanorlhf.tokenizer import Chat, Tokenizer

pytestmark = pytest.mark.usefixtures("no_curves")
TOK = Tokenizer.from_chars("ab=")  # ids 0, 1, 2; EOS is 3, pad is 4
PAIRS = [([0, 1, 2], [1, 0, 3]), ([1, 2], [3]), ([0, 3, 4, 2], [1, 3])]  # the last prompt holds EOS and pad
ROWS = [(p + r, [False] * len(p) + [True] * len(r)) for p, r in PAIRS]


def oracle(model, rows, on_prompt=False):
    """Loss and gradients in float64: each row alone and unpadded, log_softmax over its full logits."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    total, n = 0.0, 0
    for ids, mask in rows:
        logp = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if on_prompt or mask[t]:
                total, n = total - logp[t - 1, ids[t]], n + 1
    (total / n).backward()
    return (total / n).item(), [p.grad for p in model.parameters()]


def close(gradients, exact):
    scale = max(g.abs().max() for g in exact)
    return all((g - e).abs().max() < 1e-5 * scale for g, e in zip(gradients, exact, strict=True))


# what is counted


@pytest.mark.parametrize("on_prompt", [False, True])
def test_loss_and_gradient_are_those_of_float64(on_prompt):
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(TOK.vocab_size, n_layer=1, n_head=2, d_model=16, max_len=8))
    tokens, mask = train_sft.pad_demonstrations(ROWS, TOK, "cpu", on_prompt)
    loss = train_sft.sft_loss(model.logprobs(tokens, mask)[0], mask, mask.sum())
    loss.backward()
    exact, gradients = oracle(model, ROWS, on_prompt)
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    assert close([p.grad for p in model.parameters()], gradients)
    other, _ = oracle(model, ROWS, not on_prompt)
    assert abs(other - exact) > 0.01  # the two ways of counting are told apart


def test_mask_comes_from_lengths():
    """The response with its EOS counts and nothing else, though the third prompt holds EOS and pad ids."""
    tokens, mask = train_sft.pad_demonstrations(ROWS, TOK, "cpu")
    assert tokens.tolist() == [[0, 1, 2, 1, 0, 3], [1, 2, 3, 4, 4, 4], [0, 3, 4, 2, 1, 3]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    _, mask = train_sft.pad_demonstrations(ROWS, TOK, "cpu", loss_on_prompt=True)
    assert mask.int().tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("budget", [0, 64, 1])
def test_step_is_one_step_however_it_is_cut(budget, pack, stages, tmp_path, gradients, spy):
    """Every step takes all rows and hardly moves, so each gradient must be the oracle's: the denominator is
    the whole step's, no row comes twice or is left out, and the step before it is forgotten."""
    rows = words(20) + [{"prompt": "abcdef=", "response": r} for r in ("", "a", "fedcba")]
    rows += [{"prompt": "a=", "response": r} for r in ("", "b", "ca")]  # ragged
    rows = [r for r in rows if not tasks.held_out(r["prompt"])]
    write_jsonl(tmp_path / "d.jsonl", rows)
    flags = dict(data=f"{tmp_path}/d.jsonl", batch_size=len(rows), steps=2, lr=1e-12)
    packed, flags = spy(train_sft, "pack"), flags | dict(tokens_per_microbatch=budget, pack=pack)
    train_sft.train(stages.config(train_sft, tmp_path / "run", **flags))
    assert len(packed) == 2 * pack and all(len(used) < len(rows) for _, (_, _, used, _) in packed)
    model, tok = hub.load(tmp_path / "run" / "model")
    _, exact = oracle(model, train_sft.encode_demonstrations(rows, tok, 16))
    assert len(gradients) == 2 and all(close(step, exact) for step in gradients)


@pytest.mark.parametrize("budget", [0, 20])
@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_packing_moves_nothing(style, on_prompt, budget):
    """Loss and gradient of a step, in float64, with rows packed and not."""
    model, found = tiny(style, dtype=torch.float64, n_layer=1), []
    rows = [(x[:n], y[:n]) for x, y in 3 * ROWS for n in range(3, 7)]
    tokens, mask = train_sft.pad_demonstrations(rows, TOK, "cpu", on_prompt)
    batch = dict(tokens=tokens, mask=mask, lengths=torch.tensor([len(x) for x, _ in rows]), denom=mask.sum())
    for pack in (False, True):
        model.zero_grad()
        cfg = train_sft.Config(pack=pack, tokens_per_microbatch=budget)
        found.append([torch.tensor(train_sft.gradient(model, batch, cfg)["loss"]).double()])
        found[-1] += [p.grad.clone() for p in model.parameters()]
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() < 1e-9


def test_a_packed_run_is_the_run(stages, tmp_path):
    """Six steps on ragged rows with and without: every figure but those of time."""
    rows = [r | {"response": r["response"] * (i % 3)} for i, r in enumerate(words(64))]
    write_jsonl(tmp_path / "d.jsonl", rows)
    runs = []
    for pack in (False, True):
        flags = dict(data=f"{tmp_path}/d.jsonl", pack=pack, eval_every=3)
        train_sft.train(stages.config(train_sft, tmp_path / f"{pack}", **flags))
        with open(tmp_path / f"{pack}/metrics.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        runs.append([{k: float(r[k] or 0) for k in r if k not in ("tok_s", "s")} for r in rows])
    assert len(runs[0]) == 6
    for a, b in zip(*runs, strict=True):
        assert b == pytest.approx(a, abs=1e-5, rel=1e-5)


def test_batches_follow_seed_and_step_alone(stages, tmp_path, monkeypatch):
    """Neither the global generators nor anything else that changes between two runs can move the order."""
    build = train_sft.pad_demonstrations

    def order(name, **flags):
        batches = []

        def record(rows, *args):
            batches.append(rows)
            torch.rand(len(name))  # a different number of draws in every run
            return build(rows, *args)

        monkeypatch.setattr(train_sft, "pad_demonstrations", record)
        train_sft.train(stages.config(train_sft, tmp_path / name, **flags))
        return batches[:6]

    first = order("a")
    assert first == order("aaa", lr=1e-5, tokens_per_microbatch=7, save_every=0) != order("b", seed=1)
    assert len({str(batch) for batch in first}) == 6


# learning


@pytest.mark.parametrize("sign, low, high", [(1, 0.9, 1.0), (-1, 0.0, 0.02)])
def test_learns_a_rule_that_depends_on_the_prompt(sign, low, high, tmp_path, monkeypatch, stages):
    """Reverses three letters in new words, greedily; with the loss's sign flipped it must not."""
    write_jsonl(tmp_path / "d.jsonl", words(1000))
    if sign < 0:
        right = train_sft.sft_loss
        monkeypatch.setattr(train_sft, "sft_loss", lambda *args: -right(*args))
    flags = dict(data=f"{tmp_path}/d.jsonl", steps=100, batch_size=64, save_every=0, eval_every=0)
    train_sft.train(stages.config(train_sft, tmp_path / "run", **flags))
    model, tok = hub.load(tmp_path / "run" / "model")
    new = [r for r in words(600, seed=1) if tasks.held_out(r["prompt"])]
    _, texts = generate.respond(model, tok, [r["prompt"] for r in new], 1, 5, temperature=0.0)
    accuracy = sum(text == r["response"] for text, r in zip(texts, new)) / len(new)
    assert len(new) > 50 and low <= accuracy <= high


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    assert [lr_at(s, 40, 1.0) for s in (0, 1, 20, 40)] == pytest.approx([0.5, 0.9775, 0.55, 0.1])
    assert [lr_at(s, 1, 2.0) for s in (0,)] == [2.0]


# what it reads and leaves


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("kind, vocab", [("bytes", 258), ("chars", 9), ("bpe", 267)])
def test_new_models_of_every_kind(arch, kind, vocab, stages, tmp_path):
    """a … f and = are 7 characters; bpe stops at the ranks asked for; EOS and pad are 2 ids more."""
    flags = dict(arch=arch, tokenizer=kind, vocab_size=265, steps=1)
    last = train_sft.train(stages.config(train_sft, tmp_path / "run", **flags))
    model, tok = hub.load(tmp_path / "run" / "model")
    cfg = model.cfg
    assert (tok.kind, tok.vocab_size, cfg.vocab_size) == (kind, vocab, vocab)
    assert cfg.norm == {"gpt2": "layer", "llama": "rms"}[arch]
    assert (cfg.n_layer, cfg.n_head, cfg.d_model, cfg.max_len) == (1, 2, 32, 16)
    rows = [r for r in words(64) if tasks.held_out(r["prompt"])]
    loss, _ = oracle(model, train_sft.encode_demonstrations(rows, tok, 16))
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_init_goes_on_from_a_model(stages, tmp_path):
    """Weights and vocabulary are those of --init; the flags of a new model do not count."""
    init = f"{stages.folder}/sft/model"
    flags = dict(init=init, arch="llama", d_model=64, tokenizer="bytes", lr=1e-12, steps=1)
    train_sft.train(stages.config(train_sft, tmp_path / "run", **flags))
    (old, old_tok), (new, new_tok) = (hub.load(f) for f in (init, tmp_path / "run" / "model"))
    assert new.cfg == old.cfg and new_tok == old_tok
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(old.parameters(), new.parameters()))


def test_builtin_task_ends_with_sampled_and_greedy_accuracy(tmp_path, capsys):
    flags = dict(task="chain", demos=64, steps=1, batch_size=8, d_model=32, eval_every=0)
    last = train_sft.train(train_sft.Config(out=str(tmp_path / "run"), **flags))
    assert 0 <= last["eval/reward"] <= 1 and 0 <= last["eval/greedy"] <= 1
    assert "phase transition" in capsys.readouterr().out  # the gate says at once that RL would be in vain


def test_conversations_by_the_template_of_a_folder(stages, tmp_path, gradients):
    """A folder's own tokenizer and template, saved with the model; every answer of a dialogue counts."""
    tok = tokenizer_files.load(folder_of("qwen", tmp_path / "tok", {"chat_template": CHATML}))
    model = GPT(GPTConfig.llama(tok.vocab_size, n_layer=1, n_head=2, d_model=16, max_len=128))
    hub.save(model, tok, tmp_path / "init")
    talks = [[dict(TALK[0], content=f"{n}+{n}?"), *TALK[1:]] for n in range(12)]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": talk} for talk in talks])
    rows = [r for talk in talks if not tasks.held_out(Chat(talk[:-1])) for r in tok.encode_chat(talk)]
    flags = dict(data=f"{tmp_path}/d.jsonl", init=f"{tmp_path}/init", steps=1, batch_size=len(rows), lr=1e-12)
    train_sft.train(stages.config(train_sft, tmp_path / "run", **flags))
    assert close(gradients[0], oracle(model, rows)[1]) and sum(map(sum, (m for _, m in rows))) > 100
    again = hub.load(tmp_path / "run/model")[1]
    assert again == tok and again.template.text == CHATML and again.source == tok.source


def test_too_long_demonstrations_are_dropped_and_counted(capsys):
    rows = [{"prompt": "ab=", "response": "a" * n} for n in (0, 2, 3, 9)]
    kept = train_sft.encode_demonstrations(rows, TOK, 6)
    assert [len(ids) for ids, _ in kept] == [4, 6]  # EOS needs room as well
    assert "dropped 2 of 4 demonstrations: longer than the context of 6" in capsys.readouterr().out
    assert train_sft.encode_demonstrations([], TOK, 6) == []


@pytest.mark.parametrize(
    "rows, flags, says",
    [
        (words(20), dict(max_len=4), r"all \d+ demonstrations are longer than the context of 4 tokens"),
        ([{"prompt": "bed=", "response": ""}], {}, "every prompt falls into the held-out 15%"),
        (words(9) + [{"prompt": "ab="}], {}, 'jsonl:10: missing key "response"'),
        (words(9) + [{"prompt": " ", "response": ""}], {}, 'jsonl:10: "prompt" is empty'),
        (words(9) + [{"prompt": "xyz=", "response": ""}], dict(init="sft"), "jsonl:10: .*character 'x'"),
        (words(9), dict(init="rm"), "is a reward model, must be a language model"),
        (words(9), dict(init="nothing"), "nothing/model does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_named(rows, flags, says, stages, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", rows)
    if "init" in flags:
        flags = {"init": f"{stages.folder}/{flags['init']}/model"}
    with pytest.raises(UserError, match=says):
        train_sft.train(stages.config(train_sft, tmp_path / "run", data=f"{tmp_path}/d.jsonl", **flags))
    assert not (tmp_path / "run").exists()


def test_one_row_a_step_with_the_columns_of_the_contract(stages, tmp_path):
    train_sft.train(stages.config(train_sft, tmp_path / "run", eval_every=3))
    with open(tmp_path / "run" / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == train_sft.COLUMNS and [int(r["step"]) for r in rows] == list(range(6))
    assert [bool(r["eval/loss"]) for r in rows] == [False, False, True] * 2


def test_held_out_loss_is_that_of_all_rows():
    """More rows than one forward pass takes, the last ones longer: the mean is over the tokens of all."""
    model = tiny(vocab_size=TOK.vocab_size)
    rows = [ROWS[i % 2] for i in range(66)] + 3 * [ROWS[2]]
    found = train_sft.held_out_loss(model, rows, TOK, train_sft.Config())
    assert found == pytest.approx(oracle(model, rows)[0], rel=1e-5)


def test_weight_decay_is_on_matrices_only(stages, tmp_path):
    """One step with and without: biases and norms come out the same, every matrix is shorter."""
    models = []
    for decay in (0.0, 0.5):
        out = tmp_path / str(decay)
        train_sft.train(stages.config(train_sft, out, steps=1, weight_decay=decay))
        models.append(dict(hub.load(out / "model")[0].named_parameters()))
    for name, p in models[0].items():
        assert torch.equal(p, models[1][name]) == (p.dim() == 1), name
        assert p.dim() == 1 or models[1][name].norm() < p.norm(), name
