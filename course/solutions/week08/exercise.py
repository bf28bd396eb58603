import math
import re


def chain_reward(prompt, response):
    answer = sum(map(int, prompt[:-1])) % 10
    match = re.fullmatch(r"(<[0-9]*>)?\|([0-9])", response)
    return float(match is not None and int(match[2]) == answer)


def pass_at_k(n, c, k):
    all_wrong = math.comb(n - c, k) / math.comb(n, k)
    return 1 - all_wrong


def mean_and_error(reward):
    of_prompts = reward.mean(1)
    return of_prompts.mean(), of_prompts.std() / math.sqrt(len(of_prompts))
