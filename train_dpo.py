"""DPO: learn from preferences without a reward model, as β log π(y|x)/π_ref(y|x) is a reward already.

    h = log π_θ(y|x) − log π_ref(y|x),   a = log π_θ(y|x) / |y|,   Δ = h_w − h_l       w: chosen, l: rejected

    --loss dpo      −log σ(βΔ)                                                         arXiv 2305.18290
           cdpo     −(1−ε) log σ(βΔ) − ε log σ(−βΔ)             labels flip with ε     the same authors, 2023
           robust   (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε)  unbiased under flips   2403.00409
           ipo      (Δ − 1/2β)²                                 a margin to reach      2310.12036
           hinge    max(0, 1 − βΔ)                                                     2305.10425, 2309.06657
           simpo    −log σ(β (a_w − a_l − γ/β))                 no reference           2405.14734
           orpo     −a_w − λ log σ(logit e^a_w − logit e^a_l)   no reference           2403.07691
           kto      1 − σ(β (h_w − z0)), 1 − σ(β (z0 − h_l))    no pairs needed        2402.01306
           dpo_nll  dpo − α a_w                                 keeps y_w likely       2404.19733

The loss is the mean over the pairs of the optimizer step. log π(y|x) is the *sum* over the tokens of the
response, its EOS included. Published codes disagree on IPO: most take this sum, TRL and HALOs take the mean
per token (`--ipo_mean`). KTO's z0 = max(0, mean h), taken over responses to *other* prompts, estimates the KL
and gets no gradient. The reference never changes, so its log-probs are computed once, before training.

`--online K` samples new pairs in each of K rounds. The current policy answers every prompt `group_size`
times, and the best answer is paired with the worst. A reward function, a reward model or the policy itself
ranks them. With `--judge self` the score is DPO's own reward, β log π/π_ref, of the policy at the start of
the round. In round 0 the policy equals its reference and scores everything 0, so that round trains on
labelled pairs.

Where we deviate: AdamW replaces the paper's RMSprop, and the learning rate suits small models. A tie counts
half in `acc`. KTO's responses to other prompts come from half the data away, not from the next row.

CPU   python train_dpo.py                  50 s on one core; gold + 1.8 to + 2.0 at a KL of 4 to 4.5
      python train_dpo.py --online 3 --judge self --out runs/reviews-dpo-self
GPU   python train_dpo.py --data pairs.jsonl --init runs/sft/model --beta 0.1 --lr 1e-6 --dtype bfloat16
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from nanorlhf import generate, hub, tasks
from nanorlhf.data import epoch_batches, fill_rows, microbatches, pad_responses
from nanorlhf.errors import derive_seed, require
from nanorlhf.metrics import Figures, mean_se, step_means
from nanorlhf.pairs import Example, load_data, padded_lengths, read_round, write_round
from nanorlhf.rewards import fresh_samples, score_responses
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, clip_gradient, freeze, lr_at, set_rate, setup
from nanorlhf.run.log import Clock, due
from nanorlhf.run.models import load_models
from nanorlhf.run.worker import rewards_of

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    # data
    task: str = ""  # built-in task; only reviews, the default, has preferences (else --data or --online)
    data: str = ""  # file of preferences (formats: nanorlhf/hub/formats.py); with kto also of labelled ones
    pairs: int = 8000  # pairs to make for the built-in task; online: prompts to sample for, in all rounds
    tau: float = 0.5  # temperature of the labels made here: P(a wins) = σ((gold_a − gold_b)/tau); 0: no noise
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init
    out: str = ""  # run folder; empty: runs/TASK-dpo, or with --data runs/FILE-dpo

    # method
    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll"] = "dpo"  # above
    beta: float | None = None  # reward per nat, the KL coefficient (simpo: 2, ipo: 0.1, online: 1)
    label_smoothing: float | None = None  # ε: share of labels taken to be flipped
    ipo_mean: bool = False  # ipo on log-probs per token instead of sums
    simpo_ratio: float = 0.5  # γ/β of simpo: the margin per token
    online: int = 0  # rounds of fresh pairs; 0: offline
    online_ref: Literal["fixed", "round"] = "fixed"  # of the loss: --ref, or the policy at the round's start
    reward: list[str] = field(default_factory=list)  # online: path/to/file.py:name, or :name*0.2; repeatable
    rm: str = ""  # online: reward model folder; without any judge: runs/TASK-rm/model, or the task's function
    judge: Literal["", "self"] = ""  # online: self ranks by the policy's own β log π/π_ref

    # optimisation
    steps: int | None = None  # optimizer steps, divided among the rounds; of --data: 1 pass, at least 100
    batch_size: int = 32  # pairs a step (kto: responses)
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    adam_eps: float = 1e-8  # Adam's eps
    weight_decay: float = 0.0  # AdamW; it pulls the policy to 0, not to the reference
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 1024  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve

    # sampling
    group_size: int = 4  # online: samples per prompt
    temperature: float = 1.0  # online: of sampling; log-probs are always those at 1
    max_new_tokens: int | None = None  # longest response, EOS included; of --data: its longest
    no_eos_score: float | None = None  # online: score of a response that never ends

    # evaluation
    eval_prompts: int = 128  # held-out prompts to sample for kl, entropy, len and stop
    eval_every: int = 50  # steps between these, and held-out pairs; 0: before the first and after the last

    # run
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
        if self.label_smoothing is None:
            self.label_smoothing = 0.1 if self.loss in ("cdpo", "robust") else 0.0
        self.fill("dpo")
        above_zero = (
            "pairs group_size max_new_tokens steps batch_size eval_prompts lr beta temperature "
            "adam_eps max_grad_norm"
        ).split()
        check_ranges(self, above_zero, any_sign=("seed", "no_eos_score"))
        eps = self.label_smoothing
        require(eps < 0.5, f"--label_smoothing {eps}: must be below 0.5, where labels say nothing")
        require(not eps or self.loss in SMOOTHED, f"--label_smoothing: not with --loss {self.loss}")
        judges = [name for name in ("reward", "rm", "judge") if getattr(self, name)]
        require(len(judges) <= 1, "--reward, --rm and --judge: give one of the three")
        if self.online:
            require(self.group_size > 1, "--group_size 1: best against worst needs at least 2 samples")
            fewest = min(self.steps or self.online, self.pairs)
            require(fewest >= self.online, "--online: more than --steps or --pairs")
            if not judges:
                self.fill_judge()
        else:
            require(not judges, "--reward, --rm and --judge rank fresh samples: add --online 3")
        require(self.ref != "none", "--ref none: a reference is needed, for the figure kl with every loss")
        if self.uses_labels:
            labels = self.task == "reviews" or self.data
            require(labels, f"--task {self.task} has a reward function, no preferences: add --online 3")

    @property
    def uses_labels(self):
        """Whether the first pairs are labelled ones; otherwise a reward judges samples from the start."""
        return not self.online or self.judge == "self"


# SimPO's log-probs are per token, and IPO's margin is 1/2β: both have another scale of β. Online pairs are
# labelled without noise. At the β of noisy labels they would move the policy further, hence 1.0.
OWN_BETA = {"simpo": 2.0, "ipo": 0.1}
SMOOTHED = ("dpo", "cdpo", "robust")
NO_REFERENCE = ("simpo", "orpo")
COLUMNS = (
    "step loss acc margin logp_chosen logp_rejected kl entropy len stop reward reward_se dead gnorm lr "
    "tok_s s eval/loss eval/acc eval/reward"
).split()
SHOW = ["loss", "acc", "margin", "logp_chosen", "kl", "eval/acc"]
PANELS = [
    ("loss", "eval/loss"),
    ("acc", "eval/acc"),
    "margin",
    ("logp_chosen", "logp_rejected"),
    "kl",
    "len",
]

# ------------------------------------------------------------------------------------------------------------
# Losses. Log-probs are (B,), sums over a response's tokens


def preference_loss(
    logp_w, logp_l, ref_w, ref_l, beta, loss="dpo",
    label_smoothing=0.0, len_w=None, len_l=None,
    ipo_mean=False, simpo_ratio=0.5, orpo_lam=0.1, dpo_nll_coef=1.0,
):  # fmt: skip
    """Log-probs under policy and reference → losses, rewards of chosen and of rejected, (B,) each.

    ref_w and ref_l may be None for simpo and orpo. The lengths (B,) in tokens are needed by simpo, orpo,
    dpo_nll and ipo_mean. The rewards carry no gradient: β log π/π_ref, or β log π per token for simpo and
    orpo. ValueError for a loss that is not one on pairs.

    The policy gives the chosen response 0.5 nats more than the reference does, the rejected one 0.2 less:

    >>> nats = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-10.5]), torch.tensor([-10.8])
    >>> losses, chosen, rejected = preference_loss(*nats, beta=0.1)
    >>> [round(x.item(), 4) for x in (losses, chosen, rejected)]  # the loss is −log σ(0.05 + 0.02)
    [0.6588, 0.05, -0.02]
    """
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(f"label_smoothing has no meaning for {loss}")
    if loss in NO_REFERENCE:
        h_w = logp_w / len_w
        h_l = logp_l / len_l
    else:
        h_w = logp_w - ref_w
        h_l = logp_l - ref_l
    chosen = beta * h_w.detach()
    rejected = beta * h_l.detach()
    delta = h_w - h_l
    right = -F.logsigmoid(beta * delta)  # the loss if the label is right
    flipped = -F.logsigmoid(-beta * delta)  # the loss if it is wrong
    eps = label_smoothing

    if loss == "ipo":
        margin = h_w / len_w - h_l / len_l if ipo_mean else delta
        losses = (margin - 1 / (2 * beta)).square()
    elif loss == "hinge":
        losses = F.relu(1 - beta * delta)
    elif loss == "simpo":
        losses = -F.logsigmoid(beta * (delta - simpo_ratio))
    elif loss == "orpo":
        log_odds_ratio = (h_w - log1mexp(h_w)) - (h_l - log1mexp(h_l))
        losses = -h_w - orpo_lam * F.logsigmoid(log_odds_ratio)
    elif loss == "robust":
        losses = ((1 - eps) * right - eps * flipped) / (1 - 2 * eps)
    elif loss == "dpo_nll":
        losses = right - dpo_nll_coef * logp_w / len_w
    elif loss in SMOOTHED:  # dpo, cdpo
        losses = (1 - eps) * right + eps * flipped
    else:
        raise ValueError(f"loss {loss!r} is not a loss on pairs")
    return losses, chosen, rejected


def log1mexp(x):
    """log(1 − e^x) for x < 0. Above −1e-6 fp32 has no digits left, so x is clamped there."""
    x = x.clamp(max=-1e-6)
    near_zero = (-torch.expm1(x)).log()
    far = torch.log1p(-x.exp())
    return torch.where(x > -math.log(2), near_zero, far)


def kto_loss(logp, ref_logp, label, z0, beta):
    """Single responses (B,), label True where they are liked → losses (B,). z0 is a constant.

    The paper's weights λ_D and λ_U of liked and disliked responses are 1.
    """
    h = logp - ref_logp
    margin = torch.where(label.bool(), h - z0, z0 - h)
    return 1 - torch.sigmoid(beta * margin)


# ------------------------------------------------------------------------------------------------------------
# Log-probs and gradient


def response_logps(model, rows):
    """(prompt ids, response ids) of N rows → log π(response | prompt), (N,).

    The sum is over the response, its EOS included. The prompt is context only.
    """
    tokens, _, mask = pad_responses(rows, model.device)
    return model.logprobs(tokens, mask)[0].sum(1)


def pair_logps(model, examples):
    """`response_logps` of both responses of N examples: (N, 2)."""
    rows = []
    for e in examples:
        rows += [(e.prompt, e.first), (e.prompt, e.second)]
    return response_logps(model, rows).view(-1, 2)


@torch.no_grad()
def cache_logps(model, examples, cfg):
    """Log-probs of both responses of N examples, (N, 2), without gradients.

    SimPO and ORPO have no reference: they never read these numbers, and get zeros.
    """

    def compute(rows):
        return pair_logps(model, [examples[i] for i in rows])

    with at_work(model):  # with --save_memory it is on the GPU only inside
        out = torch.zeros(len(examples), 2, device=model.device)
        if cfg.loss in NO_REFERENCE:
            return out
        return fill_rows(out, padded_lengths(examples), cfg.tokens_per_microbatch, compute, model.logprobs)


def objective(policy, examples, ref_logp, z0, cfg):
    """B examples and their reference log-probs (B, 2) → losses (B,), and for the log {name: values}.

    The values are acc (B,), and of the chosen and the rejected responses the rewards and log-probs.
    """
    if cfg.loss == "kto":
        rows = [(e.prompt, e.first) for e in examples]
        logp = response_logps(policy, rows)  # (B,)
        ref_logp = ref_logp[:, 0]
        liked = torch.tensor([e.liked for e in examples], device=logp.device)
        losses = kto_loss(logp, ref_logp, liked, z0, cfg.beta)
        reward = cfg.beta * (logp - ref_logp).detach()
        acc = (reward > cfg.beta * z0) == liked
        chosen = reward[liked]
        rejected = reward[~liked]
        logp_w = logp[liked]
        logp_l = logp[~liked]
    else:
        logp_w, logp_l = pair_logps(policy, examples).unbind(1)  # (B,), (B,)
        len_w = [len(e.first) for e in examples]
        len_l = [len(e.second) for e in examples]
        losses, chosen, rejected = preference_loss(
            logp_w,
            logp_l,
            ref_logp[:, 0],
            ref_logp[:, 1],
            cfg.beta,
            cfg.loss,
            label_smoothing=cfg.label_smoothing,
            len_w=torch.tensor(len_w, device=logp_w.device),
            len_l=torch.tensor(len_l, device=logp_l.device),
            ipo_mean=cfg.ipo_mean,
            simpo_ratio=cfg.simpo_ratio,
        )
        acc = (chosen > rejected) + 0.5 * (chosen == rejected)
    return losses, {
        "acc": acc.float(),
        "chosen": chosen,
        "rejected": rejected,
        "logp_chosen": logp_w.detach(),
        "logp_rejected": logp_l.detach(),
    }


def step_batch(policy, examples, ref_logp, cfg):
    """Examples and their reference log-probs (B, 2) → the batch of `gradient`.

    counts has the denominator of each figure, over the whole step: KTO's liked responses are chosen, the
    others rejected.
    """
    n = n_chosen = n_rejected = len(examples)
    z0 = None
    if cfg.loss == "kto":
        h = cache_logps(policy, examples, cfg) - ref_logp
        z0 = h[:, 1].mean().clamp(min=0)  # of the responses to other prompts
        n_chosen = sum(e.liked for e in examples)
        n_rejected = n - n_chosen
    return {
        "examples": [list(e) for e in examples],
        "lengths": [len(e.first) + len(e.second) for e in examples],
        "ref_logp": ref_logp,
        "z0": z0,
        "counts": {
            "acc": n,
            "chosen": n_chosen,
            "rejected": n_rejected,
            "logp_chosen": n_chosen,
            "logp_rejected": n_rejected,
        },
    }


def gradient(policy, batch, cfg):
    """Add up the gradient of one optimizer step over its micro-batches → its Figures.

    Under no_grad it only measures. Every denominator is the step's, so that gradients and figures of parts of
    the rows add up to those of all rows.
    """
    names = ("loss", "acc", "margin", "logp_chosen", "logp_rejected")
    figures = Figures(**dict.fromkeys(names, "sum"))
    counts = batch["counts"]
    examples = [Example(*row) for row in batch["examples"]]
    cut = microbatches(padded_lengths(examples), cfg.tokens_per_microbatch)
    seen = []
    for rows in dist.paced(cut, policy.logprobs):  # one process: as they are; several: equally many
        part = [examples[i] for i in rows]
        ref_logp = batch["ref_logp"][rows]
        losses, values = objective(policy, part, ref_logp, batch["z0"], cfg)
        loss = losses.sum() / counts["acc"]  # the denominator is the step's
        if torch.is_grad_enabled():
            loss.backward()
        figures.add_tensors({"loss": loss})
        seen.append(values)
    figures.read()
    means = step_means(seen, counts)  # None where a KTO step lacks one kind
    chosen = means.pop("chosen")
    rejected = means.pop("rejected")
    means["margin"] = None if None in (chosen, rejected) else chosen - rejected
    figures.add(means)
    return figures


# ------------------------------------------------------------------------------------------------------------
# Online


def implicit_reward(policy, ref, cfg, roll):
    """DPO's own reward of each response, β log π/π_ref: (B,)."""

    def log_ratio(tokens, mask):
        return policy.logprobs(tokens, mask)[0] - ref.logprobs(tokens, mask)[0]

    with at_work(ref):
        h = roll.per_token(log_ratio, cfg.tokens_per_microbatch)  # (B, T)
    return cfg.beta * h.sum(1)


def sample_pairs(policy, rows, tok, cfg, judge, number):
    """Pair the best with the worst sample for each prompt of round `number` → rows of its file, figures.

    A prompt whose samples all score the same gives no pair: there is nothing to learn from it. A response
    that never ended gets no_eos_score, as in PPO. "ids" are those sampled: tokenizing the texts might give
    others.
    """
    G = cfg.group_size
    n = cfg.pairs // cfg.online  # prompts of a round
    order = epoch_batches(len(rows), n, derive_seed(cfg.seed, "prompts"), number)
    rolls = generate.sample_in_batches(
        policy,
        tok,
        [rows[i] for i in order],
        G,
        cfg.max_new_tokens,
        cfg.temperature,
        derive_seed(cfg.seed, "round", number),
    )
    # An implicit reward is in nats, where no fixed score fits: there an unended response always loses.
    unended = -math.inf if cfg.judge == "self" else cfg.no_eos_score
    scores = []
    found = []
    for roll in rolls:
        ids = roll.responses(with_eos=True)
        score = judge(roll)  # (B,)
        scores.append(score)
        rank = torch.where(roll.finished, score, unended).tolist()
        for start in range(0, len(ids), G):
            group = range(start, start + G)
            best = max(group, key=rank.__getitem__)
            worst = min(group, key=rank.__getitem__)
            if rank[best] > rank[worst]:
                row = roll.rows[start]
                found.append({
                    "prompt": row["prompt"],
                    "chosen": roll.texts[best],
                    "rejected": roll.texts[worst],
                    "ids": [row["_ids"], ids[best], ids[worst]],
                })  # fmt: skip
    reward, se = mean_se(torch.cat(scores).view(-1, G))
    return found, {"reward": reward, "reward_se": se, "dead": 1 - len(found) / n}


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Train on preferences, offline or in rounds; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    policy, ref, rm, tok = load_models(cfg, device)
    freeze(cfg, ref, rm, trained=[policy])
    rewards = rewards_of(tasks.get(cfg.task), cfg.reward)
    if cfg.uses_labels:
        judge = partial(implicit_reward, policy, ref, cfg)
    else:
        judge = partial(score_responses, rm=rm, rewards=rewards)
    base = None  # a reference of the loss that moves; `ref` stays that of the judge and of kl
    saved = {"model": policy}
    if cfg.online and cfg.online_ref == "round":
        base = copy.deepcopy(policy)
        saved["base"] = base
    dist.spread(cfg, policy, frozen=(ref, rm, base))  # one process: as they are; several: all get the same
    opt = adamw(policy.parameters(), device, lr=cfg.lr, eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    with Run(cfg, COLUMNS, SHOW, PANELS, tok) as run:
        labelled, held_out, rows, test_rows = load_data(cfg, policy, tok, rewards)
        start, _ = run.start(saved, opt, frozen=(ref,))
        held_out_ref = cache_logps(ref, held_out, cfg)

        @torch.no_grad()
        def measure(step):
            """Figures of held-out pairs; KL(policy‖--ref), entropy, length, stop rate of fresh samples."""
            roll, metrics = fresh_samples(policy, ref, tok, test_rows, cfg.max_new_tokens, cfg.seed)
            score = judge(roll)  # (B,)
            run.log.samples(step, test_rows, roll.texts, score)
            if not cfg.uses_labels:
                metrics["eval/reward"] = score.mean().item()
            if held_out:
                batch = step_batch(policy, held_out, held_out_ref, cfg)
                figures = gradient(policy, batch, cfg)
                metrics |= {"eval/loss": figures["loss"], "eval/acc": figures["acc"]}
            return metrics

        rounds = max(1, cfg.online)  # offline is one round
        for step in range(start, cfg.steps):
            metrics = {}
            is_last = step + 1 == cfg.steps

            # ---- the round's pairs, and their log-probs under the reference
            number = step * rounds // cfg.steps
            first = math.ceil(number * cfg.steps / rounds)  # the step at which this round begins
            if step == first and base:
                base.load_state_dict(policy.state_dict())
            sampled = number > 0 or not cfg.uses_labels
            if step == first and sampled:
                found, metrics = sample_pairs(policy, rows, tok, cfg, judge, number)
                write_round(cfg, number, found)
            if step in (first, start):  # the round begins, or a resumed run is in it
                pairs = read_round(cfg, number, policy.cfg.max_len) if sampled else labelled
                ref_logp = cache_logps(base or ref, pairs, cfg)  # (N, 2)
            if due(step, cfg.eval_every) and not is_last:  # the last row has the figures after its update
                metrics |= measure(step)

            # ---- loss and update
            clock = Clock()
            opt.zero_grad()
            seed = derive_seed(cfg.seed, "data", number)
            order = epoch_batches(len(pairs), cfg.batch_size, seed, step - first)
            examples = [pairs[i] for i in order]
            batch = step_batch(policy, examples, ref_logp[order], cfg)
            part = dist.share(batch)  # one process: all of it; several: this one's rows
            figures = dist.whole_step(gradient(policy, part, cfg), policy)  # one process: as it is
            gnorm = clip_gradient(policy, cfg.max_grad_norm)
            run.check(step, figures["loss"], gnorm, f"{len(order)} pairs", batch, [policy])
            lr = set_rate(opt, lr_at(step, cfg.steps, cfg.lr))
            opt.step()

            # ---- one log line
            metrics |= clock.columns(sum(batch["lengths"]))
            metrics |= figures | {"gnorm": gnorm, "lr": lr}
            if is_last:
                metrics |= measure(step)
            run.log.row(step, metrics)
            run.checkpoint(step + 1, lambda: hub.save(policy, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.dpo(cfg, load_models))


if __name__ == "__main__":
    sys.exit(main())
