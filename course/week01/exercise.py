"""Week 1 · Language models, sampling, log-probs. Replace each `raise NotImplementedError`, then
`python -m course check 1`."""

import torch  # noqa: F401


def log_probs(logits, tokens, temperature):
    """The log-probability of one token in each row of logits.

    logits (N, V)   a score for each of V tokens
    tokens (N,)     int64, the token that is asked about in each row
    temperature     > 0: the distribution is softmax(logits / temperature)
    → (N,)          log softmax(logits / temperature) at the token, in nats, ≤ 0

    It must be finite for logits of ±1000: the log of a softmax loses everything there, log_softmax does not.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> log_probs(logits, torch.tensor([0, 1]), 1.0)  # log ½, log 0.731
    tensor([-0.6931, -0.3133])
    """
    raise NotImplementedError


def entropy(logits):
    """The entropy of each row's distribution: how undecided the model is.

    logits (N, V)   may hold -inf, the logit of a token that is impossible
    → (N,)          −Σ_v p(v) log p(v) in nats, between 0 and log V; 0 · log 0 counts as 0

    >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))  # a coin, and a certainty
    tensor([0.6931, 0.0000])
    """
    raise NotImplementedError


def sample_token(logits, u, temperature):
    """Draw one token for each row, from a uniform random number that is given: inversion of the CDF.

    logits (N, V)   a score for each token
    u (N,)          uniform random numbers in [0, 1)
    temperature     > 0: tokens are drawn from softmax(logits / temperature)
    → (N,)          int64: the first token whose cumulative probability is larger than u; the last token if
                    rounding leaves none

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3)  # cumulative: 0.5, 0.8, 1.0
    >>> sample_token(logits, torch.tensor([0.1, 0.6, 0.9]), 1.0)
    tensor([0, 1, 2])
    """
    raise NotImplementedError


def merge(ids, pair, new_id):
    """One merge of byte-pair encoding: every occurrence of a pair becomes one new token.

    ids      list of ints
    pair     tuple of two ints
    new_id   int
    → list   the ids from left to right, where each non-overlapping `pair` is replaced by new_id

    >>> merge([1, 2, 3, 1, 2], (1, 2), 9)
    [9, 3, 9]
    >>> merge([5, 5, 5], (5, 5), 9)  # the first two are used up
    [9, 5]
    """
    raise NotImplementedError


def cached_attention(q, k, v, cache_k, cache_v):
    """Attention of one new token with a key-value cache: the step that decoding repeats.

    q, k, v (D,)              query, key and value of the new token, one head
    cache_k, cache_v (T, D)   keys and values of the T tokens before it; T may be 0
    → out (D,), new_k (T + 1, D), new_v (T + 1, D)

    The new token attends to all tokens before it and to itself, with weights softmax(q · key / √D).
    The caches come back with its key and value behind the old ones; the old tensors stay as they are.

    >>> one = torch.tensor([1.0])
    >>> out, new_k, new_v = cached_attention(one, one, 5 * one, torch.ones(1, 1), 3 * torch.ones(1, 1))
    >>> out, new_v  # both keys are alike: the mean of 3 and 5
    (tensor([4.]), tensor([[3.],
            [5.]]))
    """
    raise NotImplementedError
