import torch

from course.checking import Wrong, brief, call, demand, expect, random, tensor

POINTS = {"log_probs": 3, "entropy": 2, "sample_token": 3, "merge": 2, "cached_attention": 3}


def check_log_probs(log_probs):
    logits = tensor([[0.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    tokens = torch.tensor([0, 1])
    logp = logits - logits.exp().sum(1, keepdim=True).log()
    want = torch.stack([logp[0, 0], logp[1, 1]])
    expect(call(log_probs, logits, tokens, 1.0), want, "log_probs([[0, 0, 1], [0, 1, -1]], [0, 1], 1)", {
        "your result has the wrong sign: a log-probability is never above 0": -want,
        "these are probabilities: the log is missing": want.exp(),
        "these are the logits themselves: the softmax is missing": tensor([0.0, 1.0]),
        "you picked the token of the next row, or always the first": torch.stack([logp[0, 1], logp[1, 0]]),
        "the softmax runs over the rows (dimension 0): it runs over the vocabulary, the last dimension":
            torch.stack([logits.log_softmax(0)[0, 0], logits.log_softmax(0)[1, 1]]),
    })  # fmt: skip
    half = (logits / 0.5).log_softmax(-1)
    want = torch.stack([half[0, 0], half[1, 1]])
    expect(call(log_probs, logits, tokens, 0.5), want, "log_probs([[0, 0, 1], [0, 1, -1]], [0, 1], 0.5)", {
        "the temperature is forgotten": torch.stack([logp[0, 0], logp[1, 1]]),
        "you multiply by the temperature, and it divides the logits":
            torch.stack([(logits * 0.5).log_softmax(-1)[i, i] for i in (0, 1)]),
        "you divide the log-probs by the temperature; the logits are divided, before the softmax":
            torch.stack([logp[0, 0], logp[1, 1]]) / 0.5,
    })  # fmt: skip
    far = call(log_probs, tensor([[1000.0, 0.0]]), torch.tensor([1]), 1.0)
    demand(
        torch.as_tensor(far).isfinite().all(),
        "for logits of (1000, 0) your log-prob of the second token is not finite: log(softmax) is log(0) "
        "there. log_softmax, or logits − logsumexp, gives −1000",
    )


def check_entropy(entropy):
    p = tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    want = -(p * p.log()).sum(1)
    expect(call(entropy, p.log()), want, "entropy of (½, ¼, ¼) and (0.8, 0.1, 0.1)", {
        "your entropy has the wrong sign: it is never negative": -want,
        "the entropy is in bits: take the natural logarithm": want / tensor(2.0).log(),
        "you average over the vocabulary: it is a sum over v": want / 3,
        "you sum log p without the weights p": -p.log().sum(1),
        "you sum over the rows too: one entropy for each row": want.sum().expand(2),
        "you average over the rows too: one entropy for each row": want.mean().expand(2),
    })  # fmt: skip
    expect(call(entropy, p.log() + 7), want, "entropy of both with 7 added to every logit", {
        "logits are not log-probs: they have to be normalised first":
            -((p.log() + 7).exp() * (p.log() + 7)).sum(1),
    })  # fmt: skip
    sure = call(entropy, tensor([[0.0, -torch.inf]]))
    demand(
        torch.as_tensor(sure).isfinite().all(),
        "where a logit is -inf your entropy is nan: 0 · log 0 is nan in floating point, and it must count "
        "as 0 (torch.where)",
    )


def check_sample_token(sample_token):
    logits = tensor([0.5, 0.3, 0.2]).log().expand(5, 3).clone()
    u = tensor([0.1, 0.6, 0.9, 0.0, 0.79])
    got = call(sample_token, logits, u, 1.0)
    demand(got is not None, "sample_token returns None: the function has no `return` at its end")
    demand(
        isinstance(got, torch.Tensor) and got.dtype == torch.int64,
        f"sample_token returns {brief(got)}: tokens are ids, so return an int64 tensor (of "
        "torch.zeros(N, dtype=torch.int64), argmax, or a sum over booleans)",
    )
    expect(got, torch.tensor([0, 1, 2, 0, 1]), "sample_token of (0.5, 0.3, 0.2) for u = 0.1, 0.6, 0.9, 0, "
                                               "0.79", {
        "you always take the most probable token: this is greedy decoding, and u is not used":
            torch.tensor([0, 0, 0, 0, 0]),
        "you return the token before the right one: it is the first whose cumulative probability is *larger* "
        "than u": torch.tensor([-1, 0, 1, -1, 0]),
        "you are one token too far": torch.tensor([1, 2, 3, 1, 2]),
        "you go through the tokens from the last to the first": torch.tensor([2, 1, 0, 2, 0]),
    })  # fmt: skip
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for temperature in (1.0, 0.5):
        many = tensor([0.5, 0.3, 0.2]).log().expand(2000, 3).clone()
        got = torch.as_tensor(call(sample_token, many, u, temperature))
        share = got.bincount(minlength=3).double() / 2000
        p = (many[0] / temperature).softmax(0)
        other = (many[0] * temperature).softmax(0)
        where = f"the shares of 2,000 draws with evenly spread u at temperature {temperature}"
        expect(share, p, where, {
            "the temperature is forgotten": many[0].softmax(0),
            "you multiply by the temperature, and it divides": other,
        }, tol=2e-3)  # fmt: skip
    top = call(sample_token, tensor([[0.1, 0.2, 0.3]]).float(), torch.tensor([1 - 6e-8]), 1.0)
    demand(
        int(top) == 2,
        "for u just below 1 your token is not the last one: the cumulative sum may round to less "
        "than u, so that no token is larger; the last token is meant",
    )


def check_merge(merge):
    for ids, pair, want in [
        ([1, 2, 3, 1, 2], (1, 2), [9, 3, 9]),
        ([5, 5, 5], (5, 5), [9, 5]),
        ([1, 2], (2, 1), [1, 2]),
        ([3, 1], (1, 2), [3, 1]),
        ([], (1, 2), []),
        ([1, 1, 2, 2], (1, 2), [1, 9, 2]),
    ]:
        argument = list(ids)
        got = merge(argument, pair, 9)
        where = f"merge({ids}, {pair}, 9)"
        demand(argument == ids, f"{where} changes the list that it is given; build a new one")
        if got == want:
            continue
        shows = f"\n    {where}\n    yours: {brief(got)}\n    right: {want}"
        if got is None:
            raise Wrong(f"{where} returns None: the function has no `return` at its end")
        if pair == (2, 1):
            raise Wrong(f"the order of the pair counts: (2, 1) is not (1, 2).{shows}")
        if len(got) > len(want) and got.count(9) < want.count(9):
            raise Wrong(f"an occurrence of the pair is left over: replace every one.{shows}")
        if len(got) == len(want) - 1 and got == want[:-1]:
            raise Wrong(f"the last token is lost: the loop stops one token too early.{shows}")
        if got.count(9) >= want.count(9) and got.count(pair[1]) + got.count(9) > want.count(9):
            raise Wrong(f"the pair's second token is read again: after a merge go on behind both.{shows}")
        raise Wrong(f"the result is another one.{shows}")


def check_cached_attention(cached_attention):
    keys = random(4, 6)
    values = random(4, 6, seed=1)
    queries = random(4, 6, seed=2) * 3
    cache_k = torch.zeros(0, 6, dtype=torch.float64)
    cache_v = torch.zeros(0, 6, dtype=torch.float64)
    for t in range(4):
        result = call(cached_attention, queries[t], keys[t], values[t], cache_k, cache_v)
        demand(
            isinstance(result, tuple) and len(result) == 3,
            "return three tensors: the output, the new keys and the new values",
        )
        out, new_k, new_v = result
        scores = keys[: t + 1] @ queries[t]
        where = f"the output for token {t} of 4, with {t} tokens in the cache"
        mistakes = {
            "the scores are not divided by √D": scores.softmax(0) @ values[: t + 1],
            "the scores are divided by D, and not by √D": (scores / 6).softmax(0) @ values[: t + 1],
            "the scores are not put through a softmax": scores / 6**0.5 @ values[: t + 1],
            "the mean of the values: the query plays no part": values[: t + 1].mean(0),
        }
        if t:
            old = (scores[:t] / 6**0.5).softmax(0) @ values[:t]
            mistakes[
                "the new token does not attend to itself: its own key and value belong to the cache first"
            ] = old
            from_keys = (scores / 6**0.5).softmax(0) @ keys[: t + 1]
            mistakes["you sum the keys with these weights: the values are summed"] = from_keys
        expect(out, (scores / 6**0.5).softmax(0) @ values[: t + 1], where, mistakes)
        for name, new, right in (("keys", new_k, keys), ("values", new_v, values)):
            expect(new, right[: t + 1], f"the {name} after token {t}", {
                f"the new one of the {name} must stand behind the old ones, not before them":
                    torch.cat((right[t : t + 1], right[:t])),
            })  # fmt: skip
        cache_k = new_k
        cache_v = new_v
