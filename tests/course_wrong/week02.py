"""Typical wrong answers to week 2: (exercise, what the message must say, the wrong function)."""

import torch


def pad_left(rows, pad_id):
    T = max(map(len, rows))
    return torch.tensor([[pad_id] * (T - len(r)) + r for r in rows]), torch.tensor([len(r) for r in rows])


def pad_zero(rows, pad_id):
    T = max(map(len, rows))
    return torch.tensor([r + [0] * (T - len(r)) for r in rows]), torch.tensor([len(r) for r in rows])


def length_by_value(rows, pad_id):
    T = max(map(len, rows))
    tokens = torch.tensor([r + [pad_id] * (T - len(r)) for r in rows])
    return tokens, ((tokens != pad_id) & (tokens != 0)).sum(1)


def padded_lengths(rows, pad_id):
    T = max(map(len, rows))
    return torch.tensor([r + [pad_id] * (T - len(r)) for r in rows]), torch.full((len(rows),), T)


def between(first, last):
    def mask(prompt_lens, lengths, T):
        t = torch.arange(T)
        return (t >= prompt_lens[:, None] + first) & (t < lengths[:, None] + last)

    return mask


def all_real(prompt_lens, lengths, T):
    return torch.arange(T) < lengths[:, None]


def to_the_end(prompt_lens, lengths, T):
    return torch.arange(T) >= prompt_lens[:, None]


def added(prompt_lens, lengths, T):
    return between(0, 0)(prompt_lens, prompt_lens + lengths, T)


def at(logits, tokens):
    return logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)


def no_shift(logits, tokens):
    return at(logits, tokens)


def no_shift_zero(logits, tokens):
    return torch.cat((torch.zeros(len(tokens), 1), at(logits, tokens)[:, 1:]), 1)


def backwards(logits, tokens):
    return torch.cat((torch.zeros(len(tokens), 1), at(logits[:, 1:], tokens[:, :-1])), 1)


def too_far_left(logits, tokens):
    return torch.cat((at(logits[:, :-1], tokens[:, 1:]), torch.zeros(len(tokens), 1)), 1)


def too_short(logits, tokens):
    return at(logits[:, :-1], tokens[:, 1:])


def positive(logp, mask, denom):
    return (logp * mask).sum() / denom


def unmasked(logp, mask, denom):
    return -logp.sum() / denom


def rows_means(logp, mask, denom):
    return -((logp * mask).sum(1) / mask.sum(1)).mean()


def own_tokens(logp, mask, denom):
    return -(logp * mask).sum() / mask.sum()


def nan_outside(logp, mask, denom):
    return -(logp * mask).sum() / denom


WRONG = [
    ("pad_right", "on the left", pad_left),
    ("pad_right", "pad_id", pad_zero),
    ("pad_right", "id 0", length_by_value),
    ("pad_right", "padded rows", padded_lengths),
    ("response_mask", "EOS", between(0, -1)),
    ("response_mask", "first token of each response", between(1, 0)),
    ("response_mask", "one token early", between(-1, 0)),
    ("response_mask", "too far", between(0, 1)),
    ("response_mask", "prompt counts too", all_real),
    ("response_mask", "padding counts too", to_the_end),
    ("response_mask", "length of the response", added),
    ("token_log_probs", "no shift", no_shift),
    ("token_log_probs", "only the first column", no_shift_zero),
    ("token_log_probs", "wrong way", backwards),
    ("token_log_probs", "too far left", too_far_left),
    ("token_log_probs", "shape", too_short),
    ("sft_loss", "wrong sign", positive),
    ("sft_loss", "mask is forgotten", unmasked),
    ("sft_loss", "rows' means", rows_means),
    ("sft_loss", "whole step", own_tokens),
    ("sft_loss", "nan", nan_outside),
]
