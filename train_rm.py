"""Reward model: Bradley–Terry on preference pairs. The second stage of RLHF.

    P(chosen ≻ rejected) = σ(r(x, y_w) − r(x, y_l))            L(θ) = −mean log σ(r_w − r_l)

The trunk starts from the SFT model. The reward is a linear head on the hidden state of the last token, EOS
("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031, detail 12). The head starts at
N(0, 1/√(D+1)) (detail 11). After training the bias is set so that reference responses score 0 on average
(detail 15). The reward is shifted, never scaled.

Without --data the pairs are made here, as a labelling team would make them: two samples of the SFT model per
prompt, and a Bradley–Terry draw on the task's hidden gold score. They stay in the run folder (pairs.jsonl,
pairs_heldout.jsonl). Training reads nothing else. Held-out accuracy is measured against the exact order of
gold, without label noise, and is printed beside the accuracy of a judge that looks at the length only.

CPU   python train_rm.py                   34 s on one core; 82 to 89% right, by length alone 53%
GPU   python train_rm.py --data pairs.jsonl --init runs/sft/model --dtype bfloat16
      not measured yet
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from nanorlhf import hub, lora, tasks
from nanorlhf.data import encode_demonstrations, epoch_batches, microbatches, pad, pad_responses
from nanorlhf.errors import blame, derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.metrics import Figures
from nanorlhf.model import ScalarModel
from nanorlhf.pairs import encode_pairs, load_rows, require_both
from nanorlhf.run import dist, models, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, clip_gradient, lr_at, set_rate, setup, to_device
from nanorlhf.run.log import Clock, due

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass(kw_only=True)
class Optimisation(Flags):
    """How a reward model is trained and measured: the flags that train_prm.py has as well."""

    # optimisation
    steps: int | None = None  # optimizer steps; of --data without --task: 1 pass, at least 100
    batch_size: int = 48  # rows a step: pairs, or in train_prm.py labelled responses
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    weight_decay: float = 0.1  # AdamW
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 1024  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve

    # evaluation
    eval_every: int = 50  # steps between held-out measurements; 0: only at the end

    # run
    save_every: int = 100  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = {"lr": 1e-3}
    BY_TASK: ClassVar = {
        "reviews": dict(steps=260),
        "chain": dict(steps=200),
        "countdown": dict(steps=200),
    }


@dataclass
class Config(Optimisation):
    # data
    task: str = ""  # built-in task; only reviews, the default, has preferences (others need --data)
    data: str = ""  # file of preferences (formats: docs/data.md), in place of the task's own pairs
    pairs: int = 4000  # pairs to make for the built-in task
    tau: float = 0.5  # temperature of the labels made here: P(a wins) = σ((gold_a − gold_b)/tau); 0: no noise
    references: str = ""  # JSONL of {"prompt", "response"} rows to score 0 on average; empty: chosen ones
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    out: str = ""  # run folder; empty: runs/TASK-rm, or with --data runs/FILE-rm

    def __post_init__(self):
        self.fill("rm")
        check_ranges(self, ("pairs", "steps", "batch_size", "lr"))
        require(
            self.data or self.task == "reviews",
            f"--task {self.task} has a reward function, no preferences; --task reviews has, or give --data",
        )


COLUMNS = (
    "step loss acc margin gnorm lr tok_s s eval/loss eval/acc eval/acc_len_only eval/reward_reference"
).split()
SHOW = ["loss", "acc", "margin", "eval/acc", "gnorm", "lr", "s"]
PANELS = [
    ("loss", "eval/loss"),
    ("acc", "eval/acc", "eval/acc_len_only"),
    "margin",
    "gnorm",
]

# ------------------------------------------------------------------------------------------------------------
# Loss


def pairwise_loss(chosen, rejected):
    """Rewards of the chosen and the rejected responses (B,) → scalar, mean −log σ(chosen − rejected).

    logsigmoid stays finite where the log of sigmoid is −inf: at a margin of −200 it is −200. Three pairs with
    the margins 2, 0 and −2 lose 0.127, 0.693 and 2.127:

    >>> chosen = torch.tensor([2.0, 0.5, 1.0])
    >>> rejected = torch.tensor([0.0, 0.5, 3.0])
    >>> round(pairwise_loss(chosen, rejected).item(), 3)
    0.982
    """
    return -F.logsigmoid(chosen - rejected).mean()  # detail 10


def to_batch(model, rows, fill=0):
    """Rows of ids → tokens (B, T), lengths (B,) on the model's device. `fill` pads the rows on the right.

    Any id will do, because attention is causal: no token sees a pad behind it.
    """
    tokens, lengths = pad(rows, fill)  # detail 6
    return tokens.to(model.device), lengths.to(model.device)


def pair_rewards(model, rows):
    """(prompt, chosen, rejected) ids → rewards (B,) of the chosen, (B,) of the rejected responses.

    One forward pass: the batch of 2B rows holds all chosen responses, then all rejected ones.
    """
    chosen = [prompt + w for prompt, w, _ in rows]
    rejected = [prompt + l for prompt, _, l in rows]
    tokens, lengths = to_batch(model, chosen + rejected)  # (2B, T), (2B,)
    return model.rewards(tokens, lengths).chunk(2)


def pair_loss(model, rows, denom):
    """(prompt, chosen, rejected) ids → the sum of the pairs' losses / denom, their margins r_w − r_l (B,)."""
    chosen, rejected = pair_rewards(model, rows)
    loss = pairwise_loss(chosen, rejected) * len(rows) / denom
    return loss, chosen - rejected


def gradient(rm, batch, cfg, batch_loss=pair_loss):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → Figures of loss, acc, margin.

    batch: "rows", (prompt, chosen, rejected) ids; "padded", the tokens that each row takes in a padded batch;
    "denom", the number of pairs of the whole step. As denom is the step's, a part of the rows gives its part
    of the gradient and of each figure. train_prm.py brings rows and a batch_loss of its own.
    """
    denom = batch["denom"]
    figures = Figures(loss="sum", acc="sum", margin="sum")
    cut = microbatches(batch["padded"], cfg.tokens_per_microbatch)
    for mb in dist.paced(cut, rm.values):  # one process: as they are; several: equally many
        rows = [batch["rows"][i] for i in mb]
        loss, margin = batch_loss(rm, rows, denom)
        loss.backward()
        figures.add_tensors({"loss": loss, "acc": (margin > 0).sum(), "margin": margin.sum()})
    figures.read()
    figures["acc"] /= denom
    figures["margin"] /= denom
    return figures


# ------------------------------------------------------------------------------------------------------------
# Data


def load_pairs(cfg, task, policy, tok):
    """→ training and held-out (prompt ids, chosen ids, rejected ids); responses end with EOS."""
    train_rows, test_rows = load_rows(cfg, task, policy, tok)
    train = encode_pairs(train_rows, tok, policy.cfg.max_len, "training")
    test = encode_pairs(test_rows, tok, policy.cfg.max_len, "held-out")
    require_both(cfg, train, test)
    cfg.fill_steps(train)
    return train, test


def load_references(cfg, task, train, tok, max_len):
    """→ ids (prompt and response) of at most 1,024 responses that will score 0 on average.

    From --references. Without it: the chosen responses of --data, or the task's demonstrations.
    """
    if cfg.references:
        rows = read_rows(cfg.references, "demos", "--references")[:1024]
    elif cfg.data:
        return [prompt + chosen for prompt, chosen, _ in train[:1024]]
    else:
        rows = task.demonstrations(1024, cfg.seed)
    with blame("--references" if cfg.references else ""):
        return [ids for ids, _ in encode_demonstrations(rows, tok, max_len)]


# ------------------------------------------------------------------------------------------------------------
# Measuring


def longer_wins(rows):
    """Share of (prompt, chosen, rejected) rows whose chosen response is the longer one; a tie counts half."""
    wins = 0.0
    for _, chosen, rejected in rows:
        wins += (len(chosen) > len(rejected)) + (len(chosen) == len(rejected)) / 2
    return wins / len(rows)


def length_only(train, test):
    """Accuracy on `test` of a judge that sees lengths only and learnt from `train` whether longer is better.

    In training the shorter one wins, so the judge prefers it, and is right about one of two:

    >>> length_only(train=[([], [7], [8, 9])], test=[([], [7], [8, 9]), ([], [8, 9], [7])])
    0.5
    """
    if longer_wins(train) >= 0.5:
        return longer_wins(test)
    return 1 - longer_wins(test)


@torch.no_grad()
def evaluate(model, rows, denom, batch_loss=pair_loss):
    """Held-out rows → {"eval/loss", "eval/acc"}: mean loss, and share of the margins above 0."""
    total = 0.0
    margins = []
    for start in range(0, len(rows), 32):
        loss, margin = batch_loss(model, rows[start : start + 32], denom)
        total += loss
        margins.append(margin)
    acc = (torch.cat(margins) > 0).float().mean()  # detail 16
    return {"eval/loss": total.item(), "eval/acc": acc.item()}


def mean_reward(model, rows):
    """Rows of ids, prompt and response → scalar tensor, their mean reward."""
    rewards = []
    for start in range(0, len(rows), 64):
        tokens, lengths = to_batch(model, rows[start : start + 64])
        rewards.append(model.rewards(tokens, lengths))
    return torch.cat(rewards).mean()


@torch.no_grad()
def normalise(model, references):
    """Set the bias so that the references' mean reward is 0 → that mean, measured again."""
    model.reward_bias -= mean_reward(model, references)  # detail 15
    return mean_reward(model, references).item()


@torch.no_grad()
def log_samples(log, step, model, answers, tok):
    """Write (prompt ids, response ids with EOS) and their rewards to samples.jsonl, as texts."""
    tokens, lengths, mask = pad_responses(answers, model.device)
    rewards = model.scores(tokens, lengths, mask)
    rows = [{"prompt": tok.decode(prompt)} for prompt, _ in answers]
    texts = [tok.decode(response[:-1]) for _, response in answers]
    log.samples(step, rows, texts, rewards)


# ------------------------------------------------------------------------------------------------------------
# train


def load_model(cfg, device):
    """→ reward model on the trunk of the SFT model, tokenizer."""
    policy, tok = models.load_init(cfg, device)
    model = ScalarModel(policy)
    to_device(cfg, device, model)
    return model, tok


def fit(run, model, tok, data, *, make_batch, gradient, measure):
    """Take the optimizer steps on `data`, and write a line of the log for each.

    make_batch(rows) → the batch of `gradient`, and in "lengths" the tokens of each row. measure(step) →
    held-out figures.
    """
    cfg = run.cfg
    opt = adamw(
        model.parameters(),
        model.device,
        lr=cfg.lr,
        betas=(0.9, 0.99),
        weight_decay=cfg.weight_decay
    )
    start, _ = run.start({"model": model}, opt)
    seed = derive_seed(cfg.seed, "data")
    for step in range(start, cfg.steps):
        clock = Clock()
        order = epoch_batches(len(data), cfg.batch_size, seed, step)
        batch = make_batch([data[i] for i in order])
        opt.zero_grad()
        part = dist.share(batch)  # one process: all of it; several: this one's rows
        figures = dist.whole_step(gradient(model, part, cfg), model)  # one process: as it is
        gnorm = clip_gradient(model, cfg.max_grad_norm)
        run.check(step, figures["loss"], gnorm, f"a batch of {len(order)} rows", batch, [model])
        lr = set_rate(opt, lr_at(step, cfg.steps, cfg.lr))
        opt.step()

        done = step + 1
        metrics = figures | {"gnorm": gnorm, "lr": lr} | clock.columns(sum(batch["lengths"]))
        if done == cfg.steps or due(done, cfg.eval_every):
            metrics |= measure(step)
        run.log.row(step, metrics)
        run.checkpoint(done, lambda: hub.save(model, tok, f"{cfg.out}/model"))


def train(cfg):
    """Train on pairs; leaves the reward model in cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    model, tok = load_model(cfg, device)
    lora.add(model, cfg.lora_rank, cfg.dtype)  # adapters start at 0, so pairs are sampled from the SFT model
    dist.spread(cfg, model)  # one process: as they are; several: all get the same
    with Run(cfg, COLUMNS, SHOW, PANELS, tok) as run:
        data, test = load_pairs(cfg, task, model.trunk, tok)
        references = load_references(cfg, task, data, tok, model.cfg.max_len)
        acc_len_only = length_only(data, test)
        shown = [(prompt, response) for prompt, *pair in test[:4] for response in pair]  # chosen first

        def make_batch(rows):
            sides = [(len(p + w), len(p + l)) for p, w, l in rows]
            lengths = [sum(pair) for pair in sides]
            padded = [2 * max(pair) for pair in sides]
            return {"rows": rows, "lengths": lengths, "padded": padded, "denom": len(rows)}

        def measure(step):
            metrics = evaluate(model, test, len(test)) | {"eval/acc_len_only": acc_len_only}
            if step + 1 == cfg.steps:
                metrics["eval/reward_reference"] = normalise(model, references)
            log_samples(run.log, step, model, shown, tok)
            return metrics

        fit(run, model, tok, data, make_batch=make_batch, gradient=gradient, measure=measure)
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rm(cfg, load_model, load_pairs))


if __name__ == "__main__":
    sys.exit(main())
