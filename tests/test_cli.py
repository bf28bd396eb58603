"""Command lines: help, every kind of mistake in one line, and modules that do nothing when imported."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import demo
import evaluate
import sample
import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_prm
import train_rm
import train_sft
from nanorlhf.errors import RunError, UserError
from nanorlhf.run.cli import Flags, check_ranges, help_text, parse, run_cli

ROOT = Path(__file__).parents[1]
TRAINERS = [train_sft, train_rm, train_prm, train_ppo, train_grpo, train_dpo, train_distill]
PROGRAMS = pytest.mark.parametrize("module", [*TRAINERS, demo, evaluate, sample], ids=lambda m: m.__name__)


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(module, *argv) → status and the lines on stderr; a run that would start fails the test."""

    def call(module, *argv, train=lambda cfg: pytest.fail("a run was started")):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        status = run_cli(module.Config, train, module.__doc__)
        return status, capsys.readouterr().err.splitlines()

    return call


# help


@PROGRAMS
def test_help_has_every_flag_with_its_comment_and_default(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--seed", "1", "--help"])
    status = run_cli(module.Config, lambda cfg: pytest.fail("a run was started"), module.__doc__)
    out = capsys.readouterr().out
    about = module.__doc__.strip().split("\n\n")[0]
    assert status == 0 and " ".join(out.split()).startswith(" ".join(about.split()))
    flags = out[out.index("usage: python ") :]
    assert max(map(len, out.splitlines())) <= 80 and f"python {module.__name__}.py" in flags
    entries = {m[1]: " ".join(m[0].split()) for m in re.finditer(r"^  --(\w+)(.|\n {3})*", flags, re.M)}
    assert set(entries) == {field.name for field in dataclasses.fields(module.Config)}
    source = "".join(map(inspect.getsource, module.Config.__mro__[:-1]))
    for field in dataclasses.fields(module.Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.M)
        assert comment, f"{field.name} has no comment"
        entry = entries[field.name]
        assert " ".join(comment[1].split()) in entry
        recipes = getattr(module.Config, "DEFAULTS", {})
        if field.name in recipes:
            assert recipes[field.name] == "" or f"(default: {recipes[field.name]})" in entry
        elif field.name == "lora_rank":  # its comment has both defaults
            assert "of real models 16" in entry
        elif field.default is None:
            for task, defaults in module.Config.BY_TASK.items():
                assert f"{defaults[field.name]} for {task}" in entry
        elif field.default not in ("", dataclasses.MISSING):
            assert f"(default: {field.default})" in entry


@PROGRAMS
def test_every_default_of_a_task_is_a_field_that_waits_for_it(module):
    by_task = getattr(module.Config, "BY_TASK", {})
    recipes = getattr(module.Config, "DEFAULTS", {})
    waiting = {f.name for f in dataclasses.fields(module.Config) if f.default is None}
    waiting -= {*recipes, "lora_rank"}  # by the size of --init
    assert all(set(defaults) == waiting for defaults in by_task.values())


@dataclasses.dataclass
class Example(Flags):
    task: str = "reviews"  # before all headings
    # method
    # A comment, which is no heading.
    clip: float = 0.2  # ε
    # data
    data: str = ""  # a file
    limits: int | list[int] | None = None  # one, or several
    # sampling
    at: list[int] = dataclasses.field(default_factory=list)  # steps
    on: list[int] = dataclasses.field(default_factory=lambda: [40, 80])  # other steps
    reward: list[str] = dataclasses.field(default_factory=list)  # repeatable

    BY_TASK: typing.ClassVar = {"reviews": dict(limits=40), "chain": dict(limits=[24, 40])}


def test_headings_come_in_one_order_and_shared_flags_last_under_each():
    lines = [line.split() for line in help_text(Example, "About.", "x.py").splitlines()]
    found = [words[0].removeprefix("--") for words in lines if words and words[0].startswith("--") or
             len(words) == 1 and words[0].endswith(":")]  # fmt: skip
    elsewhere = ("eval_data", "skip_bad_rows", "lora_rank", "look_rows")
    run = [f.name for f in dataclasses.fields(Flags) if f.name not in elsewhere]
    want = "task data: data limits eval_data skip_bad_rows method: clip optimisation: lora_rank"
    want += " sampling: at on reward evaluation: look_rows run:"
    assert found == want.split() + run


def test_help_shows_integers_as_they_are_written():
    text = " ".join(help_text(Example, "About.", "x.py").split())
    assert "--limits one, or several (default: 40 for reviews, 24,40 for chain)" in text
    assert "--at steps --on other steps (default: 40,80) --reward" in text


# values


def test_integers_with_commas():
    def limits(text):
        return parse(Example, ["--limits", text]).limits

    assert limits("24") == 24 and limits("24,40,64") == [24, 40, 64] and limits("-1,2") == [-1, 2]
    assert parse(Example, ["--at", "40,80"]).at == [40, 80] and parse(Example, ["--at=40"]).at == [40]
    assert parse(Example, ["--at", "1", "--at", "2,3"]).at == [2, 3] and parse(Example, []).on == [40, 80]
    for text in ("24,x", "24,", "", "24,1.5"):
        with pytest.raises(UserError) as error:
            limits(text)
        message = "must be an integer, or integers such as 24,40,64"
        assert str(error.value) == f"--limits {text}: {message}"
    with pytest.raises(UserError, match="^--at 1;2: must be integers such as 24,40,64$"):
        parse(Example, ["--at", "1;2"])


def test_ranges_of_integers_with_commas():
    check_ranges(Example(limits=[24, 1], at=[0, 1]), ("limits",))
    with pytest.raises(UserError, match="^--limits 24,0: must be at least 1$"):
        check_ranges(Example(limits=[24, 0]), ("limits",))
    with pytest.raises(UserError, match="^--at 1,-1: must not be negative$"):
        check_ranges(Example(at=[1, -1]), ())


def test_ways_to_write_a_flag():
    """--name value, --name=value, dashes for underscores, a bare bool, a repeated list, negative numbers."""

    def ppo(*argv):
        return parse(train_ppo.Config, argv)

    assert ppo("--lr", "3e-4").lr == ppo("--lr=3e-4").lr == 3e-4
    assert ppo("--max-new-tokens", "7").max_new_tokens == ppo("--max_new_tokens=7").max_new_tokens == 7
    assert ppo("--resume").resume is ppo("--resume=1").resume is ppo("--resume", "True").resume is True
    assert ppo().resume is ppo("--resume", "false").resume is ppo("--resume=0").resume is False
    assert ppo("--resume", "--seed", "3").seed == 3 and ppo("--seed", "-3").seed == -3
    assert ppo("--reward", "a.py:f", "--reward=b.py:g*0.2").reward == ["a.py:f", "b.py:g*0.2"]
    assert ppo("--reward", "a.py:f", "--data=x=y.jsonl").data == "x=y.jsonl"
    assert ppo("--steps", "1", "--steps", "2").steps == 2  # the last one counts, as everywhere
    assert ppo("--seed", "5") == train_ppo.Config(seed=5)
    assert isinstance(ppo("--beta", "1").beta, float) and ppo().reward is not ppo().reward


@pytest.mark.parametrize(
    "module, argv, says",
    [
        (train_sft, "--stepz 3", "unknown flag --stepz (did you mean --steps?)"),
        (train_ppo, "--max-new-token 3", "unknown flag --max-new-token (did you mean --max_new_tokens?)"),
        (demo, "--smoky", "unknown flag --smoky (did you mean --smoke?)"),
        (train_rm, "--zzzzzz 1", "unknown flag --zzzzzz (see --help)"),
        (train_rm, "extra", "unknown flag extra (see --help)"),
        (train_rm, "-seed 1", "unknown flag -seed"),
        (train_sft, "--BY_TASK x", "unknown flag --BY_TASK"),
        (train_sft, "--steps", "--steps needs a value"),
        (train_sft, "--out --seed 1", "--out needs a value"),
        (train_sft, "--steps 1.5", "--steps 1.5: must be an integer such as 100"),
        (train_sft, "--steps=", "--steps : must be an integer"),
        (train_sft, "--lr fast", "--lr fast: must be a finite number such as 3e-4"),
        (train_sft, "--resume=maybe", "--resume maybe: must be true or false"),
        (train_sft, "--overwrite maybe", "--overwrite maybe: must be true or false"),
        (train_sft, "--arch lama", "--arch lama: must be one of gpt2, llama (did you mean llama?)"),
        (train_rm, "--device tpu", "--device tpu: must be one of auto, cpu, cuda, mps"),
        (train_ppo, "--reward_timeout -1", "--reward_timeout -1.0: must not be negative"),
        (train_grpo, "--recipe dpao", "--recipe dpao: must be one of grpo, dr_grpo"),
        (train_grpo, "--norm std", "--norm std: must be one of group_std, batch_std, none, leave_one_out"),
        (train_grpo, "--group_size 1", "--group_size 1: a group of one has nothing to be compared with"),
        (train_grpo, "--kl k3", "--kl k3: has no effect without --beta"),
        (train_grpo, "--beta 0.1", "--beta 0.1: there is no KL that it could weigh; add --kl k3"),
        (train_grpo, "--max_new_tokens 8,4", "--max_new_tokens 8,4: must be an integer, or rising ones"),
        (train_ppo, "--task sums", "--task sums: must be one of reviews, chain, countdown"),
        *((m, "--lr nan", "--lr nan: must be a finite number") for m in TRAINERS),
        *((m, "--lr 1e999", "--lr 1e999: must be a finite number") for m in TRAINERS),
        *((m, "--lr 0", "--lr 0.0: must be above 0") for m in TRAINERS),
        *((m, "--steps 0", "--steps 0: must be at least 1") for m in TRAINERS),
        *((m, "--threads -1", "--threads -1: must not be negative") for m in TRAINERS),
        *((m, f"--seed {2**63}", f"--seed {2**63}: must fit into 64 bits") for m in TRAINERS),
        (train_sft, "--n_head 0", "--n_head 0: must be at least 1"),
        (train_sft, "--demos 0", "--demos 0: must be at least 1"),
        (train_sft, "--weight_decay -0.1", "--weight_decay -0.1: must not be negative"),
        (train_sft, "--eval_every -1", "--eval_every -1: must not be negative"),
        (train_rm, "--pairs 0", "--pairs 0: must be at least 1"),
        (train_rm, "--batch_size 0", "--batch_size 0: must be at least 1"),
        (train_rm, "--tau -1", "--tau -1.0: must not be negative"),
        (train_rm, "--task chain", "--task chain has a reward function, no preferences"),
        (train_dpo, "--beta 0", "--beta 0.0: must be above 0"),
        (train_dpo, "--loss dop", "--loss dop: must be one of dpo, cdpo, robust, ipo, hinge, simpo"),
        (train_dpo, "--loss robust --label_smoothing 0.5", "--label_smoothing 0.5: must be below 0.5"),
        (train_dpo, "--loss ipo --label_smoothing 0.1", "--label_smoothing: not with --loss ipo"),
        (train_dpo, "--online 2 --rm a --judge self", "--reward, --rm and --judge: give one of the three"),
        (train_dpo, "--rm a", "--reward, --rm and --judge rank fresh samples: add --online 3"),
        (train_dpo, "--online 2 --group_size 1", "--group_size 1: best against worst needs at least 2"),
        (train_dpo, "--online 9 --steps 8", "--online: more than --steps or --pairs"),
        (train_dpo, "--task chain", "--task chain has a reward function, no preferences"),
        (train_distill, "--jsd_beta 1", "--jsd_beta 1.0: must be between 0 and 1"),
        (train_distill, "--divergence reversed",
         "--divergence reversed: must be one of reverse, forward, jsd (did you mean reverse?)"),
        (train_distill, "--as_reward --divergence jsd", "--as_reward: for --divergence reverse and --on"),
        (train_distill, "--as_reward --on_policy 0", "--as_reward: for --divergence reverse and --on_policy"),
        (train_distill, "--data p.jsonl", "--data p.jsonl: name the model to learn from with --teacher"),
        (train_dpo, "--task chain --online 2 --judge self", "--task chain has a reward function, no prefer"),
        (evaluate, "--k 1,x", "--k 1,x: must be integers such as"),
        (evaluate, "--rm a --reward b.py:f", "--rm and --reward: give one of the two"),
        (sample, "--top_p 1.5", "--top_p 1.5: must be at most 1"),
        (train_ppo, "--temperature 0", "--temperature 0.0: must be above 0"),
        (train_ppo, "--sample_every 0", "--sample_every 0: must be at least 1"),
        (train_ppo, "--gamma 1.1", "--gamma and --lam: must not be above 1"),
        (train_ppo, "--rm a --reward b.py:f", "--rm and --reward: give one of the two"),
        (train_ppo, "--prompts_per_step 2 --minibatches 3", "--minibatches 3: a step has 2 samples only"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(module, argv, says, cli):
    status, lines = cli(module, *argv.split(" "))
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(f"{module.__name__}.py: error: {says}")


@PROGRAMS
def test_statuses(module, cli):
    """0 for a run that ends, 2 for a user's mistake, 1 for a run that had to stop; a bug its traceback."""

    def raises(error):
        def train(cfg):
            raise error

        return train

    assert cli(module, train=lambda cfg: {"loss": 1.0}) == (0, [])
    name = f"{module.__name__}.py"
    assert cli(module, train=raises(UserError("x.jsonl:3: bad"))) == (2, [f"{name}: error: x.jsonl:3: bad"])
    assert cli(module, train=raises(RunError("step 3"))) == (1, [f"{name}: stopped: step 3"])
    status, lines = cli(module, train=raises(OSError(28, "No space left on device")))
    assert status == 1 and len(lines) == 1 and "No space left on device" in lines[0]
    status, lines = cli(module, train=raises(KeyboardInterrupt()))
    assert status == 130 and len(lines) == 1 and "interrupted" in lines[0] and "kept" in lines[0]
    for bug in (ZeroDivisionError("bug"), OSError(5, "Input/output error")):
        with pytest.raises(type(bug)):
            cli(module, train=raises(bug))


@pytest.mark.parametrize(
    "module, flags, says",
    [
        (train_rm, "", "--init runs/reviews-sft/model MISSING {sft} reviews"),
        (train_ppo, "", "--init runs/reviews-sft/model MISSING {sft} reviews"),
        (train_ppo, "--task chain", "--init runs/chain-sft/model MISSING {sft} chain"),
        (train_ppo, "--init SFT",
         "--rm runs/reviews-rm/model MISSING {rm} reviews"),
        (train_grpo, "", "--init runs/chain-sft/model MISSING {sft} chain"),
        (train_grpo, "--init SFT --task reviews",
         "--rm runs/reviews-rm/model MISSING {rm} reviews"),
        (train_distill, "", "--init runs/chain-sft/model MISSING {sft} chain"),
        (train_distill, "--init SFT",
         "--teacher runs/chain-grpo/model MISSING python train_grpo.py --task chain"),
        (train_dpo, "", "--init runs/reviews-sft/model MISSING {sft} reviews"),
        (train_dpo, "--init SFT --online 2",
         "--rm runs/reviews-rm/model MISSING {rm} reviews"),
        # another name than that of the run's own task: the command of the trainer in the name, or none
        (sample, "--model runs/chain-grpo/model",
         "--model runs/chain-grpo/model MISSING python train_grpo.py --task chain"),
        (train_ppo, "--init mine/model", "--init mine/model does not exist"),
        (train_ppo, "--data p.jsonl --reward r.py:f --init mine/model",
         "--init mine/model does not exist"),
        (train_ppo, "--init SFT --rm RM --critic_init nope", "--critic_init nope does not exist"),
        (train_ppo, "--init SFT --rm RM --ref nope", "--ref nope does not exist"),
        (train_grpo, "--init SFT --rm runs/chain-rm/model", "--rm runs/chain-rm/model does not exist"),
        (train_grpo, "--init runs/chain-dpo/model", "--init runs/chain-dpo/model does not exist"),
        (train_grpo, "--init runs/reviews-rm/model", "--init runs/reviews-rm/model does not exist"),
        (train_dpo, "--init models/Qwen2.5-1.5B", "--init models/Qwen2.5-1.5B does not exist"),
        (train_dpo, "--init ../Qwen2.5-1.5B", "--init ../Qwen2.5-1.5B does not exist"),
        # names on the Hugging Face Hub
        *((train_dpo, f"--init {name}", "--init NAME does not exist here; fetch it: hf download "
           "meta-llama/Llama-3.2-1B --local-dir models/Llama-3.2-1B, and give --init models/Llama-3.2-1B")
          for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B/")),
        (sample, "--model gpt2", "--model gpt2 does not exist here; fetch it: hf download gpt2 "
         "--local-dir models/gpt2, and give --model models/gpt2"),
    ],
)  # fmt: skip
def test_missing_checkpoint_names_what_could_make_it(module, flags, says, cli, stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 1.0\n")
    folders = {"SFT": f"{stages.folder}/sft/model", "RM": f"{stages.folder}/rm/model"}
    argv = [folders.get(flag, flag) for flag in flags.split()]
    start = module.train if hasattr(module, "train") else module.main
    status, lines = cli(module, *argv, train=start)
    says = says.replace("MISSING", "does not exist; make it with:").replace("SFT", folders["SFT"])
    says = says.replace("NAME", "meta-llama/Llama-3.2-1B")
    says = says.format(sft="python train_sft.py --task", rm="python train_rm.py --task")
    assert (status, lines) == (2, [f"{module.__name__}.py: error: {says}"])
    assert not (tmp_path / "runs").exists()


# real processes


def test_output_in_a_code_page_without_greek():
    """Windows writes to pipes in cp1252; there is no β in it, nor the demo's lines."""
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    for name in ("train_ppo", "demo"):
        argv = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
        done = subprocess.run(argv, env=env, capture_output=True)
        assert done.returncode == 0 and not done.stderr and "--seed" in done.stdout.decode()


def test_a_mistake_in_a_real_process(tmp_path):
    argv = [sys.executable, str(ROOT / "train_sft.py"), "--stepz", "3"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert done.stderr == "train_sft.py: error: unknown flag --stepz (did you mean --steps?)\n"


IMPORT = """
import os, random, signal, sys
sys.modules |= {"triton": None, "matplotlib": None, "wandb": None}  # importing any of them raises ImportError
import numpy, torch
def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    numbers = random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())
    return handlers, numbers, torch.get_num_threads(), torch.get_default_dtype(), os.listdir("."), os.getcwd()
before = state()
import train_sft, train_rm, train_prm, train_ppo, train_grpo, train_dpo, train_distill, demo, evaluate, sample
assert state() == before
"""


def test_importing_a_trainer_does_nothing(tmp_path):
    """Nothing printed, no handlers, no random numbers, no run; neither Triton nor matplotlib is needed."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORT}"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
