"""Week 4 · The policy gradient. Replace each `raise NotImplementedError`, then `python -m course check 4`."""

import torch  # noqa: F401


def bandit_gradient(logits, reward):
    """The exact gradient of a bandit's expected reward with respect to its logits, as a formula.

    logits (K,)   the policy is π = softmax(logits), one probability for each of K actions
    reward (K,)   what each action pays
    → (K,)        ∂/∂logits of Σ_a π(a) reward(a)

    An action that pays more than the average gets a positive entry, one that pays less a negative one.

    >>> bandit_gradient(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))  # π = (½, ½), the average is ½
    tensor([ 0.2500, -0.2500])
    """
    raise NotImplementedError


def reinforce_loss(logp, adv, mask, denom):
    """The loss whose gradient is the policy gradient: −Σ advantage · log-prob / denom.

    logp (B, T)   log-prob of each token under the policy, with its gradient
    adv (B,)      advantage of each response; a constant: no gradient may flow into it
    mask (B, T)   True at sampled tokens; nothing else counts
    denom         a number, by default in the trainer the sampled tokens of the whole step
    → scalar

    What stands outside the mask is garbage, also -inf or 1000: drop it with torch.where, as 0 · inf is nan.

    >>> logp = torch.tensor([[-9.0, -1.0, -2.0], [-9.0, -3.0, -9.0]])
    >>> mask = torch.tensor([[False, True, True], [False, True, False]])
    >>> reinforce_loss(logp, torch.tensor([1.0, -1.0]), mask, 3)  # (1·(1 + 2) − 1·3) / 3
    tensor(0.)
    """
    raise NotImplementedError


def rewards_to_go(reward, mask):
    """For each token the sum of the rewards from this token on: a token cannot change what was before it.

    reward (B, T)   reward of each token; what stands outside the mask is garbage
    mask (B, T)     True at sampled tokens
    → (B, T)        Σ over k ≥ t of reward[b, k], and 0 outside the mask

    >>> reward = torch.tensor([[7.0, 1.0, 0.0, 2.0]])
    >>> rewards_to_go(reward, torch.tensor([[False, True, True, True]]))
    tensor([[0., 3., 2., 2.]])
    """
    raise NotImplementedError


def leave_one_out(reward):
    """The advantage with the best simple baseline: the mean of the *other* samples of the same prompt.

    reward (P, G)   rewards of G samples for each of P prompts, G ≥ 2
    → (P, G)        each reward minus the mean of the other G − 1 of its row

    The sample's own reward is not in its baseline, so that the baseline does not depend on the sample, and
    the gradient has no bias.

    >>> leave_one_out(torch.tensor([[1.0, 0.0, 0.0]]))  # 1 − 0, 0 − ½, 0 − ½
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    raise NotImplementedError
