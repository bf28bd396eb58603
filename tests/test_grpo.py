"""GRPO and its family: functions against golden vectors, loops and exact enumeration; then train() itself.

Golden vectors were computed by running verl's functions on the inputs that stand here. What the trained
policies converge to is tested in test_optimum.py.
"""

import csv
import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import randint, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import train_dpo
import train_grpo
import train_ppo
from nanorlhf import generate, hub, tasks
from nanorlhf.data import deal
from nanorlhf.errors import RunError, UserError
from nanorlhf.kernels import torch_backend
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run.cli import length_schedule, parse
from nanorlhf.tokenizer import Tokenizer
from train_grpo import (
    RECIPES,
    Config,
    advantages,
    health,
    kl_estimate,
    next_prompts,
    overlong,
    policy_loss,
    token_weights,
    train,
)

pytestmark = pytest.mark.usefixtures("no_curves")
NORMS = ("group_std", "batch_std", "none", "leave_one_out", "batch_whiten")
AGGS = ("seq_mean", "token", "seq_sum_const", "prompt_mean")


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def close(got, want, atol=1e-6, rtol=0.0):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, check_dtype=False)


def variant(**kw):
    """A config of one variant of the loss, for responses of at most 4 tokens."""
    return Config(**{**dict(max_new_tokens=4), **kw})


# ------------------------------------------------------------------------------------------------------------
# Advantages

TWO_GROUPS = torch.arange(2).repeat_interleave(4)


@pytest.mark.parametrize("norm, want", [
    ("group_std", [0.866024, -0.866024, -0.866024, 0.866024, 0.499999, 0.499999, 0.499999, -1.499997]),
    ("none", [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]),
    ("leave_one_out", [0.666667, -0.666667, -0.666667, 0.666667, 0.333333, 0.333333, 0.333333, -1.0]),
    ("batch_whiten", [1.046536, -1.046536, -1.046536, 1.046536, 0.523268, 0.523268, 0.523268, -1.569804]),
    ("batch_std", [0.999998, -0.999998, -0.999998, 0.999998, 0.499999, 0.499999, 0.499999, -1.499997]),
])
def test_golden_advantages(norm, want):
    """verl's GRPO, Dr. GRPO, RLOO, REINFORCE++-baseline on responses of 3 tokens; ScaleRL by hand: σ = ½."""
    reward = f64([1, 0, 0, 1, 1, 1, 1, 0])
    close(advantages(reward, TWO_GROUPS, norm, 1e-6, torch.full((8,), 3)), f64(want))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=st.integers(1, 4), G=st.integers(2, 5))
def test_advantages_are_the_loop(data, groups, G):
    """Each group on its own, whatever order its rows stand in: against lists of floats."""
    numbers = st.sampled_from([0.0, 0.1, 1 / 3, 1.0, -2.5])
    rewards = [data.draw(st.lists(numbers, min_size=G, max_size=G)) for _ in range(groups)]
    order = data.draw(st.permutations(range(groups * G)))
    reward = f64([x for row in rewards for x in row])[order]
    group = torch.arange(groups).repeat_interleave(G)[order]
    got = {norm: advantages(reward, group, norm)[torch.tensor(order).argsort()].tolist() for norm in NORMS}
    for g, row in enumerate(rewards):
        mean = sum(row) / G
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / (G - 1))
        for i, x in enumerate(row):
            at, dead = g * G + i, len(set(row)) == 1
            assert got["none"][at] == pytest.approx(0 if dead else x - mean, abs=1e-12)
            assert got["group_std"][at] == pytest.approx(0 if dead else (x - mean) / (std + 1e-6), abs=1e-9)
            others = (sum(row) - x) / (G - 1)
            assert got["leave_one_out"][at] == pytest.approx(0 if dead else x - others, abs=1e-12)
    for norm in ("none", "leave_one_out", "group_std", "batch_std"):
        assert sum(got[norm]) == pytest.approx(0, abs=1e-9)
    close(f64(got["leave_one_out"]), G / (G - 1) * f64(got["none"]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm, value", [*product(NORMS[:4], (0.1, 1 / 3, 1.0, -7.7))])
def test_dead_groups_are_exactly_zero(norm, value, dtype):
    """Equal rewards that no float holds exactly: their mean is off by an ulp, which eps would blow up."""
    reward = torch.tensor([value] * 7 + [0.0, 1.0, 0.5, 0.3, 0.9, 0.2, 0.1], dtype=dtype)
    group = torch.arange(2).repeat_interleave(7)
    adv = advantages(reward, group, norm)
    assert (adv[:7] == 0).all() and adv[7:].abs().min() > 0 and adv.isfinite().all()
    assert (advantages(reward[:7], group[:7], norm) == 0).all()


@pytest.mark.parametrize("norm", ["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"])
@pytest.mark.parametrize("size", [1e17, 1e30, 1e37])
def test_squares_of_large_rewards_stay_finite(norm, size):
    """Advantages of rewards of 1e30 are those of rewards of 1, or 1e30 times them where nothing divides."""
    reward = torch.tensor([1.0, 0.25, -0.5, 2.0, 2.0, 2.0, 0.0, 1.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    got = advantages(reward * size, group, norm)
    want = advantages(reward.double(), group, norm, std_eps=0.0)
    if norm in ("none", "leave_one_out"):
        want = want * size
    assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_advantages_of_rewards_that_are_not_finite(bad):
    with pytest.raises(RunError, match="finite"):
        advantages(torch.tensor([bad, bad, 1.0, 0.0]), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("reward", [[0, 1, 0, 1, 1, 0, 0.2, 0.7], [0, 1, 0, 1, 1, 1, 1, 1]],
                         ids=["live", "dead"])
def test_batch_whiten_counts_tokens(reward):
    """REINFORCE++ whitens over tokens: mean 0 and unbiased variance 1, each advantage length times.

    A dead group is part of that mean: its rows are shifted like all others, as in the paper and in verl.
    """
    reward, length = f64(reward), torch.tensor([1, 5, 2, 3, 4, 1, 2, 6])
    adv = advantages(reward, TWO_GROUPS, "batch_whiten", length=length)
    tokens = adv.repeat_interleave(length)
    close([tokens.mean().item(), tokens.var().item()], [0.0, 1.0])
    # rewards less the mean of their group, whatever the group is: one line through all of them
    centred = torch.cat([group - group.mean() for group in reward.split(4)])
    slope = (adv[1] - adv[0]) / (centred[1] - centred[0])
    close(adv, adv[0] + slope * (centred - centred[0]), atol=1e-9)


def test_batch_whiten_with_dead_groups_is_verls():
    """Golden: verl's compute_reinforce_plus_plus_baseline_outcome_advantage, by hand on 2 × 2 rows.

    Rewards 1, 0 (live) and 1, 1 (dead), lengths 1, 3, 2, 2: r − mean is ½, −½, 0, 0 over 8 tokens, whose mean
    is −1/8 and whose unbiased variance is (1 − 8/64)/7 = 1/8.
    """
    group, length = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 2, 2])
    adv = advantages(f64([1, 0, 1, 1]), group, "batch_whiten", length=length)
    scale = 8**0.5
    close(adv, f64([5 / 8 * scale, -3 / 8 * scale, scale / 8, scale / 8]), atol=1e-6)


@pytest.mark.parametrize("kw", [dict(), dict(dead_groups="drop")], ids=str)
def test_the_health_line_has_no_complaint_about_whitening(lab, kw, capsys):
    """Half of the groups dead: the mean advantage is 0 over the tokens, and the line says so."""
    train(config(lab, some_alike, steps=1, norm="batch_whiten", **kw))
    out = capsys.readouterr().out
    assert "mean advantage 0.000" in out and "mean advantage is not near 0" not in out


# ------------------------------------------------------------------------------------------------------------
# Weights

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
LOGP = f64([[-1, -2, -0.5, -1], [-0.7, -1.5, 0, 0]])
OLD = f64([[-1.2, -1.5, -0.5, -1.4], [-0.9, -1.1, 0, 0]])
ADV = f64([1.0, -1.0])


@pytest.mark.parametrize("kw, value, grad, clip", [
    (dict(agg="token"), -0.330855, [[0, -0.10109, -0.16667, 0], [0.20357, 0, 0, 0]], 0.5),
    (dict(agg="token", clip_high=0.28), -0.347755, None, 1 / 3),
    (dict(agg="seq_mean"), 0.004534, None, None),
    (dict(agg="prompt_mean"), 0.004534, None, None),  # two prompts of one response each
    (dict(agg="seq_sum_const"), -0.496282 / 2, None, None),  # verl does not divide by rows; the paper does
    (dict(agg="seq_mean", ratio="sequence", clip_low=3e-4, clip_high=4e-4), -0.000350, [[0] * 4] * 2, 1.0),
    (dict(agg="seq_mean", ratio="sequence"), -0.060239,
     [[-0.12816] * 4, [0.22621] * 2 + [0, 0]], 0.0),
    (dict(agg="token", loss="cispo"), 0.427638,
     [[-0.20357, -0.10109, -0.16667, -0.24864], [0.20357, 0.11172, 0, 0]], 0.0),
    (dict(agg="token", loss="cispo", cap=1.2), 0.377930,
     [[-0.2, -0.10109, -0.16667, -0.2], [0.2, 0.11172, 0, 0]], 0.5),  # a clipped token keeps its gradient
    (dict(agg="token", loss="reinforce"), (1 + 2 + 0.5 + 1 - 0.7 - 1.5) / 6,
     [[-1 / 6] * 4, [1 / 6, 1 / 6, 0, 0]], 0.0),
])
def test_golden_policy_loss(kw, value, grad, clip, monkeypatch):
    """Value, gradient and clipped share; NaN outside the mask is not read."""
    monkeypatch.setattr(train_grpo, "CISPO_CAP", kw.get("cap", 5.0))
    cfg = variant(**{name: value for name, value in kw.items() if name != "cap"})
    logp = torch.where(MASK, LOGP, math.nan).requires_grad_()
    w = token_weights(MASK, torch.arange(2), cfg)
    loss, stats = policy_loss(logp, OLD, None, ADV, MASK, w, cfg)
    loss.backward()
    close(loss.item(), value)
    if grad:
        close(logp.grad, f64(grad), atol=6e-6)
    if clip is not None:
        close(stats["clip"], clip)
    largest = 1.025315 if cfg.ratio == "sequence" else 1.491825
    close(stats["ratio_max"], largest)


def test_golden_kl_estimates():
    close(kl_estimate(LOGP, OLD, "k1"), f64([[0.2, -0.5, 0, 0.4], [0.2, -0.4, 0, 0]]))
    close(kl_estimate(LOGP, OLD, "k3"), f64([[0.018731, 0.148721, 0, 0.070320], [0.018731, 0.091825, 0, 0]]))


def ragged(seed, B=8, T=6):
    """(B, T) mask of response tokens: different prompts and lengths, one row to the end."""
    start, length = 1 + randint(2, B, seed=seed), 1 + randint(4, B, seed=seed + 1)
    place = torch.arange(T)
    mask = (place >= start[:, None]) & (place < (start + length)[:, None])
    mask[0, start[0] :] = True
    return mask


@pytest.mark.parametrize("agg", AGGS)
def test_weights_are_the_mean_that_they_claim(agg):
    """Σ w·l on random l is the loop's mean of means; w is 0 outside the mask."""
    mask, group = ragged(3), torch.tensor([5, 5, 2, 2, 2, 7, 7, 7])  # a minibatch has any prompts' rows
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    w = token_weights(mask, group, variant(agg=agg))
    assert (w[~mask] == 0).all()
    rows = [x[b][mask[b]].tolist() for b in range(8)]
    prompts = [[v for b in range(8) if group[b] == g for v in rows[b]] for g in (2, 5, 7)]
    want = {
        "seq_mean": sum(sum(r) / len(r) for r in rows) / 8,
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "seq_sum_const": sum(map(sum, rows)) / (8 * 4),
        "prompt_mean": sum(sum(p) / len(p) for p in prompts) / 3,
    }
    close((w * x).sum(), want[agg], atol=1e-5)


@pytest.mark.parametrize("agg", AGGS)
def test_weights_of_rows_without_tokens(agg):
    """A response that is masked out (overlong filter) weighs 0, and nothing is divided by 0."""
    mask = ragged(4)
    mask[2:5] = False
    w = token_weights(mask, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]), variant(agg=agg))
    assert w.isfinite().all() and (w[2:5] == 0).all() and w.sum() > 0


@pytest.mark.parametrize("agg, kw", [(agg, kw) for agg in AGGS for kw in (
    dict(), dict(ratio="sequence"), dict(loss="cispo"), dict(kl="k3", beta=0.5),
)])
def test_microbatches_do_not_move_the_gradient(agg, kw):
    """1×8, 2×4 and 8×1 rows give one gradient of a real model in float64."""
    cfg, model, mask = variant(agg=agg, **kw), tiny(dtype=torch.float64), ragged(5)
    tokens, group = randint(13, 8, 6, seed=6), TWO_GROUPS
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logp = model.logprobs(tokens, mask)[0]
    old, ref = (logp + 0.3 * torch.randn(logp.shape, generator=g) * mask for _ in range(2))
    adv, w = torch.randn(8, generator=g, dtype=torch.float64), token_weights(mask, group, cfg)
    grads = []
    for rows in (8, 4, 1):
        model.zero_grad()
        for mb in torch.arange(8).split(rows):
            logp, _ = model.logprobs(tokens[mb], mask[mb])
            policy_loss(logp, old[mb], ref[mb], adv[mb], mask[mb], w[mb], cfg)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert max(x.abs().max() for x in grads[0]) > 1e-3
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            close(a, b, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("ratio, adv, kw, loss, grad", [
    (1.5, 1.0, {}, -1.2, 0.0),  # raised enough
    (1.5, -1.0, {}, 1.5, 1.5),  # raised although bad: the full pull back
    (0.5, 1.0, {}, -0.5, -0.5),  # lowered although good
    (0.5, -1.0, {}, 0.8, 0.0),  # lowered enough
    (1.25, 2.0, dict(clip_high=0.28), -2.5, -2.5),  # clip-higher leaves more room upwards,
    (0.75, -2.0, dict(clip_high=0.28), 1.6, 0.0),  # and none downwards
    (5.0, -1.0, {}, 5.0, 5.0),
    (9.0, 1.0, dict(clip_high=10.0, clip_low=10.0), -9.0, -9.0),  # R1-Zero's ε of 10
])
def test_clip_branches(ratio, adv, kw, loss, grad):
    """Loss, and its slope in logp, of one token on every branch."""
    logp = f64([[math.log(ratio)]]).requires_grad_()
    one = torch.ones(1, 1)
    got, _ = policy_loss(logp, f64([[0.0]]), None, f64([adv]), one, one, variant(**kw))
    got.backward()
    close([got.item(), logp.grad.item()], [loss, grad], atol=1e-12)


def test_gspo_gradient_is_the_sequence_ratios_own():
    """s = exp(mean log-ratio): the gradient is that of −A·s per row, by central differences."""
    cfg = variant(ratio="sequence", agg="seq_mean", clip_low=0.9, clip_high=9.0)
    mask, adv = ragged(7), f64(range(-3, 5))
    g = torch.Generator().manual_seed(2)
    logp, old = (torch.randn(mask.shape, generator=g, dtype=torch.float64) * mask for _ in range(2))
    logp.requires_grad_()
    w = token_weights(mask, torch.arange(8), cfg).double()
    policy_loss(logp, old, None, adv, mask, w, cfg)[0].backward()

    def value(x):
        s = [math.exp((x - old)[b][mask[b]].mean()) for b in range(8)]
        return sum(-a * r for a, r in zip(adv.tolist(), s)) / 8

    for b, t in mask.nonzero().tolist():
        step = torch.zeros_like(logp)
        step[b, t] = 1e-6
        slope = (value(logp.detach() + step) - value(logp.detach() - step)) / 2e-6
        assert logp.grad[b, t].item() == pytest.approx(slope, abs=1e-7)


def test_hopeless_ratios_stay_finite():
    """A log-ratio of ±200 neither overflows nor gives NaN, forwards or backwards."""
    logp = f64([[200.0, -200.0]]).requires_grad_()
    unbiased = dict(kl="k3", beta=1.0)
    for kw in (dict(), dict(ratio="sequence"), dict(loss="cispo"), unbiased):
        one = torch.ones(1, 2)
        zero = torch.zeros_like(logp)
        loss, _ = policy_loss(logp, zero, zero, f64([-1.0]), one, one, variant(**kw))
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# KL estimators: a softmax over four tokens, every expectation a sum

THETA, REF4 = f64([0.3, -0.2, 0.5, 0]), f64([0, 0.4, -0.3, 0.2]).log_softmax(0)[:, None]
TO_REF = f64([0.023994, -0.138407, 0.200431, -0.086017])  # ∇ KL(π‖ref)
FROM_REF = f64([0.055695, -0.164981, 0.175925, -0.066639])  # ∇ KL(ref‖π)


@pytest.mark.parametrize("kind, mean, std", [
    ("k1", 0.135969, 0.517), ("k2", 0.143139, 0.110), ("k3", 0.135969, 0.106)])
def test_kl_estimates_by_enumeration(kind, mean, std):
    logp = THETA.log_softmax(0)[:, None]
    p, k = logp.exp(), kl_estimate(logp, REF4, kind)
    close([(p * k).sum().item()], [mean])
    close((p * (k - mean).square()).sum().sqrt(), std, atol=6e-4)


PLAIN = dict(kl_unbiased=False)


@pytest.mark.parametrize("kw, want", [
    (dict(kl="k1", **PLAIN), 0 * TO_REF),
    (dict(kl="k1"), TO_REF),
    (dict(kl="k2", **PLAIN), TO_REF),
    (dict(kl="k2"), TO_REF),
    (dict(kl="k3", **PLAIN), FROM_REF),
    (dict(kl="k3"), TO_REF),
], ids=str)
def test_kl_gradients_in_the_loss(kw, want):
    """E_π of the gradient, with β = 2 and no advantage: which divergence each estimator really minimises."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)[:, None]
    old, w, cfg = logp.detach(), logp.detach().exp(), variant(beta=2.0, **kw)
    policy_loss(logp, old, REF4, torch.zeros(4), torch.ones(4, 1), w, cfg)[0].backward()
    close(theta.grad, 2 * want)


@pytest.mark.parametrize("kw, right", [
    (dict(kl="k1"), True), (dict(kl="k2"), True), (dict(kl="k3"), True), (dict(kl="k2", **PLAIN), False),
], ids=str)
def test_kl_gradients_of_stale_samples(kw, right):
    """Tokens drawn from another policy: with the ratio the mean gradient is still that of KL(π‖ref)."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)[:, None]
    old = f64([0.1, 0.7, -0.4, 0.2]).log_softmax(0)[:, None]  # the policy that has drawn them
    cfg = variant(beta=1.0, **kw)
    policy_loss(logp, old, REF4, torch.zeros(4), torch.ones(4, 1), old.exp(), cfg)[0].backward()
    assert torch.allclose(theta.grad, TO_REF, atol=1e-5) == right


@pytest.mark.parametrize("sign", [1, -1])
def test_kl_gradients_thirty_nats_away(sign):
    """k1 and k2 pull the harder the further; k3 by 1 from above, and from below it is capped at 20 nats."""
    for kind, want in (("k1", 1.0), ("k2", sign * 30.0), ("k3", 1.0 if sign > 0 else 0.0)):
        logp = f64([sign * 30.0]).requires_grad_()
        k = kl_estimate(logp, f64([0.0]), kind)
        k.sum().backward()
        close(logp.grad, f64([want]))
        if kind != "k3":
            close(k, f64([{"k1": sign * 30.0, "k2": 450.0}[kind]]))
    assert kl_estimate(torch.tensor([-200.0]), torch.tensor([0.0]), "k3").isfinite().all()
    shaped = train_ppo.shape_rewards(torch.zeros(1), f64([[sign * 30.0]]), f64([[0.0]]), torch.ones(1, 1),
                                     torch.ones(1), beta=1.0)
    close(shaped, f64([[-sign * 30.0]]))  # PPO's k1 has no clamp either


@pytest.mark.parametrize("kind, want", [("k1", TO_REF), ("k3", TO_REF - FROM_REF)])
def test_kl_gradients_in_the_reward(kind, want):
    """The policy gradient of −k, which is a constant there: k1 gives KL(π‖ref), k3 does not."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)[:, None]
    old, w = logp.detach(), logp.detach().exp()
    adv = -kl_estimate(old, REF4, kind)
    policy_loss(logp, old, None, adv, torch.ones(4, 1), w, variant())[0].backward()
    close(theta.grad, want)


# ------------------------------------------------------------------------------------------------------------
# Config

# What is published: recipe, where it stands, the fact in the words of docs/recipes.md, and the flags that say
# it here: {} where it holds without a flag, None where it is different or missing, and that page says why.
FACTS = [
    ("grpo", "2402.03300 §4.1.2", "(r − mean) / std of the group", dict(norm="group_std")),
    ("grpo", "2402.03300 §4.1.1", "mean over responses of the mean over tokens", dict(agg="seq_mean")),
    ("grpo", "2402.03300 §4.1.1", "ratio of each token, clipped below and above",
     dict(ratio="token", loss="clip", clip_low=0.2, clip_high=0.2)),
    ("grpo", "2402.03300 §4.1.1", "k3 in the loss, as it is",
     dict(kl="k3", kl_in="loss", kl_unbiased=False)),
    ("grpo", "2402.03300 §4.2", "KL coefficient 0.04", dict(beta=0.04)),
    ("grpo", "2402.03300 §4.2", "64 samples for each prompt", None),
    ("grpo", "2402.03300 §4.2", "one update for each rollout", None),
    ("grpo", "2402.03300 §4.1.4", "the reference is renewed in each iteration", None),
    ("dr_grpo", "2503.20783 §3.2", "r − mean, not divided by the std", dict(norm="none")),
    ("dr_grpo", "2503.20783 §3.2", "sum over tokens / a constant", dict(agg="seq_sum_const")),
    ("dr_grpo", "2503.20783 §3", "no KL", dict(kl="none", beta=0.0)),
    ("rloo", "2402.14740", "r − mean of the other samples", dict(norm="leave_one_out")),
    ("rloo", "2402.14740", "REINFORCE on the response's log-prob: no ratio, no clip", dict(loss="reinforce")),
    ("rloo", "2402.14740", "k1 of the whole response in the reward", dict(kl="k1", kl_in="reward")),
    ("rloo", "2402.14740", "one update for each rollout", dict(minibatches=1)),
    ("rloo", "2402.14740", "log-probs are summed, not divided", None),
    ("reinforce++", "2501.03262, with baseline", "r − mean of the group, whitened over all tokens",
     dict(norm="batch_whiten", dead_groups="keep")),
    ("reinforce++", "2501.03262, with baseline", "k2 in the loss, as it is",
     dict(kl="k2", kl_in="loss", kl_unbiased=False)),
    ("reinforce++", "2501.03262, with baseline", "KL coefficient 0.01", dict(beta=0.01)),
    ("reinforce++", "2501.03262, with baseline", "clip 0.2, mean over tokens",
     dict(loss="clip", clip_low=0.2, clip_high=0.2, agg="token")),
    ("reinforce++", "2501.03262, without baseline", "k1 in each token's reward, whitened returns, no groups",
     None),
    ("dapo", "2503.14476 §3.1", "clip 0.2 below, 0.28 above", dict(clip_low=0.2, clip_high=0.28)),
    ("dapo", "2503.14476 §3.2", "dead groups are replaced until the batch is full",
     dict(dead_groups="refill")),
    ("dapo", "2503.14476 §3.3", "mean over the tokens of a prompt's group", None),
    ("dapo", "verl #2776, trl #5375", "the released code: mean over the tokens of the batch",
     dict(agg="token")),
    ("dapo", "2503.14476 §3.4", "penalty up to 1 over the last fifth of the limit",
     dict(overlong_penalty=1.0)),
    ("dapo", "2503.14476 §2.4", "rewards of 1 and −1", None),
    ("dapo", "2503.14476 §2.3", "no KL", dict(kl="none", beta=0.0)),
    ("dapo", "2503.14476 §4.1", "constant learning rate after 20 steps of warm-up",
     dict(constant_lr_after=20)),
    ("dapo", "2503.14476 §4.1", "512 prompts × 16 samples, 16 updates for each rollout", None),
    ("gspo", "2507.18071 §4.1", "one ratio a response: the geometric mean", dict(ratio="sequence")),
    ("gspo", "2507.18071 §4.1", "mean over responses", dict(agg="seq_mean")),
    ("gspo", "2507.18071 §5.1", "clip 3e-4 below, 4e-4 above", dict(clip_low=3e-4, clip_high=4e-4)),
    ("gspo", "2507.18071 §4.1", "(r − mean) / std of the group", dict(norm="group_std")),
    ("gspo", "2507.18071 §2", "the KL is left out of the formulas, as not their subject", dict(kl="none")),
    ("cispo", "2506.13585 §3.1", "the weight is capped, every token keeps its gradient", dict(loss="cispo")),
    ("cispo", "2506.13585 §3.1", "the weight has no lower bound; its cap is not named", {}),
    ("cispo", "2506.13585 §3.1", "(r − mean) / std of the group, no KL", dict(norm="group_std", kl="none")),
    ("cispo", "2506.13585 §3.1", "mean over the tokens of a prompt's group", None),
    ("cispo", "2506.13585 §3.1", "dynamic sampling and length penalty of DAPO", None),
    ("cispo", "2506.13585 §3.2", "Adam's β₂ 0.95 and eps 1e-15", None),
    ("scalerl", "2510.13786", "(r − mean) / std of all advantages of the batch", dict(norm="batch_std")),
    ("scalerl", "2510.13786", "CISPO with a cap of 4 to 8", dict(loss="cispo")),
    ("scalerl", "2510.13786", "mean over whole prompts of the mean over their tokens",
     dict(agg="prompt_mean")),
    ("scalerl", "2510.13786", "prompts without variance are dropped, not replaced", dict(dead_groups="drop")),
    ("scalerl", "2510.13786", "prompts at a pass rate of 0.9 over their history leave",
     dict(no_positive_resampling=0.9)),
    ("scalerl", "2510.13786", "PipelineRL-8: up to 8 updates behind", dict(off_policy_steps=8)),
    ("scalerl", "2510.13786", "one update for 768 samples", dict(minibatches=1)),
    ("scalerl", "2510.13786", "Adam's eps 1e-15", dict(adam_eps=1e-15)),
    ("scalerl", "2510.13786", "weight decay 0.01", dict(weight_decay=0.01)),
    ("scalerl", "2510.13786", "constant learning rate after 100 steps of warm-up",
     dict(constant_lr_after=100)),
    ("scalerl", "2510.13786", "logits in fp32, in sampling too", {}),
    ("scalerl", "2510.13786", "thoughts that are too long are ended by a sentence", None),
    ("r1_zero", "2501.12948 §2.1", "no clip value is named",
     dict(loss="clip", clip_low=0.2, clip_high=0.2)),
    ("r1_zero", "2501.12948 §2.1", "GRPO's objective, KL coefficient 0.001",
     dict(norm="group_std", agg="seq_mean", kl="k3", kl_in="loss", kl_unbiased=False, beta=0.001)),
    ("r1_zero", "2501.12948 §2.1", "the reference is renewed after 400 updates", dict(ref_every=400)),
    ("r1_zero", "2501.12948 §2.1", "16 minibatches, each passed once", dict(minibatches=16, epochs=1)),
    ("r1_zero", "2501.12948 §2.1", "temperature 1", dict(temperature=1.0)),
    ("r1_zero", "2501.12948 §2.2", "accuracy and format weigh the same", None),
    ("r1_zero", "2501.12948 §2.1", "32 prompts × 16 samples in each update", None),
    ("r1_zero", "2501.12948 §2.1", "a longer limit from step 8,200 on", None),
    ("deepscaler", "the released scripts", "GRPO with a mean over tokens",
     dict(norm="group_std", agg="token")),
    ("deepscaler", "the released scripts", "k3 in the loss, coefficient 0.001",
     dict(kl="k3", kl_in="loss", kl_unbiased=False, beta=0.001)),
    ("deepscaler", "the released scripts", "entropy bonus 0.001", dict(entropy_coef=0.001)),
    ("deepscaler", "the released scripts", "constant learning rate", dict(constant_lr_after=1)),
    ("deepscaler", "the released scripts", "128 prompts a step in 2 updates", None),
    ("deepscaler", "the released scripts", "temperature 0.6", None),
    ("deepscaler", "the released scripts", "8 samples at a limit of 8K, then 16 at 16K and 24K", None),
]  # fmt: skip


def test_recipes_are_the_papers():
    assert {recipe for recipe, *_ in FACTS} == set(RECIPES) - {""}
    stated = {}
    for recipe, _, _, flags in FACTS:
        if flags:
            cfg = Config(recipe=recipe)
            assert {k: getattr(cfg, k) for k in flags} == flags, recipe
            stated.setdefault(recipe, set()).update(flags)
    for recipe in stated:  # and a recipe sets nothing that no source says, but for RLOO's two
        assert set(RECIPES[recipe]) - stated[recipe] == ({"agg", "beta"} if recipe == "rloo" else set())
    others = [Config(recipe=recipe) for recipe in RECIPES if recipe != "scalerl"]
    assert {(cfg.adam_eps, cfg.weight_decay) for cfg in others} == {(1e-8, 0.0)}  # PyTorch's eps
    assert train_ppo.Config().adam_eps == 1e-5  # 2403.17031, detail 20: of N+'s PPO
    assert train_dpo.Config().adam_eps == 1e-8


def test_the_page_of_recipes_has_every_fact():
    """docs/recipes.md: one row a fact, "as published" exactly where flags say it; else the reason."""
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| `(\w.*) \|$", page, re.M)]
    shown = [(recipe.strip("`"), source, fact) for recipe, source, fact, _ in rows]
    assert shown == [row[:3] for row in FACTS]
    for (*_, here), (recipe, _, fact, flags) in zip(rows, FACTS):
        status, _, reason = here.partition(":")
        assert status in (("different", "missing") if flags is None else ("as published",)), (recipe, fact)
        assert flags or len(reason.split()) >= 4, (recipe, fact)
        assert not flags or all(f"--{name} " in reason for name in flags), (recipe, fact)


@pytest.mark.parametrize("argv", [
    "--clip_high 0.2 --dead_groups keep --recipe dapo --overlong_penalty=0",
    "--recipe dapo --clip_high 0.2 --dead_groups keep --overlong_penalty 0",
    "--overlong-penalty 0 --dead_groups=keep --clip_high=0.2 --recipe=dapo",
])
def test_a_flag_that_is_given_wins_over_the_recipe(argv):
    """Wherever it stands, and even where it says what would hold without the recipe."""
    cfg = parse(Config, argv.split())
    assert (cfg.clip_high, cfg.dead_groups, cfg.overlong_penalty) == (0.2, "keep", 0)
    assert (cfg.norm, cfg.agg, cfg.constant_lr_after) == ("group_std", "token", 20), "of the recipe"


@pytest.mark.parametrize("name", [k for k in RECIPES[""] if k in Config.__dataclass_fields__])
def test_every_recipe_flag_can_be_given(name):
    """Its default is None, or a value that was given could not be told from one that was not."""
    assert Config.__dataclass_fields__[name].default is None
    value = {bool: True, int: 3, float: 0.5}.get(type(RECIPES[""][name]))
    if value is not None:
        more = {name: value} | ({"kl": "k1"} if name == "beta" else {})  # alone it would do nothing
        assert all(getattr(Config(recipe=r, **more), name) == value for r in RECIPES)


@pytest.mark.parametrize("kw, says", [
    (dict(group_size=1), "--group_size 1"),
    (dict(recipe="grpp"), "--recipe grpp"),
    (dict(kl="k3", beta=0.1, ref="none"), "need a reference"),
    (dict(max_new_tokens=[24, 16], lengthen_at=[3]), "--max_new_tokens 24,16"),
    (dict(rm="x", reward=["y.py:f"]), "--rm and --reward"),
    (dict(prompts_per_step=1, group_size=2, minibatches=4), "--minibatches 4"),
    (dict(beta=-1.0), "--beta"),
    (dict(beta=0.1), "--beta 0.1: there is no KL"),
    (dict(recipe="dapo", beta=0.1), "--beta 0.1: there is no KL"),
    (dict(kl="k3"), "--kl k3: has no effect without --beta"),
    (dict(recipe="dapo", kl="k1"), "--kl k1: has no effect without --beta"),
    (dict(kl="exact", kl_in="reward", beta=0.1), "--kl exact stands in the loss"),
    (dict(kl="exact", beta=0.1, ref="none"), "need a reference"),
])
def test_refused(kw, says):
    with pytest.raises(UserError, match=says.replace("-", "[-]")):
        Config(**kw)


@pytest.mark.parametrize("kw", [
    dict(kl="k3", beta=0.0), dict(beta=0.0), dict(recipe="grpo", kl="none"), dict(recipe="grpo", kl="k2"),
    dict(recipe="dapo", kl="k1", kl_in="reward", beta=0.1), dict(ref_every=3),
], ids=str)
def test_not_refused(kw):
    """A beta of 0 that was asked for, and what a recipe leaves behind."""
    assert vars(Config(**kw)).items() >= kw.items()


@pytest.mark.parametrize("kw, biased", [
    (dict(loss="reinforce"), False), (dict(loss="reinforce", minibatches=2), True),
    (dict(loss="reinforce", epochs=2), True), (dict(loss="reinforce", off_policy_steps=1), True),
    (dict(loss="clip", minibatches=2), False),
], ids=str)
def test_reinforce_off_policy_is_said_to_be_biased(lab, kw, biased, capsys):
    train(config(lab, by_letters, steps=1, **kw))
    assert capsys.readouterr().out.count("warning: --loss reinforce has no ratio") == biased


def test_health_knows_another_reference(lab, capsys):
    """--ref other: a KL at step 0 is as it must be."""
    train(config(lab, by_letters, steps=1, ref=f"{lab}/other"))
    out = capsys.readouterr().out
    assert "health: " in out and "KL 0.000000" not in out and "KL is not 0" not in out


@pytest.mark.parametrize("limits, at, want", [
    (24, [], [24]),
    ([24], [], [24]),
    ([24, 40, 64], [40, 80], [24, 40, 64]),
    ([24, 40], [], None), ([24, 40], [5, 9], None), ([24, 40], [0], None), ([24, 40, 64], [9, 5], None),
    ([24, 24], [5], None), ([], [], None), (0, [], None), ([0, 5], [3], None), (24, [3], None),
    ([24, 40, 64], [5, 5], None), ([24, 40], [-3], None),
])
def test_length_schedule(limits, at, want):
    if want is None:
        with pytest.raises(UserError, match="max_new_tokens|lengthen_at"):
            length_schedule(limits, at)
    else:
        assert length_schedule(limits, at) == want


@pytest.mark.parametrize("length, want", [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (130, -1)])
def test_overlong_penalty(length, want):
    """DAPO's: 0 up to L − buffer, then linearly to −1 at L; here L = 100 and a buffer of 20."""
    close(overlong(torch.tensor([length]), 100, 1.0), [float(want)])
    close(overlong(torch.tensor([length]), 100, 0.5), [want / 2])


@pytest.mark.parametrize("kw, word", [
    (dict(), None),
    (dict(kl=None), None),
    (dict(gap=0.01), "ratio is not 1"),
    (dict(kl=0.5), "KL is not 0"),
    (dict(kl=0.5, ref_is_init=False), None),
    (dict(mean_adv=0.4), "mean advantage"),
    (dict(mean_adv=None, dead=None), None),
    (dict(dead=0.9), "dead"),
    (dict(stop=0.2), None),  # rewards differ in most groups: it learns, also to end
    (dict(stop=0.2, dead=0.7), "max_new_tokens"),
    (dict(stop=0.2, mean_adv=None, dead=None), "max_new_tokens"),
], ids=str)
def test_health_line(kw, word):
    """One line when all is well; else one more that begins with !!, for the figure that is wrong."""
    metrics = dict(gap=1e-7, kl=0.0, dead=0.2, stop=0.9)
    figures = dict(mean_adv=0.0) | {name: kw[name] for name in kw.keys() - metrics.keys()}
    metrics |= {name: kw[name] for name in kw.keys() & metrics.keys()}
    lines = health(metrics, tokens=100, **figures).split("\n")
    assert lines[0].startswith("health: ratio 1") and len(lines) == 1 + (word is not None)
    assert word is None or (word in lines[1] and "!!" in lines[1])


# ------------------------------------------------------------------------------------------------------------
# train

LETTERS = "abcdef"
TOK = Tokenizer.from_chars(LETTERS + "=")
PROMPTS = [a + b + "=" for a in LETTERS for b in LETTERS]


def second_letter(prompt, response):
    """`cf=` is answered by `f` and EOS: 1 in 81 by chance."""
    return float(response == prompt[1])


def by_letters(prompt, response, row):
    """Anything that differs from sample to sample and prompt to prompt."""
    return sum(map(ord, response + prompt)) % 7 / 7


def length(prompt, response):
    return float(len(response))


def by_sign(prompt, response):
    return float(by_letters(prompt, response, {}) > 0.5)


def by_sign_minus(prompt, response):
    return 2 * by_sign(prompt, response) - 1


def same(prompt, response):
    return 0.1


def some_alike(prompt, response):
    """Prompts that begin with a to c cannot be told apart: their groups are dead, at 1."""
    return 1.0 if prompt[0] in "abc" else by_letters(prompt, response, {})


@pytest.fixture
def lab(tmp_path):
    for seed, name in ((0, "policy"), (1, "other")):
        torch.manual_seed(seed)
        size = dict(n_layer=1, n_head=2, d_model=32, max_len=16, tied=False)
        model = GPT(GPTConfig.gpt2(TOK.vocab_size, **size))
        model.lm_head.weight.data *= (0.1, 1.0)[seed]
        hub.save(model, TOK, f"{tmp_path}/{name}")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return tmp_path


def config(lab, *rewards, **kw):
    flags = dict(
        data=f"{lab}/prompts.jsonl", init=f"{lab}/policy", out=f"{lab}/run",
        reward=[r if isinstance(r, str) else f"{__file__}:{r.__name__}" for r in rewards],
        steps=4, prompts_per_step=4, group_size=4,
        max_new_tokens=5, minibatches=1, lr=3e-3, eval_prompts=0, sample_every=1, save_every=0,
        reward_timeout=0,  # in this process: quick
    )
    flags["overwrite"] = not kw.get("resume")
    return Config(**flags | kw)


def table(cfg):
    with open(f"{cfg.out}/metrics.csv") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def weights(cfg):
    return list(hub.load(f"{cfg.out}/model")[0].parameters())


@pytest.mark.parametrize("kw", [
    dict(), dict(recipe="dr_grpo"), dict(recipe="gspo", steps=80),
    dict(norm="batch_std", loss="cispo", agg="prompt_mean"),
], ids=str)
def test_learns_to_answer_the_prompt(lab, kw):
    """From chance to nearly always, on prompts never trained on too."""
    flags = dict(steps=40, prompts_per_step=32, max_new_tokens=2, minibatches=4, eval_prompts=64, lr=1e-2)
    cfg = config(lab, second_letter, **flags | kw)
    out = train(cfg)
    first = table(cfg)[0]
    assert first["reward"] < 0.1 and first["eval/reward"] < 0.25
    assert out["reward"] > 0.7 and out["eval/reward"] >= 0.5


def test_does_not_learn_with_the_sign_flipped(lab, monkeypatch):
    """What the learning test would say of a wrong sign: the test sees it."""
    monkeypatch.setattr(train_grpo, "advantages", lambda *args: -advantages(*args))
    flags = dict(steps=40, prompts_per_step=32, max_new_tokens=2, minibatches=4, lr=1e-2)
    out = train(config(lab, second_letter, **flags))
    assert out["reward"] < 0.05


@pytest.mark.parametrize("agg, kw", [(agg, {}) for agg in AGGS] + [
    ("token", dict(norm="batch_whiten", kl="k1", kl_in="reward", beta=0.3, overlong_penalty=0.6)),
    ("seq_mean", dict(norm="leave_one_out", kl="k2", beta=0.3, temperature=0.7)),
], ids=str)
def test_first_gradient_is_the_oracle(lab, spy, gradients, agg, kw):
    """The whole step against a loop in float64 over unpadded rows that knows neither batch nor padding."""
    cfg = config(lab, by_letters, steps=1, agg=agg, ref=f"{lab}/other", tokens_per_microbatch=30, **kw)
    rolls = spy(generate, "generate")
    train(cfg)
    roll = rolls[0][1]
    policy, ref = (hub.load(f)[0].double() for f in (cfg.init, cfg.ref))
    rows = []
    for ids, P in zip(roll.tokens.tolist(), roll.prompt_len.tolist()):
        response = ids[P : P + 5]
        finished = TOK.eos_id in response
        if finished:
            response = response[: response.index(TOK.eos_id) + 1]
        text = TOK.decode(response[:-1] if finished else response)
        logps = []
        for model in (policy, ref):
            hidden = model(torch.tensor([ids[:P] + response]))[0, P - 1 : P - 1 + len(response)]
            steps = torch.log_softmax(hidden @ model.lm_head.weight.T / cfg.temperature, -1)
            logps.append(steps.gather(1, torch.tensor(response)[:, None]).squeeze(1))
        reward = by_letters(TOK.decode(ids[:P]), text, {})
        if len(response) == 5:  # the limit: its last fifth is one token
            reward -= cfg.overlong_penalty
        if cfg.kl_in == "reward":
            reward -= 0.3 * (logps[0] - logps[1]).sum().item()
        rows.append((logps[0], logps[1], reward))
    loss, lengths = 0.0, [len(row[0]) for row in rows]
    adv = []
    for g in range(4):
        r = [row[2] for row in rows[4 * g : 4 * g + 4]]
        mean = sum(r) / 4
        adv += [(x - mean) * {"leave_one_out": 4 / 3}.get(cfg.norm, 1.0) for x in r]
        if cfg.norm == "group_std":
            std = math.sqrt(sum((x - mean) ** 2 for x in r) / 3)
            adv[-4:] = [x / (std + 1e-6) for x in adv[-4:]]
    if cfg.norm == "batch_whiten":
        n = sum(lengths)
        mean = sum(k * a for k, a in zip(lengths, adv)) / n
        var = sum(k * (a - mean) ** 2 for k, a in zip(lengths, adv)) / (n - 1)
        adv = [(a - mean) / math.sqrt(var + 1e-8) for a in adv]
    for i, (logp, ref_logp, _) in enumerate(rows):
        share = {"token": 1 / sum(lengths), "seq_mean": 1 / (16 * lengths[i]), "seq_sum_const": 1 / (16 * 5),
                 "prompt_mean": 1 / (4 * sum(lengths[i // 4 * 4 : i // 4 * 4 + 4]))}[agg]
        row_loss = -adv[i] * logp.sum()  # its gradient at ratio 1
        if cfg.kl == "k2":
            row_loss = row_loss + 0.3 * ((logp - ref_logp.detach()) ** 2 / 2).sum()
        loss = loss + share * row_loss
    want = torch.autograd.grad(loss, list(policy.parameters()))
    assert 0 < roll.finished.float().mean() < 1 and max(x.abs().max() for x in want) > 1e-4
    for got, w in zip(gradients[0], want, strict=True):
        close(got, w, atol=2e-6, rtol=1e-4)


def test_every_row_is_in_one_minibatch_with_weights_of_its_own(lab, spy):
    """Each epoch deals all rows out anew, each once and with its advantage; a step's weights sum to 1."""
    rolls, advs = spy(generate, "generate"), spy(train_grpo, "advantages")
    losses = spy(train_grpo, "policy_loss")
    train(config(lab, by_letters, steps=1, epochs=2, minibatches=3, tokens_per_microbatch=0, lr=1e-12))
    want = sorted(zip(rolls[0][1].logp.sum(1).tolist(), advs[0][1].tolist()))
    assert len(losses) == 6
    orders = []
    for epoch in (losses[:3], losses[3:]):
        dealt = []
        for (_, old_logp, _, adv, mask, w, _), _ in epoch:
            dealt += zip(old_logp.sum(1).tolist(), adv.tolist())
            close(w.sum(), 1.0)
            assert ((w > 0) == mask).all()
        close(torch.tensor(sorted(dealt)), torch.tensor(want), atol=1e-5)
        orders.append(dealt)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("minibatches", [1, 3, 4])
def test_prompt_mean_deals_whole_prompts(lab, spy, minibatches):
    """ScaleRL: all samples of a prompt stand in one minibatch, and there each prompt weighs the same."""
    calls = spy(train_grpo, "token_weights")
    train(config(lab, by_letters, steps=1, agg="prompt_mean", minibatches=minibatches, epochs=2))
    assert len(calls) == 2 * minibatches
    for epoch in (calls[:minibatches], calls[minibatches:]):
        seen = []
        for (_, group, _), w in epoch:
            prompts, samples = group.unique(return_counts=True)
            assert (samples == 4).all()
            seen += prompts.tolist()
            for prompt in prompts:
                close(w[group == prompt].sum(), 1 / len(prompts))
        assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
def test_deal(n):
    """Every row once; a unit's rows together and in order; n minibatches, or one a unit; by the seed."""
    unit = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    parts = [part.tolist() for part in deal(unit, n, seed=1)]
    assert len(parts) == min(n, 5) and sorted(sum(parts, [])) == list(range(8))
    for part in parts:
        units = [unit[row].item() for row in part]
        assert all(units.count(u) == (unit == u).sum() for u in units)
        assert all(a < b for a, b in zip(part, part[1:]) if unit[a] == unit[b])
    rows = torch.arange(64)
    dealt = [torch.cat(list(deal(rows, 4, seed))).tolist() for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2] and dealt[0] != sorted(dealt[0]) and len(set(dealt[0])) == 64


@pytest.mark.parametrize("kw", [dict(), dict(ratio="sequence"), dict(agg="seq_mean", temperature=0.7)],
                         ids=str)
@pytest.mark.parametrize("trainer", [train_grpo, train_ppo])
def test_entropy_bonus_by_finite_differences(trainer, kw, monkeypatch):
    """Its gradient in a weight of every matrix, in float64, with the loss in chunks of one row."""
    if trainer is train_ppo and kw:
        pytest.skip("PPO has one way to weigh its tokens")
    monkeypatch.setattr(torch_backend, "STORED", 1)
    torch.manual_seed(0)
    model = tiny(dtype=torch.float64)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    mask, tokens, group = ragged(5), randint(13, 8, 6, seed=6), TWO_GROUPS
    cfg = variant(entropy_coef=0.7, **kw) if trainer is train_grpo else train_ppo.Config(entropy_coef=0.7)
    weight = token_weights(mask, group, cfg) if trainer is train_grpo else mask / mask.sum()
    zero = torch.zeros(8, 6, dtype=torch.float64)
    with torch.no_grad():
        old_logp = model.logprobs(tokens, mask, cfg.temperature)[0]
    batch = dict(tokens=tokens, mask=mask, old_logp=old_logp, ref_logp=None, adv=zero, w=weight,
                 denom=mask.sum())
    trainer.microbatch_loss(model, batch, cfg)[0].backward()

    def bonus():
        """−0.7 Σ w H of the whole batch, from all logits: no advantage, so this is the loss."""
        logp = (model.logits(tokens[:, :-1]) / cfg.temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return -0.7 * (weight[:, 1:] * entropy).sum().item()

    largest = 0.0
    with torch.no_grad():
        for p in model.parameters():
            flat, at = p.view(-1), p.grad.abs().argmax()
            flat[at] += 1e-6
            above = bonus()
            flat[at] -= 2e-6
            slope = (above - bonus()) / 2e-6
            flat[at] += 1e-6
            assert p.grad.view(-1)[at].item() == pytest.approx(slope, abs=1e-8, rel=1e-6)
            largest = max(largest, abs(slope))
    assert largest > 1e-3


def test_the_entropy_bonus_keeps_entropy(lab):
    """The same run with and without it: the policy stays wider."""
    flags = dict(steps=20, prompts_per_step=16, max_new_tokens=2, lr=1e-2)
    without, with_bonus = (train(config(lab, second_letter, entropy_coef=c, **flags)) for c in (0.0, 1.0))
    assert with_bonus["entropy"] > without["entropy"] + 0.1


@pytest.mark.parametrize("trainer", [train_grpo, train_ppo])
@pytest.mark.parametrize("kw", [dict(), dict(ratio="sequence"), dict(agg="seq_mean", temperature=0.7)],
                         ids=str)
def test_exact_kl_in_the_loss(trainer, kw):
    """The gradient of β Σ w KL by the softmax of all logits, in float64; no advantage, so it is alone."""
    if trainer is train_ppo and kw:
        pytest.skip("PPO has one way to weigh its tokens")
    model, ref = tiny(dtype=torch.float64), tiny(seed=1, dtype=torch.float64)
    mask, tokens = ragged(5), randint(13, 8, 6, seed=6)
    cfg = variant(kl="exact", beta=0.3, **kw) if trainer is train_grpo else train_ppo.Config(kl="exact")
    weight = token_weights(mask, TWO_GROUPS, cfg) if trainer is train_grpo else mask.double() / mask.sum()
    with torch.no_grad():
        old_logp = model.logprobs(tokens, mask, cfg.temperature)[0]
    batch = dict(tokens=tokens, mask=mask, old_logp=old_logp, ref_logp=None, adv=torch.zeros(8, 6).double(),
                 w=weight, denom=mask.sum(), beta=0.3)
    loss, *_ = trainer.microbatch_loss(model, batch, cfg, ref)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    p, q = ((m.logits(tokens[:, :-1]) / cfg.temperature).log_softmax(-1) for m in (model, ref))
    want = 0.3 * (weight[:, 1:] * (p.exp() * (p - q.detach())).sum(-1)).sum()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-9) and want > 1e-3
    for a, param in zip(got, model.parameters(), strict=True):
        close(a, param.grad, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 30])
def test_exact_kl_by_microbatches(lab, budget):
    """One row at a time, or all at once: the same weights after four updates."""
    flags = dict(kl="exact", beta=0.5, ref=f"{lab}/other", steps=2, minibatches=2, adam_eps=1e-5)
    results = []
    for tokens in (0, budget):
        cfg = config(lab, by_letters, tokens_per_microbatch=tokens, **flags)
        train(cfg)
        results.append(weights(cfg))
    for a, b in zip(*results, strict=True):
        close(a, b, atol=1e-5)


def test_exact_kl_with_save_memory(lab):
    """Blocks form their activations anew; the backward pass reads the reference's unembedding once more."""
    flags = dict(kl="exact", beta=0.5, ref=f"{lab}/other", steps=2, minibatches=2, adam_eps=1e-5)
    results = []
    for save_memory in (False, True):
        cfg = config(lab, by_letters, save_memory=save_memory, **flags)
        train(cfg)
        results.append(weights(cfg))
    for a, b in zip(*results, strict=True):
        close(a, b, atol=1e-6)


def test_exact_kl_of_ppo_needs_a_beta():
    for flags in (dict(task="chain"), dict(beta=0.0)):
        with pytest.raises(UserError, match="--kl exact: has no effect with --beta 0"):
            train_ppo.Config(kl="exact", **flags)


def test_exact_kl_of_ppo_is_not_in_the_reward(lab, spy):
    """The rewards are the scores alone, and beta weighs the KL in the loss: the critic's target has no KL."""
    shaped = spy(train_ppo, "shape_rewards")
    losses = spy(train_ppo, "microbatch_loss")
    flags = dict(data=f"{lab}/prompts.jsonl", init=f"{lab}/policy", ref=f"{lab}/other", out=f"{lab}/ppo",
                 steps=2, prompts_per_step=8, max_new_tokens=4, minibatches=1, eval_prompts=0, save_every=0,
                 lr=1e-3,
                 reward=[f"{__file__}:by_letters"], reward_timeout=0, beta=0.5)
    train_ppo.train(train_ppo.Config(kl="exact", **flags))
    assert all(args[5] == 0 for args, _ in shaped)
    assert all(args[1]["beta"] == 0.5 and args[3] is not None for args, _ in losses)
    shaped.clear()
    losses.clear()
    train_ppo.train(train_ppo.Config(overwrite=True, **flags))
    assert all(args[5] == 0.5 for args, _ in shaped) and all(args[3] is None for args, _ in losses)


@pytest.mark.parametrize("recipe, want", [("", (1e-8, 0.0)), ("scalerl", (1e-15, 0.01))])
def test_adam_has_the_settings_of_the_recipe(lab, spy, recipe, want):
    made = spy(train_grpo, "adamw")
    train(config(lab, by_letters, steps=1, recipe=recipe))
    (group,) = made[0][1].param_groups
    assert (group["eps"], group["weight_decay"]) == want


def test_microbatches_do_not_move_the_step(lab):
    """All at once or one row at a time, over minibatches and epochs: the same weights afterwards."""
    results = []
    for budget in (0, 1):
        cfg = config(lab, by_letters, steps=2, epochs=2, minibatches=3, agg="prompt_mean", entropy_coef=0.1,
                     adam_eps=1e-5, tokens_per_microbatch=budget)  # 1e-8 would enlarge what is rounding
        train(cfg)
        results.append(weights(cfg))
    for a, b in zip(*results, strict=True):
        close(a, b, atol=1e-5)


def test_chunks_do_not_move_a_figure(lab, monkeypatch):
    """The loss is computed for all tokens at once, or for one after the other: what is logged is the same."""
    results = []
    for stored in (torch_backend.STORED, 1):
        monkeypatch.setattr(torch_backend, "STORED", stored)
        cfg = config(lab, by_letters, steps=1, epochs=2, minibatches=2, lr=5e-2, device="cpu")
        results.append(train(cfg))
    assert results[0]["clip"] > 0
    for name in ("clip", "ratio_max", "entropy", "gnorm"):
        close(results[0][name], results[1][name], rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_off_policy_steps_sample_with_old_weights(lab, spy, k):
    """old_logp is the log-prob under the very weights of k steps ago; the ratio is taken against it."""
    models, losses, states = spy(train_grpo, "load_models"), spy(train_grpo, "policy_loss"), []
    real = train_grpo.sample_step

    def watch(*args):
        states.append({n: p.clone() for n, p in models[0][1][0].state_dict().items()})
        return real(*args)

    train_grpo.sample_step = watch
    try:
        rolls = spy(generate, "generate")
        cfg = config(lab, by_letters, steps=5, off_policy_steps=k, lr=1e-2, tokens_per_microbatch=0)
        out = train(cfg)
    finally:
        train_grpo.sample_step = real
    model = hub.load(cfg.init)[0]
    for step, (_, roll) in enumerate(rolls):
        model.load_state_dict(states[max(step - k, 0)])
        close(roll.logp, model.logprobs(roll.tokens, roll.mask)[0].detach(), atol=1e-5)
        (logp, old_logp, *_), _ = losses[step]
        assert sorted(old_logp.sum(1).tolist()) == sorted(roll.logp.sum(1).tolist())
        assert (logp - old_logp).abs().max() < 1e-5 or step > 0
    model.load_state_dict(states[4])
    stale = (roll.logp - model.logprobs(roll.tokens, roll.mask)[0]).abs().max().item()
    assert out["gap"] == pytest.approx(stale, abs=1e-5) and stale > 1e-3, "nothing was stale"


def test_dead_groups_are_filtered_and_refilled(lab, spy, monkeypatch):
    """Only live groups are trained on; more rounds are sampled until the step is full, of fresh prompts."""
    calls, rolls = spy(train_grpo, "sample_step"), spy(generate, "generate")
    monkeypatch.setattr(train_grpo, "MAX_ROUNDS", 8)
    cfg = config(lab, some_alike, dead_groups="refill")
    train(cfg)
    assert sum(r["sampled"] for r in table(cfg)) == sum(int(roll.mask.sum()) for _, roll in rolls)
    assert all(0 < row["dead"] < 1 for row in table(cfg))
    for _, (roll, rounds) in calls:
        assert len(roll.reward) == len(roll.rows) == len(roll.texts) == len(roll) == 16
        groups = roll.reward.view(4, 4)
        assert (groups.amax(1) > groups.amin(1)).all() and len(rounds) > 1
        assert all(row["prompt"][0] in "def" for row in roll.rows)
        for row, text, s, ids in zip(roll.rows, roll.texts, roll.reward.tolist(), roll.tokens.tolist()):
            assert s == pytest.approx(some_alike(row["prompt"], text))
            assert ids[:3] == TOK.encode(row["prompt"])
        assert roll.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    one = train(config(lab, some_alike, dead_groups="drop"))
    assert one["rounds"] == 1


def test_learning_rate_warms_up_and_decays(lab):
    """As shares of --lr, in eight steps."""
    cfg = config(lab, by_letters, steps=8, lr=0.01)
    train(cfg)
    want = [0.2, 0.4, 0.6, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert [row["lr"] for row in table(cfg)] == pytest.approx([0.01 * x for x in want])


@pytest.mark.parametrize("after, want", [(1, [1.0] * 4), (8, [0.125, 0.25, 0.375, 0.5])])
def test_constant_learning_rate(lab, after, want):
    """After the warm-up it stays, however long the run is."""
    cfg = config(lab, by_letters, lr=0.01, constant_lr_after=after)
    train(cfg)
    assert [row["lr"] for row in table(cfg)] == pytest.approx([0.01 * x for x in want])


@pytest.mark.parametrize("kw", [
    dict(), dict(dead_groups="drop"), dict(dead_groups="refill")
], ids=str)
def test_equal_rewards_go_on_and_change_nothing(lab, kw):
    """Every group dead at 0.1, filtered or not: no crash, no NaN, and the weights stay what they were."""
    cfg = config(lab, same, **kw)
    out = train(cfg)
    assert out["dead"] == 1 and out["reward"] == pytest.approx(0.1) and out["gnorm"] == 0
    before = hub.load(cfg.init)[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights(cfg), before, strict=True))


def test_mastered_prompts_do_not_come_back(lab, spy):
    """ScaleRL: a prompt whose pass rate reached 0.9 is never drawn again; the others go on."""
    calls = spy(train_grpo, "sample_step")
    train(config(lab, some_alike, no_positive_resampling=0.9, steps=20, prompts_per_step=3))
    history = {}
    for _, (roll, _) in calls:
        prompts = [row["prompt"] for row in roll.rows]
        gone = {p for p, rewards in history.items() if sum(r > 0 for r in rewards) / len(rewards) >= 0.9}
        assert not gone & set(prompts)
        for prompt, reward in zip(prompts, roll.reward.tolist()):
            history.setdefault(prompt, []).append(reward)
    assert any(p[0] in "abc" for p in gone)
    counted = {prompt: (sum(r > 0 for r in rewards), len(rewards)) for prompt, rewards in history.items()}
    assert calls[-1][0][5]["history"] == counted and max(n for _, n in counted.values()) > 4
    with pytest.raises(UserError, match="all 31 prompts reached it"):
        train(config(lab, same, no_positive_resampling=0.05, steps=20))


def test_mastery_is_judged_by_the_whole_history(lab):
    """1 of 4, then 4 of 4: 5 of 8 passed, which is below 0.9; three more whole ones reach 17 of 20 only."""
    cfg = config(lab, same, no_positive_resampling=0.9, prompts_per_step=1)
    rows = [{"prompt": "aa="}, {"prompt": "bb="}]

    def drawn(history):
        progress = {"drawn": 0, "history": {"bb=": (1, 1)} | history}
        return next_prompts(rows, progress, cfg)[0]["prompt"]

    for passed, sampled in ((1, 4), (5, 8), (17, 20)):
        assert drawn({"aa=": (passed, sampled)}) == "aa="
    with pytest.raises(UserError, match="all 2 prompts reached it"):
        drawn({"aa=": (36, 40)})


def test_the_history_of_conversations_can_be_resumed(lab):
    """Their prompts are Chats, and a checkpoint with a class of ours in it would be refused as damaged."""
    tok = Tokenizer.from_chars(LETTERS + "=:\n UAsrnti")
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_len=64))
    hub.save(model, tok, f"{lab}/talker")
    talks = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (lab / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    flags = dict(data=f"{lab}/talks.jsonl", init=f"{lab}/talker", no_positive_resampling=1.0, save_every=1)
    train(config(lab, by_letters, steps=1, **flags))
    cfg = config(lab, by_letters, steps=2, resume=True, **flags)
    train(cfg)
    assert [row["step"] for row in table(cfg)] == [0, 1]


def test_a_pass_is_a_reward_above_0(lab, spy):
    """Rewards of ±1 count like those of 1 and 0."""
    histories = []
    for shift in ("", "_minus"):
        calls = spy(train_grpo, "next_prompts")
        train(config(lab, f"{__file__}:by_sign{shift}", no_positive_resampling=1.0, steps=3))
        histories.append(calls[-1][0][1]["history"])
    assert histories[0] == histories[1] and {n for _, n in histories[0].values()} >= {4}
    assert any(0 < passed < n for passed, n in histories[0].values())


def test_several_rewards_are_summed_and_logged_each_alone(lab):
    cfg = config(lab, by_letters, f"{__file__}:length*0.1")
    train(cfg)
    with open(f"{cfg.out}/samples.jsonl") as f:
        samples = [json.loads(line) for line in f]
    for step, row in enumerate(table(cfg)):
        mine = [s for s in samples if s["step"] == step]
        parts = [sum(fn(*args) for args in ((s["prompt"], s["response"]) for s in mine)) / len(mine)
                 for fn in (lambda p, r: by_letters(p, r, {}), length)]
        assert [row["reward/by_letters"], row["reward/length"]] == pytest.approx(parts, rel=1e-4)
        assert row["reward"] == pytest.approx(parts[0] + 0.1 * parts[1], rel=1e-4)


@pytest.mark.parametrize("max_new_tokens, at, want", [
    ([2, 3, 5], [1, 3], [2, 3, 3, 5]),
    (3, [], [3, 3, 3, 3]),
])
def test_responses_lengthen_in_the_run(lab, spy, max_new_tokens, at, want):
    rolls = spy(generate, "generate")
    cfg = config(lab, by_letters, max_new_tokens=max_new_tokens, lengthen_at=at)
    train(cfg)
    assert [row["limit"] for row in table(cfg)] == want
    assert [int(roll.response_len.max()) for _, roll in rolls] == want


@pytest.mark.parametrize("kw", [
    dict(off_policy_steps=2, ref_every=3, kl="k3", beta=0.1),
    dict(recipe="dapo"),
    dict(recipe="r1_zero", ref_every=5),
    dict(recipe="scalerl", no_positive_resampling=1.0, prompts_per_step=7, max_new_tokens=[2, 3, 5],
         lengthen_at=[2, 4]),
], ids=str)
def test_resuming_changes_no_bit(lab, monkeypatch, kw):
    """Killed in its fifth step and resumed from the fourth: weights and log as if nothing had happened."""
    cfg = config(lab, by_letters, steps=6, minibatches=2, **kw)
    train(cfg)
    whole, rows = weights(cfg), table(cfg)
    calls, real = [], train_grpo.sample_step

    def crash(*args):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return real(*args)

    broken = dict(steps=6, minibatches=2, save_every=2, out=f"{lab}/broken", **kw)
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(train_grpo, "sample_step", crash)
        train(config(lab, by_letters, **broken))
    cfg = config(lab, by_letters, resume=True, **broken)
    train(cfg)
    assert all(torch.equal(a, b) for a, b in zip(weights(cfg), whole, strict=True))
    clock = ("s", "tok_s")
    assert [{k: v for k, v in r.items() if k not in clock} for r in table(cfg)] == [
        {k: v for k, v in r.items() if k not in clock} for r in rows
    ]


@pytest.mark.parametrize("ref_every, minibatches, renewed", [
    (2, 1, [0, 2, 4]), (4, 2, [0, 2, 4]), (4, 4, [0, 1, 2, 3, 4]), (6, 2, [0, 3]), (3, 2, [0, 2, 3]),
])
def test_the_reference_follows_every_n_updates(lab, ref_every, minibatches, renewed):
    """KL is 0 where the reference was just renewed, after that many optimizer steps, and not in between.

    3 updates are over within the second rollout of two: the reference is renewed before the third, and the
    fourth update counts for the next time.
    """
    cfg = config(lab, by_letters, steps=5, ref_every=ref_every, minibatches=minibatches, kl="k3", beta=0.1,
                 lr=1e-2)
    train(cfg)
    kls = [abs(row["kl"]) for row in table(cfg)]
    assert [step for step, kl in enumerate(kls) if kl < 1e-5] == renewed
    assert all(kl > 1e-4 for step, kl in enumerate(kls) if step not in renewed)


def test_no_reference_no_kl(lab):
    """--ref none: nothing is loaded, the kl column is empty; the same weights as with one that is unused."""
    cfg = config(lab, by_letters, ref="none")
    assert "kl" not in train(cfg)
    results = weights(cfg)
    cfg = config(lab, by_letters)
    train(cfg)
    assert all(torch.equal(a, b) for a, b in zip(results, weights(cfg), strict=True))


def test_first_step_is_healthy(lab, capsys):
    out = train(config(lab, by_letters))
    assert 0 < out["gap"] < 1e-5
    line = next(x for x in capsys.readouterr().out.split("\n") if x.startswith("health"))
    assert "KL 0.000000" in line and "mean advantage 0.000" in line


def test_rows_without_eos_are_scored_whole(lab, spy):
    """No response ends within one token but those that are EOS alone: every sampled token has a weight."""
    losses = spy(train_grpo, "policy_loss")
    cfg = config(lab, by_letters, max_new_tokens=1, steps=1)
    out = train(cfg)
    assert out["stop"] < 0.5 and out["len"] == 1
    assert sum(((args[5] > 0) == args[4]).all().item() for args, _ in losses) == len(losses)
    out = train(config(lab, by_letters, max_new_tokens=1, steps=2, overlong_penalty=0.5, minibatches=16))
    assert math.isfinite(out["gnorm"])


# ------------------------------------------------------------------------------------------------------------
# What a run of several epochs, rounds and stages does, where a single step would look the same


def test_old_logp_stays_in_every_epoch(lab, spy):
    """The policy moves away from the sampler, and the ratio goes on being taken to the sampler."""
    rolls, losses = spy(generate, "generate"), spy(train_grpo, "policy_loss")
    train(config(lab, by_letters, steps=1, epochs=3, lr=1e-2, tokens_per_microbatch=0))
    want = sorted(rolls[0][1].logp.sum(1).tolist())
    assert len(losses) == 3
    for (_, old_logp, *_), _ in losses:
        assert sorted(old_logp.sum(1).tolist()) == pytest.approx(want, abs=1e-6)
    (logp, old_logp, *_), _ = losses[2]
    assert (logp - old_logp).abs().max() > 1e-2


def test_every_round_has_prompts_of_its_own(lab, spy):
    """All groups dead: four rounds of four prompts, and 16 of the 31 prompts are asked."""
    rolls = spy(generate, "generate")
    train(config(lab, same, dead_groups="refill", steps=1))
    asked = [tuple(prompt) for args, _ in rolls for prompt in args[1]]
    assert len(rolls) == 4 and len(asked) == len(set(asked)) == 16


def test_a_step_that_is_full_ends_sampling(lab):
    """No group is dead in the first round: there is no second one."""
    cfg = config(lab, by_letters, dead_groups="refill", steps=2)
    out = train(cfg)
    assert [row["rounds"] for row in table(cfg)] == [1, 1] and out["dead"] == 0


def test_every_rollout_has_draws_of_its_own(lab, spy):
    """One prompt, a policy that does not move: the second step still samples other responses."""
    training = [p for p in PROMPTS if not tasks.held_out(p)]
    (lab / "one.jsonl").write_text(json.dumps({"prompt": training[0]}))
    rolls = spy(generate, "generate")
    train(config(lab, by_letters, data=f"{lab}/one.jsonl", prompts_per_step=1, steps=2, lr=1e-12))
    first, second = (roll.responses() for _, roll in rolls)
    assert first != second


def test_the_overlong_penalty_goes_by_the_limit_of_the_stage(lab, spy):
    """At a limit of 2 a response of two tokens costs 0.6; at a limit of 5 one of five does, and no other."""
    rolls, advs = spy(generate, "generate"), spy(train_grpo, "advantages")
    train(config(lab, same, steps=2, max_new_tokens=[2, 5], lengthen_at=[1], overlong_penalty=0.6))
    for limit, (_, roll), (args, _) in zip((2, 5), rolls, advs, strict=True):
        lengths = roll.response_len.tolist()
        assert args[0].tolist() == pytest.approx([0.1 - 0.6 * (n == limit) for n in lengths])
        assert len(set(lengths)) > 1


def test_the_kl_column_is_k1_of_whole_responses(lab, spy):
    """Σ_t log π/π_ref, its mean over the samples, in float64; k3 of the same samples is another number."""
    rolls = spy(generate, "generate")
    out = train(config(lab, by_letters, steps=1, ref=f"{lab}/other"))
    roll = rolls[0][1]
    p, q = (hub.load(f"{lab}/{name}")[0].double() for name in ("policy", "other"))
    log_ratio = p.logprobs(roll.tokens, roll.mask)[0] - q.logprobs(roll.tokens, roll.mask)[0]
    assert out["kl"] == pytest.approx(log_ratio.sum(1).mean().item(), rel=1e-4)
    k3 = (torch.expm1(-log_ratio) + log_ratio).sum(1).mean().item()
    assert abs(k3 - out["kl"]) > 0.05


@pytest.mark.parametrize("temperature, equal", [(1e-3, True), (1.0, False)])
def test_held_out_prompts_are_sampled_at_the_temperature(lab, temperature, equal):
    """Near 0 the sampled responses are the greedy ones, and so is their mean reward; at 1 they are not."""
    out = train(config(lab, by_letters, steps=1, eval_prompts=64, temperature=temperature, lr=1e-12))
    assert (out["eval/reward"] == pytest.approx(out["eval/greedy"])) == equal


def test_the_last_evaluation_has_the_limit_of_the_last_stage(lab, spy):
    """Held-out responses of up to 2 tokens before the first step, of up to 5 after the last."""
    rolls = spy(generate, "generate")
    flags = dict(steps=2, max_new_tokens=[2, 5], lengthen_at=[1], eval_prompts=64)
    train(config(lab, by_letters, **flags))
    longest = [int(roll.response_len.max()) for _, roll in rolls]
    assert longest == [2, 2, 2, 5, 5, 5]  # sampled and greedy; two steps; sampled and greedy


def test_minibatches_are_dealt_anew_in_every_epoch_of_every_step(lab, spy):
    """Two steps of two epochs: four orders of the 16 rows, no two of them alike."""
    taken = spy(train_grpo, "take_rows")
    train(config(lab, by_letters, steps=2, epochs=2))
    orders = [args[1].tolist() for args, _ in taken if isinstance(args[1], torch.Tensor)]
    assert [sorted(order) for order in orders] == [list(range(16))] * 4
    assert len({*map(tuple, orders)}) == 4


def test_microbatches_do_not_move_a_figure(lab):
    """One row at a time or all at once: clipped share, entropy, largest ratio and gap, all unlike 0."""
    found = []
    for budget in (0, 1):
        cfg = config(lab, by_letters, steps=1, epochs=2, lr=5e-2, tokens_per_microbatch=budget)
        out = train(cfg)
        found.append([out[name] for name in ("clip", "entropy", "ratio_max", "gnorm", "kl")])
    assert found[0][:4] == pytest.approx(found[1][:4], rel=1e-3) and min(found[0][:4]) > 1e-3


def test_the_ratio_of_the_kl_is_that_of_its_own_token():
    """With --ratio sequence too: how far the second token has moved does not weigh the first one's KL."""
    cfg = variant(ratio="sequence", kl="k3", beta=1.0)
    one, zero = torch.ones(1, 2), f64([0.0])
    slopes = []
    for moved in (0.0, 2.0):
        logp = f64([[-1.0, -1.0]]).requires_grad_()
        old_logp = f64([[-1.5, -1.0 - moved]])
        policy_loss(logp, old_logp, f64([[-0.7, -0.7]]), zero, one, one, cfg)[0].backward()
        slopes.append(logp.grad[0, 0].item())
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-12) and abs(slopes[0]) > 0.1
