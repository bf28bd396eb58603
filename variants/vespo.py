"""VESPO: a smooth weight of the whole response's ratio in place of the clip (arXiv 2602.10693).

    l_it = −φ(W_i) Â_i log π(y_it),   φ(W) = W^k e^{λ (1 − W)},   W_i = Π_t π_θ / π_old

No gradient passes through φ, which is 1 at W = 1 and falls to 0 on both sides: k, λ = 2, 3 where Â_i ≥ 0,
and 3, 2 where it is negative.
When it helps: stale samples. The product is the right weight of a response, and its tail, which made it
unusable, is cut off smoothly.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
""", """\
    loss: Literal["clip"] | None = None  # surrogate; the others have no line of this variant
"""),
    ("""\
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
""", """\
        log_product = (log_ratio.detach() * mask).sum(1, keepdim=True).clamp(-20, 20)
        k = torch.where(adv >= 0, 2.0, 3.0)
        decay = torch.where(adv >= 0, 3.0, 2.0)
        weight = (k * log_product + decay * (1 - log_product.exp())).exp()
        loss = -weight * adv * logp
        is_clipped = torch.zeros_like(mask)
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
