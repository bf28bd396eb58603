"""Rewards of whole responses: a function's errors, sums, the reward model's place; which prompts are kept."""

import csv
import functools
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from stages import words

import train_grpo
import train_ppo
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import RunError, UserError
from nanorlhf.hub.files import write_jsonl
from nanorlhf.rewards import evaluate, fresh_samples, load_prompts, score_responses
from nanorlhf.run.reward_functions import PRIVATE, UserFunction
from nanorlhf.run.worker import RewardFunction, Rewards, call_reward, rewards_of
from nanorlhf.tokenizer import Chat, Tokenizer

TOK = Tokenizer.from_chars("abcdef=")


@pytest.fixture(scope="module")
def models(stages):
    """policy, tokenizer, reward model."""
    return *hub.load(stages.folder / "sft" / "model"), hub.load(stages.folder / "rm" / "model")[0]


# one call


@pytest.mark.parametrize(
    "returns, value", [(1, 1.0), (0.25, 0.25), (True, 1.0), (torch.tensor(2.0), 2.0)]
)
def test_call_reward_gives_a_float(returns, value):
    got = call_reward("f", lambda *args: returns, "p", "t", {})
    assert type(got) is float and got == value


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda p, t, row: row["answer"], "reward f raised KeyError: 'answer' (prompt 'a=', response 'b')"),
        (lambda p, t, row: 1 / 0, "reward f raised ZeroDivisionError: division by zero ("),
        (lambda p, t, row: sys.exit(3), "reward f raised SystemExit: 3 (prompt 'a=', response 'b')"),
        (lambda p, t, row: (_ for _ in ()).throw(BaseException("x")), "reward f raised BaseException: x ("),
        (lambda p, t, row: 10**5000, "reward f returned a int (prompt 'a=', response 'b'); it must"),
        (lambda p, t, row: float("nan"), "reward f returned nan (prompt 'a=', response 'b'); it must"),
        *((lambda p, t, row, x=x: x, f"reward f returned {x!r} (") for x in (-1e999, None, "1", [1.0], 1j)),
    ],
)  # fmt: skip
def test_call_reward_names_the_sample(function, says):
    with pytest.raises(RunError, match="^" + re.escape(says)):
        call_reward("f", function, "a=", "b", {})


def test_ctrl_c_in_a_reward_is_no_error_of_the_reward():
    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward("f", interrupted, "a=", "b", {})


# in a process of its own

MISCHIEF = """
import os, pickle, signal, stat, sys, time
class Canary:
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return open, (self.path, "w")
def to_pipe(data):
    pipes = [fd for fd in range(3, 64) if fd_kind(fd) and stat.S_ISFIFO(fd_kind(fd))]
    for fd in pipes:
        try:
            os.write(fd, data)
        except OSError:  # the end that reads
            pass
def fd_kind(fd):
    try:
        return os.fstat(fd).st_mode
    except OSError:
        return 0
def f(prompt, response, row):
    with open(row["pids"], "a") as log:
        print(os.getpid(), file=log)
    match response:
        case "raise": raise KeyError("two\\nlines")
        case "interrupt": raise KeyboardInterrupt
        case "sys.exit": sys.exit(3)
        case "_exit": os._exit(4)
        case "hang": time.sleep(600)
        case "fork": os.fork()  # two of it return
        case "fork and tell":
            pid = os.fork()
            if pid:
                with open(row["pids"] + "-child", "w") as log:
                    print(pid, file=log)
        case "fork and hang":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
            with open(row["pids"], "a") as log:
                print(pid, file=log)
        case "all forks hang":
            os.fork()
            os.fork()
            time.sleep(600)
        case "daemon":
            if os.fork() == 0:
                os.setsid()
                with open(row["pids"] + "-daemon", "w") as log:
                    print(os.getpid(), file=log)
            time.sleep(600)
        case "print": print("noise", flush=True)
        case "garbage": to_pipe(b"no answer at all, and long enough")
        case "pickle":
            payload = pickle.dumps(Canary(row["pids"] + "-canary"))
            to_pipe(payload + b"\\n")
        case "answer": to_pipe(b'[0, [99.0, ""]]\\n')
        case "nan" | "inf": return float(response)
        case "none": return None
        case "str": return "1.0"
        case "tensor": return __import__("torch").ones(2)
    return len(prompt) + len(response)
def g(prompt, response):
    return 0.5
"""
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def mischief(tmp_path):
    """mischief(timeout, *names) → Rewards; .score(rewards, *texts) of the prompt "ab"; .pids() of it all."""
    (tmp_path / "r.py").write_text(MISCHIEF)
    row = dict(prompt="ab", pids=f"{tmp_path}/pids")

    def make(timeout, *names):
        cfg = SimpleNamespace(reward=[f"{tmp_path}/r.py:{name}" for name in names], reward_timeout=timeout)
        return rewards_of(tasks.get("chain"), cfg.reward, cfg.reward_timeout)

    make.score = lambda rewards, *texts: rewards.values(0, texts, [row] * len(texts))
    make.pids = lambda: {int(pid) for pid in Path(row["pids"]).read_text().split()}
    return make


def alive(pid):
    """Whether a process runs (an orphan that has ended, and waits for its new parent, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_the_end(pids, seconds=300):
    limit = time.monotonic() + seconds  # they end in a second, but for a busy machine
    while any(map(alive, pids)):
        assert time.monotonic() < limit, "orphans"
        time.sleep(0.02)


@posix
def test_what_a_reward_function_does_ends_with_the_call(mischief, capfd, tmp_path):
    """Whatever it does, the other samples have their scores, in order; failures are 0, counted, said once."""
    good = ["x" * n for n in range(14)]
    bad = ["raise", "interrupt", "sys.exit", "_exit", "hang", "garbage", "pickle", "answer"]
    bad += ["all forks hang", "daemon"]  # they hold the pipe open, whose end would be waited for
    odd = ["fork", "print", "fork and hang"]
    texts = [text for pair in zip(good, [*bad, *odd, "raise"]) for text in pair]
    with mischief(5.0, "f") as rewards:
        want = [0.0 if text in bad else 2.0 + len(text) for text in texts]
        assert mischief.score(rewards, *texts) == want
        assert mischief.score(rewards, "x", "xx") == [3.0, 4.0]  # no answer is left over in the pipe
        assert rewards.share_failed() == 11 / 30 and rewards.share_failed() is None
    os.kill(int(Path(f"{tmp_path}/pids-daemon").read_text()), signal.SIGKILL)  # in a session of its own
    assert not list(tmp_path.glob("*canary"))  # nothing that came from the process was unpickled
    out, err = capfd.readouterr()
    says = "warning: reward f raised KeyError: 'two\\nlines' (prompt 'ab', response 'raise'): scored 0"
    assert out.startswith(says) and len(out.splitlines()) == 1 and "noise" in err and "Traceback" not in err
    assert os.getpid() not in mischief.pids() and len(mischief.pids()) >= 4
    wait_for_the_end(mischief.pids())


@posix
def test_a_fork_that_returns_ends_while_the_others_go_on(mischief, tmp_path):
    """It would wait for questions until the end of the run, one process more for each call."""
    with mischief(30.0, "f") as rewards:
        assert mischief.score(rewards, "fork and tell") == [15.0]
        wait_for_the_end([int(Path(f"{tmp_path}/pids-child").read_text())], seconds=60)
        assert mischief.score(rewards, "x") == [3.0]


def test_a_warning_shows_control_sequences(tmp_path, capsys):
    """The text of an exception may quote the response."""
    (tmp_path / "r.py").write_text("def f(p, r):\n    raise ValueError(r) if len(r) > 1 else SystemExit\n")
    rows = [dict(prompt="p")] * 3
    with rewards_of(None, [f"{tmp_path}/r.py:f"], 30.0) as rewards, pytest.raises(RunError):
        rewards.values(0, ["\x1b[2J\x9b2J", "", ""], rows)
    out = capsys.readouterr().out
    assert "reward f raised ValueError: \\u001b[2J\\u009b2J (prompt" in out and out.isascii()


@posix
def test_a_value_that_is_no_number_stops_the_run_at_once(mischief):
    with mischief(30.0, "f", "g") as rewards:
        for text, shown in dict(nan="nan", inf="inf", none="None", str="'1.0'", tensor="tensor(").items():
            says = f"^reward f returned {re.escape(shown)}.*response '{text}'.; it must be a finite number"
            with pytest.raises(RunError, match=says):
                mischief.score(rewards, "x", "x", "x", text, "x")
        assert rewards.values(1, ["x"], [dict(prompt="ab")]) == [0.5]
        says = "^more than half of 4 calls failed; the last: reward f raised KeyError: .*'raise'"
        with pytest.raises(RunError, match=says):
            mischief.score(rewards, "_exit", "x", "raise", "raise")
        assert mischief.score(rewards, "raise", "x", "raise", "x") == [0, 3, 0, 3]  # half is not more
    wait_for_the_end(mischief.pids())


def test_a_file_that_cannot_be_imported_there_is_a_run_error(tmp_path):
    """It imports here; in the other process, where pytest is not, it does not."""
    for does, says in (("raise KeyError(1)", "importing .*r.py fails: KeyError: 1"),
                       ("os._exit(3)", "the process that imports .*r.py:f ended or hangs")):  # fmt: skip
        source = f"import os, sys\nif 'pytest' not in sys.modules: {does}\n"
        (tmp_path / "r.py").write_text(source + "def f(prompt, response): return 1.0\n")
        cfg = SimpleNamespace(reward=[f"{tmp_path}/r.py:f"], reward_timeout=1.0)
        with rewards_of(None, cfg.reward, cfg.reward_timeout) as rewards:
            with pytest.raises(RunError, match=says):
                rewards.values(0, ["x"], [dict(prompt="ab")])
            assert rewards.process is None


def test_rewards_of_one_name_are_refused(tmp_path):
    """Their columns would be one."""
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def f(p, r): return 1.0")
    cfg = SimpleNamespace(reward=[f"{tmp_path}/a.py:f", f"{tmp_path}/b.py:f*2"], reward_timeout=1.0)
    with pytest.raises(UserError, match="--reward: two are called f"):
        rewards_of(None, cfg.reward, cfg.reward_timeout)


RUN = """
import sys; sys.path.insert(0, {root!r})
print("the script runs", flush=True)
import train_grpo
train_grpo.train(train_grpo.Config(**{flags!r}))
"""


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_trainer_leaves_no_process(stages, tmp_path):
    """kill -9 while the reward function hangs: its process ends by itself.

    The trainer is a script without a main guard, which the process of the rewards must not run once more.
    """
    (tmp_path / "r.py").write_text(f"""import os, time
def f(prompt, response):
    with open({str(tmp_path / "pid")!r}, "w") as log: log.write(f"{{os.getpid()}} ")
    time.sleep(600)
""")
    own = dict(reward=[f"{tmp_path}/r.py:f"], rm="", reward_timeout=500.0)
    flags = stages.flags(train_grpo, tmp_path / "run", **own)
    (tmp_path / "run.py").write_text(RUN.format(root=str(Path(__file__).parents[1]), flags=flags))
    with open(tmp_path / "out", "w") as out:
        trainer = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=out, stderr=out)
    pid = tmp_path / "pid"
    while trainer.poll() is None and not (pid.exists() and pid.read_text().endswith(" ")):
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    out = (tmp_path / "out").read_text()
    assert out.count("the script runs") == 1 and "Traceback" not in out
    wait_for_the_end({int(pid.read_text())})


ASK = """
from nanorlhf.run.aside import Aside
process = Aside("nanorlhf.run.reward_functions", stderr=None)
assert process.answer((None, [{spec!r}]), 120) == ("", "")
print(process.answer((0, ("p", "r", {{}})), 2))
"""


def ask(tmp_path, body, shell):
    """Write a reward function, call it from a script → (what the script has printed, its status)."""
    (tmp_path / "r.py").write_text(f"import os, re, signal\ndef f(p, r):\n    {body}\n")
    script = ASK.format(spec=f"{tmp_path}/r.py:f")
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return done.stdout, done.returncode


@posix
def test_prints_with_closed_error_stream(tmp_path):
    """Standard error is closed: the next file of the process would take its number, and get the prints."""
    printed, status = ask(tmp_path, "print('noise', flush=True); return 1", 'exec "$@" 2>&-')
    assert printed == "([1.0, ''], '')\n" and status == 0


@posix
def test_environment_of_the_reward_process(tmp_path):
    """A program that the function starts, another version of Python say, must not get our module path."""
    body = "return float(os.environ.get('PYTHONPATH') == 'mine')"
    printed, status = ask(tmp_path, body, 'PYTHONPATH=mine exec "$@"')
    assert printed == "([1.0, ''], '')\n" and status == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_trainer_leaves_no_regular_expression(tmp_path):
    """The function kills the trainer. Then one call of re keeps the thread from running that would see it."""
    body = "open('PID', 'w').write(str(os.getpid())); os.kill(os.getppid(), 9); re.match('(a|a)*b', 'a' * 60)"
    _, status = ask(tmp_path, body.replace("PID", f"{tmp_path}/pid"), 'exec "$@"')
    assert status == -signal.SIGKILL
    wait_for_the_end({int((tmp_path / "pid").read_text())})


@pytest.mark.parametrize("trainer", [train_grpo, train_ppo], ids=lambda t: t.__name__)
def test_a_run_goes_on_with_its_failures_counted(trainer, stages, tmp_path, no_curves):
    """The column has the share of the samples that fail; all else is as with a function that gives them 0."""
    (tmp_path / "r.py").write_text("""
def f(prompt, response):
    if prompt[0] == "a": raise ValueError("a")
    return response.count("a") / 3
def g(prompt, response):
    return 0 if prompt[0] == "a" else f(prompt, response)
""")
    tables = []
    for name, timeout in (("f", 60.0), ("g", 0.0)):
        reward = [f"{tmp_path}/r.py:{name}"]
        out, more = f"{tmp_path}/{name}", dict(rm="", reward=reward, reward_timeout=timeout, steps=3)
        trainer.train(stages.config(trainer, out, **more))
        with open(f"{out}/metrics.csv") as f:
            rows = csv.DictReader(f)
            tables.append([{k: v for k, v in row.items() if k not in ("s", "tok_s")} for row in rows])
    shares = [float(row.pop("reward_failed")) for row in tables[0]]
    assert [row.pop("reward_failed") for row in tables[1]] == [""] * 3
    assert tables[0] == tables[1] and 0 < max(shares) < 0.5


# signatures

VALUES = dict(prompt="p", _at="f.jsonl:3", _ids=[1], answer="4", row="own", level=2, extra_info={"n": 1})
VALUES["_pair"] = ([1], [2])


def called(function, row=VALUES, prompt="p", response="r"):
    """What the function returns, with its arguments as the process of the rewards would pass them."""
    return UserFunction(function)(prompt, response, row)


@pytest.mark.parametrize(
    "function, want",
    [
        (lambda prompt, response: (prompt, response), ("p", "r")),
        (lambda x, y: (x, y), ("p", "r")),
        (lambda *args: args, ("p", "r")),
        (lambda p, *rest: (p, rest), ("p", ("r",))),
        (lambda p, r, scale=2.0: scale, 2.0),
        (lambda p, r, row: row == {k: v for k, v in VALUES.items() if k not in PRIVATE}, True),
        (lambda p, r, row=None: row == {k: v for k, v in VALUES.items() if k not in PRIVATE}, True),
        (lambda p, r, *, row: row == {k: v for k, v in VALUES.items() if k not in PRIVATE}, True),
        (lambda p, r, answer: answer, "4"),
        (lambda p, r, answer, level: (answer, level), ("4", 2)),
        (lambda p, r, level=7, other=8: (level, other), (2, 8)),
        (lambda p, r, extra_info: extra_info, {"n": 1}),
        (lambda prompt, r, **kw: sorted(kw), ["answer", "extra_info", "level", "row"]),
        (functools.partial(lambda p, r, a, b: (p, r, a, b), a=1, b=2), ("p", "r", 1, 2)),
    ],
)  # fmt: skip
def test_parameters_are_keys_of_the_row(function, want):
    assert called(function) == want


def test_a_parameter_that_is_annotated_as_a_dict_is_the_row():

    def function(prompt, response, x):
        return x

    kinds = (dict, dict[str, str], "dict", "dict[str, object]", typing.Dict[str, int], "Optional[dict]",  # noqa: UP006
             typing.Optional[dict], dict | None, typing.Mapping[str, int])  # noqa: UP006, UP007, UP045
    for annotation in kinds:
        function.__annotations__["x"] = annotation
        assert called(function).keys() == VALUES.keys() - set(PRIVATE)
        assert UserFunction(function).missing({}) == []
    for annotation in (list[dict], str, "list[dict]", "Dictionary"):
        function.__annotations__["x"] = annotation
        assert UserFunction(function).missing(VALUES) == ["x"]

    def a_key(prompt, response, extra_info: dict):
        return extra_info

    assert called(a_key) == {"n": 1}


@pytest.mark.parametrize("second", "ground_truth gold label target solution reference answer".split())
def test_a_gold_in_place_of_the_response_is_refused(second):
    """(output, gold) called as (prompt, response) would never pay."""
    function = eval(f"lambda output, {second}: 1.0")
    with pytest.raises(UserError, match="takes neither"):
        UserFunction(function)


class Scorer:
    def __call__(self, prompt, response, answer):
        return response == answer

    def method(self, prompt, response, row):
        return response == row["answer"]


def test_methods_and_objects_are_functions_too():
    assert called(Scorer(), response="4") and called(Scorer().method, response="4")
    assert not called(Scorer()) and not called(Scorer().method)


@pytest.mark.parametrize(
    "function",
    [
        lambda: 0.0,
        lambda response: 0.0,
        lambda response, answer: 0.0,
        lambda response, prompt: 0.0,
        lambda completion, target: 0.0,
        lambda text, prompt: 0.0,
        lambda prompt, answer: 0.0,
        lambda prompt, row: 0.0,
        lambda row, response: 0.0,
        lambda *args, answer: 0.0,
        lambda *, prompt, response: 0.0,
        lambda p, r, row, /: 0.0,
        max,
        3,
    ],
)
def test_any_other_signature_shows_those_accepted(function):
    says = r"takes neither \(prompt, response, row\) nor .*TRL's \(prompts, comp.*verl's \(data_source"
    with pytest.raises(UserError, match=says):
        UserFunction(function)


def test_a_parameter_without_a_key_is_an_error_at_the_start(tmp_path):
    """It names file, line, function and key, before any model samples."""
    (tmp_path / "r.py").write_text("def f(prompt, response, answer, level): return 0.0\n")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{w}=", "answer": "a", "level": 1} for w in "abcdef"])
    rewards = rewards_of(None, [f"{tmp_path}/r.py:f"])
    cfg = prompts_cfg(data=f"{tmp_path}/p.jsonl")
    load_prompts(cfg, tasks.get("reviews"), TOK, 12, 5, rewards)
    with open(tmp_path / "p.jsonl", "a") as f:
        f.write('{"prompt": "fed=", "answer": "a"}\n')
    says = r"p.jsonl:7: reward f takes neither .*; the row has no level \(its keys are prompt, answer\)"
    with pytest.raises(UserError, match=says):
        load_prompts(cfg, tasks.get("reviews"), TOK, 12, 5, rewards)


def trl(prompts, completions, answer, **kwargs):
    return [float(c == a) + len(kwargs["level"]) for c, a in zip(completions, answer, strict=True)]


def trl_short(completions, **kwargs):
    return [float(len(completions)) for _ in kwargs["answer"]]


def trl_chat(completions, **kwargs):
    return [float(completion[0]["content"] == "r") for completion in completions]


def test_functions_written_for_trl():
    assert called(trl, response="4") == 2.0 and called(trl) == 1.0 and called(trl_short) == 1.0
    chat = Chat([{"role": "user", "content": "hi"}])
    assert called(trl_chat, prompt=chat) == 1.0 and called(trl_chat, prompt=chat, response="s") == 0.0
    assert called(lambda prompts, completions: prompts, prompt=chat) == chat.messages
    assert UserFunction(trl).missing({"prompt": "p", "level": 1}) == ["answer"]
    for returns, shown in (([1.0, 2.0], "[1.0, 2.0]"), ([], "[]"), ([None], "None"), (["1"], "'1'"),
                           ([[1.0]], "[1.0]")):  # fmt: skip
        function = UserFunction(lambda completions, returns=returns: returns)
        with pytest.raises(RunError, match=f"^reward f returned {re.escape(shown)} "):
            call_reward("f", function, "p", "r", {})


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "source": data_source, "extra": extra_info}


def test_functions_written_for_verl():
    nested = dict(prompt="p", data_source="gsm8k", reward_model={"style": "rule", "ground_truth": "4"})
    for row in (dict(prompt="p", answer="4"), dict(answer="5", ground_truth="4"), nested):
        assert called(compute_score, row, response="4") == 1.0 and called(compute_score, row) == 0.0
        assert UserFunction(compute_score).missing(row) == []
    assert UserFunction(compute_score).missing({"prompt": "p"}) == ["ground_truth"]
    plain = lambda solution_str, ground_truth, **kwargs: len(kwargs["data_source"])  # noqa: E731
    assert called(plain, nested) == 5
    for returns, shown in (({}, "None"), ({"score": "1"}, "'1'"), ([1.0], "[1.0]"), (None, "None")):
        function = UserFunction(lambda solution_str, returns=returns: returns)
        with pytest.raises(RunError, match=f"^reward f returned {re.escape(shown)} "):
            call_reward("f", function, "p", "r", {})


# files and their neighbours


def test_a_reward_file_imports_its_neighbours(tmp_path):
    """helpers.py of its own folder, though the tests have one too, and although two folders have one each."""
    specs = []
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").write_text(f"def score(): return {value}\n")
        source = "from helpers import score\ndef {0}(p, r):\n    return score()\n"
        (tmp_path / folder / "r.py").write_text(source.format(folder))
        specs.append(f"{tmp_path}/{folder}/r.py:{folder}")
    theirs = helpers
    for timeout in (0.0, 30.0):
        with rewards_of(None, specs, timeout) as rewards:
            row = dict(prompt="p")
            assert [rewards.values(i, ["r"], [row]) for i in (0, 1)] == [[1.0], [2.0]]
    assert sys.modules["helpers"] is theirs


def test_a_script_that_names_its_own_file(tmp_path):
    """Without a main guard, importing it trains once more, and that run would import it again, and so on."""
    spec = f"{tmp_path}/s.py:f"
    source = "from nanorlhf.run.worker import rewards_of\ndef f(p, r): return 1.0\n"
    run = f"rewards_of(None, [{spec!r}])\n"
    (tmp_path / "s.py").write_text(source + run)
    with pytest.raises(UserError, match=r"give the function itself: reward=\[score\]$") as error:
        rewards_of(None, [spec])
    assert str(error.value).count("importing") == 1
    (tmp_path / "s.py").write_text(f"{source}if __name__ == '__main__': {run}")
    assert rewards_of(None, [spec]).values(0, ["r"], [dict(prompt="p")]) == [1.0]


def test_a_neighbour_may_be_imported_when_the_function_is_called(tmp_path):
    (tmp_path / "only_here.py").write_text("VALUE = 3\n")
    (tmp_path / "r.py").write_text("def f(p, r):\n    import only_here\n    return only_here.VALUE\n")
    with rewards_of(None, [f"{tmp_path}/r.py:f"], 30.0) as rewards:
        assert rewards.values(0, ["r"], [dict(prompt="p")]) == [3.0]


def test_the_process_imports_neither_torch_nor_the_main_module(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(tmp_path / "main.py"), raising=False)
    monkeypatch.setattr(main, "__spec__", None)  # as of a script
    (tmp_path / "r.py").write_text("import sys\ndef f(p, r): return 'torch' in sys.modules\n")
    with rewards_of(None, [f"{tmp_path}/r.py:f"], 30.0) as rewards:
        assert rewards.values(0, ["r"], [dict(prompt="p")]) == [0.0]
    assert not (tmp_path / "ran").exists() and sys.modules["__main__"] is main


# functions of this process


def test_python_functions_run_here_beside_those_of_files(tmp_path, capsys):
    """Said once; the file's runs in its own process, and a function that raises is a RunError."""
    (tmp_path / "r.py").write_text("import os\ndef there(p, r): return os.getpid()\n")

    def here(prompt, response, answer):
        return os.getpid() + (0 if answer else 1 / 0)

    rows = [dict(prompt="p", answer=1)]
    with rewards_of(None, [here, f"{tmp_path}/r.py:there"], 30.0) as rewards:
        said = capsys.readouterr().out
        assert said == "reward here is called in this process, where no --reward_timeout guards it\n"
        assert rewards.columns() == ["reward/here", "reward/there"]
        assert rewards.values(0, ["r"], rows) == [os.getpid()] and rewards.process is None
        assert rewards.values(1, ["r"], rows)[0] not in (os.getpid(), 0.0)
        with pytest.raises(RunError, match="reward here raised ZeroDivisionError"):
            rewards.values(0, ["r"], [dict(prompt="p", answer=0)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("reward, says", [
    ("r.py:f", r"reward='r.py:f': must be a list"),
    (len, "must be a list"),
    ([lambda: 0.0], r"reward <lambda>: takes neither"),
    ([Scorer().method, Scorer().method], "two are called method"),
    ([3], "--reward 3"),
])
def test_python_functions_that_cannot_be(reward, says):
    with pytest.raises(UserError, match=says):
        rewards_of(None, reward)


# a rollout


def rollout(models, n=6):
    policy, tok, _ = models
    rows = words(n)
    rolls, texts = generate.respond(policy, tok, [r["prompt"] for r in rows], 1, 5, seed=3)
    rolls[0].rows = rows
    return rolls[0], texts, rows


def test_several_rewards_are_summed_with_their_weights(models):
    """Each function sees its own row, prompt and text: the sum by hand, per sample."""
    roll, texts, rows = rollout(models)
    rewards = Rewards([
        RewardFunction("length", 0.5, lambda prompt, text, row: len(text)),
        RewardFunction("first", -2.0, lambda prompt, text, row: ord(prompt[0])),
        RewardFunction("answer", 1.0, lambda p, text, row: ord(row["response"][0]) * (row["prompt"] == p)),
    ])  # fmt: skip
    score = score_responses(roll, None, rewards)
    want = [0.5 * len(t) - 2 * ord(r["prompt"][0]) + ord(r["prompt"][2]) for t, r in zip(texts, rows)]
    assert score.shape == (6,) and score.dtype == torch.float32 and score.tolist() == want
    assert len(set(want)) > 3


def test_rows_and_texts_must_agree(models):
    rewards = Rewards([RewardFunction("f", 1.0, lambda *args: 0)])
    with pytest.raises(ValueError):
        rewards.values(0, ["a", "b"], [{"prompt": "a="}])


def test_reward_model_scores_each_row_at_its_last_token(models):
    """Alone and unpadded: the head on the hidden state of the last sampled token, EOS or not."""
    roll, texts, rows = rollout(models, 40)
    rm = models[2]
    score = score_responses(roll, rm, None)
    assert not score.requires_grad and roll.finished.any() and not roll.finished.all()
    for i, n in enumerate(roll.lengths.tolist()):
        alone = rm.trunk(roll.tokens[i : i + 1, :n])[0, -1] @ rm.score.weight[0] + rm.reward_bias
        assert score[i].item() == pytest.approx(alone.item(), abs=1e-5)


# held-out evaluation


def greedy(model, tok, prompt, new):
    """Greedy decoding with nothing but logits: no cache, no batch."""
    ids = tok.encode(prompt)
    start = len(ids)
    while len(ids) < start + new:
        ids.append(model.logits(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == tok.eos_id:
            return tok.decode(ids[start:-1])
    return tok.decode(ids[start:])


def test_evaluate_means_over_all_prompts_whatever_the_batches(models):
    """600 prompts are more than one batch: each text meets its own row; greedy against plain argmax."""
    policy, tok, _ = models
    seen = []

    def reward(prompt, text, row):
        assert prompt == row["prompt"]
        seen.append((prompt, text))
        return sum(map(ord, text)) / 100

    rows = words(600)
    rewards = Rewards([RewardFunction("f", 1.0, reward)])

    def measure():
        def score(roll):
            return score_responses(roll, None, rewards)

        return evaluate(policy, tok, rows, score, 0.7, 0, 5)

    out = measure()
    sampled, best = seen[:600], seen[600:]
    assert [p for p, _ in sampled] == [p for p, _ in best] == [r["prompt"] for r in rows]
    by_hand = {prompt: greedy(policy, tok, prompt, 5) for prompt in {r["prompt"] for r in rows}}
    assert all(text == by_hand[prompt] for prompt, text in best) and sampled != best
    for name, pairs in (("eval/reward", sampled), ("eval/greedy", best)):
        mean = sum(sum(map(ord, text)) / 100 for _, text in pairs) / 600
        assert out[name] == pytest.approx(mean, rel=1e-5)
    assert measure() == out  # same seed, same figures


# prompts


def prompts_cfg(**more):
    flags = dict(data="", eval_data="", skip_bad_rows=False, seed=0, eval_prompts=100, own_data=False)
    return SimpleNamespace(**flags | more)


NO_REWARDS = Rewards([])


def load(tmp_path, rows, max_len=12, tok=TOK, rewards=NO_REWARDS, **more):
    write_jsonl(tmp_path / "p.jsonl", rows)
    cfg = prompts_cfg(data=f"{tmp_path}/p.jsonl", **more)
    return load_prompts(cfg, tasks.get("reviews"), tok, max_len, 5, rewards)


def test_prompts_are_split_by_their_text_and_keep_their_rows(tmp_path):
    rows = [{**r, "answer": i} for i, r in enumerate(words(200))]
    train, test = load(tmp_path, rows)
    assert sorted(r["answer"] for r in train + test) == list(range(200))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test} and 10 < len(test) < 60
    assert all(tasks.held_out(r["prompt"]) for r in test)
    short = load(tmp_path, rows, eval_prompts=3)
    assert short == (train, test[:3])


def test_builtin_prompts_do_not_meet():
    task = tasks.get("chain")
    train, test = load_prompts(prompts_cfg(), task, Tokenizer.from_chars(task.alphabet), 32, 5, NO_REWARDS)
    assert len(train) == 3000 and len(test) == 100 and "answer" in train[0]
    assert not any(tasks.held_out(r["prompt"]) for r in train)
    assert all(tasks.held_out(r["prompt"]) for r in test)


def test_prompts_without_room_for_a_response_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": "a" * n + "="} for n in range(1, 12)]
    train, test = load(tmp_path, rows)
    assert max(len(r["prompt"]) for r in train + test) <= 12 - 5 and len(train + test) == 6
    says = "5 of 11 prompts are longer than 7 tokens (the context of 12 less --max_new_tokens 5); dropped"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, says",
    [
        ([], "the file is empty"),
        ([{"prompt": "a="}, {"text": "b="}], 'p.jsonl:2: missing key "prompt"'),
        ([{"prompt": "a="}, {"prompt": 3}], 'p.jsonl:2: "prompt" is a number, expected a string'),
        ([{"prompt": "a="}, {"prompt": " "}], 'p.jsonl:2: "prompt" is empty'),
        ([{"prompt": "a="}, {"prompt": "é="}], "p.jsonl:2: tokenizer: character 'é' is not in alphabet"),
        ([{"prompt": "a" * 9}] * 2, "no training prompt is left: 2 of 2 prompts are longer than 7 tokens"),
        ([{"prompt": "bed="}], "1 are held out"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_by_file_and_line(rows, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        load(tmp_path, rows)


def test_a_task_that_the_model_has_no_tokens_for():
    with pytest.raises(UserError, match="--task: tokenizer: character '[0-9]' is not in alphabet"):
        load_prompts(prompts_cfg(), tasks.get("chain"), TOK, 32, 5, NO_REWARDS)


def test_entropy_and_kl_of_fresh_samples_are_means_of_their_own_kind():
    """Entropy per sampled token, KL per response, both in nats; by all logits in float64."""
    tok = Tokenizer.from_chars("abcdefghijk")
    policy, ref = helpers.tiny(), helpers.tiny(seed=1)
    prompts = [dict(prompt=letter) for letter in "abcdefghijk"]
    roll, figures = fresh_samples(policy, ref, tok, prompts, 8, seed=0)
    entropy, kl = [], []
    for ids, start, end in zip(roll.tokens, roll.prompt_len.tolist(), roll.lengths.tolist()):
        logits = [model.double().logits(ids[None, : end - 1])[0, start - 1 :] for model in (policy, ref)]
        p, q = (x.log_softmax(-1) for x in logits)
        entropy += (-(p.exp() * p).sum(-1)).tolist()
        kl.append((p - q).gather(1, ids[start:end, None]).sum().item())
    assert len(set(roll.lengths.tolist())) > 2
    assert figures["entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-4)
    assert figures["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
