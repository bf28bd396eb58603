"""Log-prob, entropy and exact KL straight from hidden states, a tile of logits at a time, in plain torch.

A tile is some rows by at most COLS columns of the vocabulary. Every tile is folded into a few numbers per row
and forgotten; only the inputs and (N,) statistics are saved, and the backward pass computes each tile again.
Memory above inputs and gradients is a few tiles, whatever N and V are. Logits are fp32 (float64 for float64
operands) even when the operands are bf16: rounding them costs up to 0.1 nats of log-prob.

With z = logits/T, p = softmax(z), lse = log Σ exp z, the row's target y and upstream gradients g and h:

    logp = z_y − lse          ∂/∂z: g (1_y − p)
    H    = lse − Σ p z        ∂/∂z: −h p (log p + H)
    KL(p‖q) = Σ p (log p − log q)      ∂/∂z: g p (log p − log q − KL)
    KL(q‖p) = Σ q (log q − log p)      ∂/∂z: g (p − q)

Where the loss is a sum over rows of a function of that row's logp and entropy, g and h are known as soon as
all tiles of the row have been folded. LinearLoss keeps the logits of a chunk of rows until then, and turns
them into gradients on the spot: three matmuls in place of four (docs/kernels.md).

The online log-sum-exp is that of Milakov and Gimelshein (arXiv 1805.02867), taken over tiles.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

TILE = 1 << 21  # logits held at once: 8 MiB in fp32; larger no longer fits a core's cache and is slower
STORED = 22 << 20  # logits that LinearLoss keeps at once: 88 MiB in fp32
COLS = 4096  # columns of a tile: with fewer rows than 512 the matmuls have too little to do


def spans(n, size):
    """Slices of at most `size` that cover range(n)."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _tiles(n, vocab, stored=None):
    """Row slices and column slices of all tiles; with `stored`, so many logits at most of the same rows."""
    cols = min(vocab, COLS, TILE)
    rows = TILE // cols if stored is None else max(1, min(TILE // cols, stored // vocab))
    return spans(n, rows), spans(vocab, cols)


def _room(like, n, rows, cols):
    """n buffers, each for any tile of `rows` by `cols`: asking for one a tile costs page faults."""
    size = max((r.stop - r.start for r in rows), default=0) * max((c.stop - c.start for c in cols), default=0)
    return [like.new_empty(size, dtype=_width(like)) for _ in range(n)]


def _in(buffer, r, c):
    """The part of a buffer that is a tile of the rows r and the columns c."""
    shape = r.stop - r.start, c.stop - c.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _width(x):
    """The dtype of x's logits and gradients: fp32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x):
    return x.to(_width(x))


def _logits(hidden, weight, bias, r, c, temperature, out=None):
    """Logits / temperature of the rows r and the columns c."""
    z = torch.mm(_wide(hidden[r]), _wide(weight[c]).T, out=out)
    if bias is not None:
        z += _wide(bias[c])
    return z if temperature == 1 else z.div_(temperature)


def _finite(x, p):
    """x where p > 0, else 0: p·x at a masked-out token (log-prob −inf) is 0, not NaN."""
    return torch.where(p > 0, x, 0.0)


def _top(z):
    """Maximum of each row, to be subtracted before exp; 0 for a row that is masked out as a whole."""
    top = z.amax(-1)
    return torch.where(top > -torch.inf, top, 0.0)


def _place(target, z):
    """Each row's target in this tile → (rows, 1) column, clamped to the tile, and whether it is in there."""
    here = (target >= 0) & (target < z.shape[1])
    return target.clamp(0, z.shape[1] - 1)[:, None], here[:, None]


def _fold(z, target, masked, shifted, e):
    """A tile → (4, rows): maximum m, s = Σ exp(z−m), Σ exp(z−m)·(z−m), and z at the target if it is here.

    Without the shift by m, Σ p z would cancel against lse: at logits of 300, errors of 3e-3 in fp32.
    shifted (which may be z) and e: tiles to be overwritten.
    """
    at, here = _place(target, z)
    y = torch.where(here, z.gather(1, at), 0.0).squeeze(1)
    top = _top(z)
    z = torch.sub(z, top[:, None], out=shifted)
    total = torch.exp(z, out=e).sum(-1)
    return torch.stack((top, total, e.mul_(_finite(z, e) if masked else z).sum(-1), y))


def merge(stats):
    """(tiles, 4, N) of _fold → logp, entropy and log-sum-exp, (N,) each."""
    m, s, t, y = stats.unbind(1)
    top = torch.where(s > 0, m, -torch.inf).amax(0)
    shift = torch.where(s > 0, m - top, 0.0)
    scale = torch.where(s > 0, shift.exp(), 0.0)
    total = (scale * s).sum(0)
    log_total = total.log()
    entropy = log_total - (scale * (t + s * shift)).sum(0) / total
    return y.sum(0) - top - log_total, entropy, top + log_total


def _dlogits(z, target, lse, entropy, g, h, masked, spare):
    """A tile of logits → ∂loss/∂(x·wᵀ). All else (rows,); g, h: upstream, over the temperature; h None: 0.

    Overwrites z, or z and `spare`, a tile.
    """
    logp = z.sub_(lse[:, None])
    if h is None:
        dz = logp.exp_().mul_(-g[:, None])
    else:
        dz = torch.exp(logp, out=spare)
        logp = _finite(logp, dz) if masked else logp
        dz *= logp.add_(entropy[:, None]).mul_(-h[:, None]).sub_(g[:, None])
    at, here = _place(target, z)
    return dz.scatter_add_(1, at, torch.where(here, g[:, None], 0.0))


def _fold_kl(z, r):
    """A tile of each model → (5, rows): m, s as in _fold; Σ exp(z−m)·((z−m)−(r−m')); m', s' of r."""
    m, m_ref = _top(z), _top(r)
    z -= m[:, None]
    r -= m_ref[:, None]
    e = z.exp()
    return torch.stack((m, e.sum(-1), (e * _finite(z - r, e)).sum(-1), m_ref, r.exp().sum(-1)))


def merge_kl(stats):
    """(tiles, 5, N) of _fold_kl → KL(z‖r) and both log-sum-exps, (N,) each."""
    m, s, u, m_ref, s_ref = stats.unbind(1)
    top = torch.where(s > 0, m, -torch.inf).amax(0)
    top_ref = torch.where(s_ref > 0, m_ref, -torch.inf).amax(0)
    scale = torch.where(s > 0, (m - top).exp(), 0.0)
    total = (scale * s).sum(0)
    total_ref = (torch.where(s_ref > 0, (m_ref - top_ref).exp(), 0.0) * s_ref).sum(0)
    lse, lse_ref = top + total.log(), top_ref + total_ref.log()
    shift = torch.where(scale > 0, (m - top) - (m_ref - top_ref), 0.0)
    mean = torch.where(scale > 0, scale * (u + s * shift), 0.0).sum(0) / total  # E_p[z − r], shifted
    return mean - total.log() + total_ref.log(), lse, lse_ref


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        out = hidden.new_empty(3, len(hidden), dtype=_width(hidden))
        rows, cols = _tiles(len(hidden), len(weight))
        room = _room(hidden, 2, rows, cols)
        for r in rows:
            stats = []
            for c in cols:
                z, e = (_in(x, r, c) for x in room)
                _logits(hidden, weight, bias, r, c, temperature, out=z)
                stats.append(_fold(z, targets[r] - c.start, bias is not None, z, e))
            out[:, r] = torch.stack(merge(torch.stack(stats)))
        logp, entropy, lse = out
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        use_entropy = bool((h != 0).any())
        g, h = g / ctx.temperature, h / ctx.temperature

        def dlogits(r, c, z, spare):
            h_r = h[r] if use_entropy else None
            return _dlogits(z, targets[r] - c.start, lse[r], entropy[r], g[r], h_r, bias is not None, spare)

        return *_backward(ctx, hidden, weight, bias, dlogits), None, None


def differentiate(loss, logp, entropy, rows):
    """→ loss(logp, entropy, rows), a scalar, and its gradients by logp and by entropy, (n,) each."""
    logp, entropy = (x.detach().requires_grad_() for x in (logp, entropy))
    with torch.enable_grad():
        total = loss(logp, entropy, rows)
        grads = None, None
        if total.requires_grad:
            grads = torch.autograd.grad(total, (logp, entropy), allow_unused=True)
    return total.detach(), *(torch.zeros_like(logp) if g is None else g for g in grads)


class LinearLoss(torch.autograd.Function):
    """→ Σ loss(logp, entropy, rows) over chunks of rows, logp, entropy; only the first is differentiable.

    Its gradients are formed in the forward pass, where a chunk's logits are; `backward` only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, loss):
        logp, entropy = hidden.new_empty(2, len(hidden), dtype=_width(hidden))
        total, grads = logp.new_zeros(()), _sums(ctx, hidden, weight, bias)
        rows, cols = _tiles(len(hidden), len(weight), STORED)
        kept, room = _room(hidden, len(cols), rows, cols), _room(hidden, 2, rows, cols)
        masked = bias is not None
        for r in rows:
            tiles, stats = [_in(x, r, c) for x, c in zip(kept, cols)], []
            for c, z in zip(cols, tiles):
                shifted, e = (_in(x, r, c) for x in room)
                _logits(hidden, weight, bias, r, c, temperature, out=z)
                stats.append(_fold(z, targets[r] - c.start, masked, shifted, e))
            logp[r], entropy[r], lse = merge(torch.stack(stats))
            part, g, h = differentiate(loss, logp[r], entropy[r], r)
            total += part
            g, h = g / temperature, h / temperature if (h != 0).any() else None
            for c, z in zip(cols, tiles):
                spare = _in(room[0], r, c)
                dz = _dlogits(z, targets[r] - c.start, lse, entropy[r], g, h, masked, spare)
                _add(grads, dz, hidden, weight, r, c)
        return hand_over(ctx, grads, (hidden, weight, bias), total, logp, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, up, *_):
        grads, ctx.grads = ctx.grads, None  # kept any longer, autograd would copy them
        if grads is None:
            raise RuntimeError("linear_logprob(loss=...) can be differentiated once only")
        if up.is_cuda or up != 1:  # on a GPU looking costs more than multiplying
            grads = [None if g is None else g.mul_(up) for g in grads]
        return *(None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes)), None, None, None


def hand_over(ctx, grads, inputs, *out):
    """The gradients that LinearLoss.forward has formed, kept for its backward pass → out."""
    ctx.grads, ctx.dtypes = grads, [None if x is None else x.dtype for x in inputs]
    ctx.mark_non_differentiable(*out[1:])
    return out


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        out = hidden.new_empty(3, len(hidden), dtype=_width(hidden))
        rows, cols = _tiles(len(hidden), len(weight))
        for r in rows:
            stats = []
            for c in cols:
                z = _logits(hidden, weight, bias, r, c, temperature)
                q = _logits(ref_hidden, ref_weight, ref_bias, r, c, temperature)
                stats.append(_fold_kl(q, z) if reverse else _fold_kl(z, q))
            out[:, r] = torch.stack(merge_kl(torch.stack(stats)))
        kl, lse, lse_ref = out[[0, 2, 1]] if reverse else out
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref)
        ctx.temperature, ctx.reverse = temperature, reverse
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl, lse, lse_ref = ctx.saved_tensors
        g = g / ctx.temperature

        def dlogits(r, c, z, spare):
            q = _logits(ref_hidden, ref_weight, ref_bias, r, c, ctx.temperature, out=spare)
            logp, logq = z.sub_(lse[r, None]), q.sub_(lse_ref[r, None])
            p = logp.exp()
            dz = p - logq.exp() if ctx.reverse else p * (_finite(logp - logq, p) - kl[r, None])
            return dz.mul_(g[r, None])

        return *_backward(ctx, hidden, weight, bias, dlogits), None, None, None, None, None


def _backward(ctx, hidden, weight, bias, dlogits):
    """Gradients of hidden, weight and bias, or None; dlogits(rows, columns, z, a tile to be overwritten):
    ∂loss/∂(x·wᵀ) of a tile."""
    grads = _sums(ctx, hidden, weight, bias)
    rows, cols = _tiles(len(hidden), len(weight))
    room = _room(hidden, 2, rows, cols)
    for r in rows:
        for c in cols:
            z, spare = (_in(x, r, c) for x in room)
            _logits(hidden, weight, bias, r, c, ctx.temperature, out=z)
            _add(grads, dlogits(r, c, z, spare), hidden, weight, r, c)
    return like(grads, (hidden, weight, bias))


def _sums(ctx, *inputs):
    """What the gradients of hidden, weight and bias are summed in, by _add; None where none is asked for."""
    make = torch.empty_like if len(inputs[0]) else torch.zeros_like  # with no rows, nothing is added
    needs = ctx.needs_input_grad
    return [make(x, dtype=_width(x)) if need else None for x, need in zip(inputs, needs)]


def _add(grads, dz, hidden, weight, r, c):
    """A tile's ∂loss/∂(x·wᵀ), added to the gradients; what the first tile meets there is overwritten."""
    dx, dw, db = grads
    if dx is not None:
        dx[r].addmm_(dz, _wide(weight[c]), beta=c.start > 0)
    if dw is not None:  # a frozen unembedding (LoRA) saves this matmul
        dw[c].addmm_(dz.T, _wide(hidden[r]), beta=r.start > 0)
    if db is not None:
        db[c] = dz.sum(0) + (db[c] if r.start else 0)


def like(grads, inputs):
    """Gradients, or None, in the dtypes of the inputs they belong to."""
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs))


def decode_attention(q, k, v, cache_k, cache_v, pos, live):
    rows = torch.arange(len(pos), device=pos.device)
    for cache, new in ((cache_k, k), (cache_v, v)):
        cache.transpose(1, 2)[rows, pos] = new  # twice as fast as cache[rows, :, pos]
    mask = (torch.arange(live, device=pos.device) <= pos[:, None])[:, None, None]  # (B, 1, 1, live)
    gqa = dict(enable_gqa=True) if q.shape[1] != k.shape[1] else {}
    keys, values = cache_k[:, :, :live], cache_v[:, :, :live]
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, **gqa)[:, :, 0]
