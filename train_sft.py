"""Supervised fine-tuning: next-token loss on demonstrations. It makes the policy that RLHF starts from.

    L(θ) = −1/N · Σ_rows Σ_t log π_θ(y_t | x, y_<t)

N counts the response tokens of the whole optimizer step, EOS included. The loss counts the response only;
`--loss_on_prompt` counts the prompt too, as "The N+ Implementation Details of RLHF with PPO" does (arXiv
2403.17031, detail 9). Prompt and response are tokenized apart and joined as ids, since that is how the policy
will meet them when it samples.

CPU   python train_sft.py                  14 s on one core; held-out loss 6.7 → 0.95 (seed 0)
      python train_sft.py --task chain     14 s; accuracy 0.40 to 0.48 sampled, 0.1 greedy
GPU   python train_sft.py --data demos.jsonl --n_layer 12 --n_head 12 --d_model 768 --lr 6e-4 --dtype bfloat16
      not measured yet; 85M parameters, with the learning rate of GPT-3 Small (arXiv 2005.14165)
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from tqdm import tqdm

from nanorlhf import hub, lora, tasks
from nanorlhf.data import (
    encode_demonstrations,
    epoch_batches,
    load_demonstrations,
    microbatches,
    pack,
    pad_demonstrations,
    take_rows,
    trim,
)
from nanorlhf.errors import derive_seed, require
from nanorlhf.generate import sample_responses
from nanorlhf.metrics import Figures
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.rewards import evaluate, gate_problem, score_responses
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, clip_gradient, lr_at, set_rate, setup, to_device
from nanorlhf.run.log import Clock, due
from nanorlhf.run.models import load_init, new_tokenizer
from nanorlhf.run.worker import rewards_of

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    # data
    task: str = ""  # built-in task: reviews (the default), chain or countdown; sets many defaults
    data: str = ""  # file of demonstrations (formats: docs/data.md), in place of the task's own
    demos: int | None = None  # demonstrations to write for a built-in task
    init: str = ""  # model folder to start from; empty: a new model of the size below
    out: str = ""  # run folder; empty: runs/TASK-sft, or with --data runs/FILE-sft

    # method
    arch: Literal["gpt2", "llama"] = "gpt2"  # of a new model
    n_layer: int | None = None  # layers
    n_head: int = 4  # attention heads
    d_model: int | None = None  # width
    max_len: int | None = None  # context, prompt and response together; of --data: its longest
    tokenizer: Literal["", "bytes", "chars", "bpe"] = ""  # of a new model; empty: the task's own
    vocab_size: int = 576  # byte-pair ranks to train (fewer where the text has no more pairs)
    loss_on_prompt: bool = False  # count the prompt's tokens too (detail 9)

    # optimisation
    steps: int | None = None  # optimizer steps; of --data: 3 passes, at least 100
    batch_size: int | None = None  # demonstrations a step
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    weight_decay: float = 0.1  # AdamW, on matrices only
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 1024  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve
    pack: bool = False  # short demonstrations share a row, unseen by each other: fewer pads, the same curve

    # evaluation
    eval_every: int = 100  # steps between held-out measurements; 0: only at the end

    # run
    save_every: int = 200  # steps between checkpoints; 0: only at the end

    BY_TASK: ClassVar = {
        "reviews": dict(
            demos=4000,
            n_layer=2,
            d_model=96,
            max_len=64,
            steps=300,
            batch_size=32,
            lr=6e-3,
        ),
        "chain": dict(
            demos=40000,
            n_layer=1,
            d_model=64,
            max_len=32,
            steps=800,
            batch_size=64,
            lr=5e-3,
        ),
        "countdown": dict(
            demos=30000,
            n_layer=2,
            d_model=96,
            max_len=32,
            steps=500,
            batch_size=64,
            lr=2e-3,
        ),
    }

    def __post_init__(self):
        self.fill("sft")
        require(self.init or not self.lora_rank, "--lora_rank: adapters belong to a model; give --init")
        check_ranges(self, "demos n_layer n_head d_model max_len vocab_size steps batch_size lr".split())


COLUMNS = "step loss len gnorm lr tok_s s eval/loss eval/reward eval/greedy".split()
SHOW = ["loss", "eval/loss", "gnorm", "lr", "tok_s", "s"]
PANELS = [("loss", "eval/loss"), "gnorm", "lr"]

# ------------------------------------------------------------------------------------------------------------
# Loss


def sft_loss(logp, mask, denom):
    """logp, mask (B, T) → scalar: −Σ logp over the mask / denom, the tokens of the optimizer step.

    >>> logp = torch.tensor([[0.0, -1.0, -2.0]])
    >>> sft_loss(logp, torch.tensor([[0, 1, 1]]), denom=2)
    tensor(1.5000)
    """
    return -(logp * mask).sum() / denom


def gradient(model, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its figures.

    batch: tokens, mask (B, T), lengths (B,), and denom, the tokens that the whole step's loss counts. So any
    part of the step's rows gives its part of the gradient.
    """

    def chunk_loss(logp, entropy, chunk):
        """chunk (B, T) marks the tokens whose logits are at hand: their part of the loss needs no others."""
        return sft_loss(logp, chunk, batch["denom"]), {}

    if cfg.pack:
        names = ("tokens", "mask", "lengths", "doc")
        packed = pack(batch["tokens"], batch["mask"], batch["lengths"])
        batch = batch | dict(zip(names, packed))
    figures = Figures(loss="sum")
    cut = microbatches(batch["lengths"], cfg.tokens_per_microbatch)
    for rows in dist.paced(cut, model.logprobs):  # one process: as they are; several: equally many
        mb = trim(take_rows(batch, rows))
        doc = mb.get("doc")
        loss, *_ = model.logprobs(mb["tokens"], mb["mask"], loss=chunk_loss, doc=doc)
        loss.backward()
        figures.add_tensors({"loss": loss})
    return figures.read()


# ------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def held_out_loss(model, rows, tok, cfg):
    """Mean loss per token over the held-out rows, 64 at a time."""
    total = 0.0
    count = 0
    for i in range(0, len(rows), 64):
        some = rows[i : i + 64]
        tokens, mask = pad_demonstrations(some, tok, model.device, cfg.loss_on_prompt)
        logp, _ = model.logprobs(tokens, mask)
        total += sft_loss(logp, mask, 1).item()
        count += mask.sum().item()
    return total / count


def log_samples(model, rows, tok, cfg, log, step):
    """One response to each of the first eight held-out rows, of 64 tokens at most → samples.jsonl."""
    ids = [ids[: mask.index(True)] for ids, mask in rows[:8]]
    prompts = [{"prompt": tok.decode(ids), "_ids": ids} for ids in ids]
    longest = max(sum(mask) for _, mask in rows)
    room = model.cfg.max_len - max(map(len, ids))
    seed = derive_seed(cfg.seed, "samples")
    roll = sample_responses(model, tok, prompts, 1, min(room, longest, 64), 1.0, seed)
    log.samples(step, prompts, roll.texts, None)


def accuracy(model, tok, task, cfg):
    """Share of right answers on held-out prompts, and whether RL could start from here → metrics."""
    rows = task.prompts("test", 512, cfg.seed)
    limit = task.max_new_tokens
    score = partial(score_responses, rm=None, rewards=rewards_of(task, []))
    metrics = evaluate(model, tok, rows, score, 1.0, cfg.seed, limit)
    problem = gate_problem(model, tok, task, limit, cfg.seed)
    if problem:
        tqdm.write(problem)
    return metrics


# ------------------------------------------------------------------------------------------------------------
# train


def new_model(cfg, tok):
    new_config = getattr(GPTConfig, cfg.arch)  # GPTConfig.gpt2 or GPTConfig.llama
    size = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, d_model=cfg.d_model, max_len=cfg.max_len)
    return GPT(new_config(tok.vocab_size, **size))


def load(cfg, device):
    """→ model, tokenizer, training rows and held-out rows of (ids, mask)."""
    task = tasks.get(cfg.task)
    train_rows, test_rows = load_demonstrations(cfg, task)
    if cfg.init:
        model, tok = load_init(cfg, device)
    else:
        tok = new_tokenizer(cfg, task, train_rows, test_rows)
        model = new_model(cfg, tok)
    lora.add(model, cfg.lora_rank, cfg.dtype)
    data = encode_demonstrations(train_rows, tok, model.cfg.max_len)
    test = encode_demonstrations(test_rows, tok, model.cfg.max_len)
    cfg.fill_steps(data)
    to_device(cfg, device, model)
    return model, tok, data, test if cfg.eval_data else test[: cfg.held_out]


def train(cfg):
    """Train on demonstrations; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    model, tok, data, test = load(cfg, device)
    dist.spread(cfg, model)  # one process: as they are; several: all get the same
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    opt = adamw(groups, device, lr=cfg.lr, betas=(0.9, 0.99))

    with Run(cfg, COLUMNS, SHOW, PANELS, tok) as run:
        start, _ = run.start({"model": model}, opt)
        seed = derive_seed(cfg.seed, "data")
        if test and start == 0:
            loss = held_out_loss(model, test, tok, cfg)
            run.log.say(f"held-out loss before the first step: {loss:.3f} ({len(test)} rows)")
        for step in range(start, cfg.steps):
            # ---- batch
            clock = Clock()
            order = epoch_batches(len(data), cfg.batch_size, seed, step)
            rows = [data[i] for i in order]
            tokens, mask = pad_demonstrations(rows, tok, device, cfg.loss_on_prompt)  # (B, T)
            lengths = torch.tensor([len(ids) for ids, _ in rows])
            denom = mask.sum()  # of the whole step: how it is cut into micro-batches must not matter
            batch = {"tokens": tokens, "mask": mask, "lengths": lengths, "denom": denom}

            # ---- loss and update
            opt.zero_grad()
            share = dist.share(batch)  # one process: all of it; several: this one's rows
            update = dist.whole_step(gradient(model, share, cfg), model)  # one process: as it is
            loss = update["loss"]
            gnorm = clip_gradient(model, cfg.max_grad_norm)
            run.check(step, loss, gnorm, f"{len(rows)} demonstrations", batch, [model])
            lr = set_rate(opt, lr_at(step, cfg.steps, cfg.lr))
            opt.step()

            # ---- one log line
            n_tokens = denom.item()
            metrics = clock.columns(n_tokens)
            metrics |= {"loss": loss, "len": n_tokens / len(rows), "gnorm": gnorm, "lr": lr}
            done = step + 1
            last = done == cfg.steps
            if test and (last or due(done, cfg.eval_every)):
                metrics["eval/loss"] = held_out_loss(model, test, tok, cfg)
                log_samples(model, test, tok, cfg, run.log, step)
            if last and task.reward and not cfg.data:
                metrics |= accuracy(model, tok, task, cfg)
            run.log.row(step, metrics)
            run.checkpoint(done, lambda: hub.save(model, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.sft(cfg, load))


if __name__ == "__main__":
    sys.exit(main())
