"""Figures of an evaluation: pass@k, maj@k, means with their standard errors."""

import math
from collections import defaultdict
from functools import lru_cache

import torch


def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, where c of the n samples drawn are; k ≤ n.

    >>> pass_at_k(4, 2, 1), pass_at_k(4, 2, 2)  # of the 6 pairs only one has both wrong samples
    (0.5, 0.8333333333333334)
    """
    all_wrong = math.comb(n - c, k) / math.comb(n, k)
    return 1 - all_wrong


@lru_cache(maxsize=100_000)
def win_share(votes, others, k):
    """Share of the k-subsets of all samples in which an answer has the most votes; of t tied ones 1/t.

    votes    number of samples with this answer
    others   tuple: number of samples with each other answer

    >>> win_share(2, (1,), 1), win_share(1, (1,), 2)
    (0.6666666666666666, 0.5)
    """
    n = votes + sum(others)
    won = 0.0
    for v in range(1, min(votes, k) + 1):  # votes for this answer in the subset
        # ways[used, ties]: number of ways in which the other answers get `used` votes in all, `ties` of them
        # exactly v and none more. Answers with fewer than v samples cannot tie: one binomial counts them.
        low = sum(c for c in others if c < v)
        ways = defaultdict(int)
        for used in range(min(low, k - v) + 1):
            ways[used, 0] = math.comb(low, used)
        for c in others:
            if c >= v:
                more = defaultdict(int)
                for (used, ties), count in ways.items():
                    for j in range(min(v, k - v - used) + 1):
                        now_tied = ties + 1 if j == v else ties
                        more[used + j, now_tied] += count * math.comb(c, j)
                ways = more
        shares = 0.0
        for (used, ties), count in ways.items():
            if used == k - v:
                shares += count / (ties + 1)
        won += math.comb(votes, v) * shares
    return won / math.comb(n, k)


def maj_at_k(answers, rewards, k):
    """Expected reward of the most frequent answer among k of the n samples.

    answers, rewards   of the n samples; the reward of an answer is the mean over its samples
    The mean is over all k-subsets, and ties are broken at random.

    >>> maj_at_k(["7", "7", "8"], [1.0, 1.0, 0.0], 1), maj_at_k(["7", "7", "8"], [1.0, 1.0, 0.0], 3)
    (0.6666666666666666, 1.0)
    """
    rewards_of = defaultdict(list)
    for answer, reward in zip(answers, rewards, strict=True):
        rewards_of[answer].append(reward)
    total = 0.0
    for answer, own in rewards_of.items():
        if any(own):  # rewards of 0 add nothing
            others = [len(rewards_of[other]) for other in rewards_of if other != answer]
            share = win_share(len(own), tuple(sorted(others)), k)
            total += share * sum(own) / len(own)
    return total


def mean_se(x):
    """Mean of the prompts' means (P, n) or (P,), and its standard error."""
    x = x.cpu().double().reshape(len(x), -1).mean(1)  # on the CPU: a Mac's GPU has no float64
    se = math.nan  # of a single prompt
    if len(x) > 1:
        se = (x.std(correction=1) / math.sqrt(len(x))).item()
    return x.mean().item(), se


def sample_figures(roll, n):
    """Figures of a Rollout of n samples a prompt → {"reward", "reward_se", "len", "stop", "dead"}.

    reward_se is the standard error over the prompts: the n samples of one prompt are not independent. dead is
    the share of prompts whose samples all scored the same. A figure that cannot be measured is None; without
    rewards there are the figures len and stop alone.
    """
    figures = {
        "len": roll.response_len.float().mean().item(),
        "stop": roll.finished.float().mean().item(),
    }
    if roll.reward is None:
        return figures
    groups = roll.reward.view(-1, n)  # (prompts, n)
    _, se = mean_se(groups)
    figures["dead"] = None
    if n > 1:
        figures["dead"] = (groups.amax(1) == groups.amin(1)).float().mean().item()
    figures["reward"] = roll.reward.mean().item()
    figures["reward_se"] = None if math.isnan(se) else se
    return figures


def step_means(parts, counts):
    """Values of a step's micro-batches, dicts {name: (b,)}, and the step's {name: count} → {name: mean}.

    The mean is None where the whole step has no value. A process with a part of the rows gets a part of it.

    >>> parts = [{"acc": torch.tensor([1.0, 0.0])}, {"acc": torch.tensor([1.0, 1.0])}]
    >>> step_means(parts, {"acc": 4})
    {'acc': 0.75}
    """
    means = {}
    for name, count in counts.items():
        total = torch.cat([values[name] for values in parts]).sum()
        means[name] = (total / count).item() if count else None
    return means


class Figures(dict):
    """Figures of a step, put together from pieces: chunks of tokens, micro-batches, processes, updates.

    kinds: for each name "sum", "max" or "first", which says how two values become one. A name that is not
    declared is a KeyError. None means that a piece had nothing to measure.

    >>> figures = Figures(clip="sum", ratio_max="max", gap="first")
    >>> figures.add({"clip": 0.25, "ratio_max": 1.5, "gap": 0.0})
    >>> figures.add({"clip": 0.25, "ratio_max": 1.25, "gap": 0.5})
    >>> dict(figures)
    {'clip': 0.5, 'ratio_max': 1.5, 'gap': 0.0}
    >>> figures.averages()
    {'clip': 0.25, 'ratio_max': 1.5, 'gap': 0.0}
    """

    def __init__(self, **kinds):
        super().__init__()
        self.kinds = kinds
        self.pieces = 0
        self.unread = []

    def add(self, values):
        """Add a piece {name: number}."""
        self.pieces += 1
        for name, value in values.items():
            kind = self.kinds[name]
            if self.get(name) is None:
                self[name] = value
            elif value is None or kind == "first":
                continue
            elif kind == "sum":
                self[name] += value
            else:
                self[name] = max(self[name], value)

    def add_tensors(self, values):
        """Add a piece {name: tensor of one number} when `read` is called.

        To read them at once, a GPU's host would wait in every micro-batch until all its work is done.
        """
        self.unread.append({name: value.detach() for name, value in values.items()})

    def read(self):
        """Read the tensors that wait → these figures."""
        for values in self.unread:
            self.add({name: value.item() for name, value in values.items()})
        self.unread = []
        return self

    def averages(self):
        """→ {name: figure}, where every sum is divided by the number of pieces."""
        averages = dict(self)
        for name in self:
            if self.kinds[name] == "sum":
                averages[name] /= self.pieces
        return averages
