"""IcePop: tokens on which sampler and trainer disagree are left out (ringtech.notion.site/icepop).

    l_it = M(π_old / π_sampler) · max(−Â_i ρ_it, −Â_i clip(ρ_it)),   M(k) = k if 0.5 ≤ k ≤ 5, else 0

The ratio that is clipped is π_θ/π_old, where the trainer itself computes π_old once, before the step's
first update. The sampler's own probabilities enter the weight alone: this is decoupled PPO (arXiv
2110.00641).
When it helps: where sampler and trainer differ much on some tokens, as a mixture of experts does when its
routing differs. TIS keeps a token that is off by a factor of 100 at weight 2; here it is gone.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            trainer_logp = roll.logp_under(policy, cfg.temperature, cfg.tokens_per_microbatch)  # (B, T)
            adv_token = adv[:, None] * sampler_weight(trainer_logp, old_logp)  # (B, T)
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv_token, "old_logp": trainer_logp}
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
ICEPOP_LOW = 0.5
ICEPOP_HIGH = 5.0


def sampler_weight(trainer_logp, sampler_logp):
    \"\"\"π of the trainer over that of the sampler, per token (B, T), 0 outside of the band.\"\"\"
    weight = (trainer_logp - sampler_logp).exp()
    return torch.where((weight >= ICEPOP_LOW) & (weight <= ICEPOP_HIGH), weight, 0.0)


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
