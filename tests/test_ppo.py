"""PPO: pure functions against golden vectors, float64 loops, finite differences and exact enumeration; then
the update of `train` itself, whose gradient is compared with an oracle that knows neither batch nor padding.

Golden vectors were computed by running N+ (github.com/vwxyzjn/summarize_from_feedback_details), verl and
lm-human-preferences on the inputs that stand here.
"""

import csv
import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_ppo
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import RunError, UserError
from nanorlhf.kernels import torch_backend
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.rewards import score_responses
from nanorlhf.run.worker import RewardFunction, Rewards
from nanorlhf.tokenizer import Tokenizer
from train_ppo import Config, adapt_beta, gae, policy_loss, shape_rewards, train, value_loss, whiten

pytestmark = pytest.mark.usefixtures("no_curves")
NAN = float("nan")


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def close(got, want, atol=1e-6, rtol=0.0):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), atol=atol, rtol=rtol)


def slope(fn, x, h=1e-6):
    """Gradient of the scalar fn at x (float64) by central differences."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[i] = h
        step = step.view_as(x)
        out.view(-1)[i] = (fn(x + step) - fn(x - step)) / (2 * h)
    return out


def ragged(B, T, seed):
    """(B, T) mask with one block of ones per row, at any place and of any length, none included."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, T + 1, (B, 2), generator=g).sort(1).values
    place = torch.arange(T)
    return (place >= ends[:, :1]) & (place < ends[:, 1:])


# ------------------------------------------------------------------------------------------------------------
# Golden vectors


def test_golden_nplus_rollout():
    """Rewards, returns and whitened advantages of N+, from log-probs and scores, through our functions.

    N+ puts the score one slot behind EOS (where there is one) and lets GAE run that far: so its GAE mask is
    idx ≤ L+1, and only whitening sees idx ≤ L. There logp = ref_logp = 1 wherever idx > L.
    """
    L = torch.tensor([2, 4, 4, 0])
    place = torch.arange(5)
    mask, mask_p1 = place <= L[:, None], place <= L[:, None] + 1
    logp = f64([[-1, -2, -0.5, -3, -3], [-1, -1, -1, -1, -2], [-2, -1, -0.5, -0.5, -1], [-0.7] + [-2] * 4])
    gap = f64([[-0.2, 0.4, 0, 1, 1], [0.1, 0.1, -0.3, 0, 0.2], [0, 0, 0, 0, 0.5], [-0.4, 9, 9, 9, 9]])
    ref = logp + gap
    logp, ref = (torch.where(mask, x, 1.0) for x in (logp, ref))
    value = f64([[0.1, 0.2, 0.3, 0.4, 0.5], [0, 0.1, 0.2, 0.3, 0.4], [0.5] * 5, [0.2, 0.6, 0.7, 0.8, 0.9]])
    finished = torch.tensor([True, True, False, True])
    reward = shape_rewards(f64([1, 2, 3, 0.5]), logp, ref, mask_p1, finished, 0.05, -1.0)
    close(reward, f64([[-0.01, 0.02, 0, 1, 0], [0.005, 0.005, -0.015, 0, 2.01], [0, 0, 0, 0, -0.975],
                       [-0.02, 0.5, 0, 0, 0]]))  # fmt: skip
    adv, ret = gae(reward, value, mask_p1, 1.0, 0.95)
    close(ret, f64([[0.908675, 0.9565, 0.97, 1, 0], [1.678555, 1.756374, 1.833025, 1.9295, 2.01],
                    [-0.701397, -0.764628, -0.831187, -0.90125, -0.975], [0.485, 0.5, 0, 0, 0]]))  # fmt: skip
    close(whiten(adv, mask), f64([
        [0.404889, 0.364193, 0.296723, 0, 0], [1.083392, 1.066090, 1.047879, 1.045129, 1.029919],
        [-1.162958, -1.212278, -1.264194, -1.318843, -1.376367], [-0.003575, 0, 0, 0, 0],
    ]))  # fmt: skip


MASK6 = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
LOGP6 = f64([[-1, -2, -0.5, -1], [-0.7, -1.5, 0, 0]])
OLD6 = f64([[-1.2, -1.5, -0.5, -1.4], [-0.9, -1.1, 0, 0]])
SIGN6 = f64([[1.0], [-1.0]]).expand(2, 4)


def test_golden_policy_loss():
    """verl's clipped surrogate: value, clipped share, largest ratio and gradient."""
    logp = LOGP6.clone().requires_grad_()
    loss, stats = policy_loss(logp, OLD6, SIGN6, MASK6, 0.2, MASK6.sum())
    loss.backward()
    close([loss.item(), stats["clip"].item(), stats["ratio_max"].item()], [-0.330855, 0.5, 1.491825])
    close(logp.grad, f64([[0, -0.10109, -0.16667, 0], [0.20357, 0, 0, 0]]), atol=5e-6)
    close(policy_loss(LOGP6, OLD6, SIGN6, MASK6, 0.28, 6)[1]["clip"], f64(1 / 3).float())


def test_golden_value_loss():
    old = f64([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    value = f64([[0.5, 0.2, 0.3, 0.1], [0.6, 0.9, 9, 9]])
    close(value_loss(value, old, SIGN6, MASK6, 0.2, 6)[0], f64(0.716667))


def test_golden_k1_reward():
    reward = shape_rewards(torch.zeros(2), LOGP6, OLD6, MASK6, torch.ones(2), 1.0)
    close(reward, f64([[-0.2, 0.5, 0, -0.4], [-0.2, 0.4, 0, 0]]))


def test_golden_gae():
    """verl's raw advantages; whitened with N+'s biased variance, not verl's unbiased one."""
    value = f64([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    adv, ret = gae(f64([[0, 0, 0, 1], [0, -1, 0, 0]]), value, MASK6, 1.0, 0.95)
    close(adv, f64([[0.799675, 0.7365, 0.67, 0.6], [-1.42, -1.6, 0, 0]]))
    close(ret, f64([[0.899675, 0.9365, 0.97, 1.0], [-0.92, -1.0, 0, 0]]))
    white = f64([[0.798889, 0.738468, 0.674868, 0.607920], [-1.323997, -1.496148, 0, 0]])
    close(whiten(adv, MASK6), white)


def test_golden_whiten():
    """lm-human-preferences: rewards divided by their biased standard deviation, mean kept."""
    x = f64([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    want = f64([[0.050807, 0.438105, 0.825404], [1.212702, 1.6, 1.987299], [2.374597, 2.761895, 3.149194]])
    close(whiten(x, torch.ones(3, 3), shift_mean=False), want)


def test_golden_kl_and_its_gradient():
    """k1 in the reward: over a 4-way softmax its exact mean is KL(π‖ref), its policy gradient KL's own."""
    theta = f64([0.3, -0.2, 0.5, 0]).requires_grad_()
    ref = f64([0, 0.4, -0.3, 0.2]).log_softmax(0)[:, None]
    logp = theta.log_softmax(0)[:, None]  # (4, 1): four rows of one token
    ones, p = torch.ones(4, 1), logp.detach().exp()
    reward = shape_rewards(torch.zeros(4), logp.detach(), ref, ones, torch.ones(4), 1.0)
    close((p * reward).sum(), f64(-0.135969))
    policy_loss(logp, logp.detach(), p * reward, ones, 0.2, 1)[0].backward()
    close(theta.grad, f64([0.023994, -0.138407, 0.200431, -0.086017]))


# ------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize("no_eos_score", [None, -1.0, 0.0])
def test_score_stands_on_the_last_token_alone(no_eos_score):
    """Without KL the reward is the score, on the last sampled token; a row that never ended gets its own."""
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    finished = torch.tensor([True, True, False, True])
    x = torch.full((4, 5), -1.5)
    reward = shape_rewards(torch.tensor([7.0, 5.0, 3.0, 2.0]), x, x, mask, finished, 0.5, no_eos_score)
    want = torch.zeros(4, 5)
    want[0, 3], want[1, 2], want[2, 4], want[3, 4] = 7, 5, 3 if no_eos_score is None else no_eos_score, 2
    close(reward, want, atol=0)


def test_reward_sums_to_score_less_kl():
    """A row's rewards sum to score − β Σ k1: a token likelier than under the reference costs (loops)."""
    torch.manual_seed(0)
    mask = ragged(20, 7, seed=1)
    logp, ref = -torch.rand(2, 20, 7, dtype=torch.float64)
    score = torch.randn(20, dtype=torch.float64)
    poisoned = [torch.where(mask, x, NAN) for x in (logp, ref)]
    reward = shape_rewards(score, *poisoned, mask, torch.ones(20).bool(), 0.3)
    for b in range(20):
        inside = mask[b].nonzero().flatten().tolist()
        want = sum(-0.3 * (logp[b, t] - ref[b, t]).item() for t in inside) + score[b].item() * bool(inside)
        assert reward[b].sum().item() == pytest.approx(want)
        for t in inside[:-1]:
            assert (reward[b, t] < 0) == (logp[b, t] > ref[b, t])


@pytest.mark.parametrize("kl, samples, want", [
    (6.0, 512, 0.15),  # on target
    (6.6, 512, 0.150768),  # error 0.1
    (12.0, 512, 0.151536),  # error clipped to 0.2
    (0.0, 512, 0.148464),  # and to −0.2
    (-1.0, 10000, 0.12),  # k1 may be negative on a sample
])  # fmt: skip
def test_adaptive_beta(kl, samples, want, monkeypatch):
    """The controller of lm-human-preferences with its sentiment numbers: β 0.15, target 6, horizon 10000."""
    monkeypatch.setattr(train_ppo, "KL_HORIZON", 10000)
    cfg = SimpleNamespace(kl_target=6.0)
    assert adapt_beta(0.15, kl, cfg, samples) == pytest.approx(want, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Advantages

unit = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def gae_oracle(reward, value, gamma, lam):
    """One row, its sampled tokens only: A_t = Σ_k (γλ)^k δ_{t+k} as a double sum over lists of floats."""
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 8), gamma=unit, lam=unit, seed=st.integers(0, 9999))
def test_gae_is_the_double_sum(B, T, gamma, lam, seed):
    """Any ragged mask, in float64; NaN outside the mask is not read, and both results are 0 there."""
    mask = ragged(B, T, seed)
    reward, value = torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    adv, ret = gae(*(torch.where(mask, x, NAN) for x in (reward, value)), mask, gamma, lam)
    assert not adv[~mask].any() and not ret[~mask].any()
    for b in range(B):
        want = gae_oracle(reward[b][mask[b]].tolist(), value[b][mask[b]].tolist(), gamma, lam)
        close(adv[b][mask[b]], f64(want), atol=1e-12)
        close(ret[b][mask[b]], f64(want) + value[b][mask[b]], atol=1e-12)


def test_gae_undiscounted_is_reward_to_go_less_value():
    """γ = λ = 1 telescopes: the return is what is still to come, whatever the critic says."""
    reward, value = f64([[9, 1, 2, 4, 9]]), f64([[9, 10, -20, 30, 9]])
    adv, ret = gae(reward, value, torch.tensor([[0, 1, 1, 1, 0]]), 1.0, 1.0)
    close(ret, f64([[0, 7, 6, 4, 0]]), atol=1e-12)
    close(adv, f64([[0, -3, 26, -26, 0]]), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 8), shift=st.booleans(), seed=st.integers(0, 9999))
def test_whiten_is_numpy(B, T, shift, seed):
    """numpy's biased mean and std over the masked entries only: NaN outside is not read, and becomes 0."""
    mask = ragged(B, T, seed)
    x = 3 + 2 * torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = whiten(torch.where(mask, x, NAN), mask, shift)
    assert not got[~mask].any()
    if mask.any():
        inside = x[mask].numpy()
        want = (inside - inside.mean()) / np.sqrt(inside.var(ddof=0) + 1e-8)
        close(got[mask], torch.from_numpy(want + (0 if shift else inside.mean())), atol=1e-9)


@pytest.mark.parametrize("x, shift_mean, want", [(2.5, True, 0.0), (2.5, False, 2.5), (0.1, True, 0.0)])
def test_whiten_of_equal_numbers(x, shift_mean, want):
    """No variance: finite, zeros (up to rounding), and the mean stays where it is asked to."""
    x, mask = torch.full((2, 3), x), torch.tensor([[0, 1, 1], [1, 0, 0]])
    close(whiten(x, mask, shift_mean), want * mask, atol=1e-3)
    close(whiten(x, 0 * mask, shift_mean), torch.zeros(2, 3), atol=0)


# ------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("ratio, adv, loss, grad, clipped", [
    (1.5, 1.0, -1.2, 0.0, 1.0),  # raised enough
    (1.5, -1.0, 1.5, 1.5, 0.0),  # raised although bad: the full pull back
    (0.5, 1.0, -0.5, -0.5, 0.0),  # lowered although good
    (0.5, -1.0, 0.8, 0.0, 1.0),  # lowered enough
    (1.1, 2.0, -2.2, -2.2, 0.0),  # inside the band nothing is clipped
    (0.9, -2.0, 1.8, 1.8, 0.0),
    (1.5, 0.0, 0.0, 0.0, 0.0),
])  # fmt: skip
def test_policy_loss_branches(ratio, adv, loss, grad, clipped):
    """Every branch of the clip: loss, dloss/dlogp (= finite differences), clipped share, largest ratio."""
    logp = f64([[math.log(ratio) - 1, 0.0]]).requires_grad_()
    mask = torch.tensor([[1, 0]])  # a pad counts in none of them

    def fn(x):
        return policy_loss(x, f64([[-1.0, 0.0]]), f64([[adv, -3.0]]), mask, 0.2, 1)

    got, stats = fn(logp)
    got.backward()
    close([got.item(), stats["clip"].item(), stats["ratio_max"].item()], [loss, clipped, ratio])
    close(logp.grad, f64([[grad, 0.0]]), atol=1e-9)
    close(slope(lambda x: fn(x)[0], logp.detach()), f64([[grad, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("value, ret, loss, grad, clipped", [
    (0.5, 1.0, 0.32, 0.0, 1.0),  # moved further towards the return than allowed: ½·0.8², and no pull
    (0.5, 0.0, 0.125, 0.5, 0.0),  # moved away: the full pull back
    (0.1, 1.0, 0.405, -0.9, 0.0),  # within ±clip both are the same
    (-0.5, -1.0, 0.32, 0.0, 1.0),
    (-0.5, 1.0, 1.125, -1.5, 0.0),
])  # fmt: skip
def test_value_loss_branches(value, ret, loss, grad, clipped):
    """The larger of the two errors, ε_v = 0.2 around an old value of 0: loss, gradient, clipped share."""
    x = f64([[value]]).requires_grad_()

    def fn(x):
        return value_loss(x, f64([[0.0]]), f64([[ret]]), torch.ones(1, 1), 0.2, 1)

    got, stats = fn(x)
    got.backward()
    close([got.item(), stats["value_clip"].item()], [loss, clipped])
    close(x.grad, f64([[grad]]), atol=1e-9)
    close(slope(lambda x: fn(x)[0], x.detach()), f64([[grad]]), atol=1e-6)


def test_losses_read_the_mask_and_the_denominator():
    """What stands outside the mask moves neither loss nor gradient; the denominator is the one handed in."""
    torch.manual_seed(0)
    mask = ragged(4, 6, seed=2)
    x, old, target = torch.randn(3, 4, 6, dtype=torch.float64)
    for fn in (policy_loss, value_loss):
        results = []
        for junk in (0.0, 1e3):
            args = [torch.where(mask, y, junk * torch.randn(4, 6)) for y in (x, old, target)]
            leaf = args[0].requires_grad_()
            loss, _ = fn(leaf, *args[1:], mask, 0.2, 7)
            loss.backward()
            assert not leaf.grad[~mask].any()
            results.append((loss.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        rows = [fn(*row, 0.2, 1)[0] for row in zip(x[:, None], old[:, None], target[:, None], mask[:, None])]
        close(results[0][0], sum(rows) / 7, atol=1e-12)


@pytest.mark.parametrize("gap", [1e4, -1e4, 90.0, -90.0])
def test_hopeless_ratios_stay_finite(gap):
    """A log-ratio far beyond exp's range: loss, gradient and the logged ratio are finite in fp32."""
    logp = torch.full((1, 2), gap).requires_grad_()
    loss, stats = policy_loss(logp, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 0.2, 2)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, logp.grad, stats["ratio_max"]))


def test_the_estimator_is_unbiased():
    """shape_rewards → gae → policy_loss, its exact mean over all sequences: −∇(E[score] − β KL(π‖ref)).

    Two steps over {a, b, EOS}, so sequences of length 1 and 2; γ = λ = 1; the critic may say anything,
    as long as it is said before the token. The objective itself is differentiated numerically.
    """
    torch.manual_seed(0)
    EOS, beta = 2, 0.7
    sequences = [(EOS,)] + list(product((0, 1), range(3)))
    theta, ref_theta, value_table = torch.randn(3, 3, 3, dtype=torch.float64)
    score = torch.randn(len(sequences), dtype=torch.float64)

    def logps(table):  # the first token has row 2, the second the row of the first: a bigram model
        table = table.log_softmax(-1)
        rows = [[table[a, b] for a, b in zip((EOS, *y), y)] for y in sequences]
        return torch.stack([torch.stack(r + [table.new_zeros(())] * (2 - len(r))) for r in rows])  # (7, 2)

    def objective(table):
        logp, ref = logps(table).sum(1), logps(ref_theta).sum(1)
        return (logp.exp() * (score - beta * (logp - ref))).sum()

    mask = torch.tensor([[1, len(y) - 1] for y in sequences])
    value = torch.stack([value_table[0, 0] + 0 * score, value_table[1][[y[0] for y in sequences]]], 1)
    leaf = theta.clone().requires_grad_()
    logp = logps(leaf)
    old, p = logp.detach(), logp.detach().sum(1).exp()
    close(p.sum(), f64(1.0), atol=1e-12)
    finished = torch.tensor([y[-1] == EOS for y in sequences])
    reward = shape_rewards(score, old, logps(ref_theta), mask, finished, beta, no_eos_score=None)
    adv, _ = gae(reward, value, mask, 1.0, 1.0)
    policy_loss(logp, old, p[:, None] * adv, mask, 0.2, 1)[0].backward()
    close(leaf.grad, -slope(objective, theta), atol=1e-8)


# ------------------------------------------------------------------------------------------------------------
# The update. Tiny models in folders; spies on what `train` calls

TOK = Tokenizer.from_chars("abcd=")
PROMPTS = ["".join(p) + "=" for n in (1, 2, 3) for p in product("abcd", repeat=n)]


def by_letters(prompt, response, row):
    """A reward that depends on prompt, response and length."""
    return 0.3 * len(response) + response.count(prompt[0]) - 0.5 * response.count(prompt[-2])


def by_prompt(prompt, response):
    return 1.0 if prompt[0] in "ab" else -1.0


def nothing(prompt, response):
    return 0.0


def broken(prompt, response):
    raise KeyError("lost")


def not_a_number(prompt, response):
    return NAN


def reward_of(fn):
    return f"{__file__}:{fn.__name__}"


def gpt(seed, tok=TOK, **kw):
    torch.manual_seed(seed)
    return GPT(GPTConfig.gpt2(tok.vocab_size, **{**dict(n_layer=1, n_head=2, d_model=16, max_len=16), **kw}))


@pytest.fixture
def lab(tmp_path):
    """Folders of a policy, another language model, a reward model; prompts of unequal length."""
    hub.save(gpt(0), TOK, f"{tmp_path}/policy")
    hub.save(gpt(1), TOK, f"{tmp_path}/other")
    rm = ScalarModel(gpt(2))
    rm.reward_bias += 0.2
    hub.save(rm, TOK, f"{tmp_path}/rm")
    lines = [json.dumps({"prompt": p}) + "\n" for p in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    return tmp_path


def config(lab, **kw):
    defaults = dict(
        data=f"{lab}/prompts.jsonl", init=f"{lab}/policy", out=f"{lab}/run", overwrite=True, steps=1,
        prompts_per_step=8, group_size=2, max_new_tokens=5, minibatches=1, lr=1e-3, critic_lr=1e-3, beta=0.3,
        eval_prompts=0, sample_every=1, save_every=0, reward_timeout=0,
    )  # fmt: skip
    if "rm" not in kw:
        defaults["reward"] = [reward_of(by_letters)]
    return Config(**{**defaults, **kw})


def table(out):
    with open(f"{out}/metrics.csv") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def weights(folder):
    return dict(hub.load(folder)[0].named_parameters())


def same(a, b, atol, rtol=0.0):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=rtol, check_dtype=False)


def step_oracle(cfg, roll):
    """PPO's first optimizer step → gradients of policy and critic, figures of the log line.

    In float64, one unpadded row at a time. Everything is read off the sampled ids: a response ends with its
    first EOS or after max_new_tokens. Only the models' trunks are shared with the trainer.
    """
    policy, ref, critic = (hub.load(f)[0].double() for f in (cfg.init, cfg.ref, cfg.critic_init))
    rows, k1, entropy = [], [], []
    for ids, P in zip(roll.tokens.tolist(), roll.prompt_len.tolist()):
        response = ids[P : P + cfg.max_new_tokens]
        finished = TOK.eos_id in response
        if finished:
            response = response[: response.index(TOK.eos_id) + 1]
        ids = torch.tensor([ids[:P] + response])
        where, target = slice(P - 1, P - 1 + len(response)), torch.tensor(response)[:, None]
        table, ref_table = (
            torch.log_softmax(model(ids)[0, where] @ model.wte.weight.T / cfg.temperature, -1)
            for model in (policy, ref)
        )
        logp, ref_logp = (x.gather(1, target).squeeze(1) for x in (table, ref_table))
        k1.append((logp - ref_logp).sum().item())
        entropy += [-sum(math.exp(x) * x for x in position) for position in table.tolist()]
        value = critic.trunk(ids)[0, where] @ critic.score.weight[0] + critic.reward_bias
        if cfg.rm:
            rm = hub.load(cfg.rm)[0].double()
            score = (rm.trunk(ids)[0, -1] @ rm.score.weight[0] + rm.reward_bias).item()
        else:
            text = TOK.decode(response[:-1] if finished else response)
            score = by_letters(TOK.decode(ids[0, :P].tolist()), text, {})
        reward = [-cfg.beta * (a - b) for a, b in zip(logp.tolist(), ref_logp.tolist())]
        reward[-1] += score if finished else cfg.no_eos_score
        rows.append((logp, value, reward))
    if cfg.whiten_rewards:
        every = np.concatenate([r for _, _, r in rows])
        mean, std = every.mean(), np.sqrt(every.var() + 1e-8)
        rows = [(logp, value, [(x - mean) / std + mean for x in r]) for logp, value, r in rows]
    adv = [gae_oracle(r, value.tolist(), cfg.gamma, cfg.lam) for _, value, r in rows]
    ret = [f64(a) + value.detach() for a, (_, value, _) in zip(adv, rows)]
    every = np.concatenate(adv)
    white = [(f64(a) - every.mean()) / np.sqrt(every.var() + 1e-8) for a in adv]
    N = len(every)
    pg = -sum((a * logp).sum() for a, (logp, _, _) in zip(white, rows)) / N  # its gradient at ratio 1
    vf = sum((value - r).square().sum() for r, (_, value, _) in zip(ret, rows)) / (2 * N)
    figures = {"kl": np.mean(k1), "entropy": np.mean(entropy), "len": N / len(rows), "value_loss": vf.item(),
               "explained_var": 1 - every.var() / torch.cat(ret).numpy().var()}  # fmt: skip
    return (torch.autograd.grad(pg, list(policy.parameters())),
            torch.autograd.grad(train_ppo.VF_COEF * vf, list(critic.parameters())), figures)  # fmt: skip


@pytest.mark.parametrize("kw", [
    dict(rm="rm", critic_init=""),
    dict(critic_init="rm", temperature=0.7, gamma=0.9, tokens_per_microbatch=20),
    dict(critic_init="rm", temperature=1.3, whiten_rewards=True),
], ids=["reward model", "function", "whitened rewards"])  # fmt: skip
def test_first_gradient_is_the_oracle(lab, spy, gradients, kw):
    """The whole step at once: rollout, KL to another model, score, GAE, whitening, both losses."""
    kw = {k: f"{lab}/{v}" if v == "rm" else v for k, v in kw.items()}
    rolls = spy(generate, "generate")
    cfg = config(lab, ref=f"{lab}/other", **kw)
    out = train(cfg)
    (_, roll), (policy, critic) = rolls[0], gradients
    assert 0 < roll.finished.float().mean() < 1 and len(set(roll.response_len.tolist())) > 2
    want_policy, want_critic, figures = step_oracle(cfg, roll)
    assert all(g.abs().max() > 1e-4 for g in (want_policy[0], want_critic[0]))
    same(policy, want_policy, atol=2e-6, rtol=1e-4)
    same(critic, want_critic, atol=2e-6, rtol=1e-4)
    assert {k: out[k] for k in figures} == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_minibatch_has_ratio_1_and_kl_0(lab, spy, temperature):
    """Sampler and update score alike: log-probs equal to 1e-5 in the first minibatch, KL to the start 0."""
    calls = spy(train_ppo, "policy_loss")
    out = train(config(lab, temperature=temperature, minibatches=4))
    (logp, old_logp, _, mask, *_), _ = calls[0]
    assert mask.any() and old_logp[mask].std() > 0.1
    close(logp.detach(), old_logp, atol=1e-5)
    assert abs(out["kl"]) < 1e-5
    assert out["ratio_max"] > 1 + 1e-4, "later minibatches have moved away"
    assert out["gap"] == (logp - old_logp).abs().max().item() < 1e-5, "the first minibatch, and no later one"


def test_old_logp_is_the_samplers(lab, spy, monkeypatch):
    """Were it recomputed, ratio = 1 would hold by construction: so a sampler that lies by 0.1 must show."""
    real = generate.generate

    def liar(*args, **kw):
        roll = real(*args, **kw)
        roll.logp += 0.1 * roll.mask
        return roll

    monkeypatch.setattr(generate, "generate", liar)
    calls = spy(train_ppo, "policy_loss")
    out = train(config(lab))
    (logp, old_logp, _, mask, *_), _ = calls[0]
    close((logp - old_logp)[mask].detach(), torch.full((int(mask.sum()),), -0.1), atol=1e-5)
    assert out["gap"] == pytest.approx(0.1, abs=1e-5)


def test_every_row_is_in_one_minibatch_and_its_own(lab, spy, monkeypatch):
    """Each epoch deals all rows out anew, each once, with the tensors of one row staying together."""
    rolls, returns, whites = spy(generate, "generate"), spy(train_ppo, "gae"), spy(train_ppo, "whiten")
    policy, critic = spy(train_ppo, "policy_loss"), spy(train_ppo, "value_loss")
    monkeypatch.setattr(train_ppo, "VALUE_CLIP", 0.3)
    train(config(lab, epochs=2, minibatches=3, lr=1e-12, critic_lr=1e-12, clip=0.1))
    roll, adv, ((_, old_value, *_), (_, ret)) = rolls[0][1], whites[0][1], returns[0]

    def rows(*columns):  # each row as one tuple; a micro-batch may be narrower than the rollout
        wide = [torch.nn.functional.pad(c, (0, adv.shape[1] - c.shape[1])) for c in columns]
        return [tuple(row) for row in torch.cat(wide, 1).tolist()]

    want = sorted(rows(roll.logp, adv, roll.mask.float(), old_value, ret))
    assert len(policy) == len(critic) == 6
    orders = []
    for epoch in range(2):
        part = slice(3 * epoch, 3 * epoch + 3)
        dealt = []
        for (p, _), (v, _) in zip(policy[part], critic[part], strict=True):
            _, old_logp, adv_of, mask, clip, denom = p
            dealt += rows(old_logp, adv_of, mask.float(), v[1], v[2])
            assert denom == v[5] == mask.sum() and (clip, v[4]) == (0.1, 0.3)
        assert sorted(dealt) == want
        orders.append(dealt)
    assert orders[0] != orders[1]


def test_advantages_can_stay_as_they_are(lab, spy):
    """--whiten_advantages false: the loss gets those of GAE; by default it does not."""
    for raw in (True, False):
        returns, losses = spy(train_ppo, "gae"), spy(train_ppo, "policy_loss")
        train(config(lab, whiten_advantages=not raw, tokens_per_microbatch=0))
        same = torch.equal(losses[0][0][2].sort(0).values, returns[0][1][0].sort(0).values)
        assert same == raw


def test_microbatches_do_not_move_the_step(lab, gradients):
    """All at once, 64 padded tokens or one row at a time: the same gradients, and the same weights after."""
    results = []
    for budget in (0, 64, 1):
        gradients.clear()
        train(config(lab, steps=2, epochs=2, minibatches=2, tokens_per_microbatch=budget))
        after = [*weights(f"{lab}/run/model").values(), *weights(f"{lab}/run/critic").values()]
        results.append([g for call in gradients for g in call] + after)
    assert len(gradients) == 2 * 8, "policy and critic at each of 8 optimizer steps"
    for other in results[1:]:
        same(results[0], other, atol=1e-6)


def test_chunks_do_not_move_a_figure(lab, monkeypatch):
    """The loss is computed for all tokens at once, or for one after the other: what is logged is the same."""
    results = []
    for stored in (torch_backend.STORED, 1):
        monkeypatch.setattr(torch_backend, "STORED", stored)
        results.append(train(config(lab, epochs=2, minibatches=2, lr=1e-2, device="cpu")))
    assert results[0]["clip"] > 0
    for name in ("clip", "ratio_max", "entropy", "gnorm"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4), name


def test_gradients_do_not_accumulate_over_steps(lab, gradients):
    """At a vanishing learning rate the second epoch has the first one's gradient, not a sum."""
    train(config(lab, epochs=3, lr=1e-12, critic_lr=1e-12))
    for later in (2, 4):
        same(gradients[0], gradients[later], atol=1e-6)
        same(gradients[1], gradients[later + 1], atol=1e-6)


def test_padding_has_no_influence(lab):
    """Four more columns, and other ids at every pad: loss and all gradients stay as they are."""
    policy, critic = hub.load(f"{lab}/policy")[0], hub.load(f"{lab}/rm")[0]
    (roll,), _ = generate.respond(policy, TOK, PROMPTS[:24], 1, max_new_tokens=5)
    adv, results = torch.randn(roll.logp.shape), []
    for extra, seed in ((0, None), (4, 0)):
        wide = [torch.nn.functional.pad(x, (0, extra)) for x in (roll.tokens, roll.mask, roll.logp, adv)]
        tokens, mask, old_logp, a = wide
        if seed is not None:
            pads = torch.arange(tokens.shape[1]) >= roll.lengths[:, None]
            tokens = torch.where(pads, torch.randint(TOK.vocab_size, tokens.shape), tokens)
        logp, _ = policy.logprobs(tokens, mask)
        pg, _ = policy_loss(logp, old_logp, a, mask, 0.2, mask.sum())
        vf, _ = value_loss(critic.values(tokens, mask), 0 * a, a, mask, 0.2, mask.sum())
        gradient = torch.autograd.grad(pg + vf, [*policy.parameters(), *critic.parameters()])
        results.append([pg, vf, *gradient])
    assert roll.lengths.min() < roll.lengths.max()
    same(*results, atol=1e-6)


def test_eos_is_scored_and_the_prompt_is_not(lab):
    """dloss/dlogp: −adv/N on every sampled token with EOS among them; 0 on prompt and pad."""
    policy = hub.load(f"{lab}/policy")[0]
    (roll,), _ = generate.respond(policy, TOK, PROMPTS[:20], 1, max_new_tokens=5)
    logp, _ = policy.logprobs(roll.tokens, roll.mask)
    logp.retain_grad()
    policy_loss(logp, roll.logp, torch.ones_like(logp), roll.mask, 0.2, 1)[0].backward()
    scored = 0
    for b, (ids, P) in enumerate(zip(roll.tokens.tolist(), roll.prompt_len.tolist())):
        response = ids[P : P + 5]
        n = response.index(TOK.eos_id) + 1 if TOK.eos_id in response else 5
        scored += TOK.eos_id in response
        close(logp.grad[b], f64([0.0] * P + [-1.0] * n + [0.0] * (len(ids) - P - n)).float(), atol=1e-5)
    assert 0 < scored < 20


def test_only_policy_and_critic_learn(lab, spy):
    """Reference and reward model get no gradient and end as they began; the critic is its own copy."""
    models = spy(train_ppo, "load_models_and_critic")
    train(config(lab, rm=f"{lab}/rm", steps=2))
    policy, ref, critic, rm, _ = models[0][1]
    assert critic is not rm
    for model, folder, learns in ((policy, "policy", True), (ref, "policy", False), (critic, "rm", True),
                                  (rm, "rm", False)):  # fmt: skip
        before = hub.load(f"{lab}/{folder}")[0].state_dict()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) != learns
        assert all((p.grad is not None) == learns for p in model.parameters())


def test_the_critic_learns(lab, monkeypatch):
    """A frozen policy, a reward known from the prompt: value loss falls, most variance is explained."""
    cfg = config(lab, reward=[reward_of(by_prompt)], max_new_tokens=3, beta=0.0, lam=1.0, steps=40, lr=1e-12,
                 critic_lr=2e-2)  # fmt: skip
    monkeypatch.setattr(train_ppo, "VF_COEF", 1.0)
    monkeypatch.setattr(train_ppo, "VALUE_CLIP", 10.0)
    cfg.no_eos_score = None  # whether a row ends is not known from the prompt
    train(cfg)
    rows = table(cfg.out)
    assert abs(rows[0]["explained_var"]) < 1e-5, "the critic of a policy starts at 0 everywhere"
    late = rows[-5:]
    assert sum(r["explained_var"] for r in late) / 5 > 0.8
    assert sum(r["value_loss"] for r in late) / 5 < rows[0]["value_loss"] / 4


def test_gold_is_never_read(tmp_path, monkeypatch):
    """PPO on reviews with the hidden judge replaced by one that raises."""

    def never(*args, **kw):
        raise AssertionError("gold was read")

    for name in ("gold", "gold_parts", "prefer"):
        monkeypatch.setattr(tasks, name, never)
    demos = tasks.get("reviews").demonstrations(100, 0)
    tok = Tokenizer.train_bpe([r["prompt"] + r["response"] for r in demos], 300)
    hub.save(gpt(0, tok, max_len=128), tok, f"{tmp_path}/policy")
    hub.save(ScalarModel(gpt(1, tok, max_len=128)), tok, f"{tmp_path}/rm")
    out = train(Config(init=f"{tmp_path}/policy", rm=f"{tmp_path}/rm", out=f"{tmp_path}/run", steps=2,
                       prompts_per_step=8, max_new_tokens=8, eval_prompts=8))  # fmt: skip
    assert math.isfinite(out["eval/reward"]) and len(table(f"{tmp_path}/run")) == 2


def test_training_is_deterministic(lab):
    """Same seed, same CSV but for the clock; another seed, another CSV."""

    def figures(**kw):
        cfg = config(lab, steps=3, epochs=2, minibatches=2, eval_prompts=8, **kw)
        train(cfg)
        return [{k: v for k, v in row.items() if k not in ("s", "tok_s")} for row in table(cfg.out)]

    first = figures()
    assert figures() == first != figures(seed=1)


def test_every_step_samples_afresh(lab):
    """One prompt, a frozen policy: other samples in the second step."""
    Path(f"{lab}/one.jsonl").write_text(json.dumps({"prompt": "abc="}))
    cfg = config(lab, data=f"{lab}/one.jsonl", steps=2, lr=1e-12)
    train(cfg)
    with open(f"{cfg.out}/samples.jsonl") as f:
        responses = [json.loads(line)["response"] for line in f]
    assert responses[:16] != responses[16:]


def test_log_line_is_what_happened(lab, monkeypatch):
    """reward, stop, dead from samples.jsonl; the learning rate falls linearly; β follows its controller."""
    monkeypatch.setattr(train_ppo, "KL_HORIZON", 32)
    cfg = config(lab, steps=2, prompts_per_step=16, max_new_tokens=2, kl_target=6.0)
    train(cfg)
    with open(f"{cfg.out}/samples.jsonl") as f:
        samples = [json.loads(line) for line in f]
    rows = table(cfg.out)
    for row in rows:
        of_step = [s for s in samples if s["step"] == row["step"]]
        score = [s["reward"] for s in of_step]
        assert [s["prompt"] for s in of_step[::2]] == [s["prompt"] for s in of_step[1::2]]
        assert score == [round(by_letters(s["prompt"], s["response"], {}), 4) for s in of_step]
        assert row["reward"] == pytest.approx(np.mean(score), abs=1e-4)
        of_prompts = np.reshape(score, (16, 2)).mean(1)  # two samples of one prompt are not independent
        assert row["reward_se"] == pytest.approx(np.std(of_prompts, ddof=1) / 16**0.5, abs=1e-4)
        assert row["dead"] == np.mean([a == b for a, b in zip(score[::2], score[1::2])])
        assert 0 < row["dead"] < 1 and row["stop"] >= np.mean([len(s["response"]) < 2 for s in of_step])
    assert [r["lr"] for r in rows] == pytest.approx([1e-3, 5e-4])
    assert [r["beta"] for r in rows] == pytest.approx([0.3, 0.3 * 0.8])  # KL 0: down by 0.2·32/32


def test_rewards_are_summed_with_their_weights(lab):
    (roll,), _ = generate.respond(gpt(0), TOK, PROMPTS[:2], 1, max_new_tokens=5)
    rewards = Rewards(
        [
            RewardFunction("a", 1.0, lambda p, text, row: len(text)),
            RewardFunction("b", -0.5, lambda p, text, row: row["x"]),
        ]
    )
    roll.rows = [{"prompt": "p", "x": 4.0}, {"prompt": "q", "x": 2.0}]
    roll.texts = ["abc", ""]
    close(score_responses(roll, None, rewards), torch.tensor([1.0, -1.0]))


# ------------------------------------------------------------------------------------------------------------
# Odd batches go on; mistakes are named


def test_equal_rewards_leave_the_policy_alone(lab):
    """No reward, no KL, a critic at 0: every advantage is exactly 0, and so is the update."""
    cfg = config(lab, reward=[reward_of(nothing)], beta=0.0, steps=2, no_eos_score=0.0)
    out = train(cfg)
    assert out["dead"] == 1 and all(math.isfinite(v) for v in out.values())
    after = weights(f"{cfg.out}/model")
    assert all(torch.equal(p, after[k]) for k, p in weights(cfg.init).items())


def test_empty_responses_go_on(lab):
    """A policy that ends at once: one scored token a row, EOS; the reward function gets ""."""
    model = gpt(0)
    with torch.no_grad():
        model.norm.weight.zero_()  # hidden states are then the norm's bias, whatever was read
        model.norm.bias.copy_(20 * model.wte.weight[TOK.eos_id])
    hub.save(model, TOK, f"{lab}/ends")
    cfg = config(lab, init=f"{lab}/ends", steps=2)
    out = train(cfg)
    assert out["len"] == out["stop"] == 1 and all(math.isfinite(v) for v in out.values())
    with open(f"{cfg.out}/samples.jsonl") as f:
        assert {json.loads(line)["response"] for line in f} == {""}


@pytest.mark.parametrize("fn, words", [(broken, ["broken raised KeyError", "lost"]),
                                       (not_a_number, ["not_a_number returned nan"])])  # fmt: skip
def test_a_failing_reward_names_the_sample(lab, fn, words):
    with pytest.raises(RunError) as e:
        train(config(lab, reward=[reward_of(fn)]))
    assert all(w in str(e.value) for w in [*words, "(prompt '", "response '"])


def test_prompts_without_room_are_dropped(lab, capsys):
    long = ["abc" * 4 + "=", "dd" * 10 + "="]
    rows = [json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:9] + long]
    Path(f"{lab}/long.jsonl").write_text("".join(rows))
    train(config(lab, data=f"{lab}/long.jsonl"))
    assert "2 of 11 prompts are longer than 11 tokens" in capsys.readouterr().out


OTHER = Tokenizer.from_chars("dcba=")


@pytest.mark.parametrize("kw, words", [
    (dict(init="missing/model"), ["--init missing/model does not exist"]),
    (dict(rm="missing/model"), ["--rm missing/model does not exist"]),
    (dict(ref="missing"), ["--ref missing does not exist"]),
    (dict(rm="@alien"), ["--rm", "vocabulary"]),
    (dict(rm="@other"), ["--rm", "must be a reward model"]),
    (dict(init="@rm"), ["--init", "must be a language model"]),
    (dict(max_new_tokens=15), ["no training prompt is left", "context of 16"]),
    (dict(rm="@rm", reward=["x.py:f"]), ["--rm and --reward"]),
    (dict(minibatches=17), ["--minibatches 17", "16 samples"]),
    (dict(temperature=0.0), ["--temperature 0.0"]),
])  # fmt: skip
def test_mistakes_are_named(lab, kw, words):
    hub.save(ScalarModel(gpt(3)), OTHER, f"{lab}/alien")
    kw = {k: f"{lab}/{v[1:]}" if str(v).startswith("@") else v for k, v in kw.items()}
    with pytest.raises(UserError) as e:
        train(config(lab, **kw))
    assert all(w in str(e.value) for w in words), e.value
    assert "\n" not in str(e.value)


def test_chain_refuses_a_policy_that_cannot_think(tmp_path):
    """RL selects modes, it does not make them: before SFT's phase transition there is nothing to select."""
    tok = Tokenizer.from_chars(tasks.get("chain").alphabet)
    hub.save(gpt(0, tok, max_len=32), tok, f"{tmp_path}/policy")
    with pytest.raises(UserError, match="has not passed SFT's phase transition"):
        train(Config(task="chain", init=f"{tmp_path}/policy", out=f"{tmp_path}/run", eval_prompts=32))
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ------------------------------------------------------------------------------------------------------------
# What a run of several epochs and steps does, where a single update would look the same


def test_old_logp_stays_in_every_epoch(lab, spy):
    """The policy moves away from the sampler, and the ratio goes on being taken to the sampler."""
    rolls, losses = spy(generate, "generate"), spy(train_ppo, "policy_loss")
    train(config(lab, epochs=3, lr=1e-2, tokens_per_microbatch=0))
    want = sorted(rolls[0][1].logp.sum(1).tolist())
    assert len(losses) == 3
    for (_, old_logp, *_), _ in losses:
        assert sorted(old_logp.sum(1).tolist()) == pytest.approx(want, abs=1e-6)
    (logp, old_logp, *_), _ = losses[2]
    assert (logp - old_logp).abs().max() > 1e-2


def test_beta_follows_the_kl_of_whole_responses(lab):
    """A target of nine tenths of the KL per response: beta rises by a ninth · samples / 1000. Per token
    the same KL is below the target, and beta would fall."""
    flags = dict(ref=f"{lab}/other", lr=1e-12, critic_lr=1e-12)
    out = train(config(lab, **flags))
    assert out["len"] > 1.5 and out["kl"] > 0.1
    cfg = config(lab, steps=2, kl_target=0.9 * out["kl"], **flags)
    train(cfg)
    betas = [row["beta"] for row in table(cfg.out)]
    assert betas == pytest.approx([0.3, 0.3 * (1 + 1 / 9 * 16 / 1000)], rel=1e-5)


@pytest.mark.parametrize("temperature, equal", [(1e-3, True), (1.0, False)])
def test_held_out_prompts_are_sampled_at_the_temperature(lab, temperature, equal):
    """Near 0 the sampled responses are the greedy ones, and so is their mean reward; at 1 they are not."""
    out = train(config(lab, eval_prompts=64, temperature=temperature, lr=1e-12))
    assert (out["eval/reward"] == pytest.approx(out["eval/greedy"])) == equal


def test_minibatches_are_dealt_anew_in_every_epoch_of_every_step(lab, spy):
    """Two steps of two epochs: four orders of the 16 rows, no two of them alike."""
    taken = spy(train_ppo, "take_rows")
    train(config(lab, steps=2, epochs=2))
    orders = [args[1].tolist() for args, _ in taken if isinstance(args[1], torch.Tensor)]
    assert [sorted(order) for order in orders] == [list(range(16))] * 4
    assert len({*map(tuple, orders)}) == 4
