"""MaxRL: the advantage over the pass rate, which approaches maximum likelihood (arXiv 2602.02710).

    Â_i = (r_i − mean_group r) / mean_group r,   0 where no sample is right

With rewards of 0 or 1 the expected gradient is that of Σ_k pass@k / k for k up to G − 1: with many samples
the gradient of log p, in place of p.
When it helps: prompts that are seldom solved. One of 16 right answers has the advantage 15 here, 3.75 in
GRPO.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
""", """\
    norm: Literal["group_std"] | None = None  # of this variant; no other has an effect
"""),
    ("""\
        variance = zeros.index_add(0, group, adv.square()) / (size - 1)
        adv = adv / (variance.sqrt()[group] + std_eps)
""", """\
        require(reward.min() >= 0, f"MaxRL needs rewards of 0 or more; one is {unit * reward.min():g}")
        adv = adv / mean[group]
"""),
]  # fmt: skip
GOLDEN = "reference"
