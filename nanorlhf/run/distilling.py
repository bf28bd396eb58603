"""What distillation needs around its step: responses from a file as a Rollout, the health line of step 0."""

import torch

from nanorlhf.data import encode_pair, pad_responses
from nanorlhf.errors import require
from nanorlhf.rollout import Rollout
from nanorlhf.run.log import health


def require_responses(cfg, rows, tok, max_len):
    """With --from_data, give every row "_pair", its prompt and its "response" as ids with EOS.

    UserError, with file and line, for a row without a response, or with one that exceeds the context: cut, it
    would lack its EOS.
    """
    if not cfg.from_data:
        return
    fits = cfg.data and not cfg.on_policy
    require(fits, "--from_data: learns on the responses of --data; needs --data and --on_policy 0")
    for row in rows:
        at = row["_at"]
        text = row.get("response")
        require(isinstance(text, str), f'{at}: --from_data: the row has no "response", a string, to learn on')
        row["_pair"] = encode_pair(tok, row["prompt"], text, max_len, at)
        require(row["_pair"], f"{at}: prompt and response exceed the context of {max_len} tokens")


def responses_of_data(rows, device):
    """Rows that `require_responses` has seen → their Rollout. Nobody has sampled it: log-probs are 0."""
    pairs = [row["_pair"] for row in rows]
    tokens, _, mask = pad_responses(pairs, device)
    return Rollout(
        tokens=tokens,
        mask=mask,
        logp=torch.zeros(mask.shape, device=device),
        finished=torch.ones(len(rows), dtype=torch.bool, device=device),
        group=torch.arange(len(rows), device=device),
        prompt_len=torch.tensor([len(prompt) for prompt, _ in pairs], device=device),
        rows=rows,
        texts=[row["response"] for row in rows],
    )


def first_signs(metrics, roll, student, cfg):
    """The health line of step 0, before the first update. Dead groups are no sign, as no reward is learnt.

    The ratio is the student's to the sampler's, so it must be 1 where the student has sampled.
    """
    signs = metrics | {"dead": None}
    if cfg.on_policy:
        logp = roll.logp_under(student, cfg.temperature, cfg.tokens_per_microbatch)
        signs["gap"] = (logp - roll.logp).abs().max().item()
    return health(signs, None, int(roll.mask.sum()), ref_is_init=False)
