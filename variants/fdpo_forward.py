"""f-DPO with the forward KL in place of the reverse one (arXiv 2309.16240).

    reward = β (1 − 1/u),   u = π_θ(y|x) / π_ref(y|x)

The forward KL is infinite where the policy has no mass and the reference has some.
When it helps: the policy must keep everything that the reference can say.
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
        h_w = 1 - torch.exp(ref_w - logp_w)
        h_l = 1 - torch.exp(ref_l - logp_l)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
