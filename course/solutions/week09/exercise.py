import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def online_logsumexp(blocks):
    m = s = None
    for block in blocks:
        largest = block.amax(1)
        new_m = largest if m is None else torch.maximum(m, largest)
        new_s = (block - new_m[:, None]).exp().sum(1)
        if m is not None:
            new_s = new_s + s * (m - new_m).exp()
        m = new_m
        s = new_s
    return m + s.log()


def logprob_backward(logits, tokens, grad):
    d_logits = -logits.softmax(-1)
    rows = torch.arange(len(tokens))
    d_logits[rows, tokens] += 1
    return d_logits * grad[:, None]


def tiled_log_probs(hidden, weight, tokens, block):
    spans = [slice(start, start + block) for start in range(0, len(weight), block)]
    total = online_logsumexp(hidden @ weight[span].T for span in spans)
    at_token = (hidden * weight[tokens]).sum(1)
    return at_token - total


if triton:

    @triton.jit
    def softmax_kernel(x, out, V, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(x + row * V + columns, mask=inside, other=-float("inf"))
        e = tl.exp(z - tl.max(z, 0))
        tl.store(out + row * V + columns, e / tl.sum(e, 0), mask=inside)


def softmax(x):
    out = torch.full_like(x, torch.nan)
    N, V = x.shape
    softmax_kernel[(N,)](x, out, V, BLOCK=triton.next_power_of_2(V))
    return out
