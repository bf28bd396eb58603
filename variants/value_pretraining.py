"""VC-PPO's value pre-training: the critic learns alone before the policy moves (arXiv 2503.01491).

    lr_policy = 0 for the first K steps, in which λ = 1 and R_t is the return

A critic that starts as the reward model values the first tokens as if the answer were over. Until it has
learnt better, its errors are the policy's advantages.
When it helps: a critic that starts from a reward model, and long answers. The paper takes 50 steps.
"""

TRAINER = "train_ppo.py"
CHANGES = [
    ("""\
    lam: float = 0.95  # GAE's λ
""", """\
    lam: float = 0.95  # GAE's λ
    critic_steps: int = 10  # first steps, in which the critic alone learns
"""),
    ("""\
def explained_variance(value, ret, mask):
""", """\
def policy_rate(step, cfg):
    alone = step < cfg.critic_steps
    return 0.0 if alone else cfg.lr * (1 - step / cfg.steps)


def explained_variance(value, ret, mask):
"""),
    ("""\
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
""", """\
            lam = 1.0 if step < cfg.critic_steps else cfg.lam
            adv, ret = gae(reward, old_value, mask, cfg.gamma, lam)  # (B, T)
"""),
    ("""\
                group["lr"] = group["peak"] * (1 - step / cfg.steps)  # detail 20: linear to 0
""", """\
                group["lr"] = group["peak"] * (1 - step / cfg.steps)  # detail 20: linear to 0
            opt.param_groups[0]["lr"] = policy_rate(step, cfg)
"""),
]  # fmt: skip
GOLDEN = "reference"
