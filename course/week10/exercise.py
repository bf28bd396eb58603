"""Week 10 · Scaling laws, distillation, many GPUs. Replace each `raise NotImplementedError`, then
`python -m course check 10`."""

import torch  # noqa: F401


def fit_sigmoid(compute, reward, start):
    """Fit the scaling law of RL to a run: reward = start + (A − start) / (1 + (C_mid / compute)^B).

    compute (n,), reward (n,)   points of a run, compute > 0
    start                       reward before training
    → A, B, C_mid               floats: the ceiling, in [start, 1]; the steepness, between 0.3 and 10; the
                                compute of half the gain

    By least squares, to about one per cent where the points lie on such a curve and reach 80% of the gain. A
    hint: for a given B and C_mid the curve is linear in A, so that the best A is a formula, and B and C_mid
    can be tried on a grid (logarithmic for both). One fit may take about three seconds: try all C_mid at
    once, as a tensor.

    >>> compute = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    >>> A, B, C_mid = fit_sigmoid(compute, 0.1 + 0.8 / (1 + (4 / compute) ** 2), start=0.1)
    >>> round(A, 1), round(B), round(C_mid)
    (0.9, 2, 4)
    """
    raise NotImplementedError


def distillation_loss(student_logits, teacher_logits, mask, denom):
    """On-policy distillation: the exact reverse KL, KL(student‖teacher), at each sampled token.

    student_logits (B, T, V)   with a gradient; logits[b, t] is here the prediction *of* token t
    teacher_logits (B, T, V)   a constant
    mask (B, T), denom         the sampled tokens, and their number in the whole step
    → scalar                   Σ over the mask of Σ_v p(v) (log p(v) − log q(v)), divided by denom; p is the
                               student's distribution, q the teacher's

    >>> p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log()
    >>> distillation_loss(p, q, torch.tensor([[True]]), 1)
    tensor(0.5108)
    """
    raise NotImplementedError


def mean_over_ranks(sums, counts):
    """The mean loss of a step whose tokens are spread over many GPUs, from what each can say.

    sums (R,)     for each GPU the sum of its tokens' losses
    counts (R,)   for each GPU its number of tokens, possibly 0; one GPU has some
    → scalar      the mean over all tokens of all GPUs

    The mean of the GPUs' means is another number: it would weigh a token on a nearly empty GPU more, and the
    loss would depend on how the rows were dealt out.

    >>> mean_over_ranks(torch.tensor([6.0, 4.0]), torch.tensor([3, 1]))  # 10 / 4; the mean of means is 3
    tensor(2.5000)
    """
    raise NotImplementedError
