"""Week 3 · Preferences and reward models. Replace each `raise NotImplementedError`, then
`python -m course check 3`."""

import torch  # noqa: F401


def pairwise_loss(chosen, rejected):
    """The Bradley–Terry loss of a reward model: minus the log-likelihood of the labels.

    chosen (B,)     rewards of the responses that people preferred
    rejected (B,)   rewards of the other response of each pair
    → scalar        the mean over pairs of −log σ(chosen − rejected)

    It must be right for margins of ±200, where σ is 0 or 1 in floating point: there the loss is 0 or 200.

    >>> pairwise_loss(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 0.5]))  # (0.127 + 0.693) / 2
    tensor(0.4100)
    """
    raise NotImplementedError


def reward_at_end(values, lengths):
    """Read a reward model: it writes a number at every position, and the one at the last token is the reward.

    values (B, T)   a number at every position of a batch that is padded on the right
    lengths (B,)    tokens of each row, prompt and response together, without the pads
    → (B,)          the number at each row's last real token: there the model has read the whole response

    >>> reward_at_end(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([3, 2]))
    tensor([3., 5.])
    """
    raise NotImplementedError


def process_score(logits, ends):
    """Score a response by its steps: the probability that all of them are right.

    logits (B, T)   at each token the logit of "the step that ends here is right"
    ends (B, T)     True at the tokens that end a step; a row has at least one
    → (B,)          the product over its steps of σ(logit)

    Sum log σ, and take exp at the end: then the gradient is finite also at a logit of −200, where σ is 0.

    >>> logits = torch.tensor([[0.0, 7.0, 0.0]])
    >>> process_score(logits, torch.tensor([[True, False, True]]))  # ½ · ½
    tensor([0.2500])
    """
    raise NotImplementedError
