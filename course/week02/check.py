import torch

from course.checking import Wrong, brief, call, demand, expect, gradient, random, tensor

POINTS = {"pad_right": 2, "response_mask": 3, "token_log_probs": 3, "sft_loss": 2}


def check_pad_right(pad_right):
    rows = [[5, 6], [7], [8, 9, 0]]
    result = pad_right(rows, 99)
    demand(rows == [[5, 6], [7], [8, 9, 0]], "the rows that are given were changed; build new lists")
    demand(isinstance(result, tuple) and len(result) == 2, "return two tensors: tokens and lengths")
    tokens, lengths = result
    where = "pad_right([[5, 6], [7], [8, 9, 0]], 99)"
    expect(tokens, torch.tensor([[5, 6, 99], [7, 99, 99], [8, 9, 0]]), f"the tokens of {where}", {
        "you pad on the left: on the right, with a causal mask, no real token ever sees a pad":
            torch.tensor([[99, 5, 6], [99, 99, 7], [8, 9, 0]]),
        "the pads are 0, and pad_id is to be used": torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 0]]),
    })  # fmt: skip
    demand(tokens.dtype == torch.int64, f"tokens are ids, int64, and yours are {tokens.dtype}")
    expect(lengths, torch.tensor([2, 1, 3]), f"the lengths of {where}", {
        "the lengths are those of the padded rows: count the real tokens": torch.tensor([3, 3, 3]),
        "the lengths do not count a real token of id 0: count by len(row), not by the value":
            torch.tensor([2, 1, 2]),
        "the lengths are one too small": torch.tensor([1, 0, 2]),
    })  # fmt: skip


def check_response_mask(response_mask):
    prompts = torch.tensor([1, 2, 3])
    lengths = torch.tensor([3, 4, 4])
    got = call(response_mask, prompts, lengths, 6)
    where = "response_mask of prompts (1, 2, 3), rows (3, 4, 4), T 6"
    demand(isinstance(got, torch.Tensor), f"{where} returns {brief(got)}, and not a tensor")
    expect(got.int(), torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]), where, {
        "the last token of each response is missing: EOS, which the model must learn to write":
            torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
        "the first token of each response is missing": torch.tensor(
            [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]),
        "the mask begins one token early: the last token of the prompt is no response token":
            torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]),
        "the mask goes one token too far: a pad counts": torch.tensor(
            [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]]),
        "the prompt counts too: this is the mask of all real tokens": torch.tensor(
            [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]),
        "the padding counts too: the mask has to end at lengths": torch.tensor(
            [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
        "you take `lengths` for the length of the response: it counts prompt and response together":
            torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
    })  # fmt: skip
    demand(got.dtype == torch.bool, f"the mask should be bool, and yours is {got.dtype}")


def check_token_log_probs(token_log_probs):
    logits = random(2, 4, 5) * 2
    tokens = torch.tensor([[1, 4, 0, 2], [3, 3, 1, 0]])
    logp = logits.log_softmax(-1)
    want = torch.zeros(2, 4, dtype=torch.float64)
    unshifted = torch.zeros(2, 4, dtype=torch.float64)
    later = torch.zeros(2, 4, dtype=torch.float64)
    left = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for t in range(4):
            unshifted[b, t] = logp[b, t, tokens[b, t]]
            if t:
                want[b, t] = logp[b, t - 1, tokens[b, t]]
                left[b, t - 1] = want[b, t]
                later[b, t] = logp[b, t, tokens[b, t - 1]]
    first = torch.where(torch.arange(4) > 0, unshifted, 0.0)
    probabilities = torch.where(torch.arange(4) > 0, want.exp(), 0.0)
    at_logits = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for t in range(1, 4):
            at_logits[b, t] = logits[b, t - 1, tokens[b, t]]
    got = call(token_log_probs, logits, tokens)
    expect(got, want, "token_log_probs of random logits (2, 4, 5)", {
        "there is no shift: logits[b, t] predicts the token behind t, so that token t is predicted by "
        "logits[b, t − 1]": unshifted,
        "there is no shift, only the first column set to 0: token t is predicted by logits[b, t − 1]": first,
        "the shift goes the wrong way: you score the token before the position, which the model has seen":
            later,
        "the log-probs stand one place too far left: logp[b, t] belongs to tokens[b, t], and the 0 stands at "
        "the first token": left,
        "these are probabilities: the log is missing": probabilities,
        "these are logits: log_softmax over the vocabulary is missing": at_logits,
    })  # fmt: skip


def check_sft_loss(sft_loss):
    logp = tensor([[0.0, -1.0, -2.0, -8.0], [-4.0, -4.0, -6.0, -8.0]])
    mask = torch.tensor([[False, True, True, False], [False, False, True, False]])
    got = call(sft_loss, logp, mask, 3)
    expect(got, 3.0, "sft_loss of log-probs (-1, -2) and (-6) in the mask, denom 3", {
        "your loss has the wrong sign: raising the log-probs must lower it": -3.0,
        "the mask is forgotten: prompt and padding are learnt too": 11.0,
        "you average the rows' means: a token of a short response would count more": 3.75,
        "you divide by all B·T positions, pads included": 9 / 8,
        "you do not divide by denom": 9.0,
    })  # fmt: skip
    got = call(sft_loss, logp, mask, 12)
    expect(got, 0.75, "sft_loss of log-probs (-1, -2) and (-6) in the mask, denom 12 (a micro-batch)", {
        "you divide by the tokens of this micro-batch: it is denom, the tokens of the whole step, that makes "
        "the micro-batches add up": 3.0,
    })  # fmt: skip
    grad = gradient(sft_loss, logp, mask, 3)
    expect(grad, -mask.double() / 3, "∂loss/∂logp, which is −1/denom at each token of the mask")
    minus_inf = torch.where(mask, logp, -torch.inf)
    if not torch.as_tensor(call(sft_loss, minus_inf, mask, 3)).isfinite():
        raise Wrong(
            "where a log-prob outside the mask is -inf, the loss is nan: 0 · inf is nan. Use "
            "torch.where(mask, logp, 0.0) in place of logp * mask"
        )
