"""Typical wrong answers to week 9: (exercise, what the message must say, the wrong function)."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def online(rescale=True, first=None, keep=lambda m, s: m + s.log()):
    def logsumexp(blocks):
        m = first
        s = 0.0
        for block in blocks:
            top = block.amax(1)
            if m is None:
                m = torch.full_like(top, -torch.inf)
            new = torch.maximum(top, torch.as_tensor(m).to(top))
            s = s * ((m - new).exp() if rescale else 1.0) + (block - new[:, None]).exp().sum(1)
            m = new
        return keep(m, s)

    return logsumexp


def collects(blocks):
    return torch.cat(list(blocks), 1).logsumexp(1)


def no_maximum(blocks):
    return sum(block.exp().sum(1) for block in blocks).log()


def sum_of_logs(blocks):
    return sum(block.logsumexp(1) for block in blocks)


def cross_entropy(logits, tokens, grad):
    return (logits.softmax(-1) - torch.nn.functional.one_hot(tokens, logits.shape[1])) * grad[:, None]


def no_upstream(logits, tokens, grad):
    return torch.nn.functional.one_hot(tokens, logits.shape[1]) - logits.softmax(-1)


def no_one(logits, tokens, grad):
    return -logits.softmax(-1) * grad[:, None]


def own_logit_only(logits, tokens, grad):
    return torch.nn.functional.one_hot(tokens, logits.shape[1]) * (1 - logits.softmax(-1)) * grad[:, None]


def all_logits(hidden, weight, tokens, block):
    return (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def tiles(hidden, weight, tokens, block, end=None, sign=1):
    end = len(weight) if end is None else end
    spans = [slice(i, i + block) for i in range(0, end, block)]
    total = online()(hidden @ weight[span].T for span in spans)
    return sign * ((hidden * weight[tokens]).sum(1) - total)


def loses_the_tail(hidden, weight, tokens, block):
    return tiles(hidden, weight, tokens, block, end=len(weight) // block * block)


def negative(hidden, weight, tokens, block):
    return tiles(hidden, weight, tokens, block, sign=-1)


def within_the_block(hidden, weight, tokens, block):
    out = []
    for h, t in zip(hidden, tokens.tolist()):
        own = t // block * block
        out.append(h @ weight[t] - (weight[own : own + block] @ h).logsumexp(0))
    return torch.stack(out)


def two_blocks_at_once(hidden, weight, tokens, block):
    parts = [hidden @ weight[i : i + 2 * block].T for i in range(0, len(weight), 2 * block)]
    total = online()(parts)
    return (hidden * weight[tokens]).sum(1) - total


WRONG = [
    ("online_logsumexp", "rescaled", online(rescale=False)),
    ("online_logsumexp", "begins at 0", online(first=0.0)),
    ("online_logsumexp", "collected", collects),
    ("online_logsumexp", "running maximum before exp", no_maximum),
    ("online_logsumexp", "sums have to be added", sum_of_logs),
    ("online_logsumexp", "not added back", online(keep=lambda m, s: s.log())),
    ("logprob_backward", "wrong sign", cross_entropy),
    ("logprob_backward", "upstream gradient is forgotten", no_upstream),
    ("logprob_backward", "1 at the token is missing", no_one),
    ("logprob_backward", "the others get −p", own_logit_only),
    ("tiled_log_probs", "all N×V logits", all_logits),
    ("tiled_log_probs", "last block is lost", loses_the_tail),
    ("tiled_log_probs", "wrong sign", negative),
    ("tiled_log_probs", "within its own block", within_the_block),
    ("tiled_log_probs", "N · block is 32", two_blocks_at_once),
]

if triton:

    @triton.jit
    def other_is_0(x, out, V, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        at = tl.program_id(0) * V + columns
        z = tl.load(x + at, mask=columns < V, other=0.0)
        e = tl.exp(z - tl.max(z, 0))
        tl.store(out + at, e / tl.sum(e, 0), mask=columns < V)

    @triton.jit
    def no_sum(x, out, V, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        at = tl.program_id(0) * V + columns
        z = tl.load(x + at, mask=columns < V, other=-float("inf"))
        tl.store(out + at, tl.exp(z - tl.max(z, 0)), mask=columns < V)

    @triton.jit
    def overflows(x, out, V, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        at = tl.program_id(0) * V + columns
        e = tl.exp(tl.load(x + at, mask=columns < V, other=-float("inf")))
        tl.store(out + at, e / tl.sum(e, 0), mask=columns < V)

    @triton.jit
    def first_row(x, out, V, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        z = tl.load(x + columns, mask=columns < V, other=-float("inf"))
        e = tl.exp(z - tl.max(z, 0))
        tl.store(out + columns, e / tl.sum(e, 0), mask=columns < V)

    def by(kernel):
        def softmax(x):
            out = torch.full_like(x, torch.nan)
            kernel[(len(x),)](x, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
            return out

        return softmax

    WRONG += [
        ("softmax", "`other` has to be -inf", by(other_is_0)),
        ("softmax", "not divided by the sum", by(no_sum)),
        ("softmax", "maximum before exp", by(overflows)),
        ("softmax", "behind the first", by(first_row)),
    ]
