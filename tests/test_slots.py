"""Slot refill: row by row the samples of the plain loop, whatever the slots; a step that a graph can hold."""

import contextlib
import copy
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_device import pretended
from helpers import V, randint, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import lora
from nanorlhf.errors import RunError, UserError
from nanorlhf.generate import generate
from nanorlhf.kernels import slots
from nanorlhf.kernels.bf16 import cast_once
from nanorlhf.sampling import Sampling, draw, sample

F64, BF16 = torch.float64, torch.bfloat16
EOS = 3
PROMPTS = [[5], [1, 2, 4, 6, 7, 8], [9, EOS, 9], [1, 2, 4, 6, 7, 8], [EOS], [12, 11]]  # ragged, one twice
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def same(a, b, tol=1e-5):
    for name in ("tokens", "mask", "finished", "group", "prompt_len"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.logp - b.logp).abs().max() < tol


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(["gpt2-untied", "llama-gqa-untied", "pythia"]),
    which=st.randoms(use_true_random=False),
    n=st.integers(1, 4), many=st.integers(1, 7), longest=st.integers(1, 9), new=st.integers(1, 13),
    stops=st.sampled_from([None, (EOS,), (EOS, 5), (EOS, 5, 7, 0), range(V)]),  # never, …, at once
    size=st.sampled_from([1, 2, 3, 5, "B", "B+4"]), temperature=st.sampled_from([1.0, 0.7, 0.0]),
    check=st.sampled_from([1, 3, 8]), prefill=st.sampled_from([1, 20, 1 << 16]),
    fewer=st.sampled_from([2, 4]),
)  # fmt: skip
def test_row_by_row_the_plain_loop(style, which, n, many, longest, new, stops, size, temperature, check,
                                   prefill, fewer):  # fmt: skip
    """Tokens, lengths and ends exactly, log-probs to rounding: float64, so that no draw is on an edge."""
    model = tiny(style, dtype=F64)
    model.stop_ids = tuple(stops or ())
    prompts = [[which.randrange(V) for _ in range(which.randint(1, longest))] for _ in range(many)]
    prompts += prompts[: which.randint(0, 2)]
    args = dict(n=n, max_new_tokens=new, eos_id=stops and stops[0], seed=which.randrange(99))
    args["temperature"] = temperature
    want = generate(model, prompts, **args)
    size = {"B": len(prompts) * n, "B+4": len(prompts) * n + 4}.get(size, size)
    with mock.patch.multiple(slots, CHECK=check, PREFILL=prefill, FEWER=fewer, SHORTEST=4):
        same(generate(model, prompts, **args, slots=size), want)


@pytest.mark.parametrize("size", [1, 3, 10, 24, 30])
def test_whatever_the_slots(size):
    """One case of the above, that anybody can follow: 24 rows, six prompts, one of them twice."""
    model, args = tiny("llama", dtype=F64), dict(n=4, max_new_tokens=12, eos_id=EOS, seed=1)
    with mock.patch.multiple(slots, CHECK=3, SHORTEST=4):
        got = generate(model, PROMPTS, **args, slots=size)
    same(got, generate(model, PROMPTS, **args))
    assert len(set(got.response_len.tolist())) > 6 and not got.finished.all()


@pytest.mark.parametrize("how", [dict(top_k=3), dict(top_p=0.7), dict(temperature=1.4, top_k=6, top_p=0.8)])
def test_filtered_sampling(how):
    args = dict(n=3, max_new_tokens=12, eos_id=EOS, **how)
    model = tiny("llama", dtype=F64)
    same(generate(model, PROMPTS, **args, slots=4), generate(model, PROMPTS, **args))


@pytest.mark.parametrize("style", ["gpt2", "llama-gqa-untied", "qwen3"])
def test_logp_is_recomputed(style):
    """fp32, ragged, slots refilled: what the trainers' scoring gives for the same tokens."""
    model = tiny(style)
    roll = generate(model, PROMPTS, n=8, max_new_tokens=12, eos_id=EOS, slots=5, temperature=0.8)
    assert 0 < roll.finished.sum() < 48
    assert (roll.logp - model.logprobs(roll.tokens, roll.mask, 0.8)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("size, together", [(1, 1), (4, 1), (20, 2), (96, 5)])
def test_how_much_is_computed(size, together):
    """Each distinct prompt is prefilled once; never more rows than slots; hardly more tokens than needed."""
    model, prefilled, steps = tiny(), [], []

    def watch(_, args):
        (prefilled if len(args) == 2 else steps).append(args[0])

    hook = model.register_forward_pre_hook(watch)
    roll = generate(model, PROMPTS, n=16, max_new_tokens=12, eos_id=EOS, seed=1, slots=size)
    hook.remove()
    assert max(map(len, prefilled)) == together
    prompts = sorted(tuple(row.tolist())[:6] for batch in prefilled for row in batch)
    assert len(prompts) == len(set(prompts)) == 5
    rows = [len(step) for step in steps]
    assert max(rows) <= size and rows == sorted(rows, reverse=True)  # the batch only shrinks
    assert {b for b in rows} <= {size, -(-size // 4), -(-size // 16), 1}
    tokens = int(roll.response_len.sum())
    idle = 96 * (slots.CHECK - 1) + size * 12  # after its end a row waits for the next look; the last rows
    assert tokens <= sum(rows) <= tokens + idle


class Recorder(TorchDispatchMode):
    """The operations, their shapes and the memory they write to; a host that asks for a value is an error."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(x in name for x in ("_local_scalar_dense", "nonzero", "unique", "is_nonzero")), name
        out = func(*args, **(kwargs or {}))
        at = [x.data_ptr() for x in args if isinstance(x, torch.Tensor)] if name.endswith("_.default") else []
        self.seen.append((name, tuple(getattr(out, "shape", ())), at and at[:1]))
        return out


@contextlib.contextmanager
def hand_made(model, prompt_len, tokens, max_new, stop_ids=(), sampling=Sampling(), size=2):  # noqa: B008
    """Slots that have taken in a batch whose prompts are all distinct."""
    rows = list(range(len(tokens)))
    uniforms = torch.rand(len(tokens), max_new)
    batch = SimpleNamespace(tokens=tokens, prompt_len=prompt_len, uniforms=uniforms,
                            stop_ids=torch.tensor(stop_ids), first_rows=rows, distinct=rows)  # fmt: skip
    engine = slots.Slots(model, batch, sampling, size)
    with torch.no_grad(), cast_once(model, engine.copies):
        engine.start(model, batch)
        yield engine


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, 3, 0.8)])
@pytest.mark.parametrize("compute", [None, BF16])
def test_a_step_is_one_fixed_sequence(sampling, compute):
    """A graph can replay it: no value reaches the host, and whatever the state, the same operations on the
    same buffers. At (b, live) = (4, 16) and then (2, 16)."""
    model = tiny("llama-gqa-untied")
    model.compute_dtype = compute
    B, tokens = 6, randint(V, 6, 20)
    plen = torch.tensor([5, 2, 7, 5, 4, 6])
    with hand_made(model, plen, tokens, 8, [EOS], sampling, 4) as engine:
        prompts = engine.prefill(range(B))
        engine.admit([0, 1, 2, 3], [0, 1, 2, 3], prompts)
        runs, buffers = [], [engine.cache.kv, engine.last, engine.row, engine.pos, engine.t, engine.flags]
        before = [x.data_ptr() for x in buffers]
        for i, b in enumerate([4] * 9 + [2] * 2):
            if i == 4:
                engine.admit([1], [5], prompts)
            with Recorder() as recorder:
                engine.step(b, 16)
            runs.append([(name, shape) for name, shape, _ in recorder.seen])
    assert all(run == runs[0] for run in runs[:9]) and runs[9] == runs[10] != runs[0]
    assert before == [x.data_ptr() for x in buffers]
    assert not engine.alive[0] and engine.new[:4].max() <= 8


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("style", ["gpt2", "qwen3", "pythia"])
def test_weights_are_cast_once(style, rank):
    """The model with its cast weights is the model, bit by bit; nothing that a block multiplies is left."""
    model = tiny(style)
    lora.add(model, rank, "bfloat16" if rank else None)
    model.compute_dtype = BF16
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
        tokens = randint(V, 3, 9)
        want = model(tokens)
    with hand_made(model, torch.ones(3).long(), tokens, 2) as engine:
        assert torch.equal(engine.model(tokens), want)
        matrices = {f"blocks.{n}" for n, p in model.blocks.named_parameters() if p.dim() == 2}
        frozen = {n for n in matrices if rank and n.endswith("weight")}  # they have that dtype already
        assert matrices - frozen <= engine.copies.keys() and not frozen & engine.copies.keys()
        assert engine.head.shape == (64, 16) and torch.equal(engine.head[:V], model.unembedding)


def test_bf16():
    """Sampled and recomputed log-probs differ by what bf16 activations round away, and no more."""
    model = tiny("qwen2")
    model.compute_dtype = BF16
    roll = generate(model, PROMPTS, n=8, max_new_tokens=12, eos_id=EOS, slots=5)
    gap = (roll.logp - model.logprobs(roll.tokens, roll.mask)[0]).abs().max()  # 0 with torch 2.6
    assert gap < 5e-2 and torch.isfinite(roll.logp).all()
    model.compute_dtype = None
    assert (roll.logp - model.logprobs(roll.tokens, roll.mask)[0]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------------
# The draw in two levels


EDGES = [0.0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24]


@settings(max_examples=80, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 256, 257, 300, 512, 1000]), block=st.sampled_from([4, 256]),
    std=st.sampled_from([0.0, 1.0, 6.0, 60.0]), kept=st.sampled_from([1.0, 0.3, 0.01]),
    seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, F64]),
)  # fmt: skip
def test_a_draw_in_two_levels_is_the_draw_in_one(size, block, std, kept, seed, dtype):
    """The oracle is one cumulative sum in float64. In fp32 rounding may move a draw that is on an edge.

    Blocks without any mass, a last block that is short or empty, uniforms at both ends.
    """
    g = torch.Generator().manual_seed(seed)
    z = std * torch.randn(16, size, generator=g, dtype=F64)
    z.masked_fill_(torch.rand(16, size, generator=g) > kept, -torch.inf)
    z[:, torch.randint(size, (), generator=g)] = 0.0
    e = (z - z.amax(-1, keepdim=True)).exp().to(dtype)
    uniforms = torch.rand(16, generator=g)
    uniforms[: len(EDGES)] = torch.tensor(EDGES)
    before = e.clone()
    with mock.patch.object(slots, "BLOCK", block):
        token = slots.invert_in_blocks(e, uniforms[:, None])
    assert torch.equal(e, before) and (e.gather(1, token) > 0).all()
    cdf = e.double().cumsum(-1)
    aim = uniforms[:, None].double() * cdf[:, -1:]
    to_its_right = cdf.gather(1, token) - aim
    to_its_left = aim - (cdf - e.double()).gather(1, token)
    slack = (1e-6 if dtype == torch.float32 else 1e-14) * cdf[:, -1:]
    assert (to_its_right > -slack).all() and (to_its_left >= -slack).all()


def test_two_levels_draw_what_the_plain_loop_draws():
    """In float64 exactly, whatever the settings; logits that are not finite give no index beyond V."""
    logits = 3 * torch.randn(500, 700, generator=torch.Generator().manual_seed(1), dtype=F64)
    uniforms = torch.rand(500, generator=torch.Generator().manual_seed(2))
    for sampling in (Sampling(), Sampling(0.7), Sampling(1.0, 20), Sampling(1.0, 0, 0.9), Sampling(0.0)):
        token, logp = draw(logits, uniforms, sampling, slots.invert_in_blocks)
        want, want_logp = sample(logits, uniforms, sampling)
        assert torch.equal(token, want) and torch.equal(logp, want_logp)
    assert draw(logits.fill_(torch.nan), uniforms, Sampling(), slots.invert_in_blocks)[1].isnan().all()


@pytest.mark.parametrize("step", range(20))
def test_no_token_without_mass_is_drawn_where_sums_do_not_grow(step):
    """A GPU's cumulative sum of a place without mass may be a last bit above its left neighbour's."""
    e = torch.zeros(1, 1024)
    e[0, torch.tensor([3, 300, 301, 800])] = torch.tensor([0.2, 0.3, 0.1, 0.4])
    exact = torch.Tensor.cumsum

    def trembling(x, dim):
        g = torch.Generator().manual_seed(step)
        return exact(x, dim) * (1 + 1e-3 * torch.rand(x.shape, generator=g))

    uniforms = (torch.tensor([0.2, 0.5, 0.6, 1.0]).repeat_interleave(25) + torch.linspace(-1e-3, 1e-3, 100))
    uniforms = uniforms.clamp(0, 1 - 2**-24)[:, None]
    with mock.patch.object(torch.Tensor, "cumsum", trembling):
        token = slots.invert_in_blocks(e.expand(100, -1), uniforms)
    assert set(token.flatten().tolist()) <= {3, 300, 301, 800}


# ------------------------------------------------------------------------------------------------------------
# What stays from one call to the next, on a pretended GPU: its graphs keep to the memory of their capture


@pytest.fixture
def gpu():
    """gpu(style, ...) → a random model on it."""

    def model(style, compute=None, **size):
        made = tiny(style, **size).to("cuda")
        made.compute_dtype = compute
        return made

    with pretended("cuda", triton=False):
        yield model
        slots.kept.clear()


def sampled(model, seed=0, prompts=PROMPTS, **more):
    return generate(model, prompts, seed=seed, **dict(n=2, max_new_tokens=6, eos_id=EOS) | more)


def train(model):
    """Change every weight in place, as an optimizer does."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("compute", [None, BF16])
@pytest.mark.parametrize("style, vocab", [("gpt2", V), ("llama-gqa-untied", V), ("llama", 64), ("qwen3", 64)])
def test_graphs_stay_and_read_the_weights_of_now(style, vocab, compute, rank, gpu):
    """The oracle: a copy of the model, whose slots are new. V is odd and has a padded head, 64 has none."""
    model = gpu(style, compute, vocab_size=vocab)
    lora.add(model, rank, "bfloat16" if rank and compute else None)
    first = sampled(model, seed=1)
    before = first.tokens.clone(), first.logp.clone()
    stayed = slots.kept[model]
    graphs = dict(stayed.graphs)
    cache = stayed.cache.kv.data_ptr()
    train(model)
    got = sampled(model, seed=2, prompts=[[*prompt, 1] for prompt in PROMPTS])  # longer, by less than ROUND
    assert graphs and slots.kept[model] is stayed and stayed.cache.kv.data_ptr() == cache
    assert all(stayed.graphs[key] is graph for key, graph in graphs.items())
    assert torch.equal(first.tokens, before[0]) and torch.equal(first.logp, before[1])
    want = sampled(copy.deepcopy(model), seed=2, prompts=[[*prompt, 1] for prompt in PROMPTS])
    same(got, want, 1e-6)


@pytest.mark.parametrize("compute", [None, BF16])
@pytest.mark.parametrize("name", ["wte", "norm", "blocks.0.attn.q", "blocks.1.mlp.up", "blocks.0.norm2"])
def test_a_weight_that_moves_ends_the_graphs(name, compute, gpu):
    """Its old memory holds other numbers then. A cast weight may move: its copy stays where it is."""
    model = gpu("llama", compute)
    sampled(model)
    stayed = slots.kept[model]
    graphs = list(stayed.graphs.values())
    weight = model.get_submodule(name).weight
    old = weight.data
    weight.data = 1.5 * old
    old.zero_()
    got = sampled(model)
    is_cast = compute and "blocks" in name and "norm" not in name
    assert slots.kept[model] is stayed
    assert {graph in graphs for graph in stayed.graphs.values()} == {bool(is_cast)}
    same(got, sampled(copy.deepcopy(model)), 1e-6)


def test_a_callers_cast_is_not_taken_for_one_that_stays(gpu):
    model = gpu("llama", BF16)
    with cast_once(model):
        sampled(model)
    train(model)
    got = sampled(model)
    same(got, sampled(copy.deepcopy(model)), 1e-6)


@pytest.mark.parametrize("other", [
    dict(n=3), dict(max_new_tokens=7), dict(temperature=0.5), dict(slots=3), dict(eos_id=None),
    dict(prompts=[[1] * 60]), "compute_dtype", "n_ids", "model",
])  # fmt: skip
def test_what_does_not_agree_frees_the_slots_first(other, gpu, monkeypatch):
    model = gpu("llama", max_len=96)
    sampled(model)
    old = weakref.ref(slots.kept[model])

    def freed(*_):
        assert old() is None
        return mock.DEFAULT

    monkeypatch.setattr(slots, "Slots", watch := mock.Mock(wraps=slots.Slots, side_effect=freed))
    more = other if isinstance(other, dict) else {}
    if other == "model":
        model = copy.deepcopy(model)
    elif not more:
        setattr(model, other, dict(compute_dtype=BF16, n_ids=V - 2)[other])
    got = sampled(model, **more)
    assert watch.called and list(slots.kept) == [model]
    slots.kept.clear()
    same(got, sampled(model, **more), 1e-6)


def test_no_more_stays_than_a_share_of_the_memory(gpu, monkeypatch):
    """All tensors that the slots hold are counted, and 16 bytes of each logit for the graphs' own memory."""
    model = gpu("llama", BF16)
    sampled(model, slots=5)
    held = {}
    stayed = slots.kept[model]
    for x in [*vars(stayed).values(), stayed.cache.kv, *stayed.copies.values()]:
        if isinstance(x, torch.Tensor):
            held[x.data_ptr()] = x.nbytes
    stayed.model = model
    left_out = 13 * 9 + 5 * (3 * 8 + 2 * 16 + 1) + 9  # a few for each row and each slot; a flag, a stop id
    counted = stayed.nbytes()
    assert sum(held.values()) + 5 * 16 * V == counted + left_out
    total = torch.cuda.mem_get_info()[1]
    for spare, stays in ((0, True), (-1, False)):
        monkeypatch.setattr(slots, "STAY", (counted + spare) / total)
        sampled(model, slots=5)
        assert (model in slots.kept) == stays
    monkeypatch.undo()
    model.recompute = True  # --save_memory
    sampled(model)
    assert not slots.kept


def test_slots_go_with_their_model_and_after_an_error(gpu):
    model = gpu("gpt2")
    sampled(model)
    old = weakref.ref(slots.kept[model])
    del model
    gc.collect()
    assert old() is None and not slots.kept
    model = gpu("gpt2")
    model.wte.weight.data[5, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        sampled(model)
    assert not slots.kept
    model.wte.weight.data[5, 0] = 0.0
    same(sampled(model), sampled(copy.deepcopy(model)), 1e-6)


def test_nothing_stays_on_a_cpu():
    model = tiny()
    sampled(model, slots=4)
    assert not slots.kept


def test_errors():
    model = tiny()
    with pytest.raises(UserError, match="slots=-1"):
        generate(model, PROMPTS, slots=-1)
    model.wte.weight.data[5, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        generate(model, PROMPTS, max_new_tokens=4, slots=2)


def test_how_many(monkeypatch):
    """Half of what is free, per slot a row of cache and its logits; never none, never more than rows."""
    model, length = tiny("llama-gqa-untied"), 24
    each = model.new_cache(1, length).kv.nbytes + 16 * V
    for name, value in dict(mem_get_info=(each * 20, 0), memory_reserved=each, memory_allocated=each).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert slots.how_many(model, 99, length) == 10 and slots.how_many(model, 6, length) == 6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert slots.how_many(model, 99, length) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 0))
    assert slots.how_many(model, 999, length) == slots.SLOTS


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("style", ["gpt2", "llama-gqa-untied"])
def test_gpu_graphs_are_the_eager_step(style, dtype):
    """The same tokens replayed and launched one by one; and those of the reference on the CPU in fp32."""
    model = tiny(style, n_head=4, d_model=64, head_dim=16, max_len=96).to("cuda")
    model.compute_dtype = None if dtype == torch.float32 else dtype
    args = dict(n=16, max_new_tokens=64, eos_id=EOS, slots=12)
    graphs = generate(model, PROMPTS, **args)
    with mock.patch.object(slots.Slots, "run", slots.Slots.step):
        same(graphs, generate(model, PROMPTS, **args), 1e-12)
    want = model.logprobs(graphs.tokens, graphs.mask)[0]
    assert (graphs.logp - want).abs().max() < (1e-4 if dtype == torch.float32 else 5e-2)
