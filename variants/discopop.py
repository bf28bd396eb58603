"""DiscoPOP: a loss found by a language model, logistic or exponential by margin (arXiv 2406.08414).

    L = (1 − m) (−log σ(z)) + m e^−z,   z = βΔ,   m = σ(z / τ),   τ = 0.05

A pair in the wrong order has the loss of DPO, one in the right order e^−z. In between, from z = −0.12 to
0.07, the slope has the other sign: such a pair is drawn to −0.12, and every run starts at 0.
When it helps: the paper finds it better than DPO at β = 0.05, where z is far below 1.
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
        mix = torch.sigmoid(beta * delta / 0.05)
        losses = (1 - mix) * right + mix * torch.exp(-beta * delta)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
