"""Clip-Cov: no gradient for a few of the tokens that shrink the entropy most (arXiv 2505.22617).

    C_it = (log π(y_it) − mean log π) (Â_i − mean Â),   l_it = 0 for a random share of 1 < C_it < 5

The entropy falls by the covariance of log-probability and advantage, and a tiny part of the tokens makes
most of it. C is that of the step's samples, before its first update. `--cov_share` is a share of all
tokens.
When it helps: where the entropy collapses in the first steps and the reward stops rising with it.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    beta: float | None = None  # KL coefficient
""", """\
    beta: float | None = None  # KL coefficient
    cov_share: float = 2e-4  # share of the tokens that lose their gradient; at least one token a step
"""),
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            adv_token = adv[:, None] * clip_cov(old_logp, adv, mask, cfg, step)  # (B, T)
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv_token}
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
def clip_cov(logp, adv, mask, cfg, step):
    \"\"\"→ bool (B, T): the tokens of the mask that keep their gradient.\"\"\"
    adv = adv[:, None].expand_as(logp)
    covariance = (logp - logp[mask].mean()) * (adv - adv[mask].mean())
    strong = (mask & (covariance > 1) & (covariance < 5)).nonzero()
    generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "clip_cov", step))
    drawn = torch.randperm(len(strong), generator=generator)[: max(1, int(cfg.cov_share * mask.sum()))]
    row, column = strong[drawn].unbind(1)
    return mask.index_put((row, column), torch.zeros_like(row).bool())


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
