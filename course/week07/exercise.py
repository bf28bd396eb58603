"""Week 7 · KL, over-optimisation, DPO. Replace each `raise NotImplementedError`, then
`python -m course check 7`."""

import torch  # noqa: F401


def kl_estimate(logp, ref_logp, kind):
    """Three estimators of KL(π‖π_ref) from tokens that π sampled, one number for each token.

    logp, ref_logp (...)   log-probs of the sampled tokens under policy and reference
    kind                   "k1": log π/π_ref
                           "k2": ½ (log π/π_ref)²
                           "k3": π_ref/π − 1 − log π_ref/π
    → (...)                the mean of k1 and of k3 over samples of π is the KL; k3 is never negative

    >>> logp, ref_logp = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()  # log π/π_ref is log 2
    >>> [round(kl_estimate(logp, ref_logp, kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    raise NotImplementedError


def optimal_policy(ref_logp, reward, beta):
    """The policy that RLHF is after: it maximises E[reward] − beta · KL(π‖π_ref).

    ref_logp (N,)   log-prob of each of all N possible responses under the reference
    reward (N,)     reward of each
    beta            > 0, reward per nat
    → (N,)          log π*(y), where π*(y) ∝ π_ref(y) exp(reward(y) / beta); the probabilities sum to 1

    Rewards may be so large that exp(reward / beta) is infinite: stay in logarithms.

    >>> optimal_policy(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), beta=1.0).exp()
    tensor([0.2689, 0.7311])
    """
    raise NotImplementedError


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """Direct preference optimisation: Bradley–Terry, with beta · log π/π_ref in the place of the reward.

    logp_w, logp_l (B,)   log-prob of the chosen (w) and the rejected (l) response under the policy, summed
                          over its tokens
    ref_w, ref_l (B,)     the same under the reference
    → (B,)                −log σ(beta · [(logp_w − ref_w) − (logp_l − ref_l)]) of each pair

    >>> nats = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-10.5]), torch.tensor([-10.8])
    >>> dpo_loss(*nats, beta=0.1)  # −log σ(0.1 · (0.5 + 0.2))
    tensor([0.6588])
    """
    raise NotImplementedError


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta):
    """IPO: the margin has a target, in place of growing for ever.

    Arguments as in `dpo_loss`
    → (B,)   ([(logp_w − ref_w) − (logp_l − ref_l)] − 1 / (2 beta))² of each pair

    >>> nats = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-10.5]), torch.tensor([-10.8])
    >>> ipo_loss(*nats, beta=0.1)  # (0.7 − 5)²
    tensor([18.4900])
    """
    raise NotImplementedError


def kto_reference(logp, ref_logp):
    """KTO's reference point z0: an estimate of the policy's KL to the reference, never negative.

    logp, ref_logp (B,)   log-probs of *mismatched* responses: written for another prompt, summed over tokens
    → scalar              max(0, mean of logp − ref_logp), a constant: no gradient flows through it

    >>> kto_reference(torch.tensor([-8.0, -9.0]), torch.tensor([-8.5, -9.1]))
    tensor(0.3000)
    """
    raise NotImplementedError


def best_of_n_kl(n):
    """How far best-of-n moves from the policy that it samples from, in nats.

    n         number of samples, of which the best by some score is kept; no two score the same
    → float   the bound log n − (n − 1) / n, which is exact where no response is likely

    >>> best_of_n_kl(1), round(best_of_n_kl(4), 4)
    (0.0, 0.6363)
    """
    raise NotImplementedError
