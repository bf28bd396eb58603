"""APO-down: lower both responses, the rejected one more (arXiv 2408.06266).

    L = σ(β h_w) + 1 − σ(β (h_w − h_l)),   h = log π_θ(y|x) − log π_ref(y|x)

When it helps: the model is better than its data, so that even the chosen responses are worse than its own.
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
        losses = torch.sigmoid(beta * h_w) + 1 - torch.sigmoid(beta * delta)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
