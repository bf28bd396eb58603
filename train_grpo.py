"""GRPO for language models: groups of samples instead of a critic. Its family is a few visible lines each.

    Â_i   = (r_i − mean_group r) / std_group r                                     --norm
    ρ_it  = π_θ(y_it) / π_old(y_it)                                                --ratio
    l_it  = max(−Â_i ρ_it, −Â_i clip(ρ_it, 1 − ε_low, 1 + ε_high))                 --loss
    L     = Σ_i Σ_t w_it (l_it + β k_it)                                           --agg, --kl

The weights w_it are the aggregation: they are computed once for the whole optimizer step, so that cutting it
into micro-batches cannot change the loss. k is an estimator of the KL to the reference, in the loss or, as
−β Σ_t k1, in the reward. The defaults are GRPO with a token mean and no KL; `--recipe` sets a published
combination, and any flag that is given wins over it.

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++ (2501.03262), DAPO
(2503.14476), GSPO (2507.18071), CISPO (2506.13585), ScaleRL (2510.13786), DeepSeek-R1 (2501.12948),
DeepScaleR (context-length curriculum), dual clip (1912.09729), KL estimators (joschu.net/blog/kl-approx).

CPU   python train_grpo.py                       23 s with its SFT; accuracy 0.41 → 0.98, greedy 0.1 → 1.0
      python train_grpo.py --task countdown      62 s; accuracy 0.22 → 0.49, greedy 0.38 → 0.54 (seed 0)
GPU   python train_grpo.py --init runs/sft/model --data prompts.jsonl --reward my.py:score --dtype bfloat16
      not measured yet
"""

import copy
import sys
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from nanorlhf import generate, hub, lora, tasks
from nanorlhf.data import epoch_batches, microbatches
from nanorlhf.errors import derive_seed, require
from nanorlhf.metrics import sample_figures
from nanorlhf.rewards import evaluate, health, length_schedule, load_prompts, pass_gate, score_responses
from nanorlhf.rollout import Rollout
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, freeze, setup
from nanorlhf.run.log import Clock
from nanorlhf.run.models import load_models
from nanorlhf.run.worker import Rewards

# ------------------------------------------------------------------------------------------------------------
# Config

RECIPES = {  # a published recipe sets these flags; those that it does not name come from the first row
    "": dict(
        norm="group_std", ratio="token", loss="clip", clip_low=0.2, clip_high=0.2, agg="token", kl="none",
        kl_in="loss", beta=0.0, ref_every=0, filter_dead_groups=False, max_rounds=1,
        no_positive_resampling=0.0, overlong_penalty=0.0,
    ),
    # DeepSeekMath, arXiv 2402.03300 (there: one update a rollout, --minibatches 1)
    "grpo": dict(norm="group_std", agg="seq_mean", kl="k3", beta=0.04),
    # Dr. GRPO, 2503.20783: without 1/std and 1/length, which bias the gradient
    "dr_grpo": dict(norm="none", agg="seq_sum_const"),
    # RLOO, 2402.14740
    "rloo": dict(norm="leave_one_out", loss="reinforce", agg="seq_sum_const", kl="k1", kl_in="reward",
                 beta=0.05, minibatches=1),
    # REINFORCE++ with baseline, 2501.03262
    "reinforce++": dict(norm="batch_whiten", agg="token", kl="k2", beta=0.01),
    # DAPO, 2503.14476; give --max_new_tokens room: its soft penalty takes the last fifth
    "dapo": dict(norm="group_std", agg="token", clip_high=0.28, filter_dead_groups=True, max_rounds=4,
                 overlong_penalty=0.2),
    # GSPO, 2507.18071
    "gspo": dict(norm="group_std", ratio="sequence", agg="seq_mean", clip_low=3e-4, clip_high=4e-4),
    # CISPO, MiniMax-M1, 2506.13585
    "cispo": dict(norm="group_std", loss="cispo", agg="token"),
    # ScaleRL, 2510.13786
    "scalerl": dict(norm="batch_std", loss="cispo", agg="prompt_mean", filter_dead_groups=True,
                    no_positive_resampling=0.9),
    # DeepSeek-R1-Zero, 2501.12948
    "r1_zero": dict(norm="group_std", agg="seq_mean", clip_low=10.0, clip_high=10.0, kl="k3", beta=0.001,
                    ref_every=400),
    # DeepScaleR: and --max_new_tokens 24,40,64, --temperature 0.6
    "deepscaler": dict(norm="group_std", agg="token", kl="k3", beta=0.001),
}


@dataclass
class Config(Flags):
    task: str = "chain"  # built-in task: chain, countdown or reviews; sets the defaults that differ by task
    recipe: Literal[tuple(RECIPES)] = ""  # flags of a published recipe; flags given explicitly win
    data: str = ""  # file of prompts (formats: nanorlhf/hub/formats.py), in place of the task's own
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    reward_timeout: float = 10.0  # seconds for a call of --reward, in a process of its own; 0: none, no limit
    rm: str = ""  # reward model folder, where the task has no reward function; empty: runs/TASK-rm/model
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder for the KL; empty: --init
    out: str = ""  # run folder; empty: runs/TASK-grpo

    steps: int | None = None  # rollouts; each is used for epochs × minibatches optimizer steps
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int | None = None  # G, samples per prompt
    max_new_tokens: str | None = None  # longest response, EOS included; 24,40,64: lengthened in the run
    lengthen_at: str = ""  # steps of the lengthenings (40,80), or the truncation rate that brings one (0.2)
    temperature: float = 1.0  # of sampling, and of every log-prob
    epochs: int = 1  # passes over each rollout
    minibatches: int | None = None  # optimizer steps in each pass
    off_policy_steps: int = 0  # sample with the weights of this many steps ago
    lr: float | None = None  # learning rate: 5 steps of warm-up, then linear to 0
    lr_decay: float = 1.0  # share of lr that is gone at the end; 0: constant, so that more steps only add
    lora_rank: int = 0  # rank of adapters on frozen weights (nanorlhf/lora.py); 0: all weights are trained
    max_grad_norm: float = 1.0  # gradient norm is clipped to it

    norm: Literal["group_std", "batch_std", "none", "leave_one_out", "batch_whiten"] | None = None  # for Â_i
    std_eps: float = 1e-6  # added to the standard deviation
    ratio: Literal["token", "sequence"] | None = None  # importance ratio; sequence: GSPO
    loss: Literal["clip", "cispo", "reinforce"] | None = None  # surrogate
    clip_low: float | None = None  # ε_low
    clip_high: float | None = None  # ε_high; above ε_low: clip-higher (DAPO)
    dual_clip: float = 0.0  # for A < 0, a bound c on the ratio's weight, 3 in the paper; 0: none
    cispo_cap: float = 5.0  # cap of CISPO's weight
    agg: Literal["seq_mean", "token", "seq_sum_const", "prompt_mean"] | None = None  # weights of the tokens
    kl: Literal["none", "k1", "k2", "k3"] | None = None  # estimator of KL(policy‖reference)
    kl_in: Literal["loss", "reward"] | None = None  # where it enters
    kl_unbiased: bool = False  # multiply the estimator in the loss by the ratio: k3's gradient is then exact
    beta: float | None = None  # KL coefficient
    ref_every: int | None = None  # steps after which the reference becomes the policy; 0: never

    filter_dead_groups: bool | None = None  # drop groups whose rewards are all equal
    max_rounds: int | None = None  # rounds of sampling at most, to fill the step with live groups; 1: no more
    no_positive_resampling: float | None = None  # never again a prompt whose pass rate reached this; 0: off
    overlong_filter: bool = False  # truncated responses do not enter the loss
    overlong_penalty: float | None = None  # soft penalty over this last share of the length; 0: none
    tokens_per_microbatch: int = 4096  # padded tokens at once, to bound memory; 0: all. Never moves the curve

    eval_prompts: int = 512  # held-out prompts for eval/reward and eval/greedy
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl
    save_every: int = 50  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = RECIPES[""]  # of the fields that recipes set
    BY_TASK: ClassVar = {
        "chain": dict(steps=50, prompts_per_step=16, group_size=16, max_new_tokens="11",
                      minibatches=4, lr=3e-4),
        "countdown": dict(steps=200, prompts_per_step=32, group_size=16, max_new_tokens="6",
                          minibatches=4, lr=2.5e-4),
        "reviews": dict(steps=60, prompts_per_step=12, group_size=8, max_new_tokens="40",
                        minibatches=2, lr=5e-4),
    }

    def __post_init__(self):
        require(self.recipe in RECIPES, f"--recipe {self.recipe}: must be one of {', '.join(RECIPES)[2:]}")
        kl, beta = self.kl, self.beta  # as given
        self.fill_by_task(RECIPES[self.recipe], self.DEFAULTS)  # first come, first served
        how = "add --kl k3 (in the loss), or --kl k1 --kl_in reward"
        require(self.kl != "none" or not beta, f"--beta {beta}: there is no KL that it could weigh; {how}")
        idle = kl not in (None, "none") and beta is None and not self.beta
        require(not idle, f"--kl {kl}: has no effect without --beta; give one, such as --beta 0.04")
        self.init = self.init or f"runs/{self.task}-sft/model"
        self.ref = self.ref or self.init
        if not (self.rm or self.reward or tasks.get(self.task).reward):
            self.rm = f"runs/{self.task}-rm/model"
        self.out = self.out or f"runs/{self.task}-grpo"
        counts = "steps prompts_per_step epochs minibatches max_rounds sample_every"
        check_ranges(self, f"{counts} lr temperature std_eps cispo_cap max_grad_norm".split())
        G, rows = self.group_size, self.prompts_per_step * self.group_size
        require(G > 1, f"--group_size {G}: a group of one has nothing to be compared with; at least 2")
        require(rows >= self.minibatches, f"--minibatches {self.minibatches}: a step has {rows} samples only")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        require(not 0 < self.dual_clip <= 1, f"--dual_clip {self.dual_clip}: must be above 1, or 0 for none")
        require(self.lr_decay <= 1, f"--lr_decay {self.lr_decay}: must not be above 1")
        needs_ref = self.kl != "none" or self.ref_every
        require(not needs_ref or self.ref != "none", "--kl and --ref_every need a reference, --ref is none")
        self.limits, self.switches = length_schedule(self.max_new_tokens, self.lengthen_at)


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
    A group whose rewards are all equal gives exactly 0: rounding in the mean, divided by eps, would not.
    `length` (B,), tokens of each response, weighs the rows of batch_whiten; without it each counts once.
    """
    groups = int(group.max()) + 1
    zeros = reward.new_zeros(groups)
    size = zeros.index_add(0, group, torch.ones_like(reward))
    mean = zeros.index_add(0, group, reward) / size
    low = zeros.scatter_reduce(0, group, reward, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, reward, "amax", include_self=False)
    live = (low < high)[group]
    adv = torch.where(live, reward - mean[group], 0.0)
    if norm == "group_std":
        std = (zeros.index_add(0, group, adv.square()) / (size - 1)).sqrt()
        adv = adv / (std[group] + std_eps)
    elif norm == "batch_std":
        adv = adv / (adv.std() + std_eps)
    elif norm == "leave_one_out":
        adv = adv * (size / (size - 1))[group]
    elif norm == "batch_whiten":
        n = torch.ones_like(reward) if length is None else length.to(reward.dtype)
        centred = adv - (n * adv).sum() / n.sum()
        var = (n * centred.square()).sum() / (n.sum() - 1)
        adv = centred * torch.rsqrt(var + 1e-8)
    return torch.where(live, adv, 0.0)


def token_weights(mask, group, cfg):
    """mask (B, T), group (B,) of one optimizer step → weight (B, T) of each token in its loss.

    seq_mean       mean over responses of the mean over their tokens               GRPO
    token          mean over all tokens                                            DAPO
    seq_sum_const  mean over responses of their sum / L, L the longest allowed     Dr. GRPO
    prompt_mean    mean over prompts of the mean over all their tokens             ScaleRL
    """
    w = mask.float()
    length = w.sum(1)  # (B,)
    if cfg.agg == "token":
        return w / length.sum().clamp(min=1)
    if cfg.agg == "prompt_mean":
        prompts, index = group.unique(return_inverse=True)
        tokens = length.new_zeros(len(prompts)).index_add(0, index, length)
        return w / (tokens[index].clamp(min=1) * len(prompts))[:, None]
    per_row = length.clamp(min=1) if cfg.agg == "seq_mean" else torch.full_like(length, cfg.limits[-1])
    return w / (per_row * len(w))[:, None]


def kl_estimate(logp, ref_logp, kind):
    """Per token, ≥ 0 in expectation: k1 = log π/π_ref, k2 = ½ k1², k3 = π_ref/π − 1 − log π_ref/π."""
    log_r = (ref_logp - logp).clamp(-20, 20)
    return {"k1": -log_r, "k2": log_r.square() / 2, "k3": torch.expm1(log_r) - log_r}[kind]


def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
    """Σ w·l over a micro-batch of whole rows → loss, stats. All (B, T); adv (B,) or (B, T).

    stats: clip, the weighted share of tokens whose ratio the surrogate held; ratio_max, the largest ratio.
    """
    mask = mask.bool()
    adv = adv[:, None] if adv.dim() == 1 else adv
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    token_ratio = log_ratio.exp()
    if cfg.ratio == "sequence":  # GSPO: one ratio a row, the geometric mean; each token keeps its gradient
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.detach() + log_ratio - log_ratio.detach()
    ratio = log_ratio.exp()
    if cfg.loss == "clip":
        free, held = -adv * ratio, -adv * ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        loss, clipped = torch.maximum(free, held), held > free
        if cfg.dual_clip:
            loss = torch.where(adv < 0, torch.minimum(loss, -adv * cfg.dual_clip), loss)
    elif cfg.loss == "cispo":  # the weight is clipped, the gradient of no token is
        loss, clipped = -ratio.detach().clamp(max=cfg.cispo_cap) * adv * logp, ratio > cfg.cispo_cap
    else:
        loss, clipped = -adv * logp, torch.zeros_like(mask)
    stats = {"clip": (w * clipped).sum(), "ratio_max": (ratio.detach() * mask).max()}
    if cfg.kl != "none" and cfg.kl_in == "loss":
        k = kl_estimate(logp, ref_logp, cfg.kl)
        loss = loss + cfg.beta * (k * token_ratio if cfg.kl_unbiased else k)
    return (w * torch.where(mask, loss, 0.0)).sum(), stats


def token_loss(old_logp, ref_logp, adv, mask, w, cfg):
    """policy_loss of some tokens, at `at` in (B, T), as if they were one row: GPT.logprobs forms its gradient
    chunk by chunk. Not for --ratio sequence.
    """

    def loss(logp, entropy, at):
        ref = None if ref_logp is None else ref_logp[at][None]
        rows = adv[at[0]][None], mask[at][None], w[at][None]  # (1, n) each
        return policy_loss(logp[None], old_logp[at][None], ref, *rows, cfg)[0]

    return loss


def gradient(policy, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its loss, stats.

    batch: tokens, mask, old_logp, ref_logp (or None), w (B, T), lengths, adv (B,), and of the whole step
    w_sum, the sum of w, and n_tokens, its sampled tokens: any part of its rows then gives its part of the
    gradient and of stats; of ratio_max and gap, the largest |logp − old_logp|, the maximum counts.
    """
    total, stats = 0.0, defaultdict(float)
    for mb in dist.paced(microbatches(batch["lengths"], cfg.tokens_per_microbatch), policy.logprobs):
        T = int(batch["lengths"][mb].max())
        x, m, old_logp, w = (batch[name][mb, :T] for name in ("tokens", "mask", "old_logp", "w"))
        ref_logp = None if batch["ref_logp"] is None else batch["ref_logp"][mb, :T]
        given = old_logp, ref_logp, batch["adv"][mb], m, w, cfg
        if cfg.ratio == "token":
            loss, logp, entropy = policy.logprobs(x, m, cfg.temperature, token_loss(*given))
            loss.backward()
            loss, seen = policy_loss(logp, *given)  # the same number; its stats are for the log
        else:  # no sum over tokens: the ratio is one of whole rows
            logp, entropy = policy.logprobs(x, m, cfg.temperature)
            loss, seen = policy_loss(logp, *given)
            loss.backward()
        total += loss.item()
        stats["ratio_max"] = max(stats["ratio_max"], seen["ratio_max"].item())
        stats["gap"] = max(stats["gap"], (logp.detach() - old_logp).abs().max().item())
        stats["clip"] += seen["clip"].item() / batch["w_sum"]
        stats["entropy"] += entropy.sum().item() / batch["n_tokens"]
    return total, stats


def overlong(length, limit, share):
    """DAPO's soft penalty (B,): 0, then linearly down to −1 over the last `share` of the limit; 0: none."""
    late = length - (1 - share) * limit  # tokens beyond the start of that share
    return -(late / (share * limit)).clamp(0, 1) if share else torch.zeros_like(length)


# ------------------------------------------------------------------------------------------------------------
# train


@torch.no_grad()
def sample_groups(sampler, tok, cfg, rows, limit, seed_for, drawn, mastered, rm, rewards):
    """Groups of samples with their scores → rollout, its prompt rows and texts, score (B,), parts, info.

    One round of prompts; with --max_rounds more of them, until the step is full of groups that are not dead
    (DAPO's dynamic sampling). `drawn` counts the batches of prompts of the whole run, which is where in the
    data we are; prompts in `mastered` are skipped (ScaleRL). parts: {name: (B,)} of each reward; info: the
    figures of all that was sampled, dropped groups included.
    """
    rolls, batch, texts, scores, dead, seen, rounds = [], [], [], [], [], [], 0
    full = cfg.prompts_per_step * cfg.group_size
    while rounds < cfg.max_rounds and len(batch) < full:
        left = any(row["prompt"] not in mastered for row in rows)
        require(left, f"--no_positive_resampling: all {len(rows)} prompts reached it; give more prompts")
        picked = epoch_batches(len(rows), cfg.prompts_per_step, seed_for("data"), drawn)
        picked = [i for i in picked if rows[i]["prompt"] not in mastered]
        drawn += 1
        if not picked:
            continue
        rounds += 1
        prompts = [tok.encode_prompt(rows[i]["prompt"]) for i in picked]
        how = cfg.group_size, limit, cfg.temperature, tok.eos_id, seed_for("rollout", drawn)
        roll = generate.generate(sampler, prompts, *how, pad_id=tok.pad_id)
        prompt_rows = [rows[picked[g]] for g in roll.group.tolist()]
        answers = [tok.decode(ids) for ids in roll.responses()]
        part = {}
        score = score_responses(roll, answers, prompt_rows, rm, rewards, part)  # (B,)
        groups = score.view(-1, cfg.group_size)
        is_dead = groups.amax(1) == groups.amin(1)
        dead.append(is_dead)
        seen.append(torch.stack([score, roll.response_len, roll.finished]))
        if cfg.no_positive_resampling:
            solved = (groups.mean(1) >= cfg.no_positive_resampling).tolist()
            mastered.update(rows[i]["prompt"] for i, reached in zip(picked, solved) if reached)
        drop = is_dead & cfg.filter_dead_groups
        if drop.all() and (rolls or rounds < cfg.max_rounds):
            continue
        use = (~drop[roll.group] | drop.all()).nonzero()[:, 0]  # none alive at all: advantages are 0
        rolls.append(roll.select(use))
        batch += [prompt_rows[i] for i in use.tolist()]
        texts += [answers[i] for i in use.tolist()]
        scores.append(torch.stack([score, *part.values()])[:, use])
    score, *values = torch.cat(scores, 1)[:, :full]
    info = {"rounds": rounds, "drawn": drawn, "dead": torch.cat(dead).float().mean().item()}
    info |= sample_figures(*torch.cat(seen, 1), cfg.group_size)
    info["sampled"] = int(torch.cat(seen, 1)[1].sum())
    roll = Rollout.cat(rolls).select(slice(full))
    return roll, batch[:full], texts[:full], score, dict(zip(part, values)), info


def train(cfg):
    """Run GRPO; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    rewards = Rewards(cfg, task)
    policy, ref, rm, tok = load_models(cfg, device)
    freeze(cfg, ref, rm, trained=(policy,))
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len, cfg.limits[-1])

    def seed_for(*purpose):
        return derive_seed(cfg.seed, *purpose)

    sampler = copy.deepcopy(policy) if cfg.off_policy_steps else policy
    dist.spread(cfg, policy, frozen=(ref, rm))
    opt = adamw(policy.parameters(), device, lr=cfg.lr, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    names = [f"reward/{name}" for name, *_ in rewards] if len(rewards) > 1 else []
    if cfg.loss == "reinforce" and (cfg.epochs * cfg.minibatches > 1 or cfg.off_policy_steps):
        print("warning: --loss reinforce has no ratio: biased in all updates but the first of fresh samples")
    with rewards, Run(cfg, [*COLUMNS, *names], SHOW, PANELS) as run:
        if not (cfg.data or cfg.resume):
            pass_gate(policy, tok, task, cfg.limits[-1], seed_for("gate"))
        saved = {"policy": policy} | ({"ref": ref} if cfg.ref_every else {})
        start, extra = run.start(saved, opt, () if cfg.ref_every or ref is None else (ref,))
        drawn, mastered = extra.get("drawn", 0), set(extra.get("mastered", []))
        stage = min(extra.get("stage", 0), len(cfg.limits) - 1)  # a resumed run may have fewer limits
        past = deque(extra.get("past", []), maxlen=cfg.off_policy_steps + 1)  # the weights of the last steps

        for step in range(start, cfg.steps):
            metrics, sums = {}, defaultdict(float)
            if isinstance(cfg.switches, list):
                stage = sum(step >= at for at in cfg.switches)
            limit = cfg.limits[stage]
            if test_rows and (step == 0 or (cfg.eval_every and step % cfg.eval_every == 0)):
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards, run.log.say, limit)
            if cfg.ref_every and step and step % cfg.ref_every == 0:
                ref.load_state_dict(lora.merged(policy).state_dict())
            if cfg.off_policy_steps:
                past.append(copy.deepcopy(policy.state_dict()))
                sampler.load_state_dict(past[0])

            # ---- prompts, rollout, reward
            clock = Clock()
            roll, batch, texts, score, parts, info = sample_groups(
                sampler, tok, cfg, rows, limit, seed_for, drawn, mastered, rm, rewards
            )
            drawn = info.pop("drawn")
            mask, old_logp, budget = roll.mask, roll.logp, cfg.tokens_per_microbatch  # (B, T), (B, T)
            ref_logp = None
            if ref is not None:
                with at_work(ref):
                    ref_logp = roll.per_token(lambda x, m: ref.logprobs(x, m, cfg.temperature)[0], budget)
            reward = score + overlong(roll.response_len, limit, cfg.overlong_penalty)
            if cfg.kl != "none" and cfg.kl_in == "reward":
                reward = reward - cfg.beta * (kl_estimate(old_logp, ref_logp, cfg.kl) * mask).sum(1)

            # ---- advantage
            adv = advantages(reward, roll.group, cfg.norm, cfg.std_eps, roll.response_len)  # (B,)
            k1 = None if ref is None else (old_logp - ref_logp).sum(1).mean().item()  # nats per sequence
            if step == 0:
                logp = roll.per_token(lambda x, m: policy.logprobs(x, m, cfg.temperature)[0], budget)
                off = (logp - old_logp).abs().max().item()
                n = roll.response_len if cfg.norm == "batch_whiten" else torch.ones_like(adv)  # over tokens
                centre = ((adv * n).sum() / n.sum()).item()
                figures = off, k1, centre, info["dead"], info["stop"], int(mask.sum())
                run.log.say(health(*figures, ref_is_init=cfg.ref == cfg.init))

            # ---- loss and update: epochs × minibatches (optimizer steps) × micro-batches (memory)
            trained = mask & roll.finished[:, None] if cfg.overlong_filter else mask
            trained = trained & (adv.any() | (not cfg.filter_dead_groups))  # no group alive: no step at all
            whole = {"tokens": roll.tokens, "lengths": roll.lengths, "mask": mask, "old_logp": old_logp}
            whole |= {"ref_logp": ref_logp, "adv": adv}
            for group in opt.param_groups:
                group["lr"] = cfg.lr * min((step + 1) / 5, 1 - cfg.lr_decay * step / cfg.steps)
            for epoch in range(cfg.epochs):
                order = torch.Generator().manual_seed(seed_for("minibatches", step, epoch))
                for rows_of in torch.randperm(len(mask), generator=order).tensor_split(cfg.minibatches):
                    if not trained[rows_of].any():
                        continue  # every response too long, or every group dead
                    minibatch = {name: None if x is None else x[rows_of] for name, x in whole.items()}
                    w = token_weights(trained[rows_of], roll.group[rows_of], cfg)
                    minibatch |= {"w": w, "w_sum": w.sum().item(), "n_tokens": mask[rows_of].sum().item()}
                    opt.zero_grad()
                    total, stats = dist.total(*gradient(policy, dist.share(minibatch), cfg))
                    gnorm = dist.clip(policy.parameters(), cfg.max_grad_norm)
                    what = f"samples {rows_of[:4].tolist()} …, prompt {batch[rows_of[0]]['prompt']!r}"
                    run.check(step, total, gnorm, what, minibatch, [policy])
                    opt.step()
                    metrics["ratio_max"] = max(metrics.get("ratio_max", 0.0), stats.pop("ratio_max"))
                    metrics.setdefault("gap", stats.pop("gap"))  # of the first minibatch, before any update
                    for name, value in (stats | {"gnorm": gnorm, "updates": 1}).items():
                        sums[name] += value

            # ---- one log line
            updates = max(sums.pop("updates", 0), 1)
            metrics |= {"gnorm": 0.0} | {name: x / updates for name, x in sums.items()} | info
            metrics |= {f"reward/{name}": part.mean().item() for name, part in parts.items() if names}
            metrics |= {"kl": k1, "reward_failed": rewards.share_failed()}
            metrics |= {"limit": limit, "lr": opt.param_groups[0]["lr"]}
            if isinstance(cfg.switches, float) and 1 - metrics["stop"] > cfg.switches:
                stage = min(stage + 1, len(cfg.limits) - 1)
            metrics |= clock.columns(mask.sum().item())
            done = step + 1
            if step % cfg.sample_every == 0 or done == cfg.steps:
                run.log.samples(step, batch, texts, score)
            if done == cfg.steps and test_rows:
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards, run.log.say, cfg.limits[-1])
            run.log.row(step, metrics)
            extra = {"stage": stage, "drawn": drawn, "mastered": sorted(mastered), "past": list(past)}
            run.checkpoint(done, lambda: hub.save(policy, tok, f"{cfg.out}/model"), extra)
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rl(cfg, load_models))


if __name__ == "__main__":
    sys.exit(main())
