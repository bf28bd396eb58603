"""Week 8 · Verifiable rewards, pass@k, what RL adds. Replace each `raise NotImplementedError`, then
`python -m course check 8`."""

import math  # noqa: F401
import re  # noqa: F401


def chain_reward(prompt, response):
    """The checker of the task *chain*: does the response give the digits' sum modulo 10?

    prompt     digits and an equals sign, such as "697470="
    response   "|3", or with a thought before it "<652633>|3"
    → float    1.0 if the *whole* response has this form and the digit behind "|" is right, else 0.0

    The form is an optional thought, "<", any number of digits 0–9, ">"; then "|", and exactly one digit 0–9.
    Whatever a policy can write will be written once its reward depends on it: "|0|1|2|3" must not pay.

    >>> chain_reward("697470=", "|3"), chain_reward("697470=", "<652633>|3"), chain_reward("697470=", "|33")
    (1.0, 1.0, 0.0)
    """
    raise NotImplementedError


def pass_at_k(n, c, k):
    """The probability that at least one of k samples is right, estimated without bias from n ≥ k samples.

    n, c, k    n samples were drawn, c of them are right; k ≤ n
    → float    the share of the k-subsets of the n samples in which at least one is right

    1 − (1 − c/n)^k is not it: that draws with replacement, and is too low.

    >>> pass_at_k(4, 2, 1), round(pass_at_k(4, 2, 2), 4)  # of the six pairs one has both wrong samples
    (0.5, 0.8333)
    """
    raise NotImplementedError


def mean_and_error(reward):
    """The mean reward over held-out prompts, and its standard error.

    reward (P, n)     rewards of n samples for each of P ≥ 2 prompts
    → mean, error     both scalars: the mean over all; the standard deviation of the P prompts' means (divided
                      by P − 1), over √P

    The samples of one prompt are not independent: a hard prompt is hard for all of them. Treating P·n samples
    as independent makes the error too small by up to √n.

    >>> import torch
    >>> mean_and_error(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    (tensor(0.5000), tensor(0.5000))
    """
    raise NotImplementedError
