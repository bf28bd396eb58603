"""GMPO: the geometric mean of a response's ratios in place of the arithmetic one (arXiv 2507.20673).

    L_i = −Â_i · (Π_t ρ̂_it)^(1/|y_i|),   log ρ̂ = min(log ρ, ε) if Â_i > 0, else max(log ρ, −ε)

Each token is clipped in the logarithm, at ε = 0.4: at ρ of 0.67 and 1.49.
When it helps: where single tokens have large ratios. One of 20 adds 20 to the sum over a response; to the
mean of the logarithms of ten tokens it adds 0.3. So the wider clip stays stable.
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
        gmpo = {"ratio": "sequence", "clip_low": 0.4, "clip_high": 0.4, "agg": "seq_mean"}
        self.fill("grpo", RECIPES[self.recipe] | gmpo)
"""),
    ("""\
    ratio: Literal["token", "sequence"] | None = None  # importance ratio; sequence: GSPO
""", """\
    ratio: Literal["sequence"] | None = None  # importance ratio: a row's mean, clipped before
"""),
    ("""\
        mean = log_ratio.sum(1, keepdim=True) / length
        log_ratio = mean.detach() + log_ratio - log_ratio.detach()
""", """\
        narrow = log_ratio.clamp(-cfg.clip_low, cfg.clip_high)
        narrow = torch.where(adv > 0, torch.minimum(log_ratio, narrow), torch.maximum(log_ratio, narrow))
        is_clipped = narrow != log_ratio
        log_ratio = (narrow.sum(1, keepdim=True) / length).expand_as(narrow)
"""),
    ("""\
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        loss = -adv * ratio
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
