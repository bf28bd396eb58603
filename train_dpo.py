"""DPO: preferences without a reward model. The policy is its own: r(x, y) = β log π(y|x)/π_ref(y|x).

    h = log π_θ(y|x) − log π_ref(y|x),   a = log π_θ(y|x) / |y|,   Δ = h_w − h_l       w: chosen, l: rejected

    --loss dpo      −log σ(βΔ)                                                         arXiv 2305.18290
           cdpo     −(1−ε) log σ(βΔ) − ε log σ(−βΔ)             labels flip with ε     the same authors, 2023
           robust   (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε)  unbiased under flips   2403.00409
           ipo      (Δ − 1/2β)²                                 a margin to reach      2310.12036
           hinge    max(0, 1 − βΔ)                                                     2305.10425, 2309.06657
           simpo    −log σ(β (a_w − a_l − γ/β))                 no reference           2405.14734
           orpo     −a_w − λ log σ(logit e^a_w − logit e^a_l)   no reference           2403.07691
           kto      1 − σ(β (h_w − z0)), 1 − σ(β (z0 − h_l))    no pairs needed        2402.01306
           dpo_nll  dpo − α a_w                                 holds on to y_w        2404.19733

The loss is the mean over the pairs of the optimizer step. log π(y|x) is the *sum* over the response and its
EOS. Published codes disagree on IPO: most take the sum, TRL and HALOs the mean per token (`--ipo_mean`). z0
of KTO estimates the KL: max(0, mean h) over responses to *other* prompts, a constant. The reference never
changes, so its log-probs are computed once, before training.

`--online K` makes the pairs in K rounds: `group_size` samples of the current policy per prompt, best against
worst, ranked by a reward function, a reward model or the policy itself (`--judge self`): then the score is
β log π/π_ref, DPO's own reward, of the policy as it stands at the round's start. A policy that equals its
reference has no opinion, so the first round of `--judge self` trains on labelled pairs.

Where we deviate: AdamW for the paper's RMSprop, and a learning rate that suits small models; a tie counts
half in `acc`; KTO's mismatched responses stand half the data away, not one place further in the batch.

CPU   python train_dpo.py                  50 s on one core; gold + 1.8 to + 2.0 at a KL of 4 to 4.5
      python train_dpo.py --online 3 --judge self --out runs/reviews-dpo-self
GPU   python train_dpo.py --data pairs.jsonl --init runs/sft/model --beta 0.1 --lr 1e-6 --dtype bfloat16
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from nanorlhf import generate, hub, tasks
from nanorlhf.data import epoch_batches, pad, read_jsonl, response_mask
from nanorlhf.errors import derive_seed, require
from nanorlhf.metrics import mean_se
from nanorlhf.pairs import KEYS, Example, by_budget, load_examples, to_examples, write_first
from nanorlhf.rewards import fresh_samples, load_prompts, score_responses
from nanorlhf.run import dist, plan, worker
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, freeze, lr_at, setup
from nanorlhf.run.log import Clock
from nanorlhf.run.models import load_models

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    task: str = "reviews"  # built-in task; only reviews has preferences (others need --data or --online)
    data: str = ""  # file of preferences (formats: nanorlhf/hub/formats.py); with kto also of labelled ones
    reward: list[str] = field(default_factory=list)  # online: path/to/file.py:name, or :name*0.2; repeatable
    rm: str = ""  # online: reward model folder; without any judge: runs/TASK-rm/model, or the task's function
    judge: Literal["", "self"] = ""  # online: self ranks by the policy's own β log π/π_ref
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init
    out: str = ""  # run folder; empty: runs/TASK-dpo

    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
    beta: float | None = None  # reward per nat, the KL coefficient (simpo: 2, ipo: 0.1, online: 1)
    label_smoothing: float | None = None  # ε: share of labels taken to be flipped
    ipo_mean: bool = False  # ipo on log-probs per token instead of sums
    simpo_ratio: float = 0.5  # γ/β of simpo: the margin per token
    orpo_lam: float = 0.1  # λ of orpo
    dpo_nll_coef: float = 1.0  # α of dpo_nll
    kto_lam_d: float = 1.0  # weight of kto's liked responses
    kto_lam_u: float = 1.0  # weight of kto's disliked responses

    pairs: int = 8000  # pairs to make for the built-in task; online: prompts to sample for, in all rounds
    tau: float = 0.5  # temperature of the labels made here: P(a wins) = σ((gold_a − gold_b)/tau); 0: no noise
    online: int = 0  # rounds of fresh pairs; 0: offline
    online_ref: Literal["fixed", "round"] = "fixed"  # of the loss: --ref, or the policy at the round's start
    group_size: int = 4  # online: samples per prompt
    no_eos_score: float | None = None  # online: score of a response that never ends
    temperature: float = 1.0  # online: of sampling; log-probs are always those at 1
    max_new_tokens: int | None = None  # response length at most, EOS included, when sampling

    steps: int | None = None  # optimizer steps, divided among the rounds
    batch_size: int = 32  # pairs a step (kto: responses)
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    weight_decay: float = 0.0  # AdamW; it pulls the policy to 0, not to the reference
    lora_rank: int = 0  # rank of adapters on frozen weights (nanorlhf/lora.py); 0: all weights are trained
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 1024  # padded tokens at once, to bound memory; 0: all. Never moves the curve

    eval_prompts: int = 128  # held-out prompts to sample for kl, entropy, len and stop
    eval_every: int = 50  # steps between these, and held-out pairs; 0: before the first and after the last
    save_every: int = 100  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = {"label_smoothing": "0.1 with cdpo and robust, else 0"}
    BY_TASK: ClassVar = {
        "reviews": dict(steps=300, lr=5e-4, beta=0.3, max_new_tokens=40, no_eos_score=-1.0),
        "chain": dict(steps=120, lr=5e-4, beta=0.1, max_new_tokens=11, no_eos_score=0.0),
        "countdown": dict(steps=300, lr=2e-4, beta=0.1, max_new_tokens=6, no_eos_score=0.0),
    }

    def __post_init__(self):
        if self.beta is None:
            self.beta = OWN_BETA.get(self.loss, 1.0 if self.online else None)
        self.fill_by_task()
        self.init = self.init or f"runs/{self.task}-sft/model"
        self.ref = self.ref or self.init
        self.out = self.out or f"runs/{self.task}-dpo"
        if (smooth := self.label_smoothing) is None:
            self.label_smoothing = smooth = 0.1 * (self.loss in ("cdpo", "robust"))
        above_zero = "pairs group_size max_new_tokens steps batch_size eval_prompts lr beta temperature"
        check_ranges(self, [*above_zero.split(), "max_grad_norm"], any_sign=("seed", "no_eos_score"))
        require(smooth < 0.5, f"--label_smoothing {smooth}: must be below 0.5, where labels say nothing")
        require(not smooth or self.loss in SMOOTHED, f"--label_smoothing: not with --loss {self.loss}")
        judges = bool(self.reward) + bool(self.rm) + bool(self.judge)
        require(judges <= 1, "--reward, --rm and --judge: give one of the three")
        require(self.online or not judges, "--reward, --rm and --judge rank fresh samples: add --online 3")
        if self.online:
            require(self.group_size > 1, "--group_size 1: best against worst needs at least 2 samples")
            require(min(self.steps, self.pairs) >= self.online, "--online: more than --steps or --pairs")
            if not (judges or tasks.get(self.task).reward):
                self.rm = f"runs/{self.task}-rm/model"
        require(self.ref != "none", "--ref none: a reference is needed, for the figure kl with every loss")
        labelled = self.task == "reviews" or self.data or (self.online and not self.judge)
        require(labelled, f"--task {self.task} has a reward function, no preferences: add --online 3")


# SimPO's log-probs are per token; IPO's margin is 1/2β. Online: best against worst is labelled without noise,
# and at one β cleaner labels move the policy further.
OWN_BETA = {"simpo": 2.0, "ipo": 0.1}
SMOOTHED, NO_REFERENCE = ("dpo", "cdpo", "robust"), ("simpo", "orpo")
COLUMNS = (
    "step loss acc margin logp_chosen logp_rejected kl entropy len stop reward reward_se dead gnorm lr "
    "tok_s s eval/loss eval/acc eval/reward"
).split()
SHOW = ["loss", "acc", "margin", "logp_chosen", "kl", "eval/acc"]
PANELS = [("loss", "eval/loss"), ("acc", "eval/acc"), "margin", ("logp_chosen", "logp_rejected"), "kl", "len"]

# ------------------------------------------------------------------------------------------------------------
# Losses. Log-probs are (B,), sums over a response's tokens


def preference_loss(logp_w, logp_l, ref_w, ref_l, beta, loss="dpo", label_smoothing=0.0, len_w=None,
                    len_l=None, ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0):
    """Log-probs under policy and reference → losses, rewards of chosen and of rejected, (B,) each.

    ref_w and ref_l may be None for simpo and orpo; lengths (B,) are needed where a mean per token is. The
    rewards carry no gradient: β log π/π_ref, or β log π per token where there is no reference.
    """
    if loss not in ("dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "dpo_nll"):
        raise ValueError(f"loss {loss!r} is not a loss on pairs")
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"label_smoothing has no meaning for {loss}")
    if loss in NO_REFERENCE:
        avg_w, avg_l = logp_w / len_w, logp_l / len_l
        chosen, rejected = beta * avg_w.detach(), beta * avg_l.detach()
        if loss == "simpo":
            return -F.logsigmoid(beta * (avg_w - avg_l - simpo_ratio)), chosen, rejected
        log_odds = (avg_w - log1mexp(avg_w)) - (avg_l - log1mexp(avg_l))
        return -avg_w - orpo_lam * F.logsigmoid(log_odds), chosen, rejected

    h_w, h_l = logp_w - ref_w, logp_l - ref_l
    chosen, rejected = beta * h_w.detach(), beta * h_l.detach()
    if loss == "ipo" and ipo_mean:
        h_w, h_l = h_w / len_w, h_l / len_l
    delta = h_w - h_l
    if loss == "ipo":
        losses = (delta - 1 / (2 * beta)).square()
    elif loss == "hinge":
        losses = F.relu(1 - beta * delta)
    else:
        eps, right, flipped = label_smoothing, -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
        if loss == "robust":
            losses = ((1 - eps) * right - eps * flipped) / (1 - 2 * eps)
        else:
            losses = (1 - eps) * right + eps * flipped
        if loss == "dpo_nll":
            losses = losses - dpo_nll_coef * logp_w / len_w
    return losses, chosen, rejected


def log1mexp(x):
    """log(1 − e^x) for x < 0, exact at both ends; above −1e-6, where fp32 has no digits left, held there."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def kto_loss(logp, ref_logp, label, z0, beta, lam_d=1.0, lam_u=1.0):
    """Responses on their own (B,), label True where they are liked → losses (B,). z0 is a constant."""
    h = logp - ref_logp
    liked = lam_d * (1 - torch.sigmoid(beta * (h - z0)))
    disliked = lam_u * (1 - torch.sigmoid(beta * (z0 - h)))
    return torch.where(label.bool(), liked, disliked)


def response_logps(model, rows, pad_id):
    """(prompt ids, response ids, ...) rows → log π(response | prompt), summed over tokens: (B, responses)."""
    flat = [(row[0], y) for row in rows for y in row[1:]]
    tokens, lengths = pad([p + y for p, y in flat], pad_id)
    mask = response_mask([len(p) for p, _ in flat], lengths, tokens.shape[1])
    logp, _ = model.logprobs(tokens.to(model.device), mask.to(model.device))
    return logp.sum(1).view(len(rows), -1)


@torch.no_grad()
def cache_logps(model, examples, tok, cfg):
    """Log-probs of both responses of each example, (N, 2); no gradients."""
    mine = dist.mine([len(e.prompt) + max(len(e.first), len(e.second)) for e in examples]).tolist()
    cut = by_budget([examples[i] for i in mine], cfg.tokens_per_microbatch)
    with at_work(model):
        out = torch.zeros(len(examples), 2, device=model.device)
        for mb in dist.paced(cut, model.logprobs):
            mb = [mine[i] for i in mb]
            out[mb] = response_logps(model, [examples[i][:3] for i in mb], tok.pad_id)
    return dist.summed(out)


def objective(policy, examples, ref_logp, z0, pad_id, cfg):
    """Examples, their reference log-probs (B, 2) or None → losses (B,), and what the log wants: whether each
    is in order, the rewards of chosen and of rejected responses, their log-probs.
    """
    if cfg.loss == "kto":
        logp = response_logps(policy, [e[:2] for e in examples], pad_id)[:, 0]  # (B,)
        liked = torch.tensor([e.liked for e in examples], device=logp.device)
        losses = kto_loss(logp, ref_logp[:, 0], liked, z0, cfg.beta, cfg.kto_lam_d, cfg.kto_lam_u)
        reward = cfg.beta * (logp - ref_logp[:, 0]).detach()
        acc = (reward > cfg.beta * z0) == liked
        sides = reward[liked], reward[~liked], logp[liked], logp[~liked]
    else:
        w, l = response_logps(policy, [e[:3] for e in examples], pad_id).unbind(1)  # (B,), (B,)
        ref_w, ref_l = (None, None) if ref_logp is None else ref_logp.unbind(1)
        len_w, len_l = (torch.tensor([len(e[i]) for e in examples], device=w.device) for i in (1, 2))
        losses, chosen, rejected = preference_loss(
            w, l, ref_w, ref_l, cfg.beta, cfg.loss, cfg.label_smoothing, len_w, len_l,
            cfg.ipo_mean, cfg.simpo_ratio, cfg.orpo_lam, cfg.dpo_nll_coef)  # fmt: skip
        acc = (chosen > rejected) + 0.5 * (chosen == rejected)
        sides = chosen, rejected, w, l
    return losses, (acc.float(), *(x.detach() for x in sides))


def step_batch(policy, examples, ref_logp, tok, cfg):
    """Examples and their reference log-probs (B, 2) or None → the batch of `gradient`: with them pad_id, z0,
    and counts, of the whole step: examples, chosen (with kto liked) and rejected responses.
    """
    z0, counts = None, (len(examples),) * 3
    if cfg.loss == "kto":
        z0 = (cache_logps(policy, examples, tok, cfg) - ref_logp)[:, 1].mean().clamp(min=0)
        liked = sum(e.liked for e in examples)
        counts = len(examples), liked, len(examples) - liked
    rows = [list(e) for e in examples]
    return {"examples": rows, "ref_logp": ref_logp, "pad_id": tok.pad_id, "z0": z0, "counts": counts}


def gradient(policy, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its loss, stats.

    Under no_grad the figures alone. Any part of the step's rows gives its part of the gradient and the stats.
    """
    examples, (n, n_chosen, n_rejected) = [Example(*e) for e in batch["examples"]], batch["counts"]
    total, parts = 0.0, []
    for mb in dist.paced(by_budget(examples, cfg.tokens_per_microbatch), policy.logprobs):
        ref_logp = None if batch["ref_logp"] is None else batch["ref_logp"][mb]
        rows = [examples[i] for i in mb]
        losses, seen = objective(policy, rows, ref_logp, batch["z0"], batch["pad_id"], cfg)
        loss = losses.sum() / n  # the denominator is the step's
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
        parts.append(seen)
    counts = n, n_chosen, n_rejected, n_chosen, n_rejected  # with kto one kind may be missing
    means = [(torch.cat(x).sum() / k).item() if k else None for x, k in zip(zip(*parts), counts)]
    acc, chosen, rejected, *logps = means
    margin = None if None in (chosen, rejected) else chosen - rejected
    return total, {"acc": acc, "margin": margin, "logp_chosen": logps[0], "logp_rejected": logps[1]}


# ------------------------------------------------------------------------------------------------------------
# Online: a round's pairs


def sample_pairs(policy, rows, tok, cfg, judge, seed):
    """Sample for each row's prompt, best against worst → rows {"prompt", "chosen", "rejected", "ids"}, stats.

    Ties are dropped: there is nothing to learn from them. A response that never ended has no_eos_score, as in
    PPO. The ids are those sampled; the text, tokenized anew, might give others.
    """
    prompts, G, how = [r["prompt"] for r in rows], cfg.group_size, (cfg.max_new_tokens, cfg.temperature, seed)
    rolls, texts = generate.respond(policy, tok, prompts, G, *how, desc="round")
    scores, ids, rank, start = [], [], [], 0
    for roll in rolls:
        mine = [rows[start // G + g] for g in roll.group.tolist()]
        score = judge(roll, texts[start : start + len(mine)], mine)  # (B,)
        scores.append(score)
        # an unended response always loses before a judge in nats, on which scale no fixed score has a place
        rank += torch.where(roll.finished, score, -math.inf if cfg.judge else cfg.no_eos_score).tolist()
        ids += roll.responses(with_eos=True)
        start += len(mine)
    kept = []
    for g, row in enumerate(rows):
        group = range(g * G, g * G + G)
        best, worst = max(group, key=rank.__getitem__), min(group, key=rank.__getitem__)
        if rank[best] > rank[worst]:
            sides = [tok.encode_prompt(row["prompt"]), ids[best], ids[worst]]
            kept.append(dict(zip(KEYS, (row["prompt"], texts[best], texts[worst]))) | {"ids": sides})
    reward, se = mean_se(torch.cat(scores).view(-1, G))
    return kept, {"reward": reward, "reward_se": se, "dead": 1 - len(kept) / len(rows)}


# ------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def evaluate(policy, ref, tok, cfg, held_out, held_out_ref, rows, judge, run, step):
    """Held-out pairs; and on fresh samples KL(policy‖--ref), entropy, length and stop rate → metrics."""
    out = {}
    if held_out:
        loss, stats = gradient(policy, step_batch(policy, held_out, held_out_ref, tok, cfg), cfg)
        out = {"eval/loss": loss, "eval/acc": stats["acc"]}
    roll, texts, metrics = fresh_samples(policy, ref, tok, rows, cfg.max_new_tokens, cfg.seed)
    score = judge(roll, texts, rows)  # (B,); offline the implicit reward β·k1 of the whole response
    run.log.samples(step, rows, texts, score)
    if cfg.online and not cfg.judge:
        out["eval/reward"] = score.mean().item()
    return out | metrics


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Train on preferences, offline or in rounds; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    policy, ref, rm, tok = load_models(cfg, device)
    freeze(cfg, ref, rm, trained=(policy,))
    rewards = [worker.load_reward(spec) for spec in cfg.reward] or [(cfg.task, 1.0, task.reward)]
    rounds, labelled = max(1, cfg.online), not cfg.online or cfg.judge == "self"
    by_round = bool(cfg.online) and cfg.online_ref == "round"
    base = copy.deepcopy(policy) if by_round else ref  # of the loss; `ref` itself stays, for the judge and kl

    def judge(roll, texts, rows):
        """Scores (B,): of the reward model or function, or the policy's own opinion, β log π/π_ref."""
        if not labelled:
            return score_responses(roll, texts, rows, rm, rewards)
        budget = cfg.tokens_per_microbatch
        with at_work(ref):
            h = roll.per_token(lambda x, m: policy.logprobs(x, m)[0] - ref.logprobs(x, m)[0], budget)
        return cfg.beta * h.sum(1)

    def seed_for(*purpose):
        return derive_seed(cfg.seed, *purpose)

    dist.spread(cfg, policy, frozen=(ref, rm, *[base] * by_round))
    opt = adamw(policy.parameters(), device, lr=cfg.lr, weight_decay=cfg.weight_decay)
    with Run(cfg, COLUMNS, SHOW, PANELS) as run:

        def measure(step):
            return evaluate(policy, ref, tok, cfg, held_out, held_out_ref, test_rows, judge, run, step)

        if labelled:
            train_pairs, held_out, rows, test_rows = load_examples(cfg, task, policy, tok, cfg.loss == "kto")
        else:
            held_out, (rows, test_rows) = [], load_prompts(cfg, task, tok, policy.cfg.max_len)
        start, _ = run.start({"model": policy} | ({"base": base} if by_round else {}), opt, frozen=(ref,))
        held_out_ref = cache_logps(ref, held_out, tok, cfg)
        for step in range(start, cfg.steps):
            metrics = {}

            # ---- a round begins: its pairs, and once for all what the reference says of them
            number = step * rounds // cfg.steps
            first = -(-number * cfg.steps // rounds)  # the step at which this round begins
            if step == first and by_round:
                base.load_state_dict(policy.state_dict())
            if step in (first, start):
                if labelled and number == 0:
                    pairs = train_pairs
                else:
                    path = f"{cfg.out}/pairs-round-{number}.jsonl"
                    if step == first:
                        drawn = epoch_batches(len(rows), cfg.pairs // rounds, seed_for("prompts"), number)
                        fresh, seed = [rows[i] for i in drawn], seed_for("round", number)
                        found, metrics = sample_pairs(policy, fresh, tok, cfg, judge, seed)
                        before = f"{cfg.out}/pairs-round-{number - 1}.jsonl"  # used again if all is solved
                        tie = "all samples of every prompt scored the same: no pair to learn from"
                        require(found or number > int(labelled), f"--online: {tie}")
                        write_first(path, found or read_jsonl(before, KEYS))
                    ids = [r["ids"] for r in read_jsonl(path, KEYS)]
                    pairs = to_examples(ids, cfg.loss == "kto", policy.cfg.max_len)
                ref_logp = None if cfg.loss in NO_REFERENCE else cache_logps(base, pairs, tok, cfg)  # (N, 2)
            due = step == 0 or (cfg.eval_every and step % cfg.eval_every == 0)
            if due and step + 1 < cfg.steps:  # in the last row the figures after the update stand
                metrics |= measure(step)

            # ---- loss and update
            clock = Clock()
            order = epoch_batches(len(pairs), cfg.batch_size, seed_for("data", number), step - first)
            batch, ref_of = [pairs[i] for i in order], None if ref_logp is None else ref_logp[order]
            opt.zero_grad()
            whole = step_batch(policy, batch, ref_of, tok, cfg)
            lengths = [len(e.first) + len(e.second) for e in batch]
            loss, stats = dist.total(*gradient(policy, dist.share(whole, lengths), cfg))
            gnorm = dist.clip(policy.parameters(), cfg.max_grad_norm)
            run.check(step, loss, gnorm, f"{len(batch)} pairs", whole, [policy])
            for group in opt.param_groups:
                group["lr"] = lr = lr_at(step, cfg.steps, cfg.lr)
            opt.step()

            # ---- one log line
            done = step + 1
            metrics |= clock.columns(sum(lengths))
            metrics |= {"loss": loss, "gnorm": gnorm, "lr": lr} | stats
            metrics |= measure(step) if done == cfg.steps else {}
            run.log.row(step, metrics)
            run.checkpoint(done, lambda: hub.save(policy, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.dpo(cfg, load_models))


if __name__ == "__main__":
    sys.exit(main())
