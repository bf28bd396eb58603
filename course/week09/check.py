import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course.checking import Skipped, Wrong, as_tensor, call, demand, expect, random, same, tensor

POINTS = {"online_logsumexp": 3, "logprob_backward": 3, "tiled_log_probs": 4, "softmax": 4}


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made (views of the inputs are none)."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.inputs:
                self.size = max(self.size, x.numel())
        return out


def check_online_logsumexp(online_logsumexp):
    logits = random(3, 10) * 3
    for widths in ((10,), (4, 4, 2), (1,) * 10):
        got = online_logsumexp(iter(logits.split(widths, dim=1)))
        want = logits.logsumexp(1)
        blocks = list(logits.split(widths, dim=1))
        m = torch.stack([b.amax(1) for b in blocks]).cummax(0).values
        unscaled = sum((b - top[:, None]).exp().sum(1) for b, top in zip(blocks, m))
        expect(got, want, f"online_logsumexp of 10 columns in blocks of {widths}", {
            "the old sum is not rescaled when a larger maximum comes: multiply it by exp(old m − new m)":
                m[-1] + unscaled.log(),
            "this is the last block alone": blocks[-1].logsumexp(1),
            "the maximum is not added back: it is m + log s": want - logits.amax(1),
            "the log is missing: it is m + log s":
                logits.amax(1) + (logits - logits.amax(1)[:, None]).exp().sum(1),
            "this is the maximum alone": logits.amax(1),
            "this is the sum of the blocks' log-sum-exps: their sums have to be added, not their logs":
                sum(b.logsumexp(1) for b in blocks),
        })  # fmt: skip
    far = online_logsumexp(iter([torch.tensor([[-900.0, 1.0]]), torch.tensor([[900.0]])]))
    demand(
        as_tensor(far, torch.zeros(1), "online_logsumexp").isfinite().all(),
        "for logits of ±900 the result is not finite: subtract the running maximum before exp",
    )
    deep = online_logsumexp(iter(tensor([[-2000.0, -2001.0]]).split(1, dim=1)))
    expect(deep, tensor([[-2000.0, -2001.0]]).logsumexp(1), "online_logsumexp of logits -2000 and -2001", {
        "the running maximum begins at 0, which is larger than both, so that every exp is 0: begin with -inf":
            tensor([-torch.inf]),
    })  # fmt: skip
    long = (torch.full((2, 10), float(i)) for i in range(100))
    with Largest([]) as seen:
        online_logsumexp(long)
    demand(
        seen.size <= 40,  # a block joined to the running result is 22, all blocks are 2,000
        f"a tensor of {seen.size} numbers is built from blocks of 20: the blocks are collected. Keep only "
        "the maximum and the sum of each row",
    )


def check_logprob_backward(logprob_backward):
    logits = random(3, 5) * 2
    tokens = torch.tensor([4, 0, 2])
    grad = tensor([1.0, -2.0, 0.5])
    leaf = logits.clone().requires_grad_()
    leaf.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1).backward(grad)
    want = leaf.grad
    p = logits.softmax(-1)
    one = torch.nn.functional.one_hot(tokens, 5)
    got = call(logprob_backward, logits, tokens, grad)
    expect(got, want, "logprob_backward of random logits (3, 5) with upstream gradients (1, -2, 0.5)", {
        "your gradient has the wrong sign: this is that of the cross-entropy, minus the log-prob": -want,
        "the upstream gradient is forgotten: each row is multiplied by its grad": one - p,
        "the 1 at the token is missing: a token's own logit raises its log-prob": -p * grad[:, None],
        "the softmax is missing: every logit has a part in the normaliser": one * grad[:, None],
        "only the token's own logit gets a gradient, 1 − p: the others get −p": one * (1 - p) * grad[:, None],
        "there is one factor p too many: this is the gradient of the probability, not of its log":
            want * p.gather(1, tokens[:, None]),
    })  # fmt: skip


def check_tiled_log_probs(tiled_log_probs):
    hidden = random(4, 6)
    weight = random(50, 6, seed=1)
    tokens = torch.tensor([0, 49, 7, 23])
    logits = hidden @ weight.T
    want = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    at_token = logits.gather(1, tokens[:, None]).squeeze(1)
    for block in (50, 8, 1):
        whole = 50 // block * block
        got = call(tiled_log_probs, hidden, weight, tokens, block)
        expect(got, want, f"tiled_log_probs of 50 tokens in blocks of {block}", {
            "your result has the wrong sign: it is the token's logit minus the log-sum-exp": -want,
            "the last block is lost, where V is no multiple of the block":
                at_token - logits[:, :whole].logsumexp(1),
            "this is the token's logit: the log-sum-exp is not subtracted": at_token,
            "each token is normalised within its own block: the sum has to run over all blocks": torch.stack(
                [at_token[i] - logits[i, t // block * block : t // block * block + block].logsumexp(0)
                 for i, t in enumerate(tokens.tolist())]),
        })  # fmt: skip
    with Largest([hidden, weight, tokens]) as seen:
        tiled_log_probs(hidden, weight, tokens, 8)
    demand(
        seen.size < 4 * 50,
        f"a tensor of {seen.size} numbers appears on the way, which is all N×V logits: compute them a "
        "block at a time, and let each go before the next",
    )
    demand(
        seen.size <= 4 * 8,
        f"a tensor of {seen.size} numbers appears on the way, and N · block is 32: is it the part of the "
        "weight that is copied, or are the blocks collected?",
    )


def check_softmax(softmax):
    try:
        import triton
    except ImportError:
        raise Skipped("Triton is not installed here (it needs Linux): this exercise is not counted") from None
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("Triton's interpreter is off: set TRITON_INTERPRET=1 before Python starts")
    for N, V in ((1, 4), (3, 5), (2, 1), (4, 100)):
        x = (random(N, V) * 3).float()
        got = softmax(x)
        where = f"the kernel on a matrix of {N} rows and {V} columns"
        z = torch.nn.functional.pad(x, (0, triton.next_power_of_2(V) - V))
        zeros = z.softmax(1)[:, :V]
        e = x.exp()
        if isinstance(got, torch.Tensor) and got.isnan().all():
            raise NotImplementedError
        if isinstance(got, torch.Tensor) and N > 1 and got[0].isfinite().all() and got[1:].isnan().any():
            raise Wrong(
                f"rows behind the first are not written: tl.program_id(0) is the row, at row * V. {where}"
            )
        expect(got, x.softmax(1), where, {
            "columns that do not exist are loaded as 0 and count in the sum: `other` has to be -inf, so that "
            "their exp is 0": zeros,
            "the result is not divided by the sum of the row": (x - x.amax(1, keepdim=True)).exp(),
            "this is exp(x): subtract the maximum, and divide by the sum": e,
            "this is the log of the softmax": x.log_softmax(1),
        })  # fmt: skip
    big = softmax(torch.tensor([[200.0, 0.0, 199.0]]))
    demand(
        same(big, torch.tensor([[200.0, 0.0, 199.0]]).softmax(1), 1e-5),
        "for x = (200, 0, 199) the kernel's result is wrong or not finite: subtract the row's maximum "
        "before exp",
    )
