"""Batched sampling with a KV cache → Rollout: prefill, then one loop of sample → append → drop finished rows.

Prompts are ragged and padded on the right. While decoding, every row writes the cache at its own position, so
that a row's samples do not depend on how long the other prompts are. The uniform random numbers are one table
(row × position) drawn from the seed, so that a sample does not depend on which other rows are still in the
batch, nor on how many processes share the rows.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanorlhf.errors import UserError, require
from nanorlhf.rollout import Rollout
from nanorlhf.run import dist
from nanorlhf.sampling import Sampling, sample

# Drop finished rows once 1/8 of the batch is finished: copying the cache after every EOS costs more than it
# saves.
DROP_SHARE = 1 / 8


@torch.no_grad()
def reference(
    model, prompts, n=1, max_new_tokens=64, temperature=1.0, eos_id=None, seed=0, top_k=0, top_p=1.0
):
    """The oracle of `generate`: the same samples with no cache, no shared prefill and no row ever dropped."""
    batch = prepare(model, prompts, n, max_new_tokens, temperature, eos_id, seed)
    sampling = Sampling(temperature, top_k, top_p)
    out = Decoded.empty(batch)
    rows = torch.arange(len(batch.group), device=batch.tokens.device)
    for t in range(max_new_tokens):
        hidden = model(out.tokens[:, : batch.longest + t])  # (B, T', D)
        last = hidden[rows, batch.prompt_len + t - 1]  # (B, D)
        token, logp = sample(model.head_logits(last), batch.uniforms[:, t], sampling)
        live = rows[~out.finished]
        out.append(batch, live, t, token[live], logp[live])
        if out.finished.all():
            break
    return out.rollout(batch)


@dataclass
class Batch:
    """Prompts as one padded batch, n rows for each: what every decode loop starts from."""

    tokens: torch.Tensor  # (B, T) int64: each prompt, and room for max_new_tokens behind the longest
    prompt_len: torch.Tensor  # (B,) int64
    group: torch.Tensor  # (B,) int64: index of the row's prompt
    uniforms: torch.Tensor  # (B, max_new_tokens) random numbers in [0, 1)
    stop_ids: torch.Tensor  # (k,) int64: any of these ends a response
    longest: int  # tokens of the longest prompt
    first_rows: list  # for each distinct prompt, one row that has it: it is prefilled once
    distinct: list  # (B,) number of each row's distinct prompt


def prepare(model, prompts, n, max_new_tokens, temperature, eos_id, seed, first_row=0):
    """Check the request and pad the prompts → Batch.

    The table of uniforms is filled row by row, so that a larger table begins with a smaller one. first_row is
    the place of the first row in the table: a process that samples rows 8 to 15 of 16 starts at 8.
    """
    if not prompts or n < 1 or max_new_tokens < 1 or temperature < 0:
        asked = f"{len(prompts)} prompts, n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}"
        raise UserError(f"nothing to generate: {asked}")
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0)} is empty: it needs at least one token")
    if longest + max_new_tokens > model.cfg.max_len:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones (--max_new_tokens) exceed the "
            f"model's context of {model.cfg.max_len}"
        )
    device = model.device
    group = torch.arange(len(prompts)).repeat_interleave(n)  # (B,)
    pad_id = model.cfg.vocab_size - 1  # any id but EOS would do: padding is known by lengths, never by its id
    if pad_id == eos_id:
        pad_id -= 1
    tokens = torch.full((len(group), longest + max_new_tokens), pad_id)  # (B, T)
    for row, g in enumerate(group.tolist()):
        tokens[row, : lengths[g]] = torch.tensor(prompts[g])  # detail 6: N+ pads on the left
    generator = torch.Generator().manual_seed(seed % 2**63)
    uniforms = torch.rand((first_row + len(group), max_new_tokens), generator=generator)
    stop_ids = [] if eos_id is None else [eos_id, *model.stop_ids]

    row_of_prompt = {tuple(prompt): i * n for i, prompt in enumerate(prompts)}
    number_of_prompt = {prompt: number for number, prompt in enumerate(row_of_prompt)}
    return Batch(
        tokens=tokens.to(device),
        prompt_len=torch.tensor(lengths)[group].to(device),
        group=group.to(device),
        uniforms=uniforms[first_row:].to(device),
        stop_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device),
        longest=longest,
        first_rows=list(row_of_prompt.values()),
        distinct=[number_of_prompt[tuple(prompt)] for prompt in prompts for _ in range(n)],
    )


@dataclass
class Decoded:
    """What a decode loop fills: the sampled tokens behind the prompts, and their log-probs."""

    tokens: torch.Tensor  # (B, T) int64
    logp: torch.Tensor  # (B, T) fp32
    sampled: torch.Tensor  # (B,) int64: tokens sampled so far, EOS included
    finished: torch.Tensor  # (B,) bool: the response ended by itself

    @classmethod
    def empty(cls, batch):
        sampled = torch.zeros_like(batch.prompt_len)
        logp = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        return cls(batch.tokens, logp, sampled, torch.zeros_like(sampled, dtype=torch.bool))

    def append(self, batch, rows, t, token, logp):
        """Write response token number t of the given rows; token and logp are (len(rows),)."""
        column = batch.prompt_len[rows] + t
        self.tokens[rows, column] = token
        self.logp[rows, column] = logp.to(self.logp.dtype)
        self.sampled[rows] += 1
        self.finished[rows] = torch.isin(token, batch.stop_ids)  # detail 23.2: nothing is kept behind EOS

    def rollout(self, batch):
        """→ Rollout, as wide as its longest row. The mask comes from lengths, never from token ids."""
        lengths = batch.prompt_len + self.sampled
        T = int(lengths.max())
        position = torch.arange(T, device=lengths.device)
        mask = (position >= batch.prompt_len[:, None]) & (position < lengths[:, None])  # (B, T)
        tokens = self.tokens[:, :T]
        logp = self.logp[:, :T]
        return Rollout(tokens, mask, logp, self.finished, batch.group, batch.prompt_len)


@torch.no_grad()
def generate(
    model, prompts, n=1, max_new_tokens=64, temperature=1.0, eos_id=None, seed=0, top_k=0, top_p=1.0, slots=0
):
    """n responses to each prompt (a list of token ids) → Rollout of len(prompts)·n rows, grouped by prompt.

    A response ends with EOS (or one of model.stop_ids), which belongs to it, or after max_new_tokens without
    one (finished=False). Log-probs are those of the distribution sampled from (temperature, top_k, top_p
    applied; temperature 0 is greedy and reports temperature 1). slots: rows decoded at a time, where the next
    row takes the place of a finished one (kernels/slots.py). With slots=0 a GPU takes as many as suit it, and
    a CPU decodes all rows at once. Several processes each sample a share of the rows, and all get all rows.
    Raises UserError for an empty prompt and for prompts that do not fit the model's context.
    """
    require(slots >= 0, f"slots={slots} must be 0 or more")
    settings = dict(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        eos_id=eos_id,
        seed=seed,
        slots=slots,
    )
    if dist.launched() and prompts:
        return dist.generate_by_share(decode, model, prompts, n, **settings)
    return decode(model, prompts, n, **settings)


def decode(model, prompts, n, max_new_tokens, sampling, eos_id, seed, slots, first_row=0):
    """`generate` on this process: prefill, then one loop of sample → append → drop finished rows."""
    batch = prepare(model, prompts, n, max_new_tokens, sampling.temperature, eos_id, seed, first_row)
    if slots or batch.tokens.is_cuda:
        return decode_in_slots(model, batch, sampling, slots)
    out = Decoded.empty(batch)
    cache, last = prefill(model, batch)  # last: hidden states (B, D) that predict the next token
    rows = torch.arange(len(batch.group), device=batch.tokens.device)  # those in the cache
    alive = torch.ones_like(out.finished)  # of those, the unfinished ones
    for t in range(max_new_tokens):
        token, logp = sample(model.head_logits(last), batch.uniforms[rows, t], sampling)
        out.append(batch, rows[alive], t, token[alive], logp[alive])
        alive = ~out.finished[rows]  # detail 23.1: N+ samples on to a fixed length
        left = int(alive.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= len(rows) * (1 - DROP_SHARE):
            keep = alive.nonzero().squeeze(1)
            cache.keep(keep, batch.longest + t)
            rows = rows[keep]
            token = token[keep]
            alive = alive[keep]
        last = model(token[:, None], cache, batch.prompt_len[rows] + t)[:, 0]
    return out.rollout(batch)


def prefill(model, batch):
    """Run each distinct prompt through the model once → cache of all rows, last hidden states (B, D)."""
    first = torch.tensor(batch.first_rows, device=batch.tokens.device)  # (distinct prompts,)
    B, T = batch.tokens.shape
    if len(first) == B:
        cache = model.new_cache(B, T)
    else:
        cache = model.new_cache(len(first), batch.longest)
    hidden = model(batch.tokens[first, : batch.longest], cache)
    index = torch.arange(len(first), device=first.device)
    last = hidden[index, batch.prompt_len[first] - 1]
    if len(first) == B:
        return cache, last
    shared = model.new_cache(B, T)  # a prompt's n rows start with copies of its keys and values
    distinct = torch.tensor(batch.distinct, device=first.device)
    shared.fill(slice(None), cache, distinct, batch.longest)
    return shared, last[distinct]


def decode_in_slots(model, batch, sampling, slots):
    """The same samples on a GPU, where no step waits for the host (docs/generation.md)."""
    from nanorlhf.kernels import slots as engine  # here: only a GPU needs it

    rows, T = batch.tokens.shape
    size = slots or engine.how_many(model, rows, T)
    tokens, logp, sampled, finished = engine.decode(model, batch, sampling, min(size, rows))
    return Decoded(tokens, logp, sampled, finished).rollout(batch)


def sample_responses(model, tok, rows, n, max_new_tokens, temperature, seed):
    """n responses to each row's prompt, the tokens row["_ids"] → Rollout with rows and texts."""
    prompts = [row["_ids"] for row in rows]
    roll = generate(model, prompts, n, max_new_tokens, temperature, tok.eos_id, seed)
    roll.rows = [rows[g] for g in roll.group.tolist()]
    roll.texts = [tok.decode(ids) for ids in roll.responses()]
    return roll


def respond(
    model,
    tok,
    prompts,
    n=1,
    max_new_tokens=64,
    temperature=1.0,
    seed=0,
    batch=512,
    desc="",
    top_k=0,
    top_p=1.0,
):
    """Text in, text out: n responses to each prompt → (rollouts, responses), a prompt's n together.

    rollouts is a list of Rollout with texts, of at most about `batch` rows each; responses a list of
    len(prompts)·n strings without EOS. With a `desc` a progress bar shows it on a terminal.
    """
    rolls = []
    prompts_at_once = max(1, batch // n)
    no_bar = True
    if desc and dist.rank() == 0:
        no_bar = None  # tqdm: a bar on a terminal only
    for i in tqdm(range(0, len(prompts), prompts_at_once), desc, leave=False, disable=no_bar):
        ids = [tok.encode_prompt(prompt) for prompt in prompts[i : i + prompts_at_once]]
        roll = generate(
            model, ids, n, max_new_tokens, temperature, tok.eos_id, seed + i, top_k=top_k, top_p=top_p
        )
        roll.texts = [tok.decode(response) for response in roll.responses()]
        rolls.append(roll)
    texts = [text for roll in rolls for text in roll.texts]
    return rolls, texts
