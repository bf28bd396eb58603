"""bf16: each weight is cast once, the residual stream stays fp32, and the head may use a CPU's bf16 units."""

import contextlib
import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_grpo
import train_sft
from nanorlhf import lora
from nanorlhf.generate import generate
from nanorlhf.kernels import bf16, decode_attention, linear_logprob
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.run import defaults, dist

BF16 = torch.bfloat16
V, D = 64, 32
PROMPTS = [[1, 2, 3], [4, 5]]
TOKENS = torch.randint(V, (6, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
MASK[:, 0] = False


def model_of(style="llama", tied=True, dtype=BF16, **size):
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=D, max_len=64) | size
    model = GPT(getattr(GPTConfig, style)(V, tied=tied, **size))
    model.compute_dtype = dtype
    return model


class Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch imports its compiler, which takes 10 s


class Casts(Mode):
    """Counts how often each of a model's fp32 weights is copied to bf16."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.found = Counter()
        self.of_head = 0  # copies of V × D numbers, to whatever dtype: a CPU needs none

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, out.dtype) == (torch.float32, BF16):
            if name := self.names.get(args[0].data_ptr()):
                self.found[name] += 1
        if func is torch.ops.aten._to_copy.default:
            self.of_head += args[0].shape == (V, D)
        return out


def linear_weights(model):
    """Those that are cast on a CPU: not the unembedding."""
    return {name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new", [2, 20])
def test_a_decode_loop_casts_each_weight_once(new, tied):
    model = model_of(tied=tied)
    with Casts(model) as casts:
        generate(model, PROMPTS, n=3, max_new_tokens=new)
    assert casts.found == dict.fromkeys(linear_weights(model), 1)
    assert casts.of_head == 0


def test_adapters_are_cast_once_too():
    model = model_of()
    lora.add(model, 2, "bfloat16")
    with Casts(model) as casts:
        generate(model, PROMPTS, max_new_tokens=5)
    trained = {name for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
    assert trained and casts.found == dict.fromkeys(trained, 1)


def gradients(model, cut):
    """Gradients of a sum of log-probs over these micro-batches."""
    model.zero_grad()
    for rows in cut:
        logp, _ = model.logprobs(TOKENS[rows], MASK[rows])
        logp.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_micro_batches_share_one_cast_and_have_the_same_gradient(style):
    """The oracle casts in every forward pass."""
    model = model_of(style)
    cut = [torch.tensor(rows) for rows in ([0, 1], [2, 3], [4, 5])]
    with Casts(model) as each_time:
        want = gradients(model, cut)
    with Casts(model) as casts:
        got = gradients(model, dist.paced(cut, model.logprobs))
    weights = linear_weights(model)
    assert {each_time.found[name] for name in weights} == {3}
    assert {casts.found[name] for name in weights} == {1}
    assert all(x.dtype == torch.float32 and torch.equal(x, want[name]) for name, x in got.items())


def test_the_next_step_sees_the_new_weights():
    model = model_of()
    for _ in range(2):
        gradients(model, dist.paced([torch.arange(6)], model.logprobs))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        fresh = model_of()
        fresh.load_state_dict(model.state_dict())
        got = generate(model, PROMPTS, max_new_tokens=4)
        want = generate(fresh, PROMPTS, max_new_tokens=4)
        assert torch.equal(got.logp, want.logp)


def test_outside_the_model_is_what_it_was():
    """Also after an error. A value head stays in fp32."""
    model = ScalarModel(model_of())
    before = dict(model.named_parameters())
    with pytest.raises(KeyError), bf16.cast_once(model):
        layer = model.trunk.blocks[0].mlp.up
        assert layer.weight.dtype == BF16 and model.score.weight.dtype == torch.float32
        assert model.state_dict()["trunk.blocks.0.mlp.up.weight"].dtype == torch.float32
        raise KeyError
    assert layer.weight is before["trunk.blocks.0.mlp.up.weight"] and model.trunk.lm_head is None


@pytest.mark.parametrize("case", ["fp32", "bf16_weights", "save_memory"])
def test_where_a_cast_would_cost_memory_there_is_none(case):
    model = model_of(dtype=None if case == "fp32" else BF16)
    if case == "bf16_weights":
        model.bfloat16()
        model.compute_dtype = torch.float32
    model.recompute = case == "save_memory"
    layer = model.blocks[0].attn.o
    with bf16.cast_once(model):
        assert layer.weight is layer._parameters["weight"] and model.lm_head is None


# ------------------------------------------------------------------------------------------------------------
# precision


def test_a_large_mean_does_not_drown_what_the_blocks_add():
    """Near 1,000, where SmolLM2's residual stream has channels, bf16 numbers are 8 apart.

    The oracle is the model in float64. Embeddings are multiples of 8, so that only sums can lose anything.
    """
    model = model_of("gpt2", tied=False, n_layer=4)
    with torch.no_grad():
        model.wte.weight.copy_(1024 + 8 * torch.randint(3, (V, D)))
        model.wpe.weight.zero_()
        for block in model.blocks:
            block.attn.o.weight *= 8
            block.mlp.down.weight *= 8
        want = copy.deepcopy(model).double()
        want.compute_dtype = None
        want = want.logprobs(TOKENS, MASK)[0]
        got = model.logprobs(TOKENS, MASK)[0]
    assert (got - want).abs().max() < 0.1


class Units(Mode):
    """An AMX that this machine need not have: with "medium" precision the operands of matmuls are rounded."""

    used = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = {torch.ops.aten.mm.default: 0, torch.ops.aten.mm.out: 0, torch.ops.aten.addmm_.default: 1}
        if func in names and torch.get_float32_matmul_precision() == "medium":
            self.used += 1
            i = names[func]
            rounded = [x.to(BF16).to(x.dtype) for x in args[i : i + 2]]
            args = (*args[:i], *rounded, *args[i + 2 :])
        return func(*args, **kwargs or {})


def head_inputs(dtype):
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(40, D, generator=g).to(dtype)
    weight = torch.randn(300, D, generator=g).to(dtype)
    return hidden, weight, torch.randint(300, (40,), generator=g)


def head(hidden, weight, targets):
    """→ log-probs and the gradients of their sum, in one pass and in two."""
    out = []
    for one_pass in (False, True):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        if one_pass:
            total, _, logp, _ = linear_logprob(*leaves, targets, loss=lambda logp, *_: (logp.sum(), {}))
        else:
            logp, _ = linear_logprob(*leaves, targets)
            total = logp.sum()
        total.backward()
        out.append((logp.detach(), *(x.grad for x in leaves)))
    return out


def test_the_head_loses_nothing_in_the_units_but_in_its_gradient():
    """bf16 operands lose nothing; a gradient is rounded to 8 bits before it is multiplied."""
    hidden, weight, targets = head_inputs(BF16)
    want = head(hidden.double(), weight.double(), targets)
    with Units() as units:
        got = head(hidden, weight, targets)
    assert units.used
    for (logp, *grads), (want_logp, *want_grads) in zip(got, want):
        assert (logp - want_logp).abs().max() < 2e-5
        for x, y in zip(grads, want_grads):
            assert x.dtype == BF16 and (x - y).norm() < 5e-3 * y.norm()
    assert torch.get_float32_matmul_precision() == "highest"


def test_amx_rounds_an_unembedding_in_fp32_and_not_its_gradient():
    """The oracle is float64 on the rounded weight."""
    hidden, _, targets = head_inputs(BF16)
    weight = torch.randn(300, D, generator=torch.Generator().manual_seed(3))
    rounded = weight.to(BF16)
    want = head(hidden.double(), rounded.double(), targets)
    with Units():
        got = head(hidden, weight, targets)
    for (logp, _, grad), (want_logp, _, want_grad) in zip(got, want):
        assert (logp - want_logp).abs().max() < 2e-5
        assert grad.dtype == torch.float32 and (grad - want_grad).norm() < 5e-3 * want_grad.norm()
        assert (grad != grad.to(BF16)).any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_cpu_reads_the_unembedding_itself(tied):
    model = model_of(tied=tied)
    with bf16.cast_once(model):
        head = model.wte if tied else model.lm_head
        assert model.unembedding is head.weight and model.lm_head is (None if tied else head)


def test_attention_of_a_cpu_loses_nothing_but_its_last_rounding():
    """In training, prefill and decode: fp32, of queries, keys and values in bf16. The oracle is float64."""
    g = torch.Generator().manual_seed(0)
    layer = model_of(d_model=48, n_head=6, qk_norm=True).blocks[0].attn
    for projection in (layer.q, layer.k, layer.v):
        projection.weight.data.mul_(3)
    x = torch.randn(2, 40, 48, generator=g).to(BF16)
    attended = []
    layer.o.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    layer(x, None, None, None, None)
    q = layer.q_norm(layer.split_heads(layer.q(x)))
    k = layer.k_norm(layer.split_heads(layer.k(x)))
    v = layer.split_heads(layer.v(x))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    want = want.to(BF16)
    assert torch.equal(attended[0], want.transpose(1, 2).flatten(2))
    pos = torch.tensor([39, 39])
    got = decode_attention(q[:, :, -1], k[:, :, -1], v[:, :, -1], k.clone(), v.clone(), pos, 40)
    assert got.dtype == BF16 and torch.equal(got, want[:, :, -1])


def test_fp32_never_uses_the_units():
    inputs = head_inputs(torch.float32)
    with Units() as units:
        got = head(*inputs)
        generate(model_of(dtype=None), PROMPTS, max_new_tokens=3)
    assert not units.used
    want = head(*inputs)
    assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x, y))


def test_sampling_uses_them_for_its_head():
    model = model_of()
    with Units() as units:
        generate(model, PROMPTS, max_new_tokens=3)
    assert units.used


# ------------------------------------------------------------------------------------------------------------
# --dtype auto


def test_auto_is_bf16_for_a_large_model_where_the_device_has_units(monkeypatch):
    def picked(dtype, is_real, units):
        monkeypatch.setattr(bf16, "has_units", lambda device: units)
        cfg = SimpleNamespace(dtype=dtype, is_real=is_real, device="auto")
        notes = defaults.pick_dtype(cfg)
        return cfg.dtype, len(notes)

    assert picked("auto", True, True) == ("bfloat16", 1)
    assert picked("auto", True, False) == ("float32", 0)
    assert picked("auto", False, True) == ("float32", 0)
    assert picked("bfloat16", False, False) == ("bfloat16", 1), "slow here, and said"
    assert picked("bf16_weights", True, True) == ("bf16_weights", 0)


def test_trainers_settle_it_before_they_read_it():
    for trainer in (train_sft, train_grpo):
        assert trainer.Config().dtype == "float32"


@pytest.mark.parametrize("flags, has", [
    (set(), False), ({"amx_tile"}, True), ({"avx512_bf16"}, True),
])  # fmt: skip
def test_a_cpu_has_units_with_amx_or_avx512_bf16(flags, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in flags)
    assert bf16.has_units("cpu") == bf16.has_units("auto") == has
    assert not bf16.has_units("mps")


def test_precision_is_restored_after_an_error():
    with contextlib.suppress(KeyError), bf16.in_units(torch.zeros(1, dtype=BF16)):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
