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

import functools
import math
import weakref
from dataclasses import dataclass

import torch

from nanorlhf.errors import RunError
from nanorlhf.kernels.bf16 import cast_once
from nanorlhf.model import KVCache
from nanorlhf.sampling import NOT_FINITE, draw, first_above

CHECK = 8  # steps between two looks at the stop flags: a slot idles CHECK/2 steps between two rows
SLOTS = 256  # at most, where the caller does not say
SHARE = 0.5  # of the free memory, for the slots: prompts' caches and copies of logits need the rest
PREFILL = 1 << 14  # padded tokens of prompts prefilled at once, at most; 8 GiB of a 6.9B model's cache
SHORTEST = 256  # attention reads the first 256, 512, 1024, … positions: a graph for each of these lengths
FEWER = 4  # batches have `size` slots, then a quarter of them, then a sixteenth: a graph for each
BLOCK = 256  # tokens of a block in invert_in_blocks
ROUND = 64  # buffers are a multiple of this long: the next batch's longest prompt may differ by a few tokens
STAY = 1 / 16  # of the GPU's memory, for slots that stay between two calls; a training step has the rest

kept = weakref.WeakKeyDictionary()  # {model: the slots of the last call}; one entry at most


def how_many(model, rows, length):
    """Slots for so many rows of so many tokens on this GPU: all of them, or SLOTS, or as many as fit."""
    device = model.device
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
    return that_fit(model, rows, length, free + unused)


def that_fit(model, rows, length, free):
    """`how_many` where `free` bytes are free."""
    fit = int(SHARE * free / slot_bytes(model, length))
    return max(1, min(rows, SLOTS, fit))


def slot_bytes(model, length):
    """Bytes of a slot: its row of the cache, its fp32 logits and three copies of them."""
    cache = KVCache(model.cfg, 1, length, "meta", model.dtype)
    return cache.kv.nbytes + 16 * model.n_ids


def that_stay(model, n_bytes, total):
    """Of slots of so many bytes, those that stay between two calls on a GPU of `total` bytes: all or none."""
    if model.recompute:  # --save_memory
        return 0
    return n_bytes if n_bytes <= STAY * total else 0


def addresses(model):
    """Where the weights are that a step reads; inside `cast_once` those of the copies."""
    return [
        getattr(layer, name).data_ptr()
        for layer in model.modules()
        for name, _ in layer.named_parameters(recurse=False)
    ]


@functools.cache
def _capture_stream(device):
    """One for all captures: cuBLAS keeps up to 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def invert_in_blocks(e, uniforms):
    """`sampling._invert_cdf` for a GPU, where sums are fast and a cumulative sum over V is slow.

    The sums of blocks of BLOCK tokens are cumulated, and then the tokens of the block that is drawn.
    """
    V = e.shape[1]
    n = V // BLOCK
    blocks = e[:, : n * BLOCK].unflatten(1, (n, BLOCK))
    rest = e[:, n * BLOCK :].sum(-1, keepdim=True)  # the last block is shorter, or empty
    mass = torch.cat((blocks.sum(-1), rest), 1)  # (b, n + 1)
    cdf = _cumulated(mass)
    aim = uniforms * cdf[:, -1:]
    block = first_above(cdf, aim)
    aim -= (cdf - mass).gather(1, block)  # the blocks before
    aim.clamp_(min=0)  # below 0, by rounding, the block's first token would be drawn, whatever its mass
    ids = block * BLOCK + torch.arange(BLOCK, device=e.device)  # (b, BLOCK)
    mass = e.gather(1, ids.clamp(max=V - 1)) * (ids < V)
    token = ids.gather(1, first_above(_cumulated(mass), aim))
    return token.clamp(max=V - 1)  # NaN logits would otherwise give more, which is no index


def _cumulated(mass):
    """Cumulative sums that do not change where there is no mass.

    A GPU adds in pairs, so that its sum may be a last bit larger at such a place than to its left. With top-k
    most tokens are such places, and the log-prob of one that is drawn is −inf.
    """
    sums = mass.cumsum(-1) * (mass > 0)
    return sums.cummax(-1).values


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

    A graph holds addresses: those of the buffers, of the copies of weights and of the model's own weights.
    Nothing that a step reads or writes may therefore be replaced while there are graphs; `start` fills the
    buffers of the last call anew.
    """

    def __init__(self, model, batch, sampling, size):
        self.sampling = sampling
        self.B, T = batch.tokens.shape
        self.T = math.ceil(T / ROUND) * ROUND
        self.max_new = batch.uniforms.shape[1]
        device = batch.tokens.device
        rows = self.B + 1
        self.tokens = torch.zeros(rows, self.T, dtype=torch.int64, device=device)
        self.logp = torch.zeros(rows, self.T, device=device)
        self.new = torch.zeros(rows, dtype=torch.int64, device=device)  # sampled tokens
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.uniforms = torch.empty_like(batch.uniforms)
        self.stop_ids = torch.empty_like(batch.stop_ids)
        self.cache = model.new_cache(size, self.T)
        self.last = torch.zeros(size, model.cfg.d_model, dtype=self.cache.kv.dtype, device=device)
        self.row = torch.zeros(size, dtype=torch.int64, device=device)  # the row in this slot
        self.pos = torch.zeros_like(self.row)  # where its next token goes
        self.t = torch.zeros_like(self.row)  # its tokens sampled so far
        self.flags = torch.zeros(size + 1, dtype=torch.bool, device=device)  # one tensor: the host reads it
        self.alive = self.flags[:-1]
        self.bad = self.flags[-1:]  # a logit was not finite
        self.copies = {}  # {name: a weight in the activations' dtype}
        self.graphs = {}
        self.addresses = None  # of the weights in the graphs

    def start(self, model, batch):
        """Take in the rows of a batch, and the model's weights as they are now, inside `cast_once`."""
        self.model = model
        self.batch = batch
        self.prompt_len = batch.prompt_len.tolist()
        self.tokens[:-1, : batch.tokens.shape[1]] = batch.tokens
        self.uniforms.copy_(batch.uniforms)
        self.stop_ids.copy_(batch.stop_ids)
        for x in (self.logp, self.new, self.finished, self.flags):
            x.zero_()
        # With an odd number of rows cuBLAS would read the unembedding one number at a time
        head = model.unembedding
        odd = -len(head) % 64
        if odd:
            zeros = head.new_zeros(len(head) + odd, head.shape[1])
            padded = self.copies.setdefault("padded", zeros)
            padded[:-odd] = head
            head = padded
        self.head = head
        now = [*addresses(model), head.data_ptr()]
        if now != self.addresses:
            self.graphs = {}
            self.addresses = now
            if batch.tokens.is_cuda:
                self.pool = torch.cuda.graph_pool_handle()  # one whose graphs are gone must not be used again

    def nbytes(self):
        """Bytes of all that stays allocated as long as these slots, the graphs' own memory included."""
        buffers = [self.tokens, self.logp, self.uniforms, *self.copies.values()]
        slots = len(self.row) * slot_bytes(self.model, self.T)
        return slots + sum(x.nbytes for x in buffers)

    def index(self, numbers):
        """A list of rows, slots or prompts as an index of tensors."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.row.device)

    def prefill(self, numbers):
        """Compute the distinct prompts of these numbers, a range → Prefill."""
        first_rows = [self.batch.first_rows[number] for number in numbers]
        longest = max(self.prompt_len[row] for row in first_rows)
        cache = self.model.new_cache(len(numbers), longest)
        rows = self.index(first_rows)
        hidden = self.model(self.batch.tokens[rows, :longest], cache)
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
        token, logp = draw(logits, self.uniforms[row, t], self.sampling, invert_in_blocks)
        ended = (token[:, None] == self.stop_ids).any(1)  # torch.isin may sort, and wait
        at = torch.where(alive, row, self.B)
        self.tokens[at, pos] = token
        self.logp[at, pos] = logp.to(self.logp.dtype)
        self.new[at] = t + 1
        self.finished[at] = ended
        self.bad |= (alive & ~logp.isfinite()).any()
        hidden = self.model(token[:, None], self.cache.first(b), pos, live)  # (b, 1, D)
        self.last[:b] = hidden[:, 0]
        alive &= ~ended & (t + 1 < self.max_new)
        t += alive
        pos.copy_(torch.where(alive, pos + 1, 0))

    def run(self, b, live):
        """`step`, on a GPU as a graph: the first call runs and records it, the others replay it."""
        key = (b, live)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.step(b, live)  # kernels are compiled now, which a graph could not record
        if not self.row.is_cuda:
            return
        # What torch.cuda.graph does, but that would empty the allocator's cache before every capture
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # A capture needs a stream that is not the default one
        with torch.cuda.stream(_capture_stream(self.row.device)):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # NCCL has a thread
            try:
                self.step(b, live)  # is recorded, not run
            finally:
                graph.capture_end()
        self.graphs[key] = graph


def take(model, batch, sampling, size):
    """The slots of the last call if they agree with this one in all that a graph holds, or else new ones."""
    rows, T = batch.tokens.shape
    agree = [size, math.ceil(T / ROUND), batch.uniforms.shape, batch.stop_ids.shape, batch.tokens.device]
    agree += [sampling, model.dtype, model.n_ids]
    agree.append(torch.is_inference_mode_enabled())  # outside of it nobody may write to what was made inside
    slots = kept.pop(model, None)
    kept.clear()
    if slots is None or slots.agree != agree:
        slots = None  # freed now, so that its memory counts as free
        size = size or how_many(model, rows, T)
        slots = Slots(model, batch, sampling, min(size, rows))
        slots.agree = agree
    return slots


def decode(model, batch, sampling, size):
    """Sample all rows of a batch through `size` slots; 0: as many as suit the GPU. Writes into the batch.

    batch: tokens (B, T), prompts padded on the right; prompt_len (B,); uniforms (B, max_new_tokens); stop_ids
    (k,), the ids that end a response; distinct, each row's number among the distinct prompts, a list; and
    first_rows, for each distinct prompt a row that has it, a list. Written to: tokens; logp (B, T); sampled
    (B,), how many tokens each row has got; finished (B,).

    The slots stay for the next call with this model if they are small (STAY). Raises RunError where logits
    are not finite.
    """
    slots = take(model, batch, sampling, size)
    with cast_once(model, slots.copies):
        slots.start(model, batch)
        _sample_all(slots, batch)
    T = batch.tokens.shape[1]
    batch.tokens.copy_(slots.tokens[:-1, :T])
    batch.logp.copy_(slots.logp[:-1, :T])
    batch.sampled.copy_(slots.new[:-1])
    batch.finished.copy_(slots.finished[:-1])
    if not batch.tokens.is_cuda:  # there are no graphs to keep
        return
    total = torch.cuda.mem_get_info(model.device)[1]
    if that_stay(model, slots.nbytes(), total):
        slots.model = None  # or the model would live on in `kept`
        slots.batch = None
        kept[model] = slots


def _sample_all(slots, batch):
    """The loop of `decode`.

    A prompt is prefilled once, together with those that are next, and its cache waits for all of its rows.
    """
    size = len(slots.row)
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


def _rounded_up(length, most):
    """The first of SHORTEST, 2·SHORTEST, 4·SHORTEST, … that is not below length; at most `most`.

    >>> _rounded_up(300, 1000), _rounded_up(600, 1000)
    (512, 1000)
    """
    live = SHORTEST
    while live < length:
        live *= 2
    return min(live, most)
