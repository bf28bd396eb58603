"""BCO on pairs: a classifier of good and bad responses whose logit is the reward (arXiv 2404.04656).

    L = −log σ(β h_w − δ) − log σ(δ − β h_l),   h = log π_θ(y|x) − log π_ref(y|x)

δ, the mean of the rewards, is 0 here, as it is in TRL's loss of this name.
When it helps: labels say good or bad rather than better or worse.
"""

TRAINER = "train_dpo.py"
CHANGES = [
    ("""\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
""", """\
    loss: Literal["dpo"] = "dpo"  # with the formula of this variant
"""),
    ("""\
SMOOTHED = ("dpo", "cdpo", "robust")
""", """\
SMOOTHED = ()
"""),
    ("""\
    elif loss in SMOOTHED:  # dpo, cdpo
        losses = (1 - eps) * right + eps * flipped
""", """\
    elif loss == "dpo":
        losses = -F.logsigmoid(beta * h_w) - F.logsigmoid(-beta * h_l)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
