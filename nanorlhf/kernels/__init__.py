"""From hidden states and the unembedding straight to per-token log-prob, entropy and exact KL; attention
of one new token per row.

One function per quantity, two backends behind it: Triton on a GPU (`triton_backend.py`), tiles in plain
torch elsewhere (`torch_backend.py`), both checked against ten-line oracles (`reference.py`). docs/kernels.md
derives them.
"""

import functools

import torch

from nanorlhf.kernels import torch_backend


@functools.cache
def _say_once(line):
    print(line, flush=True)


def _backend(name, hidden, *others):
    if name not in (None, "torch", "triton"):
        raise ValueError(f'backend={name!r} must be "torch" or "triton"')
    double = torch.float64 in [x.dtype for x in (hidden, *others)]
    if name == "torch" or name is None and (not hidden.is_cuda or double):
        return torch_backend
    if double:
        raise ValueError('backend="triton" takes fp32, bf16 and fp16; float64 is for backend="torch"')
    try:
        from nanorlhf.kernels import triton_backend  # 0.2 s, and only where it is used
    except ImportError:
        if name == "triton":
            raise ValueError('backend="triton" needs the package triton (pip install triton)') from None
        _say_once("Triton is not installed: log-probs come from the slower torch backend")
        return torch_backend
    if not hidden.is_cuda and not triton_backend.INTERPRETED:
        raise ValueError('backend="triton" needs a GPU (on a CPU: TRITON_INTERPRET=1, slow, for tests)')
    if hidden.shape[1] % 16:
        _say_once(f"hidden width {hidden.shape[1]} is no multiple of 16: the kernels pad it and are slower")
    return triton_backend


def _check(temperature, **shapes):
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy is scored at 1)")
    for name, (tensor, want) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != want:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {want}")


def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None, backend=None, loss=None):
    """Log-prob of each target, and entropy, under softmax((hidden·weightᵀ + bias) / temperature), row by row.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) or None → logp (N,), entropy (N,), both fp32
    and differentiable in hidden, weight and bias. Logits are fp32 whatever the operands' dtype and are never
    stored whole. backend: "triton", "torch", or None: Triton on a GPU, else torch. Raises ValueError on
    shapes that do not fit, on temperature ≤ 0 and on a backend that cannot run here.

    With `loss`, in one pass of 3 matmuls in place of 4 → total, logp, entropy. It is called for one chunk of
    rows after the other, as loss(logp (n,), entropy (n,), rows: slice), and returns a scalar: a sum over
    these rows, in which nothing but the two is differentiated. `total`, the sum of these sums, can be
    differentiated once; logp and entropy cannot.
    """
    (N, D), V = hidden.shape, len(weight)
    _check(temperature, weight=(weight, (V, D)), targets=(targets, (N,)), bias=(bias, (V,)))
    backend, inputs = _backend(backend, hidden, weight), (hidden, weight, bias, targets, temperature)
    if loss is None:
        return backend.LinearLogprob.apply(*inputs)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias) if x is not None):
        return backend.LinearLoss.apply(*inputs, loss)
    logp, entropy = backend.LinearLogprob.apply(*inputs)
    return loss(logp, entropy, slice(0, N)) if N else logp.sum(), logp, entropy


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, reverse=False, bias=None,
              ref_bias=None, backend=None):
    """Exact KL(policy‖reference) over the vocabulary, per position (N,); with reverse KL(reference‖policy).

    hidden (N, D), weight (V, D); ref_hidden (N, D'), ref_weight (V, D'). Differentiable in the policy's
    hidden, weight and bias only: the reference is a constant. fp32 logits, never stored whole. Backends and
    ValueErrors as in linear_logprob.
    """
    (N, D), V, ref_d = hidden.shape, len(weight), ref_hidden.shape[-1]
    _check(temperature, weight=(weight, (V, D)), ref_hidden=(ref_hidden, (N, ref_d)),
           ref_weight=(ref_weight, (V, ref_d)), bias=(bias, (V,)), ref_bias=(ref_bias, (V,)))
    return _backend(backend, hidden, weight, ref_hidden, ref_weight).LinearKL.apply(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse
    )


def decode_attention(q, k, v, cache_k, cache_v, pos, live, backend=None):
    """One new token per row: writes its key and value into the cache at pos, attends to positions 0 … pos.

    q (B, H, hd), k and v (B, n_kv_head, hd), caches (B, n_kv_head, max_len, hd), pos (B,) int64, all below
    the number `live` → (B, H, hd). Nothing here is differentiable. backend: as in linear_logprob.
    """
    run = torch_backend.decode_attention
    if _backend(backend, q.flatten(1)) is not torch_backend:
        from nanorlhf.kernels.triton_decode import decode_attention as run
    return run(q, k, v, cache_k, cache_v, pos, live)
