"""Geometric mask: responses on which sampler and trainer disagree are left out (richardli.xyz/rl-collapse).

    l_it = 1[|1/|y_i| Σ_t log(π_old / π_sampler)| ≤ δ] · max(−Â_i ρ_it, −Â_i clip(ρ_it)),   ρ_it = π_θ / π_old

The ratio that is clipped is π_θ/π_old, where the trainer itself computes π_old once, before the step's
first update. The sampler's own probabilities enter the weight alone: this is decoupled PPO (arXiv
2110.00641). The mean over the tokens makes the test fair to long responses. The weights still count those
left out.
When it helps: where a few responses went another way in the sampler than the trainer would. The default of
0.001 fits engines of one precision; with `--off_policy_steps` the policy itself has moved, and 0.1 is a
start.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    std_eps: float = 1e-6  # added to the standard deviation
""", """\
    std_eps: float = 1e-6  # added to the standard deviation
    geo_band: float = 0.001  # nats a token by which trainer and sampler may differ
"""),
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            trainer_logp = roll.logp_under(policy, cfg.temperature, cfg.tokens_per_microbatch)  # (B, T)
            adv_token = adv[:, None] * sampler_weight(trainer_logp, old_logp, mask, cfg)  # (B, T)
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv_token, "old_logp": trainer_logp}
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
def sampler_weight(trainer_logp, sampler_logp, mask, cfg):
    \"\"\"→ bool (B, 1): the mean log-ratio of trainer and sampler is within the band.\"\"\"
    mean = (trainer_logp - sampler_logp).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return mean.abs() <= cfg.geo_band


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
