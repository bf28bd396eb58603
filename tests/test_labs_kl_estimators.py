"""The lab of KL estimators: its gradients are the trainer's, its goal is the gradient of the KL itself."""

import pytest
import torch

import train_grpo
from labs import kl_estimators as lab
from nanorlhf import exact

TREE = exact.Tree(4, 3, eos_id=3)


def policies():
    """Logits (S, V) of a random policy, with gradients, and log-probs of a random reference."""
    draw = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, len(TREE.prefixes), 4, generator=draw, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


@pytest.mark.parametrize("name", [name for name in lab.RUNS if name != "exact"])
def test_gradient_of_each_response_is_the_trainers(name):
    """In the reward, −KL stands where the advantage does; in the loss the advantage is 0."""
    logits, ref = policies()
    flags = lab.RUNS[name]
    found = lab.gradients(TREE, logits.detach().log_softmax(-1), ref, **flags)
    cfg = train_grpo.Config(beta=1.0, max_new_tokens=3, **flags)
    logp = TREE.token_logp(logits.log_softmax(-1))
    old_logp = logp.detach()
    ref_logp = TREE.token_logp(ref)
    adv = torch.zeros(len(logp), dtype=torch.float64)
    if cfg.kl_in == "reward":
        adv = -train_grpo.kl_estimate(old_logp, ref_logp, cfg.kl).sum(1)
    for i in (0, 7, 39):  # EOS at once, one in the middle, one that is cut
        part = [x[i : i + 1] for x in (logp, old_logp, ref_logp, adv, TREE.mask)]
        loss, _ = train_grpo.policy_loss(*part, TREE.mask[i : i + 1].double(), cfg)
        (want,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(found[i], want, atol=1e-12)


def test_right_gradient_and_values_are_those_of_the_kl():
    logits, ref = policies()
    table = logits.log_softmax(-1)
    logp = TREE.logp(table)
    kl = exact.kl(logp, TREE.logp(ref))
    (want,) = torch.autograd.grad(kl, logits)
    table, logp = table.detach(), logp.detach()
    goal, _ = lab.moments(logp, lab.gradients(TREE, table, ref, "k1", "reward"))
    assert torch.allclose(goal, want, atol=1e-12)
    rows = {name: lab.enumerated(TREE, table, ref, flags) for name, flags in lab.RUNS.items()}
    for name in ("k1", "k3", "exact", "k1 in the reward"):
        assert rows[name]["value_bias"] == pytest.approx(0, abs=1e-9)
    assert rows["k1"]["gradient_bias"] == pytest.approx(1) and rows["k2"]["value_bias"] > 0.01
    same = [rows[name]["gradient_bias"] for name in ("k1 × ratio", "k2", "k3 × ratio", "exact")]
    assert same == pytest.approx([same[0]] * 4) and 0.01 < same[0] < 1  # right at each token, not in all
    assert rows["exact"]["gradient_noise"] < rows["k3 × ratio"]["gradient_noise"]


def test_policy_of_whole_responses():
    logits, _ = policies()
    table = logits.detach().log_softmax(-1)
    assert torch.allclose(lab.policy_of(TREE, TREE.logp(table), 4), table)
