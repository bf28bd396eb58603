"""Length-normalised DPO: the reward per token in place of its sum (arXiv 2411.15124).

    L = −log σ(β (h_w / |y_w| − h_l / |y_l|)),   h = log π_θ(y|x) − log π_ref(y|x)

A β of 1 to 10 fits, as the mean log-ratio of a token is small beside the sum over a response; Tülu 3 takes 5.
When it helps: DPO makes answers longer where the chosen ones are longer, since each token adds to the sum.
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
        h_w = (logp_w - ref_w) / len_w
        h_l = (logp_l - ref_l) / len_l
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
