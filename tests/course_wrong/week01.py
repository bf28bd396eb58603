"""Typical wrong answers to week 1: (exercise, what the message must say, the wrong function)."""

import torch


def at(logp, tokens):
    return logp.gather(1, tokens[:, None]).squeeze(1)


def nll(logits, tokens, temperature):
    return -at((logits / temperature).log_softmax(-1), tokens)


def no_temperature(logits, tokens, temperature):
    return at(logits.log_softmax(-1), tokens)


def times_temperature(logits, tokens, temperature):
    return at((logits * temperature).log_softmax(-1), tokens)


def log_of_softmax(logits, tokens, temperature):
    return at((logits / temperature).softmax(-1).log(), tokens)


def over_rows(logits, tokens, temperature):
    return at((logits / temperature).log_softmax(0), tokens)


def negative_entropy(logits):
    p = logits.softmax(-1)
    return (p * p.log()).sum(-1)


def mean_entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).mean(-1)


def nan_entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def not_normalised(logits):
    return -(logits.exp() * logits).sum(-1)


def in_bits(logits):
    p = logits.softmax(-1)
    return -(p * p.log2()).sum(-1)


def greedy(logits, u, temperature):
    return logits.argmax(-1)


def draw_without_temperature(logits, u, temperature):
    return (logits.softmax(-1).cumsum(-1) <= u[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)


def one_before(logits, u, temperature):
    return ((logits / temperature).softmax(-1).cumsum(-1) <= u[:, None]).sum(-1) - 1


def off_the_end(logits, u, temperature):
    p = (logits / temperature).softmax(-1)
    return (p.cumsum(-1) * (1 - 1e-6) <= u[:, None]).sum(-1)


def as_floats(logits, u, temperature):
    return off_the_end(logits, u, temperature).float()


def first_only(ids, pair, new_id):
    for i in range(len(ids) - 1):
        if tuple(ids[i : i + 2]) == pair:
            return ids[:i] + [new_id] + ids[i + 2 :]
    return list(ids)


def loses_the_last(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids) - 1:
        if tuple(ids[i : i + 2]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def overlapping(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new_id)
            if i + 2 == len(ids):
                break
            i += 1
        else:
            out.append(ids[i])
            i += 1
    return out


def any_order(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        if sorted(ids[i : i + 2]) == sorted(pair):
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def attention(q, k, v, cache_k, cache_v, scale=0.5, own=True):
    new_k = torch.cat((cache_k, k[None]))
    new_v = torch.cat((cache_v, v[None]))
    seen_k = new_k if own or not len(cache_k) else cache_k
    seen_v = new_v if own or not len(cache_v) else cache_v
    return (seen_k @ q / len(q) ** scale).softmax(0) @ seen_v, new_k, new_v


def unscaled(q, k, v, cache_k, cache_v):
    return attention(q, k, v, cache_k, cache_v, scale=0)


def by_the_width(q, k, v, cache_k, cache_v):
    return attention(q, k, v, cache_k, cache_v, scale=1)


def not_itself(q, k, v, cache_k, cache_v):
    return attention(q, k, v, cache_k, cache_v, own=False)


def in_front(q, k, v, cache_k, cache_v):
    out, _, _ = attention(q, k, v, cache_k, cache_v)
    return out, torch.cat((k[None], cache_k)), torch.cat((v[None], cache_v))


WRONG = [
    ("log_probs", "wrong sign", nll),
    ("log_probs", "temperature is forgotten", no_temperature),
    ("log_probs", "multiply by the temperature", times_temperature),
    ("log_probs", "log_softmax", log_of_softmax),
    ("log_probs", "over the rows", over_rows),
    ("entropy", "wrong sign", negative_entropy),
    ("entropy", "average over the vocabulary", mean_entropy),
    ("entropy", "0 · log 0", nan_entropy),
    ("entropy", "normalised", not_normalised),
    ("entropy", "in bits", in_bits),
    ("sample_token", "greedy", greedy),
    ("sample_token", "temperature is forgotten", draw_without_temperature),
    ("sample_token", "before the right one", one_before),
    ("sample_token", "not the last one", off_the_end),
    ("sample_token", "int64 tensor", as_floats),
    ("merge", "every one", first_only),
    ("merge", "last token is lost", loses_the_last),
    ("merge", "go on behind both", overlapping),
    ("merge", "order of the pair", any_order),
    ("cached_attention", "not divided by √D", unscaled),
    ("cached_attention", "divided by D", by_the_width),
    ("cached_attention", "attend to itself", not_itself),
    ("cached_attention", "behind the old ones", in_front),
]
