"""Log-prob, entropy and exact KL straight from hidden states, a tile of logits at a time, in plain torch.

A tile is some rows by at most COLS columns of the vocabulary. Each tile is folded into a few numbers per row
and then overwritten by the next one. Only the inputs and (N,) statistics are saved, and the backward pass
computes each tile again, so that the memory above inputs and gradients is a few tiles, whatever N and V are.
Logits are fp32 (float64 for float64 operands) even when the operands are bf16: rounding them costs up to 0.1
nats of log-prob.

With z = logits/T, p = softmax(z), lse = log Σ exp z, the row's target y and upstream gradients g and h:

    logp = z_y − lse          ∂/∂z: g (1_y − p)
    H    = lse − Σ p z        ∂/∂z: −h p (log p + H)
    KL(p‖q) = Σ p (log p − log q)      ∂/∂z: g p (log p − log q − KL)
    KL(q‖p) = Σ q (log q − log p)      ∂/∂z: g (p − q)
    JSD = β KL(q‖m) + (1−β) KL(p‖m), m = βq + (1−β)p      ∂/∂z: g (1−β) p (log p − log m − KL(p‖m))

Where the loss is a sum over rows of a function of that row's logp and entropy, g and h are known as soon as
all tiles of the row are folded. LinearLoss keeps the logits of a chunk of rows until then and turns them into
gradients on the spot: three matmuls instead of four (docs/kernels.md).

The online log-sum-exp is that of Milakov and Gimelshein (arXiv 1805.02867), taken over tiles.

Names: r and c are the slices of rows and columns of a tile, m its row maxima, s = Σ exp(z−m).
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanorlhf.kernels.bf16 import in_units

TILE = 1 << 21  # logits of a tile: 8 MiB in fp32; a larger one no longer fits a core's cache and is slower
STORED = 22 << 20  # logits that LinearLoss keeps at once: 88 MiB in fp32
HEAD_ROWS = 1024  # rows of the unembedding multiplied at once in decoding: they stay in a CPU's cache
COLS = 4096  # columns of a tile: with more of them, and fewer than 512 rows, the matmuls become slow


def spans(n, size):
    """range(n) as slices of at most `size`.

    >>> spans(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _tiles(n, vocab, stored=None):
    """Row slices and column slices of all tiles; the tiles of one row slice have at most `stored` logits."""
    cols = min(vocab, COLS, TILE)
    rows = TILE // cols
    if stored is not None:
        rows = max(1, min(rows, stored // vocab))
    return spans(n, rows), spans(vocab, cols)


def _buffers(hidden, count, rows, cols):
    """`count` buffers, each large enough for any tile. A new tensor per tile would cost page faults."""
    n_rows = rows[0].stop if rows else 0
    shape = (n_rows, cols[0].stop)
    return [hidden.new_empty(shape, dtype=_wide_dtype(hidden)) for _ in range(count)]


def view(buffer, r, c):
    """The corner of a buffer that holds the tile of rows r and columns c."""
    return buffer[: r.stop - r.start, : c.stop - c.start]


def _wide_dtype(x):
    """The dtype of x's logits and gradients: float64 where x is float64, else fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x):
    """x in fp32, or in float64 where x is float64."""
    return x.to(_wide_dtype(x))


def _logits(hidden, weight, bias, r, c, temperature, out=None):
    """Logits / temperature of the tile of rows r and columns c."""
    x = widen(hidden[r])
    w = widen(weight[c])
    with in_units(hidden):
        z = torch.mm(x, w.T, out=out)
    if bias is not None:
        z += widen(bias[c])
    if temperature != 1:
        z.div_(temperature)
    return z


def _finite(x, p):
    """x where p > 0, else 0: for a forbidden token, whose log-prob is −inf, p·x must be 0 and not NaN."""
    return torch.where(p > 0, x, 0.0)


def _top(z):
    """Maximum of each row, to subtract before exp; 0 for a row of nothing but −inf, or exp would give NaN."""
    top = z.amax(-1)
    return torch.where(top > -torch.inf, top, 0.0)


def _find(target, z):
    """Where each row's target stands in tile z → column (rows, 1), clamped to the tile, and inside (rows, 1).

    >>> column, inside = _find(torch.tensor([1, -2, 3]), torch.zeros(3, 3))  # columns 0, 1, 2
    >>> column.tolist(), inside.tolist()
    ([[1], [0], [2]], [[True], [False], [False]])
    """
    inside = (target >= 0) & (target < z.shape[1])
    column = target.clamp(0, z.shape[1] - 1)
    return column[:, None], inside[:, None]


def _fold(z, target, masked, shifted, e):
    """A tile → (4, rows): maximum m, s = Σ exp(z−m), Σ exp(z−m)·(z−m), and z at the target if it is inside.

    Without the shift by m, Σ p z would cancel against lse: at logits of 300, errors of 3e-3 in fp32.
    masked: the tile may hold −inf. shifted (which may be z) and e: tiles to be overwritten.
    """
    column, inside = _find(target, z)
    target_z = torch.where(inside, z.gather(1, column), 0.0).squeeze(1)
    m = _top(z)
    z = torch.sub(z, m[:, None], out=shifted)
    torch.exp(z, out=e)
    s = e.sum(-1)
    weighted = e.mul_(_finite(z, e) if masked else z).sum(-1)
    return torch.stack((m, s, weighted, target_z))


def _scales(m, s):
    """m, s of all tiles (tiles, N) → the rows' maxima (N,) and exp(m − maximum), 0 for a tile of all −inf."""
    seen = s > 0
    top = torch.where(seen, m, -torch.inf).amax(0)
    return top, torch.where(seen, (m - top).exp(), 0.0)


def merge(stats):
    """(tiles, 4, N) of _fold → logp, entropy and log-sum-exp, (N,) each."""
    m, s, weighted, target_z = stats.unbind(1)
    top, scale = _scales(m, s)
    shift = torch.where(scale > 0, m - top, 0.0)
    total = (scale * s).sum(0)
    log_total = total.log()
    mean = (scale * (weighted + s * shift)).sum(0) / total  # Σ p (z − top)
    logp = target_z.sum(0) - top - log_total
    return logp, log_total - mean, top + log_total


def _dlogits(z, target, lse, entropy, g, h, masked, spare):
    """A tile of logits → ∂loss/∂(x·wᵀ). Everything else (rows,).

    g, h: upstream gradients of logp and entropy, divided by the temperature; h None: all 0. Overwrites z and,
    unless h is None, the tile `spare`.
    """
    logp = z.sub_(lse[:, None])
    if h is None:
        dz = logp.exp_().mul_(-g[:, None])
    else:
        p = torch.exp(logp, out=spare)
        if masked:
            logp = _finite(logp, p)
        by_entropy = logp.add_(entropy[:, None]).mul_(-h[:, None])
        dz = p.mul_(by_entropy.sub_(g[:, None]))
    column, inside = _find(target, z)
    at_target = torch.where(inside, g[:, None], 0.0)
    return dz.scatter_add_(1, column, at_target)


def _fold_kl(z, r):
    """A tile of either model → (5, rows): m, s as in _fold; Σ exp(z−m)·((z−m)−(r−m')); m', s' of r."""
    m = _top(z)
    m_ref = _top(r)
    z -= m[:, None]
    r -= m_ref[:, None]
    e = z.exp()
    s = e.sum(-1)
    s_ref = r.exp().sum(-1)
    difference = (e * _finite(z - r, e)).sum(-1)
    return torch.stack((m, s, difference, m_ref, s_ref))


def merge_kl(stats):
    """(tiles, 5, N) of _fold_kl → KL(z‖r) and both log-sum-exps, (N,) each."""
    m, s, difference, m_ref, s_ref = stats.unbind(1)
    top, scale = _scales(m, s)
    top_ref, scale_ref = _scales(m_ref, s_ref)
    total = (scale * s).sum(0)
    total_ref = (scale_ref * s_ref).sum(0)
    counts = scale > 0
    shift = torch.where(counts, (m - top) - (m_ref - top_ref), 0.0)
    parts = scale * (difference + s * shift)
    mean = torch.where(counts, parts, 0.0).sum(0) / total  # Σ p ((z − top) − (r − top_ref))
    kl = mean - total.log() + total_ref.log()
    return kl, top + total.log(), top_ref + total_ref.log()


def _fold_rows(hidden, weight, bias, targets, temperature, r, cols, logits, shifted, spare):
    """All tiles of rows r → logp, entropy and log-sum-exp, (rows,) each.

    logits: a buffer for each tile. Where there is one for all, it is `shifted` too, and is overwritten.
    """
    stats = []
    for c, buffer in zip(cols, logits):
        z = view(buffer, r, c)
        _logits(hidden, weight, bias, r, c, temperature, out=z)
        target = targets[r] - c.start
        stats.append(_fold(z, target, bias is not None, view(shifted, r, c), view(spare, r, c)))
    return merge(torch.stack(stats))


def _fold_all(hidden, weight, bias, targets, temperature):
    """logp, entropy and log-sum-exp of all rows, (3, N), tile by tile."""
    out = hidden.new_empty(3, len(hidden), dtype=_wide_dtype(hidden))
    rows, cols = _tiles(len(hidden), len(weight))
    z, spare = _buffers(hidden, 2, rows, cols)
    logits = [z] * len(cols)
    for r in rows:
        merged = _fold_rows(hidden, weight, bias, targets, temperature, r, cols, logits, z, spare)
        out[:, r] = torch.stack(merged)
    return out


class LinearLogprob(torch.autograd.Function):
    """logp and entropy, (N,) each: `kernels.linear_logprob` without a loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        logp, entropy, lse = _fold_all(hidden, weight, bias, targets, temperature)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        masked = bias is not None
        use_entropy = h.is_cuda or bool((h != 0).any())  # a GPU's host does not wait to find out
        g = g / ctx.temperature
        h = h / ctx.temperature

        def dlogits(r, c, z, spare):
            h_rows = h[r] if use_entropy else None
            target = targets[r] - c.start
            return _dlogits(z, target, lse[r], entropy[r], g[r], h_rows, masked, spare)

        grads = _backward(ctx, hidden, weight, bias, dlogits)
        return (*grads, None, None)


def differentiate(loss, logp, entropy, rows):
    """Call the loss on a chunk of rows → value, stats, ∂value/∂logp and ∂value/∂entropy, (n,) each."""
    logp = logp.detach().requires_grad_()
    entropy = entropy.detach().requires_grad_()
    with torch.enable_grad():
        value, stats = loss(logp, entropy, rows)
    if not value.requires_grad:
        return value, stats, torch.zeros_like(logp), torch.zeros_like(entropy)
    g, h = torch.autograd.grad(value, (logp, entropy), materialize_grads=True)  # 0 for one that is not used
    return value.detach(), stats, g, h


def stack_stats(chunks):
    """One dict of scalar tensors a chunk → {name: (chunks,) tensor}, detached.

    >>> stack_stats([{"ratio_max": torch.tensor(1.1)}, {"ratio_max": torch.tensor(1.5)}])
    {'ratio_max': tensor([1.1000, 1.5000])}
    """
    return {name: torch.stack([stats[name].detach() for stats in chunks]) for name in chunks[0]}


class LinearLoss(torch.autograd.Function):
    """→ Σ loss over chunks of rows, stats, logp, entropy; only the first is differentiable.

    The forward pass forms the gradients, while a chunk's logits are there; `backward` only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, loss):
        logp, entropy = hidden.new_empty(2, len(hidden), dtype=_wide_dtype(hidden))
        total = logp.new_zeros(())
        chunk_stats = []
        grads = gradient_sums((hidden, weight, bias), ctx.needs_input_grad)
        rows, cols = _tiles(len(hidden), len(weight), STORED)
        logits = _buffers(hidden, len(cols), rows, cols)
        shifted, spare = _buffers(hidden, 2, rows, cols)
        masked = bias is not None
        for r in rows:
            logp[r], entropy[r], lse = _fold_rows(
                hidden, weight, bias, targets, temperature, r, cols, logits, shifted, spare
            )
            value, stats, g, h = differentiate(loss, logp[r], entropy[r], r)
            total += value
            chunk_stats.append(stats)
            g = g / temperature
            h = h / temperature if h.is_cuda or (h != 0).any() else None
            for c, buffer in zip(cols, logits):
                z = view(buffer, r, c)
                target = targets[r] - c.start
                dz = _dlogits(z, target, lse, entropy[r], g, h, masked, view(spare, r, c))
                _add(grads, dz, hidden, weight, r, c)
        ctx.grads = grads
        ctx.mark_non_differentiable(logp, entropy)
        return total, stack_stats(chunk_stats), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, up, *_):
        grads = ctx.grads
        ctx.grads = None  # with a second reference to them, autograd would copy the gradients
        if grads is None:
            raise RuntimeError("linear_logprob(loss=...) can be differentiated once only")
        if up.is_cuda or up != 1:  # on a GPU looking costs more than multiplying
            grads = [None if grad is None else grad.mul_(up) for grad in grads]
        return (*grads, None, None, None)


class LinearKL(torch.autograd.Function):
    """KL(policy‖reference), or the reverse, (N,): `kernels.linear_kl`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        out = hidden.new_empty(3, len(hidden), dtype=_wide_dtype(hidden))
        rows, cols = _tiles(len(hidden), len(weight))
        for r in rows:
            stats = []
            for c in cols:
                z = _logits(hidden, weight, bias, r, c, temperature)
                z_ref = _logits(ref_hidden, ref_weight, ref_bias, r, c, temperature)
                stats.append(_fold_kl(z_ref, z) if reverse else _fold_kl(z, z_ref))
            merged = merge_kl(torch.stack(stats))
            out[:, r] = torch.stack(merged)
        if reverse:  # then merge_kl's first model is the reference
            out = out[[0, 2, 1]]
        kl, lse, lse_ref = out
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref)
        ctx.temperature = temperature
        ctx.reverse = reverse
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref = ctx.saved_tensors
        g = g / ctx.temperature

        def dlogits(r, c, z, spare):
            z_ref = _logits(ref_hidden, ref_weight, ref_bias, r, c, ctx.temperature, out=spare)
            logp = z.sub_(lse[r, None])
            logq = z_ref.sub_(lse_ref[r, None])
            p = logp.exp()
            if ctx.reverse:
                dz = p - logq.exp()
            else:
                dz = p * (_finite(logp - logq, p) - kl[r, None])
            return dz.mul_(g[r, None])

        grads = _backward(ctx, hidden, weight, bias, dlogits)
        return (*grads, None, None, None, None, None)


def _log_mixture(logp, logq, beta):
    """log(β q + (1−β) p), where both may be as small as fp32 allows."""
    return torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))


class LinearJSD(torch.autograd.Function):
    """The Jensen–Shannon divergence of policy and reference (N,): `kernels.linear_jsd`.

    The forward pass makes each tile twice: the mixture of two tokens' probabilities needs both models' sums.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, temperature, beta):
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # any: lse has none
        _, _, lse = _fold_all(hidden, weight, None, targets, temperature)
        _, _, lse_ref = _fold_all(ref_hidden, ref_weight, None, targets, temperature)
        of_policy = torch.zeros_like(lse)  # KL(p‖m)
        of_ref = torch.zeros_like(lse)  # KL(q‖m)
        rows, cols = _tiles(len(hidden), len(weight))
        for r in rows:
            for c in cols:
                logp = _logits(hidden, weight, None, r, c, temperature).sub_(lse[r, None])
                logq = _logits(ref_hidden, ref_weight, None, r, c, temperature).sub_(lse_ref[r, None])
                logm = _log_mixture(logp, logq, beta)
                of_policy[r] += (logp.exp() * (logp - logm)).sum(-1)
                of_ref[r] += (logq.exp() * (logq - logm)).sum(-1)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, of_policy, lse, lse_ref)
        ctx.temperature = temperature
        ctx.beta = beta
        return beta * of_ref + (1 - beta) * of_policy

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight, of_policy, lse, lse_ref = ctx.saved_tensors
        g = g * (1 - ctx.beta) / ctx.temperature

        def dlogits(r, c, z, spare):
            z_ref = _logits(ref_hidden, ref_weight, None, r, c, ctx.temperature, out=spare)
            logp = z.sub_(lse[r, None])
            logq = z_ref.sub_(lse_ref[r, None])
            logm = _log_mixture(logp, logq, ctx.beta)
            dz = logp.exp() * (logp - logm - of_policy[r, None])
            return dz.mul_(g[r, None])

        grads = _backward(ctx, hidden, weight, None, dlogits)
        return (*grads, None, None, None, None)


def _backward(ctx, hidden, weight, bias, dlogits):
    """Gradients of hidden, weight and bias, tile by tile; None where none is asked for.

    They are summed in fp32. autograd rounds them to bf16 where the operands are bf16.

    dlogits(r, c, z, spare) → ∂loss/∂(x·wᵀ) of a tile, given its logits z and a tile to be overwritten.
    """
    grads = gradient_sums((hidden, weight, bias), ctx.needs_input_grad)
    rows, cols = _tiles(len(hidden), len(weight))
    z_buffer, spare_buffer = _buffers(hidden, 2, rows, cols)
    for r in rows:
        for c in cols:
            z = view(z_buffer, r, c)
            _logits(hidden, weight, bias, r, c, ctx.temperature, out=z)
            dz = dlogits(r, c, z, view(spare_buffer, r, c))
            _add(grads, dz, hidden, weight, r, c)
    return grads


def gradient_sums(model, needs):
    """Zeros to sum the gradients of (hidden, weight, bias) in, fp32 or wider; None where `needs` is False."""
    sums = []
    for x, needed in zip(model, needs):
        sums.append(torch.zeros_like(x, dtype=_wide_dtype(x)) if needed else None)
    return sums


def _add(grads, dz, hidden, weight, r, c):
    """Add what a tile's dz = ∂loss/∂(x·wᵀ) gives to the gradients."""
    dx, dw, db = grads
    with in_units(hidden):
        if dx is not None:
            dx[r].addmm_(dz, widen(weight[c]))
        if dw is not None:  # a frozen unembedding (LoRA) saves this matmul
            dw[c].addmm_(dz.T, widen(hidden[r]))
    if db is not None:
        db[c] += dz.sum(0)


def tiled_logits(hidden, weight):
    """hidden (N, D), weight (V, D) → fp32 logits (N, V) of a decoding step, by some rows of the weight.

    Read once into the cache, they are multiplied a third faster than all together. A bf16 weight that was not
    widened before is widened there: a whole copy in fp32 costs more than the matmul.
    """
    x = widen(hidden)
    logits = x.new_empty(len(x), len(weight))
    with in_units(hidden):
        for rows in spans(len(weight), HEAD_ROWS):
            part = logits[:, rows]
            torch.mm(x, widen(weight[rows]).T, out=part)
    return logits


def decode_attention(q, k, v, cache_k, cache_v, pos, live):
    """`kernels.decode_attention` by a masked attention over the first `live` positions of the cache."""
    rows = torch.arange(len(pos), device=pos.device)
    cache_k.transpose(1, 2)[rows, pos] = k  # twice as fast as cache_k[rows, :, pos]
    cache_v.transpose(1, 2)[rows, pos] = v
    place = torch.arange(live, device=pos.device)
    mask = (place <= pos[:, None])[:, None, None]  # (B, 1, 1, live)
    keys = cache_k[:, :, :live]
    values = cache_v[:, :, :live]
    queries = q[:, :, None]  # (B, H, 1, hd)
    if q.device.type == "cpu":  # in bf16 it takes three to seven times as long
        queries = widen(queries)
        keys = widen(keys)
        values = widen(values)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
    return y[:, :, 0].to(q.dtype)
