"""VAPO's loss of right answers: what was right is imitated as well (arXiv 2504.05118).

    L = L_PPO − μ · 1/N_r · Σ log π_θ(y_t) over the N_r tokens of right answers,   μ = 0.1

A right answer is one whose score is above 0. Unlike its advantage, this term does not fade as the critic
learns to expect the answer.
When it helps: right answers are rare, and each should be used for more than one small step.
"""

TRAINER = "train_ppo.py"
CHANGES = [
    ("""\
    lam: float = 0.95  # GAE's λ
""", """\
    lam: float = 0.95  # GAE's λ
    nll_coef: float = 0.1  # μ: weight of the log-probs of right answers
"""),
    ("""\
def value_loss(value, old_value, ret, mask, clip, denom):
""", """\
def positive_loss(logp, right, denom):
    return -torch.where(right, logp, 0.0).sum() / denom.clamp(min=1)


def value_loss(value, old_value, ret, mask, clip, denom):
"""),
    ("""\
        loss, stats = policy_loss(logp, batch["old_logp"], batch["adv"], chunk, cfg.clip, denom)
""", """\
        loss, stats = policy_loss(logp, batch["old_logp"], batch["adv"], chunk, cfg.clip, denom)
        loss = loss + cfg.nll_coef * positive_loss(logp, batch["right"] & chunk, batch["n_right"])
"""),
    ("""\
            batch = roll.batch() | {"old_value": old_value, "adv": adv, "ret": ret, "beta": beta}
""", """\
            batch = roll.batch() | {"old_value": old_value, "adv": adv, "ret": ret, "beta": beta}
            batch["right"] = mask.bool() & (roll.reward > 0)[:, None]  # (B, T), tokens of right answers
"""),
    ("""\
                    minibatch["denom"] = minibatch["mask"].sum()  # of this optimizer step, however it is cut
""", """\
                    minibatch["denom"] = minibatch["mask"].sum()  # of this optimizer step, however it is cut
                    minibatch["n_right"] = minibatch["right"].sum()
"""),
]  # fmt: skip
GOLDEN = "reference"
