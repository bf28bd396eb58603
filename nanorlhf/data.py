"""Rows in, padded batches out: masks from lengths, packing, micro-batches, a resumable order.

Files of rows are read by `nanorlhf/hub/files.py`, and in other people's formats by `nanorlhf/hub/formats.py`.
"""

import math
from functools import partial

import numpy as np
import torch

from nanorlhf import tasks
from nanorlhf.errors import blame, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.run import dist


def split_by_hash(rows):
    """Split rows (dicts) by their prompts → train, test; test has those where `tasks.held_out` is True.

    A prompt that occurs twice goes to one side both times, so training never sees a test prompt. A row with
    an empty prompt (a document) is split by its response.
    """
    train = []
    test = []
    for row in rows:
        if tasks.held_out(row["prompt"] or row["response"]):
            test.append(row)
        else:
            train.append(row)
    return train, test


def read_split(cfg, read):
    """→ training rows, held-out rows of --data; with --eval_data all rows of --data, all rows of that file.

    read: (path, flag=) → rows.
    """
    rows = read(cfg.data)
    if not cfg.eval_data:
        return split_by_hash(rows)
    held_out = read(cfg.eval_data, flag="--eval_data")
    trained = {row["prompt"] or row["response"] for row in rows}
    both = sum((row["prompt"] or row["response"]) in trained for row in held_out)
    if both:
        print(f"warning: {both} of {len(held_out)} prompts of {cfg.eval_data} are in {cfg.data} too")
    return rows, held_out


def load_split(cfg, want, check=None):
    """`read_split` of files in other people's formats. want, check: as in `read_rows`."""
    return read_split(cfg, partial(read_rows, want=want, skip_bad=cfg.skip_bad_rows, check=check))


def load_demonstrations(cfg, task):
    """→ training rows, held-out rows of {"prompt", "response"}; a prompt's text alone decides which it is."""
    if not cfg.data:
        train = task.demonstrations(cfg.demos, cfg.seed)
        return train, task.demonstrations(256, cfg.seed, split="test")
    train, test = load_split(cfg, "demos")
    require(train, f"--data {cfg.data}: every prompt falls into the held-out 15%; give more distinct prompts")
    return train, test


def pad(rows, pad_id):
    """Pad lists of token ids on the right, to the longest → tokens (B, T) int64, lengths (B,) int64.

    >>> tokens, lengths = pad([[5, 6, 7], [8]], pad_id=0)
    >>> tokens
    tensor([[5, 6, 7],
            [8, 0, 0]])
    >>> lengths
    tensor([3, 1])
    """
    lengths = [len(row) for row in rows]
    T = max(lengths, default=0)
    tokens = torch.full((len(rows), T), pad_id)  # (B, T) int64
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.as_tensor(row)
    return tokens, torch.tensor(lengths, dtype=torch.int64)


def encode_pair(tok, prompt, response, max_len, at=""):
    """Tokenize a prompt and its response, two strings → (prompt ids, response ids with EOS), two lists.

    None if the two together exceed max_len tokens; the caller drops the row and counts it. Prompt and
    response are tokenized apart: the policy is given the prompt's ids and samples the response's, so it could
    never sample a token that spans both. An empty prompt becomes one EOS, and the response is a document.
    A UserError for text that `tok` cannot encode starts with `at`, the row's place ("file:line").

    >>> from nanorlhf.tokenizer import Tokenizer
    >>> tok = Tokenizer.from_chars("abc")  # a, b, c are 0, 1, 2 and EOS is 3
    >>> encode_pair(tok, "a", "bc", max_len=4)
    ([0], [1, 2, 3])
    >>> encode_pair(tok, "a", "bc", max_len=3) is None
    True
    """
    with blame(at):
        prompt_ids = tok.encode_prompt(prompt) or [tok.eos_id]
        response_ids = tok.encode_response(prompt, response)  # detail 3: EOS ends every response
    # detail 4: a row that is too long is dropped, never truncated: a cut response would lack its EOS
    if len(prompt_ids) + len(response_ids) > max_len:
        return None
    return prompt_ids, response_ids


def encode_demonstration(tok, row):
    """Tokenize one row for SFT → [(ids, mask)], where the mask is True on the tokens to learn.

    {"prompt", "response"} gives one pair, whose mask is True on the response and its EOS. A conversation
    ("turns") may give several, and every answer of the assistant is learnt; see `Tokenizer.encode_chat`.

    >>> from nanorlhf.tokenizer import Tokenizer
    >>> encode_demonstration(Tokenizer.from_chars("abc"), {"prompt": "a", "response": "b"})
    [([0, 1, 3], [False, True, True])]
    """
    at = row.get("_at", "")
    if "turns" in row:
        with blame(at):
            return tok.encode_chat(row["turns"])
    prompt_ids, response_ids = encode_pair(tok, row["prompt"], row["response"], math.inf, at)
    mask = [False] * len(prompt_ids) + [True] * len(response_ids)
    return [(prompt_ids + response_ids, mask)]


def encode_demonstrations(rows, tok, max_len):
    """Rows → [(ids with EOS, mask of the response's)]; those beyond max_len are dropped, and counted."""
    found = [pair for row in rows for pair in encode_demonstration(tok, row)]
    kept = [(ids, mask) for ids, mask in found if len(ids) <= max_len]
    why = f"longer than the context of {max_len} tokens (--max_len)"
    require(kept or not rows, f"all {len(found)} demonstrations are {why}")
    if len(kept) < len(found):
        print(f"dropped {len(found) - len(kept)} of {len(found)} demonstrations: {why}")
    return kept


def pad_demonstrations(rows, tok, device, loss_on_prompt=False):
    """Rows of (ids, mask of the response) → tokens (B, T), mask (B, T) bool of the tokens the loss counts."""
    tokens, _ = pad([ids for ids, _ in rows], tok.pad_id)  # detail 5
    masks = [mask for _, mask in rows]
    if loss_on_prompt:  # all but the first token, which has nothing before it
        masks = [[False] + [True] * (len(ids) - 1) for ids, _ in rows]
    mask, _ = pad(masks, False)
    return tokens.to(device), mask.to(device)


def response_mask(prompt_lens, lengths, T):
    """Mark the tokens of the responses, EOS included → (B, T) bool.

    prompt_lens   (B,) int64, tokens of each prompt
    lengths       (B,) int64, tokens of each prompt and response together
    The mask comes from lengths and never from token ids, because a prompt may contain any id, EOS too.
    ValueError unless 0 ≤ prompt ≤ length ≤ T in every row.

    >>> response_mask(torch.tensor([1, 2]), torch.tensor([3, 3]), T=4).int()  # responses of 2 tokens and of 1
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 0]], dtype=torch.int32)
    """
    wrong = (prompt_lens < 0) | (prompt_lens > lengths) | (lengths > T)
    if wrong.any():
        raise ValueError(f"response_mask needs 0 <= prompt_lens <= lengths <= T = {T}")
    position = torch.arange(T, device=prompt_lens.device)  # (T,)
    after_prompt = position >= prompt_lens[:, None]  # (B, T)
    before_end = position < lengths[:, None]  # (B, T)
    return after_prompt & before_end


def epoch_batches(n, batch, seed, step):
    """Indices of the rows in batch number `step`: a list of `batch` ints below n, in a new order every epoch.

    The result depends on the arguments alone, so a resumed run needs only its step. Every epoch holds each
    index once. No row is ever dropped: a batch may cross the end of an epoch, and may be larger than n. The
    order of epoch e is drawn from numpy's Philox generator with the key (seed, e). ValueError unless n ≥ 1,
    batch ≥ 1 and step ≥ 0.

    >>> [epoch_batches(3, 2, seed=3, step=step) for step in range(3)]  # the epochs are 0 1 2 and 1 2 0
    [[0, 1], [2, 1], [2, 0]]
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"epoch_batches needs n >= 1, batch >= 1, step >= 0, got {n}, {batch}, {step}")
    start = step * batch
    end = start + batch
    rows = []
    for epoch in range(start // n, (end - 1) // n + 1):
        key = np.array([seed % 2**64, epoch], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        order = generator.permutation(n)
        epoch_start = epoch * n
        first = max(start - epoch_start, 0)
        rows += order[first : end - epoch_start].tolist()
    return rows


def longest_first(lengths):
    """Indices of a list, largest length first; equal lengths stay in order, because `sorted` is stable."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def microbatches(lengths, budget):
    """Cut B rows into groups of at most `budget` tokens, padding included → lists of indices.

    lengths   (B,) tokens of each row, a list or a tensor
    A group of rows costs rows × its longest row. A single row may exceed the budget; 0 puts all rows into one
    group. The longest rows come first, so that a budget too large for the memory fails in the first group
    and not an hour later. UserError for a negative budget.

    >>> microbatches([1, 3, 2], budget=4)  # 1 row × 3 tokens, then 2 rows × 2
    [[1], [2, 0]]
    """
    require(budget >= 0, f"--tokens_per_microbatch: {budget} is negative; expected tokens, or 0 for all")
    lengths = torch.as_tensor(lengths).tolist()  # one copy from a GPU, and not one for each row
    groups = []
    group = []
    longest = 0
    for i in longest_first(lengths):
        fits = budget == 0 or (len(group) + 1) * longest <= budget
        if groups and fits:
            group.append(i)
        else:
            group = [i]
            groups.append(group)
            longest = lengths[i]
    return groups


def pad_responses(rows, device):
    """(prompt ids, response ids) → tokens (B, T), lengths (B,), mask (B, T) of the response.

    The pads are 0, as would be any id: attention is causal, so no token sees a pad behind it.

    >>> tokens, lengths, mask = pad_responses([([5, 6], [7]), ([5], [8, 9, 4])], "cpu")
    >>> tokens.tolist(), lengths.tolist()
    ([[5, 6, 7, 0], [5, 8, 9, 4]], [3, 4])
    >>> mask.int().tolist()
    [[0, 0, 1, 0], [0, 1, 1, 1]]
    """
    tokens, lengths = pad([prompt + response for prompt, response in rows], 0)
    prompt_lens = torch.tensor([len(prompt) for prompt, _ in rows])
    mask = response_mask(prompt_lens, lengths, tokens.shape[1])
    return tokens.to(device), lengths.to(device), mask.to(device)


def fill_rows(out, lengths, budget, compute, *passes):
    """Fill out[rows] = compute(rows) for all B rows, a micro-batch at a time → out.

    out       (B, ...) zeros
    lengths   (B,) tensor, tokens of each row
    budget    padded tokens in a micro-batch, see `microbatches`
    compute   indices of rows (b,), a tensor → their results (b, ...)
    passes    the model methods that `compute` calls; see `dist.paced`
    With several processes each computes its share of the rows, and all processes get all results. With one
    process this is `for rows in microbatches(lengths, budget): out[rows] = compute(rows)`.

    >>> lengths = torch.tensor([1, 3, 2])
    >>> fill_rows(torch.zeros(3), lengths, 4, lambda rows: 10.0 * lengths[rows])
    tensor([10., 30., 20.])
    """
    my_rows = dist.my_rows(lengths)
    cut = microbatches(lengths[my_rows], budget)
    for part in dist.paced(cut, *passes):
        rows = my_rows[part]
        out[rows] = compute(rows)
    return dist.summed(out)


def pack(tokens, mask, lengths):
    """Lay several rows behind one another in one packed row, so that less is padding.

    tokens, mask, lengths   (B, T), (B, T), (B,), as `pad` gives them
    → tokens (R, T), mask (R, T), lengths (R,) and doc (R, T) of R ≤ B packed rows. doc[r, t] is the index of
    the row that the token came from, and -1 on padding (id 0); attention must not cross from one doc to
    another.

    First fit: the longest rows come first, and each goes into the first packed row with room for it. A packed
    row is never longer than the longest row, because the cost of attention grows with the square of it.

    >>> tokens, lengths = pad([[5], [6, 7, 8], [9, 9]], pad_id=0)
    >>> packed, _, used, doc = pack(tokens, tokens > 0, lengths)
    >>> packed
    tensor([[6, 7, 8],
            [9, 9, 5]])
    >>> doc
    tensor([[1, 1, 1],
            [2, 2, 0]])
    >>> used
    tensor([3, 3])
    """
    lengths = torch.as_tensor(lengths).tolist()  # one copy from a GPU, and not one for each row
    longest = max(lengths, default=0)
    docs = []  # for each token of each packed row: the row that it comes from,
    columns = []  # and its place there
    for i in longest_first(lengths):
        n = lengths[i]
        with_room = [r for r, doc in enumerate(docs) if len(doc) + n <= longest]
        if with_room:
            r = with_room[0]
        else:
            r = len(docs)
            docs.append([])
            columns.append([])
        docs[r] += [i] * n
        columns[r] += range(n)
    doc, used = pad(docs, -1)
    column, _ = pad(columns, 0)
    doc = doc.to(tokens.device)
    real = doc >= 0
    packed = torch.where(real, tokens[doc, column], 0)
    packed_mask = mask[doc, column] & real
    return packed, packed_mask, used, doc


def take_rows(batch, rows):
    """The given rows of a batch {name: tensor (B, ...), or what belongs to all of it} → a smaller batch.

    >>> batch = {"tokens": torch.tensor([[5, 6], [7, 8]]), "lengths": torch.tensor([2, 1]), "denom": 3}
    >>> take_rows(batch, [1])
    {'tokens': tensor([[7, 8]]), 'lengths': tensor([1]), 'denom': 3}
    """
    taken = dict(batch)
    for name, x in batch.items():
        if isinstance(x, torch.Tensor) and x.dim():
            taken[name] = x[rows]
    return taken


def deal(unit, n, seed):
    """Deal rows out to n minibatches at random → index tensors; rows of one unit stay together.

    unit (B,) int64: rows of the same number are one unit. arange(B) deals single rows, the index of each
    row's prompt deals whole prompts. Fewer than n units make fewer minibatches.

    >>> [rows.tolist() for rows in deal(torch.tensor([0, 0, 1, 1, 2, 2]), 2, seed=0)]
    [[4, 5, 0, 1], [2, 3]]
    """
    rows_of = {}
    for row, number in enumerate(unit.tolist()):
        rows_of.setdefault(number, []).append(row)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows_of), generator=generator)
    for part in order.tensor_split(min(n, len(order))):
        yield torch.tensor([row for number in part.tolist() for row in rows_of[number]])


def trim(batch):
    """Cut the (B, T) tensors of a batch to its longest row, as columns of pads alone cost time.

    >>> trim({"tokens": torch.tensor([[7, 8, 0]]), "lengths": torch.tensor([2])})
    {'tokens': tensor([[7, 8]]), 'lengths': tensor([2])}
    """
    longest = int(batch["lengths"].max())
    out = dict(batch)
    for name, x in batch.items():
        if isinstance(x, torch.Tensor) and x.dim() == 2:
            out[name] = x[:, :longest]
    return out
