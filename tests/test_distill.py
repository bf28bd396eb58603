"""Distillation: gradients against full softmaxes in float64, who samples, and what is refused."""

import json

import pytest
import torch
from runs import metrics
from stages import jsonl, words

import train_distill
import train_grpo
import train_sft
from nanorlhf import hub
from nanorlhf.errors import UserError
from nanorlhf.exact import Tree
from nanorlhf.run import distilling

pytestmark = pytest.mark.usefixtures("no_curves")
KINDS = ["reverse", "forward", "jsd"]


def config(stages, out, **more):
    return stages.config(train_distill, out, **more)


def oracle(kind, logp, logq, beta=0.3):
    """Divergences (...,) of two log-probs (..., V), from their definitions."""
    p = logp.exp()
    q = logq.exp()
    if kind == "reverse":
        return (p * (logp - logq)).sum(-1)
    if kind == "forward":
        return (q * (logq - logp)).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (logq - m.log())).sum(-1) + (1 - beta) * (p * (logp - m.log())).sum(-1)


def both(stages):
    """Student and teacher in float64; both have the tokenizer of the same words."""
    student, tok = hub.load(f"{stages.folder}/sft/model")
    teacher, _ = hub.load(f"{stages.folder}/teacher/model")
    return student.double(), teacher.double(), tok


def log_softmaxes(model, tokens, mask, temperature):
    """The whole distribution that each token of the mask was to be drawn from: (n, V)."""
    logits = model.logits(tokens)[:, :-1] / temperature
    return logits[mask[:, 1:]].log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("budget", [0, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_first_gradient_is_the_oracle(kind, budget, stages, tmp_path, gradients, spy):
    """Mean of D over the sampled tokens, by whole softmaxes in float64; however the step is cut."""
    rollouts = spy(train_distill, "next_rollout")
    flags = dict(divergence=kind, jsd_beta=0.3, temperature=0.7, tokens_per_microbatch=budget, steps=1)
    last = train_distill.train(config(stages, tmp_path / "run", **flags))
    ((_, roll),) = rollouts
    student, teacher, _ = both(stages)
    logp = log_softmaxes(student, roll.tokens, roll.mask, 0.7)
    logq = log_softmaxes(teacher, roll.tokens, roll.mask, 0.7).detach()
    loss = oracle(kind, logp, logq).mean()
    loss.backward()
    want = [p.grad for p in student.parameters()]
    for got, exact in zip(gradients[0], want, strict=True):
        assert (got - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max())
    assert max(exact.abs().max() for exact in want) > 1e-3
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-4)
    kl = oracle("reverse", logp, logq).sum() / len(roll)  # the exact one, with every divergence
    assert last["kl"] == pytest.approx(kl.item(), rel=1e-4) and last["kl"] > 0.1


def test_jsd_beta_is_the_share_of_the_teacher(stages, tmp_path, spy):
    """With β near 1 the mixture is the teacher, and the loss (1−β) KL(p‖q)."""
    rollouts = spy(train_distill, "next_rollout")
    losses = {}
    for beta in (0.001, 0.999):
        cfg = config(stages, tmp_path / str(beta), divergence="jsd", jsd_beta=beta, steps=1)
        losses[beta] = train_distill.train(cfg)["loss"]
    roll = rollouts[0][1]
    student, teacher, _ = both(stages)
    logp = log_softmaxes(student, roll.tokens, roll.mask, 1.0)
    logq = log_softmaxes(teacher, roll.tokens, roll.mask, 1.0)
    assert losses[0.999] / 0.001 == pytest.approx(oracle("reverse", logp, logq).mean().item(), rel=0.02)
    assert losses[0.001] / 0.001 == pytest.approx(oracle("forward", logp, logq).mean().item(), rel=0.02)


def test_as_reward_is_a_policy_gradient_of_the_sampled_tokens(stages, tmp_path, gradients, spy):
    """−mean (log q − log p) ∇ log p(y_t), without a baseline; the KL column is its estimate."""
    rollouts = spy(train_distill, "next_rollout")
    last = train_distill.train(config(stages, tmp_path / "run", as_reward=True, temperature=0.7, steps=1))
    ((_, roll),) = rollouts
    student, teacher, _ = both(stages)
    sampled = roll.tokens[roll.mask][:, None]
    logp = log_softmaxes(student, roll.tokens, roll.mask, 0.7).gather(1, sampled)
    logq = log_softmaxes(teacher, roll.tokens, roll.mask, 0.7).gather(1, sampled).detach()
    adv = logq - logp.detach()
    (-adv * logp).mean().backward()
    for got, p in zip(gradients[0], student.parameters(), strict=True):
        assert (got - p.grad).abs().max() <= 1e-5 * max(1.0, p.grad.abs().max())
    assert last["kl"] == pytest.approx(-adv.sum().item() / len(roll), rel=1e-4)


def test_the_reward_has_the_expected_gradient_of_the_exact_kl():
    """Over all 40 responses: Σ_y p(y) Σ_t −A_t ∇log p = Σ_s P(s) ∇KL(p(·|s)‖q(·|s)), with P(s) constant."""
    tree = Tree(4, 3, eos_id=3)
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, len(tree.prefixes), 4, generator=g, dtype=torch.float64).log_softmax(-1)
    grads = []
    for exact in (True, False):
        logits = student.clone().requires_grad_()
        table = logits.log_softmax(-1)
        logp = tree.token_logp(table)
        old = logp.detach()
        w = old.sum(1).exp()[:, None] * tree.mask
        if exact:
            loss = (w * oracle("reverse", table, teacher)[tree.state]).sum()
        else:
            adv = tree.token_logp(teacher) - old
            cfg = train_grpo.Config()
            loss, _ = train_grpo.policy_loss(logp, old, None, adv, tree.mask, w, cfg)
        loss.backward()
        grads.append(logits.grad)
    assert torch.allclose(*grads, atol=1e-12) and grads[0].abs().max() > 0.05


# ------------------------------------------------------------------------------------------------------------
# who samples


def test_the_teacher_samples_off_policy(stages, tmp_path, spy):
    """The very log-probs that the teacher sampled with; there is no ratio of 1 to check then."""
    rollouts = spy(train_distill, "next_rollout")
    train_distill.train(config(stages, tmp_path / "run", on_policy=False, steps=2))
    _, teacher, _ = both(stages)
    for _, roll in rollouts:
        logp = log_softmaxes(teacher, roll.tokens, roll.mask, 1.0)
        got = logp.gather(1, roll.tokens[roll.mask][:, None])[:, 0]
        assert torch.allclose(got, roll.logp[roll.mask].double(), atol=1e-5)


def test_the_health_line_tells_that_sampling_and_scoring_agree(stages, tmp_path, capsys, monkeypatch):
    train_distill.train(config(stages, tmp_path / "run", steps=1))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("health: ratio 1 ± "))
    assert float(line.split()[4]) < 1e-5 and "!!" not in out
    first = float(metrics(tmp_path / "run")[0]["kl"])
    assert f"KL {first:.4f}" in line and first > 0.1
    sample = train_distill.sample_responses

    def hotter(*args):
        roll = sample(*args)
        roll.logp = roll.logp * 1.1
        return roll

    monkeypatch.setattr(train_distill, "sample_responses", hotter)
    train_distill.train(config(stages, tmp_path / "hot", steps=1))
    assert "ratio is not 1: sampling and scoring disagree" in capsys.readouterr().out


def test_prompts_and_samples_are_new_in_every_step(stages, tmp_path, spy):
    rollouts = spy(train_distill, "next_rollout")
    train_distill.train(config(stages, tmp_path / "run", steps=3, lr=1e-9))
    prompts = [[row["prompt"] for row in roll.rows] for _, roll in rollouts]
    assert prompts[0] != prompts[1] != prompts[2]
    flags = dict(data=jsonl(tmp_path / "one.jsonl", words(64)[:1] * 4), steps=3, lr=1e-9)
    train_distill.train(config(stages, tmp_path / "same", **flags, eval_data=jsonl(tmp_path / "e", words(4))))
    texts = [roll.texts for _, roll in rollouts[3:]]
    assert texts[0] != texts[1] != texts[2]


def test_responses_of_a_file(stages, tmp_path, gradients, spy, capsys):
    """Nobody samples in training; a step is the mean of D over the tokens of its rows' responses.

    There is then no ratio and no sampler's entropy: 0 would read like a policy that has collapsed.
    """
    rollouts = spy(train_distill, "next_rollout")
    flags = dict(on_policy=False, from_data=True, steps=1, eval_prompts=0)
    last = train_distill.train(config(stages, tmp_path / "run", **flags))
    ((_, roll),) = rollouts
    assert len(roll) == 8 and roll.texts == [row["response"] for row in roll.rows]
    student, teacher, tok = both(stages)
    assert roll.responses(with_eos=True) == [tok.encode(text) + [tok.eos_id] for text in roll.texts]
    logp = log_softmaxes(student, roll.tokens, roll.mask, 1.0)
    logq = log_softmaxes(teacher, roll.tokens, roll.mask, 1.0)
    assert last["loss"] == pytest.approx(oracle("reverse", logp, logq).mean().item(), rel=1e-4)
    assert last["stop"] == 1.0 and last["len"] == 4.0
    assert "entropy" not in last and metrics(tmp_path / "run")[0]["entropy"] == ""
    assert "health: no ratio" in capsys.readouterr().out


def test_a_row_without_a_usable_response_is_named(stages, tmp_path):
    rows = words(64)
    flags = dict(on_policy=False, from_data=True)
    for i, row in enumerate(rows):
        rows[i] = dict(prompt=row["prompt"])
    path = jsonl(tmp_path / "none.jsonl", rows)
    with pytest.raises(UserError, match=r'none.jsonl:\d+: --from_data: the row has no "response"'):
        train_distill.train(config(stages, tmp_path / "run", data=path, **flags))
    path = jsonl(tmp_path / "long.jsonl", [row | {"response": "a" * 40} for row in rows])
    with pytest.raises(UserError, match=r"long.jsonl:\d+: prompt and response exceed the context of 16"):
        train_distill.train(config(stages, tmp_path / "run", data=path, **flags))
    with pytest.raises(UserError, match="--from_data: .*needs --data and --on_policy 0"):
        train_distill.train(config(stages, tmp_path / "run", from_data=True))
    assert not (tmp_path / "run/state").exists()


# ------------------------------------------------------------------------------------------------------------
# the run


def test_the_student_learns_and_the_teacher_does_not(stages, tmp_path):
    """From 0.1 nats and more to a quarter of them; the teacher's folder and weights stay as they were."""
    before = (stages.folder / "teacher/model/model.safetensors").read_bytes()
    flags = dict(steps=60, lr=0.01, prompts_per_step=16, eval_prompts=16)
    last = train_distill.train(config(stages, tmp_path / "run", **flags))
    assert last.rows[0]["eval/kl"] > 0.1 and last["eval/kl"] < 0.25 * last.rows[0]["eval/kl"]
    assert last.rows[-1]["kl"] < 0.25 * last.rows[0]["kl"]
    assert (stages.folder / "teacher/model/model.safetensors").read_bytes() == before


def test_a_teacher_with_another_vocabulary_is_refused(stages, tmp_path):
    """Ids would mean other tokens: D would compare log-probs of different things."""
    flags = dict(data=jsonl(tmp_path / "x.jsonl", words(64, letters="uvwxyz")), steps=1)
    train_sft.train(stages.config(train_sft, tmp_path / "other", **flags))
    teacher = f"{tmp_path}/other/model"
    says = f"^--teacher {teacher}: not the vocabulary of the other models; all need one tokenizer$"
    with pytest.raises(UserError, match=says):
        train_distill.train(config(stages, tmp_path / "run", teacher=teacher))
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_short_context_is_refused(stages, tmp_path):
    flags = stages.flags(train_sft, tmp_path / "short", steps=1) | dict(max_len=9)
    train_sft.train(train_sft.Config(**flags))
    says = r"^--teacher .*: its context of 9 tokens is shorter than the 16 of --init"
    with pytest.raises(UserError, match=says):
        train_distill.train(config(stages, tmp_path / "run", teacher=f"{tmp_path}/short/model"))


def test_rewards_are_logged_and_teach_nothing(stages, tmp_path):
    """The same weights with and without; without a function the columns are empty."""
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return float(len(response))\n")
    train_distill.train(config(stages, tmp_path / "without"))
    train_distill.train(config(stages, tmp_path / "with", reward=[f"{tmp_path}/r.py:f"]))
    for row in metrics(tmp_path / "without"):
        assert row["reward"] == row["dead"] == row["eval/reward"] == "" and float(row["len"]) > 0
    rows = metrics(tmp_path / "with")
    assert all(float(row["reward"]) > 0 for row in rows) and rows[-1]["eval/greedy"]
    weights = [hub.load(f"{tmp_path}/{name}/model")[0].state_dict() for name in ("with", "without")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_samples_are_written_with_their_scores(stages, tmp_path):
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return float(len(response))\n")
    train_distill.train(config(stages, tmp_path / "run", reward=[f"{tmp_path}/r.py:f"], steps=2))
    with open(tmp_path / "run/samples.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 2 * 8 * 2 and {row["step"] for row in rows} == {0, 1}
    assert all(row["reward"] == len(row["response"]) for row in rows)


def test_entropy_is_that_of_the_samples(stages, tmp_path, spy):
    """The mean of −log p over many samples is the entropy, here by the whole softmaxes at their prefixes."""
    rollouts = spy(train_distill, "next_rollout")
    last = train_distill.train(config(stages, tmp_path / "run", group_size=200, steps=1))
    ((_, roll),) = rollouts
    student, _, _ = both(stages)
    logp = log_softmaxes(student, roll.tokens, roll.mask, 1.0)
    exact = -(logp.exp() * logp).sum(-1).mean().item()
    assert last["entropy"] == pytest.approx(exact, rel=0.05) and exact > 0.1


def test_first_signs_are_of_the_student_alone(stages, tmp_path):
    """Off policy nobody's ratio is 1, and the line does not accuse anyone."""
    cfg = config(stages, tmp_path / "run", on_policy=False)
    student, tok = hub.load(f"{stages.folder}/sft/model")
    row = dict(words(1)[0], _at="f:1")
    distilling.require_responses(cfg, [row], tok, 16)
    signs = distilling.first_signs(dict(kl=1.0, stop=1.0), _rollout(tok, row), student, cfg)
    assert "!!" not in signs and "KL 1.0" in signs


def _rollout(tok, row):
    row["_pair"] = (tok.encode_prompt(row["prompt"]), tok.encode(row["response"]) + [tok.eos_id])
    return distilling.responses_of_data([row], torch.device("cpu"))
