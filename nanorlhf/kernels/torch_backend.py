"""Log-prob, entropy and exact KL straight from hidden states, a chunk of rows at a time, in plain torch.

Both functions save only their inputs and (N,) statistics; the backward pass recomputes each chunk's logits.
Memory above inputs and gradients is one chunk, CHUNK elements of fp32, whatever N and V are. Logits are fp32
(float64 for float64 operands) even when the operands are bf16: rounding them costs up to 0.1 nats of
log-prob.

With z = logits/T, p = softmax(z), lse = log Σ exp z, the row's target y and upstream gradients g and h:

    logp = z_y − lse          ∂/∂z: g (1_y − p)
    H    = lse − Σ p z        ∂/∂z: −h p (log p + H)
    KL(p‖q) = Σ p (log p − log q)      ∂/∂z: g p (log p − log q − KL)
    KL(q‖p) = Σ q (log q − log p)      ∂/∂z: g (p − q)
"""

import torch

CHUNK = 1 << 21  # logits held at once: 8 MiB in fp32; larger no longer fits a core's cache and is slower


def _chunks(n, vocab):
    rows = max(1, CHUNK // vocab)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _logits(hidden, weight, bias, temperature):
    z = hidden @ weight.T
    if bias is not None:
        z += bias
    return z.div_(temperature)


def _wide(*tensors):
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [t if t is None else t.to(dtype) for t in tensors]


def _log_softmax(z):
    lse = torch.logsumexp(z, dim=-1)
    return z - lse[:, None], lse


def _finite(x, p):
    """x where p > 0, else 0: p·x at a masked-out token (log-prob −inf) is 0, not NaN."""
    return torch.where(p > 0, x, 0.0)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        x, w, b = _wide(hidden, weight, bias)
        logp, entropy, lse = x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(len(x))
        for c in _chunks(len(x), len(w)):
            z = _logits(x[c], w, b, temperature)
            top = z.amax(-1)
            z -= top[:, None]  # or Σ p z would cancel against lse: at logits of 300, errors of 3e-3 in fp32
            e = z.exp()
            total = e.sum(-1)
            log_total = total.log()
            lse[c] = top + log_total
            logp[c] = z.gather(1, targets[c, None]).squeeze(1) - log_total
            entropy[c] = log_total - e.mul_(_finite(z, e) if b is not None else z).sum(-1) / total
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, g, h):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        x, w, b = _wide(hidden, weight, bias)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        db = None if b is None else torch.zeros_like(b)
        use_entropy = bool((h != 0).any())
        for c in _chunks(len(x), len(w)):
            logp = _logits(x[c], w, b, ctx.temperature).sub_(lse[c, None])
            dz = p = logp.exp()
            if use_entropy:
                dz = p * (g[c, None] + h[c, None] * (_finite(logp, p) + entropy[c, None]))
            else:
                dz *= g[c, None]
            dz.neg_().scatter_add_(1, targets[c, None], g[c, None])
            dz /= ctx.temperature
            dx[c] = dz @ w
            dw.addmm_(dz.T, x[c])
            if db is not None:
                db += dz.sum(0)
        return dx.to(hidden.dtype), dw.to(weight.dtype), None if db is None else db.to(bias.dtype), None, None


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse):
        x, w, b, rx, rw, rb = _wide(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        kl = x.new_empty(len(x))
        for c in _chunks(len(x), len(w)):
            logp, _ = _log_softmax(_logits(x[c], w, b, temperature))
            logq, _ = _log_softmax(_logits(rx[c], rw, rb, temperature))
            if reverse:
                logp, logq = logq, logp
            p = logp.exp()
            kl[c] = (p * _finite(logp - logq, p)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl)
        ctx.temperature, ctx.reverse = temperature, reverse
        return kl

    @staticmethod
    def backward(ctx, g):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl = ctx.saved_tensors
        x, w, b, rx, rw, rb = _wide(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        db = None if b is None else torch.zeros_like(b)
        for c in _chunks(len(x), len(w)):
            logp, _ = _log_softmax(_logits(x[c], w, b, ctx.temperature))
            logq, _ = _log_softmax(_logits(rx[c], rw, rb, ctx.temperature))
            p = logp.exp()
            dz = p - logq.exp() if ctx.reverse else p * (_finite(logp - logq, p) - kl[c, None])
            dz *= g[c, None] / ctx.temperature
            dx[c] = dz @ w
            dw.addmm_(dz.T, x[c])
            if db is not None:
                db += dz.sum(0)
        grads = dx.to(hidden.dtype), dw.to(weight.dtype), None if db is None else db.to(bias.dtype)
        return *grads, None, None, None, None, None


def linear_logprob(hidden, weight, targets, temperature, bias):
    return LinearLogprob.apply(hidden, weight, bias, targets, temperature)


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature, reverse, bias, ref_bias):
    return LinearKL.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse)
