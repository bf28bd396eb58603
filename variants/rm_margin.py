"""Llama 2's margin: pairs that differ clearly must be apart by more (arXiv 2307.09288).

    L = −log σ(r_w − r_l − m),   m ≥ 0 says how much better the chosen response is

m is the number "margin" of a row of --data, as in TRL. Llama 2 has four degrees, from 0 for "negligibly
better" to 1, or to 3, for "significantly better".
When it helps: the labels come with degrees.
"""

TRAINER = "train_rm.py"
CHANGES = [
    ("""\
from nanorlhf.data import encode_demonstrations, epoch_batches, microbatches, pad, pad_responses
""", """\
from nanorlhf.data import encode_demonstrations, encode_pair, epoch_batches, microbatches, pad, pad_responses
"""),
    ("""\
def pairwise_loss(chosen, rejected):
""", """\
def pairwise_loss(chosen, rejected, margin=0.0):
"""),
    ("""\
    return -F.logsigmoid(chosen - rejected).mean()  # detail 10
""", """\
    return -F.logsigmoid(chosen - rejected - margin).mean()
"""),
    ("""\
    loss = pairwise_loss(chosen, rejected) * len(rows) / denom
""", """\
    margin = chosen.new_tensor([model.trunk.margins[str(row)] for row in rows])
    loss = pairwise_loss(chosen, rejected, margin) * len(rows) / denom
"""),
    ("""\
    require_both(cfg, train, test)
""", """\
    require_both(cfg, train, test)
    policy.margins = {}
    for row in train_rows + test_rows:
        known = type(row.get("margin")) in (int, float)
        require(known, f'--data: {row.get("_at", "made here")}: needs "margin", a number')
        chosen = encode_pair(tok, row["prompt"], row["chosen"], policy.cfg.max_len)
        rejected = encode_pair(tok, row["prompt"], row["rejected"], policy.cfg.max_len)
        if chosen and rejected:
            policy.margins[str((*chosen, rejected[1]))] = row["margin"]
"""),
]  # fmt: skip
GOLDEN = "trl 1.16.0"
