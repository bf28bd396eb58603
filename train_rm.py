"""Reward model: Bradley–Terry on preference pairs. The second stage of RLHF.

    P(chosen ≻ rejected) = σ(r(x, y_w) − r(x, y_l))            L(θ) = −mean log σ(r_w − r_l)

The trunk starts from the SFT model; the reward is a linear head on the hidden state of the last token, EOS
("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031, detail 12). The head starts at
N(0, 1/√(D+1)) (detail 11), and after training the bias is set so that reference responses score 0 on average
(detail 15): no scaling.

Without --data the pairs are made here, as a labelling team would make them: two samples of the SFT model per
prompt, and a Bradley–Terry draw on the task's hidden gold score. They stay in the run folder (pairs.jsonl,
pairs_heldout.jsonl); training reads nothing else. Held-out accuracy is against the exact order of gold,
without label noise, and stands beside that of a judge that looks at the length only.

Where right and wrong can be told, a reward model can learn that instead of preferences: of each step
(--kind process) or of the whole response (--kind outcome), from --data. The reward is then a probability,

    r(x, y) = Π_i p_i,   p_i = σ(head at the last token of step i)        L(θ) = −mean log P(label of a step)

the mean over all labelled steps ("Let's verify step by step", arXiv 2305.20050; an outcome is one step).

CPU   python train_rm.py                   34 s on one core; 82 to 89% right, by length alone 53%
GPU   python train_rm.py --data pairs.jsonl --init runs/sft/model --dtype bfloat16        not measured yet
"""

import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from nanorlhf import hub, lora, tasks
from nanorlhf.data import encode_pair, epoch_batches, microbatches, pad, read_jsonl, response_mask
from nanorlhf.errors import derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.model import ScalarModel
from nanorlhf.pairs import encode_pairs, load_rows, require_both
from nanorlhf.run import dist, models, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, lr_at, setup, to_device
from nanorlhf.run.log import Clock

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    task: str = "reviews"  # built-in task; only reviews has preferences (others need --data)
    kind: Literal["preference", "process", "outcome"] = "preference"  # what it learns from
    # JSONL of {"prompt", "response", "labels": [1, 0, null]} for these two: a label a step, null for none
    data: str = ""  # file of preferences (formats: nanorlhf/hub/formats.py), in place of the task's own pairs
    step_end: str = ""  # process: the characters that end a step; the end of the response always does
    references: str = ""  # JSONL of {"prompt", "response"} rows to score 0 on average; empty: chosen ones
    pairs: int = 4000  # pairs to make for the built-in task
    tau: float = 0.5  # temperature of the labels made here: P(a wins) = σ((gold_a − gold_b)/tau); 0: no noise
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    out: str = ""  # run folder; empty: runs/TASK-rm

    steps: int | None = None  # optimizer steps
    batch_size: int = 48  # pairs a step
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    weight_decay: float = 0.1  # AdamW
    lora_rank: int = 0  # rank of adapters on frozen weights (nanorlhf/lora.py); 0: all weights are trained
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 1024  # padded tokens at once, to bound memory; 0: all. Never moves the curve

    eval_every: int = 50  # steps between held-out measurements; 0: only at the end
    save_every: int = 100  # steps between checkpoints; 0: only at the end

    BY_TASK: ClassVar = {
        "reviews": dict(steps=260, lr=1e-3),
        "chain": dict(steps=200, lr=1e-3),
        "countdown": dict(steps=200, lr=1e-3),
    }

    def __post_init__(self):
        self.fill_by_task()
        self.init = self.init or f"runs/{self.task}-sft/model"
        self.out = self.out or f"runs/{self.task}-rm"
        check_ranges(self, ("pairs", "steps", "batch_size", "lr"))
        require(not self.step_end or self.kind == "process", "--step_end: belongs to --kind process")
        require(self.data or self.kind == "preference", f"--kind {self.kind}: give --data, with labels")
        what = f"--task {self.task} has a reward function, no preferences"
        require(self.data or self.task == "reviews", f"{what}; --task reviews has, or give --data")


COLUMNS = (
    "step loss acc margin gnorm lr tok_s s eval/loss eval/acc eval/acc_len_only eval/reward_reference"
).split()
SHOW = ["loss", "acc", "margin", "eval/acc", "gnorm", "lr", "s"]
PANELS = [("loss", "eval/loss"), ("acc", "eval/acc", "eval/acc_len_only"), "margin", "gnorm"]

# ------------------------------------------------------------------------------------------------------------
# Loss


def pairwise_loss(chosen, rejected):
    """Rewards of the chosen and the rejected responses (B,) → scalar, mean −log σ(chosen − rejected).

    logsigmoid, and not the log of sigmoid: at a margin of −200 that would be infinite.
    """
    return -F.logsigmoid(chosen - rejected).mean()  # detail 10


def step_loss(logit, label, denom):
    """Logits (N,) at the ends of the labelled steps, labels (N,) 0 or 1 → scalar, −Σ log P(label) / denom."""
    return F.binary_cross_entropy_with_logits(logit, label, reduction="sum") / denom


def batch_loss(model, rows, pad_id, denom):
    """Pairs, or Judged → loss over denom, margins (n,): above 0 where a pair or a step is judged right."""
    if isinstance(rows[0], Judged):
        logit, label = step_logits(model, rows, pad_id)
        return step_loss(logit, label, denom), (2 * label - 1) * logit
    chosen, rejected = pair_rewards(model, rows, pad_id)
    return pairwise_loss(chosen, rejected) * len(rows) / denom, chosen - rejected


def step_logits(model, rows, pad_id):
    """Judged rows → logits, labels (N,) of all their steps that have a label, row by row."""
    tokens, lengths = pad([row.ids for row in rows], pad_id)
    mask = response_mask([row.prompt for row in rows], lengths, tokens.shape[1])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    logit = model.logits(tokens)[model.step_ends(tokens, mask)]
    label = [math.nan if x is None else x for row in rows for x in row.labels]
    label = torch.tensor(label, dtype=logit.dtype, device=logit.device)
    return logit[~label.isnan()], label[~label.isnan()]


def pair_rewards(model, pairs, pad_id):
    """(chosen ids, rejected ids) rows → two tensors of rewards (B,), from one forward pass."""
    tokens, lengths = pad([w for w, _ in pairs] + [l for _, l in pairs], pad_id)  # detail 6
    return model.rewards(tokens.to(model.device), lengths.to(model.device)).chunk(2)


def gradient(rm, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its loss, stats.

    batch: rows (pairs of ids, or the fields of Judged), pad_id, and denom, the pairs or labelled steps of the
    whole step: any part of its rows then gives its part of the gradient, and of acc and margin.
    """
    rows, denom = batch["rows"], batch["denom"]
    if cfg.kind != "preference":
        rows = [Judged(*row) for row in rows]
    total = right = margin = 0.0
    padded = [len(x) * max(x) for x in map(row_lengths, rows)]  # a pair: two rows of its longer side
    for mb in dist.paced(microbatches(padded, cfg.tokens_per_microbatch), rm.values):
        loss, margins = batch_loss(rm, [rows[i] for i in mb], batch["pad_id"], denom)
        loss.backward()
        total += loss.item()
        right += (margins > 0).sum().item()
        margin += margins.sum().item()
    return total, {"acc": right / denom, "margin": margin / denom}


# ------------------------------------------------------------------------------------------------------------
# Data


class Judged(NamedTuple):
    """A response and what is right in it: ids with EOS, length of the prompt, a label for each step."""

    ids: list[int]
    prompt: int
    labels: list


def load_judged(cfg, tok, step_ids, max_len):
    """→ training rows, held-out rows of --data."""
    rows, parts = read_jsonl(cfg.data, ("prompt", "response"), nonempty=("prompt",)), ([], [])
    for r in rows:
        pair, labels = encode_pair(tok, r["prompt"], r["response"], max_len, r["_at"]), r.get("labels")
        if pair:
            p, y = pair
            steps = 1 + sum(token in step_ids for token in y[:-1])
            fits = isinstance(labels, list) and len(labels) == steps
            fits = fits and all(x in (0, 1, None) for x in labels)
            require(fits, f'--data: {r["_at"]}: "labels" is {labels!r:.80}, expected {steps} of 1, 0, null')
            parts[tasks.held_out(r["prompt"])].append(Judged(p + y, len(p), labels))
    long = len(rows) - sum(map(len, parts))
    if long:
        print(f"dropped {long} of {len(rows)} responses: longer than the context of {max_len} tokens")
    left = [sum(map(units, part)) for part in parts]
    require(all(left), f"--data {cfg.data}: {left[0]} labels are left to train on, {left[1]} are held out")
    return parts


def units(row):
    """What a row adds to the loss's denominator: a pair is one, a judged response its labelled steps."""
    return sum(x is not None for x in row.labels) if isinstance(row, Judged) else 1


def row_lengths(row):
    """Tokens of each of its sequences."""
    return [len(row.ids)] if isinstance(row, Judged) else [len(side) for side in row]


def encode(rows, tok, max_len, what):
    """Rows → (prompt + chosen + EOS, prompt + rejected + EOS) ids; the unusable are dropped, and counted."""
    return [(p + w, p + l) for p, w, l in encode_pairs(rows, tok, max_len, what)]


def load_pairs(cfg, task, policy, tok):
    """→ training pairs, held-out (prompt, chosen, rejected), references: lists of token ids."""
    max_len = policy.cfg.max_len
    train, test = load_rows(cfg, task, policy, tok)
    train, test = encode(train, tok, max_len, "training"), encode_pairs(test, tok, max_len, "held-out")
    require_both(cfg, train, test)
    if cfg.data and not cfg.references:
        return train, test, [chosen for chosen, _ in train[:1024]]
    rows = task.demonstrations(1024, cfg.seed)
    if cfg.references:
        rows = read_rows(cfg.references, "demos", "--references")[:1024]
    pairs = [encode_pair(tok, r["prompt"], r["response"], max_len, r.get("_at", "")) for r in rows]
    references = [p + y for p, y in filter(None, pairs)]
    require(references, f"--references {cfg.references}: every row exceeds the context of {max_len} tokens")
    return train, test, references


# ------------------------------------------------------------------------------------------------------------
# Measuring


def length_only(train, test):
    """Accuracy on `test` of the judge that prefers the longer response, or the shorter if `train` says so."""

    def longer_wins(pairs):
        return sum((len(w) > len(l)) + 0.5 * (len(w) == len(l)) for w, l in pairs) / len(pairs)

    return longer_wins(test) if longer_wins(train) >= 0.5 else 1 - longer_wins(test)


@torch.no_grad()
def evaluate(model, rows, tok):
    denom = sum(map(units, rows))
    parts = [batch_loss(model, rows[i : i + 32], tok.pad_id, denom) for i in range(0, len(rows), 32)]
    losses, margins = zip(*parts)
    acc = (torch.cat(margins) > 0).float().mean().item()  # detail 16
    return {"eval/loss": sum(losses).item(), "eval/acc": acc}


@torch.no_grad()
def normalise(model, references, tok):
    """Set the bias so that the references' mean reward is 0 (detail 15 of N+) → that mean, measured again."""

    def mean():
        batches = (pad(references[i : i + 64], tok.pad_id) for i in range(0, len(references), 64))
        parts = [model.rewards(*(t.to(model.device) for t in batch)) for batch in batches]
        return torch.cat(parts).mean()

    model.reward_bias -= mean()  # detail 15
    return mean().item()


@torch.no_grad()
def log_samples(log, step, model, answers, tok):
    """The rewards of a few held-out (prompt ids, response ids) → samples.jsonl."""
    tokens, lengths = pad([p + y for p, y in answers], tok.pad_id)
    mask = response_mask([len(p) for p, _ in answers], lengths, tokens.shape[1])
    tokens, lengths, mask = (t.to(model.device) for t in (tokens, lengths, mask))
    rows, score = [{"prompt": tok.decode(p)} for p, _ in answers], model.scores(tokens, lengths, mask)
    log.samples(step, rows, [tok.decode(y[:-1]) for _, y in answers], score)


# ------------------------------------------------------------------------------------------------------------
# train


def load_model(cfg, device):
    """→ reward model on the trunk of the SFT model, tokenizer."""
    options = dict(kind="language model", shard=cfg.shard, weights=device.type != "meta")
    hint = f"python train_sft.py --task {cfg.task}"
    policy, tok = models.load_model("--init", cfg.init, hint, **options)
    return *to_device(cfg, device, ScalarModel(policy)), tok


def train(cfg):
    """Train on pairs, or on labels; leaves the reward model in cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    model, tok = load_model(cfg, device)
    lora.add(model, cfg.lora_rank, cfg.dtype)  # as they begin, adapters change nothing of what is sampled
    dist.spread(cfg, model)
    with Run(cfg, COLUMNS, SHOW, PANELS) as run:
        if cfg.kind == "preference":
            data, triples, references = load_pairs(cfg, task, model.trunk, tok)
            test = [(p + w, p + l) for p, w, l in triples]
            length_judge = {"eval/acc_len_only": length_only(data, test)}
            shown = [(p, y) for p, *both in triples[:4] for y in both]  # chosen first
        else:
            ends = [i for i in range(tok.vocab_size) if set(tok.decode([i])[-1:]) & set(cfg.step_end)]
            model.step_ids, length_judge = ends, {}
            data, test = load_judged(cfg, tok, ends, model.cfg.max_len)
            shown = [(row.ids[: row.prompt], row.ids[row.prompt :]) for row in test[:8]]
        betas, decay = (0.9, 0.99), cfg.weight_decay
        opt = adamw(model.parameters(), device, lr=cfg.lr, betas=betas, weight_decay=decay)
        start, _ = run.start({"model": model}, opt)
        for step in range(start, cfg.steps):
            clock = Clock()
            order = epoch_batches(len(data), cfg.batch_size, derive_seed(cfg.seed, "data"), step)
            rows = [data[i] for i in order]
            denom = max(sum(map(units, rows)), 1)  # the denominator is the step's, however it is cut
            opt.zero_grad()
            batch = {"rows": [list(row) for row in rows], "denom": denom, "pad_id": tok.pad_id}
            lengths = [sum(row_lengths(row)) for row in rows]
            total, stats = dist.total(*gradient(model, dist.share(batch, lengths), cfg))
            gnorm = dist.clip(model.parameters(), cfg.max_grad_norm)
            run.check(step, total, gnorm, f"a batch of {len(rows)} rows", batch, [model])
            lr = lr_at(step, cfg.steps, cfg.lr)
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()

            done = step + 1
            metrics = {"loss": total, "gnorm": gnorm, "lr": lr} | stats
            metrics |= clock.columns(sum(lengths))
            due = done == cfg.steps or (cfg.eval_every and done % cfg.eval_every == 0)
            if due:
                metrics |= evaluate(model, test, tok) | length_judge
            if done == cfg.steps and cfg.kind == "preference":
                metrics["eval/reward_reference"] = normalise(model, references, tok)
            if due:
                log_samples(run.log, step, model, shown, tok)
            run.log.row(step, metrics)
            run.checkpoint(done, lambda: hub.save(model, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rm(cfg, load_model))


if __name__ == "__main__":
    sys.exit(main())
