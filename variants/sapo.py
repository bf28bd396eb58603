"""SAPO: a soft gate in place of the clip (arXiv 2511.20347).

    l_it = −Â_i · 4/τ · σ(τ (ρ_it − 1)),   τ = 1 if Â_i > 0, else 1.05

The 4 makes the slope at ρ = 1 that of the ratio itself: on fresh samples the gradient is GRPO's. Away from
1 it fades, sooner for negative advantages, and never drops to 0 at once.
When it helps: several updates a rollout, where the clip silences a token fully at ρ = 1.2 and not at all at
1.19.
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
        self.fill("grpo", RECIPES[self.recipe] | {"agg": "seq_mean"})
"""),
    ("""\
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        tau = torch.where(adv > 0, TAU_POSITIVE, TAU_NEGATIVE)
        loss = -adv * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        is_clipped = torch.zeros_like(mask)
"""),
    ("""\
def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
""", """\
TAU_POSITIVE = 1.0  # temperature of the gate
TAU_NEGATIVE = 1.05


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
