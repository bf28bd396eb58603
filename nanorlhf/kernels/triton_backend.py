"""Log-prob, entropy and exact KL straight from hidden states: Triton kernels and library matmuls, on a GPU.

docs/kernels.md derives all of it for a reader who has never seen Triton. In short: a program owns BLOCK_N
rows and walks over the vocabulary, BLOCK_V columns at a time. A tile of logits lives in registers, in fp32,
and is folded there into a few numbers per row. The formulas, and the merging of these numbers, are those of
torch_backend.py.

There are two designs for the logits of a tile:
- "fused": the kernel multiplies x·wᵀ itself, and no logit ever leaves the chip;
- "stored": cuBLAS writes a bounded tile of fp32 logits to memory, and the same kernels read it.

The backward pass computes each tile again, writes ∂loss/∂logits into a bounded buffer and leaves the two
matmuls that follow to cuBLAS, which sums in fp32. There are no locks and no atomic sums: the order of every
sum follows from the shapes, the blocks and the number of processors alone. Recomputed tiles are the idea of
Cut Cross-Entropy (arXiv 2411.09009); it merges its log-sum-exps under locks, while these kernels store one
per slice, as verl's do.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from nanorlhf.kernels import torch_backend
from nanorlhf.kernels.torch_backend import gradient_sums, spans, view

ADDMM_FP32 = torch.__version__ >= (2, 10)  # before, out_dtype refused an fp32 summand (pytorch#167931)
DESIGN = None  # "fused" or "stored", set by tests and benchmarks; None: by shape, see design()
COLS = 8192  # columns of a tile in memory; its row stride is even, so that cuBLAS never meets an odd one
TILE_BYTES = 96 << 20  # of all tiles in memory together
STORED_BYTES = 1 << 30  # of logits and their gradients in LinearLoss; with fewer, dW is read too often
ROWS = 4096  # rows of a tile in memory, at most
WIDTH = 256  # a program's share of the vocabulary is a multiple of this; tuned BLOCK_Vs divide it


def _config(block_n, block_v, block_d, warps, stages):
    blocks = dict(BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d)
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _flags(config):
    """What a launch takes of a config. `all_kwargs` of Triton 3.2 has more, which its interpreter refuses."""
    return config.kwargs | dict(num_warps=config.num_warps, num_stages=config.num_stages)


SAFE = _config(64, 128, 32, 4, 3)  # fits every GPU; always taken where runs must be equal bit by bit
SAFE_KL = _config(64, 128, 32, 8, 3)  # two tiles of logits: four warps would spill registers on an A100
TUNED = [  # of log-probs; timed on the first call of at least 1,024 rows, once for each kernel, D and dtype
    SAFE,
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(64, 256, 64, 8, 3),
]
STORED = _config(4, 1024, 16, 8, 1)


# ------------------------------------------------------------------------------------------------------------
# The kernels. N rows; columns col0 ≤ v < end of the vocabulary; x (N, D) with row stride sx, w (V, D);
# `logits` (None in the fused design) and `out` hold the columns from col0 on, with row stride ld. scale is
# 1 / temperature. Names ending in 2, and r for z, are the reference's.


@triton.jit
def _order(col_blocks, N, BLOCK_N: tl.constexpr):
    """This program's rows (BLOCK_N,) and the number of its column block.

    Neighbouring programs take eight row blocks of one column block, then of the next: programs that run at
    the same time then share their tiles of x and w in the L2 cache.
    """
    pid = tl.program_id(0)
    group = pid // (8 * col_blocks)
    size = tl.minimum(tl.cdiv(N, BLOCK_N) - group * 8, 8)
    pid = pid % (8 * col_blocks)
    row_block = group * 8 + pid % size
    return row_block * BLOCK_N + tl.arange(0, BLOCK_N), pid // size


INTERPRETED = not isinstance(_order, triton.JITFunction)
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter computes bf16 wrongly, without a warning


@triton.jit
def _tile(
    x, w, bias, logits, rows, cols,
    N, sx, col0, end, ld, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 logits / temperature, (BLOCK_N, BLOCK_V); −inf in columns from `end` on."""
    # Past the edges the last row and column are read again: cheaper than a mask, and thrown away afterwards
    row = tl.minimum(rows, N - 1)[:, None].to(tl.int64)  # int64: N·V may pass 2³¹
    col = tl.minimum(cols, end - 1).to(tl.int64)
    if logits is not None:
        at = (cols - col0)[None, :]
        # Masked by ld, not by `end`: only a multiple of 16 lets the compiler load several numbers at a time
        z = tl.load(logits + row * ld + at, mask=at < ld, other=0.0)
    else:
        z = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
        k = tl.arange(0, BLOCK_D)
        a_ptr = x + row * sx + k[None, :]
        b_ptr = w + col[None, :] * D + k[:, None]
        for d in range(0, D, BLOCK_D):
            if D % BLOCK_D == 0:
                a = tl.load(a_ptr + d)
                b = tl.load(b_ptr + d)
            else:  # the last step is padded with zeros
                a = tl.load(a_ptr + d, mask=k[None, :] < D - d, other=0.0)
                b = tl.load(b_ptr + d, mask=k[:, None] < D - d, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")  # the default would be tf32, wrong by 1e-3
    if bias is not None:
        z += tl.load(bias + col).to(tl.float32)[None, :]
    return tl.where((cols < end)[None, :], z * scale, -float("inf"))


@triton.jit
def _raise(m, z):
    """Running maximum m and a tile z → the new maximum, z minus it, m minus it, and the exp of that.

    The last two correct older sums. While every logit so far is −inf nothing is subtracted.
    """
    top = tl.maximum(m, tl.max(z, 1))
    finite = tl.where(top == -float("inf"), 0.0, top)
    moved = tl.where(m == -float("inf"), 0.0, m - finite)
    return top, z - finite[:, None], moved, tl.exp(moved)


@triton.jit
def _column(values, rows, inside):
    """One number per row, as a column (BLOCK_N, 1)."""
    return tl.load(values + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def _store(out, dz, rows, cols, inside, col0, ld):
    """Write a tile of ∂loss/∂(x·wᵀ) to the buffer `out`; columns from `end` up to ld are written too."""
    row = rows[:, None].to(tl.int64)
    at = (cols - col0)[None, :]
    mask = inside[:, None] & (at < ld)
    tl.store(out + row * ld + at, dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def logprob_forward(
    x, w, bias, logits, targets, stats,
    N, sx, col0, end, ld, width, n_all, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Folds slices of `width` columns into stats (slices, 4, n_all), as torch_backend._fold does.

    The four: maximum m, Σ exp(z−m), Σ exp(z−m)·(z−m), the target's z (0 where it is in another slice).
    """
    slices = tl.cdiv(end - col0, width)
    rows, slice = _order(slices, N, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    zeros = tl.zeros((BLOCK_N,), dtype=tl.float32)
    m = zeros - float("inf")
    s = zeros
    t = zeros
    y = zeros
    start = col0 + slice * width
    stop = tl.minimum(start + width, end)
    for v in range(start, stop, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        z = _tile(
            x, w, bias, logits, rows, cols,
            N, sx, col0, end, ld, scale, D, BLOCK_D,
        )  # fmt: skip
        at_target = cols[None, :] == target[:, None]
        y += tl.sum(tl.where(at_target, z, 0.0), 1)
        m, z, moved, factor = _raise(m, z)
        e = tl.exp(z)
        weighted = e * tl.where(e > 0, z, 0.0)
        t = factor * (t + s * moved) + tl.sum(weighted, 1)
        s = factor * s + tl.sum(e, 1)
    out = stats + slice.to(tl.int64) * 4 * n_all + rows
    tl.store(out, m, mask=inside)
    tl.store(out + n_all, s, mask=inside)
    tl.store(out + 2 * n_all, t, mask=inside)
    tl.store(out + 3 * n_all, y, mask=inside)


@triton.jit
def logprob_backward(
    x, w, bias, logits, targets, lse, entropy, g, h, out,
    N, sx, col0, end, ld, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, v − col0] = ∂loss/∂(x·wᵀ)[n, v], given ∂loss/∂logp = g and ∂loss/∂entropy = h."""
    col_blocks = tl.cdiv(end - col0, BLOCK_V)
    rows, col_block = _order(col_blocks, N, BLOCK_N)
    cols = col0 + col_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = rows < N
    z = _tile(
        x, w, bias, logits, rows, cols,
        N, sx, col0, end, ld, scale, D, BLOCK_D,
    )  # fmt: skip
    logp = z - _column(lse, rows, inside)
    p = tl.exp(logp)
    up = _column(g, rows, inside)
    up_entropy = _column(h, rows, inside)
    finite = tl.where(p > 0, logp, 0.0)
    dz = -p * (up + up_entropy * (finite + _column(entropy, rows, inside)))
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    at_target = cols[None, :] == target[:, None]
    dz = scale * tl.where(at_target, dz + up, dz)
    _store(out, dz, rows, cols, inside, col0, ld)


@triton.jit
def kl_forward(
    x, w, bias, logits,
    x2, w2, bias2, logits2, stats,
    N, sx, sx2, col0, end, ld, width, n_all, scale,
    D: tl.constexpr, D2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Folds slices of `width` columns into stats (slices, 5, n_all) for KL(z‖r), as torch_backend._fold_kl.

    z comes from x·wᵀ and r from x2·w2ᵀ. The five: maximum m of z, Σ exp(z−m), Σ exp(z−m)·((z−m) − (r−m')),
    maximum m' of r, Σ exp(r−m').
    """
    slices = tl.cdiv(end - col0, width)
    rows, slice = _order(slices, N, BLOCK_N)
    inside = rows < N
    zeros = tl.zeros((BLOCK_N,), dtype=tl.float32)
    m = zeros - float("inf")
    m2 = m
    s = zeros
    s2 = zeros
    u = zeros
    start = col0 + slice * width
    stop = tl.minimum(start + width, end)
    for v in range(start, stop, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        z = _tile(
            x, w, bias, logits, rows, cols,
            N, sx, col0, end, ld, scale, D, BLOCK_D,
        )  # fmt: skip
        r = _tile(
            x2, w2, bias2, logits2, rows, cols,
            N, sx2, col0, end, ld, scale, D2, BLOCK_D,
        )  # fmt: skip
        m, z, moved, factor = _raise(m, z)
        m2, r, moved2, factor2 = _raise(m2, r)
        e = tl.exp(z)
        older = factor * (u + s * (moved - moved2))
        weighted = e * tl.where(e > 0, z - r, 0.0)
        u = tl.where(factor * s > 0, older, 0.0) + tl.sum(weighted, 1)
        s = factor * s + tl.sum(e, 1)
        s2 = factor2 * s2 + tl.sum(tl.exp(r), 1)
    out = stats + slice.to(tl.int64) * 5 * n_all + rows
    tl.store(out, m, mask=inside)
    tl.store(out + n_all, s, mask=inside)
    tl.store(out + 2 * n_all, u, mask=inside)
    tl.store(out + 3 * n_all, m2, mask=inside)
    tl.store(out + 4 * n_all, s2, mask=inside)


@triton.jit
def kl_backward(
    x, w, bias, logits,
    x2, w2, bias2, logits2, lse, lse2, kl, g, out,
    N, sx, sx2, col0, end, ld, scale,
    D: tl.constexpr, D2: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, v − col0] = ∂loss/∂(x·wᵀ)[n, v], given ∂loss/∂KL(z‖r) = g; with REVERSE ∂loss/∂KL(r‖z) = g."""
    col_blocks = tl.cdiv(end - col0, BLOCK_V)
    rows, col_block = _order(col_blocks, N, BLOCK_N)
    cols = col0 + col_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = rows < N
    z = _tile(
        x, w, bias, logits, rows, cols,
        N, sx, col0, end, ld, scale, D, BLOCK_D,
    )  # fmt: skip
    r = _tile(
        x2, w2, bias2, logits2, rows, cols,
        N, sx2, col0, end, ld, scale, D2, BLOCK_D,
    )  # fmt: skip
    logp = z - _column(lse, rows, inside)
    logq = r - _column(lse2, rows, inside)
    p = tl.exp(logp)
    if REVERSE:
        dz = p - tl.exp(logq)
    else:
        dz = p * (tl.where(p > 0, logp - logq, 0.0) - _column(kl, rows, inside))
    dz *= scale * _column(g, rows, inside)
    _store(out, dz, rows, cols, inside, col0, ld)


# ------------------------------------------------------------------------------------------------------------
# Around the kernels. `models`: a list of (hidden, weight, bias), of the policy, or of policy and reference;
# `per_row`: a list of (N,) tensors; r, c: the slices of rows and columns of a tile.


def design(models):
    """Which design serves these widths and dtypes; the table behind the rule is in docs/kernels.md."""
    if DESIGN is not None:
        return DESIGN
    for hidden, _, _ in models:
        if hidden.shape[1] > 1024 or hidden.dtype == torch.float32:
            return "stored"
    return "fused"


@functools.cache
def _tuned(kernel):
    return triton.autotune(TUNED, key=["D"])(kernel)


def _launch(kernel, models, logits, per_row, out, r, c, ld, scale, width=None, **flags):
    """Run a kernel over rows r and columns c.

    logits: a tile per model, or None in the fused design. width: the columns that a program of a forward
    kernel takes; None in backward kernels, where a program takes BLOCK_V columns.
    """
    n = r.stop - r.start
    args = []
    for i, (x, w, bias) in enumerate(models):
        args += [x[r], w, bias, logits[i] if logits else None]
        flags["D2" if i else "D"] = x.shape[1]
    args += [values[r] for values in per_row]
    args += [out, n]
    args += [x.stride(0) for x, _, _ in models]
    args += [c.start, c.stop, ld]
    if width is not None:
        args += [width, out.stride(-2)]
    args.append(scale)

    deterministic = torch.are_deterministic_algorithms_enabled()  # tuning would depend on a stopwatch
    fixed = n < 1024 or INTERPRETED or deterministic
    if logits:
        flags |= _flags(STORED)
    elif len(models) > 1:
        flags |= _flags(SAFE_KL)
    elif fixed or models[0][0].dtype == torch.float32:  # the tuned blocks would take 288 KiB of fp32
        flags |= _flags(SAFE)
    else:
        kernel = _tuned(kernel)

    def grid(meta):
        row_blocks = triton.cdiv(n, meta["BLOCK_N"])
        col_blocks = triton.cdiv(c.stop - c.start, width or meta["BLOCK_V"])
        return (row_blocks * col_blocks,)

    with torch.cuda.device_of(out):
        kernel[grid](*args, **flags)


def _tiles(models, dz_bytes, stored):
    """Row slices and column slices of the tiles in memory, and the tiles' row stride.

    dz_bytes: bytes of a gradient, 0 in the forward pass. stored: the logits are in memory, too.
    """
    hidden, weight, _ = models[0]
    V = len(weight)
    ld = WIDTH * triton.cdiv(V, WIDTH * triton.cdiv(V, COLS))
    logit_bytes = 4 * len(models) if stored else 0
    rows = min(ROWS, TILE_BYTES // (ld * (dz_bytes + logit_bytes)))
    rows = 1 << (rows.bit_length() - 1)  # rounded down to a power of two
    if not stored:  # in the stored design cuBLAS multiplies, and its programs are its own affair
        ld = _columns(V, min(len(hidden), rows), _processors(hidden.device))
    return spans(len(hidden), rows), spans(V, ld), ld


def _columns(V, n, processors):
    """Columns of a tile of n rows, about COLS of them, with which the rounds of programs are fullest.

    A program takes 128 rows × WIDTH columns, and each processor has one at a time. 4,096 × 7,424 are 928
    programs, 7.03 rounds on the 132 processors of an H200; 4,096 × 8,448 are exactly 8.
    """
    row_blocks = triton.cdiv(n, 128)
    col_blocks = triton.cdiv(V, WIDTH)

    def time(width):
        """Rounds of all tiles that are `width` blocks wide; where these are equal, the number of tiles."""
        tiles, rest = divmod(col_blocks, width)
        rounds = tiles * triton.cdiv(row_blocks * width, processors)
        rounds += triton.cdiv(row_blocks * rest, processors)
        return rounds, tiles

    most = COLS // WIDTH
    width = min(range(3 * most // 4, 5 * most // 4 + 1), key=time)
    return WIDTH * min(width, col_blocks)


def _slices(N, V, device):
    """Columns of a program's slice of the vocabulary, so that N × V tiles keep all processors busy.

    With many rows one program walks the whole vocabulary; with few rows several share it. The number of
    slices is the one with the least time, counted in tiles: rounds of programs × tiles of a slice.
    """
    processors = _processors(device)
    row_blocks = triton.cdiv(N, 128)
    tiles = triton.cdiv(V, WIDTH)

    def time(slices):
        rounds = triton.cdiv(row_blocks * slices, processors)
        return rounds * triton.cdiv(tiles, slices)

    slices = min(range(1, min(tiles, 32) + 1), key=time)
    return WIDTH * triton.cdiv(tiles, slices)


def _processors(device):
    """Multiprocessors of a GPU; 4 under the interpreter, so that tests see more than one slice."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fp32_out(a, b):
    """Whether this torch multiplies 16-bit matrices into fp32 without rounding: 2.8 and later, on CUDA."""
    return a.is_cuda and a.dtype == b.dtype != torch.float32 and "dtype" in torch.ops.aten.mm.overloads()


def _matmul(a, b, out):
    """out = a·b, summed and kept in fp32."""
    if _fp32_out(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _add_matmul(out, a, b):
    """out += a·b, in fp32: summed in bf16, small gradients would be lost."""
    if not _fp32_out(a, b):
        out.addmm_(a.float(), b.float())
    elif ADDMM_FP32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)


def _buffers(models, rows, ld, dtype=torch.float32):
    """A buffer for each model, large enough for a tile of any of these row slices."""
    n = rows[0].stop if rows else 0
    return models[0][0].new_empty((len(models), n, ld), dtype=dtype)


def _stored_logits(models, buffers, r, c):
    """Write the logits of a tile of each model to its buffer → the written parts; None without buffers."""
    if buffers is None:
        return None
    logits = []
    for (x, w, _), buffer in zip(models, buffers):
        logits.append(_matmul(x[r], w[c].T, view(buffer, r, c)))
    return logits


def _fold(kernel, fields, models, per_row, scale):
    """The forward kernel over all rows and columns → its statistics (slices, fields, N)."""
    x, w, _ = models[0]
    N = len(x)
    V = len(w)
    buffers = None
    if design(models) == "stored":
        rows, cols, ld = _tiles(models, 0, stored=True)
        buffers = _buffers(models, rows, ld)
        width = ld
    else:
        rows = spans(N, max(N, 1))  # all at once; with no rows there is nothing to launch
        cols = [slice(0, V)]
        ld = 0
        width = _slices(N, V, x.device)
    stats = x.new_empty((triton.cdiv(V, width), fields, N), dtype=torch.float32)
    for r in rows:
        for i, c in enumerate(cols):
            logits = _stored_logits(models, buffers, r, c)
            out = stats[i:, :, r.start :]
            _launch(kernel, models, logits, per_row, out, r, c, ld, scale, width)
    return stats


def _gradients(kernel, models, per_row, scale, needs, **flags):
    """Gradients of the policy's hidden, weight and bias; None where `needs` does not ask for one."""
    x, w, bias = models[0]
    dx = torch.zeros_like(x) if needs[0] else None
    dw, db = gradient_sums((w, bias), needs[1:])
    dtype = _dlogits_dtype(x)
    stored = design(models) == "stored"
    rows, cols, ld = _tiles(models, dtype.itemsize, stored)
    buffers = _buffers(models, rows, ld) if stored else None
    out = _buffers(models[:1], rows, ld, dtype)[0]
    for r in rows:
        dx_rows = gradient_sums([x[r]], needs)[0]  # in fp32 for these rows only, as there may be many
        for c in cols:
            logits = _stored_logits(models, buffers, r, c)
            _launch(kernel, models, logits, per_row, out, r, c, ld, scale, **flags)
            _add(dx_rows, dw, db, out, models[0], r, c)
        if dx is not None:
            dx[r] = dx_rows
    return dx, dw, db


def _dlogits_dtype(x):
    """bf16 for bf16 operands, else fp32: in fp16 small gradients vanish."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _add(dx_rows, dw, db, out, model, r, c):
    """Add what a tile's ∂loss/∂(x·wᵀ), in the buffer `out`, gives to the gradients, fp32 or None."""
    x, w, _ = model
    dz = view(out, r, c)
    if dx_rows is not None:
        _add_matmul(dx_rows, dz, w[c])
    if dw is not None:
        _add_matmul(dw[c], dz.T, x[r])
    if db is not None:
        db[c] += dz.sum(0, dtype=torch.float32)


def _operands(hidden, weight, bias):
    """(x, w, bias) of the same dtype, with the D numbers of a row side by side; other views are copied."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    x = hidden.to(dtype)
    w = weight.to(dtype).contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, w, None if bias is None else bias.contiguous()


class LinearLogprob(torch.autograd.Function):
    """As torch_backend.LinearLogprob."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        targets = targets.contiguous()
        models = [_operands(hidden, weight, bias)]
        stats = _fold(logprob_forward, 4, models, [targets], 1 / temperature)
        logp, entropy, lse = torch_backend.merge(stats)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        models = [_operands(hidden, weight, bias)]
        per_row = [targets, lse, entropy, g.contiguous(), h.contiguous()]
        grads = _gradients(logprob_backward, models, per_row, 1 / ctx.temperature, ctx.needs_input_grad)
        return (*grads, None, None)


class LinearLoss(torch_backend.LinearLoss):
    """As torch_backend.LinearLoss, whose `backward` it inherits; a tile is all columns of a chunk of rows.

    Always in the stored design, as the logits must wait for the loss.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, loss):
        N = len(hidden)
        V = len(weight)
        scale = 1 / temperature
        targets = targets.contiguous()
        models = [_operands(hidden, weight, bias)]
        logp, entropy, lse, g, h = hidden.new_empty((5, N), dtype=torch.float32)
        total = logp.new_zeros(())
        chunk_stats = []
        dx, dw, db = gradient_sums(models[0], ctx.needs_input_grad)
        dtype = _dlogits_dtype(models[0][0])
        cols = slice(0, V)
        ld = WIDTH * triton.cdiv(V, WIDTH)
        n = max(1, min(N, ROWS, STORED_BYTES // (ld * (4 + dtype.itemsize))))
        rows = spans(N, n)
        buffers = _buffers(models, rows, ld)
        out = buffers[0]  # in place: a program reads the very numbers that it overwrites
        if dtype != torch.float32:
            out = _buffers(models, rows, ld, dtype)[0]
        folded = hidden.new_empty((triton.cdiv(V, COLS), 4, N), dtype=torch.float32)
        for r in rows:
            logits = _stored_logits(models, buffers, r, cols)
            of_rows = folded[:, :, r.start :]
            _launch(logprob_forward, models, logits, [targets], of_rows, r, cols, ld, scale, COLS)
            logp[r], entropy[r], lse[r] = torch_backend.merge(folded[:, :, r])
            value, stats, g[r], h[r] = torch_backend.differentiate(loss, logp[r], entropy[r], r)
            total += value
            chunk_stats.append(stats)
            per_row = [targets, lse, entropy, g, h]
            _launch(logprob_backward, models, logits, per_row, out, r, cols, ld, scale)
            dx_rows = None if dx is None else dx[r]
            _add(dx_rows, dw, db, out, models[0], r, cols)
        ctx.grads = [dx, dw, db]
        ctx.mark_non_differentiable(logp, entropy)
        return total, torch_backend.stack_stats(chunk_stats), logp, entropy


class LinearKL(torch.autograd.Function):
    """As torch_backend.LinearKL."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        policy = _operands(hidden, weight, bias)
        reference = _operands(ref_hidden, ref_weight, ref_bias)
        models = [reference, policy] if reverse else [policy, reference]
        stats = _fold(kl_forward, 5, models, [], 1 / temperature)
        kl, lse, lse_ref = torch_backend.merge_kl(stats)
        if reverse:  # then merge_kl's first model is the reference
            lse, lse_ref = lse_ref, lse
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref)
        ctx.temperature = temperature
        ctx.reverse = reverse
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref = ctx.saved_tensors
        models = [_operands(hidden, weight, bias), _operands(ref_hidden, ref_weight, ref_bias)]
        per_row = [lse, lse_ref, kl, g.contiguous()]
        grads = _gradients(
            kl_backward, models, per_row, 1 / ctx.temperature, ctx.needs_input_grad, REVERSE=ctx.reverse
        )
        return (*grads, None, None, None, None, None)
