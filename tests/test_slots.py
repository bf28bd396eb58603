"""Slot refill: row by row the samples of the plain loop, whatever the slots; a step that a graph can hold."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import V, randint, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import lora
from nanorlhf.errors import RunError, UserError
from nanorlhf.generate import generate
from nanorlhf.kernels import slots
from nanorlhf.sampling import Sampling

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
        tokens, _, pos, _ = args
        (prefilled if pos is None else steps).append(tokens)

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


def hand_made(prompt_len, tokens, max_new, stop_ids=()):
    """A batch for `Slots` whose prompts are all distinct."""
    rows = list(range(len(tokens)))
    uniforms = torch.rand(len(tokens), max_new)
    return SimpleNamespace(tokens=tokens, prompt_len=prompt_len, uniforms=uniforms,
                           stop_ids=torch.tensor(stop_ids), first_rows=rows, distinct=rows)  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, 3, 0.8)])
@pytest.mark.parametrize("compute", [None, BF16])
def test_a_step_is_one_fixed_sequence(sampling, compute):
    """A graph can replay it: no value reaches the host, and whatever the state, the same operations on the
    same buffers. At (b, live) = (4, 16) and then (2, 16)."""
    model = tiny("llama-gqa-untied")
    model.compute_dtype = compute
    B, tokens = 6, randint(V, 6, 20)
    plen = torch.tensor([5, 2, 7, 5, 4, 6])
    with torch.no_grad():
        engine = slots.Slots(model, hand_made(plen, tokens, 8, [EOS]), sampling, 4)
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
        engine = slots.Slots(model, hand_made(torch.ones(3).long(), tokens, 2), Sampling(), 2)
        assert torch.equal(engine.forward(tokens), model(tokens))
        matrices = {f"blocks.{n}" for n, p in model.blocks.named_parameters() if p.dim() == 2}
        frozen = {n for n in matrices if rank and n.endswith("weight")}  # they have that dtype already
        assert matrices - frozen <= engine.cast.keys() and not frozen & engine.cast.keys()
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
