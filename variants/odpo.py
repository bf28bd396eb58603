"""ODPO: the margin that DPO asks for grows with the difference of the two scores (arXiv 2402.10571).

    L = −log σ(βΔ − α log (r_w − r_l))

The scores r are those that ranked the samples of an online round: --online 3, and a reward.
When it helps: few pairs, of which some are close and some are not; DPO pushes all alike.
"""

TRAINER = "train_dpo.py"
CHANGES = [
    ("""\
from nanorlhf.pairs import Example, load_data, padded_lengths, read_round, write_round
""", """\
from nanorlhf.hub.files import read_jsonl
from nanorlhf.pairs import KEYS, Example, load_data, padded_lengths, read_round, round_path, write_round
"""),
    ("""\
    label_smoothing: float | None = None  # ε: share of labels taken to be flipped
""", """\
    label_smoothing: float | None = None  # ε: share of labels taken to be flipped
    offset: float = 1.0  # α: weight of the log of the difference of the scores
"""),
    ("""\
        if self.uses_labels:
""", """\
        alone = self.online and self.loss == "dpo" and not eps and not self.uses_labels
        require(alone, "the offset needs --loss dpo, --online 3 and a judge that is not the policy itself")
        if self.uses_labels:
"""),
    ("""\
    ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0,
""", """\
    ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0, offset=0.0,
"""),
    ("""\
        losses = (1 - eps) * right + eps * flipped
""", """\
        losses = -F.logsigmoid(beta * delta - offset)
"""),
    ("""\
            simpo_ratio=cfg.simpo_ratio,
""", """\
            simpo_ratio=cfg.simpo_ratio,
            offset=cfg.offset * ref_logp[:, 2].log(),
"""),
    ("""\
                    "ids": [row["_ids"], ids[best], ids[worst]],
""", """\
                    "ids": [row["_ids"], ids[best], ids[worst]],
                    "margin": rank[best] - rank[worst],
"""),
    ("""\
                ref_logp = cache_logps(base or ref, pairs, cfg)  # (N, 2)
""", """\
                margins = [[row["margin"]] for row in read_jsonl(round_path(cfg, number), KEYS)]
                ref_logp = cache_logps(base or ref, pairs, cfg)  # (N, 2)
                ref_logp = torch.cat([ref_logp, torch.tensor(margins).to(ref_logp)], 1)  # and the margin
"""),
]  # fmt: skip
GOLDEN = "reference"
