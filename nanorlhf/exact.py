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
    tokens, state, mask  (N, T): the t-th token of a response; the prefix before it; whether there is one

    >>> tree = Tree(vocab_size=2, max_new_tokens=2, eos_id=1)
    >>> tree.responses, tree.prefixes
    ([(1,), (0, 0), (0, 1)], [(), (0,)])
    """

    def __init__(self, vocab_size, max_new_tokens, eos_id):
        self.responses = []
        self.prefixes = [()]
        for prefix in self.prefixes:  # the loop appends to this list, one length after the other
            for token in range(vocab_size):
                longer = (*prefix, token)
                if token == eos_id or len(longer) == max_new_tokens:
                    self.responses.append(longer)
                else:
                    self.prefixes.append(longer)

        number = {prefix: s for s, prefix in enumerate(self.prefixes)}
        states = []
        for response in self.responses:
            before = [response[:t] for t in range(len(response))]
            states.append([number[prefix] for prefix in before])
        self.state, lengths = pad(states, 0)
        self.tokens = pad(self.responses, 0)[0]
        self.mask = torch.arange(max_new_tokens) < lengths[:, None]

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
