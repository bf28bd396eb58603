"""GDPO: each reward function normalised for itself, then their sum (arXiv 2601.05242).

    Â_i = whiten(Σ_k w_k (r_ik − mean_group r_k) / std_group r_k)

When it helps: several `--reward` functions. Summed first, (1, 0) and (0, 1) are one advantage, and a
function whose values spread more drowns the others. The last step keeps Â's size, whatever the number of
functions.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
""", """\
    norm: Literal["group_std"] | None = None  # of this variant; no other has an effect
"""),
    ("""\
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
""", """\
            require(rm is None, "GDPO needs --reward functions, to normalise each by itself; here is --rm")
            weights = [function.weight for function in rewards.functions] + [1.0]
            shaping = reward - roll.reward  # the KL and the penalty on length, as one more function
            parts = torch.cat([roll.reward_parts, shaping[:, None]], 1)
            adv = decoupled(parts, weights, roll.group, cfg.std_eps)  # (B,)
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
def decoupled(parts, weights, group, std_eps):
    \"\"\"parts (B, functions) of the reward, a weight for each → advantage (B,).\"\"\"
    total = torch.zeros_like(parts[:, 0])
    for part, weight in zip(parts.unbind(1), weights):
        total = total + weight * advantages(part, group, "group_std", std_eps)
    return advantages(total, group, "batch_whiten")


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
