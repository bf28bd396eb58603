"""Which optimum does each algorithm really reach? The trainers against exact enumeration: docs/optimum.md.

First the enumeration itself, against loops and against the stationarity that it claims: the exact expected
gradient of the trainers' losses is 0 at the fixed point and nowhere else. Then real runs of train(), from
π_ref until they settle, one for each algorithm.
"""

import sys
from pathlib import Path

import pytest
import torch

import train_grpo
import train_ppo
from nanorlhf import exact, generate
from nanorlhf.exact import kl
from nanorlhf.model import GPT, GPTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import optimum  # noqa: E402
from optimum import ALGORITHMS, Problem, Tree, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_curves")
# one of each kind; the others are rows of `make test-all`
QUICK = "ppo", "grpo_k1_reward", "dpo", "k3_loss", "exact_loss", "distill_reverse"
EOS = 3
TREE = Tree(4, 3, EOS)  # 4 tokens, at most 3: 13 prefixes, 1 + 3 + 9 responses that end and 27 that are cut


def tables(seed):
    """A reference (S, V), another policy (S, V) and a reward (N,), all random, in float64."""
    g = torch.Generator().manual_seed(seed)
    ref, policy = torch.randn(2, *TREE.ends.shape, generator=g, dtype=torch.float64).log_softmax(-1)
    return ref, policy, 1.2 * torch.randn(len(TREE.responses), generator=g, dtype=torch.float64)


def close(got, want, atol=1e-9):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    torch.testing.assert_close(got, want, atol=atol, rtol=0, check_dtype=False)


# ------------------------------------------------------------------------------------------------------------
# The enumeration


def test_the_tree_has_every_response_once():
    """40 responses: those that end with their first EOS, and those cut at the limit; 13 prefixes."""
    responses = TREE.responses
    assert len(set(responses)) == len(responses) == 40 and len(TREE.prefixes) == 13
    for y in responses:
        assert EOS not in y[:-1] and (y[-1] == EOS or len(y) == 3)
    for t, (y, row) in enumerate(zip(responses, TREE.state)):
        assert [TREE.prefixes[s] for s in row[: len(y)]] == [y[:i] for i in range(len(y))]
        assert TREE.mask[t].sum() == len(y) and tuple(TREE.tokens[t, : len(y)].tolist()) == y


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_models_and_sum_to_one(temperature):
    """Against one unpadded forward pass for each response, and against what the sampler draws."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(4, n_layer=1, n_head=2, d_model=16, max_len=8)).double()
    prompt = [1, 0]
    logp = TREE.logp(TREE.table(model, prompt, temperature)).detach()
    close(logp.exp().sum(), 1.0)
    for y, got in zip(TREE.responses, logp.tolist()):
        hidden = model(torch.tensor([[*prompt, *y]]))[0]
        steps = torch.log_softmax(hidden @ model.wte.weight.T / temperature, -1)
        assert got == pytest.approx(sum(steps[1 + t, a].item() for t, a in enumerate(y)), abs=1e-12)
    roll = generate.generate(model.float(), [prompt], 20000, 3, temperature, EOS)
    which = {y: i for i, y in enumerate(TREE.responses)}
    eos = [[EOS] * f for f in roll.finished.tolist()]
    drawn = torch.tensor([which[tuple(y + e)] for y, e in zip(roll.responses(), eos)])
    share, p = drawn.bincount(minlength=40) / 20000, logp.exp()
    assert ((share - p).abs() < 5 * (p / 20000).sqrt() + 1e-3).all()


def test_tables_and_distributions_are_two_views():
    ref, *_ = tables(0)
    close(TREE.from_logp(TREE.logp(ref)), ref)


def test_the_optimum_beats_every_other_policy():
    """E[r] − β KL is β log Z at π*, and less by exactly β KL(π‖π*) at any other policy."""
    ref, policy, reward = tables(1)
    ref_logp, beta = TREE.logp(ref), 0.7
    star = exact.optimum(ref_logp, reward, beta)
    log_z = (ref_logp + reward / beta).logsumexp(0)
    for logp in (star, TREE.logp(policy), ref_logp):
        objective = (logp.exp() * reward).sum() - beta * kl(logp, ref_logp)
        close(objective, beta * log_z - beta * kl(logp, star))
    assert kl(star, ref_logp) > 0.1 and kl(TREE.logp(policy), star) > 0.1


def test_no_policy_lies_above_the_frontier():
    """Random policies and the other fixed points, at their own KL; it ends at the best response."""
    ref, _, reward = tables(2)
    ref_logp = TREE.logp(ref)
    kls, rewards = optimum.frontier(ref_logp, reward, [10 ** (x / 50) for x in range(100, -100, -1)])
    assert (kls.diff() > 0).all() and (rewards.diff() >= 0).all()
    close(rewards[-1], reward.max(), atol=1e-6)
    rules = (optimum.reverse_kl_rule, optimum.forward_kl_rule)
    others = [TREE.backward_induction(ref, reward, lambda s, q, f=f: f(s, q, 1.0)) for f in rules]
    for policy in [tables(seed)[1] for seed in range(20)] + others:
        logp = TREE.logp(policy)
        at = torch.searchsorted(kls, kl(logp, ref_logp))  # the first point of the frontier with more KL
        assert (logp.exp() * reward).sum() < rewards[at.clamp(max=len(kls) - 1)]


def test_forward_kl_rule_has_the_multiplier_of_its_objective():
    """λ = β + E_π[Q], which stationarity demands and the bisection does not know."""
    ref, _, reward = tables(3)
    q = reward[: ref.numel()].view(-1, 4)
    pi = optimum.forward_kl_rule(ref[: len(q)], q, 0.3).exp()
    close(pi.sum(-1), torch.ones(len(q)))
    lam = 0.3 + (pi * q).sum(-1, keepdim=True)
    close(pi, 0.3 * ref[: len(q)].exp() / (lam - q))


# ------------------------------------------------------------------------------------------------------------
# The exact expected gradient of the losses


def expected_gradient(policy, ref, reward, **kw):
    """What train_grpo's loss does to a policy (S, V) in the mean over all responses: its exact gradient.

    Advantages for an infinite group: mean and σ are those of the distribution.
    """
    logits = policy.clone().requires_grad_()
    logp = TREE.token_logp(logits.log_softmax(-1))
    old, ref_logp = logp.detach(), TREE.token_logp(ref)
    p = old.sum(1).exp()
    cfg = train_grpo.Config(**dict(norm="none", beta=1.0, kl_unbiased=False) | kw)
    if cfg.kl_in == "reward":
        reward = reward - cfg.beta * (train_grpo.kl_estimate(old, ref_logp, cfg.kl) * TREE.mask).sum(1)
    mean, std = optimum.mean_std(old.sum(1), reward)
    adv = (reward - mean) / (std if cfg.norm == "group_std" else 1)
    w = p[:, None] * TREE.mask
    train_grpo.policy_loss(logp, old, ref_logp, adv, TREE.mask, w, cfg)[0].backward()
    return logits.grad


def fixed_point(ref, reward, rule, beta=1.0):
    return TREE.backward_induction(ref, reward, lambda s, q: rule(s, q, beta))


@pytest.mark.parametrize("kw, fixed", [
    (dict(kl="k1", kl_in="reward"), lambda ref, r: TREE.from_logp(exact.optimum(TREE.logp(ref), r, 1.0))),
    (dict(kl="k1", kl_unbiased=True), lambda ref, r: fixed_point(ref, r, optimum.reverse_kl_rule)),
    (dict(kl="k2"), lambda ref, r: fixed_point(ref, r, optimum.reverse_kl_rule)),
    (dict(kl="k2", kl_unbiased=True), lambda ref, r: fixed_point(ref, r, optimum.reverse_kl_rule)),
    (dict(kl="k3", kl_unbiased=True), lambda ref, r: fixed_point(ref, r, optimum.reverse_kl_rule)),
    (dict(kl="k3"), lambda ref, r: fixed_point(ref, r, optimum.forward_kl_rule)),
    (dict(kl="k2", norm="group_std"), lambda ref, r: optimum.normalised(TREE, ref, r, 1.0)[0]),
    (dict(kl="k3", norm="group_std"),
     lambda ref, r: optimum.normalised(TREE, ref, r, 1.0, optimum.forward_kl_rule)[0]),
], ids=["k1 reward", "k1 × ratio", "k2", "k2 × ratio", "k3 × ratio", "k3", "group_std k2", "group_std k3"])
def test_the_gradient_vanishes_at_the_fixed_point_alone(kw, fixed):
    """To 1e-9 over all responses; at π_ref, at π* (unless it is that) and elsewhere it does not."""
    ref, policy, reward = tables(4)
    star = TREE.from_logp(exact.optimum(TREE.logp(ref), reward, 1.0))
    settled = fixed(ref, reward)
    assert expected_gradient(settled, ref, reward, **kw).abs().max() < 1e-9
    for other in (ref, policy, *([] if "kl_in" in kw else [star])):
        assert expected_gradient(other, ref, reward, **kw).abs().max() > 1e-3


def test_k1_in_the_loss_has_no_gradient():
    """The same gradient as with β = 0: the penalty is there to be read, and does nothing."""
    ref, policy, reward = tables(5)
    with_kl, without = (expected_gradient(policy, ref, reward, kl="k1", beta=b) for b in (1.0, 0.0))
    close(with_kl, without)
    assert without.abs().max() > 1e-3


def test_rewards_less_kl_are_all_equal_at_the_optimum():
    """Why π* survives every norm and aggregation: r − β Σ k1 = β log Z for every response, so A = 0."""
    ref, _, reward = tables(6)
    star = TREE.from_logp(exact.optimum(TREE.logp(ref), reward, 0.5))
    k1 = train_grpo.kl_estimate(TREE.token_logp(star), TREE.token_logp(ref), "k1").sum(1)
    close(reward - 0.5 * k1, 0.5 * (TREE.logp(ref) + reward / 0.5).logsumexp(0).expand(40))
    logps = TREE.token_logp(star), TREE.token_logp(ref)
    shaped = train_ppo.shape_rewards(reward, *logps, TREE.mask, torch.ones(40), 0.5)
    close(shaped.sum(1).std(), 0.0)


# ------------------------------------------------------------------------------------------------------------
# The trainers


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return Problem(0, tmp_path_factory.mktemp("optimum"))


def test_the_distributions_to_be_told_apart_are_far_apart(problem):
    """An untrained policy fails by fifteen times, and the other fixed points are not π*."""
    star = problem.fixed_point(optimum.pi_star)
    assert optimum.kl(star, problem.ref) >= 0.5 and optimum.kl(problem.ref, star) >= 0.3
    for rule in (optimum.reverse_kl, optimum.forward_kl, optimum.over_sigma):
        assert optimum.kl(problem.fixed_point(rule), star) >= 0.07


def algorithms(wanted):
    """The names of those whose fixed point is wanted; seven seconds each, so all but QUICK are slow."""
    names = [name for name, (*_, rule) in ALGORITHMS.items() if wanted(rule)]
    marks = {name: () if name in QUICK else pytest.mark.slow for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@algorithms(lambda rule: rule is optimum.pi_star)
def test_reaches_the_optimum_of_rlhf(problem, name):
    """KL(π_θ‖π*) ≤ 0.02 nats: k1 in the reward, under any norm, and DPO on Bradley–Terry preferences."""
    assert run(name, problem)["star"] <= 0.02


@algorithms(lambda rule: rule not in (None, optimum.pi_star))
def test_reaches_its_own_fixed_point_and_not_the_optimum(problem, name):
    """A KL in the loss is a penalty at each prefix alone: no token is charged for the KL that it leads to."""
    got = run(name, problem)
    assert got["own"] <= 0.02 and got["star"] >= 0.05


def test_a_student_reaches_a_teacher_that_it_can_represent(problem):
    """The teacher is π* to 1e-6 nats, half a nat and more from where the student starts."""
    star = problem.fixed_point(optimum.pi_star)
    teacher = optimum.table(optimum.model_of(star, problem.model))
    assert optimum.kl(teacher, star) < 1e-6 and optimum.kl(problem.ref, teacher) > 0.3
    assert run("distill_jsd", problem)["own"] <= 0.01


@pytest.mark.slow
def test_k1_in_the_loss_holds_nothing(problem):
    """Past π* without stopping: more reward, and far more KL to the reference."""
    star = problem.measure(problem.fixed_point(optimum.pi_star), None)
    got = run("k1_loss", problem)
    assert got["reward"] > star["reward"] + 0.1 and got["ref"] > 1.5 * star["ref"]


@pytest.mark.slow
def test_k3_in_the_reward_settles_elsewhere(problem):
    """It leaves π_ref, and ends further from π* than an untrained policy may be, let alone PPO."""
    got = run("k3_reward", problem)
    assert got["ref"] > 0.1 and got["star"] > 0.05
