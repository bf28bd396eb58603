"""The variants of train_grpo.py in a run: what reaches the loss, what must not move it, and what is refused.

Their formulas are compared with golden vectors in test_variants.py.
"""

import math
from itertools import product

import pytest
import stages as st
import torch

import variants
from nanorlhf import generate, hub
from nanorlhf.errors import UserError
from nanorlhf.kernels import torch_backend
from nanorlhf.run.cli import parse

pytestmark = pytest.mark.usefixtures("no_curves")
METHODS = [name for name in variants.NAMES if variants.method(name).TRAINER == "train_grpo.py"]
SAMPLER = {"tis", "icepop", "seq_tis", "seq_mis", "geo_mask"}


def has_a(prompt, response):
    return float("a" in response)


def begins_with_a_vowel(prompt, response):
    return float(response[:1] in ("a", "e"))


def letters(prompt, response):
    return 10.0 * len(response)


def close(got, want, atol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(got), torch.as_tensor(want), atol=atol, rtol=0, check_dtype=False
    )


def config(name, stages, out, *rewards, **more):
    """A run of the variant with these reward functions, or has_a. No limit of time, so in this process."""
    rewards = [f"{__file__}:{reward.__name__}" for reward in rewards or (has_a,)]
    common = dict(
        rm="", reward=rewards, reward_timeout=0, eval_prompts=0, save_every=0, steps=2, overwrite=True
    )
    return variants.load(name).Config(**stages.flags(st.train_grpo, out, **common | more))


def weights(cfg):
    return list(hub.load(f"{cfg.out}/model")[0].parameters())


def sorted_rows(x):
    """The rows of a tensor as lists, in an order of their own: the minibatches deal them at random."""
    return sorted(x.tolist())


# ------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", METHODS)
def test_microbatches_and_chunks_do_not_move_the_step(name, stages, tmp_path, monkeypatch):
    """All tokens at once, or one row at a time and one token of it: the same weights afterwards."""
    trained = []
    for budget, stored in ((0, torch_backend.STORED), (1, 1)):
        monkeypatch.setattr(torch_backend, "STORED", stored)
        cfg = config(name, stages, tmp_path / "run", epochs=2, tokens_per_microbatch=budget, lr=3e-3,
                     adam_eps=1e-5)  # fmt: skip  # 1e-8 would enlarge what is rounding
        variants.load(name).train(cfg)
        trained.append(weights(cfg))
    for together, apart in zip(*trained, strict=True):
        close(together, apart, atol=2e-5)


@pytest.mark.parametrize("name", ["clip_cov", "remax", "tis"])
def test_resuming_changes_no_bit(name, stages, tmp_path, monkeypatch):
    """Killed in the fourth step, resumed from the second: chance, greedy answers and weights come again."""
    trainer = variants.load(name)
    flags = dict(steps=5, off_policy_steps=0 if name == "remax" else 2)
    unbroken = config(name, stages, tmp_path / "unbroken", **flags)
    trainer.train(unbroken)
    real = trainer.sample_step
    steps = []

    def crash(*args):
        steps.append(1)
        if len(steps) == 4:
            raise MemoryError
        return real(*args)

    broken = flags | dict(save_every=2)
    with monkeypatch.context() as m, pytest.raises(MemoryError):
        m.setattr(trainer, "sample_step", crash)
        trainer.train(config(name, stages, tmp_path / "broken", **broken))
    again = config(name, stages, tmp_path / "broken", resume=True, **broken | dict(overwrite=False))
    trainer.train(again)
    for a, b in zip(weights(unbroken), weights(again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["sapo", "gmpo", "dppo_tv", "dual_clip", "kl_cov", "off_policy_mask", "vespo"]
)
def test_on_fresh_samples_the_gradient_is_grpos(name):
    """Where π_θ is π_old, nothing is to be clipped, and every surrogate has the slope of the ratio."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    old = -3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) * mask
    adv = torch.tensor([0.5, -1.0, -2.0, 3.0], dtype=torch.float64)
    w = mask / mask.sum(1, keepdim=True) / 4
    gradients = []
    for trainer in (st.train_grpo, variants.load(name)):
        cfg = trainer.Config(agg="seq_mean")
        logp = old.clone().requires_grad_()
        held = (mask & (old < -1),) if name == "kl_cov" and trainer is not st.train_grpo else ()
        trainer.policy_loss(logp, old, None, adv, mask, w, cfg, *held)[0].backward()
        gradients.append(logp.grad)
    close(*gradients, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------
# Sampler and trainer: old_logp of the trainer, the weight against the sampler


@pytest.mark.parametrize("name", sorted(SAMPLER))
def test_the_ratio_is_the_trainers_and_the_weight_the_samplers(name, stages, tmp_path, spy):
    """Samples of the step before: the first update has ratio 1 in spite of it, and the weights are not 1."""
    trainer = variants.load(name)
    names = ("advantages", "sampler_weight", "policy_loss")
    advantages, sampler_weights, losses = [spy(trainer, function) for function in names]
    rolls = spy(generate, "generate")
    geo_band = dict(geo_band=0.05) if name == "geo_mask" else {}
    cfg = config(name, stages, tmp_path / "run", steps=3, epochs=2, minibatches=1, lr=3e-2,
                 tokens_per_microbatch=0, **geo_band)  # fmt: skip
    trainer.train(cfg)
    assert len(losses) == 6 and len(rolls) == 3
    touched = 0
    for step in range(3):
        roll = rolls[step][1]
        (trainer_logp, sampler_logp, *_), weight = sampler_weights[step]
        assert torch.equal(sampler_logp, roll.logp)
        gap = (trainer_logp - sampler_logp).abs().max()
        assert gap < 1e-5 if step == 0 else gap > 1e-2  # the sampler is one step behind
        adv = advantages[step][1][:, None] * weight  # (B, T) or (B, 1)
        touched += int((weight != 1).any())
        for update in range(2):  # both epochs
            logp, old_logp, _, adv_in_loss, mask, *_ = losses[2 * step + update][0]
            assert sorted_rows(old_logp) == sorted_rows(trainer_logp)
            assert sorted_rows(adv_in_loss * mask) == sorted_rows(adv * roll.mask)
            ratio_is_one = (logp - old_logp).abs().max() < 1e-5
            assert ratio_is_one if update == 0 else not ratio_is_one
    assert touched >= 2


# ------------------------------------------------------------------------------------------------------------
# Masks over the tokens of a step


def test_top_fifth_is_that_of_the_whole_step(stages, tmp_path, spy):
    """The tokens that keep an advantage have the largest entropies of all minibatches together."""
    trainer = variants.load("entropy_top_fifth")
    masks, losses = spy(trainer, "most_uncertain"), spy(trainer, "policy_loss")
    rolls = spy(generate, "generate")
    cfg = config("entropy_top_fifth", stages, tmp_path / "run", steps=1, tokens_per_microbatch=0)
    model = hub.load(cfg.init)[0]
    trainer.train(cfg)
    roll = rolls[0][1]
    with torch.no_grad():
        logits = model.head_logits(model(roll.tokens[:, :-1]))
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # of token t + 1
    kept = masks[0][1]
    close(masks[0][0][0][:, 1:] * roll.mask[:, 1:], entropy * roll.mask[:, 1:], atol=1e-4)
    assert kept.sum() == pytest.approx(0.2 * roll.mask.sum(), abs=1)
    assert entropy[kept[:, 1:]].min() >= entropy[(roll.mask & ~kept)[:, 1:]].max() - 1e-4
    carries = sum(int((adv.expand_as(mask) * mask != 0).sum()) for (_, _, _, adv, mask, *_), _ in losses)
    assert 0 < carries <= kept.sum()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_clip_cov_drops_tokens_of_the_band(share, stages, tmp_path, spy):
    trainer = variants.load("clip_cov")
    chosen, losses = spy(trainer, "clip_cov"), spy(trainer, "policy_loss")
    trainer.train(config("clip_cov", stages, tmp_path / "run", steps=4, minibatches=1, cov_share=share,
                         tokens_per_microbatch=0))  # fmt: skip
    dropped = []
    for (args, kept), (loss, _) in zip(chosen, losses, strict=True):
        logp, adv, mask = args[:3]
        wide = adv[:, None].expand_as(logp)
        covariance = (logp - logp[mask].mean()) * (wide - wide[mask].mean())
        band = mask & (covariance > 1) & (covariance < 5)
        gone = mask & ~kept
        assert not (gone & ~band).any()
        assert gone.sum() == (band.sum() if share else min(1, int(band.sum())))
        assert sorted_rows(loss[3] * loss[4]) == sorted_rows(adv[:, None] * kept)
        dropped.append(int(gone.sum()))
    assert sum(dropped) > 0


def test_kl_cov_holds_its_share_in_the_loss(stages, tmp_path, spy):
    trainer = variants.load("kl_cov")
    chosen, losses = spy(trainer, "largest_cov"), spy(trainer, "policy_loss")
    trainer.train(config("kl_cov", stages, tmp_path / "run", steps=2, cov_share=0.1, minibatches=1,
                         tokens_per_microbatch=0))  # fmt: skip
    for (args, held), (loss, _) in zip(chosen, losses, strict=True):
        assert held.sum() == int(0.1 * args[2].sum()) > 1
        assert sorted_rows(loss[-1]) == sorted_rows(held)


def test_off_policy_mask_sees_whole_rows(stages, tmp_path, spy, monkeypatch):
    """Also where the head scores one token at a time; a stale failure has no gradient."""
    monkeypatch.setattr(torch_backend, "STORED", 1)
    trainer = variants.load("off_policy_mask")
    losses, rolls = spy(trainer, "policy_loss"), spy(generate, "generate")
    trainer.train(config("off_policy_mask", stages, tmp_path / "run", lr=3e-2, minibatches=1))
    for step in range(2):
        assert sorted(losses[step][0][4].sum(1).tolist()) == sorted(rolls[step][1].response_len.tolist())


def test_truncated_rows_weigh_nothing(stages, tmp_path, spy):
    trainer = variants.load("overlong_filter")
    losses, rolls = spy(trainer, "policy_loss"), spy(generate, "generate")
    cfg = config("overlong_filter", stages, tmp_path / "run", steps=1, minibatches=1, max_new_tokens=3,
                 tokens_per_microbatch=0, agg="token")  # fmt: skip
    trainer.train(cfg)
    roll = rolls[0][1]
    assert 0 < roll.finished.sum() < len(roll)
    counted = roll.mask * roll.finished[:, None]
    close(sorted_rows(losses[0][0][5]), sorted_rows(counted / counted.sum()))


def test_a_step_of_truncated_rows_alone_changes_nothing(stages, tmp_path):
    """--max_new_tokens 1: no response ends. There is nothing to divide by, and the run goes on."""
    cfg = config("overlong_filter", stages, tmp_path / "run", max_new_tokens=1)
    metrics = variants.load("overlong_filter").train(cfg)
    assert metrics["gnorm"] == 0
    for before, after in zip(hub.load(cfg.init)[0].parameters(), weights(cfg)):
        close(before, after, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Advantages


@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("G", [2, 3, 5])
def test_maxrl_by_enumeration(G, p):
    """Over all outcomes of G samples: the mean gradient is that of Σ_k pass@k / k, k < G.

    A policy of one parameter is right with probability p = σ(θ); the score of a right sample is 1 − p, of a
    wrong one −p. d pass@k / dθ = k (1 − p)^(k−1) p (1 − p).
    """
    advantages = variants.load("maxrl").advantages
    expected = 0.0
    for outcome in product((0.0, 1.0), repeat=G):
        reward = torch.tensor(outcome, dtype=torch.float64)
        chance = math.prod(p if right else 1 - p for right in outcome)
        adv = advantages(reward, torch.zeros(G, dtype=torch.int64))
        expected += chance * (adv * (reward - p)).mean().item()
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) * p * (1 - p) for k in range(1, G)), abs=1e-9)


def test_pass_at_1_is_grpo():
    """Up to the n − 1 of its standard deviation."""
    generator = torch.Generator().manual_seed(0)
    reward = (torch.rand(40, generator=generator, dtype=torch.float64) < 0.4).double()
    group = torch.arange(5).repeat_interleave(8)
    got = variants.load("pass_at_k").advantages(reward, group, pass_k=1)
    close(got, st.train_grpo.advantages(reward, group, std_eps=0.0) * math.sqrt(8 / 7))


def test_gdpo_takes_the_size_from_each_function(stages, tmp_path, spy):
    """Functions of 0 to 1 and of 0 to 50: what reaches the loss is as if the second had 0 to 5."""
    trainer = variants.load("gdpo")
    calls, losses = spy(trainer, "decoupled"), spy(trainer, "policy_loss")
    cfg = config("gdpo", stages, tmp_path / "run", begins_with_a_vowel, letters, steps=1, minibatches=1,
                 tokens_per_microbatch=0)  # fmt: skip
    trainer.train(cfg)
    (parts, weights, group, std_eps), adv = calls[0]
    assert parts[:, 1].max() >= 10 and weights == [1.0, 1.0, 1.0] and not parts[:, 2].any()
    smaller = parts * torch.tensor([1.0, 0.1, 1.0])
    close(trainer.decoupled(smaller, weights, group, std_eps), adv, atol=1e-4)
    plain = st.train_grpo.advantages(parts.sum(1), group)
    assert (plain / plain.std() - adv).abs().max() > 0.1  # summed first, it is another
    assert sorted(losses[0][0][3].tolist()) == sorted(adv.tolist())
    assert adv.std() == pytest.approx(1, abs=1e-3)


def test_remax_baseline_is_the_greedy_answer_to_the_same_prompt(stages, tmp_path, spy):
    trainer = variants.load("remax")
    samples, calls = spy(trainer, "sample_responses"), spy(trainer, "beyond_greedy")
    losses = spy(trainer, "policy_loss")
    cfg = config("remax", stages, tmp_path / "run", begins_with_a_vowel, letters, steps=2, minibatches=1,
                 tokens_per_microbatch=0, off_policy_steps=0)  # fmt: skip
    trainer.train(cfg)
    assert len(samples) == 4
    value = lambda text: begins_with_a_vowel("", text) + letters("", text)  # noqa: E731
    for step in range(2):
        greedy, roll = samples[2 * step][1], samples[2 * step + 1][1]
        answer = {row["prompt"]: text for row, text in zip(greedy.rows, greedy.texts, strict=True)}
        want = [value(text) - value(answer[row["prompt"]]) for row, text in zip(roll.rows, roll.texts)]
        adv = calls[step][1]
        close(adv, want)
        assert sorted(losses[step][0][3].tolist()) == sorted(adv.tolist()) and adv.any()
    model, tok = hub.load(cfg.init)[:2]
    first = samples[0][1]
    again = generate.generate(model, [row["_ids"] for row in first.rows], 1, 5, 0.0, tok.eos_id)
    assert first.responses() == again.responses()


@pytest.mark.parametrize("name", ["opo", "remax"])
def test_health_accuses_no_baseline(name, stages, tmp_path, capsys):
    """The mean of the advantages over the responses is not 0: that of OPO over the tokens is."""
    variants.load(name).train(config(name, stages, tmp_path / "run", letters, steps=1))
    out = capsys.readouterr().out
    assert "health: " in out and "mean advantage is not near 0" not in out


@pytest.mark.parametrize(
    "name, reward, more, message",
    [
        ("maxrl", "letters*-1", {}, "MaxRL needs rewards of 0 or more; one is -"),
        ("pass_at_k", "letters", {}, "pass@k training needs rewards that are 0 or 1"),
        ("pass_at_k", "has_a", {"pass_k": 5}, "--pass_k 5: must be 1 to 4, the samples of a group"),
        ("pass_at_k", "has_a", {"pass_k": 0}, "--pass_k 0: must be 1 to 4"),
        ("gdpo", "", {}, "GDPO needs --reward functions"),
    ],
)
def test_refused(name, reward, more, message, stages, tmp_path):
    if reward:
        more = more | {"reward": [f"{__file__}:{reward}"]}
    else:
        more = {"reward": [], "rm": f"{stages.folder}/rm/model"}
    with pytest.raises(UserError, match=message):
        variants.load(name).train(config(name, stages, tmp_path / "run", **more))


def test_reinforce_pp_goes_with_the_recipe_of_its_name(stages, tmp_path, capsys):
    """Its advantages are those of tokens, also for the health line, where batch_whiten weighs responses."""
    cfg = config("reinforce_pp", stages, tmp_path / "run", recipe="reinforce++", steps=1)
    variants.load("reinforce_pp").train(cfg)
    assert "mean advantage 0.000" in capsys.readouterr().out


def test_gmpo_is_of_whole_responses():
    with pytest.raises(UserError, match="--ratio token: must be one of sequence"):
        parse(variants.load("gmpo").Config, ["--ratio", "token"])
