"""VAPO's length-adaptive GAE: the policy's λ grows with the response's length (arXiv 2504.05118).

    λ = 1 − 1 / (α l),   l = tokens of the response,   α = 0.05,   at least 0;   the critic's λ is 1

Σ_k λ^k is then α l: as many steps of the future count as the answer has room for. A fixed λ of 0.95 sees 20
tokens of an answer of 10,000.
When it helps: answers whose lengths differ much. Those of the built-in tasks are short: α = 0.05 gives λ = 0
below 20 tokens, and --lam_alpha 2 gives 0.95 at 10.
"""

TRAINER = "train_ppo.py"
CHANGES = [
    ("""\
    lam: float = 0.95  # GAE's λ
""", """\
    lam_alpha: float = 0.05  # α: GAE's λ is 1 − 1/(α·tokens of the response)
"""),
    ("""\
        require(max(self.gamma, self.lam) <= 1, "--gamma and --lam: must not be above 1")
""", """\
        require(self.gamma <= 1 and self.lam_alpha > 0, "--gamma must not be above 1, --lam_alpha not be 0")
"""),
    ("""\
def whiten(x, mask, shift_mean=True):
""", """\
def length_adaptive_gae(reward, value, mask, gamma, alpha):
    lam = (1 - 1 / (alpha * mask.sum(1))).clamp(min=0)  # (B,)
    adv, _ = gae(reward, value, mask, gamma, lam)
    _, ret = gae(reward, value, mask, gamma, lam=1.0)
    return adv, ret


def whiten(x, mask, shift_mean=True):
"""),
    ("""\
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
""", """\
            adv, ret = length_adaptive_gae(reward, old_value, mask, cfg.gamma, cfg.lam_alpha)  # (B, T)
"""),
]  # fmt: skip
GOLDEN = "reference"
