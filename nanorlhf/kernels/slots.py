"""Slot refill: a queue of rows feeds a fixed number of slots, and no step waits for the host.

`generate.generate` decodes like this on a GPU; docs/generation.md says how and why. A row that has ended
leaves its slot to the next one of the queue, so that one long answer holds up nobody. A step is a fixed
sequence of operations on buffers that stay where they are, so that a GPU can replay it as a CUDA graph: what
a slot does stands in tensors (row, pos, t, alive), and the host only counts steps. Stop flags are read every
CHECK steps. Until then an ended row goes on in its slot, attends to one position and writes to a row that
nobody reads.

The table of uniforms is indexed by (row of the batch, position): which slot served a row, when and beside
whom changes its samples no more than rounding does.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from nanorlhf.errors import RunError
from nanorlhf.model import KVCache, Linear
from nanorlhf.sampling import NOT_FINITE, draw

CHECK = 8  # steps between two looks at the stop flags: a slot idles CHECK/2 steps between two rows
SLOTS = 256  # at most, where the caller does not say
SHARE = 0.5  # of the memory that is free, for the slots: the prompts' cache and the logits' copies need some
PREFILL = 1 << 14  # padded tokens of prompts prefilled at once, at most; of a 6.9B's cache 8 GiB
SHORTEST = 256  # first rung of the ladder of lengths; each is twice the one before
FEWER = 4  # rungs of the ladder of batches: `size` slots, a quarter of them, a quarter of those


def how_many(model, rows, length):
    """Slots for so many rows of so many tokens on this GPU: all of them, or SLOTS, or what memory allows."""
    device = model.device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return that_fit(model, rows, length, free)


def that_fit(model, rows, length, free):
    """`how_many` where `free` bytes are free."""
    dtype = model.compute_dtype or model.wte.weight.dtype
    each = KVCache(model.cfg, 1, length, "meta", dtype).kv.nbytes + 16 * model.n_ids  # logits and copies
    return max(1, min(rows, SLOTS, int(SHARE * free / each)))


class Slots:
    """The buffers of `size` slots, and the step. Rows are numbered 0 … B−1; row B is where nobody reads.

    tokens (B, T) padded prompts, plen (B,), u (B, max_new_tokens), stop (·,): as made by generate._start.
    """

    def __init__(self, model, size, tokens, plen, u, stop, how):
        self.model, self.how = model, how
        self.u, self.stop, self.max_new = u, stop, u.shape[1]
        (self.B, self.T), device = tokens.shape, tokens.device
        self.tokens = torch.cat((tokens, tokens[:1]))
        self.logp = torch.zeros(self.B + 1, self.T, device=device)
        self.new = torch.zeros(self.B + 1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(self.B + 1, dtype=torch.bool, device=device)
        self.plen = plen
        self.cache = model.new_cache(size, self.T)
        self.last = torch.zeros(size, model.cfg.d_model, dtype=self.cache.kv.dtype, device=device)
        self.row, self.pos, self.t = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.flags = torch.zeros(size + 1, dtype=torch.bool, device=device)
        self.alive, self.bad = self.flags[:-1], self.flags[-1:]
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if tokens.is_cuda else None
        # What every layer would cast at every step is cast once, the unembedding too. Its rows are filled up
        # to a multiple of 64, or an odd vocabulary would make cuBLAS read it a number at a time.
        dtype = model.compute_dtype
        self.cast = {
            f"blocks.{name}.{kind}": p.to(dtype)
            for name, layer in model.blocks.named_modules() if dtype and isinstance(layer, Linear)
            for kind, p in layer.named_parameters(recurse=False) if p.dtype != dtype
        }  # fmt: skip
        head = model.unembedding
        self.head = F.pad(head, (0, 0, 0, -len(head) % 64))

    def forward(self, *args):
        return functional_call(self.model, self.cast, args) if self.cast else self.model(*args)

    def admit(self, slots, rows, cache, at, last, length):
        """Rows move in: their prompts are rows `at` of `cache`, in its first `length` positions."""
        slots, rows, at = (torch.tensor(x, device=self.row.device) for x in (slots, rows, at))
        self.cache.fill(slots, cache, at, length)
        self.last[slots], self.row[slots] = last[at], rows
        self.pos[slots], self.t[slots], self.alive[slots] = self.plen[rows], 0, True

    def move(self, to, source, live):
        """What goes on in the slots `source` goes on in the slots `to`."""
        to, source = (torch.tensor(x, dtype=torch.int64, device=self.row.device) for x in (to, source))
        self.cache.fill(to, self.cache, source, live)
        for x in (self.last, self.row, self.pos, self.t, self.alive):
            x[to] = x[source]

    def step(self, b, live):
        """One token in each of the first b slots; every position is below `live`. Never waits for the GPU."""
        row, pos, t, alive = (x[:b] for x in (self.row, self.pos, self.t, self.alive))
        logits = self.model.head_logits(self.last[:b], self.head)[:, : self.model.n_ids]
        token, logp = draw(logits, self.u[row, t], *self.how)
        ended = (token[:, None] == self.stop).any(1)  # torch.isin may sort, and wait
        at = torch.where(alive, row, self.B)
        self.tokens[at, pos], self.logp[at, pos] = token, logp.to(self.logp.dtype)
        self.new[at], self.finished[at] = t + 1, ended
        self.bad |= (alive & ~logp.isfinite()).any()
        self.last[:b] = self.forward(token[:, None], self.cache.first(b), pos, live)[:, 0]
        alive &= ~ended & (t + 1 < self.max_new)
        t += alive
        pos.copy_(torch.where(alive, pos + 1, 0))

    def run(self, b, live):
        """`step`, on a GPU as a graph. The first time as it is, which compiles kernels; then it is captured.

        A graph holds addresses: the buffers', the cast weights' and, for what is not cast, the model's own.
        It must not outlive any of them, and so lives as long as this object, for one call of `generate`.
        """
        if self.pool is None:
            return self.step(b, live)
        if (b, live) not in self.graphs:
            self.graphs[b, live] = None
            return self.step(b, live)
        if self.graphs[b, live] is None:
            self.graphs[b, live] = torch.cuda.CUDAGraph()
            how = dict(pool=self.pool, capture_error_mode="thread_local")  # NCCL has a thread
            with torch.cuda.graph(self.graphs[b, live], **how):
                self.step(b, live)  # recorded, not run
        self.graphs[b, live].replay()


def decode(model, size, tokens, plen, u, stop, how, prompts, of_row):
    """All rows through `size` slots → tokens (B, T), logp (B, T), new (B,), finished (B,).

    prompts: for each distinct prompt, a row that has it; of_row (B,): each row's distinct prompt. how:
    temperature, top_k, top_p. A prompt is prefilled once, in a batch with those that are next, and its cache
    waits for all of its rows.
    """
    slots = Slots(model, size, tokens, plen, u, stop, how)
    lengths, waiting = plen.tolist(), sorted(range(len(of_row)), key=lambda row: -of_row[row])  # a stack
    together = min(-(-size * len(prompts) // len(of_row)), max(1, PREFILL // max(lengths)))
    ready = range(0)  # the distinct prompts in the prefilled batch
    rungs = [size]  # of the ladder of batches
    while rungs[-1] > 1:
        rungs.append(-(-rungs[-1] // FEWER))
    served, b = {}, size  # slot → positions it holds, those it may; slots from b on are shut

    while waiting or served:
        free = [slot for slot in range(b) if slot not in served]
        while free and waiting:
            if of_row[waiting[-1]] not in ready:
                ready = range(ready.stop, min(ready.stop + together, len(prompts)))
                batch = torch.tensor(prompts[ready.start : ready.stop], device=tokens.device)
                longest = max(lengths[row] for row in batch.tolist())
                cache = None  # the last batch's goes before this one's comes
                cache = model.new_cache(len(batch), longest)
                ends = torch.arange(len(batch), device=tokens.device), plen[batch] - 1
                last = slots.forward(tokens[batch, :longest], cache)[ends]
            rows = []
            while waiting and len(rows) < len(free) and of_row[waiting[-1]] in ready:
                rows.append(waiting.pop())
            taken, free = free[: len(rows)], free[len(rows) :]
            slots.admit(taken, rows, cache, [of_row[row] - ready.start for row in rows], last, longest)
            served |= {slot: (lengths[row], lengths[row] + slots.max_new) for slot, row in zip(taken, rows)}
        fits = min(rung for rung in rungs if rung >= len(served))
        if fits < b:  # the queue is empty: the rows that are left move together
            movers = [slot for slot in served if slot >= fits]
            holes = [slot for slot in range(fits) if slot not in served][: len(movers)]
            slots.move(holes, movers, max(held for held, _ in served.values()))
            served |= {to: served.pop(source) for to, source in zip(holes, movers)}
            b = fits
        held, left = max(n for n, _ in served.values()), max(most - n for n, most in served.values())
        steps = min(CHECK, left)
        for i in range(1, steps + 1):
            live = SHORTEST
            while live < held + i:
                live *= 2
            slots.run(b, min(live, slots.T))
        *alive, bad = slots.flags.tolist()  # the host waits here, and nowhere else
        if bad:
            raise RunError(NOT_FINITE)
        served = {slot: (n + steps, most) for slot, (n, most) in served.items() if alive[slot]}
    return [x[:-1] for x in (slots.tokens, slots.logp, slots.new, slots.finished)]
