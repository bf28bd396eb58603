import itertools

from course.checking import Wrong, call, demand, expect, random, tensor

POINTS = {"chain_reward": 3, "pass_at_k": 3, "mean_and_error": 2}

# response to 697470=, whose answer is 3; its reward; what a function that says otherwise has overlooked
RESPONSES = [
    ("|3", 1.0, "a right answer without a thought must pay"),
    ("<652633>|3", 1.0, "a right answer behind a thought must pay"),
    ("<>|3", 1.0, "an empty thought is a thought: any number of digits"),
    ("<999>|3", 1.0, "the thought is not judged: only the answer pays"),
    ("|4", 0.0, "a wrong digit must not pay"),
    ("|33", 0.0, "two digits behind the bar: the form has exactly one, and a policy would write all ten"),
    (
        "|0|1|2|3",
        0.0,
        "several answers, one of them right: the whole response has to match, not a part of it",
    ),
    ("|3|", 0.0, "something stands behind the answer: the whole response has to match, up to its end"),
    ("|3\n", 0.0, "a newline behind the answer: `$` matches before it, re.fullmatch does not"),
    ("3", 0.0, "the bar is missing"),
    ("x|3", 0.0, "something stands before the answer: the whole response has to match, from its beginning"),
    ("<65|2633>|3", 0.0, "a thought consists of digits alone"),
    ("<652633|3", 0.0, "the thought is not closed"),
    ("|٣", 0.0, "an Arabic digit: \\d matches it, [0-9] does not"),
    ("", 0.0, "an empty response is none, and no error"),
    ("|", 0.0, "the answer is missing"),
]


def check_chain_reward(chain_reward):
    for response, want, overlooked in RESPONSES:
        try:
            got = chain_reward("697470=", response)
        except NotImplementedError:
            raise
        except Exception as error:
            raise Wrong(
                f"chain_reward('697470=', {response!r}) raises {type(error).__name__}: a reward function "
                "must give 0 for whatever a policy may write"
            ) from None
        demand(got is not None, "chain_reward returns None: the function has no `return` at its end")
        demand(
            float(got) == want,
            f"{overlooked}. chain_reward('697470=', {response!r}) gives {got}, and {want} is right",
        )
    got = chain_reward("555555=", "|0")
    demand(
        float(got) == 1.0,
        f"the sum is taken modulo 10: 30 gives 0. chain_reward('555555=', '|0') gives {got}",
    )
    demand(isinstance(chain_reward("12=", "|3"), float), "the reward should be a float, 1.0 or 0.0")


def check_pass_at_k(pass_at_k):
    for n, c, k in [(5, 3, 2), (4, 2, 1), (4, 2, 2), (6, 1, 3), (6, 5, 2), (5, 0, 3), (5, 5, 5), (7, 2, 7)]:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        want = sum(map(any, subsets)) / len(subsets)
        all_right = sum(map(all, subsets)) / len(subsets)
        try:
            got = pass_at_k(n, c, k)
        except (ValueError, ZeroDivisionError) as error:
            raise Wrong(
                f"pass_at_k({n}, {c}, {k}) raises {type(error).__name__}: with fewer than k wrong samples "
                "every subset has a right one, and the answer is 1"
            ) from None
        expect(got, want, f"pass_at_k({n}, {c}, {k})", {
            "you draw with replacement, 1 − (1 − c/n)^k: biased, and too low": 1 - (1 - c / n) ** k,
            "this is the probability that all k are wrong: subtract it from 1": 1 - want,
            "this is the probability that all k are right": all_right,
            "k plays no part in your formula: this is pass@1": c / n,
            "you multiply pass@1 by k: the chances overlap": min(1.0, k * c / n),
        }, tol=1e-6)  # fmt: skip


def check_mean_and_error(mean_and_error):
    reward = (random(5, 8) + 2 * random(5, 1, seed=1) > 0).double()
    result = call(mean_and_error, reward)
    demand(isinstance(result, tuple) and len(result) == 2, "return two numbers: the mean and its error")
    mean, error = result
    expect(mean, reward.mean(), "the mean of 5 prompts with 8 samples each")
    of_prompts = reward.mean(1)
    right = of_prompts.std() / 5**0.5
    expect(error, right, "the standard error of 5 prompts with 8 samples each", {
        "you treat all samples as independent: the samples of one prompt are not, so take the prompts' means "
        "first": reward.std() / 40**0.5,
        "this is the standard deviation over the prompts: divide it by √P": of_prompts.std(),
        "you divide by √n, the samples of a prompt: the number of prompts P is what counts":
            of_prompts.std() / 8**0.5,
        "you divide by P, and not by √P": of_prompts.std() / 5,
        "the standard deviation divides by P, and it should divide by P − 1":
            of_prompts.std(correction=0) / 5**0.5,
        "the means are taken over the prompts (dimension 0), and not over the samples of a prompt":
            reward.mean(0).std() / 8**0.5,
        "this is the mean of the errors within the prompts: the prompts' own spread is what counts":
            (reward.std(1) / 8**0.5).mean(),
    })  # fmt: skip
    exact = call(mean_and_error, tensor([[1.0, 1.0], [0.0, 0.0]]))[1]
    expect(exact, 0.5, "the standard error of [[1, 1], [0, 0]]")
