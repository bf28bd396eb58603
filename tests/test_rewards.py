"""Rewards of whole responses: a function's errors, sums, the reward model's place; which prompts are kept."""

import csv
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stages import words

import train_grpo
import train_ppo
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import RunError, UserError
from nanorlhf.hub.files import write_jsonl
from nanorlhf.rewards import evaluate, load_prompts, score_responses
from nanorlhf.run.worker import RewardFunction, Rewards, call_reward, rewards_of
from nanorlhf.tokenizer import Tokenizer

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
import os, signal, sys, time
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
        case "fork and hang":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
            with open(row["pids"], "a") as log:
                print(pid, file=log)
        case "print": print("noise", flush=True)
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


def wait_for_the_end(pids):
    limit = time.monotonic() + 30
    while any(map(alive, pids)):
        assert time.monotonic() < limit, "orphans"
        time.sleep(0.02)


@posix
def test_what_a_reward_function_does_ends_with_the_call(mischief, capfd):
    """Whatever it does, the other samples have their scores, in order; failures are 0, counted, said once."""
    good = ["x" * n for n in range(9)]
    bad = ["raise", "interrupt", "sys.exit", "_exit", "hang"]
    odd = ["fork", "print", "fork and hang"]
    texts = [text for pair in zip(good, [*bad, *odd, "raise"]) for text in pair]
    with mischief(3.0, "f") as rewards:
        want = [0.0 if text in bad else 2.0 + len(text) for text in texts]
        assert mischief.score(rewards, *texts) == want
        assert mischief.score(rewards, "x", "xx") == [3.0, 4.0]  # no answer is left over in the pipe
        assert rewards.share_failed() == 6 / 20 and rewards.share_failed() is None
    out, err = capfd.readouterr()
    says = "warning: reward f raised KeyError: 'two\\nlines' (prompt 'ab', response 'raise'): scored 0"
    assert out.startswith(says) and len(out.splitlines()) == 1 and "noise" in err and "Traceback" not in err
    assert os.getpid() not in mischief.pids() and len(mischief.pids()) >= 4
    wait_for_the_end(mischief.pids())
    assert multiprocessing.active_children() == []


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
    """It imports here; in the other process, whose parent it looks for, it does not."""
    source = "import multiprocessing\nassert multiprocessing.parent_process() is None\n"
    (tmp_path / "r.py").write_text(source + "def f(prompt, response): return 1.0\n")
    cfg = SimpleNamespace(reward=[f"{tmp_path}/r.py:f"], reward_timeout=1.0)
    says = "the process that imports .*r.py:f ended"
    with rewards_of(None, cfg.reward, cfg.reward_timeout) as rewards, pytest.raises(RunError, match=says):
        rewards.values(0, ["x"], [dict(prompt="ab")])
    assert multiprocessing.active_children() == []


def test_rewards_of_one_name_are_refused(tmp_path):
    """Their columns would be one."""
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def f(p, r): return 1.0")
    cfg = SimpleNamespace(reward=[f"{tmp_path}/a.py:f", f"{tmp_path}/b.py:f*2"], reward_timeout=1.0)
    with pytest.raises(UserError, match="--reward: two are called f"):
        rewards_of(None, cfg.reward, cfg.reward_timeout)


RUN = """
import sys; sys.path.insert(0, {root!r})
import train_grpo
if __name__ == "__main__":
    train_grpo.train(train_grpo.Config(**{flags!r}))
"""


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_trainer_leaves_no_process(stages, tmp_path):
    """kill -9 while the reward function hangs: its process ends by itself."""
    (tmp_path / "r.py").write_text(f"""import os, time
def f(prompt, response):
    with open({str(tmp_path / "pid")!r}, "w") as log: log.write(f"{{os.getpid()}} ")
    time.sleep(600)
""")
    own = dict(reward=[f"{tmp_path}/r.py:f"], rm="", reward_timeout=500.0)
    flags = stages.flags(train_grpo, tmp_path / "run", **own)
    (tmp_path / "run.py").write_text(RUN.format(root=str(Path(__file__).parents[1]), flags=flags))
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while trainer.poll() is None and not (pid.exists() and pid.read_text().endswith(" ")):
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    wait_for_the_end({int(pid.read_text())})


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
    assert multiprocessing.active_children() == []


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
    flags = dict(data="", skip_bad_rows=False, seed=0, eval_prompts=100)
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
        ([{"prompt": "bed="}], "1 are held out (15% of all prompts, by a hash)"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_by_file_and_line(rows, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        load(tmp_path, rows)


def test_a_task_that_the_model_has_no_tokens_for():
    with pytest.raises(UserError, match="--task: tokenizer: character '[0-9]' is not in alphabet"):
        load_prompts(prompts_cfg(), tasks.get("chain"), TOK, 32, 5, NO_REWARDS)
