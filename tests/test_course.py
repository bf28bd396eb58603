"""The course holds what it promises: solutions pass, stubs fail, and a wrong answer hears what is wrong."""

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course import bugs, checking, cli, plug

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = ROOT / "course/solutions"
each_week = pytest.mark.parametrize("week", checking.WEEKS)


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercise(week, folder="course"):
    return ROOT / folder / checking.folder_of(week) / "exercise.py"


def points(week):
    return checking.load_check(week).POINTS


def verdict(week, name, function):
    return checking.judge(getattr(checking.load_check(week), f"check_{name}"), function)


def wrong_of(week):
    return load(ROOT / "tests/course_wrong" / f"{checking.folder_of(week)}.py").WRONG


def wrong_answers():
    out = []
    for week in checking.WEEKS:
        for number, (name, words, function) in enumerate(wrong_of(week)):
            out.append(pytest.param(week, name, words, function, id=f"{week}-{number}-{name}"))
    return out


# ------------------------------------------------------------------------------------------------------------
# Exercises


@each_week
def test_solutions_pass(week):
    solution = load(exercise(week, "course/solutions"))
    for name in points(week):
        passed, message = verdict(week, name, getattr(solution, name))
        assert passed or passed is None, message


@each_week
def test_stubs_fail_and_say_so(week):
    stub = load(exercise(week))
    for name in points(week):
        passed, message = verdict(week, name, getattr(stub, name))
        skipped = passed is None and "Triton" in message
        assert skipped or passed is False and message.startswith("not solved yet")


def test_between_25_and_40_exercises():
    assert 25 <= sum(len(points(week)) for week in checking.WEEKS) <= 40


@each_week
def test_three_wrong_answers_for_each_exercise(week):
    names = [name for name, *_ in wrong_of(week)]
    assert set(names) <= set(points(week))
    few = [name for name in points(week) if names.count(name) < 3]
    assert not few or few == ["softmax"] and not importlib.util.find_spec("triton")


@pytest.mark.parametrize("week, name, words, function", wrong_answers())
def test_a_wrong_answer_hears_what_is_wrong(week, name, words, function):
    passed, message = verdict(week, name, function)
    assert passed is False
    assert words in message


@each_week
def test_worked_examples_are_right(week):
    """The examples in the stubs' docstrings, run with the solutions."""
    solution = vars(load(exercise(week, "course/solutions")))
    for name in points(week):
        stub = getattr(load(exercise(week)), name)
        text = stub.__doc__
        if name == "softmax":  # of week 9: it runs the student's kernel
            continue
        assert ">>>" in text, name
        test = doctest.DocTestParser().get_doctest(text, {**solution, "torch": torch}, name, None, 0)
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0, name


# ------------------------------------------------------------------------------------------------------------
# Ours are the oracle of theirs: what `python -m course run` puts in the trainers gives what they had


def solved(week):
    return load(exercise(week, "course/solutions"))


def replaced(week):
    return {name: function for _, name, function in plug.PLUGS[week].replaced(solved(week))}


def batch(seed=0, B=4, T=6):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) >= 2) & (torch.arange(T) < torch.tensor([6, 4, 5, 3])[:, None])
    logp = torch.where(mask, torch.randn(B, T, generator=g) - 1, 0.0)
    other = torch.where(mask, torch.randn(B, T, generator=g) - 1, 0.0)
    return mask, logp, other, torch.randn(B, generator=g)


def test_the_solutions_of_week_4_and_5_are_grpo():
    import train_grpo

    mask, logp, old_logp, reward = batch()
    group = torch.tensor([0, 0, 1, 1])
    for week, settings in ((4, dict(norm="leave_one_out", loss="reinforce")), (5, {})):
        cfg = train_grpo.Config(task="chain", **settings)
        own = replaced(week)
        adv = train_grpo.advantages(reward, group, cfg.norm, 1e-6, None)
        torch.testing.assert_close(own["advantages"](reward, group, cfg.norm, 1e-6, None), adv)
        w = train_grpo.token_weights(mask, group, cfg)
        arguments = (logp, old_logp, None, adv, mask, w, cfg)
        loss, stats = train_grpo.policy_loss(*arguments)
        own_loss, own_stats = own["policy_loss"](*arguments)
        torch.testing.assert_close(own_loss, loss)
        assert own_stats.keys() == stats.keys()
        torch.testing.assert_close(own_stats["clip"], stats["clip"])
    for agg in ("token", "seq_mean", "seq_sum_const"):
        cfg = train_grpo.Config(task="chain", agg=agg)
        w = train_grpo.token_weights(mask, group, cfg)
        torch.testing.assert_close(own["token_weights"](mask, group, cfg), w)


def test_the_solutions_of_week_6_are_ppo():
    import train_ppo

    mask, logp, ref_logp, score = batch()
    own = replaced(6)
    finished = torch.tensor([True, False, True, True])
    arguments = (score, logp, ref_logp, mask, finished, 0.3, -1.0)
    reward = train_ppo.shape_rewards(*arguments)
    torch.testing.assert_close(own["shape_rewards"](*arguments), reward)
    adv, ret = train_ppo.gae(reward, ref_logp, mask, 0.9, 0.8)
    torch.testing.assert_close(own["gae"](reward, ref_logp, mask, 0.9, 0.8), (adv, ret))
    torch.testing.assert_close(own["whiten"](adv, mask), train_ppo.whiten(adv, mask))
    arguments = (logp, ref_logp, ret, mask, 0.2, 7)
    torch.testing.assert_close(own["value_loss"](*arguments)[0], train_ppo.value_loss(*arguments)[0])


def test_the_solutions_of_week_3_and_7_are_the_reward_model_and_dpo():
    import train_dpo
    import train_rm

    g = torch.Generator().manual_seed(0)
    nats = [torch.randn(5, generator=g) for _ in range(4)]
    pairwise = replaced(3)["pairwise_loss"]
    torch.testing.assert_close(pairwise(*nats[:2]), train_rm.pairwise_loss(*nats[:2]))
    own = replaced(7)["preference_loss"]
    torch.testing.assert_close(own(*nats, 0.3), train_dpo.preference_loss(*nats, 0.3))
    for kind in ("k1", "k2", "k3"):
        import train_grpo

        want = train_grpo.kl_estimate(nats[0], nats[1], kind)
        torch.testing.assert_close(solved(7).kl_estimate(nats[0], nats[1], kind), want)
    ipo = train_dpo.preference_loss(*nats, 0.3, "ipo")[0]
    torch.testing.assert_close(solved(7).ipo_loss(*nats, 0.3), ipo)


@pytest.mark.parametrize("week", [1, 9])
def test_the_solutions_of_week_1_and_9_are_the_kernel(week):
    from nanorlhf.kernels import reference

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=g, requires_grad=True)
    weight = torch.randn(7, 3, generator=g, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    logp, entropy = replaced(week)["linear_logprob"](hidden, weight, targets, 0.7)
    want, want_entropy = reference.linear_logprob(hidden, weight, targets, 0.7)
    torch.testing.assert_close(logp, want)
    torch.testing.assert_close(entropy, want_entropy)
    up = torch.randn(5, generator=g)
    got = torch.autograd.grad(logp, (hidden, weight), up)
    torch.testing.assert_close(got, torch.autograd.grad(want, (hidden, weight), up))


def test_the_solutions_of_week_8_are_the_checker_and_the_metrics():
    from nanorlhf import metrics, tasks

    chain = tasks.get("chain")
    own = replaced(8)
    for response, *_ in checking.load_check(8).RESPONSES:
        assert own["reward"](chain, "697470=", response) == chain.reward("697470=", response)
    reward = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert own["mean_se"](reward) == pytest.approx(metrics.mean_se(reward))
    assert solved(8).pass_at_k(9, 4, 3) == pytest.approx(metrics.pass_at_k(9, 4, 3))


@pytest.mark.slow
def test_week_2_trains_as_ours_does(tmp_path, monkeypatch, no_curves, capsys):
    """End to end: the right solution, a stub, and a solution that is wrong by a factor."""
    monkeypatch.setattr(plug, "ROOT", str(tmp_path))
    assert cli.main(["run", "2", "--mine", str(SOLUTIONS), "--steps", "3"]) == 0
    assert "Your run is our run" in capsys.readouterr().out
    mine = tmp_path / "mine"
    shutil.copytree(exercise(2).parent, mine / "week02")
    assert cli.main(["run", "2", "--mine", str(mine), "--steps", "3"]) == 1
    assert "not solved yet" in capsys.readouterr().out
    text = exercise(2, "course/solutions").read_text("utf-8")
    (mine / "week02/exercise.py").write_text(text.replace("/ denom", "/ (2 * denom)"), "utf-8")
    assert cli.main(["run", "2", "--mine", str(mine), "--steps", "3"]) == 1
    assert "Your run is another one" in capsys.readouterr().out


@pytest.mark.slow
@each_week
def test_every_week_trains_as_ours_does(week, tmp_path_factory, monkeypatch, no_curves, capsys):
    folder = tmp_path_factory.getbasetemp() / "course"  # the models that runs start from are made once
    monkeypatch.setattr(plug, "ROOT", str(folder))
    assert cli.main(["run", str(week), "--mine", str(SOLUTIONS), "--steps", "5"]) == 0


# ------------------------------------------------------------------------------------------------------------
# The command line


def run(*argv, cwd=ROOT):
    command = [sys.executable, "-m", "course", *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def write(folder, week, text):
    (folder / checking.folder_of(week)).mkdir(parents=True, exist_ok=True)
    (folder / checking.folder_of(week) / "exercise.py").write_text(text, "utf-8")


def test_what_a_students_file_can_do(tmp_path, capsys):
    """Print, raise, loop for ever, exit, lose a function: each is told, and the rest is checked."""
    write(
        tmp_path,
        7,
        """
import time

print("hello")

def kl_estimate(logp, ref_logp, kind):
    return logp - reflogp

def optimal_policy(ref_logp, reward, beta):
    while True:
        time.sleep(1)

def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    import os
    os._exit(0)

def ipo_loss(logp_w, logp_l, ref_w, ref_l):
    return logp_w

def best_of_n_kl(n):
    import math
    return math.log(n) - (n - 1) / n
""",
    )
    assert cli.main(["check", "7", "--mine", str(tmp_path), "--json", "--seconds", "8"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["exercises"], found["points"], found["of"]) == (1, 6, 1, 14)
    told = {result["exercise"]: result["message"] for result in found["results"]}
    assert "line 7 (`return logp - reflogp`)" in told["kl_estimate"] and "misspelt" in told["kl_estimate"]
    assert "loop that never ends" in told["optimal_policy"]
    assert "exit()" in told["dpo_loss"]
    assert "keep the function's parameters" in told["ipo_loss"]
    assert "no function kto_reference" in told["kto_reference"]
    assert told["best_of_n_kl"] == ""


def test_a_file_that_is_no_python(tmp_path):
    write(tmp_path, 8, "def chain_reward(prompt, response)\n    return 1.0\n")
    path = str(tmp_path / "week08/exercise.py")
    with pytest.raises(SyntaxError) as error:
        checking.load(path, "no_python")
    told = checking.explain(error.value, path)
    assert told.startswith("week08/exercise.py, line 1, is not Python: expected ':'")


def test_mistakes_on_the_command_line(tmp_path, capsys):
    for argv, words in [
        (["check", "11"], "weeks 1 to 10"),
        (["check", "3", "--mine", str(tmp_path)], "no week03/exercise.py"),
        (["--mine", str(tmp_path / "none")], "no such folder"),
        (["bug", "99"], "the hunts are 1 to"),
        (["bug", "1", "--hint", "9"], "hints 1 to"),
        (["handout", str(tmp_path)], "exists already"),
    ]:
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err


def test_an_unfinished_folder_is_listed(tmp_path, capsys):
    shutil.copytree(SOLUTIONS / "week08", tmp_path / "week08")
    write(tmp_path, 3, "def pairwise_loss(chosen, rejected)\n")  # no Python
    assert cli.main(["--mine", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("no week01/exercise.py")
    assert lines[2].endswith("0 of 3 solved, 0 of 8 points")
    assert lines[7].startswith("✔  8") and lines[7].endswith("3 of 3 solved, 8 of 8 points")


@pytest.mark.slow
def test_a_handout_has_no_solutions_and_works(tmp_path):
    out = tmp_path / "handout"
    assert cli.main(["handout", str(out)]) == 0
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert not any("solutions" in name or "course_wrong" in name for name in names)
    assert {"course/week10/exercise.py", "train_ppo.py", "docs/05-ppo.md", "tests/mutants.py"} <= names
    shutil.copy(exercise(8, "course/solutions"), out / "course/week08/exercise.py")
    status, text, _ = run("check", "8", cwd=out)
    assert status == 0 and "3 of 3 solved, 8 of 8 points" in text
    status, text, _ = run("bug", "1", "--reveal", cwd=out)
    assert status == 0 and "A good answer" not in text and "+        hidden = self(tokens, doc=doc)" in text


# ------------------------------------------------------------------------------------------------------------
# Bug hunts


@pytest.mark.parametrize("number", bugs.hunts())
def test_every_hunt_plants_a_bug(number):
    hunt = bugs.hunts()[number]
    file, source, replacement = bugs.mutant_of(hunt.mutant)
    text = (ROOT / file).read_text("utf-8")
    assert text.count(source) == 1
    compile(text.replace(source, replacement), file, "exec")
    assert hunt.level in (bugs.EASY, bugs.MEDIUM, bugs.HARD)
    trainer, *flags = hunt.command.split()
    module = importlib.import_module(trainer.removesuffix(".py"))
    from nanorlhf.run.cli import parse

    parse(module.Config, flags)  # raises on a flag that does not exist


def test_twelve_hunts_belong_to_weeks_and_have_answers():
    assert len(bugs.HUNTS) == 12
    assert {hunt.week for hunt in bugs.HUNTS.values()} == set(checking.WEEKS)
    assert set(load(SOLUTIONS / "hunts.py").ANSWERS) == set(bugs.HUNTS)


def test_hints_end_with_the_function(capsys):
    cli.main(["bug", "9", "--hint"])
    assert "without one" in capsys.readouterr().out
    cli.main(["bug", "9", "--hint", "4"])
    assert capsys.readouterr().out == "It is in the function shape_rewards.\n"


@pytest.mark.slow
def test_a_hunt_runs(tmp_path, monkeypatch, capsys):
    """Hunt 2 at its smallest: the run with the bug counts one token less of each response."""
    monkeypatch.setattr(plug, "ROOT", str(tmp_path))
    hunt = bugs.HUNTS[2]
    monkeypatch.setattr(hunt, "command", "train_sft.py --task chain --steps 2 --demos 400")
    assert cli.main(["bug", "2"]) == 0
    copy = tmp_path / "bug-02"
    assert not (copy / "repository/tests").exists()
    right = bugs.compare.load(next(tmp_path.glob("right-*")))
    wrong = bugs.compare.load(copy / "run")
    assert right[0]["len"] - wrong[0]["len"] == pytest.approx(1)
    assert "python -m course bug 2 --hint" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# The pages


@each_week
def test_every_week_has_its_pages(week):
    folder = ROOT / "course" / checking.folder_of(week)
    readme = (folder / "README.md").read_text("utf-8")
    for part in ("## Goals", "## Reading", "## Run", "## Look at", "## Exercises", "## Questions"):
        assert part in readme, part
    assert f"python -m course check {week}" in readme
    hunts = [number for number, hunt in bugs.HUNTS.items() if hunt.week == week]
    for number in hunts:
        assert f"python -m course bug {number}" in readme
    quiz = (SOLUTIONS / checking.folder_of(week) / "quiz.md").read_text("utf-8")
    assert re.findall(r"^(\d+)\. ", quiz, flags=re.M) == [str(n) for n in range(1, 9)]
    assert quiz.count("**Answer.**") == 8
    slides = (folder / "deck.md").read_text("utf-8").split("\n---\n")
    assert 12 <= len(slides) <= 20


def test_every_named_exercise_is_in_its_readme():
    for week in checking.WEEKS:
        readme = (ROOT / "course" / checking.folder_of(week) / "README.md").read_text("utf-8")
        missing = [name for name in points(week) if f"`{name}`" not in readme]
        assert not missing
