"""DPO and its family: losses against golden values and other formulas, the step, the pairs, the rounds."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stages import jsonl, tastes
from test_runs import same_run, state

import train_dpo
from nanorlhf import generate, hub, pairs, tasks
from nanorlhf.errors import UserError
from nanorlhf.hub.files import read_jsonl
from nanorlhf.hub.formats import TURN, read_rows
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run.checkpoint import Run
from nanorlhf.tokenizer import Tokenizer
from train_dpo import kto_loss, preference_loss

pytestmark = pytest.mark.usefixtures("no_curves")
LOSSES = ("dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "dpo_nll")


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


# losses: golden values

W, L, REF_W, REF_L = f64(-10, -12), f64(-11, -11.5), f64(-10.5, -11.5), f64(-10.8, -11.2)
LENGTHS = dict(len_w=f64(5, 4), len_l=f64(4, 6))
GOLDEN = [  # published codes run on these four vectors; Δ = 0.7, −0.2
    (dict(beta=0.1), (0.658760, 0.703197)),
    (dict(beta=0.5), (0.533382, 0.744397)),
    (dict(beta=0.1, loss="cdpo", label_smoothing=0.1), (0.665760, 0.701197)),
    (dict(beta=0.1, label_smoothing=0.1), (0.665760, 0.701197)),  # dpo with smoothing is cdpo
    (dict(beta=0.1, loss="robust", label_smoothing=0.1), (0.650010, 0.705697)),
    (dict(beta=0.1, loss="ipo"), (18.49, 27.04)),
    (dict(beta=0.1, loss="ipo", ipo_mean=True), (23.522503, 25.755623)),
    (dict(beta=0.1, loss="hinge"), (0.93, 1.02)),
    (dict(beta=2.0, loss="simpo", simpo_ratio=0.5), (0.474077, 3.207947)),
    (dict(beta=0.1, loss="orpo", orpo_lam=0.1), (2.036209, 3.145666)),
    (dict(beta=0.1, loss="dpo_nll"), (0.658760 + 2, 0.703197 + 3)),  # 10/5 and 12/4 nats per token
    (dict(beta=0.1, loss="dpo_nll", dpo_nll_coef=0.25), (0.658760 + 0.5, 0.703197 + 0.75)),
]


@pytest.mark.parametrize("kw, want", GOLDEN, ids=lambda x: x.get("loss", "dpo") if type(x) is dict else "")
def test_golden_values_and_their_gradients(kw, want):
    """To the digits printed, and the gradient in every log-prob is that of central differences."""

    def values(x):
        w, l = x
        return preference_loss(w, l, REF_W, REF_L, **kw, **LENGTHS)[0]

    x = torch.stack([W, L]).requires_grad_()
    losses = values(x)
    assert losses.tolist() == pytest.approx(want, abs=5e-7, rel=2e-7)  # those of ipo_mean are from fp32
    losses.sum().backward()
    for i in range(2):
        for j in range(2):
            step = torch.zeros_like(x)
            step[i, j] = 1e-5
            slope = (values(x + step) - values(x - step)).sum().item() / 2e-5
            assert x.grad[i, j].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_golden_rewards_and_without_a_reference():
    losses, chosen, rejected = preference_loss(W.clone().requires_grad_(), L, REF_W, REF_L, 0.1)
    assert chosen.tolist() == pytest.approx([0.05, -0.05])
    assert rejected.tolist() == pytest.approx([-0.02, -0.03])
    assert losses.requires_grad and not (chosen.requires_grad or rejected.requires_grad)
    zero = torch.zeros_like(L)
    assert preference_loss(W, L, zero, zero, 0.1)[0].tolist() == pytest.approx([0.644397, 0.718460], abs=5e-7)
    for loss in ("simpo", "orpo"):  # the reward is β log π per token
        _, chosen, rejected = preference_loss(W, L, None, None, 2.0, loss, **LENGTHS)
        assert chosen.tolist() == [-4.0, -6.0] and rejected.tolist() == pytest.approx([-5.5, -23 / 6])


def test_golden_kto():
    """Both labels; the gradient is ∓β σ(1−σ), and z0 gets none."""
    z0 = f64(0.2).squeeze().requires_grad_()
    for logp, ref, label, want in (
        (W, REF_W, True, (0.492501, 0.517493)),
        (L, REF_L, False, (0.490001, 0.487503)),
    ):
        logp = logp.detach().clone().requires_grad_()
        losses = kto_loss(logp, ref, torch.tensor([label] * 2), z0.detach(), 0.1)
        assert losses.tolist() == pytest.approx(want, abs=5e-7)
        losses.sum().backward()
        p = np.array(want)
        assert logp.grad.tolist() == pytest.approx((-1 if label else 1) * 0.1 * p * (1 - p), abs=1e-6)


@pytest.mark.parametrize("loss, beta, value, slope", [
    ("dpo", 0.1, math.log(2), -0.05), ("cdpo", 0.1, math.log(2), -0.04),
    ("robust", 0.1, math.log(2), -0.0625), ("hinge", 0.1, 1.0, -0.1), ("ipo", 0.1, 25.0, -10.0),
    ("ipo", 0.5, 1.0, -2.0),
])
def test_at_the_start_where_policy_is_reference(loss, beta, value, slope):
    """Whatever the log-probs: log 2, 1, 1/(4β²), and the derivative in logp_w that belongs to it."""
    w, l = f64(-3, -40).requires_grad_(), f64(-7, -1).requires_grad_()
    smooth = 0.1 if loss in ("cdpo", "robust") else 0.0
    losses, chosen, rejected = preference_loss(w, l, w.detach(), l.detach(), beta, loss, smooth)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([value] * 2) and chosen.tolist() == rejected.tolist() == [0, 0]
    assert w.grad.tolist() == pytest.approx([slope] * 2) and l.grad.tolist() == pytest.approx([-slope] * 2)


# losses: other formulas


def by_probabilities(loss, w, l, rw, rl, nw, nl, beta, eps, ratio, lam, alpha, mean):
    """The family in numpy, through the probability p that the policy itself gives to the preference."""
    pow_w, pow_l = np.exp(beta * (w - rw)), np.exp(beta * (l - rl))
    p = pow_w / (pow_w + pow_l)  # Bradley–Terry of the implicit rewards
    if loss in ("dpo", "cdpo"):
        return -np.log(p ** (1 - eps) * (1 - p) ** eps)
    if loss == "robust":
        return -np.log(p ** ((1 - eps) / (1 - 2 * eps)) / (1 - p) ** (eps / (1 - 2 * eps)))
    if loss == "dpo_nll":
        return -np.log(p * np.exp(w / nw) ** alpha)
    if loss == "hinge":
        return np.maximum(0, 1 - np.log(p / (1 - p)))
    if loss == "ipo":
        gap = ((w - rw) / nw - (l - rl) / nl) if mean else np.log(p / (1 - p)) / beta
        return gap**2 - gap / beta + 1 / (4 * beta**2)
    a, b = np.exp(w / nw), np.exp(l / nl)  # geometric means of the tokens' probabilities
    if loss == "simpo":
        return np.log(1 + (b / a) ** beta * np.exp(beta * ratio))
    return -np.log(a) + lam * np.log1p(b * (1 - a) / (a * (1 - b)))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_against_another_formula(loss, mean):
    """Random pairs and random hyper-parameters, float64."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        w, l, rw, rl = rng.uniform(-12, -0.5, (4, 7))
        nw, nl = rng.integers(1, 9, (2, 7)).astype(float)
        beta, eps, ratio, lam, alpha = rng.uniform(0.05, 0.45, 5)
        eps *= loss in ("cdpo", "robust")
        want = by_probabilities(loss, w, l, rw, rl, nw, nl, beta, eps, ratio, lam, alpha, mean)
        args = [torch.from_numpy(x) for x in (w, l, rw, rl, nw, nl)]
        got = preference_loss(*args[:4], beta, loss, eps, *args[4:], mean, ratio, lam, alpha)[0]
        assert got.numpy() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_kto_against_another_formula():
    """1 − the probability of the wanted label; through odds instead of σ."""
    rng = np.random.default_rng(1)
    logp, ref, label = *rng.uniform(-9, -1, (2, 40)), rng.random(40) < 0.5
    odds = np.exp(0.3 * (logp - ref)) / np.exp(0.3 * 0.7)
    want = np.where(label, 1 / (1 + odds), odds / (1 + odds))
    got = kto_loss(*map(torch.from_numpy, (logp, ref, label)), 0.7, 0.3)
    assert got.numpy() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "simpo", "orpo", "hinge", "dpo_nll"])
def test_finite_at_extreme_margins_in_fp32(loss):
    """Margins of ±1000 nats and answers of probability 1 and 0: finite values and gradients."""
    w = torch.tensor([-1e-6, -1000.0, -1e-6, -1000.0], requires_grad=True)
    l = torch.tensor([-1000.0, -1e-6, -1e-6, -1000.0], requires_grad=True)
    one, smooth = torch.ones(4), 0.1 if loss in ("cdpo", "robust") else 0.0
    losses, *_ = preference_loss(w, l, -one, -one, 2.0, loss, smooth, one, one)
    losses.sum().backward()
    assert all(x.isfinite().all() for x in (losses, w.grad, l.grad))


@pytest.mark.parametrize("loss, eps", [("kto", 0.0), ("nonsense", 0.0), ("ipo", 0.1), ("hinge", 0.1)])
def test_what_makes_no_sense_is_refused(loss, eps):
    with pytest.raises(ValueError):
        preference_loss(W, L, REF_W, REF_L, 0.1, loss, eps, **LENGTHS)


# losses: their optimum


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_minimum_of_dpo_is_the_tilted_distribution(beta):
    """Six responses, preferences by Bradley–Terry on r in all their pairs: π* ∝ π_ref exp(r/β), to 1e-5."""
    gen = torch.Generator().manual_seed(0)
    r, ref = (torch.randn(6, generator=gen, dtype=torch.float64) for _ in "rp")
    ref, theta = ref.log_softmax(0), ref.clone().requires_grad_()
    i, j = (~torch.eye(6, dtype=torch.bool)).nonzero(as_tuple=True)
    weight = (1 / (1 + (r[j] - r[i]).exp())) / len(i)  # P(i ≻ j)
    opt = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-13, tolerance_change=0,
                            line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        logp = theta.log_softmax(0)
        loss = (weight * preference_loss(logp[i], logp[j], ref[i], ref[j], beta)[0]).sum()
        loss.backward()
        return loss

    opt.step(closure)
    tilted = ref.exp() * (r / beta).exp()
    assert torch.allclose(theta.softmax(0), tilted / tilted.sum(), atol=1e-5)
    assert (tilted / tilted.sum() - ref.exp()).abs().max() > 0.1  # and that is elsewhere


def test_ipo_has_its_optimum_at_a_finite_margin_and_dpo_has_not():
    """One pair, always preferred: IPO stops at Δ = 1/(2β); DPO's slope there still asks for more."""
    delta = f64(1 / 0.6).requires_grad_()
    zero = f64(0)
    for loss, still in (("ipo", False), ("dpo", True)):
        (slope,) = torch.autograd.grad(preference_loss(delta, zero, zero, zero, 0.3, loss)[0].sum(), delta)
        assert (slope.item() < -0.05) is still


# the step

FEW = [dict(prompt=("ab=", "cde=")[i % 2], chosen="a" * i, rejected="bc" * (i % 4) + "d") for i in range(9)]
HELD_OUT = [dict(prompt="bed=", chosen="a", rejected="b")]


def ids_logp(model, prompt, response):
    """log π(response | prompt), ids, by hand: one row, no padding, log_softmax of the logits."""
    ids = prompt + response
    logp = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def exact_logp(model, tok, prompt, response):
    return ids_logp(model, tok.encode(prompt), tok.encode(response) + [tok.eos_id])


@pytest.fixture
def other_ref(stages, tmp_path):
    """A reference that is not the policy, so that nothing cancels."""
    model, tok = hub.load(stages.folder / "sft/model")
    for p in model.parameters():
        p.data -= 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    hub.save(model, tok, tmp_path / "ref")
    return str(tmp_path / "ref")


@pytest.mark.parametrize("loss", ["dpo", "robust", "simpo", "dpo_nll", "kto"])
@pytest.mark.parametrize("budget", [0, 64, 1])
def test_step_is_one_step_however_it_is_cut(loss, budget, stages, other_ref, tmp_path, gradients):
    """Two steps over all pairs that hardly move: both gradients are those of float64, one response at a time.

    Prompts as context only, EOS counted, pads not, z0 of the whole step and without a gradient.
    """
    path = jsonl(tmp_path / "p.jsonl", FEW + HELD_OUT)
    flags = dict(data=path, batch_size=len(FEW) * (1 + (loss == "kto")), steps=2, lr=1e-12, loss=loss,
                 tokens_per_microbatch=budget, ref=other_ref)
    cfg = stages.config(train_dpo, tmp_path / "run", **flags)
    train_dpo.train(cfg)
    policy, tok = hub.load(tmp_path / "run/model")
    ref = hub.load(other_ref)[0].double()
    policy.double().zero_grad()
    w, l = ([exact_logp(policy, tok, r["prompt"], r[key]) for r in FEW] for key in ("chosen", "rejected"))
    with torch.no_grad():
        rw, rl = ([exact_logp(ref, tok, r["prompt"], r[key]) for r in FEW] for key in ("chosen", "rejected"))
    w, l, rw, rl = map(torch.stack, (w, l, rw, rl))
    delta = (w - rw) - (l - rl)
    nw, nl = (f64(*(len(r[key]) + 1 for r in FEW)) for key in ("chosen", "rejected"))
    if loss == "kto":  # rows in the file's order, chosen before rejected; each mismatch is nine rows away
        logp, base = torch.stack([w, l], 1).flatten(), torch.stack([rw, rl], 1).flatten()
        rows = [(r["prompt"], r[key]) for r in FEW for key in ("chosen", "rejected")]
        far = [(p, rows[i - 9][1]) for i, (p, _) in enumerate(rows)]
        with torch.no_grad():
            z0 = sum(exact_logp(policy, tok, *r) - exact_logp(ref, tok, *r) for r in far) / len(far)
        assert z0 > 0.01
        sign = f64(*[1, -1] * len(FEW))
        total = (1 - torch.sigmoid(sign * cfg.beta * (logp - base - z0))).mean()
    else:
        soft = torch.nn.functional.softplus
        total = {
            "dpo": soft(-cfg.beta * delta),
            "robust": (0.9 * soft(-cfg.beta * delta) - 0.1 * soft(cfg.beta * delta)) / 0.8,
            "simpo": soft(-cfg.beta * (w / nw - l / nl - 0.5)),
            "dpo_nll": soft(-cfg.beta * delta) - w / nw,
        }[loss].mean()
    total.backward()
    exact = [p.grad for p in policy.parameters()]
    scale = max(g.abs().max() for g in exact)
    assert len(gradients) == 2 and scale > 1e-3
    for step in gradients:
        assert all((g - e).abs().max() < 2e-5 * scale for g, e in zip(step, exact, strict=True))
    with open(tmp_path / "run/metrics.csv") as f:
        row = next(csv.DictReader(f))
    assert float(row["loss"]) == pytest.approx(total.item(), rel=1e-4)
    assert float(row["logp_chosen"]) == pytest.approx(w.mean().item(), rel=1e-4)
    assert float(row["logp_rejected"]) == pytest.approx(l.mean().item(), rel=1e-4)
    if loss not in ("simpo", "kto"):
        assert float(row["margin"]) == pytest.approx(cfg.beta * delta.mean().item(), rel=1e-3)
        assert float(row["acc"]) == pytest.approx((delta > 0).double().mean().item())


def test_the_log_at_step_0_and_the_reference_never_changes(stages, tmp_path, monkeypatch):
    """Policy = reference: loss log 2, and KL 0 on fresh samples. After 6 steps --ref is as it was."""
    seen = []
    load = train_dpo.load_models
    monkeypatch.setattr(train_dpo, "load_models", lambda *args: seen.append(load(*args)) or seen[0])
    last = train_dpo.train(stages.config(train_dpo, tmp_path / "run"))
    policy, ref, _, tok = seen[0]
    before = hub.load(stages.folder / "sft/model")[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in ref.state_dict().items())
    assert not all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    with open(tmp_path / "run/metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(rows[0]["kl"])) < 1e-4 and abs(float(rows[0]["margin"])) < 1e-5 and last["kl"] > 0.01
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [0] * 4 + [5] * 4
    mine = [r for r in lines if r["step"] == 5]
    assert sum(r["reward"] for r in mine) / 4 == pytest.approx(0.3 * last["kl"], abs=1e-3)  # β·k1


def test_held_out_figures_are_those_of_the_saved_model(stages, other_ref, tmp_path):
    cfg = stages.config(train_dpo, tmp_path / "run", ref=other_ref)
    last = train_dpo.train(cfg)
    policy, tok = hub.load(tmp_path / "run/model")
    ref = hub.load(other_ref)[0]
    rows = [r for r in read_jsonl(cfg.data, pairs.KEYS) if tasks.held_out(r["prompt"])]
    rows = [r for r in rows if r["chosen"] != r["rejected"]]
    with torch.no_grad():
        h = [[exact_logp(policy, tok, r["prompt"], r[key]) - exact_logp(ref, tok, r["prompt"], r[key])
              for key in ("chosen", "rejected")] for r in rows]
    deltas = [(w - l).item() for w, l in h]
    assert len(rows) > 3 and last["eval/acc"] == pytest.approx(sum(d > 0 for d in deltas) / len(rows))
    loss = sum(math.log1p(math.exp(-0.3 * d)) for d in deltas) / len(rows)
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-4)


# learning


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """An untrained model of one layer for the alphabet of `tastes`."""
    torch.manual_seed(0)
    tok = Tokenizer.from_chars("+-abcdef:xy")
    size = dict(n_layer=1, n_head=2, d_model=32, max_len=16)
    folder = tmp_path_factory.mktemp("blank") / "model"
    hub.save(GPT(GPTConfig.gpt2(tok.vocab_size, **size)), tok, folder)
    return str(folder)


def learn(blank, tmp_path, **flags):
    """→ final metrics, and P(x) of the first token after `+…` and after `-…`, on held-out prompts."""
    path = jsonl(tmp_path / "p.jsonl", tastes(1200))
    flags = dict(steps=60, batch_size=32, lr=3e-3, eval_every=0, save_every=0, max_new_tokens=6) | flags
    last = train_dpo.train(train_dpo.Config(data=path, init=blank, out=f"{tmp_path}/run", **flags))
    model, tok = hub.load(tmp_path / "run/model")
    rows = {r["prompt"] for r in tastes(1200, seed=1) if tasks.held_out(r["prompt"])}
    x = {sign: [model.logits(torch.tensor([tok.encode(p)]))[0, -1].softmax(-1)[tok.encode("x")[0]].item()
                for p in rows if p[0] == sign] for sign in "+-"}
    return last, *(sum(x[sign]) / len(x[sign]) for sign in "+-")


@pytest.mark.parametrize("loss", [*LOSSES, "kto"])
def test_learns_a_preference_that_depends_on_the_prompt(loss, blank, tmp_path):
    """On held-out prompts: accuracy, and what the policy itself now writes."""
    last, plus, minus = learn(blank, tmp_path, loss=loss)
    assert last["eval/acc"] > (0.75 if loss == "kto" else 0.85) and plus > 2 * minus  # kto: against z0


def test_with_the_sign_flipped_it_learns_the_contrary(blank, tmp_path, monkeypatch):
    """So the test above can fail."""
    right = train_dpo.preference_loss

    def flipped(*args, **kw):
        losses, *rewards = right(*args, **kw)
        return -losses, *rewards

    monkeypatch.setattr(train_dpo, "preference_loss", flipped)
    last, plus, minus = learn(blank, tmp_path, max_grad_norm=0.1)
    assert last["eval/acc"] < 0.3 and plus < minus


# pairs and other data


def test_fewer_pairs_are_the_first_of_many(stages, tmp_path):
    """DPO sees the reward model's pairs, and more of them: same prompts, samples and labels."""
    torch.manual_seed(0)
    tok = Tokenizer.from_bytes()
    model = GPT(GPTConfig.gpt2(tok.vocab_size, n_layer=1, n_head=2, d_model=16, max_len=128))
    files = []
    for n in (300, 530):
        cfg = train_dpo.Config(pairs=n, out=str(tmp_path / str(n)))
        Path(cfg.out).mkdir()
        files.append(read_jsonl(pairs.make_pairs(cfg, tasks.get("reviews"), model, tok)[0], pairs.KEYS))
    few, many = ([[r[k] for k in pairs.KEYS] for r in rows] for rows in files)
    assert len(few) == 300 and many[:300] == few


def dialogue(*turns):
    """Human and assistant take turns, as in HH-RLHF."""
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {t}" for i, t in enumerate(turns))


def test_dialogues_are_cut_at_their_last_turn(tmp_path, capsys):
    rows = [
        dict(chosen=dialogue("hi", "hello", "bye", "see you"), rejected=dialogue("hi", "hello", "bye", "no")),
        dict(chosen=dialogue("hi", "a"), rejected=dialogue("ho", "b")),  # line 2: prompts differ
        dict(chosen=dialogue("q", "yes"), rejected=dialogue("q", "")),
        dict(chosen=dialogue("q", "a", "more", "b"), rejected=dialogue("q", "c")),  # line 4: so here
    ]
    got = read_rows(jsonl(tmp_path / "hh.jsonl", rows), "pairs")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in got] == [
        ("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:", " see you", " no"),
        ("\n\nHuman: q\n\nAssistant:", " yes", " "),
    ]
    assert "2 of 4 pairs answer different prompts (line 2, 4)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"3 of 5 pairs .* \(line 2, 4, 5\), more than half"):
        read_rows(jsonl(tmp_path / "more.jsonl", rows + rows[1:2]), "pairs")


KTO_ROWS = [dict(prompt=p, completion=y, label=y == "a") for p in ("ab=", "cd=", "bed=") for y in "abc"]


@pytest.mark.parametrize("rows, flags, says", [
    (KTO_ROWS, {}, r'x.jsonl:1: "label" beside "completion" is a labelled completion.*--loss kto reads'),
    ([*FEW, KTO_ROWS[0]], {}, r"x.jsonl:10: .* is a labelled completion"),
    ([dict(KTO_ROWS[0], label="yes")], dict(loss="kto"), r"x.jsonl:1: \"label\" is 'yes', expected true"),
    ([dict(KTO_ROWS[0], label=1)], dict(loss="kto"), r"x.jsonl:1: \"label\" is 1, expected true or false"),
    ([dict(prompt="a=", completion="b")], dict(loss="kto"), r'x.jsonl:1: "label" is None'),
    ([dict(prompt="a=", chosen="b")], {}, r'x.jsonl:1: missing key "rejected"'),
    ([*FEW, dict(chosen="b", rejected="c")], {}, r'x.jsonl:10: no "prompt", and no .*Assistant:'),
    ([dict(chosen="b", rejected="c")], {}, r'x.jsonl:1: no "prompt", and no .*Assistant:'),
    ([dict(prompt="a=", chosen="b", rejected=3)], {}, r'x.jsonl:1: "rejected" is a number'),
    ([dict(prompt=" ", chosen="b", rejected="c")], {}, r'x.jsonl:1: "prompt" is empty'),
    ([dict(prompt="a=", chosen="b", rejected="!")], {}, r"x.jsonl:1: .*character '!'"),
    ([dict(prompt="a=", chosen="b", rejected="b")], {}, "1 of 1 training pairs have equal responses"),
    (FEW, {}, "9 training and 0 held-out pairs are left"),
    (HELD_OUT, {}, "0 training and 1 held-out pairs are left"),
    (FEW + HELD_OUT, dict(max_new_tokens=14), "every prompt is longer than 2 tokens"),
], ids=str)
def test_bad_data_is_named(rows, flags, says, stages, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=says):
        train_dpo.train(stages.config(train_dpo, tmp_path / "run", data=path, **flags))
    assert not (tmp_path / "run/metrics.csv").exists()


def test_equal_and_too_long_pairs_are_dropped_and_counted(stages, tmp_path, capsys):
    bad = [dict(prompt="ab=", chosen="a", rejected="a"), dict(prompt="ab=", chosen="a" * 20, rejected="b")]
    path = jsonl(tmp_path / "x.jsonl", FEW + HELD_OUT + bad)
    train_dpo.train(stages.config(train_dpo, tmp_path / "run", data=path))
    says = "dropped 2 of 11 training pairs: 1 with equal responses, 1 longer than the context of 16 tokens"
    assert says in capsys.readouterr().out


def test_kto_takes_labelled_rows_or_takes_pairs_apart(stages, tmp_path):
    """The same responses given in both forms train the same model; each mismatch has another prompt."""
    prompts = ["ab=", "cd=", "ef=", "bed="]
    two = [dict(prompt=p, chosen="a", rejected="b") for p in prompts]
    one = [dict(prompt=p, completion=y, label=y == "a") for p in prompts for y in "ab"]
    models = []
    for name, rows in (("pairs", two), ("rows", one)):
        path = jsonl(tmp_path / f"{name}.jsonl", rows)
        train_dpo.train(stages.config(train_dpo, tmp_path / name, data=path, loss="kto"))
        models.append((tmp_path / name / "model/model.safetensors").read_bytes())
    assert models[0] == models[1]
    ids = [([i], [10 + i, 9], [20 + i, 9]) for i in range(5)]
    for e in pairs.to_examples(ids, True, 16):
        assert e.first[0] // 10 == (1 if e.liked else 2)
        assert e.first[0] % 10 == e.prompt[0] != e.second[0] % 10
    cut = pairs.to_examples([([1] * 6, [2], True), ([1], [3] * 6 + [9], False)], True, 8)
    assert cut[0] == ([1] * 6, [2], [3, 3], True)


HH = Path(__file__).resolve().parents[2] / "shared/data/hh_harmless_test.jsonl.gz"


@pytest.mark.skipif(not HH.exists(), reason="HH-RLHF is not here")
def test_hh_rlhf_is_read_and_trained_on(tmp_path, capsys):
    """2,312 real pairs, in their own form; 100 of them through two steps of a byte model."""
    rows = read_rows(HH, "pairs")
    assert len(rows) == 2307 and all(r["prompt"].endswith("\n\nAssistant:") for r in rows)
    says = "5 of 2312 pairs answer different prompts (line 1255, 1689, 1951, 1953, 2037)"
    assert says in capsys.readouterr().out
    assert all(TURN not in r[key] for r in rows for key in ("chosen", "rejected"))
    short = sorted(rows, key=lambda r: len(r["prompt"] + r["chosen"] + r["rejected"]))[:100]
    short = [{key: r["prompt"] + r[key] for key in ("chosen", "rejected")} for r in short]
    path = jsonl(tmp_path / "hh.jsonl", short)
    torch.manual_seed(0)
    tok = Tokenizer.from_bytes()
    model = GPT(GPTConfig.gpt2(tok.vocab_size, n_layer=1, n_head=2, d_model=16, max_len=256))
    hub.save(model, tok, tmp_path / "init")
    flags = dict(steps=2, max_new_tokens=8, eval_prompts=4, save_every=0)
    last = train_dpo.train(
        train_dpo.Config(data=path, init=f"{tmp_path}/init", out=f"{tmp_path}/run", **flags)
    )
    assert last["loss"] == pytest.approx(math.log(2), abs=0.05) and last["eval/loss"] != last["loss"]


# rounds

LETTERS = "abcdef"
TOK = Tokenizer.from_chars(LETTERS + "=")


def first_letter(prompt, response):
    """`cf=` should be answered by `f…`: 1 in 9 by chance."""
    return float(response[:1] == prompt[1])


def nothing(prompt, response):
    return 0.0


def longest(prompt, response):
    return float(len(response))


@pytest.fixture
def rounds(tmp_path):
    """rounds(reward, **flags) → rows of metrics.csv of an online run from a near-uniform policy."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(TOK.vocab_size, n_layer=1, n_head=2, d_model=32, max_len=12, tied=False))
    model.lm_head.weight.data *= 0.1
    model.norm.bias.data[0] = 1.0
    model.lm_head.weight.data[TOK.eos_id, 0] = 1.5  # EOS in one token of three: most responses end
    hub.save(model, TOK, tmp_path / "init")
    path = jsonl(tmp_path / "prompts.jsonl", [dict(prompt=a + b + "=") for a in LETTERS for b in LETTERS])

    def run(reward, out="run", **flags):
        size = dict(online=10, steps=100, pairs=1600, group_size=8, max_new_tokens=5, eval_prompts=64)
        flags = size | dict(lr=5e-3, beta=0.1, no_eos_score=0.0, save_every=0, online_ref="round") | flags
        flags |= dict(reward=[f"{__file__}:{reward.__name__}"], out=f"{tmp_path}/{out}")
        train_dpo.train(train_dpo.Config(**dict(data=path, init=f"{tmp_path}/init") | flags))
        with open(tmp_path / out / "metrics.csv") as f:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]

    return run


def test_rounds_improve_a_reward_that_depends_on_the_prompt(rounds):
    """From chance to most of the time, on prompts never trained on; the rounds' own samples say so too."""
    rows = rounds(first_letter)
    reward = [r["reward"] for r in rows if "reward" in r]
    assert len(reward) == 10 and reward[0] < 0.2 and reward[-1] > 0.75  # 0.92 or more on seeds 0 to 2
    assert rows[0]["eval/reward"] < 0.5 and rows[-1]["eval/reward"] > 0.75


def test_ties_are_dropped_and_nothing_but_ties_is_an_error(rounds, tmp_path):
    rows = rounds(first_letter, steps=2, online=1)
    with open(tmp_path / "run/pairs-round-0.jsonl") as f:
        found = list(map(json.loads, f))
    assert rows[0]["dead"] == pytest.approx(1 - len(found) / 1600) and 0 < rows[0]["dead"] < 1
    for r in found:  # one that never ended scores 0
        sides = zip(("chosen", "rejected"), r["ids"][1:])
        w, l = (first_letter(r["prompt"], r[key]) * (ids[-1] == TOK.eos_id) for key, ids in sides)
        assert w > l
    with pytest.raises(UserError, match="all samples of every prompt scored the same"):
        rounds(nothing, out="ties", max_new_tokens=1)


def test_best_against_worst_as_sampled(rounds, tmp_path):
    """The longest loses if it never ended: what is chosen has its EOS, and ids are those of the sampler."""
    rounds(longest, steps=1, online=1, no_eos_score=-1.0)
    with open(tmp_path / "run/pairs-round-0.jsonl") as f:
        found = list(map(json.loads, f))
    ended = [r["ids"][2][-1] == TOK.eos_id for r in found]
    assert len(found) > 100 and not all(ended)
    for r, end in zip(found, ended):
        prompt, chosen, rejected = r["ids"]
        assert TOK.decode(prompt) == r["prompt"] and TOK.decode(chosen[:-1]) == r["chosen"]
        assert chosen[-1] == TOK.eos_id and TOK.eos_id not in rejected[:-1]
        assert len(r["chosen"]) > len(r["rejected"]) if end else len(rejected) == 5


@pytest.mark.parametrize("ref", ["round", "fixed"])
def test_the_reference_of_a_round(ref, rounds, tmp_path, monkeypatch):
    """The policy as it stood when the round began, or --ref: seen by its log-probs on the round's pairs."""
    seen, cache = [], train_dpo.cache_logps

    def record(model, examples, cfg):
        out = cache(model, examples, cfg)
        seen.append((out, cache(policy[0], examples, cfg), cache(policy[1], examples, cfg)))
        return out

    policy, load = [], train_dpo.load_models
    monkeypatch.setattr(train_dpo, "load_models", lambda *args: policy.extend(m := load(*args)) or m)
    monkeypatch.setattr(train_dpo, "cache_logps", record)
    rounds(first_letter, steps=4, online=2, online_ref=ref, pairs=60)
    seen = [s for s in seen if len(s[0])]  # no held-out pairs here
    assert len(seen) == 2  # once a round
    (first, now, fixed), (second, later, still) = seen
    assert torch.equal(first, now) and torch.equal(first, fixed) and not torch.equal(later, still)
    assert torch.equal(second, later if ref == "round" else still)


@pytest.mark.parametrize("flags", [{}, {"online_ref": "fixed"}, {"loss": "kto"}, {"loss": "simpo"}], ids=str)
@pytest.mark.parametrize("stop", [2, 3])
def test_resuming_a_round_is_bit_exact(flags, stop, rounds, tmp_path, monkeypatch):
    """Broken off where a round begins and in its middle: pairs, reference and weights are as unbroken."""
    flags = dict(steps=6, online=3, pairs=60, save_every=1) | flags
    rounds(first_letter, out="whole", **flags)
    check = Run.check

    def crash(run, step, *args):
        if step == stop:
            raise KeyboardInterrupt
        return check(run, step, *args)

    monkeypatch.setattr(Run, "check", crash)
    with pytest.raises(KeyboardInterrupt):
        rounds(first_letter, **flags)
    monkeypatch.setattr(Run, "check", check)
    rounds(first_letter, resume=True, **flags)
    same_run(tmp_path / "whole", tmp_path / "run")


def test_the_policy_judges_itself(stages, tmp_path):
    """Round 0 trains on labelled pairs; in round 1 what the policy prefers, by β log π/π_ref, wins."""
    cfg = stages.config(train_dpo, tmp_path / "run", online=2, steps=2, judge="self", pairs=80, save_every=1,
                        no_eos_score=-99.0)
    train_dpo.train(cfg)
    assert not (tmp_path / "run/pairs-round-0.jsonl").exists()
    ref, tok = hub.load(stages.folder / "sft/model")
    policy, _ = hub.load(stages.folder / "sft/model")
    policy.load_state_dict(state(tmp_path / "run", "step-000001")["models"]["model"])
    with open(tmp_path / "run/pairs-round-1.jsonl") as f:
        ids = [r["ids"] for r in map(json.loads, f)]
    with torch.no_grad():
        scores = [[ids_logp(policy, p, y) - ids_logp(ref, p, y) for y in sides]
                  for p, *sides in ids if sides[1][-1] == tok.eos_id]
    assert len(scores) > 10 and all(w > l for w, l in scores)


def test_a_reward_model_ranks(stages, tmp_path):
    """Of each pair the chosen has the higher reward, by the model in --rm."""
    flags = dict(online=1, steps=1, rm=f"{stages.folder}/rm/model", pairs=40, no_eos_score=-99.0)
    train_dpo.train(stages.config(train_dpo, tmp_path / "run", **flags))
    rm, tok = hub.load(stages.folder / "rm/model")
    with open(tmp_path / "run/pairs-round-0.jsonl") as f:
        ids = [r["ids"] for r in map(json.loads, f)]
    rewards = [[rm.rewards(torch.tensor([p + y]), torch.tensor([len(p + y)])).item() for y in sides]
               for p, *sides in ids if sides[1][-1] == tok.eos_id]
    assert len(rewards) > 10 and all(w > l for w, l in rewards)


def test_it_makes_its_own_pairs_and_gold_stays_out_of_training(tmp_path, monkeypatch):
    """From the moment the pairs are written, gold raises; training, measuring and judging go on."""
    torch.manual_seed(0)
    tok = Tokenizer.from_bytes()
    size = dict(n_layer=1, n_head=2, d_model=16, max_len=128)
    hub.save(GPT(GPTConfig.gpt2(tok.vocab_size, **size)), tok, tmp_path / "m")
    make = pairs.make_pairs

    def make_then_forbid(*args):
        paths = make(*args)
        for name in ("gold", "gold_parts", "prefer"):
            monkeypatch.setattr(tasks, name, lambda *args: pytest.fail("gold was read in training"))
        return paths

    monkeypatch.setattr(pairs, "make_pairs", make_then_forbid)
    flags = dict(pairs=40, steps=4, batch_size=4, eval_every=1, eval_prompts=4, max_new_tokens=8, online=2)
    train_dpo.train(train_dpo.Config(init=f"{tmp_path}/m", out=f"{tmp_path}/run", judge="self", **flags))
    assert (tmp_path / "run/pairs-round-1.jsonl").exists()


def pairs_of_round(run, number):
    return [row["ids"] for row in read_jsonl(run / f"pairs-round-{number}.jsonl", pairs.KEYS)]


def test_rounds_sample_at_the_temperature(rounds):
    """Near 0 all samples of a prompt are the same one, so that no pair is found; at 1 nearly all give one."""
    flags = dict(steps=1, online=1, pairs=40)
    assert rounds(longest, **flags)[0]["dead"] < 0.2
    with pytest.raises(UserError, match="all samples of every prompt scored the same"):
        rounds(longest, out="cold", temperature=1e-3, **flags)


def test_every_round_has_draws_of_its_own(rounds, tmp_path):
    """One prompt and a policy that does not move: the second round still finds another pair."""
    prompts = sorted([a + b + "=" for a in LETTERS for b in LETTERS], key=tasks.held_out)
    path = jsonl(tmp_path / "two.jsonl", [dict(prompt=prompts[0]), dict(prompt=prompts[-1])])
    rounds(longest, data=path, online=2, steps=2, pairs=2, lr=1e-12)
    first, second = (pairs_of_round(tmp_path / "run", number) for number in (0, 1))
    assert len(first) == len(second) == 1 and first[0][0] == second[0][0] and first != second


def test_rounds_share_the_prompts_out(rounds, tmp_path, spy):
    """Three rounds of 10 prompts each: no prompt comes twice before all have come once."""
    sampled = spy(generate, "sample_in_batches")
    rounds(longest, online=3, steps=3, pairs=30)
    asked = [[row["prompt"] for row in args[2]] for args, _ in sampled if args[3:4] == (8,)]
    assert [len(prompts) for prompts in asked] == [10, 10, 10] and len({*sum(asked, [])}) == 30
    for number, prompts in enumerate(asked):
        assert {TOK.decode(ids[0]) for ids in pairs_of_round(tmp_path / "run", number)} <= {*prompts}


def test_a_round_trains_on_each_of_its_pairs_before_one_comes_twice(rounds, tmp_path, spy):
    """Two pairs a step, an odd number of pairs: the second round does not begin in the middle of a pass."""
    batches = spy(train_dpo, "step_batch")
    rounds(longest, online=2, steps=6, pairs=10, batch_size=2)
    for number in (0, 1):
        found = [list(ids) for ids in pairs_of_round(tmp_path / "run", number)]
        steps = batches[3 * number : 3 * number + 3]
        trained = [[e.prompt, e.first, e.second] for args, _ in steps for e in args[1]]
        assert len(found) == 5 and sorted(trained[:5]) == sorted(found)


def test_an_unended_response_never_wins_before_a_self_judge(stages, tmp_path):
    """Whatever no_eos_score says: an implicit reward is in nats, where that score has no meaning."""
    cfg = stages.config(train_dpo, tmp_path / "run", online=2, steps=2, judge="self", pairs=80,
                        no_eos_score=99.0, temperature=3.0)
    train_dpo.train(cfg)
    eos = hub.load(stages.folder / "sft/model")[1].eos_id
    found = pairs_of_round(tmp_path / "run", 1)
    assert all(chosen[-1] == eos for _, chosen, _ in found)
    assert any(rejected[-1] != eos for *_, rejected in found)


@pytest.mark.parametrize("nats, z0", [(1.0, 0.0), (-1.0, 1.0)])
def test_kto_takes_no_kl_below_0(nats, z0, stages, tmp_path):
    """The reference likes every response one nat more, or one less: an estimate of −1 is taken as 0."""
    policy, tok = hub.load(stages.folder / "sft/model")
    cfg = stages.config(train_dpo, tmp_path, loss="kto")
    ids = [([i], [i + 1, tok.eos_id], i % 2 == 0) for i in range(4)]
    examples = pairs.to_examples(ids, True, 16)
    ref_logp = train_dpo.cache_logps(policy, examples, cfg) + nats
    found = train_dpo.step_batch(policy, examples, ref_logp, cfg)["z0"]
    assert found.item() == pytest.approx(z0, abs=1e-5)


def test_a_tie_counts_half(stages, tmp_path):
    """Two equal responses: neither is preferred, and accuracy is that of a coin."""
    policy, tok = hub.load(stages.folder / "sft/model")
    cfg = stages.config(train_dpo, tmp_path)
    example = pairs.Example([1, 2], [3, tok.eos_id], [3, tok.eos_id])
    _, figures = train_dpo.objective(policy, [example], torch.zeros(1, 2), None, cfg)
    assert figures["acc"].tolist() == [0.5]
