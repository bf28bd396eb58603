"""Week 5 · GRPO and its family. Replace each `raise NotImplementedError`, then `python -m course check 5`."""

import torch  # noqa: F401


def group_advantages(reward, group, eps=1e-6):
    """GRPO's advantage: each reward, standardised within the samples of its own prompt.

    reward (B,)   reward of each response
    group (B,)    int64: the number of its prompt; the rows of a prompt need not be neighbours
    eps           added to the standard deviation
    → (B,)        (reward − mean of the group) / (standard deviation of the group + eps)

    The standard deviation is the unbiased one (divide by G − 1, as torch.std does). A group whose rewards are
    all equal gets exactly 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    raise NotImplementedError


def token_weights(mask, agg, longest):
    """The weight of each token in the loss of one optimizer step: this is all that "aggregation" means.

    mask (B, T)   True at sampled tokens
    agg           "token"          mean over all sampled tokens of the step               DAPO
                  "seq_mean"       mean over responses of the mean over their tokens      GRPO
                  "seq_sum_const"  mean over responses of the sum over tokens / longest   Dr. GRPO
    longest       the longest response that is allowed, for "seq_sum_const"
    → (B, T)      weights, 0 outside the mask

    >>> mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    >>> token_weights(mask, "seq_mean", longest=3)[:, 1:]  # ½ · ⅓ for each of three, ½ · 1 for the single one
    tensor([[0.1667, 0.1667, 0.1667],
            [0.5000, 0.0000, 0.0000]])
    """
    raise NotImplementedError


def clipped_loss(logp, old_logp, adv, mask, w, clip_low, clip_high):
    """PPO's and GRPO's surrogate: Σ w · max(−A ρ, −A clip(ρ, 1 − clip_low, 1 + clip_high)).

    logp (B, T)       log-probs under the policy, with its gradient
    old_logp (B, T)   log-probs under the policy that sampled, a constant
    adv (B,)          advantage of each response
    mask, w (B, T)    sampled tokens, and the weight of each
    → scalar          ρ = exp(logp − old_logp), token by token

    The larger loss counts, the pessimistic one: a token whose ratio has already moved far enough in the good
    direction has no gradient left, one that moved in the bad direction keeps its own.

    What stands outside the mask is garbage, also -inf or 1000: drop it with torch.where, as 0 · inf is nan.

    >>> logp = torch.tensor([[0.0, 0.5]])  # the ratio of the second token is e^0.5 = 1.65
    >>> mask = torch.tensor([[False, True]])
    >>> clipped_loss(logp, torch.zeros(1, 2), torch.tensor([1.0]), mask, mask.float(), 0.2, 0.2)
    tensor(-1.2000)
    """
    raise NotImplementedError


def sequence_ratio(logp, old_logp, mask):
    """GSPO's ratio: one for each response, the geometric mean of its tokens' ratios.

    logp, old_logp, mask (B, T)   as in `clipped_loss`; every row has at least one sampled token
    → (B,)                        exp(mean over the sampled tokens of logp − old_logp)

    >>> logp = torch.tensor([[9.0, 0.2, 0.4]])
    >>> sequence_ratio(logp, torch.zeros(1, 3), torch.tensor([[False, True, True]]))  # e^0.3
    tensor([1.3499])
    """
    raise NotImplementedError
