"""DPPO-TV: a token is dropped by the change of its probability, not of its ratio (arXiv 2602.04879).

    l_it = −Â_i · min(ρ_it, 20) · log π(y_it),   0 where π − π_old > δ (Â_i > 0) or π − π_old < −δ (Â_i ≤ 0)

|π − π_old| bounds the total variation from below; δ = 0.15, and no gradient passes through the weight.
When it helps: large vocabularies, where rare tokens have noisy ratios. A token of probability 0.001 may
double without harm, and the clip silences it; one that falls from 0.99 to 0.8 has moved the policy far, and
the clip does not see it.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
""", """\
    loss: Literal["clip"] | None = None  # surrogate; the others have no line of this variant
"""),
    ("""\
        self.fill("grpo", RECIPES[self.recipe])
""", """\
        self.fill("grpo", RECIPES[self.recipe] | {"clip_low": 0.15, "clip_high": 0.15})
"""),
    ("""\
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        change = logp.detach().exp() - old_logp.exp()  # of the token's probability
        is_clipped = torch.where(adv > 0, change > cfg.clip_high, change < -cfg.clip_low)
        weight = ratio.detach().clamp(max=RATIO_CAP)
        loss = torch.where(is_clipped, 0.0, -weight * adv * logp)
"""),
    ("""\
def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
""", """\
RATIO_CAP = 20.0  # largest weight of a token


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
