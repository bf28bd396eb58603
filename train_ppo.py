"""PPO for language models: critic, KL to a reference in the reward, GAE, clipped policy and value losses.

    r_t  = −β (log π_old(y_t) − log π_ref(y_t)) + [t = last] · score                   reward per token
    A_t  = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t,   R_t = A_t + V_t        GAE; A is then whitened
    ρ_t  = π_θ(y_t) / π_old(y_t)
    L    = 1/N · Σ_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 ± ε))                              policy
         + c · 1/N · Σ_t ½ max((V_t − R_t)², (clip(V_t, V_old ± ε_v) − R_t)²)          critic

N counts the sampled tokens of the whole optimizer step. Sources: PPO (arXiv 1707.06347), GAE (1506.02438),
RLHF with PPO (1909.08593, 2009.01325) and "The N+ Implementation Details of RLHF with PPO" (2403.17031): the
comments "detail n" are its numbers; docs/details.md says what happens without each.

Where we deviate from N+: right padding; the score stands on EOS itself, not one slot behind it; the sampler
stops at EOS instead of always drawing 53 tokens; policy and critic have learning rates and gradient clips of
their own.

CPU   python train_ppo.py                  25 s on one core; gold + 1.8 to + 2.4 at a KL of 4 to 5
      python train_ppo.py --task chain     11 s; sampled accuracy 0.43 → 0.98, greedy 0.1 → 1.0
GPU   python train_ppo.py --init runs/sft/model --rm runs/rm/model --data prompts.jsonl --dtype bfloat16
      not measured yet
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from nanorlhf import generate, hub, tasks
from nanorlhf.data import epoch_batches, microbatches
from nanorlhf.errors import derive_seed, require
from nanorlhf.rewards import evaluate, load_prompts, pass_gate, score_responses
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, freeze, setup
from nanorlhf.run.log import Clock
from nanorlhf.run.models import load_models_and_critic
from nanorlhf.run.worker import Rewards

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    task: str = "reviews"  # built-in task: reviews, chain or countdown; sets the defaults that differ by task
    data: str = ""  # file of prompts (formats: nanorlhf/hub/formats.py); --task still sets the defaults
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    reward_timeout: float = 10.0  # seconds for a call of --reward, in a process of its own; 0: none, no limit
    rm: str = ""  # reward model folder; empty: runs/TASK-rm/model, unless there is a reward function
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init
    critic_init: str = ""  # folder the critic starts from; empty: the reward model, else the policy
    out: str = ""  # run folder; empty: runs/TASK-ppo

    steps: int | None = None  # rollouts; each is used for epochs × minibatches optimizer steps
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int = 1  # samples per prompt
    max_new_tokens: int | None = None  # response length at most, EOS included
    temperature: float = 1.0  # of sampling, and of every log-prob
    epochs: int = 1  # passes over each rollout
    minibatches: int | None = None  # optimizer steps in each pass
    lr: float | None = None  # policy learning rate, linear to 0 (detail 20)
    critic_lr: float | None = None  # critic learning rate, linear to 0
    lora_rank: int = 0  # rank of adapters on frozen weights (nanorlhf/lora.py); 0: all weights are trained
    max_grad_norm: float = 1.0  # gradient norms of policy and critic are clipped to it, each on its own

    beta: float | None = None  # KL coefficient, reward per nat
    kl_target: float = 0.0  # nats per sequence that an adaptive beta steers to; 0: beta is fixed
    kl_horizon: int = 1000  # samples over which the adaptive beta moves
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's λ
    clip: float = 0.2  # ε of the policy ratio
    value_clip: float = 0.2  # ε_v of the critic's move
    vf_coef: float = 0.1  # c
    no_eos_score: float | None = None  # score of a response that never ends (detail 23.3)
    whiten_advantages: bool = True  # advantages get mean 0 and variance 1 over the rollout
    whiten_rewards: bool = False  # divide rewards by their standard deviation (detail 24)
    tokens_per_microbatch: int = 1024  # padded tokens at once, to bound memory; 0: all. Never moves the curve

    eval_prompts: int = 256  # held-out prompts for eval/reward and eval/greedy
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl
    save_every: int = 20  # steps between checkpoints; 0: only at the end

    BY_TASK: ClassVar = {
        "reviews": dict(steps=60, prompts_per_step=96, max_new_tokens=40, minibatches=2,
                        lr=5e-4, critic_lr=1e-3, beta=0.3, no_eos_score=-1.0),
        "chain": dict(steps=60, prompts_per_step=256, max_new_tokens=11, minibatches=4,
                      lr=5e-4, critic_lr=1e-3, beta=0.0, no_eos_score=0.0),
        "countdown": dict(steps=200, prompts_per_step=512, max_new_tokens=6, minibatches=4,
                          lr=2e-4, critic_lr=1e-3, beta=0.0, no_eos_score=0.0),
    }

    def __post_init__(self):
        if self.rm and self.beta is None:
            self.beta = 0.3  # a learnt reward has to be held, whatever the task
        self.fill_by_task()
        self.init = self.init or f"runs/{self.task}-sft/model"
        self.ref = self.ref or self.init
        if not (self.rm or self.reward or tasks.get(self.task).reward):
            self.rm = f"runs/{self.task}-rm/model"
        self.critic_init = self.critic_init or self.rm or self.init
        self.out = self.out or f"runs/{self.task}-ppo"
        counts = "steps prompts_per_step group_size max_new_tokens epochs minibatches kl_horizon sample_every"
        above_zero = [*counts.split(), "lr", "critic_lr", "temperature", "max_grad_norm"]
        check_ranges(self, above_zero, any_sign=("seed", "no_eos_score"))
        require(max(self.gamma, self.lam) <= 1, "--gamma and --lam: must not be above 1")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
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
    """
    mask = mask.bool()
    reward = torch.where(mask, -beta * (logp - ref_logp), 0.0)
    if no_eos_score is not None:
        score = torch.where(finished.bool(), score, no_eos_score)  # detail 23.3
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # EOS, where the response ended
    return reward + last * score[:, None]


def gae(reward, value, mask, gamma, lam):
    """Generalized advantage estimation: (B, T) each → advantages (B, T), returns (B, T).

    A row ends at its last mask = 1, with next value 0. Outside the mask both results are 0, and what stands
    there is not read.
    """
    mask = mask.bool()
    adv = torch.zeros_like(reward)
    next_adv = next_value = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        adv[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_adv, 0.0)
        next_adv = torch.where(mask[:, t], adv[:, t], next_adv)
        next_value = torch.where(mask[:, t], value[:, t], next_value)
    return adv, torch.where(mask, adv + value, 0.0)


def whiten(x, mask, shift_mean=True):
    """(B, T) → unit variance over the mask, and zero mean with shift_mean; 0 outside.

    Biased variance and eps 1e-8, as in N+ (TRL and verl take the unbiased one).
    """
    mask = mask.bool()
    n = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / n
    var = torch.where(mask, x - mean, 0.0).square().sum() / n
    y = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, y if shift_mean else y + mean, 0.0)


def policy_loss(logp, old_logp, adv, mask, clip, denom):
    """PPO's clipped surrogate: sum over the mask / denom (tokens of the optimizer step) → loss, stats.

    stats: the share of tokens where the clip took over, and the largest ratio. The log-ratio is held within
    ±20: a hopeless ratio is then large, and not infinite.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    free, held = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.where(mask, torch.maximum(free, held), 0.0).sum() / denom
    largest = torch.where(mask, ratio.detach(), 0.0).max()
    return loss, {"clip": ((held > free) & mask).sum() / denom, "ratio_max": largest}


def token_loss(old_logp, adv, mask, clip, denom):
    """policy_loss of some tokens, at `at` in (B, T): GPT.logprobs forms its gradient chunk by chunk."""
    return lambda logp, entropy, at: policy_loss(logp, old_logp[at], adv[at], mask[at], clip, denom)[0]


def value_loss(value, old_value, ret, mask, clip, denom):
    """½ · the larger squared error, of the critic or of the critic held within ±clip of its old self.

    Summed over the mask and divided by denom → loss, stats (the share of tokens where the held error counts).
    """
    mask = mask.bool()
    held = old_value + (value - old_value).clamp(-clip, clip)
    free_error, held_error = (value - ret).square(), (held - ret).square()
    loss = 0.5 * torch.where(mask, torch.maximum(free_error, held_error), 0.0).sum() / denom
    return loss, {"value_clip": ((held_error > free_error) & mask).sum() / denom}


def gradient(policy, critic, batch, cfg):
    """Add up the gradients of one optimizer step, micro-batch by micro-batch → its loss, stats.

    batch: tokens, mask, old_logp, adv, old_value, ret (B, T), lengths (B,), and denom, the sampled tokens of
    the whole step: any part of its rows then gives its part of the gradients and of stats; of ratio_max and
    gap, the largest |logp − old_logp|, the maximum counts.
    """
    total, stats, denom = 0.0, defaultdict(float), batch["denom"]
    cut = microbatches(batch["lengths"], cfg.tokens_per_microbatch)
    for mb in dist.paced(cut, policy.logprobs, critic.values):
        T = int(batch["lengths"][mb].max())
        names = ("tokens", "mask", "old_logp", "adv", "old_value", "ret")
        x, m, old_logp, adv, old_value, ret = (batch[name][mb, :T] for name in names)
        of_tokens = token_loss(old_logp, adv, m, cfg.clip, denom)
        pg, logp, entropy = policy.logprobs(x, m, cfg.temperature, of_tokens)
        value = critic.values(x, m)
        vf, _ = value_loss(value, old_value, ret, m, cfg.value_clip, denom)
        loss = pg + cfg.vf_coef * vf
        loss.backward()
        pg, seen = policy_loss(logp, old_logp, adv, m, cfg.clip, denom)  # the same; its stats are for the log
        total += (pg + cfg.vf_coef * vf).item()
        stats["ratio_max"] = max(stats["ratio_max"], seen["ratio_max"].item())
        stats["gap"] = max(stats["gap"], (logp.detach() - old_logp).abs().max().item())
        stats["clip"] += seen["clip"].item()
        stats["value_loss"] += vf.item()
        stats["entropy"] += (entropy.sum() / denom).item()
    return total, stats


def adapt_beta(beta, kl, cfg, samples):
    """The adaptive KL controller of arXiv 1909.08593: beta moves so that kl comes to cfg.kl_target."""
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return beta * (1 + error * samples / cfg.kl_horizon)


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Run PPO; leaves cfg.out/model (the policy) and cfg.out/critic → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    rewards = Rewards(cfg, task)
    # detail 22: the critic starts as the reward model
    policy, ref, critic, rm, tok = load_models_and_critic(cfg, device)
    freeze(cfg, ref, rm, trained=(policy, critic))
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len)

    def seed_for(*purpose):
        return derive_seed(cfg.seed, *purpose)

    def export():
        hub.save(policy, tok, f"{cfg.out}/model")
        hub.save(critic, tok, f"{cfg.out}/critic")

    dist.spread(cfg, policy, critic, frozen=(ref, rm))
    # detail 20: Adam's eps is 1e-5; with PyTorch's 1e-8 the first step is about a fifth longer
    peaks = ((policy, cfg.lr), (critic, cfg.critic_lr))
    groups = [{"params": model.parameters(), "peak": peak} for model, peak in peaks]
    opt = adamw(groups, device, lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    with rewards, Run(cfg, COLUMNS, SHOW, PANELS) as run:
        if not (cfg.data or cfg.resume):
            pass_gate(policy, tok, task, cfg.max_new_tokens, seed_for("gate"))
        start, extra = run.start({"policy": policy, "critic": critic}, opt, frozen=(ref,))
        beta = extra["beta"] if extra and cfg.kl_target else cfg.beta
        for step in range(start, cfg.steps):
            metrics, sums, first_ratio = {}, defaultdict(float), None
            if test_rows and (step == 0 or (cfg.eval_every and step % cfg.eval_every == 0)):
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards, run.log.say)
            clock = Clock()

            # ---- prompts (detail 21: reshuffled when they end)
            batch = [rows[i] for i in epoch_batches(len(rows), cfg.prompts_per_step, seed_for("data"), step)]
            prompts = [tok.encode_prompt(r["prompt"]) for r in batch]

            # ---- rollout (detail 7: no dropout, so the sampler's log-probs are the old policy's own)
            roll = generate.generate(
                policy, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature, tok.eos_id,
                seed_for("rollout", step), pad_id=tok.pad_id,
            )
            mask, old_logp, budget = roll.mask, roll.logp, cfg.tokens_per_microbatch  # (B, T), (B, T)
            with at_work(ref):  # (B, T)
                ref_logp = roll.per_token(lambda x, m: ref.logprobs(x, m, cfg.temperature)[0], budget)

            # ---- reward
            batch = [batch[g] for g in roll.group.tolist()]
            texts = [tok.decode(ids) for ids in roll.responses()]
            score = score_responses(roll, texts, batch, rm, rewards)  # (B,)
            reward = shape_rewards(score, old_logp, ref_logp, mask, roll.finished, beta, cfg.no_eos_score)
            if cfg.whiten_rewards:
                reward = whiten(reward, mask, shift_mean=False)  # detail 24

            # ---- advantage
            old_value = roll.per_token(critic.values, budget)  # (B, T)
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
            if cfg.whiten_advantages:
                adv = whiten(adv, mask)  # detail 25: over the whole rollout
            whole = {"tokens": roll.tokens, "lengths": roll.lengths, "mask": mask, "old_logp": old_logp}
            whole |= {"old_value": old_value, "adv": adv, "ret": ret}

            # ---- loss and update: epochs × minibatches (optimizer steps) × micro-batches (memory)
            for group in opt.param_groups:
                group["lr"] = group["peak"] * (1 - step / cfg.steps)  # detail 20: linear to 0
            for epoch in range(cfg.epochs):
                order = torch.Generator().manual_seed(seed_for("minibatches", step, epoch))
                for rows_of in torch.randperm(len(mask), generator=order).tensor_split(cfg.minibatches):
                    minibatch = {name: x[rows_of] for name, x in whole.items()}
                    minibatch["denom"] = minibatch["mask"].sum()  # of this optimizer step, however it is cut
                    opt.zero_grad()
                    total, stats = dist.total(*gradient(policy, critic, dist.share(minibatch), cfg))
                    gnorm = dist.clip(policy.parameters(), cfg.max_grad_norm)
                    critic_gnorm = dist.clip(critic.parameters(), cfg.max_grad_norm)
                    what = f"samples {rows_of[:4].tolist()} …, prompt {batch[rows_of[0]]['prompt']!r}"
                    run.check(step, total, gnorm + critic_gnorm, what, minibatch, [policy, critic])
                    opt.step()
                    first_ratio = first_ratio or stats["ratio_max"]
                    metrics["ratio_max"] = max(metrics.get("ratio_max", 0.0), stats.pop("ratio_max"))
                    metrics.setdefault("gap", stats.pop("gap"))  # of the first minibatch, before any update
                    stats |= {"gnorm": gnorm, "critic_gnorm": critic_gnorm}
                    for name, value in stats.items():
                        sums[name] += value

            # ---- one log line
            k1 = (old_logp - ref_logp).sum(1)  # (B,) nats per sequence
            error, spread = (x[mask].var(correction=0) for x in (ret - old_value, ret))
            metrics |= {name: x / (cfg.epochs * cfg.minibatches) for name, x in sums.items()}
            metrics |= {
                "reward": score.mean().item(),
                "reward_se": score.std(correction=0).item() / max(len(score) - 1, 1) ** 0.5,
                "reward_failed": rewards.share_failed(),
                "kl": k1.mean().item(),
                "len": roll.response_len.float().mean().item(),
                "stop": roll.finished.float().mean().item(),
                "explained_var": 1 - (error / spread).item() if spread > 1e-8 else None,
                "beta": beta,
                "lr": opt.param_groups[0]["lr"],
            }
            if cfg.group_size > 1:  # share of prompts whose samples all scored the same
                metrics["dead"] = (score.view(-1, cfg.group_size).std(1) == 0).float().mean().item()
            if step == 0:
                same = cfg.ref == cfg.init and cfg.frozen_dtype in ("float32", cfg.dtype)
                must = " (must be 0)" if same else ""
                kl = f"KL {abs(metrics['kl']):.6f}{must}"
                run.log.say(f"first minibatch: largest ratio {first_ratio:.6f} (must be 1), {kl}")
            if cfg.kl_target:
                beta = adapt_beta(beta, metrics["kl"], cfg, len(mask))
            metrics |= clock.columns(mask.sum().item())
            done = step + 1
            if step % cfg.sample_every == 0 or done == cfg.steps:
                run.log.samples(step, batch, texts, score)
            if done == cfg.steps and test_rows:
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards, run.log.say)
            run.log.row(step, metrics)
            run.checkpoint(done, export, {"beta": beta})
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rl(cfg, load_models_and_critic))


if __name__ == "__main__":
    sys.exit(main())
