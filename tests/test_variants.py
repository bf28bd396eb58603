"""variants/: every method fits its trainer, computes its golden vectors and trains; and the command line.

    python tests/test_variants.py --update      write the table of docs/variants.md anew
"""

import csv
import difflib
import importlib
import importlib.util
import json
import linecache
import math
import re
import shutil
import sys
import traceback
import typing
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # --update runs this file as a script

import stages as st  # noqa: E402
import test_style  # noqa: E402
from helpers import tiny  # noqa: E402

import train_prm  # noqa: E402
import variants  # noqa: E402
from nanorlhf import hub, pairs  # noqa: E402
from nanorlhf.errors import UserError  # noqa: E402
from nanorlhf.hub.files import read_jsonl  # noqa: E402
from nanorlhf.run import cli, replay  # noqa: E402
from variants import main  # noqa: E402

PAGE = variants.ROOT / "docs/variants.md"
EACH = pytest.mark.parametrize("name", variants.NAMES)
SAME_FORMULA = {"prm_soft"}  # the trainer's loss is right for soft labels, it only refuses to read them


def golden(name):
    return json.loads((variants.ROOT / f"variants/golden/{name}.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------------------
# Each method


@EACH
def test_fits_its_trainer(name):
    """Each old text occurs once in the trainer as it is, the result is Python, and few lines are new."""
    method = variants.method(name)
    source = (variants.ROOT / method.TRAINER).read_text("utf-8")
    for old, new in method.CHANGES:
        assert source.count(old) == 1, old
        assert old.endswith("\n") and (new.endswith("\n") or not new), "a change is of whole lines"
    compile(variants.named(name), name, "exec")
    assert 0 < new_lines(name) <= 15
    assert 'variant: Literal["' + name in variants.named(name)


@EACH
def test_docstring(name):
    """The first line has title and paper, a formula follows, and a sentence says when the method helps."""
    doc = variants.method(name).__doc__
    assert re.fullmatch(r".+ \([^()]+\)\.", doc.splitlines()[0])
    assert re.search(r"^    .*=", doc, re.M) and "When it helps: " in doc


def new_lines(name):
    """Lines of the changed trainer that the trainer has not."""
    source, changed = variants.sources(name)
    return sum(line.startswith("+ ") for line in difflib.ndiff(source.splitlines(), changed.splitlines()))


def tensor(value):
    """Nested lists of a JSON file → a tensor, numbers with a point in float64; other values stay."""
    if not isinstance(value, list):
        return value
    x = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if x.is_floating_point() else x


def close(x, expected, tol=1e-6):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert x.shape == expected.shape
    assert (x.double() - expected).abs().max() <= tol


def outcome(trainer, call):
    """A call of a golden file → its value, a tensor, and its inputs.

    A call has: function, inputs {parameter: nested list or plain value} or plain (lists stay lists), config
    {flag: value} if the function takes a cfg, gradient {parameter: nested list} of the value's sum, and
    value, of a tuple the first, or values, one of each in the tuple.
    """
    inputs = {key: tensor(value) for key, value in call.get("inputs", {}).items()} | call.get("plain", {})
    for key in call["gradient"]:
        inputs[key].requires_grad_()
    if "config" in call:
        inputs["cfg"] = trainer.Config(**call["config"])
    value = getattr(trainer, call["function"])(**inputs)
    if "values" in call:
        return torch.stack(value), inputs
    return torch.as_tensor(value[0] if isinstance(value, tuple) else value), inputs


@EACH
def test_golden(name):
    """Value and gradient are those of the published code, or of the reference, that the file names."""
    found = golden(name)
    assert variants.method(name).GOLDEN in found["origin"] and found["calls"]
    for call in found["calls"]:
        value, inputs = outcome(variants.load(name), call)
        close(value.detach(), call["values"] if "values" in call else call["value"])
        if call["gradient"]:
            value.sum().backward()
        for key, expected in call["gradient"].items():
            close(inputs[key].grad, expected)


@pytest.mark.parametrize("name", [name for name in variants.NAMES if name not in SAME_FORMULA])
def test_golden_is_not_the_trainers(name):
    """The trainer as it is does not compute the golden vectors, or lacks the function or a parameter."""
    trainer = importlib.import_module(variants.method(name).TRAINER.removesuffix(".py"))
    differs = False
    for call in golden(name)["calls"]:
        try:
            value, _ = outcome(trainer, call)
            close(value.detach(), call["values"] if "values" in call else call["value"])
        except (AttributeError, TypeError, AssertionError, UserError):
            differs = True
    assert differs


def has_a(prompt, response):
    return float("a" in response)


def begins_with_b(prompt, response):
    return float(response[:1] == "b")


def flags(name, stages, out, **more):
    """The flags of a smoke run; some methods need data of their own, or would not come to their lines."""
    trainer = importlib.import_module(variants.method(name).TRAINER.removesuffix(".py"))
    own = {}
    if trainer is train_prm:
        rows = [row | {"labels": [0.25 if name == "prm_soft" else 1]} for row in st.words(64)]
        own["data"] = st.jsonl(out.parent / "own.jsonl", rows)
    if name == "rm_margin":
        rows = [row | {"margin": 0.5} for row in st.rows_of(st.train_rm)]
        own["data"] = st.jsonl(out.parent / "own.jsonl", rows)
    if name == "odpo":
        own = dict(online=1, rm=f"{stages.folder}/rm/model", pairs=8)
    if name in ("gdpo", "maxrl", "pass_at_k"):  # of rewards of 0 or 1, or of several functions
        own = dict(rm="", reward=[f"{__file__}:has_a", f"{__file__}:begins_with_b*2"][: 1 + (name == "gdpo")])
    return stages.flags(trainer, out, **dict(steps=2, save_every=0) | own | more)


@EACH
def test_trains(name, stages, tmp_path, no_curves):
    """Two steps; config.json says which method it was."""
    trainer = variants.load(name)
    trainer.train(trainer.Config(**flags(name, stages, tmp_path / "run")))
    assert json.loads((tmp_path / "run/config.json").read_text())["variant"] == name


# ------------------------------------------------------------------------------------------------------------
# The machinery


def test_at_most_60_lines():
    files = [variants.ROOT / f"variants/{name}.py" for name in ("__init__", "__main__")]
    assert test_style.total(files)["lines"] <= 60


def test_a_trainer_that_has_changed_is_refused(tmp_path, monkeypatch):
    """One changed character in a replaced line is enough; the message has the file and the line."""
    (tmp_path / "variants").mkdir()
    shutil.copy(variants.ROOT / "variants/dpo_length_norm.py", tmp_path / "variants")
    source = (variants.ROOT / "train_dpo.py").read_text("utf-8")
    (tmp_path / "train_dpo.py").write_text(source.replace("h_w = logp_w - ref_w", "h_w = logp_w - ref_w + 0"))
    monkeypatch.setattr(variants, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"dpo_length_norm.py: train_dpo.py holds these lines 0 times.*h_w ="):
        variants.sources("dpo_length_norm")


def test_every_trainer_can_have_the_flag(monkeypatch):
    """Which stands in config.json and takes no other value."""
    for trainer in variants.ROOT.glob("train_*.py"):
        text = trainer.read_text("utf-8")
        monkeypatch.setattr(variants, "sources", lambda name, text=text: (text, text))
        source = variants.named("tis")
        compile(source, "tis", "exec")
        assert source.count(variants.FLAG.format(name="tis")) == 1
        assert re.search(r"^from typing import .*Literal$", source, re.M)


def test_folder_and_checkpoint_say_the_variant(stages, tmp_path, no_curves, capsys):
    """runs/reviews-NAME by default; trainer and variant refuse to resume each other's runs."""
    trainer = variants.load("dpo_length_norm")
    assert trainer.Config().out == "runs/reviews-dpo_length_norm"
    assert trainer.Config(data="a/b.jsonl").out == "runs/b-dpo_length_norm"
    assert trainer.Config(out="here").out == "here"
    run = tmp_path / "run"
    trainer.train(trainer.Config(**flags("dpo_length_norm", stages, run)))
    with pytest.raises(UserError, match="is a run of train_dpo_dpo_length_norm.py"):
        st.train_dpo.train(stages.config(st.train_dpo, run, resume=True))
    plain = tmp_path / "plain"
    st.train_dpo.train(stages.config(st.train_dpo, plain, steps=2))
    with pytest.raises(UserError, match="is a run of train_dpo.py"):
        trainer.train(trainer.Config(**flags("dpo_length_norm", stages, plain, resume=True)))
    trainer.train(trainer.Config(**flags("dpo_length_norm", stages, run, resume=True, steps=3)))
    assert "from step 2" in capsys.readouterr().out


def test_a_bad_step_of_a_variant_can_be_replayed(stages, tmp_path, no_curves):
    trainer = variants.load("dpo_length_norm")
    cfg = trainer.Config(**flags("dpo_length_norm", stages, tmp_path / "run", lr=1e30))
    with pytest.raises(Exception, match="bad-step"):
        trainer.train(cfg)
    module, models, batch, cfg = replay.load(next((tmp_path / "run").glob("bad-step-*.pt")))
    assert module is trainer and cfg.variant == "dpo_length_norm"


def test_traceback_shows_the_changed_lines():
    trainer = variants.load("dpo_length_norm")
    try:
        trainer.preference_loss(*torch.zeros(4, 1), beta=1.0)
    except TypeError as error:
        text = "".join(traceback.format_exception(error))
    assert "h_w = (logp_w - ref_w) / len_w" in text and "train_dpo_dpo_length_norm.py" in text
    linecache.checkcache()
    assert linecache.getline(trainer.__file__, 1)


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_list(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main([]) == 0
    out = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index("dpo_length_norm, train_dpo.py")
    assert lines[at + 1].startswith("  Length-normalised DPO") and lines[at + 2] == "  (arXiv 2411.15124)."
    assert all(f"\n{name}" in out for name in variants.NAMES)


def test_diff_is_coloured_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main(["dpo_length_norm"]) == 0
    out = capsys.readouterr().out
    assert "-        h_w = logp_w - ref_w\n" in out and "\033" not in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["dpo_length_norm"]) == 0
    out = capsys.readouterr().out
    assert "\033[31m-        h_w = logp_w - ref_w\033[0m\n" in out
    assert "\033[32m+        h_w = (logp_w - ref_w) / len_w\033[0m\n" in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("dpo_lenght_norm", "the nearest: dpo_length_norm"),
        ("zzz run", "python -m variants lists them"),
        ("dpo_length_norm exprot a.py", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export a b", "must be run FLAGS or export FILE"),
        ("dpo_length_norm export no/such/folder.py", "No such file or directory"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error and message in error


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--stps=3", "did you mean --steps"),
        ("--variant=other", "must be one of dpo_length_norm"),
        ("--loss=simpo", "--loss simpo: must be one of dpo, cdpo"),
    ],
)
def test_mistakes_in_flags_are_one_line(flag, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    with pytest.raises(SystemExit) as end:
        main(["dpo_length_norm", "run", flag])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("-m variants dpo_length_norm run: error: ") and message in error


def test_run(stages, tmp_path, no_curves, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    argv = [f"--{key}={value}" for key, value in flags("dpo_length_norm", stages, tmp_path / "run").items()]
    with pytest.raises(SystemExit) as end:
        main(["dpo_length_norm", "run", *argv])
    assert end.value.code == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["variant"] == "dpo_length_norm"


def test_help_has_all_flags(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["variants"])
    with pytest.raises(SystemExit):
        main(["dpo_length_norm", "run", "--help"])
    out = capsys.readouterr().out
    assert "usage: python -m variants dpo_length_norm run" in out
    assert "--variant" in out and "the method of variants/" in out and "--beta" in out


def test_export(tmp_path, capsys, monkeypatch):
    """The file is the changed trainer and can be imported; nothing is overwritten."""
    monkeypatch.setattr("sys.argv", ["variants"])
    file = tmp_path / "fork.py"
    assert main(["dpo_length_norm", "export", str(file)]) == 0
    assert file.read_text("utf-8") == variants.named("dpo_length_norm")
    monkeypatch.syspath_prepend(tmp_path)
    import fork

    assert fork.Config().out == "runs/reviews-dpo_length_norm"
    before = file.read_bytes()
    assert main(["dpo_length_norm", "export", str(file)]) == 2
    assert "File exists" in capsys.readouterr().err and file.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# What golden vectors cannot show


def test_wpo_weight_is_aligned_by_the_sum_of_squares():
    """The log-probs at temperature ½ give log π(y_t) − log Σ_v π(v)² of every token: from all logits."""
    trainer = variants.load("wpo")
    model = tiny(dtype=torch.float64)
    example = pairs.Example([1, 2], [3, 4, 5, 0], [6, 0])
    logp = trainer.pair_logps(model, [example])
    sharp = trainer.pair_logps(model, [example], temperature=0.5)
    for side, response in enumerate((example.first, example.second)):
        tokens = torch.tensor([example.prompt + response])
        log_pi = model.head_logits(model(tokens)).double().log_softmax(-1)[0, 1:-1]  # of the response
        squares = (2 * log_pi).logsumexp(-1)
        aligned = log_pi.gather(1, torch.tensor(response)[:, None])[:, 0] - squares
        close(sharp[0, side] - logp[0, side], aligned.sum().item(), 1e-5)


def test_odpo_trains_with_the_difference_of_the_scores(stages, tmp_path, no_curves, monkeypatch):
    """The offset of each pair is α log of what the reward model's scores of the two differ by."""
    trainer = variants.load("odpo")
    loss = trainer.preference_loss
    seen = {}

    def record(logp_w, logp_l, ref_w, ref_l, beta, *rest, offset, **more):
        seen.update(zip(ref_w.tolist(), offset.tolist()))
        return loss(logp_w, logp_l, ref_w, ref_l, beta, *rest, offset=offset, **more)

    monkeypatch.setattr(trainer, "preference_loss", record)
    run = tmp_path / "run"
    cfg = trainer.Config(**flags("odpo", stages, run, offset=0.5, steps=2, batch_size=32, pairs=16))
    trainer.train(cfg)
    ref, _ = hub.load(f"{stages.folder}/sft/model")
    rows = read_jsonl(run / "pairs-round-0.jsonl", pairs.KEYS)
    assert len(rows) > 4
    for row in rows:
        prompt, best, worst = row["ids"]
        logp = trainer.pair_logps(ref, [pairs.Example(prompt, best, worst)])[0, 0].item()
        offset = next(value for key, value in seen.items() if math.isclose(key, logp, abs_tol=1e-4))
        assert offset == pytest.approx(0.5 * math.log(row["margin"]), abs=1e-5)


@pytest.mark.parametrize("name", "apo_down apo_zero bco_pair discopop exo_pair nca_pair sppo_hard".split())
def test_a_loss_of_pairs_has_no_other_loss_and_no_smoothing(name):
    """--loss ipo would train without the method; only EXO has smoothed labels, and needs them."""
    trainer = variants.load(name)
    with pytest.raises(UserError, match="--loss ipo: must be one of dpo"):
        cli.parse(trainer.Config, ["--loss", "ipo"])
    wrong = 0.0 if name == "exo_pair" else 0.1
    with pytest.raises(UserError, match="--label_smoothing"):
        trainer.Config(label_smoothing=wrong)
    assert trainer.Config().label_smoothing == (0.001 if name == "exo_pair" else 0.0)


def test_odpo_needs_scores():
    trainer = variants.load("odpo")
    for wrong in ({}, {"online": 3, "judge": "self"}, {"online": 3, "loss": "ipo"}):
        with pytest.raises(UserError, match="the offset needs --loss dpo, --online 3"):
            trainer.Config(**wrong)
    assert trainer.Config(online=3).rm == "runs/reviews-rm/model"


def test_margins_are_those_of_the_rows(stages, tmp_path, no_curves, spy):
    """Every pair has its own margin, in whatever order and micro-batches the rows come."""
    trainer = variants.load("rm_margin")
    calls = spy(trainer, "pairwise_loss")
    rows = [row | {"margin": i / 8} for i, row in enumerate(st.rows_of(st.train_rm))]
    data = st.jsonl(tmp_path / "margins.jsonl", rows)
    spied = spy(trainer, "pair_rewards")
    cfg = trainer.Config(**flags("rm_margin", stages, tmp_path / "run", data=data, tokens_per_microbatch=64))
    trainer.train(cfg)
    model, tok = trainer.load_model(cfg, torch.device("cpu"))
    by_text = {(row["prompt"], row["chosen"], row["rejected"]): row["margin"] for row in rows}
    assert len(calls) == len(spied) > 4
    for (args, _), ((_, encoded), _) in zip(calls, spied):
        margins = []
        for prompt, chosen, rejected in encoded:
            texts = tok.decode(prompt), tok.decode(chosen[:-1]), tok.decode(rejected[:-1])
            margins.append(by_text[texts])
        assert args[2].tolist() == margins


def test_margins_must_be_there(stages, tmp_path, no_curves):
    """A row without one is named."""
    trainer = variants.load("rm_margin")
    rows = [row | {"margin": 1.0} for row in st.rows_of(st.train_rm)]
    del rows[5]["margin"]
    data = st.jsonl(tmp_path / "margins.jsonl", rows)
    with pytest.raises(UserError, match='margins.jsonl:6: needs "margin", a number'):
        trainer.train(trainer.Config(**flags("rm_margin", stages, tmp_path / "run", data=data)))


def test_soft_labels_are_read_and_others_refused(stages, tmp_path, no_curves):
    """0.25 trains; the trainer itself refuses it, and the variant refuses 1.5 and a text."""
    trainer = variants.load("prm_soft")
    for label in (1.5, -0.5, "1"):
        rows = [row | {"labels": [label]} for row in st.words(64)]
        data = st.jsonl(tmp_path / "labels.jsonl", rows)
        with pytest.raises(UserError, match="a number from 0 to 1, or null, for each of 1 steps"):
            trainer.train(trainer.Config(**flags("prm_soft", stages, tmp_path / "run", data=data)))
    data = st.jsonl(tmp_path / "labels.jsonl", [row | {"labels": [0.25]} for row in st.words(64)])
    with pytest.raises(UserError, match="expected 1 of 1, 0, null"):
        train_prm.train(train_prm.Config(**flags("prm_soft", stages, tmp_path / "plain", data=data)))


def choices(Config, flag):
    kind = Config.__dataclass_fields__[flag].type
    if type(None) in typing.get_args(kind):  # Literal[...] | None
        kind = typing.get_args(kind)[0]
    return set(typing.get_args(kind))


def narrowed():
    """The flags of which a method takes fewer values than its trainer, as pairs (method, flag)."""
    for name in variants.NAMES:
        source = variants.method(name).CHANGES
        for flag in ("loss", "norm", "ratio"):
            if any(new.startswith(f"    {flag}: Literal[") for _, new in source):
                yield name, flag


@pytest.mark.parametrize("name, flag", list(narrowed()))
def test_a_flag_that_leads_past_the_new_lines_is_refused(name, flag):
    """`sapo run --loss cispo` would train CISPO, in a folder that says SAPO; so would a recipe's cispo."""
    trainer = variants.load(name)
    plain = importlib.import_module(variants.method(name).TRAINER.removesuffix(".py"))
    takes = choices(trainer.Config, flag)
    refused = choices(plain.Config, flag) - takes
    assert takes and refused
    for value in refused:
        with pytest.raises(UserError, match=f"--{flag} {value}: must be one of"):
            trainer.Config(**{flag: value})


def test_a_recipe_cannot_lead_past_the_new_lines():
    with pytest.raises(UserError, match="--loss cispo: must be one of clip"):
        variants.load("sapo").Config(recipe="cispo")


def test_the_policy_stands_still_while_the_critic_learns(stages, tmp_path, no_curves):
    """In the first critic_steps of value_pretraining; afterwards it moves."""
    trainer = variants.load("value_pretraining")
    start, _ = hub.load(f"{stages.folder}/sft/model")
    moved = {}
    for steps in (2, 3):
        run = tmp_path / str(steps)
        trainer.train(trainer.Config(**flags("value_pretraining", stages, run, steps=steps, critic_steps=2)))
        policy, _ = hub.load(run / "model")
        moved[steps] = any(not torch.equal(a, b) for a, b in zip(start.parameters(), policy.parameters()))
    assert moved == {2: False, 3: True}
    critics = [hub.load(tmp_path / "2" / name)[0] for name in ("critic", "model")]
    assert not torch.equal(critics[0].trunk.wte.weight, critics[1].wte.weight)


def test_right_answers_are_imitated(stages, tmp_path, no_curves, spy):
    """Those with a score above 0: their tokens and no others; n_right is the optimizer step's."""
    trainer = variants.load("positive_nll")
    steps = spy(trainer, "gradient")
    calls = spy(trainer, "positive_loss")
    data = st.jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{a}{b}="} for a in "abcdef" for b in "abcdef"])
    own = dict(data=data, rm="", reward=["tests/test_variants.py:short"], tokens_per_microbatch=32)
    out = trainer.train(trainer.Config(**flags("positive_nll", stages, tmp_path / "run", **own)))
    assert sum(right.sum() for (_, right, _), _ in calls) == sum(args[2]["n_right"] for args, _ in steps) > 0
    for i, row in enumerate(out.rows):
        answers = 0
        for args, _ in steps[2 * i : 2 * i + 2]:  # the two minibatches of the step
            batch = args[2]
            rows = batch["right"].any(1)
            assert torch.equal(batch["right"], batch["mask"].bool() & rows[:, None])
            assert batch["n_right"] == batch["right"].sum()
            answers += int(rows.sum())
        assert answers == round(8 * row["reward"])


def short(prompt, response):
    """A reward: 1 for at most one letter, behind the prompt of three."""
    return float(len(response) <= 1)


def test_plain_reinforce_pp_takes_single_samples(stages, tmp_path, no_curves):
    """A group of one has no baseline, which this method does not need; the KL is in every token's reward."""
    trainer = variants.load("reinforce_pp")
    trainer.train(trainer.Config(**flags("reinforce_pp", stages, tmp_path / "run", group_size=1)))
    cfg = trainer.Config()
    assert (cfg.kl, cfg.kl_in, cfg.beta) == ("k1", "reward", 0.01)


# ------------------------------------------------------------------------------------------------------------
# docs/variants.md


def variant_runs(monkeypatch):
    """The module bench/variant_runs.py."""
    monkeypatch.syspath_prepend(variants.ROOT / "bench")
    spec = importlib.util.spec_from_file_location("variant_runs", variants.ROOT / "bench/variant_runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(monkeypatch):
    """The rows of the page's table, from the files of the folder and from the CSVs."""
    runs = variant_runs(monkeypatch)
    chain = runs.cells("chain")
    countdown = runs.cells("countdown")
    rows = []
    for name in sorted(variants.NAMES, key=lambda name: (variants.method(name).TRAINER, name)):
        method = variants.method(name)
        title, _, paper = method.__doc__.splitlines()[0].rpartition(" (")
        helps = " ".join(method.__doc__.partition("When it helps: ")[2].split()).replace("|", "\\|")
        first = re.match(r".*?\.(?=\s[A-Z]|$)", helps)[0]
        cells = [
            f"[`{name}`](../variants/{name}.py)",
            title.replace("|", "\\|"),
            paper.rstrip(")."),
            f"`{method.TRAINER}`",
            str(new_lines(name)),
            first,
            method.GOLDEN,
            chain.get(name, ""),
            countdown.get(name, ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_a_method_is_compared_with_runs_of_the_same_flags_and_seeds(monkeypatch, tmp_path):
    """Three pairs with the differences 1, 2 and 3 points: 2 ± 4.303/√3, whatever the seed's level."""
    runs = variant_runs(monkeypatch)
    jobs = {"reinforce_pp": ("reinforce_pp", "--kl none"), "grpo": ("grpo", "")}
    jobs |= {"ppo_dual_clip": ("ppo_dual_clip", "--epochs 4"), "ppo": ("ppo", "--epochs 4")}
    assert runs.pairs_of(["reinforce_pp"]) == {"reinforce_pp": (jobs["reinforce_pp"], jobs["grpo"])}
    assert runs.pairs_of(["ppo_dual_clip"]) == {"ppo_dual_clip": (jobs["ppo_dual_clip"], jobs["ppo"])}
    assert runs.pairs_of(["apo_zero"]) == {}
    rows = []
    for seed, level in enumerate((0.1, 0.5, 0.9)):
        rows.append(dict(variant="grpo", flags="", seed=seed, last=level, curve=level))
        better = dict(last=level + (seed + 1) / 100, curve=level + 0.05 + seed / 1000)
        rows.append(dict(variant="reinforce_pp", flags="--kl none", seed=seed, **better))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    assert runs.cells("chain") == {}
    with open(tmp_path / "variants_chain.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert runs.cells("chain") == {"reinforce_pp": "+2.0 ± 2.5, **+5.1 ± 0.2**"}
    line = runs.compare("reinforce_pp", rows[1::2], rows[::2])
    assert "last +0.020 ± 0.025 not told apart" in line and "curve +0.051 ± 0.002 told apart" in line


def test_page_has_the_folder(monkeypatch):
    """Every method has its row; after a change of one: python tests/test_variants.py --update."""
    found = PAGE.read_text("utf-8").partition("<!-- methods -->\n")[2].partition("\n<!-- end -->")[0]
    assert found.split("\n", 2)[2] == table(monkeypatch)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        before, _, rest = PAGE.read_text("utf-8").partition("<!-- methods -->\n")
        old, _, after = rest.partition("\n<!-- end -->")
        head = "\n".join(old.split("\n")[:2])
        PAGE.write_text(f"{before}<!-- methods -->\n{head}\n{table(patch)}\n<!-- end -->{after}", "utf-8")
