"""Overlong filter: a response that was cut at the limit gives no gradient (DAPO, arXiv 2503.14476).

    w_it = 0   if response i was cut

The mean over tokens (`--agg token`) is then one over the tokens of finished responses. A mean over responses
still divides by all of them, as in TRL. The reward of a cut response still enters the mean of its group.
When it helps: long reasoning, cut by a limit that is tight. A cut answer is scored as wrong, although
nothing in it may be, and the policy learns to fear length. Where answers should become shorter, it hides
what is wrong.
"""

TRAINER = "train_grpo.py"
CHANGES = [
    ("""\
def token_weights(mask, group, cfg):
""", """\
def token_weights(mask, group, cfg, finished):
"""),
    ("""\
    w = mask.float()
""", """\
    w = mask.float() * finished[:, None]
"""),
    ("""\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
""", """\
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv, "finished": roll.finished}
"""),
    ("""\
                    minibatch["w"] = token_weights(minibatch["mask"], minibatch["group"], cfg)
                    minibatch["w_sum"] = minibatch["w"].sum().item()
""", """\
                    finished = minibatch["finished"]
                    minibatch["w"] = token_weights(minibatch["mask"], minibatch["group"], cfg, finished)
                    minibatch["w_sum"] = minibatch["w"].sum().item() or 1.0  # 0 where none is finished
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
