"""Week 2 · Supervised fine-tuning and masks. Replace each `raise NotImplementedError`, then
`python -m course check 2`."""

import torch  # noqa: F401


def pad_right(rows, pad_id):
    """Rows of token ids of different lengths → one rectangular batch, padded on the right.

    rows         list of B lists of ints
    pad_id       the id that fills up the shorter rows
    → tokens (B, T) int64, lengths (B,) int64; T is the length of the longest row

    >>> pad_right([[5, 6], [7]], pad_id=0)
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    raise NotImplementedError


def response_mask(prompt_lens, lengths, T):
    """Which tokens of a padded batch belong to the responses, their end-of-sequence tokens included.

    prompt_lens (B,)   tokens of each prompt
    lengths (B,)       tokens of each row, prompt and response together
    T                  width of the batch
    → (B, T) bool      True for prompt_lens[b] ≤ t < lengths[b]

    It is made from lengths, and never from token ids: EOS is a token that the model has to learn, and a pad
    that happens to have the same id must not count.

    >>> response_mask(torch.tensor([1, 2]), torch.tensor([3, 4]), 4).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    raise NotImplementedError


def token_log_probs(logits, tokens):
    """From the logits of a model to the log-prob of each token: the one shift by one position.

    logits (B, T, V)   logits[b, t] is the model's prediction of the token *behind* position t
    tokens (B, T)      int64
    → (B, T)           logp[b, t] = log π(tokens[b, t] | tokens[b, :t]); logp[b, 0] is 0, as nothing predicts
                       the first token

    >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [5.0, 0.0]]])
    >>> token_log_probs(logits, torch.tensor([[0, 1, 1]]))  # 0, log ½, log 0.731
    tensor([[ 0.0000, -0.6931, -0.3133]])
    """
    raise NotImplementedError


def sft_loss(logp, mask, denom):
    """The loss of supervised fine-tuning: cross-entropy over the response tokens of one optimizer step.

    logp (B, T)   log-prob of each token
    mask (B, T)   True at the tokens that are to be learnt
    denom         tokens that the whole step counts, of which this may be one micro-batch
    → scalar      −Σ over the mask of logp / denom

    The mean of two micro-batches' means is not the mean over their tokens, unless both have equally many.
    With the denominator of the whole step the parts add up to it, however the step is cut.

    What stands outside the mask is garbage, also -inf or 1000: drop it with torch.where, as 0 · inf is nan.

    >>> logp = torch.tensor([[0.0, -1.0, -2.0]])
    >>> sft_loss(logp, torch.tensor([[False, True, True]]), denom=2)
    tensor(1.5000)
    """
    raise NotImplementedError
