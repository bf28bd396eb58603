"""Supervised fine-tuning: next-token loss on demonstrations. It makes the policy that RLHF starts from.

    L(θ) = −1/N · Σ_rows Σ_t log π_θ(y_t | x, y_<t)

N counts the response tokens of the whole optimizer step, EOS included. The loss counts the response only;
`--loss_on_prompt` counts the prompt too, as "The N+ Implementation Details of RLHF with PPO" does (arXiv
2403.17031, detail 9). Prompt and response are tokenized apart and joined as ids, since that is how the policy
will meet them when it samples.

CPU   python train_sft.py                  14 s on one core; held-out loss 6.7 → 0.95 (seed 0)
      python train_sft.py --task chain     14 s; accuracy 0.40 to 0.48 sampled, 0.1 greedy
GPU   python train_sft.py --data demos.jsonl --n_layer 12 --n_head 12 --d_model 768 --max_len 1024
      not measured yet
"""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from nanorlhf import generate, hub, lora, tasks
from nanorlhf.data import encode_demonstration, epoch_batches, microbatches, pack, pad, split_by_hash
from nanorlhf.errors import derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, lr_at, setup, to_device
from nanorlhf.run.log import Clock
from nanorlhf.run.models import load_model
from nanorlhf.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    task: str = "reviews"  # built-in task: reviews, chain or countdown; sets the defaults that differ by task
    data: str = ""  # file of demonstrations (formats: nanorlhf/hub/formats.py), in place of the task's own
    demos: int | None = None  # demonstrations to write for a built-in task
    init: str = ""  # model folder to start from; empty: a new model of the size below
    out: str = ""  # run folder; empty: runs/TASK-sft

    arch: Literal["gpt2", "llama"] = "gpt2"  # of a new model
    n_layer: int | None = None  # layers
    n_head: int = 4  # attention heads
    d_model: int | None = None  # width
    max_len: int | None = None  # context, prompt and response together
    tokenizer: Literal["", "bytes", "chars", "bpe"] = ""  # of a new model; empty: the task's own
    vocab_size: int = 576  # byte-pair ranks to train (fewer where the text has no more pairs)

    steps: int | None = None  # optimizer steps
    batch_size: int | None = None  # demonstrations a step
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    weight_decay: float = 0.1  # AdamW, on matrices only
    lora_rank: int = 0  # rank of adapters on frozen weights (nanorlhf/lora.py); 0: all weights are trained
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    loss_on_prompt: bool = False  # count the prompt's tokens too (detail 9)
    tokens_per_microbatch: int = 1024  # padded tokens at once, to bound memory; 0: all. Never moves the curve
    pack: bool = False  # short demonstrations share a row, unseen by each other: fewer pads, the same curve

    eval_every: int = 100  # steps between held-out measurements; 0: only at the end
    save_every: int = 200  # steps between checkpoints; 0: only at the end

    BY_TASK: ClassVar = {
        "reviews": dict(demos=4000, n_layer=2, d_model=96, max_len=64, steps=300, batch_size=32, lr=6e-3),
        "chain": dict(demos=40000, n_layer=1, d_model=64, max_len=32, steps=800, batch_size=64, lr=5e-3),
        "countdown": dict(demos=30000, n_layer=2, d_model=96, max_len=32, steps=500, batch_size=64, lr=2e-3),
    }

    def __post_init__(self):
        self.fill_by_task()
        self.out = self.out or f"runs/{self.task}-sft"
        check_ranges(self, "demos n_layer n_head d_model max_len vocab_size steps batch_size lr".split())


COLUMNS = ["step", "loss", "len", "gnorm", "lr", "tok_s", "s", "eval/loss", "eval/reward", "eval/greedy"]
SHOW = ["loss", "eval/loss", "gnorm", "lr", "tok_s", "s"]
PANELS = [("loss", "eval/loss"), "gnorm", "lr"]

# ------------------------------------------------------------------------------------------------------------
# Loss


def sft_loss(logp, mask, denom):
    """logp, mask (B, T) → scalar: −Σ logp over the mask / denom, the tokens of the optimizer step."""
    return -(logp * mask).sum() / denom


def token_loss(mask, denom):
    """sft_loss of some tokens, at `at` in (B, T): GPT.logprobs forms its gradient chunk by chunk."""
    return lambda logp, entropy, at: sft_loss(logp, mask[at], denom)


def batch_tensors(rows, tok, device, loss_on_prompt=False):
    """(ids, mask of the assistant's) rows → tokens (B, T), mask (B, T) bool of the tokens the loss counts."""
    tokens, _ = pad([ids for ids, _ in rows], tok.pad_id)  # detail 5
    if loss_on_prompt:  # the first token has nothing before it
        rows = [(ids, [False] + [True] * (len(ids) - 1)) for ids, _ in rows]
    mask, _ = pad([mask for _, mask in rows], False)
    return tokens.to(device), mask.bool().to(device)


def gradient(model, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its loss, stats (here none).

    batch: tokens, mask (B, T), lengths (B,), and denom, the tokens that the whole step's loss counts. So any
    part of the step's rows gives its part of the gradient.
    """
    tokens, mask, lengths, doc = batch["tokens"], batch["mask"], batch["lengths"], None
    if cfg.pack:
        tokens, mask, lengths, doc = pack(tokens, mask, lengths)
    total = 0.0
    for mb in dist.paced(microbatches(lengths, cfg.tokens_per_microbatch), model.logprobs):
        T = int(lengths[mb].max())
        x, m, of_row = tokens[mb, :T], mask[mb, :T], doc[mb, :T] if cfg.pack else None
        loss, logp, _ = model.logprobs(x, m, loss=token_loss(m, batch["denom"]), doc=of_row)
        loss.backward()
        total += sft_loss(logp, m, batch["denom"]).item()
    return total, {}


# ------------------------------------------------------------------------------------------------------------
# Data


def demonstrations(cfg, task):
    """→ training rows, held-out rows of {"prompt", "response"}; a prompt's text alone decides which it is."""
    if not cfg.data:
        return task.demonstrations(cfg.demos, cfg.seed), task.demonstrations(256, cfg.seed, split="test")
    rows = read_rows(cfg.data, "demos", skip_bad=cfg.skip_bad_rows)
    train, test = split_by_hash(rows, tasks.held_out)
    require(train, f"--data {cfg.data}: every prompt falls into the held-out 15%; give more distinct prompts")
    return train, test


def new_tokenizer(cfg, task, rows, test_rows):
    kind = cfg.tokenizer or ("bpe" if cfg.data else task.tokenizer)
    texts = [r[key] for r in rows for key in ("prompt", "response")]
    if kind == "bytes":
        return Tokenizer.from_bytes()
    if kind == "chars":  # an alphabet is no knowledge: the held-out rows' characters belong to it
        texts += [r[key] for r in test_rows for key in ("prompt", "response")]
        return Tokenizer.from_chars("".join(sorted(set("".join(texts)) | set(task.alphabet))))
    return Tokenizer.train_bpe(texts, cfg.vocab_size)


def encode(rows, tok, max_len):
    """Rows → (ids with EOS, mask of the response's); those beyond the context are dropped, and counted."""
    found = [x for r in rows for x in encode_demonstration(tok, r, max_len)]
    kept = [row for row in found if row]
    why = f"longer than the context of {max_len} tokens (--max_len)"
    require(kept or not rows, f"all {len(found)} demonstrations are {why}")
    if len(kept) < len(found):
        print(f"dropped {len(found) - len(kept)} of {len(found)} demonstrations: {why}")
    return kept


@torch.no_grad()
def evaluate(model, tok, task, cfg, test, log, step, full):
    """Held-out loss, and eight samples; with `full`, and where the task has a checker, also its accuracy."""
    out = {}
    if test := test[:256]:
        total = count = 0
        for i in range(0, len(test), 64):
            tokens, mask = batch_tensors(test[i : i + 64], tok, model.device, cfg.loss_on_prompt)
            total += sft_loss(model.logprobs(tokens, mask)[0], mask, 1).item()
            count += mask.sum().item()
        out["eval/loss"] = total / count
        prompts = [ids[: mask.index(True)] for ids, mask in test[:8]]
        room = min(model.cfg.max_len - max(map(len, prompts)), max(sum(mask) for _, mask in test))
        seed = derive_seed(cfg.seed, "samples")
        roll = generate.generate(model, prompts, 1, room, 1.0, tok.eos_id, seed, pad_id=tok.pad_id)
        rows = [{"prompt": tok.decode(p)} for p in prompts]
        log.samples(step, rows, [tok.decode(ids) for ids in roll.responses()], None)
    if full and task.reward and not cfg.data:
        rows = task.prompts("test", 512, cfg.seed)
        prompts, seed = [r["prompt"] for r in rows], derive_seed(cfg.seed, "eval")
        for name, temperature in (("eval/reward", 1.0), ("eval/greedy", 0.0)):
            _, texts = generate.respond(model, tok, prompts, 1, task.max_new_tokens, temperature, seed)
            out[name] = sum(map(task.reward, prompts, texts, rows)) / len(rows)
            if temperature and (why := task.gate(prompts, texts)):
                log.say(why)
        sampled, greedy = out["eval/reward"], out["eval/greedy"]
        log.say(f"held out ({len(rows)} prompts): sampled {sampled:.3f}, greedy {greedy:.3f}")
    return out


# ------------------------------------------------------------------------------------------------------------
# train


def new_model(cfg, tok):
    style = GPTConfig.gpt2 if cfg.arch == "gpt2" else GPTConfig.llama
    size = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, d_model=cfg.d_model, max_len=cfg.max_len)
    return GPT(style(tok.vocab_size, **size))


def load(cfg, device):
    """→ model, tokenizer, training rows and held-out rows of (ids, mask)."""
    task = tasks.get(cfg.task)
    train_rows, test_rows = demonstrations(cfg, task)
    if cfg.init:
        options = dict(kind="language model", shard=cfg.shard, weights=device.type != "meta")
        model, tok = load_model("--init", cfg.init, **options)
    else:
        tok = new_tokenizer(cfg, task, train_rows, test_rows)
        model = new_model(cfg, tok)
    lora.add(model, cfg.lora_rank, cfg.dtype)
    data, test = (encode(rows, tok, model.cfg.max_len) for rows in (train_rows, test_rows))
    return *to_device(cfg, device, model), tok, data, test


def train(cfg):
    """Train on demonstrations; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    model, tok, data, test = load(cfg, device)
    dist.spread(cfg, model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    opt = adamw(groups, device, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)

    with Run(cfg, COLUMNS, SHOW, PANELS) as run:
        start, _ = run.start({"model": model}, opt)
        for step in range(start, cfg.steps):
            clock = Clock()
            order = epoch_batches(len(data), cfg.batch_size, derive_seed(cfg.seed, "data"), step)
            rows = [data[i] for i in order]
            tokens, mask = batch_tensors(rows, tok, device, cfg.loss_on_prompt)  # (B, T)
            lengths = torch.tensor([len(ids) for ids, _ in rows])
            denom = mask.sum()  # of the whole step: how it is cut into micro-batches must not matter
            opt.zero_grad()
            batch = {"tokens": tokens, "mask": mask, "lengths": lengths, "denom": denom}
            total, _ = dist.total(*gradient(model, dist.share(batch), cfg))
            gnorm = dist.clip(model.parameters(), cfg.max_grad_norm)
            run.check(step, total, gnorm, f"{len(rows)} demonstrations", batch, [model])
            lr = lr_at(step, cfg.steps, cfg.lr)
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()

            done = step + 1
            metrics = {"loss": total, "len": denom.item() / len(rows), "gnorm": gnorm, "lr": lr}
            metrics |= clock.columns(denom.item())
            if done == cfg.steps or (cfg.eval_every and done % cfg.eval_every == 0):
                metrics |= evaluate(model, tok, task, cfg, test, run.log, step, full=done == cfg.steps)
            run.log.row(step, metrics)
            run.checkpoint(done, lambda: hub.save(model, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.sft(cfg, load))


if __name__ == "__main__":
    sys.exit(main())
