"""How fast this machine multiplies matrices now: measured, as a busy machine is slower than a free one."""

import time

import torch
import torch.nn.functional as F

MATRICES = 8  # different ones, or a small one would stay in a core's cache


@torch.no_grad()
def flops(rows, n_in, n_out, dtype=torch.float32, device="cpu", seconds=0.2):
    """Operations a second of a linear layer on `rows` tokens, measured for about so many seconds.

    It draws no random numbers: a run that measures has the same samples as one that does not.
    """
    x = torch.ones(rows, n_in, dtype=dtype, device=device)
    weights = [torch.ones(n_out, n_in, dtype=dtype, device=device) for _ in range(MATRICES)]
    F.linear(x, weights[0])  # the first call sets up threads and libraries
    calls = 0
    start = time.perf_counter()
    while True:
        for weight in weights:
            y = F.linear(x, weight)
        calls += MATRICES
        y[0, 0].item()  # waits for a GPU
        elapsed = time.perf_counter() - start
        if elapsed > seconds:
            return 2.0 * rows * n_in * n_out * calls / elapsed


def best_threads(most, n_in, n_out, dtype=torch.float32):
    """→ (number of CPU threads, {number: operations a second}): 1, 2, 4, … `most`, the fastest now.

    On a busy machine two threads can be slower than one, as each waits for the other at every matrix. All
    take turns, three times, so that a short disturbance hits each of them. `most` wins unless another is a
    tenth faster.
    """
    numbers = sorted({most, *(1 << k for k in range(10) if 1 << k < most)})
    before = torch.get_num_threads()
    rates = dict.fromkeys(numbers, 0.0)
    for _ in range(3):
        for n in numbers:
            torch.set_num_threads(n)
            rates[n] += flops(256, n_in, n_out, dtype, seconds=0.05) / 3
    torch.set_num_threads(before)
    fastest = max(rates, key=rates.get)
    return (fastest if rates[fastest] > 1.1 * rates[most] else most), rates
