"""OPO: the baseline that makes the gradient's variance smallest (arXiv 2505.23585).

    Â_i = r_i − Σ_j |y_j| r_j / Σ_j |y_j|,   sums over the group

A response's squared gradient grows with its length, so the best baseline weighs the rewards by length.
When it helps: responses of very different lengths. The paper takes one update a rollout: `--minibatches 1`.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
        self.fill("grpo", RECIPES[self.recipe])
""", """\
        self.fill("grpo", RECIPES[self.recipe] | {"norm": "none"})
"""),
    ("""\
    mean = zeros.index_add(0, group, reward) / size
""", """\
    tokens = zeros.index_add(0, group, length.to(reward))
    mean = zeros.index_add(0, group, length * reward) / tokens  # of the tokens, not of the responses
"""),
    ("""\
            weight = mask.sum(1) if cfg.norm == "batch_whiten" else torch.ones_like(adv)
""", """\
            weight = mask.sum(1)  # the mean over the tokens is 0, too
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
