"""From hidden states and the unembedding straight to per-token log-prob, entropy and exact KL.

One function per quantity, one backend behind it: chunked torch (`torch_backend.py`), checked against ten-line
oracles (`reference.py`). The Triton backend goes in `triton_backend.py` with the same two functions.
"""

from nanorlhf.kernels import torch_backend


def _backend(name):
    if name in (None, "torch"):
        return torch_backend
    raise ValueError(f'backend={name!r}: this version has backend="torch" only')


def _check(temperature, **shapes):
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy is scored at 1)")
    for name, (tensor, want) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != want:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {want}")


def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None, backend=None):
    """Log-prob of each target, and entropy, under softmax((hidden·weightᵀ + bias) / temperature), row by row.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) or None → logp (N,), entropy (N,), both fp32
    and differentiable in hidden, weight and bias. Logits are fp32 whatever the operands' dtype and are never
    stored whole. Raises ValueError on shapes that do not fit and on temperature ≤ 0.
    """
    (N, D), V = hidden.shape, len(weight)
    _check(temperature, weight=(weight, (V, D)), targets=(targets, (N,)), bias=(bias, (V,)))
    return _backend(backend).linear_logprob(hidden, weight, targets, temperature, bias)


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, reverse=False, bias=None,
              ref_bias=None, backend=None):
    """Exact KL(policy‖reference) over the vocabulary, per position (N,); with reverse KL(reference‖policy).

    hidden (N, D), weight (V, D); ref_hidden (N, D'), ref_weight (V, D'). Differentiable in the policy's
    hidden, weight and bias only: the reference is a constant. fp32 logits, never stored whole. Raises
    ValueError as linear_logprob.
    """
    (N, D), V, ref_d = hidden.shape, len(weight), ref_hidden.shape[-1]
    _check(temperature, weight=(weight, (V, D)), ref_hidden=(ref_hidden, (N, ref_d)),
           ref_weight=(ref_weight, (V, ref_d)), bias=(bias, (V,)), ref_bias=(ref_bias, (V,)))
    return _backend(backend).linear_kl(
        hidden, weight, ref_hidden, ref_weight, temperature, reverse, bias, ref_bias
    )
