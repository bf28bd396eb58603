"""Plain REINFORCE++: k1 in every token's reward, whitened returns, no groups (arXiv 2501.03262).

    A_t = whiten (r − β Σ_{s ≥ t} (log π(y_s) − log π_ref(y_s))),   over all tokens of the batch

The recipe reinforce++ of the trainer is the paper's other variant, with the mean of a group as baseline.
When it helps: --group_size 1, many prompts with one sample each, where the other methods have no baseline.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
""", """\
    norm: Literal["group_std", "batch_whiten"] | None = None  # neither has an effect: returns are whitened
"""),
    ("""\
        self.fill("grpo", RECIPES[self.recipe])
""", """\
        self.fill("grpo", RECIPES[self.recipe] | {"kl": "k1", "kl_in": "reward", "beta": 0.01})
"""),
    ("""\
        require(G > 1, f"--group_size {G}: a group of one has nothing to be compared with; at least 2")
""", ""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
def whitened_returns(reward, penalty, mask):
    later = penalty.flip(1).cumsum(1).flip(1)  # (B, T), of this token and those behind it
    ret = torch.where(mask.bool(), reward[:, None] - later, 0.0)
    n = mask.sum()
    centred = torch.where(mask.bool(), ret - ret.sum() / n, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / (n - 1) + 1e-8)


def token_weights(mask, group, cfg):
"""),
    ("""\
            if cfg.kl != "none" and cfg.kl_in == "reward":
""", """\
            penalty = torch.zeros_like(old_logp)  # (B, T)
            if cfg.kl != "none" and cfg.kl_in == "reward":
"""),
    ("""\
                reward -= cfg.beta * k.sum(1)
""", """\
                penalty = cfg.beta * k
"""),
    ("""\
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
            weight = mask.sum(1) if cfg.norm == "batch_whiten" else torch.ones_like(adv)
""", """\
            adv = whitened_returns(reward, penalty, mask)  # (B, T)
            weight = mask
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
