"""Exact answers for a policy small enough to enumerate: all its responses, and the optimum of RLHF.

    π*(y|x) ∝ π_ref(y|x) exp(r(y) / β)          maximises E_π[r] − β KL(π‖π_ref), the objective of RLHF

With 5 tokens and responses of at most 3 there are 85 responses and 21 prefixes, so that expectations are sums
and the trainers can be measured against the distribution they are meant to reach (docs/optimum.md).

A policy is a table (S, V) of log π(a|s): one row for each prefix s of a response, one column for each token.
"""

import torch


class Tree:
    """All responses of at most max_new_tokens; EOS ends one, and so does the limit: a truncated one counts.

    responses  list of N tuples of ids, EOS included where there is one
    prefixes   list of S tuples: what the policy may stand behind when it chooses a token, shortest first
    tokens, state, mask (N, T): the t-th token, the prefix it was chosen behind, whether there is one
    ends, follow (S, V): whether token a at s ends a response, and which response or prefix s + a is
    """

    def __init__(self, vocab_size, max_new_tokens, eos_id):
        self.responses, self.prefixes, self.levels = [], [], []
        level = [()]
        for t in range(max_new_tokens):
            self.levels.append(slice(len(self.prefixes), len(self.prefixes) + len(level)))
            self.prefixes += level
            longer = [(*s, a) for s in level for a in range(vocab_size)]
            ended = [t + 1 == max_new_tokens or s[-1] == eos_id for s in longer]
            self.responses += [s for s, end in zip(longer, ended) if end]
            level = [s for s, end in zip(longer, ended) if not end]
        where = {s: i for i, s in enumerate(self.prefixes)}
        which = {y: i for i, y in enumerate(self.responses)}
        width = range(max_new_tokens)
        self.tokens = torch.tensor([[y[t] if t < len(y) else 0 for t in width] for y in self.responses])
        self.state = torch.tensor([[where.get(y[:t], 0) if t < len(y) else 0 for t in width] for y in which])
        self.mask = torch.tensor([[t < len(y) for t in width] for y in self.responses])
        nodes = [[(*s, a) for a in range(vocab_size)] for s in self.prefixes]
        self.ends = torch.tensor([[s in which for s in row] for row in nodes])
        self.follow = torch.tensor([[which[s] if s in which else where[s] for s in row] for row in nodes])

    def table(self, model, prompt, temperature=1.0):
        """The policy of `model` behind a prompt (a list of ids), by one batched forward → (S, V) float64."""
        rows = [[*prompt, *s] for s in self.prefixes]
        last = torch.tensor([len(row) - 1 for row in rows])
        width = int(last.max()) + 1  # causal: what stands right of a row's end cannot touch it
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        hidden = model(tokens.to(model.device))[torch.arange(len(rows)), last]  # (S, D)
        return (model.head_logits(hidden).double() / temperature).log_softmax(-1).cpu()

    def token_logp(self, table):
        """(S, V) → (N, T): log-prob of each token of each response, 0 outside the mask."""
        return torch.where(self.mask, table[self.state, self.tokens], 0.0)

    def logp(self, table):
        """(S, V) → (N,): log-prob of each response. Their probabilities sum to 1."""
        return self.token_logp(table).sum(1)

    def from_logp(self, logp):
        """(N,) log-probs of the responses → the policy (S, V): log π(a|s) = log P(s a …) − log P(s …)."""
        mass = torch.full(self.ends.shape, -torch.inf, dtype=logp.dtype)
        for level in reversed(self.levels):
            below = mass.logsumexp(-1)  # (S,); of the longer prefixes, which are done
            ends, follow = self.ends[level], self.follow[level]
            mass[level] = torch.where(ends, logp[follow * ends], below[follow * ~ends])
        return mass - mass.logsumexp(-1, keepdim=True)

    def backward_induction(self, ref, reward, rule):
        """The policy that at every prefix is rule(ref, Q), Q(s,a) = E_π[r | s,a] under that very policy.

        ref (S, V); reward (N,); rule: log π_ref(·|s), Q(s,·), (k, V) each → log π(·|s). Longest prefixes
        first: there Q is the reward itself.
        """
        table, value = torch.empty_like(ref), torch.zeros(len(ref), dtype=ref.dtype)
        for level in reversed(self.levels):
            ends, follow = self.ends[level], self.follow[level]
            q = torch.where(ends, reward[follow * ends], value[follow * ~ends])
            table[level] = rule(ref[level], q)
            value[level] = (table[level].exp() * q).sum(-1)
        return table


def kl(logp, other):
    """KL(p‖q) of two distributions given as log-probs (..., N) → (...)."""
    return torch.where(logp > -torch.inf, logp.exp() * (logp - other), 0.0).sum(-1)


def mean_std(logp, x):
    """Mean and standard deviation of x (N,) under the distribution with log-probs logp (N,)."""
    p = logp.exp()
    mean = (p * x).sum()
    return mean, (p * (x - mean).square()).sum().sqrt()


def optimum(ref_logp, reward, beta):
    """log π*(y) (N,): the reference tilted by the reward, what maximises E[r] − β KL(π‖π_ref)."""
    return (ref_logp + reward / beta).log_softmax(-1)


def frontier(ref_logp, reward, betas):
    """The most reward at any KL to the reference: → kl, reward (len(betas),), one tilt for each β.

    No policy lies above this curve: π* maximises E[r] − β KL, so a policy with its KL has no more reward.
    """
    tilts = [optimum(ref_logp, reward, beta) for beta in betas]
    points = [(kl(logp, ref_logp), (logp.exp() * reward).sum()) for logp in tilts]
    return tuple(torch.stack(side) for side in zip(*points))


def reverse_kl_rule(ref, q, beta):
    """max over π(·|s) of E[Q] − β KL(π‖π_ref): π ∝ π_ref exp(Q/β). k2, k3 × ratio in the loss lead here."""
    return (ref + q / beta).log_softmax(-1)


def forward_kl_rule(ref, q, beta):
    """max over π(·|s) of E[Q] − β KL(π_ref‖π): π = β π_ref / (λ − Q). Plain k3 in the loss leads here.

    λ > max Q is the root of Σ_a π(a|s) = 1, by bisection. The bracket: at its left end one token alone has
    probability 1, at its right end no token has more than under the reference.
    """
    top = q.max(-1, keepdim=True).values
    low = (q + beta * ref.exp()).max(-1, keepdim=True).values
    high = top + beta
    for _ in range(100):
        lam = (low + high) / 2
        too_much = (beta * ref.exp() / (lam - q)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, lam, low), torch.where(too_much, high, lam)
    return (ref + torch.log(beta / (high - q))).log_softmax(-1)


def normalised(tree, ref, reward, beta, rule=reverse_kl_rule):
    """As backward_induction with reward / σ, σ the standard deviation of r under the resulting policy.

    Where advantages of group_std lead, for large groups → the policy (S, V), σ. From σ under the reference
    downwards, as training does; ValueError where it goes on to 0: the policy collapses (β too small).
    """
    sigma = mean_std(tree.logp(ref), reward)[1]
    for _ in range(10000):
        table = tree.backward_induction(ref, reward, lambda ref, q, b=beta * sigma: rule(ref, q, b))
        old, sigma = sigma, mean_std(tree.logp(table), reward)[1]
        if abs(old - sigma) <= 1e-12 * old:
            return table, sigma
        if not sigma > 1e-6 * abs(reward).max():
            break
    raise ValueError(f"beta {beta}: the policy collapses on the best response; no spread of rewards is left")
