"""Defaults by the size of --init, by the task, and by the user's own data; what a run says of them."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from stages import TRAINERS, jsonl, rows_of, words

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_prm
import train_rm
import train_sft
from nanorlhf import generate, hub
from nanorlhf.errors import UserError
from nanorlhf.run import defaults, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import parse
from nanorlhf.tokenizer import Tokenizer

ALL = [*TRAINERS, train_prm]
BEARS = {train_sft: 1e-4, train_rm: 1e-4, train_prm: 1e-4, train_ppo: 3e-5, train_grpo: 3e-5, train_dpo: 5e-6}
BEARS[train_distill] = 3e-5
each = pytest.mark.parametrize("trainer", ALL, ids=lambda t: t.__name__)


def method(trainer):
    return trainer.__name__.removeprefix("train_")


@pytest.fixture
def sized(tmp_path):
    """sized(millions) → a folder whose one safetensors file has a header of so many numbers, and no data."""

    def make(millions, dtype="BF16"):
        folder = tmp_path / f"{millions}M"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        bytes_each = {"BF16": 2, "F32": 4}[dtype]
        n = millions * 10**6 * bytes_each
        shape = [millions * 1000, 1000]
        header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, n]}}).encode()
        with open(folder / "model.safetensors", "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + n)  # a hole: it takes no space on the disk
        return str(folder)

    return make


# ------------------------------------------------------------------------------------------------------------
# by size


def test_numbers_of_a_folder(sized, tmp_path, stages):
    model, _ = hub.load(f"{stages.folder}/sft/model")
    assert defaults.n_parameters(f"{stages.folder}/sft/model") == sum(p.numel() for p in model.parameters())
    assert defaults.n_parameters(sized(60)) == defaults.n_parameters(sized(61, "F32")) - 10**6 == 60 * 10**6
    assert defaults.n_parameters(f"{tmp_path}/nowhere") == 0
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{}")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"\xff" * 99)
    assert defaults.n_parameters(f"{tmp_path}/damaged") == 0


@each
@pytest.mark.parametrize("rank", [None, 0, 8])
def test_a_large_model_has_the_defaults_of_a_real_one(trainer, rank, sized, monkeypatch):
    """Adapters of rank 16 and published or measured rates, said in one line; a flag that is given wins."""
    monkeypatch.setattr(defaults.bf16, "has_units", lambda device: False)  # of these a second line says so
    init = sized(51)
    cfg = trainer.Config(init=init, lora_rank=rank)
    full, adapters, source = defaults.REAL[method(trainer)]
    assert cfg.lora_rank == (16 if rank is None else rank)
    assert 0 < full <= BEARS[trainer] and 2 * full < adapters <= 20 * BEARS[trainer]
    rates = {name: getattr(cfg, name) for name in ("lr", "critic_lr") if hasattr(cfg, name)}
    assert set(rates.values()) == {full if rank == 0 else adapters}
    (note,) = cfg.notes
    assert note.startswith("--init of 51M parameters: --l") and f"--lr {cfg.lr}" in note and source in note
    assert ("--lora_rank" in note) == (rank is None)
    for task in trainer.Config.BY_TASK:
        if trainer not in (train_rm, train_dpo) or task == "reviews":
            assert trainer.Config(task=task, init=init, lora_rank=0).lr <= BEARS[trainer]
    rates = {name: 3e-3 for name in rates}
    by_hand = trainer.Config(init=init, lora_rank=0, **rates)
    assert (by_hand.lr, by_hand.lora_rank) == (3e-3, 0) and "--lr" not in str(by_hand.notes)


def test_adapters_are_trained_in_fp32(sized):
    assert train_sft.Config(init=sized(51), dtype="bf16_weights").lora_rank == 0


def test_grpo_of_a_large_model_samples_as_its_rate_was_measured(sized):
    """64 samples an update, as by the defaults of the built-in task; a recipe's own number wins."""
    init = sized(51)
    large = train_grpo.Config(init=init)
    small = train_grpo.Config()
    per_update = [c.prompts_per_step * c.group_size / c.minibatches for c in (large, small)]
    assert per_update == [64, 64] and large.prompts_per_step * large.group_size == 64
    assert train_grpo.Config(init=init, recipe="r1_zero", max_new_tokens=16).minibatches == 16
    assert train_grpo.Config(init=init, group_size=4).group_size == 4


def test_no_reference_where_a_large_model_has_no_kl(sized):
    """It is loaded for a KL that weighs something, and where it is asked for; small models have one."""
    init = sized(51)
    judge = dict(reward=["r.py:f"])
    for kw in ({}, dict(data="p.jsonl"), dict(recipe="dapo", max_new_tokens=16)):
        cfg = train_grpo.Config(init=init, **judge, **kw)
        assert cfg.ref == "none" and "--ref none" in cfg.notes[0]
        assert train_grpo.Config(init=init, ref=init, **judge, **kw).ref == init
        assert train_grpo.Config(init="small", **judge, **kw).ref == "small"
    for kw in (dict(kl="k3", beta=0.1), dict(recipe="grpo"), dict(ref_every=2)):
        assert train_grpo.Config(init=init, **judge, **kw).ref == init
    assert train_ppo.Config(init=init, **judge).ref == "none"
    assert train_ppo.Config(init="small", **judge).ref == "small"
    for kw in (dict(beta=0.1), dict(kl_target=1.0)):
        assert train_ppo.Config(init=init, **judge, **kw).ref == init
        with pytest.raises(UserError, match="^--beta and --kl_target need a reference, --ref is none$"):
            train_ppo.Config(init=init, ref="none", **judge, **kw)
    assert train_ppo.Config(init=init, rm="rm").ref == train_dpo.Config(init=init).ref == init


def test_ppo_without_a_reference_learns_the_same(stages, tmp_path, no_curves):
    """With beta 0 the reference is only measured: the same figures, but for an empty kl; and it resumes."""
    rows = {}
    for ref in ("none", ""):
        cfg = stages.config(train_ppo, tmp_path / f"run{ref}", ref=ref, beta=0.0, steps=3)
        rows[ref] = train_ppo.train(cfg).rows
    for row in [*rows["none"], *rows[""]]:
        row.update(s=0, tok_s=0)
    assert all(row.pop("kl") is None for row in rows["none"])
    assert all(row.pop("kl") is not None for row in rows[""])
    assert rows["none"] == rows[""] and len(rows[""]) == 3
    cfg = stages.config(train_ppo, tmp_path / "runnone", ref="none", beta=0.0, steps=4, resume=True)
    assert len(train_ppo.train(cfg).rows) == 4


@each
def test_a_small_model_keeps_those_of_the_task(trainer, sized):
    table = trainer.Config.DEFAULTS | trainer.Config.BY_TASK[next(iter(trainer.Config.BY_TASK))]
    for init in ("", sized(50), "nowhere"):
        cfg = trainer.Config(init=init)
        assert cfg.lr == table["lr"] and cfg.steps == table["steps"] and not cfg.notes and cfg.lora_rank == 0


def test_every_recipe_of_a_large_model_too(sized):
    init = sized(100)
    for recipe in train_grpo.RECIPES:
        cfg = train_grpo.Config(recipe=recipe, init=init, lora_rank=0, max_new_tokens=16)
        assert cfg.lr <= BEARS[train_grpo]


# ------------------------------------------------------------------------------------------------------------
# by the data


@each
@pytest.mark.parametrize("data, name", [
    ("prompts.jsonl", "prompts"), ("/a/b.c/gsm8k_train.jsonl.gz", "gsm8k_train"), ("./x y.parquet", "x y"),
])  # fmt: skip
def test_out_is_named_after_the_data(trainer, data, name):
    more = dict(reward=["r.py:f"]) if trainer in (train_ppo, train_grpo) else {}
    if trainer is train_distill:
        more = dict(teacher="runs/teacher/model")
    assert trainer.Config(data=data, **more).out == f"runs/{name}-{method(trainer)}"
    assert trainer.Config(data=data, out="runs/mine", **more).out == "runs/mine"
    task = next(iter(trainer.Config.BY_TASK))
    assert trainer.Config().out == f"runs/{task}-{method(trainer)}"
    assert trainer.Config(data=data, task=task, **more).out == f"runs/{name}-{method(trainer)}"


def test_beta_of_a_reward_function_is_0():
    def ppo(**flags):
        return train_ppo.Config(**flags).beta

    assert ppo(reward=["r.py:f"]) == ppo(reward=["r.py:f"], data="p.jsonl") == ppo(task="chain") == 0.0
    assert ppo(reward=["r.py:f"], beta=0.2) == 0.2
    assert ppo() == ppo(rm="rm") == ppo(rm="rm", data="p.jsonl") == ppo(rm="rm", task="chain") == 0.3
    assert train_grpo.Config(reward=["r.py:f"], data="p.jsonl").beta == 0.0


@pytest.mark.parametrize("trainer", [train_ppo, train_grpo], ids=lambda t: t.__name__)
def test_own_prompts_need_a_reward(trainer):
    says = "--data my/p.jsonl: prompts of your own need a reward: give --reward my_reward.py:score"
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
        trainer.Config(data="my/p.jsonl")
    assert trainer.Config(data="my/p.jsonl", rm="rm").rm == "rm"
    assert not trainer.Config(data="my/p.jsonl", task="chain").rm  # the task's own prompts in a file


def test_a_task_that_scores_other_prompts_says_that_they_need_a_reward(stages, tmp_path, monkeypatch):
    """Before anything is sampled, and with --dry_run."""
    monkeypatch.setattr(generate, "generate", None)
    for task in ("chain", "countdown"):
        cfg = stages.config(train_grpo, tmp_path / task, data=jsonl(tmp_path / "p.jsonl", words(64)), rm="",
                            task=task)  # fmt: skip
        says = f"--task {task}: the prompt '.*' is not of this task; prompts of your own need --reward"
        with pytest.raises(UserError, match=says):
            train_grpo.train(cfg)
        with pytest.raises(UserError, match=says):
            plan.rl(cfg, train_grpo.load_models)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)
def test_steps_come_from_the_data(trainer, stages, tmp_path, monkeypatch, capsys, no_curves):
    """One pass over the training rows, three in SFT, and at least LEAST_STEPS; said in a line."""
    monkeypatch.setattr(defaults, "LEAST_STEPS", 3)
    flags = stages.flags(trainer, tmp_path / "run")
    del flags["steps"]
    cfg = trainer.Config(**flags)
    assert cfg.steps is None
    trainer.train(cfg)
    rows, batch = words(64), flags.get("batch_size") or flags["prompts_per_step"]
    n = sum(not train_sft.tasks.held_out(row["prompt"]) for row in rows)
    want = max(3, -(-(3 if trainer is train_sft else 1) * n // batch))
    assert cfg.steps == want and f"--steps {want}: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == want
    assert trainer.Config(task=next(iter(trainer.Config.BY_TASK))).steps == 60 or trainer is not train_ppo


def test_lengths_come_from_the_data(stages, tmp_path, capsys, no_curves):
    """SFT: the longest prompt with the longest response. Then PPO: the room behind its longest prompt."""
    rows = words(64) + [{"prompt": "abcdefab=", "response": "a"}, {"prompt": "a=", "response": "abcdef" * 3}]
    flags = stages.flags(train_sft, tmp_path / "sft", data=jsonl(tmp_path / "d.jsonl", rows))
    del flags["max_len"]
    train_sft.train(cfg := train_sft.Config(**flags))
    assert cfg.max_len == 9 + 18 + 1  # and EOS
    model, tok = hub.load(tmp_path / "sft/model")
    assert model.cfg.max_len == 28 and "dropped" not in capsys.readouterr().out
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 1.0\n")
    for trainer in (train_ppo, train_grpo):
        out = tmp_path / trainer.__name__
        flags = stages.flags(trainer, out, data=flags["data"], init=f"{tmp_path}/sft/model", rm="", steps=1,
                             reward=[f"{tmp_path}/r.py:f"], reward_timeout=0)  # fmt: skip
        del flags["max_new_tokens"], flags["eval_prompts"]
        trainer.train(cfg := trainer.Config(**flags))
        assert cfg.max_new_tokens == 28 - 9 and 0 < cfg.eval_prompts < 66
    out = tmp_path / "dpo"
    flags = stages.flags(train_dpo, out, steps=1, init=f"{tmp_path}/sft/model")
    del flags["max_new_tokens"]
    train_dpo.train(cfg := train_dpo.Config(**flags))
    responses = [row[key] for row in rows_of(train_dpo) for key in ("chosen", "rejected")]
    assert cfg.max_new_tokens == max(map(len, responses)) + 1


def limit_of(longest, context, **row):
    return defaults.response_limit(longest, context, "x", [row], Tokenizer.from_bytes())


def test_a_long_context_must_be_asked_for():
    assert limit_of(100, 1024) == 924 and limit_of(1024, 2048) == 1024
    for longest, says in ((100, "32,668"), (31000, "1,768"), (32768, "0"), (40000, "-7,232")):
        with pytest.raises(UserError, match=f"^--max_new_tokens: .* leaves room for {says} tokens; give"):
            limit_of(longest, 32768, answer="42")
    pairs = [([0] * 5000, [False] * 4000 + [True] * 1000)]
    assert defaults.context_for(pairs) == defaults.LONGEST


def test_in_a_long_context_the_longest_response_of_the_data_is_enough(capsys):
    """Its bytes and EOS; a bare answer is no response. A short context is used whole, as ever."""
    assert limit_of(9, 8192, response="a" * 30) == 31 and limit_of(9, 8192, answer="6 + 7\n#### 13") == 14
    assert "--max_new_tokens 14: by the longest response in x" in capsys.readouterr().out
    assert limit_of(9, 1024, response="a" * 30) == 1015
    for row in (dict(answer=13), dict(answer="13"), dict(response=[]), dict(response="a" * 1024)):
        with pytest.raises(UserError, match="^--max_new_tokens: "):
            limit_of(9, 8192, **row)


def test_a_task_that_is_named_sets_its_own_defaults():
    table = train_grpo.Config.BY_TASK["countdown"]
    cfg = train_grpo.Config(task="countdown", data="p.jsonl")
    assert all(getattr(cfg, name) == value for name, value in table.items()) and cfg.eval_prompts == 512


# ------------------------------------------------------------------------------------------------------------
# what a run says


@pytest.mark.parametrize("other", [dict(data="/b/p.jsonl"), dict(task="chain", data="/a/p.jsonl")])
def test_a_run_of_another_task_is_not_to_be_replaced(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train_sft.Config(data="/a/p.jsonl")
    Path(first.out).mkdir(parents=True)
    Path(first.out, "config.json").write_text(json.dumps({"data": "/a/p.jsonl", "task": "reviews"}))
    with pytest.raises(UserError, match="--overwrite to replace it"), Run(first, [], [], []):
        pass
    with pytest.raises(UserError, match="holds a run of --(data /a/p.jsonl|task reviews); name another") as e:
        with Run(train_sft.Config(out=first.out, **other), [], [], []):
            pass
    assert "--overwrite" not in str(e.value)


@pytest.mark.parametrize("recipe", [name for name in train_grpo.RECIPES if name])
def test_a_recipe_is_printed_with_its_paper(recipe):
    cfg = train_grpo.Config(recipe=recipe, max_new_tokens=16, clip_low=0.123)
    first, *lines = cfg.notes
    paper = defaults.PAPERS[recipe]
    number = re.search(r"\d{4}\.\d{5}|DeepScaleR", paper)[0]
    assert first == f"--recipe {recipe}: {paper}" and number in train_grpo.__doc__
    shown = {line.split()[0]: line.split()[1] for line in lines}
    by = {line.split()[0]: " ".join(line.split()[2:]) for line in lines}
    assert set(shown) == {f"--{name}" for name in train_grpo.RECIPES[""] | train_grpo.RECIPES[recipe]}
    for name in train_grpo.RECIPES[""] | train_grpo.RECIPES[recipe]:
        assert shown[f"--{name}"] == str(getattr(cfg, name))
        want = "default"
        if name in train_grpo.RECIPES[recipe]:
            want = paper
        assert by[f"--{name}"] == ("given" if name == "clip_low" else want)


def test_own_data_does_not_start_from_a_toy_in_silence():
    note = "--init runs/reviews-sft/model: no other model was given"
    for trainer in (train_rm, train_prm, train_dpo):
        assert trainer.Config(data="p.jsonl").notes == [note]
        assert not trainer.Config(data="p.jsonl", init="mine").notes and not trainer.Config().notes
    assert not train_sft.Config(data="p.jsonl").notes  # a new model
    cfg = train_grpo.Config(data="p.jsonl", rm="rm", init="mine", recipe="dapo")
    assert not any("None" in line or "eval_prompts" in line for line in cfg.notes)


def test_notes_are_printed_when_the_run_starts(stages, tmp_path, capsys, no_curves):
    train_grpo.train(stages.config(train_grpo, tmp_path / "run", recipe="dr_grpo", steps=1))
    assert "--norm none                     Dr. GRPO, arXiv 2503.20783" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# the GPU lines of the docstrings, as they stand


def gpu_lines(trainer):
    """The command lines behind "GPU" → argv each, without `python` and the program."""
    doc = trainer.__doc__.replace("\\\n", " ")
    found = re.findall(rf"^GPU +python {trainer.__name__}\.py (.*)$", doc, re.M)
    assert found
    return [shlex.split(line) for line in found]


@each
def test_gpu_lines_run_as_they_stand(trainer, stages, tmp_path, monkeypatch, no_curves):
    """Every flag exists. Without the folder the error is the folder; without the data it is the data."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanorlhf").symlink_to(root / "nanorlhf")
    for argv in gpu_lines(trainer):
        cfg = parse(trainer.Config, argv)
        assert not cfg.init or cfg.init == "runs/sft/model"
        with pytest.raises(UserError) as e:
            trainer.train(cfg)
        missing = "--init runs/sft/model does not exist"
        assert str(e.value).startswith(missing if cfg.init else f"--data: {cfg.data}: No such file")
    for name in ("sft", "rm", "teacher"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model").symlink_to(stages.folder / name / "model")
    for argv in gpu_lines(trainer):
        with pytest.raises(UserError, match=f"^--data: {cfg.data}: No such file"):
            trainer.train(parse(trainer.Config, argv))
        rows = rows_of(train_rm if trainer is train_dpo else trainer)
        if trainer is train_prm:
            rows = [row | {"labels": [1]} for row in rows]
        if trainer is train_grpo:
            rows = [row | {"answer": "1"} for row in rows]
        jsonl(tmp_path / cfg.data, rows)
        short = ["--steps", "1"]
        if trainer is train_sft:
            short += ["--n_layer", "1", "--d_model", "48"]
        if trainer in (train_ppo, train_grpo, train_distill):
            short += ["--max_new_tokens", "5", "--prompts_per_step", "4"]  # the stages' context is 16
        last = trainer.train(parse(trainer.Config, [*argv, *short]))
        assert torch.isfinite(torch.tensor(last.get("loss", last.get("reward", 0.0))))
