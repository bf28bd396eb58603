"""Batched sampling with a KV cache → Rollout: prefill, then one loop of sample → append → drop finished rows.

Prompts are ragged and padded on the right. While decoding, every row writes the cache at its own position, so
that a row's samples do not depend on how long the other prompts are. The uniform random numbers are one table
(row × position) drawn from the seed, so that a sample does not depend on which other rows are still in the
batch, nor on how many processes share the rows.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanorlhf.data import pad, response_mask
from nanorlhf.errors import require
from nanorlhf.kernels.bf16 import cast_once
from nanorlhf.kernels.torch_backend import widen
from nanorlhf.rollout import Rollout
from nanorlhf.run import dist, pulse
from nanorlhf.sampling import Sampling, sample
from nanorlhf.tokenizer import Chat

# Drop finished rows once 1/8 of the batch is finished: copying the cache after every EOS costs more than it
# saves.
DROP_SHARE = 1 / 8


@torch.no_grad()
def reference(model, prompts, n=1, max_new_tokens=64, temperature=1.0, eos_id=None, seed=0, **filters):
    """The oracle of `generate`: the same samples with no cache, no shared prefill and no row ever dropped."""
    batch = prepare(model, prompts, n, max_new_tokens, temperature, eos_id, seed)
    sampling = Sampling(temperature, **filters)
    rows = torch.arange(len(batch.group), device=model.device)
    for t in range(max_new_tokens):
        hidden = model(batch.tokens[:, : batch.longest + t])  # (B, T', D)
        last = hidden[rows, batch.prompt_len + t - 1]  # (B, D)
        logits = model.head_logits(last)
        token, logp = sample(logits, batch.uniforms[:, t], sampling)
        live = ~batch.finished
        batch.append(rows[live], t, token[live], logp[live])
        if batch.finished.all():
            break
    return batch.rollout()


@dataclass
class Batch:
    """Prompts as one padded batch, n rows for each, and what a decode loop has sampled behind them."""

    tokens: torch.Tensor  # (B, T) int64: each prompt, and room for max_new_tokens behind the longest
    logp: torch.Tensor  # (B, T) fp32: log-probs of the sampled tokens
    sampled: torch.Tensor  # (B,) int64: tokens sampled so far, EOS included
    finished: torch.Tensor  # (B,) bool: the response ended by itself
    prompt_len: torch.Tensor  # (B,) int64
    group: torch.Tensor  # (B,) int64: index of the row's prompt
    uniforms: torch.Tensor  # (B, max_new_tokens) random numbers in [0, 1)
    stop_ids: torch.Tensor  # (k,) int64: any of these ends a response
    longest: int  # tokens of the longest prompt
    first_rows: list  # for each distinct prompt, one row that has it: it is prefilled once
    distinct: list  # (B,) number of each row's distinct prompt

    def append(self, rows, t, token, logp):
        """Write response token number t of the given rows; token and logp are (len(rows),)."""
        column = self.prompt_len[rows] + t
        self.tokens[rows, column] = token
        self.logp[rows, column] = logp.to(self.logp.dtype)
        self.sampled[rows] += 1
        self.finished[rows] = torch.isin(token, self.stop_ids)  # detail 23.2: nothing is kept behind EOS

    def rollout(self):
        """→ Rollout, as wide as its longest row."""
        lengths = self.prompt_len + self.sampled
        T = int(lengths.max())
        return Rollout(
            tokens=self.tokens[:, :T],
            mask=response_mask(self.prompt_len, lengths, T),
            logp=self.logp[:, :T],
            finished=self.finished,
            group=self.group,
            prompt_len=self.prompt_len,
        )


def prepare(model, prompts, n, max_new_tokens, temperature, eos_id, seed, first_row=0):
    """Check the request and pad the prompts → Batch, with nothing sampled yet.

    The table of uniforms is filled row by row, so that a larger table begins with a smaller one. first_row is
    the place of the first row in the table: a process that samples rows 8 to 15 of 16 starts at 8.
    """
    asked = f"{len(prompts)} prompts, n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}"
    something = prompts and min(n, max_new_tokens) > 0 and temperature >= 0
    require(something, f"nothing to generate: {asked}")
    for i, prompt in enumerate(prompts):
        require(prompt, f"prompt {i} is empty: it needs at least one token")
    longest = max(map(len, prompts))
    context = model.cfg.max_len
    too_long = f"a prompt of {longest} tokens and {max_new_tokens} new ones (--max_new_tokens) exceed"
    require(longest + max_new_tokens <= context, f"{too_long} the model's context of {context}")
    group = torch.arange(len(prompts)).repeat_interleave(n)  # (B,)
    pad_id = model.cfg.vocab_size - 1  # any id but EOS would do: padding is known by lengths, never by its id
    if pad_id == eos_id:
        pad_id -= 1
    tokens, prompt_len = pad(prompts, pad_id)  # detail 6: N+ pads on the left
    tokens = F.pad(tokens, (0, max_new_tokens), value=pad_id)[group]  # (B, T)
    generator = torch.Generator().manual_seed(seed % 2**63)
    table_rows = first_row + len(group)
    uniforms = torch.rand((table_rows, max_new_tokens), generator=generator)
    stop_ids = [] if eos_id is None else [eos_id, *model.stop_ids]

    row_of_prompt = {tuple(prompt): i * n for i, prompt in enumerate(prompts)}
    number_of_prompt = {prompt: number for number, prompt in enumerate(row_of_prompt)}
    distinct = [number_of_prompt[tuple(prompt)] for prompt in prompts]
    device = model.device
    return Batch(
        tokens=tokens.to(device),
        logp=torch.zeros(tokens.shape, device=device),
        sampled=torch.zeros_like(group, device=device),
        finished=torch.zeros(len(group), dtype=torch.bool, device=device),
        prompt_len=prompt_len[group].to(device),
        group=group.to(device),
        uniforms=uniforms[first_row:].to(device),
        stop_ids=torch.tensor(stop_ids, dtype=torch.int64, device=device),
        longest=longest,
        first_rows=list(row_of_prompt.values()),
        distinct=[distinct[g] for g in group.tolist()],
    )


@torch.no_grad()
def generate(
    model,
    prompts,
    n=1,
    max_new_tokens=64,
    temperature=1.0,
    eos_id=None,
    seed=0,
    top_k=0,
    top_p=1.0,
    slots=0,
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
        from nanorlhf.kernels import slots as engine  # here: only a GPU needs it

        engine.decode(model, batch, sampling, slots)  # the same samples (docs/generation.md)
        return batch.rollout()
    with cast_once(model):
        head = widen(model.unembedding)  # once, not in every step
        cache, last = prefill(model, batch)  # last: hidden states (B, D) that predict the next token
        rows = torch.arange(len(batch.group), device=model.device)  # those in the cache
        alive = ~batch.finished  # of those, the unfinished ones
        for t in range(max_new_tokens):
            logits = model.head_logits(last, head)
            token, logp = sample(logits, batch.uniforms[rows, t], sampling)
            batch.append(rows[alive], t, token[alive], logp[alive])
            alive = ~batch.finished[rows]  # detail 23.1: N+ samples on to a fixed length
            left = int(alive.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= len(rows) * (1 - DROP_SHARE):
                keep = alive.nonzero().squeeze(1)
                cache.keep(keep, batch.longest + t)
                rows = rows[keep]
                token = token[keep]
                alive = alive[keep]
            position = batch.prompt_len[rows] + t
            pulse.sign(f"sampling: token {t + 1} of {max_new_tokens}")
            hidden = model(token[:, None], cache, position)  # (b, 1, D)
            last = hidden[:, 0]
    return batch.rollout()


def prefill(model, batch):
    """Run each distinct prompt through the model once → cache of all rows, last hidden states (B, D)."""
    device = model.device
    first = torch.tensor(batch.first_rows, device=device)  # (distinct prompts,)
    prompts = model.new_cache(len(first), batch.longest)
    hidden = model(batch.tokens[first, : batch.longest], prompts)
    index = torch.arange(len(first), device=device)
    last = hidden[index, batch.prompt_len[first] - 1]
    B, T = batch.tokens.shape
    cache = model.new_cache(B, T)  # a prompt's n rows start with copies of its keys and values
    distinct = torch.tensor(batch.distinct, device=device)
    cache.fill(slice(None), prompts, distinct, batch.longest)
    return cache, last[distinct]


def sample_responses(model, tok, rows, n, max_new_tokens, temperature, seed, **filters):
    """n responses to each row's prompt, the tokens row["_ids"] → Rollout with rows and texts.

    A Chat among the prompts gets `seen`, the text that its template makes of it, for the rewards.

    filters: top_k and top_p of `generate`, for evaluation only.
    """
    prompts = [row["_ids"] for row in rows]
    for row in rows:
        if isinstance(row["prompt"], Chat) and row["prompt"].seen is None:  # once, not at every step
            row["prompt"].seen = tok.decode(row["_ids"])  # a template may have opened <think>
    roll = generate(model, prompts, n, max_new_tokens, temperature, tok.eos_id, seed, **filters)
    roll.rows = [rows[g] for g in roll.group.tolist()]
    roll.texts = [tok.decode(ids) for ids in roll.responses()]
    return roll


def sample_in_batches(
    model, tok, rows, n=1, max_new_tokens=64, temperature=1.0, seed=0, batch=512, **filters
):
    """`sample_responses` for any number of rows {"prompt": text, ...} → Rollouts of about `batch` samples.

    Each of them draws from a seed of its own. A terminal shows a progress bar.
    """
    rolls = []
    rows_at_once = max(1, batch // n)
    starts = range(0, len(rows), rows_at_once)
    # disable=None: only on a terminal, which stdout is on the first process alone
    for start in tqdm(starts, "sampling", leave=False, disable=None, file=sys.stdout):
        part = []
        for row in rows[start : start + rows_at_once]:
            ids = tok.encode_prompt(row["prompt"])
            part.append(row | {"_ids": ids})
        roll = sample_responses(model, tok, part, n, max_new_tokens, temperature, seed + start, **filters)
        rolls.append(roll)
    return rolls


def respond(model, tok, prompts, n=1, max_new_tokens=64, **settings):
    """Text in, text out: n responses to each prompt → (Rollouts, responses), a prompt's n together.

    responses: len(prompts)·n strings without EOS. settings: those of `sample_in_batches`.
    """
    rows = [{"prompt": prompt} for prompt in prompts]
    rolls = sample_in_batches(model, tok, rows, n, max_new_tokens, **settings)
    texts = [text for roll in rolls for text in roll.texts]
    return rolls, texts
