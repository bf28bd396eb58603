"""KL-Cov: the tokens that shrink the entropy most are held where they were (arXiv 2505.22617).

    l_it = −Â_i ρ_it + 1[C_it among the largest] · |log ρ_it|,   C_it = (log π − mean log π) (Â_i − mean Â)

C is that of the step's samples, before its first update. There is no clip. `--cov_share` is 0.0002 in the
paper for a model of 32B and 0.002 for one of 7B.
When it helps: as Clip-Cov, and more smoothly, since the token still learns.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
""", """\
    loss: Literal["clip"] | None = None  # surrogate; the others have no line of this variant
"""),
    ("""\
    beta: float | None = None  # KL coefficient
""", """\
    beta: float | None = None  # KL coefficient
    cov_share: float = 2e-3  # share of the tokens that are held; at least one token a step
"""),
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
            batch["held"] = largest_cov(old_logp, adv, mask, cfg)
"""),
    ("""\
        loss, stats = policy_loss(logp, batch["old_logp"], ref_logp, batch["adv"], chunk, batch["w"], cfg)
""", """\
        loss, stats = policy_loss(logp, batch["old_logp"], ref_logp, batch["adv"], chunk, batch["w"], cfg,
                                  batch["held"])  # fmt: skip
"""),
    ("""\
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        loss = -adv * ratio + held * log_ratio.abs()
        is_clipped = held
"""),
    ("""\
def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
""", """\
def largest_cov(logp, adv, mask, cfg):
    \"\"\"→ bool (B, T): the tokens of the mask with the largest covariance of log-prob and advantage.\"\"\"
    covariance = (logp - logp[mask].mean()) * (adv[:, None] - adv[mask.nonzero()[:, 0]].mean())
    number = max(1, int(cfg.cov_share * mask.sum()))
    return mask & (covariance >= covariance[mask].topk(number).values[-1])


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg, held):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
