"""WPO: off-policy pairs count by how likely the policy of today is to write them (arXiv 2406.11827).

    L = w(y_w) w(y_l) (−log σ(βΔ)),   w(y) = exp (1/|y| Σ_t log (π(y_t) / Σ_v π(v)²)),   w has no gradient

Dividing by Σ_v π(v)², the mean probability of a token that the policy samples, gives such tokens a weight of
about 1 (the paper's sampled alignment). log Σ_v π(v)² is 2 log π(y_t) − log π_½(y_t), where π_½ is the policy
at temperature ½, so that no logits are stored.
When it helps: the pairs were written by another model.
"""

TRAINER = "train_dpo.py"
CHANGES = [
    ("""\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
""", """\
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "dpo_nll"] = "dpo"  # above
"""),
    ("""\
    ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0,
""", """\
    ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0, sharp_w=None, sharp_l=None,
"""),
    ("""\
    return losses, chosen, rejected


""", """\
    weight = torch.exp((sharp_w - logp_w) / len_w + (sharp_l - logp_l) / len_l)
    return weight.detach() * losses, chosen, rejected


"""),
    ("""\
def response_logps(model, rows):
""", """\
def response_logps(model, rows, temperature=1.0):
"""),
    ("""\
    return model.logprobs(tokens, mask)[0].sum(1)
""", """\
    return model.logprobs(tokens, mask, temperature)[0].sum(1)
"""),
    ("""\
def pair_logps(model, examples):
""", """\
def pair_logps(model, examples, temperature=1.0):
"""),
    ("""\
    return response_logps(model, rows).view(-1, 2)
""", """\
    return response_logps(model, rows, temperature).view(-1, 2)
"""),
    ("""\
            simpo_ratio=cfg.simpo_ratio,
""", """\
            simpo_ratio=cfg.simpo_ratio,
            sharp_w=sharp[:, 0],
            sharp_l=sharp[:, 1],
"""),
    ("""\
        logp_w, logp_l = pair_logps(policy, examples).unbind(1)  # (B,), (B,)
""", """\
        logp_w, logp_l = pair_logps(policy, examples).unbind(1)  # (B,), (B,)
        with torch.no_grad():
            sharp = pair_logps(policy, examples, temperature=0.5)  # (B, 2)
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
