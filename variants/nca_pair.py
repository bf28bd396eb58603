"""NCA on pairs: each response is told from a sample of the reference (arXiv 2402.05369).

    L = −log σ(β h_w) − ½ log σ(−β h_w) − ½ log σ(−β h_l),   h = log π_θ(y|x) − log π_ref(y|x)

The second term stops the chosen response at h_w = log 2 / β, so that its likelihood does not fall as in DPO.
When it helps: DPO lowers the log-prob of the chosen responses, as in reasoning, where they must stay likely.
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
        either = F.logsigmoid(-beta * h_w) + F.logsigmoid(-beta * h_l)
        losses = -F.logsigmoid(beta * h_w) - either / 2
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
