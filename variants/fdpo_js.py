"""f-DPO with the Jensen–Shannon divergence in place of the reverse KL (arXiv 2309.16240).

    reward = β log (2u / (1 + u)),   u = π_θ(y|x) / π_ref(y|x)

The reward cannot exceed β log 2, so that a response which is likely enough is pushed no further.
When it helps: more diverse answers at nearly the same reward.
"""

TRAINER = "train_dpo.py"
CHANGES = [
    ("""\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
""", """\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "dpo_nll"] = "dpo"  # above
"""),
    ("""\
        h_w = logp_w - ref_w
        h_l = logp_l - ref_l
""", """\
        h_w = math.log(2) + F.logsigmoid(logp_w - ref_w)
        h_l = math.log(2) + F.logsigmoid(logp_l - ref_l)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
