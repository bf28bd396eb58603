"""ReMax: the reward of the greedy answer is the baseline (arXiv 2310.10505).

    Â_i = r(x, y_i) − r(x, ŷ),   ŷ the greedy answer to x

When it helps: where few samples of a prompt can be had. The baseline costs one more answer, and no sample
enters the baseline of another. `--group_size 2 --minibatches 1 --loss reinforce` is near the paper, which
draws one sample.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
""", """\
    norm: Literal["group_std"] | None = None  # of this variant; no other has an effect
"""),
    ("""\
        seed = derive_seed(cfg.seed, "rollout", progress["drawn"])
""", """\
        seed = derive_seed(cfg.seed, "rollout", progress["drawn"])
        greedy = score(sample_responses(policy, tok, batch, 1, limit, 0.0, seed))  # (prompts,)
        batch = [row | {"_greedy": value} for row, value in zip(batch, greedy.tolist())]
"""),
    ("""\
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
            weight = mask.sum(1) if cfg.norm == "batch_whiten" else torch.ones_like(adv)
            mean_adv = ((adv * weight).sum() / weight.sum()).item()  # near 0; batch_whiten counts tokens
""", """\
            greedy = reward.new_tensor([row["_greedy"] for row in roll.rows])
            adv = beyond_greedy(reward, greedy)  # (B,)
            mean_adv = None  # need not be near 0: the greedy answer may be better than the samples
"""),
    ("""\
def token_weights(mask, group, cfg):
""", """\
def beyond_greedy(reward, greedy):
    \"\"\"Reward of each response and of the greedy answer to its prompt, (B,) both → advantage (B,).\"\"\"
    return reward - greedy


def token_weights(mask, group, cfg):
"""),
]  # fmt: skip
GOLDEN = "verl 0.9.1"
