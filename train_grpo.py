"""GRPO for language models: groups of samples instead of a critic. Its family is a few visible lines each.

    Â_i   = (r_i − mean_group r) / std_group r                                     --norm
    ρ_it  = π_θ(y_it) / π_old(y_it)                                                --ratio
    l_it  = max(−Â_i ρ_it, −Â_i clip(ρ_it, 1 − ε_low, 1 + ε_high))                 --loss
    L     = Σ_i Σ_t w_it (l_it + β k_it − c H_it)                                  --agg, --kl, --entropy_coef

The weights w_it are the aggregation: they are computed once for the whole optimizer step, so that cutting it
into micro-batches cannot change the loss. k is the KL to the reference, exact or estimated, in the loss or,
as −β Σ_t k1, in the reward. H is the entropy of the policy where token t was sampled. The defaults are GRPO
with a token mean, no KL and no entropy bonus; `--recipe` sets a published combination, and any flag that is
given wins over it.

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++ (2501.03262), DAPO
(2503.14476), GSPO (2507.18071), CISPO (2506.13585), ScaleRL (2510.13786), DeepSeek-R1 (2501.12948),
DeepScaleR (context-length curriculum), KL estimators (joschu.net/blog/kl-approx).

CPU   python train_grpo.py                       23 s with its SFT; accuracy 0.41 → 0.98, greedy 0.1 → 1.0
      python train_grpo.py --task countdown      62 s; accuracy 0.22 → 0.49, greedy 0.38 → 0.54 (seed 0)
GPU   python train_grpo.py --data prompts.jsonl --init runs/sft/model --max_new_tokens 512 --dtype bfloat16 \
          --reward nanorlhf/answers.py:numeric_answer
      not measured yet
"""

import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch

from nanorlhf import hub, lora, tasks
from nanorlhf.data import deal, epoch_batches, microbatches, take_rows, trim
from nanorlhf.errors import UserError, derive_seed, require
from nanorlhf.generate import sample_responses
from nanorlhf.metrics import Figures, sample_figures
from nanorlhf.rewards import evaluate, load_prompts, pass_gate, score_responses, unit_of
from nanorlhf.rollout import Rollout
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, length_schedule, run_cli
from nanorlhf.run.defaults import RECIPES
from nanorlhf.run.device import adamw, at_work, clip_gradient, freeze, rl_rate, set_rate, setup
from nanorlhf.run.log import Clock, due, health
from nanorlhf.run.models import load_models
from nanorlhf.run.worker import rewards_of

# ------------------------------------------------------------------------------------------------------------
# Config

CISPO_CAP = 5.0  # largest weight of a token in CISPO
OVERLONG_SHARE = 0.2  # DAPO's soft penalty rises over this last share of the limit (4,096 of 20,480 tokens)
MAX_ROUNDS = 4  # of sampling in a step, with --dead_groups refill


@dataclass
class Config(Flags):
    # data
    task: str = ""  # built-in task: chain (the default), countdown or reviews; sets many defaults
    data: str = ""  # file of prompts (formats: docs/data.md), in place of the task's own
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    reward_timeout: float = 10.0  # seconds for a call of --reward, in a process; 0: no limit, no process
    rm: str = ""  # reward model folder, where the task has no reward function; empty: runs/TASK-rm/model
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init, of a real model only with a KL; none: no reference
    out: str = ""  # run folder; empty: runs/TASK-grpo, or with --data runs/FILE-grpo

    # method
    recipe: Literal[tuple(RECIPES)] = ""  # flags of a published recipe (run/defaults.py); flags given win
    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
    std_eps: float = 1e-6  # added to the standard deviation
    ratio: Literal["token", "sequence"] | None = None  # importance ratio; sequence: GSPO
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
    clip_low: float | None = None  # ε_low
    clip_high: float | None = None  # ε_high; above ε_low: clip-higher (DAPO)
    agg: Literal["seq_mean", "token", "seq_sum_const", "prompt_mean"] | None = None  # weights of the tokens
    kl: Literal["none", "k1", "k2", "k3", "exact"] | None = None  # estimator; exact: over the vocabulary
    kl_in: Literal["loss", "reward"] | None = None  # where the KL is charged
    kl_unbiased: bool | None = None  # KL in the loss × token ratio: its gradient is that of KL(policy‖ref)
    beta: float | None = None  # KL coefficient
    ref_every: int | None = None  # optimizer steps after which the reference becomes the policy; 0: never
    entropy_coef: float | None = None  # weight of an entropy bonus in the loss; 0: none

    # optimisation
    steps: int | None = None  # rollouts, each for epochs × minibatches updates; of own data: 1 pass
    epochs: int = 1  # passes over each rollout
    minibatches: int | None = None  # optimizer steps in each pass
    lr: float | None = None  # learning rate: 5 steps of warm-up, then linear to 0
    constant_lr_after: int | None = None  # steps of warm-up before a constant lr; 0: lr falls to 0
    adam_eps: float | None = None  # Adam's eps; where gradients are near it, steps become shorter
    weight_decay: float | None = None  # AdamW's
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 4096  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve

    # sampling
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int | None = None  # G, samples per prompt
    max_new_tokens: int | list[int] | None = None  # longest response, with EOS; 24,40,64: raised in the run
    lengthen_at: list[int] = field(default_factory=list)  # steps at which it is raised, such as 40,80
    temperature: float = 1.0  # of sampling, and of every log-prob
    off_policy_steps: int | None = None  # sample with the weights of this many steps ago
    dead_groups: Literal["keep", "drop", "refill"] | None = None  # groups of equal rewards; refill: add more
    no_positive_resampling: float | None = None  # a prompt with this pass rate is not sampled again; 0: off
    overlong_penalty: float | None = None  # at the limit, from 0 at four fifths of it; 1 fits rewards of ±1

    # evaluation
    eval_prompts: int | None = None  # held-out prompts to measure on; of own data 128, of --eval_data all
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl

    # run
    save_every: int = 50  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = RECIPES[""] | {"eval_prompts": 512}
    BY_TASK: ClassVar = {
        "chain": dict(
            steps=50,
            prompts_per_step=16,
            group_size=16,
            max_new_tokens=11,
            minibatches=4,
            lr=3e-4,
        ),
        "countdown": dict(
            steps=200,
            prompts_per_step=32,
            group_size=16,
            max_new_tokens=6,
            minibatches=4,
            lr=2.5e-4,
        ),
        "reviews": dict(
            steps=60,
            prompts_per_step=12,
            group_size=8,
            max_new_tokens=40,
            minibatches=2,
            lr=5e-4,
        ),
    }

    def __post_init__(self):
        require(self.recipe in RECIPES, f"--recipe {self.recipe}: must be one of {', '.join(RECIPES)[2:]}")
        kl_given = self.kl
        beta_given = self.beta
        self.fill("grpo", RECIPES[self.recipe])
        if self.kl == "none":
            remedy = "add --kl k3 (in the loss), or --kl k1 --kl_in reward"
            require(not beta_given, f"--beta {beta_given}: there is no KL that it could weigh; {remedy}")
        elif kl_given and beta_given is None:
            remedy = "has no effect without --beta; give one, such as --beta 0.04"
            require(self.beta, f"--kl {kl_given}: {remedy}")
        exact_in_loss = self.kl != "exact" or self.kl_in == "loss"
        require(exact_in_loss, "--kl exact stands in the loss; in the reward it is --kl k1 --kl_in reward")
        self.fill_judge()
        counts = "steps prompts_per_step epochs minibatches sample_every"
        check_ranges(self, f"{counts} lr adam_eps temperature std_eps max_grad_norm".split())
        G = self.group_size
        require(G > 1, f"--group_size {G}: a group of one has nothing to be compared with; at least 2")
        rows = self.prompts_per_step * G
        require(rows >= self.minibatches, f"--minibatches {self.minibatches}: a step has {rows} samples only")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        if self.kl != "none" or self.ref_every:
            require(self.ref != "none", "--kl and --ref_every need a reference, --ref is none")
        self.limits = length_schedule(self.max_new_tokens, self.lengthen_at)


COLUMNS = (
    "step reward reward_se reward_failed kl entropy len len_wrong stop dead clip ratio_max gap gnorm "
    "rounds sampled limit lr tok_s s eval/reward eval/greedy"
).split()
SHOW = ["reward", "kl", "entropy", "len", "stop", "dead", "gnorm", "gap"]
PANELS = ["reward", "kl", "entropy", ("len", "len_wrong"), "dead", "clip"]

# ------------------------------------------------------------------------------------------------------------
# Advantages, token weights, loss


def advantages(reward, group, norm="group_std", std_eps=1e-6, length=None):
    """reward (B,), group (B,) int64 → advantage (B,), of a whole response.

    group_std     (r − mean) / (std + eps) in the group, std unbiased              GRPO
    batch_std     (r − mean) / (std + eps), std of r − mean over the batch         ScaleRL
    none          r − mean                                                         Dr. GRPO
    leave_one_out r − mean of the others = G/(G−1) (r − mean)                      RLOO
    batch_whiten  r − mean, whitened over the tokens of the batch                  REINFORCE++ with baseline
    A group whose rewards are all equal gives exactly 0: rounding in the mean, divided by eps, would not. Only
    batch_whiten shifts such a group, as all others: its mean over tokens is 0 with the dead groups in it.
    `length` (B,), tokens of each response, weighs the rows of batch_whiten; without it each counts once.

    >>> reward = torch.tensor([1.0, 0.0, 1.0, 1.0])  # two prompts with two samples each
    >>> advantages(reward, torch.tensor([0, 0, 1, 1]), norm="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    unit = unit_of(reward)  # 1, or large rewards would have infinite squares; RunError for NaN
    reward = reward / unit
    n_groups = int(group.max()) + 1
    zeros = reward.new_zeros(n_groups)
    size = group.bincount().to(reward)
    mean = zeros.index_add(0, group, reward) / size
    lowest = zeros.scatter_reduce(0, group, reward, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, reward, "amax", include_self=False)
    live = (lowest < highest)[group]
    adv = torch.where(live, reward - mean[group], 0.0)
    if norm == "group_std":
        variance = zeros.index_add(0, group, adv.square()) / (size - 1)
        adv = adv / (variance.sqrt()[group] + std_eps)
    elif norm == "batch_std":
        adv = adv / (adv.std() + std_eps)
    elif norm == "leave_one_out":
        adv = unit * adv * (size / (size - 1))[group]
    elif norm == "none":
        adv = unit * adv
    elif norm == "batch_whiten":
        n = torch.ones_like(reward)
        if length is not None:
            n = length.to(reward)
        total = n.sum()
        centred = adv - (n * adv).sum() / total
        variance = (n * centred.square()).sum() / (total - 1)
        return centred * torch.rsqrt(variance + 1e-8)
    return torch.where(live, adv, 0.0)


def token_weights(mask, group, cfg):
    """mask (B, T), group (B,) of one optimizer step → weight (B, T) of each token in its loss.

    seq_mean       mean over responses of the mean over their tokens               GRPO
    token          mean over all tokens                                            DAPO
    seq_sum_const  mean over responses of their sum / L, L the longest allowed     Dr. GRPO
    prompt_mean    mean over prompts of the mean over all their tokens             ScaleRL

    >>> mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])  # responses of three tokens and of one
    >>> token_weights(mask, torch.tensor([0, 0]), Config(agg="token"))[:, 1:]
    tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.0000, 0.0000]])
    >>> token_weights(mask, torch.tensor([0, 0]), Config(agg="seq_mean"))[:, 1:]
    tensor([[0.1667, 0.1667, 0.1667],
            [0.5000, 0.0000, 0.0000]])
    """
    w = mask.float()
    length = w.sum(1)  # (B,)
    if cfg.agg == "token":
        return w / length.sum().clamp(min=1)
    if cfg.agg == "prompt_mean":
        prompts, index = group.unique(return_inverse=True)
        tokens = length.new_zeros(len(prompts)).index_add(0, index, length)
        per_row = tokens[index].clamp(min=1)
        return w / (per_row * len(prompts))[:, None]
    if cfg.agg == "seq_mean":
        per_row = length.clamp(min=1)
    else:
        per_row = torch.full_like(length, cfg.limits[-1])
    return w / (per_row * len(w))[:, None]


def kl_estimate(logp, ref_logp, kind):
    """Per token, ≥ 0 in expectation: k1 = log π/π_ref, k2 = ½ k1², k3 = π_ref/π − 1 − log π_ref/π.

    k3 takes log π_ref/π as 20 where it is larger, because e^89 is infinite in fp32; such a token, which the
    policy samples once in e^20 times, has no gradient. k1 and k2 are exact, however far apart the two are.
    """
    log_r = ref_logp - logp
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r.square() / 2
    log_r = log_r.clamp(max=20)
    return torch.expm1(log_r) - log_r


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
    """Σ w·l over the tokens of the mask → loss, stats. All (B, T); adv (B,) or (B, T); ref_logp may be None.

    The mask may hold some tokens of a row only; with --ratio sequence it must hold all tokens of its rows.
    stats: clip, the sum of w over tokens whose ratio was clipped; ratio_max, the largest ratio.
    """
    mask = mask.bool()
    if adv.dim() == 1:
        adv = adv[:, None]
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    token_ratio = log_ratio.exp()
    if cfg.ratio == "sequence":  # GSPO: one ratio a row, the geometric mean; each token keeps its gradient
        length = mask.sum(1, keepdim=True).clamp(min=1)
        mean = log_ratio.sum(1, keepdim=True) / length
        log_ratio = mean.detach() + log_ratio - log_ratio.detach()
    ratio = log_ratio.exp()

    if cfg.loss == "clip":
        unclipped = -adv * ratio
        clipped = -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
    elif cfg.loss == "cispo":  # the weight is clipped, the gradient of no token is
        weight = ratio.detach().clamp(max=CISPO_CAP)
        loss = -weight * adv * logp
        is_clipped = ratio > CISPO_CAP
    else:
        loss = -adv * logp
        is_clipped = torch.zeros_like(mask)

    stats = {"clip": (w * is_clipped).sum(), "ratio_max": (ratio.detach() * mask).max()}
    if cfg.kl in ("k1", "k2", "k3") and cfg.kl_in == "loss":
        k = kl_estimate(logp, ref_logp, cfg.kl)
        if cfg.kl_unbiased:  # k2 has the right gradient as it is: the ratio only makes up for stale samples
            k = k * (token_ratio.detach() if cfg.kl == "k2" else token_ratio)
        loss = loss + cfg.beta * k
    loss = torch.where(mask, loss, 0.0)
    return (w * loss).sum(), stats


def microbatch_loss(policy, batch, cfg, kl_to=None):
    """→ loss, stats of `policy_loss`, log-probs and entropies (B, T) of one micro-batch.

    kl_to: the reference, with --kl exact: Σ_v π (log π − log π_ref) at every sampled position joins the loss.
    Each of the stats is a scalar; where the loss is formed in chunks of tokens, it has one value a chunk.
    """
    tokens = batch["tokens"]
    mask = batch["mask"]

    def chunk_loss(logp, entropy, chunk):
        """chunk (B, T) marks the tokens whose logits are at hand: their part of the loss needs no others."""
        ref_logp = batch["ref_logp"]
        loss, stats = policy_loss(logp, batch["old_logp"], ref_logp, batch["adv"], chunk, batch["w"], cfg)
        return loss - cfg.entropy_coef * (batch["w"] * entropy).sum(), stats

    if cfg.ratio == "token":
        loss, stats, logp, entropy, *kl = policy.logprobs(
            tokens, mask, cfg.temperature, chunk_loss, kl_to=kl_to
        )
    else:  # a ratio of whole rows needs all their tokens
        logp, entropy, *kl = policy.logprobs(tokens, mask, cfg.temperature, kl_to=kl_to)
        loss, stats = chunk_loss(logp, entropy, mask)
    if kl_to is not None:
        loss = loss + cfg.beta * (batch["w"] * kl[0]).sum()
    return loss, stats, logp, entropy


def gradient(policy, batch, cfg, kl_to=None):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its figures.

    batch: tokens, mask, old_logp, ref_logp (or None), w (B, T), lengths, adv (B,), and of the whole step
    w_sum, the sum of w, and n_tokens, its sampled tokens. So any part of the step's rows gives its part of
    the gradient. gap is the largest |logp − old_logp|: before the first update on a rollout of the
    current policy it is rounding alone.
    """
    figures = Figures(loss="sum", clip="sum", entropy="sum", ratio_max="max", gap="max")
    cut = microbatches(batch["lengths"], cfg.tokens_per_microbatch)
    passes = [policy.logprobs]
    if kl_to is not None:
        passes.append(kl_to.logprobs)  # with --shard every process must run the reference equally often
    with at_work(kl_to):
        for rows in dist.paced(cut, *passes):  # one process: as they are; several: equally many
            mb = trim(take_rows(batch, rows))
            loss, stats, logp, entropy = microbatch_loss(policy, mb, cfg, kl_to)
            loss.backward()
            figures.add_tensors({
                "loss": loss,
                "clip": stats["clip"].sum(),
                "entropy": entropy.sum(),
                "ratio_max": stats["ratio_max"].max(),
                "gap": (logp.detach() - mb["old_logp"]).abs().max(),
            })  # fmt: skip
    figures.read()
    figures["clip"] /= batch["w_sum"]
    figures["entropy"] /= batch["n_tokens"]
    return figures


def overlong(length, limit, size):
    """DAPO's soft penalty (B,): 0, then linearly down to −size over the last fifth of the limit.

    The published size of 1 belongs to rewards of ±1. With rewards of 0 and 1 it takes all of a right answer's
    reward at the limit; 0.5 is then the same penalty.
    """
    tokens_late = length - (1 - OVERLONG_SHARE) * limit
    return -size * (tokens_late / (OVERLONG_SHARE * limit)).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------
# Sampling


def next_prompts(rows, progress, cfg):
    """→ the rows of the next batch of prompts, without those that are mastered (ScaleRL)."""
    mastered = set()
    for prompt, (passed, sampled) in progress["history"].items():
        if passed / sampled >= cfg.no_positive_resampling:
            mastered.add(prompt)
    if all(row["prompt"] in mastered for row in rows):
        raise UserError(f"--no_positive_resampling: all {len(rows)} prompts reached it; give more prompts")
    seed = derive_seed(cfg.seed, "data")
    batch = []
    while not batch:
        order = epoch_batches(len(rows), cfg.prompts_per_step, seed, progress["drawn"])
        batch = [rows[i] for i in order if rows[i]["prompt"] not in mastered]
        progress["drawn"] += 1
    return batch


def sample_step(policy, tok, cfg, rows, limit, progress, score):
    """→ the Rollout to train on, and the rounds of sampling, Rollouts with the dropped groups included.

    One round of prompts. With --dead_groups refill more of them, until the step is full of groups that are
    not dead (DAPO's dynamic sampling). progress: "drawn", the batches of prompts drawn in the whole run, and
    "history", for --no_positive_resampling the samples of each prompt in the whole run: how many passed
    (reward above 0), and how many there were.
    """
    full = cfg.prompts_per_step * cfg.group_size
    max_rounds = MAX_ROUNDS if cfg.dead_groups == "refill" else 1
    rounds = []
    kept = []
    while len(rounds) < max_rounds and sum(map(len, kept)) < full:
        batch = next_prompts(rows, progress, cfg)
        seed = derive_seed(cfg.seed, "rollout", progress["drawn"])
        roll = sample_responses(policy, tok, batch, cfg.group_size, limit, cfg.temperature, seed)
        roll.reward = score(roll)  # (B,)
        rounds.append(roll)
        groups = roll.reward.view(-1, cfg.group_size)
        if cfg.no_positive_resampling:
            for row, passed in zip(batch, (groups > 0).sum(1).tolist()):
                past = progress["history"].get(row["prompt"], (0, 0))
                prompt = str(row["prompt"])  # of a Chat its text: a checkpoint holds no classes of ours
                progress["history"][prompt] = (past[0] + passed, past[1] + cfg.group_size)
        if cfg.dead_groups != "keep":
            alive = groups.amax(1) > groups.amin(1)  # (prompts,)
            roll = roll.select(alive[roll.group].nonzero()[:, 0])
        if len(roll):
            kept.append(roll)
    if not kept:  # in every group all rewards are equal: the last round is kept, or nothing could be logged
        kept = rounds[-1:]
    roll = Rollout.cat(kept)
    return roll.select(torch.arange(min(full, len(roll)))), rounds


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Run GRPO; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    rewards = rewards_of(task, cfg.reward, cfg.reward_timeout)
    policy, ref, rm, tok = load_models(cfg, device)
    freeze(cfg, ref, rm, trained=[policy])
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len, cfg.limits[-1], rewards)
    longest = cfg.limits[-1]
    sampler = copy.deepcopy(policy) if cfg.off_policy_steps else policy
    dist.spread(cfg, policy, frozen=(ref, rm))  # one process: as they are; several: all get the same
    settings = dict(betas=(0.9, 0.99), eps=cfg.adam_eps, weight_decay=cfg.weight_decay)
    opt = adamw(policy.parameters(), device, lr=cfg.lr, **settings)
    if cfg.loss == "reinforce" and (cfg.epochs * cfg.minibatches > 1 or cfg.off_policy_steps):
        print("warning: --loss reinforce has no ratio: biased in all updates but the first of fresh samples")

    kl_to = ref if cfg.kl == "exact" else None

    score = partial(score_responses, rm=rm, rewards=rewards)
    with rewards, Run(cfg, COLUMNS + rewards.columns(), SHOW, PANELS, tok) as run:
        measure = partial(
            evaluate, policy, tok, test_rows, score, cfg.temperature, cfg.seed, record=run.held_out
        )
        if not (cfg.data or cfg.resume):
            pass_gate(policy, tok, task, longest, cfg.seed)
        saved = {"policy": policy}  # --resume loads these; the frozen models must be unchanged
        frozen = []
        if cfg.ref_every:
            saved["ref"] = ref
        else:
            frozen.append(ref)
        # With --resume, run.start gives back the progress of the checkpoint instead of this one.
        progress = {"drawn": 0, "history": {}, "past": [], "updates": 0}
        start, progress = run.start(saved, opt, frozen, progress)

        for step in range(start, cfg.steps):
            metrics = {}
            limit = cfg.limits[sum(step >= at for at in cfg.lengthen_at)]  # 24, 40, 64: one more at each step
            # ---- the same in train_ppo.py and train_grpo.py
            if test_rows and due(step, cfg.eval_every):
                metrics |= measure(limit)
            clock = Clock()
            # ---- end
            if cfg.ref_every and progress["updates"] >= cfg.ref_every:
                ref.load_state_dict(lora.merged_weights(policy))
                progress["updates"] -= cfg.ref_every
            if cfg.off_policy_steps:
                past = progress["past"]  # weights of this and the steps before; the sampler has the oldest
                past.append(copy.deepcopy(lora.own_weights(policy)))
                del past[: -cfg.off_policy_steps - 1]
                sampler.load_state_dict(past[0], strict=False)  # adapters come without their frozen weights

            # ---- prompts, rollout, reward
            roll, rounds = sample_step(sampler, tok, cfg, rows, limit, progress, score)
            mask = roll.mask  # (B, T)
            old_logp = roll.logp  # (B, T)
            kl = ref_logp = None
            if ref is not None:
                ref_logp = roll.logp_under(ref, cfg.temperature, cfg.tokens_per_microbatch)  # (B, T)
                kl = (old_logp - ref_logp).sum(1).mean().item()  # nats per sequence
            reward = roll.reward + overlong(roll.response_len, limit, cfg.overlong_penalty)  # (B,)
            if cfg.kl != "none" and cfg.kl_in == "reward":
                k = kl_estimate(old_logp, ref_logp, cfg.kl)  # 0 outside the mask
                reward -= cfg.beta * k.sum(1)

            # ---- advantage
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
            weight = mask.sum(1) if cfg.norm == "batch_whiten" else torch.ones_like(adv)
            mean_adv = ((adv * weight).sum() / weight.sum()).item()  # near 0; batch_whiten counts tokens
            batch = roll.batch() | {"ref_logp": ref_logp, "adv": adv}
            run.rollout(step, roll, policy, batch, reward=reward)

            # ---- loss and update: epochs × minibatches (optimizer steps) × micro-batches (memory)
            unit = torch.arange(len(roll))  # rows are dealt to the minibatches
            if cfg.agg == "prompt_mean":
                unit = roll.group  # a prompt stays whole: a half of it would weigh like a whole one
            set_rate(opt, rl_rate(step, cfg))
            # over the updates of this step; averages() divides sums by their number
            figures = Figures(clip="sum", entropy="sum", gnorm="sum", ratio_max="max", gap="first")
            # ---- the same in train_ppo.py and train_grpo.py
            for epoch in range(cfg.epochs):
                seed = derive_seed(cfg.seed, "minibatches", step, epoch)
                for index in deal(unit, cfg.minibatches, seed):
                    minibatch = take_rows(batch, index)
                    # ---- end
                    if cfg.dead_groups != "keep" and not adv.any():  # else the KL alone would make an update
                        continue
                    minibatch["w"] = token_weights(minibatch["mask"], minibatch["group"], cfg)
                    minibatch["w_sum"] = minibatch["w"].sum().item()
                    minibatch["n_tokens"] = minibatch["mask"].sum().item()
                    opt.zero_grad()
                    share = dist.share(minibatch)  # one process: all of it; several: this one's rows
                    update = gradient(policy, share, cfg, kl_to)
                    update = dist.whole_step(update, policy)  # one process: as it is
                    update["gnorm"] = clip_gradient(policy, cfg.max_grad_norm)
                    where = f"samples {index[:4].tolist()} …, prompt {roll.rows[index[0]]['prompt']!r}"
                    run.check(step, update.pop("loss"), update["gnorm"], where, minibatch, [policy])
                    opt.step()
                    progress["updates"] += 1  # since the reference was renewed
                    figures.add(update)

            # ---- one log line
            sampled = Rollout.cat(rounds)
            wrong = sampled.response_len[sampled.reward <= 0].float()
            metrics |= {
                "gnorm": 0.0,  # stays where no update was made
                "len_wrong": wrong.mean().item() if len(wrong) else None,
                "rounds": len(rounds),
                "sampled": int(sampled.response_len.sum()),
                "limit": limit,
            }
            # ---- the same in train_ppo.py and train_grpo.py
            metrics |= figures.averages()
            metrics |= sample_figures(sampled, cfg.group_size)
            metrics |= rewards.figures(roll)
            tokens = int(mask.sum())
            metrics |= clock.columns(tokens)
            metrics["kl"] = kl
            metrics["lr"] = opt.param_groups[0]["lr"]
            if step == 0:
                exact = cfg.dtype == "float32"
                run.log.say(health(metrics, mean_adv, tokens, cfg.ref == cfg.init, exact))
            done = step + 1
            if test_rows and done == cfg.steps:
                metrics |= measure(longest)
            run.log.row(step, metrics)
            # ---- end
            run.checkpoint(done, lambda: hub.save(policy, tok, f"{cfg.out}/model"), progress)
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rl(cfg, load_models))


if __name__ == "__main__":
    sys.exit(main())
