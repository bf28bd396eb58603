"""APO-zero: raise the chosen response and lower the rejected one, each by itself (arXiv 2408.06266).

    L = 1 − σ(β h_w) + σ(β h_l),   h = log π_θ(y|x) − log π_ref(y|x)

DPO sees the difference of the two only, and may lower both.
When it helps: the chosen responses are better than what the model would write.
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
        losses = 1 - torch.sigmoid(beta * h_w) + torch.sigmoid(beta * h_l)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
