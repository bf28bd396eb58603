"""Held-out loss of demonstrations before and after SFT, with its standard error over the demonstrations.

    python -m recipes.smollm2.sft_loss BEFORE AFTER FILE OUT.json       BEFORE, AFTER: model folders

The loss of a demonstration is −log π of its response, EOS included, in nats a token. `change` is the mean
of the differences of the same demonstration under the two models. Its error is smaller than those of the
two means, because a demonstration that is hard for one model is hard for the other.
"""

import torch

from nanorlhf import hub
from nanorlhf.data import encode_demonstrations, microbatches, pad_demonstrations
from nanorlhf.hub.formats import read_rows
from nanorlhf.metrics import mean_se
from nanorlhf.run.folders import write_json
from recipes.smollm2 import command

TOKENS = 4096  # padded tokens that the model reads at once


@torch.no_grad()
def losses(folder, path):
    """→ nats a token of each demonstration of the file, (rows,)."""
    model, tok = hub.load(folder, "language model")
    rows = encode_demonstrations(read_rows(path, "demos"), tok, model.cfg.max_len)
    loss = torch.zeros(len(rows))
    for batch in microbatches([len(ids) for ids, _ in rows], TOKENS):
        some = [rows[i] for i in batch]
        tokens, mask = pad_demonstrations(some, tok, model.device)
        logp, _ = model.logprobs(tokens, mask)  # (B, T), 0 outside the mask
        loss[batch] = -logp.sum(1) / mask.sum(1)
    return loss


def main(before, after, path, out):
    old = losses(before, path)
    new = losses(after, path)
    measured = {"before": old, "after": new, "change": new - old}
    figures = {}
    for name, values in measured.items():
        mean, se = mean_se(values)
        figures[f"loss_{name}"] = mean
        figures[f"loss_{name}_se"] = se
        print(f"loss {name:<8}{mean:8.4f} ± {se:.4f}")
    write_json(out, figures)


if __name__ == "__main__":
    command(main, __doc__)
