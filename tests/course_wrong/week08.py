"""Typical wrong answers to week 8: (exercise, what the message must say, the wrong function)."""

import math
import re


def by(pattern, find=re.fullmatch, group=2):
    def reward(prompt, response):
        match = find(pattern, response)
        return float(match is not None and int(match[group]) == sum(map(int, prompt[:-1])) % 10)

    return reward


def last_character(prompt, response):
    return float(response[-1] == str(sum(map(int, prompt[:-1])) % 10))


def splits(prompt, response):
    digit = re.sub("<[0-9]*>", "", response).split("|")[1]
    return float(digit == str(sum(map(int, prompt[:-1])) % 10) and response.count("|") == 1)


def contains(prompt, response):
    return float(f"|{sum(map(int, prompt[:-1])) % 10}" in response)


def without_modulo(prompt, response):
    match = re.fullmatch(r"(<[0-9]*>)?\|([0-9])", response)
    total = sum(map(int, prompt[:-1]))
    return float(match is not None and (int(match[2]) == total or (total == 33 and match[2] == "3")))


def falling(n, c, k):
    return 1 - math.prod((n - c - i) / (n - i) for i in range(k)) if k <= n - c else 1 / 0


def samples_independent(reward):
    return reward.mean(), reward.std() / math.sqrt(reward.numel())


def deviation(reward):
    return reward.mean(), reward.mean(1).std()


def by_samples(reward):
    return reward.mean(), reward.mean(1).std() / math.sqrt(reward.shape[1])


def biased(reward):
    return reward.mean(), reward.mean(1).std(correction=0) / math.sqrt(len(reward))


def over_prompts(reward):
    return reward.mean(), reward.mean(0).std() / math.sqrt(reward.shape[1])


WRONG = [
    ("chain_reward", "two digits behind the bar", last_character),
    ("chain_reward", "whatever a policy may write", splits),
    ("chain_reward", "two digits behind the bar", contains),
    ("chain_reward", "several answers", by(r"(.*)\|([0-9])$", re.match)),
    ("chain_reward", "newline", by(r"^(<[0-9]*>)?\|([0-9])$", re.match)),
    ("chain_reward", "Arabic", by(r"(<\d*>)?\|(\d)")),
    ("chain_reward", "behind the answer", by(r"(<[0-9]*>)?\|([0-9])(?![0-9])", re.match)),
    ("chain_reward", "modulo 10", without_modulo),
    ("pass_at_k", "with replacement", lambda n, c, k: 1 - (1 - c / n) ** k),
    ("pass_at_k", "subtract it from 1", lambda n, c, k: math.comb(n - c, k) / math.comb(n, k)),
    ("pass_at_k", "all k are right", lambda n, c, k: math.comb(c, k) / math.comb(n, k)),
    ("pass_at_k", "pass@1", lambda n, c, k: c / n),
    ("pass_at_k", "fewer than k wrong", falling),
    ("mean_and_error", "independent", samples_independent),
    ("mean_and_error", "divide it by √P", deviation),
    ("mean_and_error", "√n", by_samples),
    ("mean_and_error", "P − 1", biased),
    ("mean_and_error", "dimension 0", over_prompts),
]
