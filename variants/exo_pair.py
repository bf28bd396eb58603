"""EXO on pairs: the reverse KL from the policy's preference to the labelled one (arXiv 2402.00856).

    L = p log (p / (1−ε)) + (1−p) log ((1−p) / ε),   p = σ(βΔ)

DPO minimises the KL the other way round, which covers the labels in place of seeking their mode.
ε is --label_smoothing, 0.001 by default: without it the labels would have no logarithm.
When it helps: the policy is too weak to fit all preferences, and shall fit some of them well.
"""

TRAINER = "train_dpo.py"
CHANGES = [
    ("""\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
""", """\
    loss: Literal["dpo"] = "dpo"  # with the formula of this variant
"""),
    ("""\
            self.label_smoothing = 0.1 if self.loss in ("cdpo", "robust") else 0.0
""", """\
            self.label_smoothing = 0.001
"""),
    ("""\
        require(not eps or self.loss in SMOOTHED, f"--label_smoothing: not with --loss {self.loss}")
""", """\
        require(not eps or self.loss in SMOOTHED, f"--label_smoothing: not with --loss {self.loss}")
        require(eps, "--label_smoothing 0: the log of the labels would be infinite")
"""),
    ("""\
SMOOTHED = ("dpo", "cdpo", "robust")
""", """\
SMOOTHED = ("dpo",)
"""),
    ("""\
    elif loss in SMOOTHED:  # dpo, cdpo
        losses = (1 - eps) * right + eps * flipped
""", """\
    elif loss == "dpo":
        p = torch.sigmoid(beta * delta)
        losses = p * (-right - math.log(1 - eps)) + (1 - p) * (-flipped - math.log(eps))
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
