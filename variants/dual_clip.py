"""Dual clip: a bound on the loss of a token whose advantage is negative, too (arXiv 1912.09729).

    l_it = min(max(−Â ρ, −Â clip(ρ)), −3 Â)   where Â_i < 0

INTELLECT-2's two-sided clip (arXiv 2505.07291) is the same, with 4.
When it helps: many updates a rollout, or stale samples. With a negative advantage the clip never acts above
ρ = 1: a token that has become 50 times as likely has 50 times the gradient, and alone decides the step.
Here it has none from ρ = 3 on.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
""", """\
    loss: Literal["clip"] | None = None  # surrogate; the others have no line of this variant
"""),
    ("""\
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        loss = torch.maximum(unclipped, clipped)
        bound = torch.where(adv < 0, -DUAL_CLIP * adv, torch.inf)
        is_clipped = (clipped > unclipped) | (loss > bound)
        loss = torch.minimum(loss, bound)
"""),
    ("""\
def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
""", """\
DUAL_CLIP = 3.0  # largest ratio of a token whose advantage is negative


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
