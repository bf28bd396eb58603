"""The same numbers, faster: log-prob, entropy and KL straight from hidden states; attention in decoding.

One function per quantity, two backends behind it: Triton on a GPU (`triton_backend.py`, `triton_decode.py`),
tiles in plain torch elsewhere (`torch_backend.py`). Tests check both against ten-line oracles
(`reference.py`). `slots.py` is the sampling loop of a GPU. docs/kernels.md derives the kernels. A reader of
the trainers may leave this folder closed: `log_softmax` and `gather` give the same numbers.
"""

import functools

import torch

from nanorlhf.kernels import torch_backend


@functools.cache
def _say_once(line):
    print(line, flush=True)


def _backend(name, hidden, *others):
    """The module that computes: the one named, or by default Triton on a GPU and torch elsewhere."""
    if name not in (None, "torch", "triton"):
        raise ValueError(f'backend={name!r} must be "torch" or "triton"')
    double = torch.float64 in [x.dtype for x in (hidden, *others)]
    by_default = name is None and (double or not hidden.is_cuda)
    if name == "torch" or by_default:
        return torch_backend
    if double:
        raise ValueError('backend="triton" takes fp32, bf16 and fp16; float64 is for backend="torch"')
    try:
        from nanorlhf.kernels import triton_backend  # here: importing it takes 0.2 s, and CPUs never need it
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


def _check_shape(name, tensor, *want):
    if tensor is not None and tensor.shape != want:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {want}")


def _check_temperature(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy is scored at 1)")


def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None, backend=None, loss=None):
    """Log-prob of each target, and entropy, under softmax((hidden·weightᵀ + bias) / temperature), row by row.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) or None → logp (N,), entropy (N,), both fp32
    and differentiable in hidden, weight and bias. Logits are fp32 whatever the operands' dtype, and N×V
    logits are never stored. backend: "triton", "torch", or None: Triton on a GPU, else torch. Raises
    ValueError on shapes that do not fit, on temperature ≤ 0 and on a backend that cannot run here.

    >>> hidden = torch.tensor([[1.0], [2.0]])
    >>> weight = torch.tensor([[0.0], [1.0]])  # logits [0, 1] and [0, 2]
    >>> logp, entropy = linear_logprob(hidden, weight, torch.tensor([1, 0]))
    >>> logp
    tensor([-0.3133, -2.1269])

    With a loss that is a sum over rows: one pass of 3 matmuls instead of 4 → total, stats, logp, entropy.
    loss(logp (n,), entropy (n,), rows: slice) is called for one chunk of rows after the other and returns
    its value, a scalar, and stats, a dict {name: scalar tensor}. `total`, the sum of the values, can be
    differentiated once; logp and entropy cannot. stats is {name: (chunks,)}, to be summed by the caller, or
    reduced to their maximum, as the figure asks. With N = 0 the loss is called once, with no rows, for its
    stats, and total is 0.

    >>> def loss(logp, entropy, rows):
    ...     return -logp.sum(), {"least": logp.min()}
    >>> total, stats, logp, entropy = linear_logprob(hidden, weight, torch.tensor([1, 0]), loss=loss)
    >>> total, stats
    (tensor(2.4402), {'least': tensor([-2.1269])})
    """
    N, D = hidden.shape
    V = len(weight)
    _check_temperature(temperature)
    _check_shape("weight", weight, V, D)
    _check_shape("targets", targets, N)
    _check_shape("bias", bias, V)
    module = _backend(backend, hidden, weight)
    needs_grad = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if loss is not None and N > 0 and needs_grad and torch.is_grad_enabled():
        return module.LinearLoss.apply(hidden, weight, bias, targets, temperature, loss)
    logp, entropy = module.LinearLogprob.apply(hidden, weight, bias, targets, temperature)
    if loss is None:
        return logp, entropy
    total, stats = loss(logp.detach(), entropy.detach(), slice(0, N))
    if N == 0:
        total = logp.sum()  # 0, with a gradient, so that `backward` can be called
    return total, torch_backend.stack_stats([stats]), logp.detach(), entropy.detach()


def linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0, reverse=False, bias=None,
              ref_bias=None, backend=None):
    """Exact KL(policy‖reference) over the vocabulary, per position (N,); with reverse KL(reference‖policy).

    hidden (N, D), weight (V, D); ref_hidden (N, D'), ref_weight (V, D'). Differentiable in the policy's
    hidden, weight and bias only: the reference is a constant. Logits are fp32 and N×V of them are never
    stored. Backends and ValueErrors as in linear_logprob.

    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> linear_kl(torch.tensor([[1.0], [2.0]]), weight, torch.tensor([[1.0], [1.0]]), weight)
    tensor([0.0000, 0.0671])
    """
    N, D = hidden.shape
    V = len(weight)
    ref_D = ref_hidden.shape[-1]
    _check_temperature(temperature)
    _check_shape("weight", weight, V, D)
    _check_shape("ref_hidden", ref_hidden, N, ref_D)
    _check_shape("ref_weight", ref_weight, V, ref_D)
    _check_shape("bias", bias, V)
    _check_shape("ref_bias", ref_bias, V)
    module = _backend(backend, hidden, weight, ref_hidden, ref_weight)
    return module.LinearKL.apply(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, reverse
    )


def linear_jsd(hidden, weight, ref_hidden, ref_weight, beta, temperature=1.0):
    """Exact Jensen–Shannon divergence per position (N,): β KL(reference‖m) + (1−β) KL(policy‖m).

    m = β reference + (1−β) policy is the mixture; the divergence is at most log 2 (arXiv 2306.13649). Shapes,
    gradients and ValueErrors as in linear_kl. In plain torch on every device, tile by tile.

    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> linear_jsd(torch.tensor([[1.0], [9.0]]), weight, torch.tensor([[1.0], [-9.0]]), weight, beta=0.5)
    tensor([0.0000, 0.6919])
    """
    N, D = hidden.shape
    V = len(weight)
    _check_temperature(temperature)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}: at its ends use linear_kl")
    _check_shape("weight", weight, V, D)
    _check_shape("ref_hidden", ref_hidden, N, ref_hidden.shape[-1])
    _check_shape("ref_weight", ref_weight, V, ref_hidden.shape[-1])
    return torch_backend.LinearJSD.apply(hidden, weight, None, ref_hidden, ref_weight, temperature, beta)


def decode_attention(q, k, v, cache_k, cache_v, pos, live, backend=None):
    """One new token per row: writes its key and value into the cache at pos, attends to positions 0 … pos.

    q (B, H, hd), k and v (B, n_kv_head, hd), caches (B, n_kv_head, max_len, hd), pos (B,) int64, all below
    the number `live` → (B, H, hd). Nothing here is differentiable. backend: as in linear_logprob.
    """
    attend = torch_backend.decode_attention
    if _backend(backend, q.flatten(1)) is not torch_backend:
        from nanorlhf.kernels.triton_decode import decode_attention as attend
    return attend(q, k, v, cache_k, cache_v, pos, live)
