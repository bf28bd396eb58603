"""Attention of one new token per row: the Triton kernel, and the torch path, against loops in float64."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from helpers import interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import kernels
from nanorlhf.kernels import reference

triton_decode = pytest.importorskip("nanorlhf.kernels.triton_decode", reason="triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
pytestmark = [pytest.mark.gpu, interpreter]


def operands(B, H, KV, hd, T, seed=0, std=1.0, dtype=torch.float32):
    """q, k, v, the two caches (views of a larger tensor, as a model's are), positions below T."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (std * torch.randn(B, n, hd, generator=g) for n in (H, KV, KV))
    cache = torch.randn(2, B + 1, KV, T, hd, generator=g)
    pos = torch.randint(T, (B,), generator=g)
    pos[0] = T - 1
    q, k, v, cache = (x.to(dtype).to(DEVICE) for x in (q, k, v, cache))
    return q, k, v, cache[0, :B], cache[1, :B], pos.to(DEVICE)


def check(args, live, backend, tol):
    """Output and the cache afterwards; what stands at and right of pos beforehand must not matter."""
    q, k, v, ck, cv, pos = args
    want = reference.decode_attention(*(x.double() for x in args[:5]), pos)
    before = [x.clone() for x in (ck, cv)]
    for b, n in enumerate(pos.tolist()):
        ck[b, :, n:], cv[b, :, n:] = 1e4, -1e4
    got = kernels.decode_attention(q, k, v, ck, cv, pos, live, backend=backend)
    assert got.dtype == q.dtype and got.shape == q.shape
    assert (got.double() - want).abs().max() <= tol
    for b, n in enumerate(pos.tolist()):
        for old, cache, new in zip(before, (ck, cv), (k, v)):
            assert torch.equal(cache[b, :, :n], old[b, :, :n]) and torch.equal(cache[b, :, n], new[b])
            assert (cache[b, :, n + 1 :].abs() == 1e4).all()


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 4), heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1), (20, 1)]),
    hd=st.sampled_from([6, 16, 24]), T=st.sampled_from([1, 15, 16, 17, 50, 130]),
    splits=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99), std=st.sampled_from([0.3, 3.0, 30.0]),
)  # fmt: skip
def test_kernel_is_the_oracle(B, heads, hd, T, splits, seed, std):
    """Ragged rows, grouped heads, odd sizes, splits without a single position, peaked and flat softmax."""
    with mock.patch.multiple(triton_decode, BLOCK_T=16, _splits=lambda *_: splits):
        check(operands(B, *heads, hd, T, seed, std), T, "triton", 2e-5 * max(1, std))


@pytest.mark.parametrize("splits", [1, 4])
def test_kernel_by_hand(splits):
    """One case of the above: three query heads share a key head, two tiles and a bit."""
    with mock.patch.multiple(triton_decode, BLOCK_T=16, _splits=lambda *_: splits):
        check(operands(3, 6, 2, 16, 40), 40, "triton", 2e-5)


def test_wide_heads_take_shorter_tiles():
    sizes = ((64, 2), (128, 2), (128, 4), (256, 4))
    assert [triton_decode._tile(*size) for size in sizes] == [64, 64, 32, 16]
    check(operands(2, 2, 1, 256, 70), 70, "triton", 1e-5)


@pytest.mark.parametrize("backend, dtype, tol", [
    ("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5), ("triton", torch.float32, 1e-5),
    ("triton", torch.bfloat16, 2e-2),
])  # fmt: skip
def test_both_backends(backend, dtype, tol):
    for heads in ((4, 4), (6, 2)):
        check(operands(5, *heads, 16, 40, dtype=dtype), 40, backend, tol)


def test_splits_keep_the_processors_busy():
    """Enough programs, no split below a tile, a power of two; the interpreter counts 4 processors."""
    device = torch.device("cpu")
    assert triton_decode._splits(16, 1024, device) == 1  # 4 a processor already
    assert triton_decode._splits(4, 1024, device) == 4
    assert triton_decode._splits(1, 128, device) == 2  # two tiles
    assert triton_decode._splits(1, 10**6, device) == 16


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from nanorlhf.kernels import triton_decode as td

def compile(kernel, warps, dtype, **flags):
    flags = {name: value for name, value in flags.items() if name in kernel.arg_names}
    kinds = dict.fromkeys("q k v cache_k cache_v out".split(), dtype) | {"pos": "*i64", "scale": "fp32"}
    kinds |= dict.fromkeys(("sums", "stats"), "*fp32")
    signature = {n: "constexpr" if n in flags else kinds.get(n, "i32") for n in kernel.arg_names}
    constants = {(i,): flags[n] for i, n in enumerate(kernel.arg_names) if n in flags}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n][0] == "*" or n in ("stride_b", "stride_h")}
    source, options = ASTSource(kernel, signature, constants, aligned), dict(num_warps=warps, num_stages=3)
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)

for dtype, KV, GROUP, HD, splits in (("bf16", 12, 1, 64, 1), ("bf16", 2, 6, 128, 8), ("fp32", 8, 1, 256, 1)):
    flags = dict(KV=KV, GROUP=GROUP, HD=HD, BLOCK_G=16, BLOCK_D=HD, SPLITS=splits)
    built = compile(td.decode, 4, "*" + dtype, BLOCK_T=td._tile(HD, int(dtype[2:]) // 8), **flags)
    assert built.metadata.shared <= 99 << 10  # what a program may have on a GeForce; on an H200, 227
    assert "mma.sync" in built.asm["ptx"] or dtype == "fp32"
    assert "cp.async.cg.shared.global" in built.asm["ptx"]  # 16 bytes at a time
compile(td.decode_merge, 1, "*bf16", HD=128, BLOCK_D=128, SPLITS=8)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.parametrize("arch", [80, 89, 90, 120])
def test_the_kernel_compiles_for_a_gpu(arch):
    """Without a GPU: with tensor cores and wide asynchronous loads, splits or none."""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ".", "HOME": "/tmp"}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_gpu
@pytest.mark.parametrize("heads, hd", [((12, 12), 64), ((12, 2), 128)])
def test_gpu_real_size(heads, hd):
    for B, T in ((64, 256), (256, 1024)):
        check(operands(B, *heads, hd, T, dtype=torch.bfloat16), T, "triton", 2e-2)
