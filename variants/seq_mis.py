"""Sequence MIS: a response whose importance weight is too large is left out (richardli.xyz/rl-collapse).

    l_it = M(Π_t π_old / π_sampler) · max(−Â_i ρ_it, −Â_i clip(ρ_it)),   M(k) = k if k ≤ 3, else 0

The ratio that is clipped is π_θ/π_old, where the trainer itself computes π_old once, before the step's
first update. The sampler's own probabilities enter the weight alone: this is decoupled PPO (arXiv
2110.00641). The bound of 3 is TRL's default.
When it helps: as Sequence TIS does, which keeps such a response at weight 2. Left out, the few that sampler
and trainer see most differently cannot lead the step.
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
SAMPLER_CAP = 3.0  # largest weight of a response


def sampler_weight(trainer_logp, sampler_logp):
    \"\"\"π of the trainer over that of the sampler, of whole responses (B, 1), 0 where it is too large.\"\"\"
    weight = (trainer_logp - sampler_logp).sum(1, keepdim=True).exp()
    return torch.where(weight <= SAMPLER_CAP, weight, 0.0)


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
