"""The model: what may depend on what, cache against full forward, and each part against an oracle."""

import copy
import math
from unittest import mock

import pytest
import torch
from helpers import STYLES, V, Watch, randint, tiny
from torch import nn

from nanorlhf import lora
from nanorlhf import model as model_module
from nanorlhf.data import pack, pad
from nanorlhf.errors import UserError
from nanorlhf.kernels import torch_backend
from nanorlhf.model import GPT, GPTConfig, Norm, ScalarModel, rope_table, rotate

F64 = torch.float64
styles = pytest.mark.parametrize("style", STYLES)


def block_mask(T, spans):
    """(B, T) bool with ones in [start, end) of each row."""
    return torch.stack([(torch.arange(T) >= a) & (torch.arange(T) < b) for a, b in spans])


# ------------------------------------------------------------------------------------------------------------
# hidden states


@styles
def test_causality(style):
    """Changing token t moves every hidden state from t on and none before."""
    model, tokens = tiny(style, dtype=F64), randint(V, 1, 9)
    base = model(tokens)
    for t in range(9):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % V
        moved = (model(other) - base)[0].abs().amax(-1)
        assert (moved[:t] < 1e-12).all() and (moved[t:] > 1e-4).all()


@styles
def test_padding_and_company_change_nothing(style):
    """Ragged rows padded on the right with any token, in a batch or each alone and unpadded: the same."""
    model, tokens = tiny(style, dtype=F64), randint(V, 4, 12)
    batch = model(tokens)
    for row, length in enumerate((12, 7, 1, 3)):
        tokens[row, length:] = 5 * row % V
        assert (model(tokens)[row, :length] - batch[row, :length]).abs().max() < 1e-12
        assert (model(tokens[row : row + 1, :length])[0] - batch[row, :length]).abs().max() < 1e-12


@styles
def test_order_of_tokens_matters(style):
    """Positions are seen: the same set of earlier tokens in another order gives another state."""
    model = tiny(style, dtype=F64)
    a, b = (model(torch.tensor([ids]))[0, -1] for ids in ([1, 2, 3, 4], [2, 1, 3, 4]))
    assert (a - b).abs().max() > 1e-3


@styles
def test_shapes_and_dtypes(style):
    """Hidden (B, T, D) in the compute dtype, logits (B, T, V) and log-probs in fp32, also from bf16."""
    model, tokens = tiny(style), randint(V, 2, 5)
    exact = model.logits(tokens)
    assert model(tokens).shape == (2, 5, 16) and exact.shape == (2, 5, V)
    mask = block_mask(5, [(2, 5), (1, 3)])
    for model.compute_dtype in (None, torch.bfloat16):
        dtype = model.compute_dtype or torch.float32
        assert model(tokens).dtype == dtype and model.logits(tokens).dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in model.logprobs(tokens, mask))
        assert model.new_cache(1, 4).kv[0][0].dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters())  # master weights
    hidden = model(tokens)  # bf16: the head must widen it, exactly
    want = hidden.double() @ model.unembedding.double().T
    assert (model.logits(tokens) - want).abs().max() < 1e-5
    assert 1e-4 < (model.logits(tokens) - exact).abs().max() < 0.3
    assert ScalarModel(model).values(tokens, mask).dtype == torch.float32


@styles
def test_no_dropout(style):
    """No dropout module, and training mode computes exactly what evaluation mode computes."""
    model, tokens = tiny(style), randint(V, 3, 9)
    assert not any("dropout" in type(m).__name__.lower() for m in model.modules())
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


@styles
def test_initialisation(style):
    """Matrices N(0, 1/√fan_in), what writes into the residual stream smaller by √(2·layers), biases 0."""
    make, own = STYLES[style]
    torch.manual_seed(0)
    model = GPT(make(**{**dict(vocab_size=512, n_layer=2, n_head=8, d_model=128, max_len=64), **own}))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        else:
            want = p.shape[1] ** -0.5 * (0.5 if name.endswith(("o.weight", "down.weight")) else 1)
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * want, name
    assert (model.lm_head is None) == (model.unembedding is model.wte.weight) == model.cfg.tied


# ------------------------------------------------------------------------------------------------------------
# parts against oracles


@pytest.mark.parametrize("dtype, tol", [(F64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind, dtype, tol):
    """Against float64 written out, for small and large inputs; in bf16 only the result is rounded, once."""
    norm = Norm(GPTConfig(V, d_model=16, norm=kind, norm_eps=1e-2))
    g = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(16, generator=g)
    if kind == "layer":
        norm.bias.data = torch.randn(16, generator=g)
    x = (torch.randn(5, 16, generator=g) * torch.tensor([1e-3, 0.1, 1, 100, 1e4])[:, None] + 0.5).to(dtype)
    y = x.double()
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / ((y * y).sum(-1, keepdim=True) / 16 + 1e-2).sqrt() * norm.weight.double()
    want = y + norm.bias.double() if kind == "layer" else y
    got = norm(x)
    assert got.dtype == dtype
    assert ((got - want).abs() <= tol * want.abs() + min(tol, 2e-6)).all()


def rope(x, theta=10000.0):
    """`rotate` at positions 0 … T-1 for x (T, hd) in float64."""
    return rotate(x[None, None], *rope_table(x.shape[1], len(x), theta, "cpu"))[0, 0]


@pytest.mark.parametrize("theta", [10000.0, 50.0])
def test_rope_is_a_complex_rotation(theta):
    """Pair (i, i + hd/2) as a complex number, times exp(i·position·theta^(-2i/hd)), in float64."""
    T, hd = 40, 8
    x = torch.randn(T, hd, dtype=F64, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(T, dtype=F64)[:, None] * theta ** (-torch.arange(hd // 2, dtype=F64) * 2 / hd)
    z = torch.complex(x[:, : hd // 2], x[:, hd // 2 :]) * torch.exp(1j * angle)
    assert (rope(x, theta) - torch.cat((z.real, z.imag), 1)).abs().max() < 1e-5  # the tables are fp32


def test_longer_contexts_turn_slower():
    """Llama 3.1's rule by wavelength, as its paper's code has it, channel by channel in float64."""
    dim, theta, (factor, low, high, original) = 32, 500.0, (8.0, 1.0, 4.0, 64)
    kinds = set()
    cos, sin = rope_table(dim, 100, theta, "cpu", (factor, low, high, original))
    for i in range(dim // 2):
        freq = theta ** (-2 * i / dim)
        length = 2 * math.pi / freq
        if length > original / low:
            freq, kind = freq / factor, "slow"
        elif length < original / high:
            kind = "as it was"
        else:
            smooth = (original / length - low) / (high - low)
            freq, kind = (1 - smooth) * freq / factor + smooth * freq, "between"
        kinds.add(kind)
        angle = torch.arange(100, dtype=F64) * freq
        assert (cos[:, i] - angle.cos()).abs().max() < 2e-5 and (sin[:, i] - angle.sin()).abs().max() < 2e-5
    assert len(kinds) == 3


def test_a_share_of_the_channels_rotates():
    """The first quarter as a head of that width would, the rest not at all."""
    x = torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(0))
    table = rope_table(4, 30, 10000.0, "cpu")
    got = rotate(x, *table)
    assert torch.equal(got[..., :4], rotate(x[..., :4], *table)) and torch.equal(got[..., 4:], x[..., 4:])
    assert GPTConfig(V, pos="rope", head_dim=16, rope_share=0.25).rope_dim == 4


def test_rope_depends_on_distance_alone():
    """<rotate(q, m), rotate(k, n)> is a function of m − n, and not a constant one; norms are kept."""
    q, k = torch.randn(2, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    score = rope(q.expand(30, 8)) @ rope(k.expand(30, 8)).T  # (m, n)
    for d in range(-29, 30):
        diagonal = score.diagonal(d)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    assert score[0].std() > 0.1
    assert (rope(q.expand(30, 8)).norm(dim=1) - q.norm()).abs().max() < 1e-6


@pytest.mark.parametrize("kv", [1, 2])
def test_grouped_queries_are_repeated_heads(kv):
    """Grouped-query attention equals full attention whose key/value heads are copies, cache included."""
    grouped = tiny("llama", dtype=F64, n_kv_head=kv)
    full = tiny("llama", dtype=F64)
    state = dict(grouped.state_dict())
    for name, w in state.items():
        if name.endswith(("attn.k.weight", "attn.v.weight")):
            state[name] = w.view(kv, 4, 16).repeat_interleave(4 // kv, 0).reshape(16, 16)
    full.load_state_dict(state)
    tokens = randint(V, 3, 9)
    assert (grouped(tokens) - full(tokens)).abs().max() < 1e-12
    last = []
    for model in (grouped, full):
        cache = model.new_cache(3, 9)
        model(tokens[:, :8], cache)
        last.append(model(tokens[:, 8:], cache, torch.full((3,), 8)))
    assert (last[0] - last[1]).abs().max() < 1e-12


def test_attention_against_loops():
    """One head and one query at a time: scale 1/√hd, softmax over the past, heads in order."""
    model = tiny("gpt2", dtype=F64)
    attention, x = model.blocks[0].attn, torch.randn(1, 5, 16, dtype=F64)
    q, k, v = (f(x)[0].view(5, 4, 4) for f in (attention.q, attention.k, attention.v))
    out = torch.zeros(5, 4, 4, dtype=F64)
    for t in range(5):
        for h in range(4):
            weights = [((q[t, h] @ k[s, h]) / 2).exp() for s in range(t + 1)]
            out[t, h] = sum(w * v[s, h] for s, w in enumerate(weights)) / sum(weights)
    want = attention.o(out.view(1, 5, 16))
    assert (attention(x, None, None, None, None) - want).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------
# KV cache


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (F64, 1e-12)])
@styles
def test_cache_is_the_full_forward(style, dtype, tol):
    """Ragged prefill shared out to more rows, then decoding at each row's own position; rows leave."""
    model, tokens = tiny(style, dtype=dtype), randint(V, 5, 14)
    full = model(tokens)
    start = torch.tensor([1, 6, 3, 2, 6])
    prompts = torch.where(torch.arange(6) < start[:, None], tokens[:, :6], V - 1)  # right padding
    prefilled, cache = model.new_cache(5, 6), model.new_cache(7, 14)
    hidden = model(prompts, prefilled)
    for row, n in enumerate(start.tolist()):
        assert (hidden[row, :n] - full[row, :n]).abs().max() < tol
    rows = torch.tensor([4, 1, 1, 0, 3, 2, 4])
    cache.fill(slice(None), prefilled, rows, 6)
    for t in range(8):
        if t in (2, 5):
            keep = torch.tensor([0, 2, 3, 5]) if t == 2 else torch.tensor([1, 2])
            rows, _ = rows[keep], cache.keep(keep, 6 + t)
        pos = start[rows] + t
        hidden = model(tokens[rows, pos][:, None], cache, pos)
        assert hidden.shape == (len(rows), 1, 16)
        assert (hidden[:, 0] - full[rows, pos]).abs().max() < tol


def test_cache_never_reads_beyond_a_row():
    """What stands in the cache right of a row's position (pads, older rows) cannot touch the row."""
    model, tokens = tiny("llama-gqa-untied", dtype=F64), randint(V, 2, 9)
    results = []
    for junk in (0.0, 1e3):
        cache = model.new_cache(2, 9)
        model(tokens[:, :3], cache)
        cache.kv[..., 3:, :] += junk
        results.append(model(tokens[:, 3:4], cache, torch.tensor([3, 3])))
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------------------
# log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@styles
def test_logprobs(style, temperature):
    """logp[b,t] = log softmax(logits[b,t-1] / T)[tokens[b,t]], its entropy beside it, 0 outside the mask."""
    model, tokens = tiny(style, dtype=F64), randint(V, 4, 8)
    mask = block_mask(8, [(1, 8), (3, 5), (7, 8), (4, 4)])
    logp, entropy = model.logprobs(tokens, mask, temperature)
    full = torch.log_softmax(model.logits(tokens) / temperature, -1)
    want, want_entropy = torch.zeros(4, 8, dtype=F64), torch.zeros(4, 8, dtype=F64)
    for b, t in mask.nonzero().tolist():
        want[b, t] = full[b, t - 1, tokens[b, t]]
        want_entropy[b, t] = -(full[b, t - 1].exp() * full[b, t - 1]).sum()
    assert (logp - want).abs().max() < 1e-12 and (entropy - want_entropy).abs().max() < 1e-12
    assert torch.equal(logp != 0, mask) and torch.equal(entropy != 0, mask)
    assert (logp - model.logprobs(tokens, mask.double(), temperature)[0]).abs().max() == 0  # float masks too
    with pytest.raises(ValueError, match=r"mask\[:, 0\]"):
        model.logprobs(tokens, block_mask(8, [(0, 2)] * 4))


def test_logprobs_gradient():
    """Through log-prob and entropy to every parameter, against plain log_softmax of whole logits."""
    tokens, mask = randint(V, 3, 7), block_mask(7, [(2, 7), (1, 4), (5, 6)])
    model = tiny("llama-gqa-untied", dtype=F64)
    logp, entropy = model.logprobs(tokens, mask, 0.8)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    full = torch.log_softmax(model.logits(tokens) / 0.8, -1)[:, :-1][mask[:, 1:]]
    (full.gather(1, tokens[mask][:, None]).sum() - 0.3 * (full.exp() * full).sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0 and (got[name] - p.grad).abs().max() < 1e-11, name


def test_logprobs_in_one_pass():
    """The loss is called with each chunk's log-probs, entropies and mask; gradients as in two passes."""
    tokens, mask = randint(V, 3, 7), block_mask(7, [(2, 7), (1, 4), (5, 6)])
    a, b = torch.rand(2, 3, 7, dtype=F64)

    def loss(logp, entropy, chunk):
        assert torch.equal(logp != 0, chunk) and torch.equal(entropy != 0, chunk)
        chunks.append(chunk)
        return (a * logp + b * entropy.exp() * chunk).sum(), {"tokens": chunk.sum()}

    model, results = tiny("gpt2-untied", dtype=F64), []
    for stored in (None, 1 << 20, 4 * V, V):  # two passes; all nine tokens at once, four, one
        chunks = []
        model.zero_grad()
        if stored is None:
            logp, entropy = model.logprobs(tokens, mask, 0.8)
            total = loss(logp, entropy, mask)[0]
        else:
            with mock.patch.object(torch_backend, "STORED", stored):
                total, stats, logp, entropy = model.logprobs(tokens, mask, 0.8, loss)
            assert stats["tokens"].tolist() == [int(chunk.sum()) for chunk in chunks]
            assert not logp.requires_grad and not entropy.requires_grad
        assert torch.equal(sum(chunk.int() for chunk in chunks), mask.int())  # each token once
        total.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append([total.detach(), logp.detach(), entropy.detach(), *grads])
    assert len(chunks) == 9 and stats["tokens"].tolist() == [1] * 9
    for other in results[1:]:
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_exact_kl_of_two_models(style, in_one_pass, monkeypatch):
    """Against log-softmax of all logits: value, gradient, and a loss beside it; T = 0.7, one row a chunk."""
    monkeypatch.setattr(torch_backend, "STORED", 1)
    model, other = tiny(style, dtype=F64), tiny(style, seed=1, dtype=F64)
    tokens, mask = randint(V, 3, 7), torch.arange(7).expand(3, 7) > torch.tensor([[1], [3], [2]])
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(0), dtype=F64) * mask

    def loss_of(logp, entropy, chunk):
        return (logp * chunk).sum(), {}

    if in_one_pass:
        total, _, logp, _, kl = model.logprobs(tokens, mask, 0.7, loss_of, kl_to=other)
    else:
        logp, _, kl = model.logprobs(tokens, mask, 0.7, kl_to=other)
        total = logp.sum()
    (total + (weight * kl).sum()).backward()
    got = [p.grad.clone() for p in model.parameters()]
    assert all(p.grad is None for p in other.parameters())

    model.zero_grad()
    p, q = ((m.logits(tokens[:, :-1]) / 0.7).log_softmax(-1) for m in (model, other))
    want = torch.nn.functional.pad((p.exp() * (p - q.detach())).sum(-1), (1, 0)) * mask
    at_token = torch.nn.functional.pad(p.gather(-1, tokens[:, 1:, None]).squeeze(-1), (1, 0)) * mask
    torch.testing.assert_close(kl.detach(), want.detach(), atol=1e-12, rtol=0)
    assert want.max() > 0.1 and kl[~mask].eq(0).all()
    (at_token.sum() + (weight * want).sum()).backward()
    for a, param in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, param.grad, atol=1e-11, rtol=0)


def test_exact_kl_is_0_between_equal_models():
    model, same = tiny(dtype=F64), tiny(dtype=F64)
    tokens, mask = randint(V, 2, 5), torch.arange(5).expand(2, 5) > 1
    *_, kl = model.logprobs(tokens, mask, kl_to=same)
    assert kl.abs().max() < 1e-14
    kl.sum().backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-14


def test_one_chunk_is_the_whole_mask():
    """Where all logits fit at once the loss sees the very tensors that are returned, in the same order."""
    model, tokens, mask = tiny(), randint(V, 3, 7), block_mask(7, [(2, 7), (1, 4), (5, 6)])
    seen = []

    def loss(logp, entropy, chunk):
        seen.append((logp.detach(), entropy.detach(), chunk))
        return logp.sum(), {}

    total, stats, *figures = model.logprobs(tokens, mask, loss=loss)
    assert stats == {} and len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip((*figures, mask), seen[0], strict=True))
    assert torch.equal(total, figures[0].sum())


def test_logprobs_of_nothing():
    """An all-zero mask is no error and has a zero gradient, not NaN."""
    model, tokens = tiny(), randint(V, 2, 5)
    logp, entropy = model.logprobs(tokens, torch.zeros(2, 5, dtype=torch.bool))
    assert not logp.any() and not entropy.any() and logp.shape == (2, 5)
    (logp.sum() + entropy.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def loss(logp, entropy, chunk):  # called for its stats alone
        return 1 + logp.sum(), {"tokens": chunk.sum()}

    total, stats, logp, entropy = model.logprobs(tokens, torch.zeros(2, 5), loss=loss)
    assert total == 0 and stats["tokens"].tolist() == [0] and logp.shape == entropy.shape == (2, 5)
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("lora_rank", [0, 2])
@styles
def test_packed_documents_are_strangers(style, lora_rank):
    """Log-probs, entropies and the gradient of packed rows are those of each document alone; other tokens in
    one document move nothing of the others, to the bit."""
    model = tiny(style, dtype=F64)
    lora.add(model, lora_rank)
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p) if name.endswith(".B") else 0
    docs = [randint(V, n, seed=n).tolist() for n in (9, 7, 5, 4, 2, 1)]
    tokens, lengths = pad(docs, 0)
    mask = (torch.arange(9) >= 1) & (torch.arange(9) < lengths[:, None])
    packed, counted, used, doc = pack(tokens, mask, lengths)
    assert used.tolist() == [9, 9, 9, 1] and doc[3].tolist() == [5] + [-1] * 8  # 9, 7+2, 5+4, 1
    trained = [p for p in model.parameters() if p.requires_grad]

    def score(found):
        """Each token with a weight of its own, by document → the sum's gradient."""
        loss = sum(((logp + 0.3 * entropy) * torch.arange(1, 1 + len(logp)) * (d + 1)).sum()
                   for d, (logp, entropy) in found.items())
        return torch.autograd.grad(loss, trained)

    alone = {d: [x[0] for x in model.logprobs(torch.tensor([ids]), torch.arange(len(ids))[None] > 0)]
             for d, ids in enumerate(docs) if len(ids) > 1}
    logp = model.logprobs(packed, counted, doc=doc)
    together = {d: [x[doc == d] for x in logp] for d in alone}
    for d in alone:
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(alone[d], together[d]))
    for a, b in zip(score(alone), score(together), strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() < 1e-10 * max(1, a.abs().max())
    for d in alone:
        other = torch.where(doc == d, (packed + 1) % V, packed)
        moved = (model.logprobs(other, counted, doc=doc)[0] - logp[0]).abs()
        assert moved[doc == d].max() > 1e-4 and moved[doc != d].max() == 0
    with pytest.raises(ValueError, match="where a document begins"):  # its last token would predict ours
        model.logprobs(packed, counted | (torch.arange(9) == 7), doc=doc)


def test_logits_are_never_stored_in_training():
    """The memory promise: forward and backward of `logprobs` build nothing of B×T×V, nor of masked×V."""
    B, T, vocab, chunk = 4, 16, 512, 8192
    model, tokens = tiny(vocab_size=vocab), randint(vocab, B, T)
    mask = block_mask(T, [(4, 16), (2, 16), (8, 9), (1, 15)])
    weight, whole = vocab * 16, int(mask.sum()) * vocab  # the gradient of the unembedding must be stored
    with mock.patch.object(torch_backend, "TILE", chunk), Watch() as watch:
        sum(x.sum() for x in model.logprobs(tokens, mask)).backward()
    assert watch.largest == max(chunk, weight) < whole / 2
    other = tiny(vocab_size=vocab, seed=1)
    with mock.patch.object(torch_backend, "TILE", chunk), Watch() as watch:
        sum(x.sum() for x in model.logprobs(tokens, mask, kl_to=other)).backward()
    assert watch.largest == max(chunk, weight) < whole / 2
    with Watch() as watch:  # the watch sees what is there to be seen
        model.logits(tokens)
    assert watch.largest == B * T * vocab


def test_masked_positions_never_enter_the_head():
    model, mask = tiny(), block_mask(9, [(4, 6), (1, 9)])
    with mock.patch.object(model_module, "linear_logprob", wraps=model_module.linear_logprob) as head:
        model.logprobs(randint(V, 2, 9), mask)
    assert head.call_args.args[0].shape == (mask.sum(), 16)


# ------------------------------------------------------------------------------------------------------------
# the scalar model


@styles
def test_rewards_read_the_last_token(style):
    """The score is the head at the row's last token: pads behind it are nothing, the token itself counts."""
    torch.manual_seed(0)
    model = ScalarModel(tiny(style)).double()
    model.reward_bias.fill_(0.7)
    tokens, lengths = randint(V, 3, 8), torch.tensor([8, 1, 4])
    got = model.rewards(tokens, lengths)
    for row, n in enumerate(lengths.tolist()):
        hidden = model.trunk(tokens[row : row + 1, :n])[0, n - 1]
        assert got[row].item() == pytest.approx((hidden @ model.score.weight[0]).item() + 0.7, abs=1e-12)
    last, pad = tokens.clone(), tokens.clone()
    last[torch.arange(3), lengths - 1] += 1
    pad[1, 1:], pad[2, 4:] = 0, 0
    assert (model.rewards(last % V, lengths) - got).abs().min() > 1e-4
    assert (model.rewards(pad, lengths) - got).abs().max() < 1e-12


@styles
def test_values_stand_before_the_token(style):
    """value[t] depends on token t-1 and earlier ones, never on token t; 0 outside the mask."""
    torch.manual_seed(0)
    model = ScalarModel(tiny(style)).double()
    model.reward_bias.fill_(0.7)
    tokens, mask = randint(V, 1, 8), block_mask(8, [(2, 7)])
    value = model.values(tokens, mask)
    assert torch.equal(value != 0, mask)
    for t in range(8):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % V
        moved = (model.values(other, mask) - value)[0].abs()
        assert moved[: t + 1].max() < 1e-12
        assert not mask[0, t + 1 :].any() or moved[t + 1 :][mask[0, t + 1 :]].min() > 1e-5
    # the estimate before token t is what a reward model says of the text so far
    assert value[0, 5].item() == pytest.approx(model.rewards(tokens, torch.tensor([5])).item(), abs=1e-12)


@pytest.mark.parametrize("d", [16, 64])
def test_head_starts_small(d):
    """Detail 11 of N+: the head's weights are N(0, 1/√(D+1)), its bias 0."""
    torch.manual_seed(0)
    trunk = GPT(GPTConfig(V, n_layer=1, d_model=d))
    w = torch.cat([ScalarModel(trunk).score.weight.flatten() for _ in range(20000 // d)])
    assert w.std().item() * math.sqrt(d + 1) == pytest.approx(1, abs=0.02)  # 1/√D would be 3% off at 16
    assert abs(w.mean().item()) * math.sqrt(d + 1) < 0.03
    assert ScalarModel(trunk).reward_bias == 0 and ScalarModel(trunk).score.bias is None


def test_head_is_not_bf16():
    """A reward is a sum of D terms in fp32 even when the trunk computes in bf16."""
    model = ScalarModel(tiny())
    model.trunk.compute_dtype = torch.bfloat16
    tokens = randint(V, 4, 6)
    want = model.trunk(tokens)[:, -1].double() @ model.score.weight[0].double()
    assert (model.rewards(tokens, torch.full((4,), 6)) - want).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------
# errors


@styles
def test_too_long_a_sequence(style):
    """Past max_len rotary positions would extrapolate in silence: an error with both numbers."""
    model = tiny(style)
    model(randint(V, 1, 24))
    with pytest.raises(UserError, match="25 tokens.*24"):
        model(randint(V, 1, 25))


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(n_head=4, n_kv_head=3), "n_kv_head=3 must divide n_head=4"),
        (dict(n_head=5), "n_head=5 must divide d_model=96"),
        (dict(n_head=32, pos="rope"), "even head_dim, got 3"),
        (dict(pos="rope", rope_share=0.3), "even head_dim, got 24 of which 7 rotate"),
    ],
)
def test_bad_configuration(bad, says):
    with pytest.raises(UserError, match=says):
        GPTConfig(V, **bad)


def test_defaults_of_the_configuration():
    """Widths left at 0 follow the published rules: 4·D for GELU, 8/3·D up to a multiple of 16 for SwiGLU."""
    gpt2, llama = GPTConfig.gpt2(V), GPTConfig.llama(V, d_model=64)
    assert (gpt2.d_ff, gpt2.head_dim, gpt2.n_kv_head) == (384, 24, 4)
    assert (llama.d_ff, llama.head_dim, llama.norm, llama.qkv_bias) == (176, 16, "rms", False)
    assert GPTConfig.llama(V, qkv_bias=True, n_kv_head=2).qkv_bias


def test_copies_are_independent():
    """A reference model is a deep copy: training the one must not move the other (tied weights stay tied)."""
    model = tiny()
    ref = copy.deepcopy(model)
    nn.init.zeros_(model.wte.weight)
    assert ref.wte.weight.abs().sum() > 0 and ref.unembedding is ref.wte.weight
