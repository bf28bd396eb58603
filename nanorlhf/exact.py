"""Exact answers for a policy small enough to enumerate: all its responses, and the optimum of RLHF.

    π*(y|x) ∝ π_ref(y|x) exp(r(y) / β)          maximises E_π[r] − β KL(π‖π_ref), the objective of RLHF

With 5 tokens and responses of at most 3 there are 85 responses and 21 prefixes. Expectations are then sums,
and the trainers can be compared with the distribution that they should reach (docs/optimum.md).

A policy is a table (S, V) of log π(a|s): a row for each prefix s of a response, a column for each token a.
"""

import torch

from nanorlhf.data import pad


class Tree:
    """All responses of at most max_new_tokens tokens: those that end with EOS and those cut at the limit.

    responses            list of N tuples of ids, with their EOS
    prefixes             list of S tuples, shortest first: what the policy has written when it chooses a token
    levels               one mask (S,) for each length: the prefixes of this length
    tokens, state, mask  (N, T): the t-th token of a response; the prefix before it; whether there is one
    ends, follow         (S, V): whether token a after prefix s ends a response; the index of the response
                         s + a where it does, of the prefix s + a elsewhere

    >>> tree = Tree(vocab_size=2, max_new_tokens=2, eos_id=1)
    >>> tree.responses, tree.prefixes
    ([(1,), (0, 0), (0, 1)], [(), (0,)])
    >>> tree.follow  # prefix () → prefix 1 or response 0; prefix (0,) → response 1 or 2
    tensor([[1, 0],
            [1, 2]])
    """

    def __init__(self, vocab_size, max_new_tokens, eos_id):
        self.responses = []
        self.prefixes = [()]
        ends = []
        follow = []
        for prefix in self.prefixes:  # the loop appends to this list, one length after the other
            for token in range(vocab_size):
                longer = (*prefix, token)
                ended = token == eos_id or len(longer) == max_new_tokens
                sequences = self.responses if ended else self.prefixes
                ends.append(ended)
                follow.append(len(sequences))
                sequences.append(longer)
        self.ends = torch.tensor(ends).view(-1, vocab_size)
        self.follow = torch.tensor(follow).view(-1, vocab_size)

        number = {prefix: s for s, prefix in enumerate(self.prefixes)}
        states = []
        for response in self.responses:
            before = [response[:t] for t in range(len(response))]
            states.append([number[prefix] for prefix in before])
        self.state, lengths = pad(states, 0)
        self.tokens = pad(self.responses, 0)[0]
        self.mask = torch.arange(max_new_tokens) < lengths[:, None]
        of_length = torch.tensor([len(prefix) for prefix in self.prefixes])
        self.levels = [of_length == length for length in range(max_new_tokens)]

    def table(self, model, prompt, temperature=1.0):
        """The policy of `model` after a prompt (a list of ids), by one batched forward → (S, V) float64."""
        sequences = [[*prompt, *prefix] for prefix in self.prefixes]
        tokens, lengths = pad(sequences, 0)
        hidden = model(tokens.to(model.device))  # (S, T, D)
        last = hidden[torch.arange(len(tokens)), lengths - 1]  # (S, D)
        logits = model.head_logits(last).cpu().double() / temperature  # a Mac's GPU has no float64
        return logits.log_softmax(-1)

    def token_logp(self, table):
        """(S, V) → (N, T): log-prob of each token of each response, 0 outside the mask."""
        return torch.where(self.mask, table[self.state, self.tokens], 0.0)

    def logp(self, table):
        """(S, V) → (N,): log-prob of each response. Their probabilities sum to 1."""
        return self.token_logp(table).sum(1)

    def from_logp(self, logp):
        """Log-probs of the responses (N,) → the policy (S, V): log π(a|s) = log P(s a …) − log P(s …)."""
        mass = torch.full(self.ends.shape, -torch.inf, dtype=logp.dtype)  # log P(s a …)
        for level in reversed(self.levels):  # the longest prefixes first
            prefix_mass = mass.logsumexp(-1)  # (S,)
            mass[level] = self._after(level, logp, prefix_mass)
        return mass - mass.logsumexp(-1, keepdim=True)

    def backward_induction(self, ref, reward, rule):
        """The policy (S, V) that is rule(ref, Q) at every prefix, where Q(s,a) = E_π[r | s,a] under itself.

        ref (S, V); reward (N,); rule takes log π_ref(·|s) and Q(s,·), (k, V) each, and gives log π(·|s), as
        `optimum` does. The longest prefixes come first: there Q is the reward itself.
        """
        table = torch.empty_like(ref)
        value = torch.zeros(len(ref), dtype=ref.dtype)  # E_π[r | s]
        for level in reversed(self.levels):
            q = self._after(level, reward, value)
            logp = rule(ref[level], q)
            table[level] = logp
            value[level] = (logp.exp() * q).sum(-1)
        return table

    def _after(self, level, of_responses, of_prefixes):
        """Values of responses (N,) and of prefixes (S,) → (k, V): those of s + a for each s of a level."""
        ends = self.ends[level]
        follow = self.follow[level]
        out = torch.empty(ends.shape, dtype=of_prefixes.dtype)
        out[ends] = of_responses[follow[ends]]
        out[~ends] = of_prefixes[follow[~ends]]
        return out


def kl(logp, other):
    """KL(p‖q) of two distributions given as log-probs (..., N) → (...).

    >>> kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    terms = logp.exp() * (logp - other)
    return torch.where(logp > -torch.inf, terms, 0.0).sum(-1)  # 0 log 0 = 0


def optimum(ref_logp, reward, beta):
    """log π*(y) (N,): the reference tilted by the reward. It maximises E[r] − β KL(π‖π_ref).

    >>> optimum(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), beta=1.0).exp()
    tensor([0.2689, 0.7311])
    """
    return (ref_logp + reward / beta).log_softmax(-1)
