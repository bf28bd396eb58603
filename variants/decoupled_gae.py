"""VC-PPO's decoupled GAE: the critic learns with a λ of its own (arXiv 2503.01491).

    A_t = Σ_k (γλ)^k δ_{t+k} for the policy,   R_t = V_t + Σ_k (γλ_c)^k δ_{t+k} for the critic,   λ_c = 1

With λ < 1 the critic's targets lean on the critic: a reward at the end of a long answer has decayed before it
reaches the first token. With λ_c = 1 the target is the return itself, while the policy keeps the smaller
variance of its λ.
When it helps: long answers with one reward at the end, and a critic that starts wrong.
"""

TRAINER = "train_ppo.py"
CHANGES = [
    ("""\
    lam: float = 0.95  # GAE's λ
""", """\
    lam: float = 0.95  # GAE's λ, of the policy
    critic_lam: float = 1.0  # the same of the critic's targets
"""),
    ("""\
        require(max(self.gamma, self.lam) <= 1, "--gamma and --lam: must not be above 1")
""", """\
        lams = max(self.lam, self.critic_lam)
        require(max(self.gamma, lams) <= 1, "--gamma, --lam and --critic_lam: must not be above 1")
"""),
    ("""\
def whiten(x, mask, shift_mean=True):
""", """\
def decoupled_gae(reward, value, mask, gamma, lam, critic_lam):
    adv, _ = gae(reward, value, mask, gamma, lam)
    _, ret = gae(reward, value, mask, gamma, critic_lam)
    return adv, ret


def whiten(x, mask, shift_mean=True):
"""),
    ("""\
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
""", """\
            adv, ret = decoupled_gae(reward, old_value, mask, cfg.gamma, cfg.lam, cfg.critic_lam)  # (B, T)
"""),
]  # fmt: skip
GOLDEN = "reference"
