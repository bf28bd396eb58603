"""Faults inside a step, of rewards, and of the surroundings. Docstrings are rows of docs/reliability.md."""

import gc
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from runs import metrics, same_run
from stages import TRAINERS

import evaluate
import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import hub
from nanorlhf.errors import RunError

ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("FAULTS_FULL"))
RL = pytest.mark.parametrize("trainer", [train_ppo, train_grpo], ids=lambda t: t.__name__)
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def rewards(tmp_path, body, **more):
    """Flags for a reward function with this body, called in this process unless more says otherwise."""
    (tmp_path / "r.py").write_text(f"import os, sys, time\ndef f(prompt, response, row):\n    {body}\n")
    return dict(rm="", reward=[f"{tmp_path}/r.py:f"], reward_timeout=0) | more


def biased(stages, tmp_path, towards):
    """A policy that writes EOS at once (towards 1) or never (towards -1) → its folder."""
    model, tok = hub.load(stages.folder / "sft/model")
    with torch.no_grad():
        model.norm.weight.zero_()  # hidden states are then the norm's bias, whatever was read
        model.norm.bias.copy_(towards * 30 * model.wte.weight[tok.eos_id])
    hub.save(model, tok, tmp_path / "biased")
    return str(tmp_path / "biased")


def finite(out):
    return all(math.isfinite(float(x)) for row in metrics(out) for x in row.values() if x)


@RL
def test_row_24_empty_completions(trainer, run, stages, tmp_path):
    """S | every completion is empty, EOS at once | scored, one token long, finite loss"""
    flags = rewards(tmp_path, "assert response == ''; return 0.5")
    assert run(trainer, init=biased(stages, tmp_path, 1), **flags).status == 0
    assert finite(tmp_path / "run")
    assert all(float(row["len"]) == float(row["stop"]) == 1 for row in metrics(tmp_path / "run"))


@RL
def test_row_25_no_completion_ends(trainer, run, stages, tmp_path):
    """S | no completion ends in EOS | `stop` is 0; PPO gives no_eos_score in place of the score, GRPO can
    penalise"""
    more = {} if trainer is train_ppo else dict(overlong_penalty=0.5)
    flags = rewards(tmp_path, "return len(response)", steps=2, **more)
    init = biased(stages, tmp_path, -1)
    assert run(trainer, init=init, **flags).status == 0
    assert finite(tmp_path / "run") and all(float(row["stop"]) == 0 for row in metrics(tmp_path / "run"))
    if trainer is train_ppo:
        x = torch.zeros(2, 3)
        mask, ends = torch.ones(2, 3).bool(), torch.tensor([True, False])
        shaped = train_ppo.shape_rewards(torch.tensor([7.0, 7.0]), x, x, mask, ends, 0.1, -1.0)
        assert shaped[:, -1].tolist() == [7, -1]
    else:  # at its limit of 10 tokens a response loses half a point, at 8 tokens nothing
        assert train_grpo.overlong(torch.tensor([10, 8]), 10, 0.5).tolist() == [-0.5, 0]


def test_row_26_all_masked_micro_batch(stages):
    """S | a micro-batch without a single token that counts | zero loss and gradient, never NaN; the other
    rows' gradient is what it is without it"""
    model, tok = hub.load(stages.folder / "sft/model")
    tokens = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    mask = torch.tensor([[False] * 4, [False, True, True, True]])
    grads = []
    for rows, denom in (([0], 3), ([0, 1], 3), ([1], 3)):
        batch = dict(tokens=tokens[rows], mask=mask[rows], lengths=torch.tensor([4] * len(rows)), denom=denom)
        cfg = stages.config(train_sft, "unused", tokens_per_microbatch=4)
        model.zero_grad()
        loss = train_sft.gradient(model, batch, cfg)["loss"]
        grads.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert grads[0][0] == 0 and not grads[0][1].any()
    assert grads[1][0] == grads[2][0] != 0 and torch.equal(grads[1][1], grads[2][1])
    x, cfg = torch.full((1, 4), -1.0, requires_grad=True), stages.config(train_grpo, "unused")
    none = torch.zeros(1, 4).bool()
    for loss, _ in (train_ppo.policy_loss(x, x.detach(), x.detach(), none, 0.2, 3),
                    train_ppo.value_loss(x, x.detach(), x.detach() + 1, none, 0.2, 3),
                    train_grpo.policy_loss(x, x.detach(), None, x.detach(), none, 1.0 * none, cfg),
                    ):  # fmt: skip
        x.grad = None
        loss.backward()
        assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("value", ["0.0", "1.0", "0.1", "1 / 3"])
@pytest.mark.parametrize("more", [{}, dict(dead_groups="drop"), dict(norm="batch_std")], ids=str)
def test_row_27_equal_rewards(value, more, run, stages, tmp_path):
    """S | all rewards of a group equal (0, 1, 0.1, 1/3) | `dead` is 1, advantage and gradient exactly 0"""
    assert run(train_grpo, steps=2, **rewards(tmp_path, f"return {value}"), **more).status == 0
    rows = metrics(tmp_path / "run")
    assert all(float(row["dead"]) == 1 and float(row["gnorm"]) == 0 for row in rows)
    folders = stages.folder / "sft/model", tmp_path / "run/model"
    before, after = (hub.load(folder)[0].state_dict() for folder in folders)
    assert all(torch.equal(after[key], before[key]) for key in before)


@RL
@pytest.mark.parametrize("body", ["return float('nan')", "return float('inf')", "return None", "return '1'",
                                  "return [1.0, 2.0]"])  # fmt: skip
@pytest.mark.parametrize("own", [True, False], ids=["own process", "here"])
def test_row_29_reward_that_is_no_number(trainer, body, own, run, tmp_path):
    """X | a reward function returns NaN, infinity, None, a string, a list | named with the sample"""
    if own and (trainer is train_ppo or "nan" not in body):
        pytest.skip("one of them: a process costs seconds")
    done = run(trainer, **rewards(tmp_path, body, reward_timeout=120.0 if own else 0))
    assert done.stopped("reward f returned", "prompt '", "response '", "it must be a finite number")


def alive(pid):
    """Does this process still run, a moment after it was killed? A zombie that nobody waits for does not."""
    for _ in range(600):
        stat = Path(f"/proc/{pid}/stat")
        try:
            os.kill(int(pid), 0)
            if stat.exists() and stat.read_text().rpartition(") ")[2][0] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


@posix
@pytest.mark.slow
def test_row_30_reward_that_misbehaves(run, tmp_path):
    """S | a reward function raises, hangs, prints, exits, forks, starts what sleeps on | it is ended at its
    timeout with all that it started, scores 0, is counted; above half of a batch the run stops"""
    does = {2: "raise KeyError(1)", 4: "os._exit(3)", 6: "sys.exit(3)", 8: "time.sleep(600)", 10: "os.fork()"}
    log, pids, own = (str(tmp_path / name) for name in ("log", "pids", "own"))
    child = f"open({pids!r}, 'a').write(f\"{{__import__('subprocess').Popen(['sleep', '600']).pid}} \")"
    remember = f"open({own!r}, 'a').write(f\"{{os.getpid()}} \")"
    body = [remember, f"open({log!r}, 'a').write('x')", f"n = len(open({log!r}).read())", "print('noise')",
            f"if n in (3, 8, 12): {child}",  # before it exits, before it hangs, and one that it returns after
            *(f"if n == {n}: {what}" for n, what in does.items()), "return 1.0"]  # fmt: skip
    done = run(train_grpo, steps=2, **rewards(tmp_path, "\n    ".join(body), reward_timeout=15.0))
    assert done.status == 0 and "reward f raised KeyError" in done.out and "noise" not in done.out
    shares = [float(row["reward_failed"]) for row in metrics(tmp_path / "run")]
    assert 0 < shares[0] < 0.5 and shares[1] == 0
    pids = (tmp_path / "pids").read_text().split()
    served = set((tmp_path / "own").read_text().split())  # one ends at each _exit and at each hang
    assert len(pids) == 3 and len(served) >= 3 and not any(map(alive, [*pids, *served]))
    done = run(train_grpo, overwrite="true", **rewards(tmp_path, "os._exit(3)", reward_timeout=60.0))
    assert done.stopped("more than half of", "ended its process (status 3)")


def test_row_33_exploding_ratio(stages):
    """S | old log-probs off by 100 | finite: the log-ratio is clamped; all is clipped"""
    old, cfg = torch.full((2, 3), -101.0), stages.config(train_grpo, "unused")
    mask = torch.ones(2, 3)
    for sign, adv in ((1, 1.0), (-1, -1.0)):
        logp = (old + sign * 100).requires_grad_()
        adv = torch.full((2, 3), adv)
        for loss, stats in (train_ppo.policy_loss(logp, old, adv, mask, 0.2, 6),
                            train_grpo.policy_loss(logp, old, None, adv, mask, mask / 6, cfg)):  # fmt: skip
            logp.grad = None
            loss.backward()
            assert loss.isfinite() and logp.grad.isfinite().all()
            assert float(stats["clip"]) == pytest.approx(1) and math.isfinite(float(stats["ratio_max"]))


def test_row_40_no_network(tmp_path, monkeypatch):
    """S | no network: every socket raises | every trainer runs; no call is tried"""

    def refuse(*args, **kw):
        raise AssertionError("a connection was tried")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    size = dict(n_layer=1, d_model=16, n_head=2, demos=60, vocab_size=400, max_len=128)
    for trainer, flags in (
        (train_sft, dict(out="sft", batch_size=4, eval_every=0, **size)),
        (train_rm, dict(out="rm", init="sft/model", pairs=16, batch_size=4)),
        (train_ppo, dict(out="ppo", init="sft/model", rm="rm/model", prompts_per_step=4, eval_prompts=4)),
        (train_grpo, dict(task="reviews", out="grpo", init="sft/model", rm="rm/model", prompts_per_step=2,
                          group_size=2, minibatches=1, eval_prompts=4)),
        (train_dpo, dict(out="dpo", init="sft/model", pairs=16, batch_size=4, eval_prompts=4)),
        (train_sft, dict(task="chain", out="small", batch_size=4, eval_every=0, demos=60, n_layer=1)),
        (train_distill, dict(out="distill", init="small/model", teacher="small/model", prompts_per_step=4,
                             eval_prompts=4)),
    ):
        monkeypatch.chdir(tmp_path)
        trainer.train(trainer.Config(steps=1, **flags))


@posix
@pytest.mark.slow
def test_row_41_surroundings(run, stages, tmp_path):
    """S | read-only HOME, no terminal, LANG=C, a path with spaces and umlauts, another folder as cwd | the
    same run"""
    out = tmp_path / "ein Läufer — 走"
    out.mkdir()
    env = dict(PATH=os.environ["PATH"], HOME="/proc/home", LANG="C", LC_ALL="C", OMP_NUM_THREADS="1")
    flags = stages.flags(train_sft, "run", steps=2)
    argv = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(argv, cwd=out, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr
    run(train_sft, "here", steps=2)
    same_run(tmp_path / "here", out / "run")


@posix
@pytest.mark.slow
def test_both_output_streams_closed(run, stages, tmp_path):
    """The numbers 1 and 2 of the streams must not go to files of the run."""
    flags = stages.flags(train_sft, tmp_path / "closed", steps=2)
    argv = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{k}={v}" for k, v in flags.items())]
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *argv]).returncode == 0
    run(train_sft, "here", steps=2)
    same_run(tmp_path / "here", tmp_path / "closed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
@pytest.mark.slow
def test_full_disk_under_standard_output(stages, tmp_path):
    flags = stages.flags(train_sft, tmp_path / "run", steps=2)
    argv = [sys.executable, str(ROOT / "train_sft.py"), *(f"--{k}={v}" for k, v in flags.items())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("train_sft.py: stopped: the disk is full")
    assert len(done.stderr.splitlines()) == 1


def test_no_temporary_folder(run, monkeypatch):
    """torch asks for one when AdamW is first made, for a cache of compiled code; ours writes none."""

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert run(train_sft, steps=2).status == 0 and os.environ.pop("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.parametrize("trainer", TRAINERS[2:], ids=lambda t: t.__name__)
def test_row_43_reference(trainer, run, stages, tmp_path, monkeypatch):
    """S | the reference drifts with the policy | its weights are bit-equal after training; at step 0 the
    ratio is 1, DPO's margin 0, and the KL 0"""
    loader = "load_models_and_critic" if trainer is train_ppo else "load_models"
    seen, real = [], getattr(trainer, loader)
    monkeypatch.setattr(trainer, loader, lambda *args: seen.append(real(*args)) or seen[-1])
    more = {train_ppo: dict(minibatches=1), train_grpo: dict(minibatches=1, kl="k3", off_policy_steps=0)}
    folder = "sft"
    if trainer is train_distill:  # learns from another model, and has no β
        folder = "teacher"
        assert run(trainer).status == 0
    else:
        assert run(trainer, beta=0.1, **more.get(trainer, {})).status == 0
    policy, ref = seen[0][:2]
    before = hub.load(f"{stages.folder}/{folder}/model")[0].state_dict()
    assert all(torch.equal(ref.state_dict()[key], before[key]) for key in before)
    if trainer is train_distill:
        return
    assert not all(torch.equal(policy.state_dict()[key], before[key]) for key in before)
    first, *_, last = metrics(tmp_path / "run")
    assert abs(float(first["kl"])) < 1e-5 < abs(float(last["kl"]))
    if trainer is train_dpo:
        assert abs(float(first["margin"])) < 1e-5
    else:
        assert float(first["ratio_max"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("trainer", [train_ppo, train_grpo, train_dpo], ids=lambda t: t.__name__)
def test_row_50_rewards_that_are_not_finite(trainer, run, stages, tmp_path):
    """X | a reward model whose scores overflow, a function times its weight beyond 1e15, whose square or mean
    would overflow | the run stops, names the judge, prompt and response, and does not blame --lr"""
    rm, tok = hub.load(stages.folder / "rm/model")
    rm.score.weight.data.fill_(3e38)
    hub.save(rm, tok, tmp_path / "rm")
    online = dict(online=2, group_size=2, pairs=20) if trainer is train_dpo else {}
    done = run(trainer, rm=str(tmp_path / "rm"), **online)
    assert done.stopped("the reward model: a reward of ", " (prompt '", "response '", "within ±1e+15")
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 1e38\n")
    flags = dict(rm="", reward=f"{tmp_path}/r.py:f*100", overwrite="true", **online)
    done = run(trainer, **flags)
    assert done.stopped("100 × f: a reward of inf (prompt '", "response '")
    done = run(trainer, **flags | dict(reward=f"{tmp_path}/r.py:f"))  # finite, but no two of them have a mean
    assert done.stopped("1 × f: a reward of 1e+38 (prompt '", "response '")


def test_evaluate_stops_at_a_reward_that_is_not_finite(stages, tmp_path):
    rm, tok = hub.load(stages.folder / "rm/model")
    rm.score.weight.data.fill_(3e38)
    hub.save(rm, tok, tmp_path / "rm")
    files = dict(data=f"{stages.folder}/train_ppo.jsonl", rm=f"{tmp_path}/rm")
    cfg = evaluate.Config(model=f"{stages.folder}/sft/model", max_new_tokens=5, n=4, **files)
    with pytest.raises(RunError, match="the reward model: a reward of .* .prompt"):
        evaluate.evaluate(cfg)


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS if FULL else TRAINERS[:1], ids=lambda t: t.__name__)
def test_row_44_many_steps(trainer, run, tmp_path, monkeypatch):
    """S | 10,000 steps of a tiny run | memory and open files stay flat; the time of a step is printed"""
    from nanorlhf.run.log import Log

    steps, marks, row = 10_000 if FULL else 600, [], Log.row

    def watch(log, step, figures):
        row(log, step, figures)
        if (step + 1) % (steps // 10) == 0:
            gc.collect()
            marks.append((resident(), len(os.listdir("/proc/self/fd")), time.process_time()))

    monkeypatch.setattr(Log, "row", watch)
    small = dict(batch_size=2, eval_every=0)
    if trainer in (train_ppo, train_grpo):
        small = dict(prompts_per_step=2, group_size=2, sample_every=1000)
    assert run(trainer, steps=steps, save_every=steps // 20, lr=1e-5, **small).status == 0
    memory, files, seconds = zip(*marks[1:])  # the first tenth warms up
    assert memory[-1] - memory[0] < 8 << 20 and files[-1] == files[0], (memory, files)
    tenths = [round(b - a, 2) for a, b in zip(seconds, seconds[1:])]
    print(f"{trainer.__name__}, {steps} steps; CPU s a tenth: {tenths}, MB: {[m >> 20 for m in memory]}")
