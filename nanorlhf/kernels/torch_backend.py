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

The online log-sum-exp is that of Milakov and Gimelshein (arXiv 1805.02867), taken over tiles.
"""

import torch
from torch.autograd.function import once_differentiable

TILE = 1 << 21  # logits held at once: 8 MiB in fp32; larger no longer fits a core's cache and is slower
COLS = 4096  # columns of a tile: with fewer rows than 512 the matmuls have too little to do


def spans(n, size):
    """Slices of at most `size` that cover range(n)."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _tiles(n, vocab):
    """Row slices and column slices of all tiles."""
    cols = min(vocab, COLS, TILE)
    return spans(n, TILE // cols), spans(vocab, cols)


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


def _logits(hidden, weight, bias, r, c, temperature):
    """Logits / temperature of the rows r and the columns c."""
    z = _wide(hidden[r]) @ _wide(weight[c]).T
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


def _fold(z, target, masked):
    """A tile → (4, rows): maximum m, s = Σ exp(z−m), Σ exp(z−m)·(z−m), and z at the target if it is here.

    Without the shift by m, Σ p z would cancel against lse: at logits of 300, errors of 3e-3 in fp32.
    """
    here = (target >= 0) & (target < z.shape[1])
    y = torch.where(here, z.gather(1, target.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1), 0.0)
    top = _top(z)
    z -= top[:, None]
    e = z.exp()
    total = e.sum(-1)
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
        out = _wide(hidden).new_empty(3, len(hidden))
        rows, cols = _tiles(len(hidden), len(weight))
        for r in rows:
            stats = []
            for c in cols:
                z = _logits(hidden, weight, bias, r, c, temperature)
                stats.append(_fold(z, targets[r] - c.start, masked=bias is not None))
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

        def dlogits(r, c, z):
            logp = z.sub_(lse[r, None])
            dz = p = logp.exp()
            if use_entropy:
                dz = p * (-g[r, None] - h[r, None] * (_finite(logp, p) + entropy[r, None]))
            else:
                dz *= -g[r, None]
            target = targets[r] - c.start
            here = (target >= 0) & (target < z.shape[1])
            at = target.clamp(0, z.shape[1] - 1)[:, None]
            return dz.scatter_add_(1, at, torch.where(here, g[r], 0.0)[:, None])

        return *_backward(ctx, hidden, weight, bias, dlogits), None, None


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        out = _wide(hidden).new_empty(3, len(hidden))
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

        def dlogits(r, c, z):
            q = _logits(ref_hidden, ref_weight, ref_bias, r, c, ctx.temperature)
            logp, logq = z.sub_(lse[r, None]), q.sub_(lse_ref[r, None])
            p = logp.exp()
            dz = p - logq.exp() if ctx.reverse else p * (_finite(logp - logq, p) - kl[r, None])
            return dz.mul_(g[r, None])

        return *_backward(ctx, hidden, weight, bias, dlogits), None, None, None, None, None


def _backward(ctx, hidden, weight, bias, dlogits):
    """Gradients of hidden, weight and bias, or None; `dlogits(rows, columns, z)`: ∂loss/∂(x·wᵀ) of a tile."""
    inputs = hidden, weight, bias
    needs = ctx.needs_input_grad
    dx, dw, db = (torch.zeros_like(_wide(t)) if need else None for t, need in zip(inputs, needs))
    rows, cols = _tiles(len(hidden), len(weight))
    for r in rows:
        for c in cols:
            z = _logits(hidden, weight, bias, r, c, ctx.temperature)
            dz = dlogits(r, c, z)
            if dx is not None:
                dx[r].addmm_(dz, _wide(weight[c]))
            if dw is not None:  # a frozen unembedding (LoRA) saves this matmul
                dw[c].addmm_(dz.T, _wide(hidden[r]))
            if db is not None:
                db[c] += dz.sum(0)
    return like((dx, dw, db), inputs)


def like(grads, inputs):
    """Gradients, or None, in the dtypes of the inputs they belong to."""
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs))
