"""Labels up to the first wrong step only (arXiv 2305.20050).

    L = −mean over i ≤ e of log P(label of step i),   e = the first step whose label is 0

When it helps: raters of PRM800K stop at the first error. What follows from it is neither right nor wrong, and
labels of it teach the model that a right step after an error is a wrong one.
"""

TRAINER = "train_prm.py"
CHANGES = [
    ("""\
        if label is not None:
            out[end] = label
""", """\
        if label is not None:
            out[end] = label
        if label == 0:
            break
"""),
]  # fmt: skip
GOLDEN = "reference"
