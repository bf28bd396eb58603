"""TIS: truncated importance weights between sampler and trainer (fengyao.notion.site/off-policy-rl).

    l_it = min(π_old / π_sampler, 2) · max(−Â_i ρ_it, −Â_i clip(ρ_it)),   ρ_it = π_θ / π_old

The ratio that is clipped is π_θ/π_old, where the trainer itself computes π_old once, before the step's
first update. The sampler's own probabilities enter the weight alone: this is decoupled PPO (arXiv
2110.00641).
When it helps: where the sampler is not the policy: an engine of lower precision, or `--off_policy_steps`.
Without the weight the gradient is that of other samples than those which were drawn.
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
SAMPLER_CAP = 2.0  # largest weight of a token


def sampler_weight(trainer_logp, sampler_logp):
    \"\"\"π of the trainer over that of the sampler, per token (B, T), truncated.\"\"\"
    return (trainer_logp - sampler_logp).exp().clamp(max=SAMPLER_CAP)


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
