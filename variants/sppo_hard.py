"""SPPO with hard labels: a win rate of 1 or 0 is regressed on the log-ratio (arXiv 2405.00675).

    L = (h_w − 1/2β)² + (h_l + 1/2β)²,   h = log π_θ(y|x) − log π_ref(y|x)

The paper's η is 1/β. Its reference is the policy of the round before: --online 3 --online_ref round.
When it helps: several rounds of self-play, where the ends of both log-ratios keep the policy near the last.
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
        margin = 1 / (2 * beta)
        losses = (h_w - margin).square() + (h_l + margin).square()
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
