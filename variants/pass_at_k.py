"""Pass@k training: a prompt's reward is that one of k samples is right (arXiv 2508.10751).

    Â_i = (r_i − p) / (1 − p) · √(q / (1 − q)),   p = mean_group r,   q = C(wrong, k) / C(G, k)

Each group of k out of the G samples has the reward max r, whitened over all such groups. Â_i is the mean
over those that contain sample i, in closed form: GRPO with another scale for each prompt. With k = 1 it is
GRPO, up to the n − 1 in the standard deviation.
When it helps: where pass@1 rises and pass@64 falls. Nothing is learned from a prompt with fewer than k
failures.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
""", """\
    norm: Literal["group_std"] | None = None  # of this variant; no other has an effect
"""),
    ("""\
    std_eps: float = 1e-6  # added to the standard deviation
""", """\
    std_eps: float = 1e-6  # added to the standard deviation
    pass_k: int = 4  # samples of which one must be right
"""),
    ("""\
def advantages(reward, group, norm="group_std", std_eps=1e-6, length=None):
""", """\
def advantages(reward, group, norm="group_std", std_eps=1e-6, length=None, pass_k=4):
"""),
    ("""\
        variance = zeros.index_add(0, group, adv.square()) / (size - 1)
        adv = adv / (variance.sqrt()[group] + std_eps)
""", """\
        require(((reward == 0) | (reward == 1)).all(), "pass@k training needs rewards that are 0 or 1")
        G = int(size.min())
        require(0 < pass_k <= G, f"--pass_k {pass_k}: must be 1 to {G}, the samples of a group")
        all_wrong = torch.ones_like(mean)  # the chance that k samples of the group are all wrong
        for drawn in range(pass_k):
            all_wrong *= (((1 - mean) * size - drawn) / (size - drawn)).clamp(min=0)
        adv = (adv / (1 - mean)[group]) * (all_wrong / (1 - all_wrong)).sqrt()[group]
"""),
    ("""\
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
""", """\
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len, cfg.pass_k)  # (B,)
"""),
]  # fmt: skip
GOLDEN = "reference"
