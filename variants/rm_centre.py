"""Centred rewards: the two scores of a pair are drawn to a sum of 0 (arXiv 2312.09244).

    L = −log σ(r_w − r_l) + c (r_w + r_l)²,   c = 0.01

Bradley–Terry fixes differences only; the mean of the scores may drift while training goes on.
When it helps: reward models that are averaged or compared, and no references to set the bias by.
"""

TRAINER = "train_rm.py"
CHANGES = [
    ("""\
    return -F.logsigmoid(chosen - rejected).mean()  # detail 10
""", """\
    return -F.logsigmoid(chosen - rejected).mean() + 0.01 * (chosen + rejected).square().mean()
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
