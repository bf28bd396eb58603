"""Dual clip: a token of negative advantage costs at most c times that advantage (arXiv 1912.09729).

    l = min(max(−A ρ, −A clip(ρ, 1 ± ε)), −A c) where A < 0,   c = 3

PPO's clip bounds the ratio from above for A > 0 only. For A < 0 a ratio of 100, of an old rollout, would
weigh 100 times as much as one of 1.
When it helps: many updates on a rollout, or rollouts of an older policy. verl has it by default.
"""

TRAINER = "train_ppo.py"
CHANGES = [
    ("""\
    larger = torch.maximum(unclipped, clipped)
""", """\
    larger = torch.maximum(unclipped, clipped)
    larger = torch.where(adv < 0, torch.minimum(larger, -3.0 * adv), larger)
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
