"""Process reward model: which step of a response is right, learnt from a label for each step.

    p_i = σ(head at the last token of step i)          L(θ) = −mean log P(label of a step)
    r(x, y) = Π_i p_i                                  P(label) = p_i for 1, 1 − p_i for 0

The mean is over all labelled steps of the optimizer step ("Let's verify step by step", arXiv 2305.20050).
With --kind outcome the response is one step, right or wrong as a whole. The trunk starts from the SFT model,
as in train_rm.py. The reward is a probability, so no bias is set after training.

Where we deviate: the paper has a third label, neutral. Here null stands for it, and the loss leaves it out.

With --step_end . this row of --data has three steps. Two end at a full stop, the third at EOS:

    {"prompt": "2+3+4=", "response": "2+3=5.5+4=9.", "labels": [1, 1, 1]}

CPU   python train_prm.py --data solutions.jsonl --step_end .
      9 s on one core with --task chain and 4,000 sums of labs/process_reward.py; 89% of held-out labels right
GPU   python train_prm.py --data solutions.jsonl --step_end . --init runs/sft/model --dtype bfloat16
      not measured yet
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F

import train_rm
from nanorlhf import lora
from nanorlhf.data import encode_pair, read_split
from nanorlhf.errors import require
from nanorlhf.hub.files import read_jsonl
from nanorlhf.run import dist
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import check_ranges, run_cli
from nanorlhf.run.device import setup
from train_rm import PANELS, SHOW, Optimisation, evaluate, fit, load_model, log_samples, to_batch

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Optimisation):
    # data
    task: str = ""  # built-in task: reviews (the default), chain or countdown; its --steps and --lr
    data: str = ""  # JSONL of {"prompt", "response", "labels": [1, 0, null]}, a label a step, null for none
    step_end: str = ""  # process: the characters that end a step; the end of the response always does
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    out: str = ""  # run folder; empty: runs/FILE-prm

    # method
    kind: Literal["process", "outcome"] = "process"  # labels of each step, or one of the whole response

    def __post_init__(self):
        self.fill("prm")
        require(not self.skip_bad_rows, "--skip_bad_rows: a row of labels that is bad must be mended")
        check_ranges(self, ("steps", "batch_size", "lr"))
        require(not self.step_end or self.kind == "process", "--step_end: belongs to --kind process")


COLUMNS = "step loss acc margin gnorm lr tok_s s eval/loss eval/acc".split()
NO_LABEL = -1  # of a token at which no labelled step ends

# ------------------------------------------------------------------------------------------------------------
# Loss


def step_loss(logit, label, denom):
    """Logits (N,) at the ends of the labelled steps, labels (N,) 0 or 1 → scalar, −Σ log P(label) / denom.

    Both steps here are right, the model is undecided about the first: (0.693 + 0.127) / 2.

    >>> from torch import tensor
    >>> round(step_loss(tensor([0.0, 2.0]), tensor([1.0, 1.0]), denom=2).item(), 3)
    0.41
    """
    return F.binary_cross_entropy_with_logits(logit, label, reduction="sum") / denom


def judged_loss(model, rows, denom):
    """(prompt, response, labels) rows → the sum of the labelled steps' losses / denom, their margins (N,).

    labels has one entry for each token, see `label_tokens`. A margin is above 0 if a step is judged right.
    """
    ids = [prompt + response for prompt, response, _ in rows]
    tokens, _ = to_batch(model, ids)  # (B, T)
    labels, _ = to_batch(model, [row[2] for row in rows], NO_LABEL)  # (B, T)
    ends = labels != NO_LABEL
    logit = model.logits(tokens)[ends]  # (N,)
    label = labels[ends].to(logit.dtype)
    return step_loss(logit, label, denom), (2 * label - 1) * logit


def gradient(rm, batch, cfg):
    """The gradient of one optimizer step, as in train_rm.py, where rows are (prompt, response, labels)."""
    return train_rm.gradient(rm, batch, cfg, judged_loss)


# ------------------------------------------------------------------------------------------------------------
# Data


def step_ends(prompt, response, step_ids):
    """Where the steps of a response end in prompt + response: at each id of step_ids, and at the last token.

    >>> step_ends([4, 9], [5, 9, 6, 0], step_ids=[9])
    [3, 5]
    """
    ids = prompt + response
    last = len(ids) - 1
    return [i for i in range(len(prompt), last) if ids[i] in step_ids] + [last]


def label_tokens(ends, labels):
    """Labels of steps that end at `ends` → a label for each token, NO_LABEL where no labelled step ends.

    >>> label_tokens(ends=[2, 3, 5], labels=[1, None, 0])
    [-1, -1, 1, -1, -1, 0]
    """
    out = [NO_LABEL] * (ends[-1] + 1)
    for end, label in zip(ends, labels):
        if label is not None:
            out[end] = label
    return out


def n_labels(rows):
    """(prompt, response, labels) rows → the number of steps that have a label.

    >>> n_labels([([4], [5, 6, 0], [-1, -1, 1, 0]), ([4], [5, 0], [-1, -1, 1])])
    3
    """
    return sum(label != NO_LABEL for _, _, labels in rows for label in labels)


def load_judged(cfg, tok, step_ids, max_len):
    """→ training, held-out rows of --data: prompt ids, response ids with EOS, a label for each token."""
    read = partial(read_jsonl, required=("prompt", "response"), nonempty=("prompt",))
    train, test = [encode_judged(rows, tok, step_ids, max_len) for rows in read_split(cfg, read)]
    require(
        n_labels(train) and n_labels(test),
        f"--data {cfg.data}: {n_labels(train)} labels are left to train on, {n_labels(test)} are held out"
    )
    cfg.fill_steps(train)
    return train, test


def encode_judged(rows, tok, step_ids, max_len):
    """→ prompt ids, response ids with EOS, a label for each token; rows beyond max_len tokens are dropped."""
    judged = []
    for row in rows:
        pair = encode_pair(tok, row["prompt"], row["response"], max_len, row["_at"])
        if pair is None:
            continue
        ends = step_ends(*pair, step_ids)
        labels = row.get("labels")
        fits = (
            isinstance(labels, list)
            and len(labels) == len(ends)
            and all(label in (0, 1, None) for label in labels)
        )
        expected = f"expected {len(ends)} of 1, 0, null"
        require(fits, f'{row["_at"]}: "labels" is {labels!r:.80}, {expected}')
        judged.append((*pair, label_tokens(ends, labels)))
    if len(judged) < len(rows):
        print(f"dropped {len(rows) - len(judged)} of {len(rows)} responses: longer than {max_len} tokens")
    return judged


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Train on labels; leaves the reward model in cfg.out/model → dict of the final metrics."""
    require(cfg.data, f"--kind {cfg.kind}: give --data, with labels")
    device = setup(cfg)
    model, tok = load_model(cfg, device)
    lora.add(model, cfg.lora_rank, cfg.dtype)
    dist.spread(cfg, model)  # one process: as they are; several: all get the same
    with Run(cfg, COLUMNS, SHOW, PANELS, tok) as run:
        model.step_ids = [i for i in range(tok.vocab_size) if tok.decode([i]).endswith(tuple(cfg.step_end))]
        data, test = load_judged(cfg, tok, model.step_ids, model.cfg.max_len)
        shown = [row[:2] for row in test[:8]]  # prompt, response

        def make_batch(rows):
            lengths = [len(labels) for _, _, labels in rows]
            denom = max(n_labels(rows), 1)  # without any label in the batch the loss is 0, not 0 / 0
            return {"rows": rows, "lengths": lengths, "padded": lengths, "denom": denom}

        def measure(step):
            log_samples(run.log, step, model, shown, tok)
            return evaluate(model, test, n_labels(test), judged_loss)

        fit(run, model, tok, data, make_batch=make_batch, gradient=gradient, measure=measure)
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
