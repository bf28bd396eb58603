"""Figures of an evaluation: pass@k, maj@k, means with their standard errors."""

import math
from collections import defaultdict
from functools import lru_cache

import torch


def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, of n drawn c were; k ≤ n."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@lru_cache(maxsize=100_000)
def win_share(mine, others, k):
    """Share of the k-subsets in which an answer with `mine` votes has most, ties shared; others: a tuple."""
    won, n = 0.0, mine + sum(others)
    for v in range(1, min(mine, k) + 1):  # votes it gets; whoever has fewer than v in all cannot matter
        low = sum(c for c in others if c < v)
        ways = defaultdict(int, {(j, 0): math.comb(low, j) for j in range(min(low, k - v) + 1)})
        for c in others:
            if c >= v:
                new = defaultdict(int)
                for (used, ties), w in ways.items():
                    for j in range(min(v, k - v - used) + 1):
                        new[used + j, ties + (j == v)] += w * math.comb(c, j)
                ways = new
        won += math.comb(mine, v) * sum(w / (t + 1) for (used, t), w in ways.items() if used == k - v)
    return won / math.comb(n, k)


def maj_at_k(answers, rewards, k):
    """Expected reward of the answer most frequent among k of the samples: the mean over its own samples."""
    of = defaultdict(list)
    for answer, reward in zip(answers, rewards, strict=True):
        of[answer].append(reward)
    total = 0.0
    for answer, got in of.items():
        if any(got):
            others = tuple(sorted(len(x) for other, x in of.items() if other != answer))
            total += win_share(len(got), others, k) * sum(got) / len(got)
    return total


def mean_se(x):
    """Mean of the prompts' means (P, n) or (P,), and its standard error."""
    x = x.double().reshape(len(x), -1).mean(1)
    return x.mean().item(), (x.std(correction=1) / math.sqrt(len(x))).item() if len(x) > 1 else math.nan


def sample_figures(score, length, finished, n):
    """Scores, lengths and ends (N,) of N samples, n to a prompt → {"reward", "reward_se", "len", ...}.

    len_wrong: length of those that scored 0 or less. A figure that there is none of is None.
    """
    reward, se = mean_se(score.view(-1, n))
    wrong = length[score <= 0]
    return {
        "reward": reward, "reward_se": None if math.isnan(se) else se, "len": length.mean().item(),
        "len_wrong": wrong.mean().item() if len(wrong) else None, "stop": finished.mean().item(),
    }


class Figures(dict):
    """Figures of a step, put together from pieces: chunks of tokens, micro-batches, processes, updates.

    kinds: for each name "sum", "max" or "first", which says how two values become one. A name that is not
    declared is a KeyError. None means that a piece had nothing to measure.

    >>> figures = Figures(clip="sum", ratio_max="max", gap="first")
    >>> figures.add({"clip": 0.25, "ratio_max": 1.5, "gap": 0.0})
    >>> figures.add({"clip": 0.25, "ratio_max": 1.25, "gap": 0.5})
    >>> dict(figures)
    {'clip': 0.5, 'ratio_max': 1.5, 'gap': 0.0}
    """

    def __init__(self, **kinds):
        super().__init__()
        self.kinds = kinds

    def add(self, values):
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
