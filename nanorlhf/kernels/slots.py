"""Sampling on a GPU: a queue of rows feeds a fixed number of slots, and no step waits for the host.

`generate.generate` decodes like this on a GPU; docs/generation.md says how and why. A slot is one row of the
KV cache and of the decoding batch. When its row ends, the next row of the queue takes the slot, so that one
long answer does not leave the others idle. A step is always the same sequence of operations on the same
buffers, so that a GPU can replay it as a CUDA graph. What differs between slots stands in tensors (row, pos,
t, alive), and the host only counts steps. It reads the stop flags every CHECK steps. Until then an ended row
stays in its slot, attends to one position and writes to a dummy row.

Uniform random numbers are indexed by (row of the batch, position). A row's samples therefore do not depend on
its slot, on when it starts or on its neighbours, except for rounding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import functional_call

from nanorlhf.errors import RunError
from nanorlhf.model import KVCache, Linear
from nanorlhf.sampling import NOT_FINITE, draw

CHECK = 8  # steps between two looks at the stop flags: a slot idles CHECK/2 steps between two rows
SLOTS = 256  # at most, where the caller does not say
SHARE = 0.5  # of the free memory, for the slots: prompts' caches and copies of logits need the rest
PREFILL = 1 << 14  # padded tokens of prompts prefilled at once, at most; 8 GiB of a 6.9B model's cache
SHORTEST = 256  # attention reads the first 256, 512, 1024, … positions: a graph for each of these lengths
FEWER = 4  # batches have `size` slots, then a quarter of them, then a sixteenth: a graph for each


def how_many(model, rows, length):
    """Slots for so many rows of so many tokens on this GPU: all of them, or SLOTS, or as many as fit."""
    device = model.device
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
    return that_fit(model, rows, length, free + unused)


def that_fit(model, rows, length, free):
    """`how_many` where `free` bytes are free."""
    cache = KVCache(model.cfg, 1, length, "meta", model.dtype)
    logits = 16 * model.n_ids  # bytes of a row's fp32 logits, and of three copies of them
    fit = int(SHARE * free / (cache.kv.nbytes + logits))
    return max(1, min(rows, SLOTS, fit))


def cast_weights(model):
    """{name: weight in the activations' dtype} of the blocks' linear layers, for functional_call.

    Each layer would cast its weight in every step; here it is cast once. Empty if nothing needs a cast.
    """
    cast = {}
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, Linear):
            for kind, p in layer.named_parameters(recurse=False):
                if p.dtype != model.dtype:
                    cast[f"blocks.{name}.{kind}"] = p.to(model.dtype)
    return cast


@dataclass
class Prefill:
    """Some distinct prompts, computed, until their rows have moved into slots."""

    numbers: range  # of the distinct prompts
    cache: KVCache  # a row for each of them
    last: torch.Tensor  # (prompts, D), the hidden state of each prompt's last token
    longest: int  # tokens of the longest of them


class Slots:
    """The buffers of `size` slots, and the step.

    batch: as in `decode`. tokens, logp, new and finished have a row for each of its B rows, and a dummy row
    B: finished slots keep writing there, so that every step is the same sequence of operations.
    """

    def __init__(self, model, batch, sampling, size):
        self.model = model
        self.batch = batch
        self.sampling = sampling
        self.B, self.T = batch.tokens.shape
        self.max_new = batch.uniforms.shape[1]
        self.prompt_len = batch.prompt_len.tolist()
        device = batch.tokens.device
        self.tokens = torch.cat((batch.tokens, batch.tokens[:1]))
        self.logp = torch.zeros(self.B + 1, self.T, device=device)
        rows = self.B + 1
        self.new = torch.zeros(rows, dtype=torch.int64, device=device)  # sampled tokens
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.cache = model.new_cache(size, self.T)
        self.last = torch.zeros(size, model.cfg.d_model, dtype=self.cache.kv.dtype, device=device)
        self.row = torch.zeros(size, dtype=torch.int64, device=device)  # the row in this slot
        self.pos = torch.zeros_like(self.row)  # where its next token goes
        self.t = torch.zeros_like(self.row)  # its tokens sampled so far
        self.flags = torch.zeros(size + 1, dtype=torch.bool, device=device)  # one tensor: the host reads it
        self.alive = self.flags[:-1]
        self.bad = self.flags[-1:]  # a logit was not finite
        self.graphs = {}
        self.pool = None
        if batch.tokens.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()  # a capture needs one that is not the default stream
        self.cast = cast_weights(model)
        # With an odd number of rows cuBLAS would read the unembedding one number at a time
        head = model.unembedding
        self.head = F.pad(head, (0, 0, 0, -len(head) % 64))

    def forward(self, tokens, cache=None, pos=None, live=None):
        """The model with its weights cast once."""
        return functional_call(self.model, self.cast, (tokens, cache, pos, live))

    def index(self, numbers):
        """A list of rows, slots or prompts as an index of tensors."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.row.device)

    def prefill(self, numbers):
        """Compute the distinct prompts of these numbers, a range → Prefill."""
        first_rows = [self.batch.first_rows[number] for number in numbers]
        longest = max(self.prompt_len[row] for row in first_rows)
        cache = self.model.new_cache(len(numbers), longest)
        rows = self.index(first_rows)
        hidden = self.forward(self.batch.tokens[rows, :longest], cache)
        ends = self.batch.prompt_len[rows] - 1
        last = hidden[torch.arange(len(rows), device=rows.device), ends]
        return Prefill(numbers, cache, last, longest)

    def admit(self, slots, rows, prefill):
        """Start these rows, whose prompts are in `prefill`, in these slots."""
        first = prefill.numbers.start
        prompts = self.index([self.batch.distinct[row] - first for row in rows])
        slots = self.index(slots)
        rows = self.index(rows)
        self.cache.fill(slots, prefill.cache, prompts, prefill.longest)
        self.last[slots] = prefill.last[prompts]
        self.row[slots] = rows
        self.pos[slots] = self.batch.prompt_len[rows]
        self.t[slots] = 0
        self.alive[slots] = True

    def move(self, to, source, live):
        """Rows in the slots `source`, of at most `live` tokens, go on in the slots `to`."""
        to = self.index(to)
        source = self.index(source)
        self.cache.fill(to, self.cache, source, live)
        for x in (self.last, self.row, self.pos, self.t, self.alive):
            x[to] = x[source]

    def step(self, b, live):
        """One token in each of the first b slots; every position is below `live`. Never waits for the GPU."""
        row = self.row[:b]
        pos = self.pos[:b]
        t = self.t[:b]
        alive = self.alive[:b]
        logits = self.model.head_logits(self.last[:b], self.head)
        logits = logits[:, : self.model.n_ids]  # without the rows that pad self.head
        token, logp = draw(logits, self.batch.uniforms[row, t], self.sampling)
        ended = (token[:, None] == self.batch.stop_ids).any(1)  # torch.isin may sort, and wait
        at = torch.where(alive, row, self.B)
        self.tokens[at, pos] = token
        self.logp[at, pos] = logp.to(self.logp.dtype)
        self.new[at] = t + 1
        self.finished[at] = ended
        self.bad |= (alive & ~logp.isfinite()).any()
        hidden = self.forward(token[:, None], self.cache.first(b), pos, live)  # (b, 1, D)
        self.last[:b] = hidden[:, 0]
        alive &= ~ended & (t + 1 < self.max_new)
        t += alive
        pos.copy_(torch.where(alive, pos + 1, 0))

    def run(self, b, live):
        """`step`, on a GPU as a graph: the first call runs it plainly and records it, the others replay it.

        A graph holds addresses: those of the buffers, of the cast weights and of the model's own weights. It
        must not outlive any of them, and so lives as long as this object, for one call of `generate`.
        """
        key = (b, live)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.step(b, live)  # kernels are compiled now, which a graph could not record
        if self.pool is None:  # on a CPU
            return
        # What torch.cuda.graph does, but that would empty the allocator's cache before every capture
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # NCCL has a thread
            try:
                self.step(b, live)  # is recorded, not run
            finally:
                graph.capture_end()
        self.graphs[key] = graph


def decode(model, batch, sampling, size):
    """Sample all rows of a batch through `size` slots → tokens (B, T), logp (B, T), new (B,), finished (B,).

    batch: tokens (B, T), prompts padded on the right; prompt_len (B,); uniforms (B, max_new_tokens); stop_ids
    (k,), the ids that end a response; distinct, each row's number among the distinct prompts, a list; and
    first_rows, for each distinct prompt a row that has it, a list. new: the sampled tokens of each row.

    A prompt is prefilled once, together with those that are next, and its cache waits for all of its rows.
    Raises RunError where logits are not finite.
    """
    slots = Slots(model, batch, sampling, size)
    n_prompts = len(batch.first_rows)
    waiting = sorted(range(slots.B), key=lambda row: -batch.distinct[row])  # a stack: prompt 0 is on top
    at_once = max(1, PREFILL // max(slots.prompt_len))  # prompts prefilled together
    at_once = min(at_once, math.ceil(size * n_prompts / slots.B))
    batch_sizes = [size]
    while batch_sizes[-1] > 1:
        batch_sizes.append(math.ceil(batch_sizes[-1] / FEWER))
    b = size  # slots in use: 0 … b-1
    row_in = {}  # slot → its row, until the host sees that it has ended
    sampled = {}  # slot → tokens sampled for its row so far
    prefill = Prefill(range(0), None, None, 0)

    while waiting or row_in:
        # 1. rows of the queue start in the free slots
        free = [slot for slot in range(b) if slot not in row_in]
        while free and waiting:
            if batch.distinct[waiting[-1]] not in prefill.numbers:
                start = prefill.numbers.stop
                prefill = None  # the old cache is freed before the next one is allocated
                prefill = slots.prefill(range(start, min(start + at_once, n_prompts)))
            started = {}  # slot → row
            while free and waiting and batch.distinct[waiting[-1]] in prefill.numbers:
                started[free.pop(0)] = waiting.pop()
            slots.admit(list(started), list(started.values()), prefill)
            for slot, row in started.items():
                row_in[slot] = row
                sampled[slot] = 0
        longest = max(slots.prompt_len[row] + sampled[slot] for slot, row in row_in.items())

        # 2. once the queue is empty, the rows that are left move together into fewer slots
        fewer = min(n for n in batch_sizes if n >= len(row_in))
        if fewer < b:
            movers = [slot for slot in row_in if slot >= fewer]
            holes = [slot for slot in range(fewer) if slot not in row_in]
            holes = holes[: len(movers)]
            slots.move(holes, movers, longest)
            for hole, mover in zip(holes, movers):
                row_in[hole] = row_in.pop(mover)
                sampled[hole] = sampled.pop(mover)
            b = fewer

        # 3. a few steps, and then a look at which rows have ended
        left = slots.max_new - min(sampled.values())
        steps = min(CHECK, left)
        for i in range(1, steps + 1):
            slots.run(b, _rounded_up(longest + i, slots.T))
        flags = slots.flags.tolist()  # the host waits here, and nowhere else
        if flags[-1]:
            raise RunError(NOT_FINITE)
        for slot in list(row_in):
            if flags[slot]:
                sampled[slot] += steps
            else:
                del row_in[slot], sampled[slot]

    return slots.tokens[:-1], slots.logp[:-1], slots.new[:-1], slots.finished[:-1]


def _rounded_up(length, most):
    """The first of SHORTEST, 2·SHORTEST, 4·SHORTEST, … that is not below length; at most `most`.

    >>> _rounded_up(300, 1000), _rounded_up(600, 1000)
    (512, 1000)
    """
    live = SHORTEST
    while live < length:
        live *= 2
    return min(live, most)
