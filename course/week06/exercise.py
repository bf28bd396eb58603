"""Week 6 · PPO: the critic and the details. Replace each `raise NotImplementedError`, then
`python -m course check 6`."""

import torch  # noqa: F401


def shape_rewards(score, logp, ref_logp, mask, finished, beta, no_eos_score):
    """The reward of each token in RLHF: minus the KL penalty everywhere, and the score at the end.

    score (B,)                   what the reward model says of each whole response
    logp, ref_logp, mask (B, T)  log-probs under policy and reference; True at sampled tokens
    finished (B,) bool           whether the response ended with EOS
    beta                         KL coefficient, reward per nat
    no_eos_score                 the score of a response that never ended, in place of its own
    → (B, T)                     −beta · (logp − ref_logp) at each sampled token, plus the score at the *last*
                                 sampled token; 0 outside the mask

    >>> logp = torch.tensor([[0.0, -1.0, -0.5]])
    >>> ref_logp = torch.tensor([[0.0, -2.0, -0.5]])
    >>> mask = torch.tensor([[False, True, True]])
    >>> shape_rewards(torch.tensor([3.0]), logp, ref_logp, mask, torch.tensor([True]), 0.5, -1.0)
    tensor([[ 0.0000, -0.5000,  3.0000]])
    """
    raise NotImplementedError


def gae(reward, value, mask, gamma, lam):
    """Generalized advantage estimation, and the returns that the critic learns.

    reward, value, mask (B, T)   value[b, t] is the critic's estimate *before* token t; the sampled tokens of
                                 a row are one block, and what stands outside the mask is garbage
    gamma, lam                   discount, λ
    → adv (B, T), ret (B, T)     adv[t] = δ_t + γλ adv[t+1],  δ_t = reward[t] + γ value[t+1] − value[t]
                                 ret[t] = adv[t] + value[t];  both are 0 outside the mask

    Behind a row's last sampled token value and advantage are 0.

    >>> reward = torch.tensor([[9.0, 0.0, 1.0]])
    >>> value = torch.tensor([[9.0, 0.5, 0.25]])
    >>> gae(reward, value, torch.tensor([[False, True, True]]), 1.0, 1.0)
    (tensor([[0.0000, 0.5000, 0.7500]]), tensor([[0., 1., 1.]]))
    """
    raise NotImplementedError


def whiten(x, mask):
    """Advantages with mean 0 and variance 1 over all sampled tokens of the rollout.

    x, mask (B, T)
    → (B, T)   (x − mean) / √(variance + 1e-8), both over the mask, the variance divided by n (not n − 1);
               0 outside the mask

    >>> whiten(torch.tensor([[9.0, 1.0, 3.0]]), torch.tensor([[False, True, True]]))
    tensor([[ 0., -1.,  1.]])
    """
    raise NotImplementedError


def value_loss(value, old_value, ret, mask, clip, denom):
    """The critic's clipped loss: ½ · the larger of two squared errors, summed over the mask / denom.

    value (B, T)      the critic now, with its gradient
    old_value (B, T)  the critic at the time of sampling
    ret (B, T)        returns, from `gae`
    clip              the second error is that of old_value + clamp(value − old_value, ±clip)
    → scalar          ½ Σ max((value − ret)², (clipped value − ret)²) / denom

    >>> one = torch.tensor([[1.0]])
    >>> value_loss(one, 0 * one, one, one.bool(), 0.2, 1)  # the clipped value is 0.2: ½ · 0.8²
    tensor(0.3200)
    """
    raise NotImplementedError
