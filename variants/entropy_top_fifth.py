"""Only the most uncertain fifth of the tokens carries the gradient (arXiv 2506.01939).

    l_it = 1[H_it ≥ h] · max(−Â_i ρ_it, −Â_i clip(ρ_it)),   h = the 0.8 quantile of H

H_it is the entropy of the policy where token t was sampled, before the step's first update, and h belongs
to all tokens of the step. The weights still count every token.
When it helps: with long reasoning, where a few forks decide an answer and most tokens follow from the ones
before. In answers of five tokens there is little to leave out.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            entropy = roll.per_token(
                lambda tokens, mask: policy.logprobs(tokens, mask, cfg.temperature)[1],
                cfg.tokens_per_microbatch,
            )
            adv_token = adv[:, None] * most_uncertain(entropy, mask)  # (B, T)
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv_token}
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
UNCERTAIN_SHARE = 0.2


def most_uncertain(entropy, mask):
    \"\"\"→ bool (B, T): the tokens of the mask, (B, T) bool, whose entropy is among the largest.\"\"\"
    return mask & (entropy >= entropy[mask].quantile(1 - UNCERTAIN_SHARE))


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
