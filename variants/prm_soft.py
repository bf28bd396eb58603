"""Soft labels: the share of rollouts from a step that end with the right answer (arXiv 2312.08935).

    L = −mean (p log σ(z) + (1 − p) log (1 − σ(z))),   p = right rollouts / rollouts, z the logit of the step

A label is any number from 0 to 1. The loss of the trainer is the same; it only refuses such labels.
When it helps: labels made by rollouts in place of raters, where 1 of 8 and 7 of 8 are not the same.
"""

TRAINER = "train_prm.py"
CHANGES = [
    ("""\
NO_LABEL = -1  # of a token at which no labelled step ends
""", """\
NO_LABEL = -1.0  # of a token at which no labelled step ends; a float, or labels would be cut to 0
"""),
    ("""\
            and all(label in (0, 1, None) for label in labels)
""", """\
            and all(label is None or type(label) in (int, float) and 0 <= label <= 1 for label in labels)
"""),
    ("""\
        expected = f"expected {len(ends)} of 1, 0, null"
""", """\
        expected = f"expected a number from 0 to 1, or null, for each of {len(ends)} steps"
"""),
]  # fmt: skip
GOLDEN = "reference"
