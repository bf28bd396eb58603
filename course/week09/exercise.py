"""Week 9 · Kernels: from the softmax to the tile. Replace each `raise NotImplementedError`, then
`python -m course check 9`. The last exercise needs Triton (Linux), and no GPU."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac or Windows: the last exercise is skipped
    triton = tl = None


def online_logsumexp(blocks):
    """The log-sum-exp of logits that arrive in blocks of columns, of which only one is at hand at a time.

    blocks   iterable of tensors (N, b) of any widths b ≥ 1, together (N, V); it can be gone through once
    → (N,)   log Σ_v exp(logit_v)

    Carry two numbers for each row, the largest logit m so far and s = Σ exp(logit − m). When a larger m
    comes, the old sum is multiplied by exp(old m − new m). Keep nothing else: V may be 200,000.

    >>> blocks = iter([torch.tensor([[0.0, 1.0]]), torch.tensor([[1000.0]])])
    >>> online_logsumexp(blocks)  # e^1000 is infinite in fp32, the result is not
    tensor([1000.])
    """
    raise NotImplementedError


def logprob_backward(logits, tokens, grad):
    """Backwards through the log-prob of a token, as a formula and without autograd.

    logits (N, V)
    tokens (N,)     int64
    grad (N,)       ∂loss/∂logp of each row, where logp = log softmax(logits) at the token
    → (N, V)        ∂loss/∂logits

    >>> logprob_backward(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([1.0]))  # 1 − ½, −½
    tensor([[ 0.5000, -0.5000]])
    """
    raise NotImplementedError


def tiled_log_probs(hidden, weight, tokens, block):
    """Log-probs straight from hidden states, a block of the vocabulary at a time: N×V logits never exist.

    hidden (N, D)   hidden states
    weight (V, D)   the unembedding; logits would be hidden · weightᵀ
    tokens (N,)     int64
    block           columns of logits at a time, 1 ≤ block; V need not be a multiple of it
    → (N,)          log softmax(hidden · weightᵀ) at the token

    No tensor of more than N · block numbers may appear on the way (the inputs aside).

    >>> weight = torch.tensor([[0.0], [0.0], [1.0]])
    >>> tiled_log_probs(torch.tensor([[1.0]]), weight, torch.tensor([2]), block=2)  # 1 − log(1 + 1 + e)
    tensor([-0.5514])
    """
    raise NotImplementedError


if triton:

    @triton.jit
    def softmax_kernel(x, out, V, BLOCK: tl.constexpr):
        """One program for each row: out[row] = softmax(x[row]), for rows of V numbers, V ≤ BLOCK.

        x, out   pointers to fp32 matrices (N, V), rows one behind the other
        BLOCK    a power of two

        Program number tl.program_id(0) is the row. tl.arange(0, BLOCK) gives the columns, of which those with
        columns < V exist: load them with tl.load(..., mask=..., other=...) and store with the same mask. What
        has `other` to be, so that columns that do not exist have no part in the maximum and the sum?
        """
        pass  # replace this line


def softmax(x):
    """The softmax of each row by `softmax_kernel`; this function is right as it is.

    x (N, V) fp32 → (N, V)
    """
    out = torch.full_like(x, torch.nan)
    N, V = x.shape
    softmax_kernel[(N,)](x, out, V, BLOCK=triton.next_power_of_2(V))
    return out
