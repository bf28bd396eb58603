"""Log-prob, entropy and exact KL straight from hidden states: Triton kernels and library matmuls, on a GPU.

docs/kernels.md derives all of it for a reader who has never seen Triton. In short: a program owns BLOCK_N
rows and walks over the vocabulary, BLOCK_V columns at a time. A tile of logits lives in registers, in fp32,
and leaves them as a few numbers per row. The formulas stand in torch_backend.py, which also merges those.

The logits of a tile come about in one of two designs:
- "fused": the kernel multiplies x·wᵀ itself, and no logit ever leaves the chip;
- "stored": cuBLAS writes a bounded tile of fp32 logits, which the same kernels then read.

The backward pass computes each tile again, writes ∂loss/∂logits into a bounded buffer and leaves the two
matmuls that follow to cuBLAS, which sums in fp32. There are no locks and no atomic sums: the order of every
sum follows from the shapes and the blocks alone. Recomputed tiles are the idea of Cut Cross-Entropy (arXiv
2411.09009); it merges its log-sum-exps under locks, where these kernels store one per slice, as verl's do.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from nanorlhf.kernels import torch_backend
from nanorlhf.kernels.torch_backend import differentiate, hand_over, like, merge, merge_kl, spans

ADDMM_FP32 = torch.__version__ >= (2, 10)  # before, out_dtype refused an fp32 summand (pytorch#167931)
DESIGN = None  # "fused" or "stored" by hand; None: by shape, see design()
COLS = 8192  # columns of a tile in memory. Its row stride is even, so no odd vocabulary reaches cuBLAS
TILE_BYTES = 96 << 20  # all tiles in memory together
STORED_BYTES = 1 << 30  # logits and their gradients in LinearLoss: fewer rows, and dW is read too often
ROWS = 4096  # rows of a tile in memory, at most
WIDTH = 256  # the vocabulary is dealt out to programs in multiples of this; tuned BLOCK_Vs divide it


def _config(block_n, block_v, block_d, warps, stages):
    blocks = dict(BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_D=block_d)
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


SAFE = _config(64, 128, 32, 4, 3)  # fits every GPU; the choice where runs must be equal bit by bit
TUNED = [  # timed on the first call of at least 1,024 rows, once for each kernel, D and dtype
    SAFE,
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(64, 256, 64, 8, 3),
]
TUNED_KL = [  # two tiles of logits at once: half the size, or they do not fit the registers
    SAFE,
    _config(128, 128, 64, 8, 3),
    _config(64, 256, 64, 8, 3),
    _config(64, 128, 64, 4, 3),
]
STORED = _config(4, 1024, 16, 8, 1)


# ------------------------------------------------------------------------------------------------------------
# the kernels. N rows; columns col0 ≤ v < end of the vocabulary; x (N, D), w (·, D) with row strides sx, sw;
# `logits` (None in the fused design) and `out` hold the columns from col0 on, with row stride ld.


@triton.jit
def _order(col_blocks, row_blocks):
    """This program's row block and column block. Eight row blocks take turns: programs that run at the same
    time then share their tiles of x and w in the L2 cache."""
    pid = tl.program_id(0)
    group = pid // (8 * col_blocks)
    size = tl.minimum(row_blocks - group * 8, 8)
    pid = pid % (8 * col_blocks)
    return group * 8 + pid % size, pid // size


INTERPRETED = not isinstance(_order, triton.JITFunction)
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's bf16 arithmetic is wrong without a warning


@triton.jit
def _tile(x, w, bias, logits, rows, cols, N, sx, sw, col0, end, ld, scale, D: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 logits / temperature, (BLOCK_N, BLOCK_V); −inf in columns from `end` on."""
    # Past the edges the last row and column are read again: cheaper than a mask, and thrown away afterwards.
    row = tl.minimum(rows, N - 1)[:, None].to(tl.int64)  # int64: N·V may pass 2³¹
    col = tl.minimum(cols, end - 1).to(tl.int64)
    if logits is not None:  # masked by ld, not by `end`: only a multiple of 16 keeps the loads wide
        z = tl.load(logits + row * ld + (cols - col0)[None, :], mask=(cols - col0 < ld)[None, :], other=0.0)
    else:
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        k = tl.arange(0, BLOCK_D)
        a_ptr = x + row * sx + k[None, :]
        b_ptr = w + col[None, :] * sw + k[:, None]
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
    """Running maximum m and a tile z → the new maximum, z without it, how far it moved, its factor for older
    sums. While every logit so far is −inf nothing is subtracted, and the older sums are 0."""
    top = tl.maximum(m, tl.max(z, 1))
    finite = tl.where(top == -float("inf"), 0.0, top)
    moved = tl.where(m == -float("inf"), 0.0, m - finite)
    return top, z - finite[:, None], moved, tl.exp(moved)


@triton.jit
def logprob_forward(x, w, bias, logits, targets, stats, N, sx, sw, col0, end, ld, width, n_all, scale,
                    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Folds `width` columns into stats (slices, 4, n_all): the maximum m, Σ exp(z−m), Σ exp(z−m)·(z−m), and
    the target's z (0 where the target is in another slice)."""
    row_block, slice = _order(tl.cdiv(end - col0, width), tl.cdiv(N, BLOCK_N))
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    t = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    start = col0 + slice * width
    for v in range(start, tl.minimum(start + width, end), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        z = _tile(x, w, bias, logits, rows, cols, N, sx, sw, col0, end, ld, scale, D,
                  BLOCK_N, BLOCK_V, BLOCK_D)
        y += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        m, z, moved, factor = _raise(m, z)
        e = tl.exp(z)
        t = factor * (t + s * moved) + tl.sum(e * tl.where(e > 0, z, 0.0), 1)
        s = factor * s + tl.sum(e, 1)
    out = stats + slice.to(tl.int64) * 4 * n_all + rows
    tl.store(out, m, mask=inside)
    tl.store(out + n_all, s, mask=inside)
    tl.store(out + 2 * n_all, t, mask=inside)
    tl.store(out + 3 * n_all, y, mask=inside)


@triton.jit
def logprob_backward(x, w, bias, logits, targets, lse, entropy, g, h, out, N, sx, sw, col0, end, ld, scale,
                     D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[n, v − col0] = ∂loss/∂(x·wᵀ)[n, v], given ∂loss/∂logp = g and ∂loss/∂entropy = h."""
    row_block, col_block = _order(tl.cdiv(end - col0, BLOCK_V), tl.cdiv(N, BLOCK_N))
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col0 + col_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = rows < N
    z = _tile(x, w, bias, logits, rows, cols, N, sx, sw, col0, end, ld, scale, D,
              BLOCK_N, BLOCK_V, BLOCK_D)
    logp = z - tl.load(lse + rows, mask=inside, other=0.0)[:, None]
    p = tl.exp(logp)
    up = tl.load(g + rows, mask=inside, other=0.0)[:, None]
    up_entropy = tl.load(h + rows, mask=inside, other=0.0)[:, None]
    ent = tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
    dz = -p * (up + up_entropy * (tl.where(p > 0, logp, 0.0) + ent))
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)[:, None]
    dz = scale * tl.where(cols[None, :] == target, dz + up, dz)
    at = out + rows[:, None].to(tl.int64) * ld + (cols - col0)[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=inside[:, None] & (cols - col0 < ld)[None, :])


@triton.jit
def kl_forward(x, w, bias, logits, x2, w2, bias2, logits2, stats, N, sx, sw, sx2, sw2, col0, end, ld, width,
               n_all, scale, D: tl.constexpr, D2: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """For KL(z‖r), z from x·wᵀ and r from x2·w2ᵀ: folds `width` columns into stats (slices, 5, n_all): m and
    Σ exp(z−m), then Σ exp(z−m)·((z−m) − (r−m')), then m' and Σ exp(r−m')."""
    row_block, slice = _order(tl.cdiv(end - col0, width), tl.cdiv(N, BLOCK_N))
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    m = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    m2 = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    u = tl.zeros((BLOCK_N,), dtype=tl.float32)
    start = col0 + slice * width
    for v in range(start, tl.minimum(start + width, end), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        z = _tile(x, w, bias, logits, rows, cols, N, sx, sw, col0, end, ld, scale, D,
                  BLOCK_N, BLOCK_V, BLOCK_D)
        r = _tile(x2, w2, bias2, logits2, rows, cols, N, sx2, sw2, col0, end, ld, scale, D2,
                  BLOCK_N, BLOCK_V, BLOCK_D)
        m, z, moved, factor = _raise(m, z)
        m2, r, moved2, factor2 = _raise(m2, r)
        e = tl.exp(z)
        older = tl.where(factor * s > 0, factor * (u + s * (moved - moved2)), 0.0)
        u = older + tl.sum(e * tl.where(e > 0, z - r, 0.0), 1)
        s = factor * s + tl.sum(e, 1)
        s2 = factor2 * s2 + tl.sum(tl.exp(r), 1)
    out = stats + slice.to(tl.int64) * 5 * n_all + rows
    tl.store(out, m, mask=inside)
    tl.store(out + n_all, s, mask=inside)
    tl.store(out + 2 * n_all, u, mask=inside)
    tl.store(out + 3 * n_all, m2, mask=inside)
    tl.store(out + 4 * n_all, s2, mask=inside)


@triton.jit
def kl_backward(x, w, bias, logits, x2, w2, bias2, logits2, lse, lse2, kl, g, out, N, sx, sw, sx2, sw2, col0,
                end, ld, scale, D: tl.constexpr, D2: tl.constexpr, REVERSE: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[n, v − col0] = ∂loss/∂(x·wᵀ)[n, v], given ∂loss/∂KL(z‖r) = g; with REVERSE ∂loss/∂KL(r‖z) = g."""
    row_block, col_block = _order(tl.cdiv(end - col0, BLOCK_V), tl.cdiv(N, BLOCK_N))
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col0 + col_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = rows < N
    z = _tile(x, w, bias, logits, rows, cols, N, sx, sw, col0, end, ld, scale, D,
              BLOCK_N, BLOCK_V, BLOCK_D)
    r = _tile(x2, w2, bias2, logits2, rows, cols, N, sx2, sw2, col0, end, ld, scale, D2,
              BLOCK_N, BLOCK_V, BLOCK_D)
    logp = z - tl.load(lse + rows, mask=inside, other=0.0)[:, None]
    logq = r - tl.load(lse2 + rows, mask=inside, other=0.0)[:, None]
    p = tl.exp(logp)
    if REVERSE:
        dz = p - tl.exp(logq)
    else:
        dz = p * (tl.where(p > 0, logp - logq, 0.0) - tl.load(kl + rows, mask=inside, other=0.0)[:, None])
    dz *= scale * tl.load(g + rows, mask=inside, other=0.0)[:, None]
    at = out + rows[:, None].to(tl.int64) * ld + (cols - col0)[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=inside[:, None] & (cols - col0 < ld)[None, :])


# ------------------------------------------------------------------------------------------------------------
# around the kernels. `models`: [(hidden, weight, bias)] of the policy or of both; `per_row`: (N,) tensors.


def design(models):
    """Which design serves these widths and dtypes; the table behind the rule is in docs/kernels.md."""
    small = all(x.shape[1] <= 1024 and x.dtype != torch.float32 for x, _, _ in models)
    return DESIGN or ("fused" if small else "stored")


@functools.cache
def _tuned(kernel):
    return triton.autotune(TUNED if "logprob" in kernel.__name__ else TUNED_KL, key=["D"])(kernel)


def _launch(kernel, models, logits, per_row, out, r, c, ld, scale, width=None, n_all=None, **flags):
    """Run a kernel over rows r and columns c; `width` columns a program in a forward kernel, BLOCK_V else."""
    n = r.stop - r.start
    config = STORED if logits else SAFE
    fixed = INTERPRETED or torch.are_deterministic_algorithms_enabled()  # tuning depends on a stopwatch
    tuned = not logits and not fixed and n >= 1024
    args = [a for (x, w, bias), z in zip(models, logits or (None, None)) for a in (x[r], w, bias, z)]
    args += [a[r] for a in per_row] + [out, n]
    args += [stride for x, w, _ in models for stride in (x.stride(0), w.stride(0))]
    args += [c.start, c.stop, ld] + ([width, n_all] if width else []) + [scale]
    flags |= {name: x.shape[1] for name, (x, _, _) in zip(("D", "D2"), models)}
    if not tuned:
        flags |= config.all_kwargs()

    def grid(meta):
        return (triton.cdiv(n, meta["BLOCK_N"]) * triton.cdiv(c.stop - c.start, width or meta["BLOCK_V"]),)

    with torch.cuda.device_of(out):
        (_tuned(kernel) if tuned else kernel)[grid](*args, **flags)


def _tiles(models, dz_bytes, stored):
    """Row slices and column slices of the tiles in memory, and the tiles' row stride."""
    N, V = len(models[0][0]), len(models[0][1])
    ld = WIDTH * triton.cdiv(V, WIDTH * triton.cdiv(V, COLS))
    rows = min(ROWS, TILE_BYTES // (ld * (dz_bytes + (4 * len(models) if stored else 0))))
    return spans(N, 1 << (rows.bit_length() - 1)), spans(V, ld), ld


def _slices(N, V, device):
    """Columns of a program's slice of the vocabulary: that by which N × V tiles keep all processors busy.

    One program walks the whole vocabulary where there are rows enough; otherwise more share it. The time, in
    tiles, is rounds of programs × tiles of a slice.
    """
    gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 4
    rows, tiles = triton.cdiv(N, 128), triton.cdiv(V, WIDTH)
    count = min(range(1, min(tiles, 32) + 1),
                key=lambda s: triton.cdiv(rows * s, processors) * triton.cdiv(tiles, s))
    return WIDTH * triton.cdiv(tiles, count)


def _fp32_out(a, b):
    """Whether this torch multiplies 16-bit matrices into fp32 without rounding: 2.8 and later, on CUDA."""
    return a.is_cuda and a.dtype == b.dtype != torch.float32 and "dtype" in torch.ops.aten.mm.overloads()


def _matmul(a, b, out):
    """out = a·b, summed and kept in fp32."""
    if _fp32_out(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _add_matmul(out, a, b):
    """out += a·b, in fp32: gradients summed in bf16 lose what is small."""
    if not _fp32_out(a, b):
        out.addmm_(a.float(), b.float())
    elif ADDMM_FP32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)


def _stored_logits(models, buffers, r, c):
    return [_matmul(x[r], w[c].T, z[: r.stop - r.start, : c.stop - c.start])
            for (x, w, _), z in zip(models, buffers)]


def _fold(kernel, fields, models, per_row, scale):
    """The forward kernel over all rows and columns → its statistics (slices, fields, N)."""
    x, w, _ = models[0]
    N, V = len(x), len(w)
    if design(models) == "fused":
        width = _slices(N, V, x.device)
        stats = x.new_empty((triton.cdiv(V, width), fields, N), dtype=torch.float32)
        _launch(kernel, models, None, per_row, stats, slice(0, N), slice(0, V), 0, scale, width, N)
        return stats
    rows, cols, ld = _tiles(models, 0, stored=True)
    stats = x.new_empty((len(cols), fields, N), dtype=torch.float32)
    buffers = x.new_empty((len(models), rows[0].stop, ld), dtype=torch.float32)
    for r in rows:
        for i, c in enumerate(cols):
            logits = _stored_logits(models, buffers, r, c)
            _launch(kernel, models, logits, per_row, stats[i, :, r.start :], r, c, ld, scale, ld, N)
    return stats


def _gradients(kernel, models, per_row, scale, needs, **flags):
    """Gradients of the policy's hidden, weight and bias, those that `needs` asks for; else None."""
    x, w, bias = models[0]
    stored = design(models) == "stored"
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # in fp16 small gradients vanish
    dx, dw, db = (None if t is None or not need else torch.zeros_like(t, dtype=d) for t, need, d in
                  zip((x, w, bias), needs, (x.dtype, torch.float32, torch.float32)))
    if not len(x):
        return dx, dw, db
    rows, cols, ld = _tiles(models, dtype.itemsize, stored)
    buffers = x.new_empty((len(models), rows[0].stop, ld), dtype=torch.float32) if stored else None
    out = x.new_empty((rows[0].stop, ld), dtype=dtype)
    for r in rows:
        if dx is not None:
            total = x.new_zeros((r.stop - r.start, x.shape[1]), dtype=torch.float32)
        for c in cols:
            logits = _stored_logits(models, buffers, r, c) if stored else None
            _launch(kernel, models, logits, per_row, out, r, c, ld, scale, **flags)
            _add((total if dx is not None else None, dw, db), out, models[0], r, c)
        if dx is not None:
            dx[r] = total
    return dx, dw, db


def _add(grads, out, model, r, c):
    """∂loss/∂(x·wᵀ) of a tile, added to the gradients: (dx of these rows, dw, db), in fp32, or None."""
    (dx, dw, db), (x, w, _), dz = grads, model, out[: r.stop - r.start, : c.stop - c.start]
    if dx is not None:
        _add_matmul(dx, dz, w[c])
    if dw is not None:
        _add_matmul(dw[c], dz.T, x[r])
    if db is not None:
        db[c] += dz.sum(0, dtype=torch.float32)


def _operands(hidden, weight, bias):
    """Same dtype, and the D numbers of a row side by side; a view that is neither is copied."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    x, w = (t.to(dtype) for t in (hidden, weight))
    x, w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
    return x, w, None if bias is None else bias.contiguous()


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        targets = targets.contiguous()
        if len(hidden):
            stats = _fold(logprob_forward, 4, [_operands(hidden, weight, bias)], (targets,), 1 / temperature)
            logp, entropy, lse = merge(stats)
        else:
            logp, entropy, lse = hidden.new_empty((3, 0), dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        per_row = targets, lse, entropy, g.contiguous(), h.contiguous()
        models = [_operands(hidden, weight, bias)]
        grads = _gradients(logprob_backward, models, per_row, 1 / ctx.temperature, ctx.needs_input_grad)
        return *like(grads, (hidden, weight, bias)), None, None


class LinearLoss(torch_backend.LinearLoss):
    """In the stored design, and one tile is all columns of a chunk of rows. `backward` is inherited."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, loss):
        N, V, scale, targets = len(hidden), len(weight), 1 / temperature, targets.contiguous()
        logp, entropy, lse, g, h = hidden.new_empty((5, N), dtype=torch.float32)
        total, inputs = logp.new_zeros(()), (hidden, weight, bias)
        grads = [torch.zeros_like(x, dtype=torch.float32) if need else None
                 for x, need in zip(inputs, ctx.needs_input_grad)]  # fmt: skip
        models = [_operands(*inputs)]
        dtype = torch.bfloat16 if models[0][0].dtype == torch.bfloat16 else torch.float32
        cols, ld = slice(0, V), WIDTH * triton.cdiv(V, WIDTH)
        n = max(1, min(N, ROWS, STORED_BYTES // (ld * (4 + dtype.itemsize))))
        buffers = hidden.new_empty((1, n, ld), dtype=torch.float32)
        out = buffers[0]  # in place, where the dtype allows it: a program reads what it writes, and no more
        if dtype != torch.float32:
            out = hidden.new_empty((n, ld), dtype=dtype)
        stats = hidden.new_empty((triton.cdiv(V, COLS), 4, N), dtype=torch.float32)
        for r in spans(N, n):
            logits = _stored_logits(models, buffers, r, cols)
            of_rows = stats[:, :, r.start :]
            _launch(logprob_forward, models, logits, (targets,), of_rows, r, cols, ld, scale, COLS, N)
            logp[r], entropy[r], lse[r] = merge(stats[:, :, r])
            part, g[r], h[r] = differentiate(loss, logp[r], entropy[r], r)
            total += part
            per_row = targets, lse, entropy, g, h
            _launch(logprob_backward, models, logits, per_row, out, r, cols, ld, scale)
            _add((None if grads[0] is None else grads[0][r], *grads[1:]), out, models[0], r, cols)
        return hand_over(ctx, grads, inputs, total, logp, entropy)


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        models = [_operands(hidden, weight, bias), _operands(ref_hidden, ref_weight, ref_bias)]
        if len(hidden):
            order = models[::-1] if reverse else models
            kl, *lse = merge_kl(_fold(kl_forward, 5, order, (), 1 / temperature))
        else:
            kl, *lse = hidden.new_empty((3, 0), dtype=torch.float32)
        lse, lse_ref = lse[::-1] if reverse else lse
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref)
        ctx.temperature, ctx.reverse = temperature, reverse
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref = ctx.saved_tensors
        models = [_operands(hidden, weight, bias), _operands(ref_hidden, ref_weight, ref_bias)]
        per_row = lse, lse_ref, kl, g.contiguous()
        grads = _gradients(kl_backward, models, per_row, 1 / ctx.temperature, ctx.needs_input_grad,
                           REVERSE=ctx.reverse)
        return *like(grads, (hidden, weight, bias)), None, None, None, None, None
