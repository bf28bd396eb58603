"""linear_logprob, linear_kl and linear_jsd against float64 oracles, finite differences, torch.log_softmax."""

import math
from unittest import mock

import pytest
import torch
from helpers import Watch, close, differentiate, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.kernels import linear_jsd, linear_kl, linear_logprob, reference, torch_backend

INF = float("inf")


sizes = dict(
    N=st.integers(0, 9),
    V=st.integers(1, 40),
    chunk=st.sampled_from([1, 7, 16, 33, 64, 1 << 21]),
    temperature=st.floats(0.3, 2.0),
    std=st.floats(1.0, 100.0),
    seed=st.integers(0, 999),
)


@settings(max_examples=80, deadline=None)
@given(**sizes, with_bias=st.booleans())
def test_logprob_is_the_oracle_float64(N, V, chunk, temperature, std, seed, with_bias):
    """Values and gradients in float64, for any shape on either side of a chunk, N = 0 included."""
    hidden, weight, targets, bias = operands(N, V, seed=seed, std=std)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    with mock.patch.object(torch_backend, "TILE", chunk):
        got = differentiate(lambda h, w, b=None: linear_logprob(h, w, targets, temperature, b), inputs)
    want = differentiate(lambda h, w, b=None: reference.linear_logprob(h, w, targets, temperature, b), inputs)
    for a, b in zip(got, want):
        close(a, b, 1e-10 * (1 + std / temperature))  # the rounding grows with the logits
    logits = hidden @ weight.T + (bias if with_bias else 0)
    direct = torch.log_softmax(logits / temperature, -1)[torch.arange(N), targets]
    close([got[0][0]], [direct], 1e-12)


@settings(max_examples=80, deadline=None)
@given(**sizes, ref_d=st.sampled_from([2, 5]), reverse=st.booleans(), with_bias=st.booleans())
def test_kl_is_the_oracle_float64(N, V, chunk, temperature, std, seed, ref_d, reverse, with_bias):
    """Both directions, a reference of another width, with a bias and without; never below zero."""
    hidden, weight, _, bias = operands(N, V, seed=seed, std=std)
    ref_hidden, ref_weight, _, ref_bias = operands(N, V, D=ref_d, seed=seed + 1, std=std)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    ref_bias = ref_bias if with_bias else None

    def run(fn):
        return lambda h, w, b=None: fn(h, w, ref_hidden, ref_weight, temperature, reverse, b, ref_bias)

    with mock.patch.object(torch_backend, "TILE", chunk):
        got = differentiate(run(linear_kl), inputs)
    want = differentiate(run(reference.linear_kl), inputs)
    for a, b in zip(got, want):
        close(a, b, 1e-10 * (1 + std / temperature))  # the rounding grows with the logits
    assert (got[0][0] >= -1e-12 * std / temperature).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("part", ["logp", "entropy", "both"])
def test_logprob_gradcheck(part, with_bias):
    """The gradient against finite differences: of each output alone, and of a random sum of the two."""
    hidden, weight, targets, bias = operands(4, 7, D=3)
    g, h = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def f(hidden, weight, bias=None):
        logp, entropy = linear_logprob(hidden, weight, targets, 0.7, bias)
        return {"logp": logp, "entropy": entropy, "both": g * logp + h * entropy}[part]

    inputs = [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    with mock.patch.object(torch_backend, "TILE", 14):
        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_kl_gradcheck(reverse, with_bias):
    """The gradient of KL(policy‖reference) and of KL(reference‖policy) against finite differences."""
    hidden, weight, _, bias = operands(4, 7, D=3)
    ref_hidden, ref_weight, _, ref_bias = operands(4, 7, D=2, seed=5)
    inputs = [x.requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]

    def f(hidden, weight, bias=None):
        return linear_kl(hidden, weight, ref_hidden, ref_weight, 0.7, reverse, bias, ref_bias)

    with mock.patch.object(torch_backend, "TILE", 14):
        assert torch.autograd.gradcheck(f, inputs)


BETAS = st.sampled_from([0.01, 0.3, 0.5, 0.99])


@settings(max_examples=80, deadline=None)
@given(**sizes, ref_d=st.sampled_from([2, 5]), beta=BETAS)
def test_jsd_is_the_oracle_float64(N, V, chunk, temperature, std, seed, ref_d, beta):
    """Values and gradients for any cut into tiles, also of columns; between 0 and the entropy of (β, 1−β)."""
    hidden, weight, _, _ = operands(N, V, seed=seed, std=std)
    ref_hidden, ref_weight, _, _ = operands(N, V, D=ref_d, seed=seed + 1, std=std)

    def run(fn):
        return lambda h, w: fn(h, w, ref_hidden, ref_weight, beta, temperature)

    with mock.patch.multiple(torch_backend, TILE=chunk, COLS=8):
        got = differentiate(run(linear_jsd), (hidden, weight))
    want = differentiate(run(reference.linear_jsd), (hidden, weight))
    for a, b in zip(got, want):
        close(a, b, 1e-10 * (1 + std / temperature))  # the rounding grows with the logits
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (got[0][0] >= -1e-12 * (1 + std)).all() and (got[0][0] <= most + 1e-9).all()


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_jsd_gradcheck(beta):
    hidden, weight, _, _ = operands(4, 7, D=3)
    ref_hidden, ref_weight, _, _ = operands(4, 7, D=2, seed=5)
    inputs = [x.requires_grad_() for x in (hidden, weight)]

    def f(hidden, weight):
        return linear_jsd(hidden, weight, ref_hidden, ref_weight, beta, 0.7)

    with mock.patch.object(torch_backend, "TILE", 14):
        assert torch.autograd.gradcheck(f, inputs)


def test_jsd_near_its_ends_is_a_kl():
    """JSD/β → KL(reference‖policy) as β → 0, and JSD/(1−β) → KL(policy‖reference) as β → 1 (GKD)."""
    hidden, weight, _, _ = operands(20, 11, std=1.0)
    ref_hidden, ref_weight, _, _ = operands(20, 11, seed=1, std=1.0)
    small = 1e-6
    forward = linear_jsd(hidden, weight, ref_hidden, ref_weight, small) / small
    reverse = linear_jsd(hidden, weight, ref_hidden, ref_weight, 1 - small) / small
    close([forward], [linear_kl(hidden, weight, ref_hidden, ref_weight, reverse=True)], 1e-4)
    close([reverse], [linear_kl(hidden, weight, ref_hidden, ref_weight)], 1e-4)
    assert (forward - reverse).abs().max() > 0.05


def test_jsd_by_hand():
    """p = (½, ½), q = (1, 0) to 1e-40, β = ½: m = (¾, ¼), so ½ log 4/3 + ½ (½ log 2/3 + ½ log 2)."""
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    policy = torch.zeros(1, 1, dtype=torch.float64)
    ref = torch.full((1, 1), -100.0, dtype=torch.float64)
    want = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert linear_jsd(policy, weight, ref, weight, 0.5).item() == pytest.approx(want, abs=1e-12)
    assert linear_jsd(policy, weight, policy, weight, 0.5).item() == pytest.approx(0, abs=1e-15)


def some_loss(N, part, module=None, seed=4, dtype=torch.float64):
    """A loss per row of logp and entropy, neither linear nor the same in any two rows → its sum, stats."""
    a, b = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def loss(logp, entropy, rows):
        on_logp, on_entropy = a[rows] * torch.tanh(logp / 9), b[rows] * entropy.square()
        total = {"logp": on_logp, "entropy": on_entropy, "both": on_logp + on_entropy}[part].sum()
        return total, {"logp": logp.sum(), "rows": torch.tensor(len(logp))}

    return loss


@settings(max_examples=80, deadline=None)
@given(**sizes, stored=st.sampled_from([1, 50, 1 << 25]), part=st.sampled_from(["logp", "entropy", "both"]),
       with_bias=st.booleans())  # fmt: skip
def test_one_pass_is_the_oracle_float64(N, V, chunk, temperature, std, seed, stored, part, with_bias):
    """The gradient of a loss, times what comes from upstream: as autograd gives it through all logits."""
    hidden, weight, targets, bias = operands(N, V, seed=seed, std=std)
    inputs, loss = (hidden, weight, bias) if with_bias else (hidden, weight), some_loss(N, part)

    def naive(h, w, b=None):
        logp, entropy = reference.linear_logprob(h, w, targets, temperature, b)
        return 1.7 * loss(logp, entropy, slice(None))[0], logp.detach(), entropy.detach()

    def one_pass(h, w, b=None):
        total, stats, logp, entropy = linear_logprob(h, w, targets, temperature, b, loss=loss)
        assert not any(x.requires_grad for x in (*stats.values(), logp, entropy))
        assert stats["rows"].sum() == N and stats["rows"].shape == stats["logp"].shape  # one value a chunk
        close([stats["logp"].sum()], [logp.sum()], 1e-10)
        return 1.7 * total, logp, entropy

    leaves, wants = ([x.clone().requires_grad_() for x in inputs] for _ in "ab")
    with mock.patch.object(torch_backend, "TILE", chunk), mock.patch.object(torch_backend, "STORED", stored):
        out = one_pass(*leaves)
        out[0].backward()
    want = naive(*wants)
    want[0].backward()
    close(out, want, 1e-10 * (1 + std / temperature))
    close([x.grad for x in leaves], [x.grad for x in wants], 1e-10 * (1 + std / temperature))


@pytest.mark.parametrize("part", ["logp", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, V", [(700, 512), (50, 5000), (5, 9)])
def test_one_pass_has_the_bits_of_two(N, V, dtype, part):
    """The same tiles, the same expressions: the gradients of both ways are equal, bit by bit."""
    hidden, weight, targets, bias = operands(N, V, D=16, dtype=dtype)
    loss = some_loss(N, part, dtype=torch.float32)
    results = []
    for with_loss in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves
        with mock.patch.object(torch_backend, "TILE", 1 << 17):
            if with_loss:
                total, _, logp, entropy = linear_logprob(h, w, targets, 0.7, b, loss=loss)
            else:
                logp, entropy = linear_logprob(h, w, targets, 0.7, b)
                total, _ = loss(logp, entropy, slice(None))
            total.backward()
        results.append([logp, entropy, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].dtype == dtype and results[0][2].abs().sum() > 0


def test_one_pass_does_no_work_that_nobody_asked_for():
    """Matmuls: 3 a tile; 2 where one operand is frozen; 1 where none is trained or gradients are off."""
    hidden, weight, targets, _ = operands(6, 11)

    def matmuls(*trained, fn=lambda *args: linear_logprob(*args, loss=some_loss(6, "both"))[0]):
        h, w = (x.clone().requires_grad_(name in trained) for name, x in (("h", hidden), ("w", weight)))
        with Watch() as watch:
            total = fn(h, w, targets)
            if total.requires_grad:
                total.backward()
                assert [name for name, x in (("h", h), ("w", w)) if x.grad is not None] == [*trained]
        return sum(watch.calls[name] for name in ("mm", "addmm_"))

    assert (matmuls("h", "w"), matmuls("h"), matmuls("w"), matmuls()) == (3, 2, 2, 1)
    assert matmuls("h", "w", fn=lambda *args: linear_logprob(*args)[0].sum()) == 4  # the watch can count
    with torch.no_grad():
        assert matmuls("h", "w") == 1


def test_one_pass_can_be_differentiated_once():
    """Its gradients are handed over, not copied: a second time is refused, and not answered with zeros."""
    hidden, weight, targets, _ = operands(6, 11)
    total, *_ = linear_logprob(hidden, weight.requires_grad_(), targets, loss=some_loss(6, "both"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("chunks, rows", [(1, [6]), (3, [2, 2, 2]), (6, [1] * 6)])
def test_one_value_of_each_figure_a_chunk(chunks, rows):
    """What the loss returns beside its value, whatever its name: the caller sums it or takes the maximum."""
    hidden, weight, targets, _ = operands(6, 11)

    def loss(logp, entropy, rows):
        assert len(logp) == rows.stop - rows.start
        return logp.sum(), {"any name": logp.max(), "rows": torch.tensor(len(logp))}

    with mock.patch.object(torch_backend, "STORED", 11 * 6 // chunks):
        _, stats, logp, _ = linear_logprob(hidden, weight.requires_grad_(), targets, loss=loss)
    assert stats["rows"].tolist() == rows
    assert torch.equal(stats["any name"], logp.view(chunks, -1).amax(1))
    with torch.no_grad():  # one call with all rows
        _, stats, logp, _ = linear_logprob(hidden, weight, targets, loss=loss)
    assert stats["rows"].tolist() == [6] and torch.equal(stats["any name"], logp.max()[None])


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_fp32_close_to_float64(N, V, chunk, temperature, std, seed):
    """fp32 operands: errors within fp32 rounding of the logits; log-probs ≤ 0 and entropies ≥ 0, exactly."""
    hidden, weight, targets, bias = operands(N, V, seed=seed, std=std, dtype=torch.float32)
    with mock.patch.object(torch_backend, "TILE", chunk):
        logp, entropy = linear_logprob(hidden, weight, targets, temperature, bias)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp <= 0).all() and (entropy >= 0).all()
    wide = [x.double() for x in (hidden, weight, bias)]
    want = reference.linear_logprob(*wide[:2], targets, temperature, wide[2])
    largest = (wide[0] @ wide[1].T).abs().max().item() / temperature if N else 1
    for a, b in zip((logp, entropy), want):
        assert (a - b).abs().le(2e-6 * max(1, largest)).all()


@pytest.mark.parametrize("fn", ["logprob", "kl", "jsd"])
def test_bf16_operands_keep_fp32_logits(fn):
    """bf16 operands, logit std 6: log-probs are off by ≤ 2e-5; logits rounded to bf16 would give 1e-2."""
    hidden, weight, targets, _ = operands(128, 499, D=64, std=6.0, dtype=torch.bfloat16)
    ref_hidden, ref_weight, _, _ = operands(128, 499, D=64, std=6.0, seed=1, dtype=torch.bfloat16)

    def run(module, cast):
        h, w, rh, rw = (cast(x) for x in (hidden, weight, ref_hidden, ref_weight))
        if fn == "logprob":
            return differentiate(lambda h, w: module.linear_logprob(h, w, targets), (h, w))
        if fn == "jsd":
            return differentiate(lambda h, w: module.linear_jsd(h, w, rh, rw, 0.3), (h, w))
        return differentiate(lambda h, w: module.linear_kl(h, w, rh, rw), (h, w))

    got, grads = run(torch_backend_with_defaults, lambda x: x)
    want, want_grads = run(reference, torch.Tensor.double)
    assert got[0].dtype == torch.float32 and grads[0].dtype == grads[1].dtype == torch.bfloat16
    assert ((got[0] - want[0]).abs() <= (2e-5 if fn == "logprob" else 2e-6 * want[0].clamp(min=1))).all()
    for a, b in zip(grads, want_grads):  # only the last rounding, 8 bits of mantissa
        assert (a - b).abs().max() <= 2**-8 * b.abs().max()


class torch_backend_with_defaults:
    linear_logprob, linear_kl = staticmethod(linear_logprob), staticmethod(linear_kl)
    linear_jsd = staticmethod(linear_jsd)


def test_minus_infinity_in_the_bias():
    """Forbidden tokens: no NaN anywhere, 0·log 0 = 0, a forbidden target has log-prob −∞."""
    hidden, weight, targets, bias = operands(6, 11)
    bias[[0, 4, 10]] = -INF
    targets[:] = torch.tensor([1, 2, 3, 4, 9, 5])
    got, grads = differentiate(lambda h, w, b: linear_logprob(h, w, targets, 0.8, b), (hidden, weight, bias))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    h, w, b = leaves
    for part in ("logp", "both"):
        total, _, *figures = linear_logprob(h, w, targets, 0.8, b, loss=some_loss(6, part))
        close(figures, got, 1e-12)
        total.backward()
        assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in leaves)
    allowed = bias > -INF
    logits = (hidden @ weight.T + bias)[:, allowed] / 0.8
    p = logits.softmax(-1)
    close([got[1]], [-(p * p.log()).sum(-1)], 1e-12)
    assert got[0][3] == -INF and got[0][[0, 1, 2, 4, 5]].isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    ref_hidden, ref_weight, _, _ = operands(6, 11, seed=1)
    for reverse in (False, True):
        both, grads = differentiate(
            lambda h, w, b, r=reverse: linear_kl(h, w, ref_hidden, ref_weight, 0.8, r, b, bias),
            (hidden, weight, bias),
        )
        want = reference.linear_kl(
            hidden, weight[allowed], ref_hidden, ref_weight[allowed], 0.8, reverse,
            bias[allowed], bias[allowed],
        )
        close([both[0]], [want], 1e-12)
        assert all(g.isfinite().all() for g in grads)
    forward = linear_kl(hidden, weight, ref_hidden, ref_weight, 0.8, bias=bias)
    assert forward.isfinite().all()  # the policy may leave out what the reference allows
    assert (linear_kl(hidden, weight, ref_hidden, ref_weight, 0.8, reverse=True, bias=bias) == INF).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicated_maximum_and_edge_targets(dtype):
    """k equal largest logits far above the rest: log-prob −log k, entropy log k, at the first and last id."""
    hidden = torch.ones(4, 1, dtype=dtype)
    weight = torch.tensor([300.0, 0, -300, 300, 300], dtype=dtype)[:, None]
    logp, entropy = linear_logprob(hidden, weight, torch.tensor([0, 4, 1, 2]))
    want = torch.tensor([0.0, 0.0, -300.0, -600.0], dtype=torch.float64) - torch.tensor(3.0).double().log()
    close([logp, entropy], [want, torch.full((4,), 3.0).double().log()], 1e-7)


def test_kl_of_equal_models_is_zero():
    """Step 0 of every run: KL(policy‖reference) is 0 with a zero gradient, in fp32 too."""
    hidden, weight, _, _ = operands(50, 101, D=16, std=6.0, dtype=torch.float32)
    for reverse in (False, True):
        (kl,), grads = differentiate(
            lambda h, w, r=reverse: linear_kl(h, w, hidden, weight, 0.7, r), (hidden, weight)
        )
        assert kl.abs().max() <= 1e-6 and max(g.abs().max() for g in grads) <= 1e-5


@pytest.mark.parametrize("fn", ["logprob", "kl", "jsd", "one pass"])
def test_logits_are_never_stored_whole(fn):
    """No operation, forward or backward, returns more than a chunk; what is saved is inputs and (N,) rows.

    In one pass nothing is saved.
    """
    N, V, D, chunk = 64, 256, 4, 2048
    hidden, weight, targets, bias = operands(N, V, D=D)
    ref_hidden, ref_weight, _, ref_bias = operands(N, V, D=D, seed=1)

    def run(module):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves
        if fn == "logprob":
            out = sum(module.linear_logprob(h, w, targets, 1.0, b))
        elif fn == "one pass" and module is not reference:
            out = module.linear_logprob(h, w, targets, 1.0, b, loss=some_loss(N, "both"))[0]
        elif fn == "jsd":
            out = module.linear_jsd(h, w, ref_hidden, ref_weight, 0.3)
        else:
            out = module.linear_kl(h, w, ref_hidden, ref_weight, 1.0, False, b, ref_bias)
        out.sum().backward()

    saved = []
    limits = mock.patch.multiple(torch_backend, TILE=chunk, COLS=64, STORED=chunk)
    with limits, Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            run(torch_backend_with_defaults)
    assert watch.largest == (V * D if fn == "one pass" else chunk)  # dW: rows are kept in tiles
    assert fn == "one pass" or N * D + V * D < sum(saved) <= 2 * (N * D + V * D + V) + 3 * N < N * V
    with Watch() as watch:  # the oracle does store them: the watch can see
        run(reference)
    assert watch.largest >= N * V


def test_reference_gets_no_gradient():
    """The reference model is a constant, even when its tensors ask for a gradient."""
    hidden, weight, _, bias = (x.requires_grad_() if x.is_floating_point() else x for x in operands(5, 7))
    ref = [x for x in operands(5, 7, seed=1) if x.is_floating_point()]
    for x in ref:
        x.requires_grad_()
    linear_kl(hidden, weight, ref[0], ref[1], bias=bias, ref_bias=ref[2]).sum().backward()
    linear_jsd(hidden, weight, ref[0], ref[1], 0.5).sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0 and bias.grad.abs().sum() > 0
    assert all(x.grad is None for x in ref)


def test_bad_arguments_are_refused():
    """Shapes that do not fit, a temperature of 0 or less, and an unknown backend raise ValueError."""
    hidden, weight, targets, bias = operands(5, 7)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            linear_logprob(hidden, weight, targets, temperature)
        with pytest.raises(ValueError, match="temperature"):
            linear_kl(hidden, weight, hidden, weight, temperature)
    for beta in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="beta"):
            linear_jsd(hidden, weight, hidden, weight, beta)
    with pytest.raises(ValueError, match="ref_weight"):
        linear_jsd(hidden, weight, hidden, weight[:-1], 0.5)
    with pytest.raises(ValueError, match="weight"):
        linear_logprob(hidden, weight[:, :-1], targets)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="bias"):
        linear_logprob(hidden, weight, targets, bias=bias[:-1])
    with pytest.raises(ValueError, match="ref_hidden"):
        linear_kl(hidden, weight, hidden[:-1], weight)
    with pytest.raises(ValueError, match="ref_weight"):
        linear_kl(hidden, weight, hidden, weight[:-1])
    with pytest.raises(ValueError, match="ref_bias"):
        linear_kl(hidden, weight, hidden, weight, ref_bias=bias[:-1])
    with pytest.raises(ValueError):
        linear_logprob(hidden[None], weight, targets)
    with pytest.raises(ValueError, match="backend"):
        linear_logprob(hidden, weight, targets, backend="cuda")
