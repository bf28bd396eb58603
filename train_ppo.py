"""PPO for language models: critic, KL to a reference in the reward, GAE, clipped policy and value losses.

    r_t  = −β (log π_old(y_t) − log π_ref(y_t)) + [t = last] · score                   reward per token
    A_t  = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t,   R_t = A_t + V_t        GAE; A is then whitened
    ρ_t  = π_θ(y_t) / π_old(y_t)
    L    = 1/N · Σ_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 ± ε))                              policy
         + c · 1/N · Σ_t ½ max((V_t − R_t)², (clip(V_t, V_old ± ε_v) − R_t)²)          critic

With --kl exact, β · 1/N · Σ_t KL(π_θ‖π_ref) over the vocabulary joins the loss, in place of the KL in r_t.
With --entropy_coef c, −c · 1/N · Σ_t H(π_θ) joins it, the entropy where token t was sampled.
N counts the sampled tokens of the whole optimizer step. Sources: PPO (arXiv 1707.06347), GAE (1506.02438),
RLHF with PPO (1909.08593, 2009.01325) and "The N+ Implementation Details of RLHF with PPO" (2403.17031): the
comments "detail n" are its numbers; docs/details.md says what happens without each.

Where we deviate from N+: right padding; the score stands on EOS itself, not one slot behind it; the sampler
stops at EOS instead of always drawing 53 tokens; policy and critic have learning rates and gradient clips of
their own.

CPU   python train_ppo.py                  25 s on one core; gold + 1.8 to + 2.4 at a KL of 4 to 5
      python train_ppo.py --task chain     11 s; sampled accuracy 0.43 → 0.98, greedy 0.1 → 1.0
GPU   python train_ppo.py --data prompts.jsonl --init runs/sft/model --rm runs/rm/model --max_new_tokens 512 \
          --dtype bfloat16
      not measured yet
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch

from nanorlhf import hub, tasks
from nanorlhf.data import deal, epoch_batches, microbatches, take_rows, trim
from nanorlhf.errors import derive_seed, require
from nanorlhf.generate import sample_responses
from nanorlhf.metrics import Figures, sample_figures
from nanorlhf.rewards import evaluate, load_prompts, pass_gate, score_responses, unit_of
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, clip_gradient, freeze, setup
from nanorlhf.run.log import Clock, due, health
from nanorlhf.run.models import load_models_and_critic
from nanorlhf.run.worker import rewards_of

# ------------------------------------------------------------------------------------------------------------
# Config

VALUE_CLIP = 0.2  # ε_v of the critic's move
VF_COEF = 0.1  # c; with a learning rate of its own, the critic feels it through the gradient's clipping only
KL_HORIZON = 1000  # samples over which the adaptive beta moves


@dataclass
class Config(Flags):
    # data
    task: str = ""  # built-in task: reviews (the default), chain or countdown; sets many defaults
    data: str = ""  # file of prompts (formats: docs/data.md), in place of the task's own
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    reward_timeout: float = 10.0  # seconds for a call of --reward, in a process; 0: no limit, no process
    rm: str = ""  # reward model folder; empty: runs/TASK-rm/model, unless there is a reward function
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init, of a real model only with a KL; none: no reference
    critic_init: str = ""  # folder the critic starts from; empty: the reward model, else the policy
    out: str = ""  # run folder; empty: runs/TASK-ppo, or with --data runs/FILE-ppo

    # method
    kl: Literal["k1", "exact"] = "k1"  # k1: in the reward; exact: over the vocabulary, in the loss
    beta: float | None = None  # KL coefficient, reward per nat; with --reward 0
    kl_target: float = 0.0  # nats per sequence that an adaptive beta steers to; 0: beta is fixed
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's λ
    clip: float = 0.2  # ε of the policy ratio
    entropy_coef: float = 0.0  # weight of an entropy bonus in the policy loss; N+: 0
    no_eos_score: float | None = None  # score of a response that never ends (detail 23.3)
    whiten_advantages: bool = True  # advantages get mean 0 and variance 1 over the rollout
    whiten_rewards: bool = False  # divide rewards by their standard deviation (detail 24)

    # optimisation
    steps: int | None = None  # rollouts, each for epochs × minibatches updates; of own data: 1 pass
    epochs: int = 1  # passes over each rollout
    minibatches: int | None = None  # optimizer steps in each pass
    lr: float | None = None  # policy learning rate, linear to 0 (detail 20)
    critic_lr: float | None = None  # critic learning rate, linear to 0
    adam_eps: float = 1e-5  # Adam's eps (detail 20); with PyTorch's 1e-8 the first step is a fifth longer
    max_grad_norm: float = 1.0  # gradient norms of policy and critic are clipped to it, each on its own
    tokens_per_microbatch: int = 1024  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve

    # sampling
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int = 1  # samples per prompt
    max_new_tokens: int | None = None  # longest response, EOS included; own data: what the context holds
    temperature: float = 1.0  # of sampling, and of every log-prob

    # evaluation
    eval_prompts: int | None = None  # held-out prompts to measure on; of own data 128, of --eval_data all
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl

    # run
    save_every: int = 20  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = {"eval_prompts": 256, "critic_lr": 1e-3}
    BY_TASK: ClassVar = {
        "reviews": dict(
            steps=60,
            prompts_per_step=96,
            max_new_tokens=40,
            minibatches=2,
            lr=5e-4,
            beta=0.3,
            no_eos_score=-1.0,
        ),
        "chain": dict(
            steps=60,
            prompts_per_step=256,
            max_new_tokens=11,
            minibatches=4,
            lr=5e-4,
            beta=0.0,
            no_eos_score=0.0,
        ),
        "countdown": dict(
            steps=200,
            prompts_per_step=512,
            max_new_tokens=6,
            minibatches=4,
            lr=2e-4,
            beta=0.0,
            no_eos_score=0.0,
        ),
    }

    def __post_init__(self):
        if self.beta is None and (self.rm or self.reward):
            self.beta = 0.3 if self.rm else 0.0  # a learnt reward is over-optimised without a penalty
        self.fill("ppo")
        self.fill_judge()
        self.critic_init = self.critic_init or self.rm or self.init
        counts = "steps prompts_per_step group_size max_new_tokens epochs minibatches sample_every"
        above_zero = f"{counts} lr critic_lr adam_eps temperature max_grad_norm".split()
        check_ranges(self, above_zero, any_sign=("seed", "no_eos_score"))
        require(max(self.gamma, self.lam) <= 1, "--gamma and --lam: must not be above 1")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        require(self.kl == "k1" or self.beta, "--kl exact: has no effect with --beta 0")
        if self.beta or self.kl_target:
            require(self.ref != "none", "--beta and --kl_target need a reference, --ref is none")
        rows = self.prompts_per_step * self.group_size
        require(rows >= self.minibatches, f"--minibatches {self.minibatches}: a step has {rows} samples only")


COLUMNS = (
    "step reward reward_se reward_failed kl entropy len stop dead clip ratio_max gap gnorm value_loss "
    "explained_var critic_gnorm beta lr tok_s s eval/reward eval/greedy"
).split()
SHOW = ["reward", "kl", "entropy", "len", "stop", "clip", "gnorm", "gap"]
PANELS = ["reward", "kl", "entropy", "len", "clip", "explained_var"]

# ------------------------------------------------------------------------------------------------------------
# Rewards, advantages, losses. Per-token tensors are (B, T), indexed by the token they describe


def shape_rewards(score, logp, ref_logp, mask, finished, beta, no_eos_score=-1.0):
    """score (B,) of whole responses → reward per token (B, T): −beta·k1, and the score on the last token.

    k1 = logp − ref_logp: its mean over samples is KL(π‖ref), and in the reward it has the right gradient;
    k2 and k3 have not. A row that never ended gets no_eos_score in place of its score (detail 23.3),
    unless that is None.

    >>> logp = torch.tensor([[0.0, -1.0, -0.5]])  # one prompt token, two sampled ones
    >>> ref_logp = torch.tensor([[0.0, -2.0, -0.5]])
    >>> mask = torch.tensor([[0, 1, 1]])
    >>> shape_rewards(torch.tensor([3.0]), logp, ref_logp, mask, torch.tensor([True]), beta=0.5)
    tensor([[ 0.0000, -0.5000,  3.0000]])
    """
    mask = mask.bool()
    reward = torch.where(mask, -beta * (logp - ref_logp), 0.0)
    if no_eos_score is not None:
        score = torch.where(finished.bool(), score, no_eos_score)  # detail 23.3
    tokens_left = mask.flip(1).cumsum(1).flip(1)  # (B, T) sampled tokens from this one on
    last = mask & (tokens_left == 1)  # EOS, where the response ended
    return reward + last * score[:, None]


def gae(reward, value, mask, gamma, lam):
    """Generalized advantage estimation: (B, T) each → advantages (B, T), returns (B, T).

    A row ends at its last mask = 1, with next value 0. Outside the mask both results are 0, and what stands
    there is not read.

    >>> reward = torch.tensor([[9.0, 0.0, 1.0]])  # the prompt's token is not read
    >>> value = torch.tensor([[9.0, 0.5, 0.25]])
    >>> adv, ret = gae(reward, value, torch.tensor([[0, 1, 1]]), gamma=1.0, lam=1.0)
    >>> adv
    tensor([[0.0000, 0.5000, 0.7500]])
    >>> ret
    tensor([[0., 1., 1.]])
    """
    mask = mask.bool()
    adv = torch.zeros_like(reward)
    next_adv = torch.zeros_like(reward[:, 0])  # (B,)
    next_value = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        inside = mask[:, t]  # (B,)
        delta = reward[:, t] + gamma * next_value - value[:, t]
        adv[:, t] = torch.where(inside, delta + gamma * lam * next_adv, 0.0)
        next_adv = torch.where(inside, adv[:, t], next_adv)
        next_value = torch.where(inside, value[:, t], next_value)
    return adv, torch.where(mask, adv + value, 0.0)


def whiten(x, mask, shift_mean=True):
    """(B, T) → unit variance over the mask, and zero mean with shift_mean; 0 outside.

    Biased variance and eps 1e-8, as in N+ (TRL and verl take the unbiased one).

    >>> whiten(torch.tensor([[9.0, 1.0, 3.0]]), torch.tensor([[0, 1, 1]]))
    tensor([[ 0., -1.,  1.]])
    """
    mask = mask.bool()
    unit = unit_of(torch.where(mask, x, 0.0))  # 1, or large rewards would have infinite squares
    x = x / unit
    n = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / n
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / n
    y = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        y = y + unit * mean
    return torch.where(mask, y, 0.0)


def policy_loss(logp, old_logp, adv, mask, clip, denom):
    """PPO's clipped surrogate: sum over the mask / denom (tokens of the optimizer step) → loss, stats.

    stats: the share of tokens whose ratio was clipped, and the largest ratio. The log-ratio is clamped to
    ±20: a ratio that is far too large is then e^20, and not infinite.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped = -adv * ratio
    clipped = -adv * ratio.clamp(1 - clip, 1 + clip)
    larger = torch.maximum(unclipped, clipped)
    loss = torch.where(mask, larger, 0.0).sum() / denom
    is_clipped = (clipped > unclipped) & mask
    largest = torch.where(mask, ratio.detach(), 0.0).max()
    return loss, {"clip": is_clipped.sum() / denom, "ratio_max": largest}


def value_loss(value, old_value, ret, mask, clip, denom):
    """½ · the larger squared error: of the critic, or of the critic clipped to ±clip around its old value.

    Summed over the mask and divided by denom → loss, stats (the share of tokens where the clipped error
    counts).
    """
    mask = mask.bool()
    clipped_value = old_value + (value - old_value).clamp(-clip, clip)
    error = (value - ret).square()
    clipped_error = (clipped_value - ret).square()
    larger = torch.maximum(error, clipped_error)
    loss = 0.5 * torch.where(mask, larger, 0.0).sum() / denom
    is_clipped = (clipped_error > error) & mask
    return loss, {"value_clip": is_clipped.sum() / denom}


def microbatch_loss(policy, batch, cfg, kl_to=None):
    """→ loss, stats of `policy_loss`, log-probs and entropies (B, T) of one micro-batch.

    kl_to: the reference, with --kl exact: Σ_v π (log π − log π_ref) at every sampled position joins the loss.
    """
    tokens = batch["tokens"]
    mask = batch["mask"]
    denom = batch["denom"]

    def chunk_loss(logp, entropy, chunk):
        """chunk (B, T) marks the tokens whose logits are at hand: their part of the loss needs no others."""
        loss, stats = policy_loss(logp, batch["old_logp"], batch["adv"], chunk, cfg.clip, denom)
        return loss - cfg.entropy_coef * entropy.sum() / denom, stats

    loss, stats, logp, entropy, *kl = policy.logprobs(
        tokens, mask, cfg.temperature, chunk_loss, kl_to=kl_to
    )
    if kl_to is not None:
        loss = loss + batch["beta"] * kl[0].sum() / denom
    return loss, stats, logp, entropy


def gradient(policy, critic, batch, cfg, kl_to=None):
    """Add up the gradients of one optimizer step, micro-batch by micro-batch → its figures.

    batch: tokens, mask, old_logp, adv, old_value, ret (B, T), lengths (B,), and denom, the sampled tokens of
    the whole step. So any part of the step's rows gives its part of the gradients. gap is the largest
    |logp − old_logp|: before the first update it is rounding alone.
    """
    figures = Figures(loss="sum", clip="sum", value_loss="sum", entropy="sum", ratio_max="max", gap="max")
    denom = batch["denom"]
    cut = microbatches(batch["lengths"], cfg.tokens_per_microbatch)
    passes = [policy.logprobs]
    if kl_to is not None:
        passes.append(kl_to.logprobs)  # with --shard every process must run the reference equally often
    with at_work(kl_to):
        for rows in dist.paced(cut, *passes, critic.values):  # one process: as they are; several: as many
            mb = trim(take_rows(batch, rows))
            pg_loss, stats, logp, entropy = microbatch_loss(policy, mb, cfg, kl_to)
            value = critic.values(mb["tokens"], mb["mask"])
            old_value = mb["old_value"]
            vf_loss, _ = value_loss(value, old_value, mb["ret"], mb["mask"], VALUE_CLIP, denom)
            loss = pg_loss + VF_COEF * vf_loss
            loss.backward()
            figures.add_tensors({
                "loss": loss,
                "clip": stats["clip"].sum(),
                "value_loss": vf_loss,
                "entropy": entropy.sum() / denom,
                "ratio_max": stats["ratio_max"].max(),
                "gap": (logp.detach() - mb["old_logp"]).abs().max(),
            })  # fmt: skip
    return figures.read()


def adapt_beta(beta, kl, cfg, samples):
    """The adaptive KL controller of arXiv 1909.08593: beta moves so that kl comes to cfg.kl_target."""
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return beta * (1 + error * samples / KL_HORIZON)


def explained_variance(value, ret, mask):
    """1 − Var(ret − value) / Var(ret) over the mask: 1 for a perfect critic, None where ret is constant."""
    spread = ret[mask].var(correction=0)
    error = (ret - value)[mask].var(correction=0)
    return 1 - (error / spread).item() if spread > 1e-8 else None


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Run PPO; leaves cfg.out/model (the policy) and cfg.out/critic → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    rewards = rewards_of(task, cfg.reward, cfg.reward_timeout)
    # detail 22: the critic starts as the reward model
    policy, ref, critic, rm, tok = load_models_and_critic(cfg, device)
    freeze(cfg, ref, rm, trained=(policy, critic))
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len, cfg.max_new_tokens, rewards)
    longest = cfg.max_new_tokens
    dist.spread(cfg, policy, critic, frozen=(ref, rm))  # one process: as they are; several: all get the same
    groups = [
        {"params": policy.parameters(), "peak": cfg.lr},
        {"params": critic.parameters(), "peak": cfg.critic_lr},
    ]
    opt = adamw(groups, device, lr=cfg.lr, eps=cfg.adam_eps, weight_decay=0.0)

    kl_to = ref if cfg.kl == "exact" else None

    score = partial(score_responses, rm=rm, rewards=rewards)

    def export():
        hub.save(policy, tok, f"{cfg.out}/model")
        hub.save(critic, tok, f"{cfg.out}/critic")

    with rewards, Run(cfg, COLUMNS + rewards.columns(), SHOW, PANELS, tok) as run:
        measure = partial(
            evaluate, policy, tok, test_rows, score, cfg.temperature, cfg.seed, record=run.held_out
        )
        if not (cfg.data or cfg.resume):
            pass_gate(policy, tok, task, longest, cfg.seed)
        saved = {"policy": policy, "critic": critic}
        start, extra = run.start(saved, opt, frozen=[ref], extra={"beta": cfg.beta})
        beta = extra["beta"] if cfg.kl_target else cfg.beta

        for step in range(start, cfg.steps):
            metrics = {}
            limit = longest
            # ---- the same in train_ppo.py and train_grpo.py
            if test_rows and due(step, cfg.eval_every):
                metrics |= measure(limit)
            clock = Clock()
            # ---- end

            # ---- prompts (detail 21: reshuffled when they end), rollout (detail 7: no dropout), reward
            seed = derive_seed(cfg.seed, "data")
            order = epoch_batches(len(rows), cfg.prompts_per_step, seed, step)
            prompts = [rows[i] for i in order]
            seed = derive_seed(cfg.seed, "rollout", step)
            roll = sample_responses(policy, tok, prompts, cfg.group_size, limit, cfg.temperature, seed)
            roll.reward = score(roll)  # (B,)
            mask = roll.mask  # (B, T)
            old_logp = roll.logp  # (B, T): the sampler's log-probs are the old policy's own
            kl = None
            ref_logp = old_logp  # without a reference beta is 0
            if ref is not None:
                ref_logp = roll.logp_under(ref, cfg.temperature, cfg.tokens_per_microbatch)  # (B, T)
                kl = (old_logp - ref_logp).sum(1).mean().item()  # nats per sequence
            reward_beta = beta if cfg.kl == "k1" else 0.0  # exact: beta weighs the KL in the loss
            reward = shape_rewards(
                roll.reward, old_logp, ref_logp, mask, roll.finished, reward_beta, cfg.no_eos_score
            )  # (B, T)
            if cfg.whiten_rewards:
                reward = whiten(reward, mask, shift_mean=False)  # detail 24

            # ---- advantage
            old_value = roll.per_token(critic.values, cfg.tokens_per_microbatch)  # (B, T)
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
            mean_adv = None
            if cfg.whiten_advantages:
                adv = whiten(adv, mask)  # detail 25: over the whole rollout
                mean_adv = (adv.sum() / mask.sum()).item()
            batch = roll.batch() | {"old_value": old_value, "adv": adv, "ret": ret, "beta": beta}
            run.rollout(step, roll, policy, batch, reward=reward, ref_logp=ref_logp if ref else None)

            # ---- loss and update: epochs × minibatches (optimizer steps) × micro-batches (memory)
            unit = torch.arange(len(roll))  # rows are dealt to the minibatches
            for group in opt.param_groups:
                group["lr"] = group["peak"] * (1 - step / cfg.steps)  # detail 20: linear to 0
            figures = Figures(
                clip="sum",
                value_loss="sum",
                entropy="sum",
                gnorm="sum",
                critic_gnorm="sum",
                ratio_max="max",
                gap="first",
            )
            # ---- the same in train_ppo.py and train_grpo.py
            for epoch in range(cfg.epochs):
                seed = derive_seed(cfg.seed, "minibatches", step, epoch)
                for index in deal(unit, cfg.minibatches, seed):
                    minibatch = take_rows(batch, index)
                    # ---- end
                    minibatch["denom"] = minibatch["mask"].sum()  # of this optimizer step, however it is cut
                    opt.zero_grad()
                    share = dist.share(minibatch)  # one process: all of it; several: this one's rows
                    update = gradient(policy, critic, share, cfg, kl_to)
                    update = dist.whole_step(update, policy, critic)  # one process: as it is
                    update["gnorm"] = clip_gradient(policy, cfg.max_grad_norm)
                    update["critic_gnorm"] = clip_gradient(critic, cfg.max_grad_norm)
                    gnorm = update["gnorm"] + update["critic_gnorm"]
                    where = f"samples {index[:4].tolist()} …, prompt {roll.rows[index[0]]['prompt']!r}"
                    run.check(step, update.pop("loss"), gnorm, where, minibatch, [policy, critic])
                    opt.step()
                    figures.add(update)

            # ---- one log line
            sampled = roll
            metrics["explained_var"] = explained_variance(old_value, ret, mask)
            metrics["beta"] = beta
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
            if cfg.kl_target:
                beta = adapt_beta(beta, kl, cfg, len(roll))
            run.checkpoint(done, export, {"beta": beta})
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rl(cfg, load_models_and_critic))


if __name__ == "__main__":
    sys.exit(main())
