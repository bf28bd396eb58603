"""The Triton kernels against float64 oracles: compiled where there is a GPU, else under its interpreter."""

import math
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from helpers import Watch, close, differentiate, interpreter, operands
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gpu
from nanorlhf import kernels
from nanorlhf.kernels import reference

triton_backend = pytest.importorskip("nanorlhf.kernels.triton_backend", reason="triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INF = float("inf")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # at numbers that tl.where discards
    pytest.mark.gpu,
    interpreter,
]
designs = pytest.mark.parametrize("design", ["fused", "stored"])
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def small(design):
    """Blocks so small that a handful of rows and columns makes many tiles, slices and programs."""
    blocks = dict(SAFE=(16, 32, 16, 1, 1), SAFE_KL=(16, 32, 16, 1, 1), STORED=(4, 32, 16, 1, 1))
    patches = {name: triton_backend._config(*block) for name, block in blocks.items()}
    return mock.patch.multiple(triton_backend, DESIGN=design, WIDTH=32, COLS=64, TILE_BYTES=8192, **patches)


def linear_logprob(*args, **kw):
    return kernels.linear_logprob(*args, backend="triton", **kw)


def linear_kl(*args, **kw):
    return kernels.linear_kl(*args, backend="triton", **kw)


def on_gpu(tol, D, dtype):
    """The tolerance of a log-prob: what rounding costs, and on a GPU what its tensor cores cut off."""
    return max(tol, gpu.tolerance(D, dtype)) if GPU else tol


def check(fast, oracle, inputs, design, tol, grad_tol, floor=0.0):
    """Outputs within tol, gradients within grad_tol of their norm, of the oracle in float64.

    floor: what the rounding of ∂loss/∂logits may add where the true gradient vanishes, per unit of the factor
    that multiplies it: the weight for hidden, hidden for the weight, 1 for the bias.
    """
    with small(design):
        got, grads = differentiate(fast, [x.to(DEVICE) for x in inputs])
    want, want_grads = differentiate(oracle, [x.double() for x in inputs])
    got, grads = ([x.cpu() for x in xs] for xs in (got, grads))
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        close([a], [b], tol / max(1.0, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0))
    factors = [inputs[1].double().norm(), inputs[0].double().norm(), 1.0]
    for a, b, x, factor in zip(grads, want_grads, inputs, factors):
        assert a.dtype == x.dtype and a.isfinite().all()
        assert (a.double() - b).norm() <= grad_tol * b.norm() + floor * factor + 1e-6


shapes = dict(
    N=st.sampled_from([0, 1, 3, 16, 17, 37]),
    V=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 101]),
    D=st.sampled_from([16, 24, 5]),
    temperature=st.floats(0.3, 2.0),
    std=st.floats(1.0, 100.0),
    seed=st.integers(0, 999),
    with_bias=st.booleans(),
    design=st.sampled_from(["fused", "stored"]),
)


def rounding(std, D, temperature):
    """What fp32 rounding of logits of this size can move: 6e-8 of the largest partial sum, some eightfold."""
    return 5e-7 * (1 + 4 * std / temperature)


@settings(max_examples=24, deadline=None)
@given(**shapes, part=st.sampled_from(["logp", "entropy", "both"]))
def test_logprob_is_the_oracle(N, V, D, temperature, std, seed, with_bias, design, part):
    """Any shape on either side of a block, every temperature and size of logits, either output or both."""
    hidden, weight, targets, bias = operands(N, V, D, seed, std, torch.float32)
    if N > 1:
        targets[:2] = torch.tensor([0, V - 1])
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)

    def run(fn, t):
        def f(h, w, b=None):
            logp, entropy = fn(h, w, t, temperature, bias=b)
            return {"logp": (logp, 0 * entropy), "entropy": (0 * logp, entropy)}.get(part, (logp, entropy))

        return f

    tol = rounding(std, D, temperature)
    oracle = run(reference.linear_logprob, targets)
    floor = tol / temperature * (1 + N) ** 0.5
    check(run(linear_logprob, targets.to(DEVICE)), oracle, inputs, design, tol, 30 * tol, floor)


@settings(max_examples=16, deadline=None)
@given(**{k: v for k, v in shapes.items() if k != "design"}, entropy_too=st.booleans())
def test_one_pass_is_the_oracle(N, V, D, temperature, std, seed, with_bias, entropy_too):
    """A loss of each row's log-prob and entropy, chunks of a few rows, times what comes from upstream."""
    hidden, weight, targets, bias = operands(N, V, D, seed, std, torch.float32)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    a, b = torch.randn(2, N, generator=torch.Generator().manual_seed(seed))

    def run(fn, t, *weights):
        a, b = weights

        def loss(logp, entropy, rows):
            terms = a[rows] * torch.tanh(logp / 9) + entropy_too * b[rows] * torch.sin(entropy)
            return terms.sum(), {"logp": logp.sum()}

        def f(h, w, bias=None):
            if fn is linear_logprob:
                total, stats, logp, _ = fn(h, w, t, temperature, bias=bias, loss=loss)
                close([stats["logp"].sum()], [logp.sum()], 1e-5)
                return total
            return loss(*fn(h, w, t, temperature, bias=bias), slice(None))[0]

        return f

    tol = rounding(std, D, temperature)
    fast = run(linear_logprob, targets.to(DEVICE), a.to(DEVICE), b.to(DEVICE))
    oracle = run(reference.linear_logprob, targets, a.double(), b.double())
    with mock.patch.object(triton_backend, "STORED_BYTES", 8 * 128 * 5):
        check(fast, oracle, inputs, None, (1 + N) * tol, 30 * tol, tol / temperature * (1 + N) ** 0.5)


@pytest.mark.parametrize("dtype", [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=pytest.mark.slow),
])
def test_one_pass_has_the_gradients_of_two(dtype):
    """Operands of 16 bits keep fp32 logits; only what is asked for is formed."""
    hidden, weight, targets, _ = operands(37, 101, D=16, std=6.0, dtype=dtype)
    a = torch.randn(37, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    results = []
    for frozen in ("", "w"):
        for loss in (None, lambda logp, entropy, rows: ((a[rows] * (logp + 0.3 * entropy)).sum(), {})):
            h, w = (x.to(DEVICE, copy=True).requires_grad_() for x in (hidden, weight))
            w.requires_grad_(not frozen)
            with small("stored"):
                *total, logp, entropy = linear_logprob(h, w, targets.to(DEVICE), 0.7, loss=loss)
                total = total[0] if loss else (a * (logp + 0.3 * entropy)).sum()
                total.backward()
            assert bool(frozen) == (w.grad is None) and h.grad.dtype == dtype
            results.append([logp, entropy, h.grad] + ([] if frozen else [w.grad]))
    for two, one in (results[:2], results[2:]):
        for x, y in zip(two, one, strict=True):
            scale = 1e-5 if dtype == torch.float32 or x.dtype == torch.float32 else 1e-2
            assert (x - y).abs().max() <= scale * x.abs().max()


@settings(max_examples=16, deadline=None)
@given(**shapes, reverse=st.booleans(), ref_d=st.sampled_from([16, 8]))
def test_kl_is_the_oracle(N, V, D, temperature, std, seed, with_bias, design, reverse, ref_d):
    """Both directions, a reference of another width."""
    hidden, weight, _, bias = operands(N, V, D, seed, std, torch.float32)
    ref_hidden, ref_weight, _, ref_bias = operands(N, V, ref_d, seed + 1, std, torch.float32)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    ref = [ref_hidden, ref_weight, ref_bias if with_bias else None]

    def run(fn, cast):
        rh, rw, rb = (x if x is None else cast(x) for x in ref)
        return lambda h, w, b=None: fn(h, w, rh, rw, temperature, reverse, b, rb)

    tol = 10 * rounding(std, D, temperature)  # four roundings, and KLs of a thousand nats
    oracle = run(reference.linear_kl, torch.Tensor.double)
    floor = tol / temperature * (1 + N) ** 0.5
    check(run(linear_kl, lambda x: x.to(DEVICE)), oracle, inputs, design, tol, 30 * tol, floor)


@designs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_keep_fp32_logits(dtype, design):
    """Logit std 6: log-probs off by ≤ 2e-5 (on a GPU by gpu.tolerance), entropy and KL by ≤ 1e-4.

    Gradients are off by the last rounding only."""
    tol = on_gpu(2e-5, 64, dtype)
    hidden, weight, targets, _ = operands(20, 101, 64, std=6.0, dtype=dtype)
    ref_hidden, ref_weight, _, _ = operands(20, 101, 48, std=6.0, seed=1, dtype=dtype)
    ref = ref_hidden.double(), ref_weight.double()
    gpu_args = [x.to(DEVICE) for x in (targets, ref_hidden, ref_weight)]
    check(lambda h, w: linear_logprob(h, w, gpu_args[0], 0.9)[0],
          lambda h, w: reference.linear_logprob(h, w, targets, 0.9)[0], (hidden, weight), design, tol, 5e-3)
    check(lambda h, w: linear_logprob(h, w, gpu_args[0])[1],
          lambda h, w: reference.linear_logprob(h, w, targets)[1], (hidden, weight), design, 1e-4, 5e-3)
    for reverse in (False, True):
        check(lambda h, w, r=reverse: linear_kl(h, w, *gpu_args[1:], reverse=r),
              lambda h, w, r=reverse: reference.linear_kl(h, w, *ref, 1.0, r),
              (hidden, weight), design, 1e-4, 5e-3)


@designs
def test_tiny_gradients_survive_fp16(design):
    """A mean over a million tokens: ∂loss/∂logits is below fp16's least number, the gradient is not."""
    hidden, weight, targets, _ = operands(8, 50, 16, dtype=torch.float16)
    leaf = hidden.to(DEVICE).requires_grad_()
    with small(design):
        logp, _ = linear_logprob(leaf, 1024 * weight.to(DEVICE), targets.to(DEVICE), 512.0)
        (grad,) = torch.autograd.grad(logp.sum() * 1e-8, leaf)
    double = hidden.double().requires_grad_()
    logp, _ = reference.linear_logprob(double, 1024 * weight.double(), targets, 512.0)
    (want,) = torch.autograd.grad(logp.sum() * 1e-8, double)
    assert (grad.cpu().double() - want).abs().max() <= 2**-25 + 1e-3 * want.abs().max()


@designs
@pytest.mark.parametrize("V", [203, 1000, 50257])
def test_the_tail_of_the_vocabulary_is_masked(V, design):
    """All logits negative: zeros beyond the vocabulary would win (verl#2656: log-probs of +123)."""
    hidden = torch.ones(2, 16, device=DEVICE)
    weight = torch.full((V, 16), -10.0, device=DEVICE)
    with mock.patch.object(triton_backend, "DESIGN", design):
        logp, entropy = linear_logprob(hidden, weight, torch.tensor([0, V - 1], device=DEVICE))
    want = torch.tensor(float(V)).log()
    assert (logp.cpu() + want).abs().max() <= 2e-5 and (entropy.cpu() - want).abs().max() <= 2e-5


@designs
def test_minus_infinity_in_the_bias(design):
    """Forbidden tokens, whole slices of them too: no NaN, 0·log 0 = 0, a forbidden target has log-prob −∞."""
    hidden, weight, targets, bias = operands(6, 101, 16, dtype=torch.float32)
    bias[:40] = bias[70:] = -INF  # the first tiles and the last hold nothing else
    bias[40:70] -= 500  # a maximum that started at 0 would never come down to these
    targets[:] = torch.tensor([41, 69, 40, 43, 50, 60])
    allowed = slice(40, 70)
    ref_hidden, ref_weight, _, ref_bias = operands(6, 101, 16, seed=1, dtype=torch.float32)
    ref_bias[:40] = ref_bias[70:] = -INF
    args = [x.to(DEVICE) for x in (targets, ref_hidden, ref_weight, ref_bias)]
    check(lambda h, w, b: linear_logprob(h, w, args[0], 0.8, bias=b),
          lambda h, w, b: reference.linear_logprob(h, w[allowed], targets - 40, 0.8, b[allowed]),
          (hidden, weight, bias), design, 1e-4, 1e-4)  # fp32 logits of 600
    with small(design):
        logp, _ = linear_logprob(*(x.to(DEVICE) for x in (hidden, weight)), args[0] - 5, bias=bias.to(DEVICE))
        assert logp[2] == -INF
    for reverse in (False, True):
        with small(design):
            kl, grads = differentiate(
                lambda h, w, b, r=reverse: linear_kl(h, w, *args[1:3], 0.8, r, b, args[3]),
                [x.to(DEVICE) for x in (hidden, weight, bias)],
            )
        want = reference.linear_kl(
            *(x.double() for x in (hidden, weight[allowed], ref_hidden, ref_weight[allowed])), 0.8, reverse,
            bias[allowed].double(), ref_bias[allowed].double(),
        )
        close([kl[0].cpu()], [want], 1e-4)
        assert all(g.isfinite().all() for g in grads)
    with small(design):  # the policy allows what the reference forbids, and the other way round
        free = [x.to(DEVICE) for x in (hidden, weight)]
        assert (linear_kl(*free, *args[1:3], 0.8, ref_bias=args[3]) == INF).all()
        assert linear_kl(*free, *args[1:3], 0.8, reverse=True, ref_bias=args[3]).isfinite().all()


@designs
def test_duplicated_maximum(design):
    """Three equal largest logits, in several slices: log-prob −log 3 at the first and the last id."""
    weight = torch.full((100, 16), -20.0)
    weight[[0, 50, 99]] = 20.0
    targets = torch.tensor([0, 99, 1])
    with small(design):
        logp, entropy = linear_logprob(torch.ones(3, 16).to(DEVICE), weight.to(DEVICE), targets.to(DEVICE))
    log3 = torch.tensor(3.0).log()
    close([logp.cpu(), entropy.cpu()], [torch.tensor([0.0, 0.0, -640.0]) - log3, log3.expand(3)], 1e-6)


@designs
def test_any_strides(design):
    """Rows apart, columns apart, a transposed weight, targets with a gap: the same numbers."""
    hidden, weight, targets, _ = operands(9, 70, 16, dtype=torch.float32)
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))
    rows = torch.zeros(9, 3, 20, device=DEVICE)[:, 1, 2:18].copy_(hidden)
    views = [
        (rows, weight, targets),
        (torch.zeros(9, 32, device=DEVICE)[:, ::2].copy_(hidden), weight.T.contiguous().T, targets),
        (hidden, torch.zeros(140, 16, device=DEVICE)[::2].copy_(weight),
         torch.zeros(18, device=DEVICE).long()[::2].copy_(targets)),
    ]
    with small(design):
        want = differentiate(lambda h, w: linear_logprob(h, w, targets), (hidden, weight))
        for h, w, t in views:
            leaves = [x.detach().requires_grad_() for x in (h, w)]
            logp, entropy = linear_logprob(*leaves, t)
            close([logp, entropy], want[0], 1e-6)
            up = [torch.randn(9, generator=g, dtype=torch.float64).float().to(DEVICE)
                  for g in [torch.Generator().manual_seed(1)] for _ in range(2)]
            for a, b in zip(torch.autograd.grad((logp, entropy), leaves, up), want[1]):
                close([a], [b], 1e-6)


def test_offsets_beyond_31_bits():
    """Row 2 lies 2³¹ numbers from the start (flash-attn#714): 4 GiB are reserved, two rows are touched."""
    try:
        memory = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    hidden = memory.as_strided((3, 16), (2**30, 1)).copy_(operands(3, 7, 16)[0])
    _, weight, targets, _ = operands(3, 7, 16, dtype=torch.float16)
    with small("fused"):
        logp, _ = linear_logprob(hidden, weight.to(DEVICE), targets.to(DEVICE))
    want, _ = reference.linear_logprob(hidden.cpu().double(), weight.double(), targets)
    close([logp.cpu()], [want], 1e-5)


@designs
def test_logits_are_never_stored_whole(design):
    """Forward and backward return no tensor larger than a tile or the inputs."""
    hidden, weight, targets, _ = operands(32, 512, 4, dtype=torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    with small(design), Watch() as watch:
        logp, entropy = linear_logprob(*leaves, targets.to(DEVICE))
        (logp + entropy).sum().backward()
        linear_kl(*leaves, *(x.detach() for x in leaves)).sum().backward()
    assert watch.largest <= 8192 < 32 * 512  # TILE_BYTES, as the interpreter looks at bytes


def test_only_what_is_asked_for_is_computed():
    """A frozen unembedding gets no gradient, and no matmul; frozen hidden states neither."""
    hidden, weight, targets, _ = operands(5, 40, 16, dtype=torch.float32)
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))
    for backend in ("torch", "triton"):
        def run(h, w, b=backend):
            return kernels.linear_logprob(h, w, targets, backend=b)

        both = differentiate(run, (hidden, weight))
        for i, name in enumerate(("hidden", "weight")):
            leaves = [hidden.clone(), weight.clone()]
            leaves[i].requires_grad_()
            with mock.patch.object(triton_backend, "_add_matmul", wraps=triton_backend._add_matmul) as matmul:
                out = kernels.linear_logprob(*leaves, targets, backend=backend)
                up = [torch.randn(5, generator=g, dtype=torch.float64).float().to(DEVICE)
                      for g in [torch.Generator().manual_seed(1)] for _ in range(2)]
                torch.autograd.backward(out, up)
            assert torch.equal(leaves[i].grad, both[1][i]), name
            assert leaves[1 - i].grad is None and matmul.call_count == (backend == "triton")


def test_the_backend_is_picked_by_the_device(capsys, monkeypatch):
    """Triton on a GPU, torch elsewhere and for float64; what cannot run is refused; said once."""
    cpu, double = torch.zeros(2, 16), torch.zeros(2, 16, dtype=torch.float64)
    cuda = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 16))
    pick = kernels._backend
    assert pick(None, cpu, cpu).__name__.endswith("torch_backend")
    assert pick(None, cuda, cuda).__name__.endswith("triton_backend")
    assert pick("torch", cuda, cuda).__name__.endswith("torch_backend")
    assert pick(None, cuda, double).__name__.endswith("torch_backend")
    with pytest.raises(ValueError, match="float64"):
        pick("triton", cuda, double)
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        pick("triton", cpu, cpu)
    odd = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 20))
    kernels._say_once.cache_clear()
    pick(None, odd, odd), pick(None, odd, odd)
    assert capsys.readouterr().out.count("multiple of 16") == 1
    monkeypatch.setitem(sys.modules, "nanorlhf.kernels.triton_backend", None)
    monkeypatch.delattr(kernels, "triton_backend", raising=False)
    assert pick(None, cuda, cuda) is pick(None, cuda, cuda) is pick("torch", cpu)
    assert capsys.readouterr().out.count("Triton is not installed") == 1
    with pytest.raises(ValueError, match="pip install triton"):
        pick("triton", cuda, cuda)


@pytest.mark.parametrize(
    "N, V, processors", [(1, 50257, 132), (8192, 50257, 132), (65536, 151936, 132), (5, 7, 4)]
)
def test_slices_cover_the_vocabulary_and_the_processors(N, V, processors):
    """At most 32 slices, and at most a tenth more tile-times than an even share would take."""
    device = types.SimpleNamespace(type="cuda")
    properties = types.SimpleNamespace(multi_processor_count=processors)
    with mock.patch("torch.cuda.get_device_properties", lambda d: properties):
        width = triton_backend._slices(N, V, device)
    slices = -(-V // width)
    assert width % triton_backend.WIDTH == 0 and 1 <= slices <= 32
    blocks, tiles = -(-N // 128), -(-V // triton_backend.WIDTH)
    time = -(-blocks * slices // processors) * (width // triton_backend.WIDTH)
    assert time <= max(1.1 * blocks * tiles / processors, tiles / 32 + 1)


def rounds(V, n, width, processors):
    """Of programs of 128 × 256 numbers on all processors, counted tile by tile."""
    total = 0
    for start in range(0, V, width):
        columns = min(width, V - start)
        programs = math.ceil(n / 128) * math.ceil(columns / 256)
        total += math.ceil(programs / processors)
    return total


@pytest.mark.parametrize("V, n, processors, width, before, after", [
    (50257, 4096, 132, 8448, 54, 48),  # H200
    (151936, 4096, 132, 8448, 149, 144),
    (151936, 4096, 108, 6912, 186, 176),  # A100
    (32000, 4096, 170, 9472, 27, 24),  # GeForce 5090
    (49152, 4096, 128, 10240, 48, 48),  # GeForce 4090: full already, now in fewer tiles
    (7000, 4096, 132, 7168, 7, 7),
    (512, 4096, 132, 512, 1, 1),
])  # fmt: skip
def test_the_backwards_tiles_fill_the_processors(V, n, processors, width, before, after):
    """`before`: with the vocabulary in equal parts of at most COLS columns."""
    equal = 256 * math.ceil(V / (256 * math.ceil(V / 8192)))
    got = triton_backend._columns(V, n, processors)
    assert (rounds(V, n, equal, processors), rounds(V, n, got, processors)) == (before, after)
    assert got == width


@settings(max_examples=100, deadline=None)
@given(V=st.integers(1, 300_000), n=st.integers(1, 4096), processors=st.integers(1, 200))
def test_a_tiles_width_never_costs_a_round(V, n, processors):
    """As few rounds as any other width in reach has; a buffer of bf16 gradients fits."""
    width = triton_backend._columns(V, n, processors)
    reach = [256 * blocks for blocks in range(24, 41)]
    assert width in reach or width == 256 * math.ceil(V / 256) < reach[0]
    assert rounds(V, n, width, processors) == min(rounds(V, n, x, processors) for x in reach)
    assert 2 * 4096 * width <= triton_backend.TILE_BYTES


@pytest.mark.parametrize("design, width", [("fused", 8448), ("stored", 7424)])
def test_only_programs_that_multiply_choose_the_width(design, width):
    """At D = 4,096 cuBLAS makes the logits; wider tiles would halve the rows that fit."""
    x, w = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (65536, 50257))
    with mock.patch.object(triton_backend, "_processors", lambda device: 132):
        rows, cols, ld = triton_backend._tiles([(x, w, None)], 2, design == "stored")
    assert ld == cols[0].stop == width and rows[0].stop == (4096 if design == "fused" else 2048)


@pytest.mark.parametrize("dtype, tuned", [(torch.bfloat16, True), (torch.float32, False)])
def test_fp32_never_takes_the_tuned_blocks(dtype, tuned):
    """They would take 288 KiB of shared memory, more than any GPU has, and 20 s of compiling each."""
    class Launched(Exception):
        pass

    def tune(kernel):
        raise Launched("tuned")

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, BLOCK_N, **flags):
                raise Launched(BLOCK_N)

            return launch

    x, w = (torch.zeros(n, 16, dtype=dtype) for n in (2048, 64))
    tile = slice(0, 2048), slice(0, 64)
    patched = mock.patch.multiple(triton_backend, INTERPRETED=False, _tuned=tune)
    out = torch.zeros(1, 1, 2048)
    with patched, pytest.raises(Launched) as caught:
        triton_backend._launch(Kernel(), [(x, w, None)], None, [], out, *tile, 0, 1.0, 64)
    assert caught.value.args == ("tuned" if tuned else triton_backend.SAFE.kwargs["BLOCK_N"],)


COMPILE = """
import os, subprocess, sys, tempfile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from nanorlhf.kernels import triton_backend as tb

ARCH = int(sys.argv[1])
SHARED = {80: 163, 89: 99, 90: 227, 120: 99}[ARCH] << 10  # bytes that a program may have
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# 3.7 has an assembler of its own for the newest cards
PTXAS = os.path.join(TOOLS, "ptxas-blackwell" if ARCH >= 100 else "ptxas")
if not os.path.exists(PTXAS):
    PTXAS = os.path.join(TOOLS, "ptxas")

def spilled(ptx):
    '''Bytes that the assembler spills from registers to memory.'''
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx), f.flush()
        target = next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target")).rstrip(",")
        said = subprocess.run([PTXAS, "-v", f"--gpu-name={target}", f.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    assert "bytes spill stores" in said, said
    return sum(int(line.split("bytes stack frame, ")[1].split()[0])
               for line in said.splitlines() if "bytes spill stores" in line)

def compile(kernel, config, stored, dtype="bf16"):
    flags = {**config.kwargs, "D": 768, "D2": 768, "REVERSE": False, "bias": None, "bias2": None}
    if not stored:
        flags |= {"logits": None, "logits2": None}
    pointers = dict.fromkeys(("x", "w", "x2", "w2", "out"), "*" + dtype)
    pointers |= {"targets": "*i64", "scale": "fp32"}
    pointers |= dict.fromkeys("logits logits2 stats lse lse2 entropy kl g h".split(), "*fp32")
    signature = {n: "constexpr" if n in flags else pointers.get(n, "i32") for n in kernel.arg_names}
    constants = {(i,): flags[n] for i, n in enumerate(kernel.arg_names) if n in flags}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n][0] == "*" or n in ("sx", "sw", "sx2", "sw2", "ld", "col0", "width")}
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    assert built.metadata.shared <= SHARED, (kernel.__name__, built.metadata.shared)
    return built

for name in ("logprob_forward", "logprob_backward", "kl_forward", "kl_backward"):
    kernel = getattr(tb, name)
    built = compile(kernel, tb.SAFE if name.startswith("logprob") else tb.SAFE_KL, stored=False)
    assert spilled(built.asm["ptx"]) == 0, name
    assert ("wgmma" if ARCH == 90 else "mma.sync") in built.asm["ptx"], name
    built = compile(kernel, tb.STORED, stored=True)
    assert spilled(built.asm["ptx"]) == 0, name
    assert "ld.global.v4" in built.asm["ptx"], name  # odd vocabularies once made these one number wide
    print(name, built.metadata.shared)
if ARCH == 90:  # blocks that only the timer chooses; where they do not fit, it passes them over
    for name in ("logprob_forward", "logprob_backward"):
        assert "wgmma" in compile(getattr(tb, name), tb.TUNED[1], stored=False).asm["ptx"]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.parametrize("arch", [80, 89, 90, 120])
def test_the_kernels_compile_for_a_gpu(arch):
    """Without a GPU: every kernel in both designs, for an A100, a GeForce 40, an H200 and a GeForce 50.

    Tensor cores multiply, shared memory is what the card has, and the blocks taken by default spill nothing.
    """
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", "HOME": "/tmp"}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_gpu
@designs
@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)])
def test_gpu_real_size(design, dtype, tol):
    """Tuned blocks, odd vocabulary, D = 768 against float64; equal bits under deterministic algorithms."""
    hidden, weight, targets, _ = operands(1500, 50257, 768, std=6.0, dtype=dtype)
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))
    with mock.patch.object(triton_backend, "DESIGN", design):
        got, grads = differentiate(lambda h, w: linear_logprob(h, w, targets), (hidden, weight))
        want, want_grads = differentiate(
            lambda h, w: reference.linear_logprob(h, w, targets), (hidden.double(), weight.double()))
        bound = gpu.tolerance(768, dtype)
        assert (got[0] - want[0]).abs().max() <= bound and (got[1] - want[1]).abs().max() <= 5 * bound
        for a, b in zip(grads, want_grads):
            assert (a.double() - b).norm() <= tol * b.norm()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            runs = [differentiate(lambda h, w: linear_logprob(h, w, targets), (hidden, weight)) for _ in "ab"]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for x, y in zip(*runs) for a, b in zip(x, y))


@needs_gpu
@pytest.mark.parametrize("V, D", [(50304, 1024), (50257, 4096), (512, 768)])
def test_gpu_memory_and_more_than_31_bits(V, D):
    """N·V up to 3.3e9: at most 160 MiB above inputs, gradients and one fp32 buffer of the weight's shape."""
    N = 65536
    hidden, weight = (torch.randn(n, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n in (N, V))
    targets = torch.randint(V, (N,), device=DEVICE)
    sum(linear_logprob(hidden[:4096], weight, targets[:4096])).sum().backward()  # tuning takes memory too
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = linear_logprob(hidden, weight, targets, D**0.5)
    (logp + entropy).sum().backward()
    own = torch.cuda.max_memory_allocated() - before - 2 * N * D - 2 * V * D - 4 * V * D
    assert own <= 160 << 20
    at = torch.arange(N - 100, N, device=DEVICE)
    want, _ = reference.linear_logprob(hidden[at].double(), weight.double(), targets[at], D**0.5)
    assert (logp[at] - want).abs().max() <= gpu.tolerance(D, torch.bfloat16)
