"""Sampling: against the cache-free oracle, exact enumeration, and slow references of each part."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import V, randint, tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanorlhf import generate as module
from nanorlhf.errors import UserError
from nanorlhf.generate import generate, reference, respond
from nanorlhf.sampling import Sampling, filter_logits, sample
from nanorlhf.tokenizer import Tokenizer

F64, INF = torch.float64, float("inf")
EOS = 3
PROMPTS = [[5], [1, 2, 4, 6, 7, 8], [9, EOS, 9], [1, 2, 4, 6, 7, 8], [EOS], [12, 11]]  # ragged, one twice
SETTINGS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.8),
    dict(temperature=0.0),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(temperature=1.4, top_k=6, top_p=0.8),
    dict(temperature=0.0, top_k=2),
]


def same(a, b, tol=1e-6):
    """Two rollouts with equal samples and log-probs equal to tol."""
    for name in ("tokens", "mask", "finished", "group", "prompt_len"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.logp - b.logp).abs().max() < tol


def rows_and_lengths(model, run):
    """run() → its result, and (rows, tokens a row) of every forward call of the model."""
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    result = run()
    hook.remove()
    return result, calls


# ------------------------------------------------------------------------------------------------------------
# against the oracle and against the model


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("style", ["gpt2", "llama-gqa-untied"])
def test_equals_the_reference(style, n, how):
    """Sample for sample the loop without cache, shared prefill or compaction (float64: no rounding flips)."""
    model, some_ended = tiny(style, dtype=F64), 0
    for seed in range(3):
        args = dict(n=n, max_new_tokens=12, eos_id=EOS, seed=seed, **how)
        got = generate(model, PROMPTS, **args)
        same(got, reference(model, PROMPTS, **args))
        some_ended += int(got.finished.sum())
        assert got.group.tolist() == [g for g in range(6) for _ in range(n)]
    assert some_ended < 3 * 6 * n and (some_ended or how.get("temperature") == 0.0)


@pytest.mark.parametrize("leave", [0.0, 0.5, 1.0], ids=lambda x: f"leave={x}")
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_compaction_changes_nothing(style, leave, monkeypatch):
    """Rows leaving the batch at once, late or never: the same samples."""
    model = tiny(style, dtype=F64)
    usual = generate(model, PROMPTS, n=4, max_new_tokens=12, eos_id=EOS)
    monkeypatch.setattr(module, "LEAVE", leave)
    same(generate(model, PROMPTS, n=4, max_new_tokens=12, eos_id=EOS), usual)


def test_company_changes_nothing():
    """The uniforms are a table filled row by row: fewer prompts are the first rows of the same table."""
    model = tiny("llama", dtype=F64)
    many = generate(model, PROMPTS, n=2, max_new_tokens=8, eos_id=EOS, seed=5)
    for k in (1, 3):
        few = generate(model, PROMPTS[:k], n=2, max_new_tokens=8, eos_id=EOS, seed=5)
        assert few.responses() == many.responses()[: 2 * k]
        assert torch.equal(few.response_len, many.response_len[: 2 * k])
    alone = generate(model, PROMPTS[:1], n=1, max_new_tokens=8, eos_id=EOS, seed=5)
    assert alone.responses() == many.responses()[:1]


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (F64, 1e-6)])
@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_logp_is_that_of_the_distribution_sampled_from(how, dtype, tol):
    """Full softmax: what `model.logprobs` says at the same temperature (0: at 1). Filtered: renormalised."""
    model = tiny("llama-gqa-untied", dtype=dtype)
    roll = generate(model, PROMPTS, n=4, max_new_tokens=12, eos_id=EOS, **how)
    assert roll.logp.dtype == torch.float32 and (roll.logp <= 0).all()
    temperature = how.get("temperature", 1.0) or 1.0
    if "top_k" not in how and "top_p" not in how:
        want = model.logprobs(roll.tokens, roll.mask, temperature)[0]
    else:
        logits = model.logits(roll.tokens)[:, :-1][roll.mask[:, 1:]] / temperature
        p = filter_logits(logits, how.get("top_k", 0), how.get("top_p", 1.0)).double().softmax(-1)
        want = torch.zeros(roll.mask.shape, dtype=F64)
        want[roll.mask] = p.gather(1, roll.tokens[roll.mask][:, None]).log().squeeze(1)
    assert (roll.logp - want).abs().max() < tol


def test_same_seed_same_samples():
    model = tiny()
    a, b, c = (generate(model, PROMPTS, n=4, eos_id=EOS, max_new_tokens=8, seed=s) for s in (7, 7, 8))
    same(a, b, 1e-12)
    assert a.tokens.shape != c.tokens.shape or not torch.equal(a.tokens, c.tokens)
    assert len({tuple(r) for r in a.responses()}) > 12  # the n samples of a prompt are different draws
    generate(model, [[1]], max_new_tokens=2, seed=2**64 + 1)  # any whole number is a seed


def test_sampling_leaves_the_global_generator_alone():
    """Sampling draws from its own seed, so it moves no other random number of a run; it keeps no graph."""
    model = tiny()
    before = torch.get_rng_state()
    assert not generate(model, PROMPTS, max_new_tokens=3, seed=1).logp.requires_grad
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------
# what a rollout holds


def test_ends_and_masks():
    """EOS inside the mask exactly when sampled, nothing after it, cut rows unfinished, prompts untouched."""
    roll = generate(tiny(), PROMPTS, n=32, max_new_tokens=6, eos_id=EOS)
    lengths = set()
    for row in range(len(roll.tokens)):
        prompt = PROMPTS[roll.group[row]]
        assert roll.tokens[row, : len(prompt)].tolist() == prompt and roll.prompt_len[row] == len(prompt)
        response = roll.tokens[row][roll.mask[row]].tolist()
        lengths.add(len(response))
        assert (EOS in response) == roll.finished[row] and EOS not in response[:-1]
        assert len(response) == 6 or roll.finished[row]
        assert (roll.tokens[row, len(prompt) + len(response) :] != EOS).all()
        assert (roll.logp[row][roll.mask[row]] < 0).all()
        assert roll.responses()[row] == (response[:-1] if roll.finished[row] else response)
    assert lengths == set(range(1, 7))  # from an immediate EOS to a cut
    assert roll.tokens.shape[1] == int(roll.lengths.max())


def test_any_of_the_stop_ids_ends_a_row():
    """A chat model has several; the one that was sampled belongs to the response, its text does not."""
    model, ends = tiny(dtype=F64), (EOS, 5, 7)
    model.stop_ids = ends[1:]
    args = dict(n=40, max_new_tokens=10, eos_id=EOS)
    roll = generate(model, PROMPTS, **args)
    same(roll, reference(model, PROMPTS, **args))
    last = roll.tokens[torch.arange(len(roll.tokens)), roll.lengths - 1]
    assert torch.equal(torch.isin(last, torch.tensor(ends)), roll.finished)
    assert {*last[roll.finished].tolist()} == {*ends} and not {*ends} & {*sum(roll.responses(), [])}
    whole = [row[mask].tolist() for row, mask in zip(roll.tokens, roll.mask)]
    assert roll.responses(with_eos=True) == whole
    assert not generate(model, PROMPTS, **args | dict(eos_id=None)).finished.any()  # nothing ends it


def test_eos_in_the_prompt_is_no_end():
    """A prompt that holds, or is, the EOS id is answered like any other."""
    roll = generate(tiny(), [[EOS], [4, EOS, 5], [EOS] * 3], n=8, max_new_tokens=5, eos_id=EOS)
    assert (roll.response_len >= 1).all() and roll.response_len.float().mean() > 2


@pytest.mark.parametrize("eos", [None, 0, V - 1])
def test_pad_is_never_eos(eos):
    """By default pads are some other id than EOS; a pad_id given is used; without EOS nothing finishes."""
    prompts = [[1], [1, 2, 3]]
    roll = generate(tiny(), prompts, n=16, max_new_tokens=4, eos_id=eos)
    place = torch.arange(roll.tokens.shape[1])
    pads = roll.tokens[place >= roll.lengths[:, None]]
    assert len(pads) and (pads == pads[0]).all() and pads[0] != eos
    other = generate(tiny(), prompts, n=16, max_new_tokens=4, eos_id=eos, pad_id=7)
    assert (other.tokens[place >= other.lengths[:, None]] == 7).all() and torch.equal(other.logp, roll.logp)
    if eos is None:
        assert not roll.finished.any() and (roll.response_len == 4).all()


def test_all_end_at_once():
    """Every row's first token is EOS: one token each, and the loop stops."""
    model = tiny("gpt2-untied")
    model.norm.weight.data.zero_()
    model.norm.bias.data.fill_(1)
    model.lm_head.weight.data.zero_()[EOS] = 10
    roll, calls = rows_and_lengths(model, lambda: generate(model, PROMPTS, n=2, max_new_tokens=9, eos_id=EOS))
    assert roll.finished.all() and (roll.response_len == 1).all() and roll.responses() == [[]] * 12
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------------
# how much is computed


@pytest.mark.parametrize("leave", [0.0, 1 / 8, 1.0], ids=lambda x: f"leave={x:.2f}")
def test_one_prefill_a_prompt_and_finished_rows_leave(leave, monkeypatch):
    """The first call has one row per distinct prompt; later ones one token of the rows that still live."""
    monkeypatch.setattr(module, "LEAVE", leave)
    model = tiny()
    roll, calls = rows_and_lengths(
        model, lambda: generate(model, PROMPTS, n=16, max_new_tokens=12, eos_id=EOS, seed=1)
    )
    assert calls[0] == (5, 6)  # five distinct prompts, the longest of six tokens
    assert len(calls) == int(roll.response_len.max())
    for t, (rows, tokens) in enumerate(calls[1:], 2):
        live = int((roll.response_len >= t).sum())  # those whose token number t is to be drawn
        assert tokens == 1 and live <= rows <= 96
        if leave == 0:
            assert rows == live
        elif leave < 1:
            assert live > rows * (1 - leave)
        else:
            assert rows == 96
    assert calls[-1][0] < 64 or leave == 1  # many ended: the test would see them stay


# ------------------------------------------------------------------------------------------------------------
# the drawing of one token


@pytest.mark.parametrize(
    "how", [h for h in SETTINGS if h.get("temperature") != 0.0] + [dict(top_k=1), dict(top_p=0.0)], ids=str
)
def test_sample_has_the_right_frequencies(how):
    """Over a fine even grid of u each token is drawn p·M times, give or take one; logp is log p."""
    M, g = 20000, torch.Generator().manual_seed(0)
    for logits in 2 * torch.randn(4, V, dtype=F64, generator=g):
        z = logits / how.get("temperature", 1.0)
        want = filter_logits(z[None], how.get("top_k", 0), how.get("top_p", 1.0)).softmax(-1)[0]
        u = (torch.arange(M, dtype=F64) + 0.5) / M
        token, logp = sample(logits.expand(M, V), u, Sampling(**how))
        assert (token.bincount(minlength=V) - M * want).abs().max() <= 1 + 1e-6
        assert (logp - want[token].log()).abs().max() < 1e-12
        assert (token.diff() >= 0).all()  # the inverse CDF rises


def test_sample_by_hand():
    """p = (1/2, 0, 1/4, 1/4): a token owns the half-open interval that starts where the one before ends."""
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0]).log()
    below = 1 - 2**-24  # torch.rand's largest fp32
    u = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, below])
    assert sample(logits.expand(6, 4), u, Sampling())[0].tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_impossible_tokens_are_never_drawn(dtype):
    """Whatever u, from 0 to the last float below 1, and wherever they stand: first, in between or last."""
    g = torch.Generator().manual_seed(0)
    for n in (3, 50, 3000):
        logits = torch.randn(40, n, generator=g, dtype=dtype)
        forbidden = torch.rand(40, n, generator=g) < 0.5
        forbidden[:, -n // 3 :], forbidden[::2, 0], forbidden[:, 1] = True, True, False
        for low in (-INF, -1e4):  # masked out, or so low that exp underflows
            z = logits.masked_fill(forbidden, low)
            for u in (0.0, 1e-9, 0.5, 1 - 2**-24, math.nextafter(1, 0)):
                token, logp = sample(z, torch.full((40,), u, dtype=dtype), Sampling())
                assert not forbidden.gather(1, token[:, None]).any() and logp.isfinite().all()


def test_extreme_logits_and_ties():
    """Logits of ±300, all equal, one possible token: no NaN, and the right log-probs."""
    z = torch.tensor([[300.0, -300, 299, 0], [5, 5, 5, 5], [-INF, -INF, 1, -INF]])
    token, logp = sample(z, torch.tensor([0.5, 0.6, 0.999]), Sampling())
    assert token.tolist() == [0, 2, 2]
    assert logp.tolist() == pytest.approx([-math.log(1 + math.exp(-1)), -math.log(4), 0], abs=1e-6)


def test_greedy():
    """Temperature 0: the largest logit whatever u (the first of equals), its log-prob at temperature 1."""
    z = torch.tensor([[1.0, 3, 2], [2, 2, 1], [0, -1, 0]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, 0.999]).repeat_interleave(3)
    token, logp = sample(z, u, Sampling(temperature=0))
    assert token.tolist() == [1, 0, 0] * 3
    assert (logp - z.log_softmax(-1).gather(1, token[:, None]).squeeze(1)).abs().max() < 1e-6
    cold, _ = sample(z[:1].expand(9, 3), torch.arange(9) / 9, Sampling(temperature=1e-4))
    assert cold.tolist() == [1] * 9


def kept_slowly(weights, top_k, top_p):
    """Ids that survive, in exact arithmetic: by rank with ties kept, then the smallest set that reaches p."""
    alive = [i for i, w in enumerate(weights) if w]
    if 0 < top_k < len(weights):
        least = sorted(weights, reverse=True)[top_k - 1]
        alive = [i for i in alive if weights[i] >= least]
    if top_p < 1:
        total, reached, nucleus = sum(weights[i] for i in alive), Fraction(0), []
        for i in sorted(alive, key=lambda i: -weights[i]):
            if nucleus and reached >= top_p:
                break
            assume(abs(float(reached) - top_p) > 1e-9)  # on the boundary rounding decides
            nucleus.append(i)
            reached += Fraction(weights[i], total)
        assume(abs(float(reached) - top_p) > 1e-9)
        alive = nucleus
    return set(alive)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.integers(1, 99), min_size=1, max_size=12, unique=True),
    zeros=st.integers(0, 2),
    top_k=st.integers(-1, 15),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    order=st.randoms(use_true_random=False),
)
def test_filter_against_exact_arithmetic(weights, zeros, top_k, top_p, order):
    """Survivors keep their logits, the others are −inf; top_k first, then top_p on what is left."""
    weights = weights + [0] * zeros
    order.shuffle(weights)
    logits = torch.tensor([weights], dtype=F64).log()
    got = filter_logits(logits.clone(), top_k, top_p)[0]
    kept = (got > -INF).nonzero().flatten().tolist()
    assert set(kept) == kept_slowly(weights, top_k, top_p)
    assert torch.equal(got[kept], logits[0, kept])


def test_filter_by_hand():
    """Ties at the k-th place all stay; of equals at the edge of the nucleus just enough; rows are apart."""
    z = torch.tensor([[4.0, 1, 4, 2], [1, 1, 1, 1]]).log()
    assert (filter_logits(z, top_k=1) > -INF).tolist() == [[True, False, True, False], [True] * 4]
    assert (filter_logits(z, top_k=3) > -INF).tolist() == [[True, False, True, True], [True] * 4]
    assert (filter_logits(z, top_p=0.6) > -INF).sum(1).tolist() == [2, 3]
    assert (filter_logits(z, top_p=0.3) > -INF).sum(1).tolist() == [1, 2]
    assert (filter_logits(z, top_p=0.0) > -INF).sum(1).tolist() == [1, 1]
    half = torch.tensor([[0.0, 0, -INF]])  # exactly ½ each: one alone reaches ½
    assert (filter_logits(half, top_p=0.5) > -INF).tolist() == [[True, False, False]]
    for off in (dict(), dict(top_k=0), dict(top_k=4), dict(top_k=99), dict(top_p=1.0)):
        assert torch.equal(filter_logits(z, **off), z)


# ------------------------------------------------------------------------------------------------------------
# exact enumeration of whole sequences


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.5), dict(top_k=2), dict(top_p=0.75)], ids=str)
@pytest.mark.parametrize("eos", [None, 1])
def test_sequence_frequencies_by_enumeration(eos, how):
    """All sequences of three steps over three tokens: frequencies against exact probabilities, chi-square.

    χ² of k sequences has mean k−1 and variance 2(k−1): 5 standard deviations above is a 1-in-10⁵ draw, and
    the seed is fixed.
    """
    model, prompt, steps = tiny(vocab_size=3, dtype=F64), [0, 2], 3
    exact = {}
    for seq in itertools.product(range(3), repeat=steps):
        seq = list(seq[: seq.index(eos) + 1] if eos in seq else seq)
        logits = model.logits(torch.tensor([prompt + seq]))[0, 1:-1] / how.get("temperature", 1.0)
        p = filter_logits(logits, how.get("top_k", 0), how.get("top_p", 1.0)).softmax(-1)
        exact[tuple(seq)] = p.gather(1, torch.tensor(seq)[:, None]).prod().item()
    assert sum(exact.values()) == pytest.approx(1, abs=1e-12)
    possible = {seq: p for seq, p in exact.items() if p > 0}
    N = 6000
    roll = generate(model, [prompt] * 3, n=N // 3, max_new_tokens=steps, eos_id=eos, seed=11, **how)
    counts = dict.fromkeys(exact, 0)
    for row, mask in zip(roll.tokens, roll.mask):
        counts[tuple(row[mask].tolist())] += 1
    assert all(counts[seq] == 0 for seq in exact.keys() - possible.keys())
    chi2 = sum((counts[seq] - N * p) ** 2 / (N * p) for seq, p in possible.items())
    df = len(possible) - 1
    assert df >= 2 and chi2 < df + 5 * math.sqrt(2 * df)
    wrong = sum((counts[seq] - N / len(possible)) ** 2 / (N / len(possible)) for seq in possible)
    assert wrong > df + 50 * math.sqrt(2 * df)  # the bound is one that can fail: not uniform


# ------------------------------------------------------------------------------------------------------------
# errors, text


@pytest.mark.parametrize("fn", [generate, reference])
@pytest.mark.parametrize(
    "prompts, how, says",
    [
        ([], {}, "nothing to generate: 0 prompts"),
        ([[1]], dict(temperature=-1.0), "temperature=-1.0"),
        ([[1]], dict(n=0), "n=0"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[1], [2], []], {}, "prompt 2 is empty"),
        ([[1], [2] * 20], dict(max_new_tokens=5), "20 tokens and 5 new ones.*context of 24"),
    ],
)
def test_errors(fn, prompts, how, says):
    with pytest.raises(UserError, match=says):
        fn(tiny(), prompts, **{"max_new_tokens": 4, **how})


def test_the_whole_context_can_be_used():
    """A prompt and its response may fill max_len exactly."""
    roll = generate(tiny("llama"), [[1] * 20], max_new_tokens=4)
    assert roll.tokens.shape == (1, 24) and roll.mask.sum() == 4


@pytest.mark.parametrize("batch", [4, 512])
def test_respond(batch):
    """Text in, text out: prompts in order, n answers each, EOS left out, whatever the batches."""
    tok = Tokenizer.from_chars("abcdefghijk")
    prompts = ["a", "bcd", "kk", "a", "ef"]
    rolls, texts = respond(tiny(), tok, prompts, n=2, max_new_tokens=5, seed=3, batch=batch)
    assert len(rolls) == (3 if batch == 4 else 1) and len(texts) == 10
    rows = [row for roll in rolls for row in roll.responses()]
    assert texts == [tok.decode(row) for row in rows] and not any("eos" in text for text in texts)
    for roll, first in zip(rolls, range(0, 5, 2 if batch == 4 else 5)):
        for row, g, n in zip(roll.tokens.tolist(), roll.group.tolist(), roll.prompt_len.tolist()):
            assert tok.decode(row[:n]) == prompts[first + g]
    again = respond(tiny(), tok, ["a"] * 8, n=2, max_new_tokens=5, seed=3, batch=4)[1]
    assert again[:4] != again[4:8]  # each batch draws from a table of its own


def test_seeds_reach_the_table():
    """Another uniform at (row, position) of the table moves that token and what follows in its row only."""
    model, B, M = tiny(dtype=F64), 6, 5
    table = torch.rand(B, M, generator=torch.Generator().manual_seed(0))
    tokens = randint(V, B, 2).tolist()

    def run(u):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.torch, "rand", lambda *shape, generator: u)
            return generate(model, tokens, max_new_tokens=M).tokens

    base = run(table)
    for r, t in ((0, 0), (3, 2), (5, 4)):
        other = table.clone()
        other[r, t] = (other[r, t] + 0.5) % 1
        moved = run(other) != base
        assert moved[r, 2 + t] and not moved[:, : 2 + t].any() and not moved[torch.arange(B) != r].any()
