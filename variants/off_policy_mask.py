"""Off-policy sequence mask: failures far from the policy are left out (DeepSeek-V3.2, arXiv 2512.02556).

    l_it = 0   if Â_i < 0 and 1/|y_i| Σ_t log(π_old / π_θ) > δ

The paper keeps its δ to itself; 0.5 is the example that TRL gives. The weights still count the rows left
out.
When it helps: many updates a rollout, or `--off_policy_steps`. From an answer that the policy would no
longer give it learns nothing about its own mistakes, and pushing it down further is what breaks long runs.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    std_eps: float = 1e-6  # added to the standard deviation
""", """\
    std_eps: float = 1e-6  # added to the standard deviation
    off_policy_delta: float = 0.5  # mean nats a token by which a failure may have become less likely
"""),
    ("""\
    stats = {"clip": (w * is_clipped).sum(), "ratio_max": (ratio.detach() * mask).max()}
""", """\
    length = mask.sum(1, keepdim=True).clamp(min=1)
    drift = -(log_ratio.detach() * mask).sum(1, keepdim=True) / length
    loss = torch.where((adv < 0) & (drift > cfg.off_policy_delta), 0.0, loss)
    stats = {"clip": (w * is_clipped).sum(), "ratio_max": (ratio.detach() * mask).max()}
"""),
    ("""\
    if cfg.ratio == "token":
        loss, stats, logp, entropy, *kl = policy.logprobs(
            tokens, mask, cfg.temperature, chunk_loss, kl_to=kl_to
        )
    else:  # a ratio of whole rows needs all their tokens
        logp, entropy, *kl = policy.logprobs(tokens, mask, cfg.temperature, kl_to=kl_to)
        loss, stats = chunk_loss(logp, entropy, mask)
""", """\
    logp, entropy, *kl = policy.logprobs(tokens, mask, cfg.temperature, kl_to=kl_to)
    loss, stats = chunk_loss(logp, entropy, mask)  # the mean over a row needs all its tokens
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
