"""Batched sampling with a KV cache → Rollout.

Each distinct prompt is prefilled once and its cache shared out to its n samples. Prompts are ragged and
padded on the right; while decoding, every row writes the cache at its own position. Rows that have ended
leave the batch. The uniform random numbers are one table (row × position) drawn from the seed, so that a
sample does not depend on which other rows are still in the batch.
"""

from types import SimpleNamespace

import torch
from tqdm import tqdm

from nanorlhf.errors import UserError
from nanorlhf.rollout import Rollout
from nanorlhf.run import dist
from nanorlhf.sampling import Sampling, sample

LEAVE = 1 / 8  # share of ended rows at which the batch is compacted: at every one, copying costs more


def _start(model, prompts, n, max_new_tokens, temperature, eos_id, seed, pad_id, first_row=0):
    """What both loops below share: checks, the padded prompts, the table of uniforms, the ids that end."""
    if not prompts or n < 1 or max_new_tokens < 1 or temperature < 0:
        asked = f"{len(prompts)} prompts, n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}"
        raise UserError(f"nothing to generate: {asked}")
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise UserError(f"prompt {[len(p) for p in prompts].index(0)} is empty: it needs at least one token")
    if longest + max_new_tokens > model.cfg.max_len:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones (--max_new_tokens) exceed the "
            f"model's context of {model.cfg.max_len}"
        )
    if pad_id is None:  # any id that is not EOS: pads are recognised by lengths, never by id
        pad_id = model.cfg.vocab_size - 1 - (eos_id == model.cfg.vocab_size - 1)
    group = torch.arange(len(prompts)).repeat_interleave(n)  # (B,)
    plen = torch.tensor([len(p) for p in prompts])[group]  # (B,)
    tokens = torch.full((len(group), longest + max_new_tokens), pad_id)
    for row, g in enumerate(group.tolist()):
        tokens[row, : len(prompts[g])] = torch.tensor(prompts[g])  # detail 6: N+ pads on the left
    table = first_row + len(group), max_new_tokens  # row by row, so that a longer one begins with a shorter
    u = torch.rand(table, generator=torch.Generator().manual_seed(seed % 2**63))[first_row:]
    stop = torch.tensor([] if eos_id is None else [eos_id, *model.stop_ids], dtype=torch.int64)
    return [x.to(model.device) for x in (tokens, plen, group, u, stop)]


def _finish(tokens, logp, new, finished, plen, group):
    place = torch.arange(tokens.shape[1], device=tokens.device)
    mask = (place >= plen[:, None]) & (place < (plen + new)[:, None])
    T = int((plen + new).max())
    return Rollout(tokens[:, :T], mask[:, :T], logp[:, :T], finished, group, plen)


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=64, temperature=1.0, eos_id=None, seed=0, top_k=0, top_p=1.0,
             pad_id=None, slots=0):
    """n responses to each prompt (a list of token ids) → Rollout of len(prompts)·n rows, grouped by prompt.

    A response ends with EOS (or one of model.stop_ids), which belongs to it, or after max_new_tokens without
    one (finished=False). Log-probs are those of the distribution sampled from (temperature, top_k, top_p
    applied; temperature 0 is greedy and reports temperature 1). slots: decode at most so many rows at a time,
    the next row taking the place of one that has ended (slots.py); 0: on a GPU as many as suit it, on a CPU
    all rows at once, and ended ones leave. Of several processes each samples its share, and all get all of
    it. Raises UserError for an empty prompt and for prompts that do not fit the model's context.
    """
    if slots < 0:
        raise UserError(f"slots={slots} must be 0 or more")
    how = n, max_new_tokens, temperature, eos_id, seed, top_k, top_p, pad_id, slots
    mine, alone = dist.part(len(prompts)), dist.size() == 1 or not prompts
    with dist.whole(model) as here:
        roll = _generate(here, prompts[mine], *how, mine.start * n) if prompts[mine] or alone else None
    if alone:
        return roll
    rolls = dist.gather(roll and roll.to("cpu"))
    return Rollout.cat([roll for roll in rolls if roll], pad_id or 0).to(model.device)


def _generate(model, prompts, n, max_new_tokens, temperature, eos_id, seed, top_k, top_p, pad_id, slots,
              first_row):
    tokens, plen, group, u, stop = _start(
        model, prompts, n, max_new_tokens, temperature, eos_id, seed, pad_id, first_row
    )
    distinct = {tuple(p): i * n for i, p in enumerate(prompts)}  # prompt → one of its rows
    which = {p: i for i, p in enumerate(distinct)}  # prompt → its number
    first, of_row = list(distinct.values()), [which[tuple(p)] for p in prompts for _ in range(n)]
    if slots or tokens.is_cuda:
        from nanorlhf.kernels import slots as engine  # which needs `draw`

        size = slots or engine.how_many(model, len(group), tokens.shape[1])
        batch = SimpleNamespace(tokens=tokens, prompt_len=plen, uniforms=u, stop_ids=stop, first_rows=first,
                                distinct=of_row)  # fmt: skip
        sampling = Sampling(temperature, top_k, top_p)
        parts = engine.decode(model, batch, sampling, min(size, len(group)))
        return _finish(*parts, plen, group)

    first, of_row = (torch.tensor(x, device=tokens.device) for x in (first, of_row))
    logp = torch.zeros(tokens.shape, device=tokens.device)
    new = torch.zeros_like(plen)
    finished = torch.zeros_like(plen, dtype=torch.bool)
    start = plen[first]
    longest = int(start.max())
    shared = len(first) < len(group)
    cache = prefilled = model.new_cache(len(first), longest if shared else tokens.shape[1])
    hidden = model(tokens[first, :longest], prefilled)
    last = hidden[torch.arange(len(first), device=tokens.device), start - 1][of_row]  # (B, D)
    if shared:
        cache = model.new_cache(len(group), tokens.shape[1])
        cache.fill(slice(None), prefilled, of_row, longest)

    rows = torch.arange(len(group), device=tokens.device)  # those still in the batch
    alive = torch.ones_like(finished)
    for t in range(max_new_tokens):
        token, lp = sample(model.head_logits(last), u[rows, t], Sampling(temperature, top_k, top_p))
        write = rows[alive]
        tokens[write, plen[write] + t] = token[alive]
        logp[write, plen[write] + t] = lp[alive].to(logp.dtype)
        new[write] += 1
        if eos_id is not None:
            ended = torch.isin(token, stop)
            finished[write] = ended[alive]  # detail 23.2: nothing is kept behind EOS
            alive = alive & ~ended  # detail 23.1: N+ samples on to a fixed length
            left = int(alive.sum())
            if left == 0:
                break
            if left <= len(rows) * (1 - LEAVE):
                keep = alive.nonzero().squeeze(1)
                rows, token, alive = rows[keep], token[keep], alive[keep]
                cache.keep(keep, longest + t)
        if t + 1 < max_new_tokens:
            last = model(token[:, None], cache, plen[rows] + t)[:, 0]
    return _finish(tokens, logp, new, finished, plen, group)


@torch.no_grad()
def reference(model, prompts, n=1, max_new_tokens=64, temperature=1.0, eos_id=None, seed=0, top_k=0,
              top_p=1.0, pad_id=None):
    """The oracle of `generate`: the same samples with no cache, no shared prefill and no row ever leaving."""
    tokens, plen, group, u, stop = _start(
        model, prompts, n, max_new_tokens, temperature, eos_id, seed, pad_id
    )
    logp = torch.zeros(tokens.shape, device=tokens.device)
    rows = torch.arange(len(group), device=tokens.device)
    new, finished = torch.zeros_like(plen), torch.zeros_like(plen, dtype=torch.bool)
    for t in range(max_new_tokens):
        hidden = model(tokens[:, : int(plen.max()) + t])  # what stands right of a row's end cannot touch it
        logits = model.head_logits(hidden[rows, plen + t - 1])
        token, lp = sample(logits, u[:, t], Sampling(temperature, top_k, top_p))
        live = rows[~finished]
        tokens[live, plen[live] + t] = token[live]
        logp[live, plen[live] + t] = lp[live].to(logp.dtype)
        new[live] += 1
        finished[live] = torch.isin(token[live], stop)
        if finished.all():
            break
    return _finish(tokens, logp, new, finished, plen, group)


def respond(model, tok, prompts, n=1, max_new_tokens=64, temperature=1.0, seed=0, batch=512, desc="",
            top_k=0, top_p=1.0):
    """Text in, text out: n responses to each prompt → (rollouts, responses), a prompt's n together.

    rollouts is a list of Rollout, of at most about `batch` rows each; responses a list of len(prompts)·n
    strings without EOS. With a `desc` a progress bar shows it on a terminal.
    """
    rolls, texts, per = [], [], max(1, batch // n)
    quiet = None if desc and dist.rank() == 0 else True  # None: unless this is a terminal
    for i in tqdm(range(0, len(prompts), per), desc, leave=False, disable=quiet):
        ids = [tok.encode_prompt(p) for p in prompts[i : i + per]]
        how = dict(top_k=top_k, top_p=top_p, pad_id=tok.pad_id)
        roll = generate(model, ids, n, max_new_tokens, temperature, tok.eos_id, seed + i, **how)
        rolls.append(roll)
        texts += [tok.decode(ids) for ids in roll.responses()]
    return rolls, texts
