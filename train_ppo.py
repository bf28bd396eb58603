"""PPO for language models: a critic, the KL to a reference in the reward, GAE, clipped policy and value
losses.

    r_t   = −β (log π_old(y_t) − log π_ref(y_t)) + [t = last] · score                    reward per token
    A_t   = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t,   R_t = A_t + V_t          GAE, then A is whitened
    ρ_t   = π_θ(y_t) / π_old(y_t)
    L     = 1/N · Σ_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 ± ε))                               policy
          + c · 1/N · Σ_t ½ max((V_t − R_t)², (clip(V_t, V_old ± ε_v) − R_t)²)           critic

N counts the sampled tokens of the whole optimizer step. Sources: PPO (arXiv 1707.06347), GAE (arXiv
1506.02438), RLHF with PPO (arXiv 1909.08593, 2009.01325), "The N+ Implementation Details of RLHF with PPO"
(arXiv 2403.17031). The comments "detail n" are that paper's numbers; docs/details.md says what happens
without each.

Where we deviate from N+: right padding; the score stands on EOS itself, not one slot behind it; the sampler
stops at EOS instead of always drawing 53 tokens; policy and critic have learning rates and gradient clips of
their own.

CPU   python train_ppo.py                  reviews, after train_sft.py and train_rm.py: 25 s, reward 0 → 2 at KL 4
      python train_ppo.py --task chain     after train_sft.py --task chain: 20 s, accuracy 0.4 → 0.95, greedy 0.1 → 1.0
GPU   python train_ppo.py --init runs/sft/model --rm runs/rm/model --data prompts.jsonl --dtype bfloat16
"""

import sys
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from nanorlhf import generate, hub, tasks
from nanorlhf.checkpoint import Run
from nanorlhf.common import Clock, RunError, derive_seed, fill_by_task, require, run_cli, setup, to_device
from nanorlhf.data import epoch_batches, read_jsonl, split_by_hash
from nanorlhf.model import GPT, ScalarModel

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    task: str = "reviews"  # built-in task: reviews, chain or countdown; sets the defaults below that differ by task
    data: str = ""  # JSONL of {"prompt", ...} rows, in place of the task's own prompts
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or name*0.2; repeatable, the sum counts
    rm: str = ""  # reward model folder; empty: runs/TASK-rm/model where the task has no reward function and none is given
    init: str = ""  # SFT model folder; empty: runs/TASK-sft/model
    ref: str = ""  # reference model folder; empty: --init
    critic_init: str = ""  # model folder the critic starts from; empty: the reward model, or the policy where there is none
    out: str = ""  # run folder; empty: runs/TASK-ppo
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # replace the run in --out
    seed: int = 0  # every random number of the run is derived from it

    steps: int | None = None  # rollouts; each is used for epochs × minibatches optimizer steps
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int = 1  # samples per prompt
    max_new_tokens: int | None = None  # response length at most, EOS included
    temperature: float = 1.0  # of sampling, and of every log-prob
    epochs: int = 1  # passes over each rollout
    minibatches: int | None = None  # optimizer steps in each pass
    lr: float | None = None  # policy learning rate, linear to 0 (detail 20)
    critic_lr: float | None = None  # critic learning rate, linear to 0
    max_grad_norm: float = 1.0  # gradient norms of policy and critic are clipped to it, each on its own

    beta: float | None = None  # KL coefficient, nats → reward
    kl_target: float = 0.0  # nats per sequence that an adaptive beta steers to; 0: beta is fixed
    kl_horizon: int = 10000  # samples over which the adaptive beta moves
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's λ
    clip: float = 0.2  # ε of the policy ratio
    value_clip: float = 0.2  # ε_v of the critic's move
    vf_coef: float = 0.1  # c
    no_eos_score: float | None = None  # score of a response that never ends (detail 23.3)
    whiten_rewards: bool = False  # divide rewards by their standard deviation (detail 24)
    tokens_per_microbatch: int = 1024  # padded tokens at once, to bound memory; 0: all. Never moves the curve

    eval_prompts: int = 256  # held-out prompts for eval/reward and eval/greedy
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl
    save_every: int = 20  # steps between checkpoints; 0: only at the end
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the activations; weights and logits are always fp32
    threads: int = 0  # CPU threads; 0: one below a million parameters, else torch's own choice
    wandb: str = ""  # project name, to log to Weights & Biases as well

    BY_TASK: ClassVar = {
        "reviews": dict(steps=60, prompts_per_step=96, max_new_tokens=40, minibatches=2, lr=3e-4, critic_lr=5e-4, beta=0.2,
                        no_eos_score=-1.0),
        "chain": dict(steps=60, prompts_per_step=256, max_new_tokens=11, minibatches=4, lr=5e-4, critic_lr=1e-3, beta=0.0,
                      no_eos_score=0.0),
        "countdown": dict(steps=200, prompts_per_step=512, max_new_tokens=6, minibatches=4, lr=2e-4, critic_lr=1e-3,
                          beta=0.0, no_eos_score=0.0),
    }

    def __post_init__(self):
        fill_by_task(self)
        self.init = self.init or f"runs/{self.task}-sft/model"
        self.ref = self.ref or self.init
        if not (self.rm or self.reward or tasks.get(self.task).reward):
            self.rm = f"runs/{self.task}-rm/model"
        self.critic_init = self.critic_init or self.rm or self.init
        self.out = self.out or f"runs/{self.task}-ppo"
        for name in ("steps", "prompts_per_step", "group_size", "max_new_tokens", "epochs", "minibatches"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "critic_lr", "temperature"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be above 0")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        rows = self.prompts_per_step * self.group_size
        require(rows >= self.minibatches, f"--minibatches {self.minibatches}: more than the {rows} samples of a step")


COLUMNS = ["step", "reward", "reward_se", "kl", "entropy", "len", "stop", "clip", "ratio_max", "gnorm", "value_loss",
           "explained_var", "critic_gnorm", "beta", "lr", "tok_s", "s", "eval/reward", "eval/greedy"]
SHOW = ["reward", "kl", "entropy", "len", "stop", "clip", "gnorm"]
PANELS = ["reward", "kl", "entropy", "len", "clip", "explained_var"]

# ------------------------------------------------------------------------------------------------------------
# Rewards, advantages, losses: per-token tensors (B, T), indexed by the token they describe, 0 outside the
# mask


def shape_rewards(score, logp, ref_logp, mask, finished, beta, no_eos_score=-1.0):
    """score (B,) of whole responses → reward per token (B, T): −beta·k1 everywhere, the score on the last
    token.

    k1 = logp − ref_logp, whose mean over samples is KL(π‖ref); in the reward its gradient is right (papers:
    k3 there is biased). A row that never ended gets no_eos_score in place of its score (detail 23.3); None
    keeps the score. """
    mask = mask.bool()
    reward = torch.where(mask, -beta * (logp - ref_logp), 0.0)
    if no_eos_score is not None:
        score = torch.where(finished.bool(), score, no_eos_score)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # the last token: EOS, where there is one
    return reward + last * score[:, None]


def gae(reward, value, mask, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438), (B, T) each → advantages and returns (B, T).

    A row ends at its last mask = 1, with next value 0; outside the mask both are 0, and what stands there is
    not read. """
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
    """(B, T) to unit variance, and to zero mean with shift_mean, over the mask; 0 outside. Biased variance,
    as in N+."""
    mask = mask.bool()
    n = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / n
    var = torch.where(mask, x - mean, 0.0).square().sum() / n
    y = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, y if shift_mean else y + mean, 0.0)


def policy_loss(logp, old_logp, adv, mask, clip, denom):
    """PPO's clipped surrogate, summed over the mask and divided by denom (the optimizer step's tokens) →
    loss, stats.

    stats: share of tokens where the clip took over (also over denom), largest ratio, approx_kl = ½ mean (log
    ρ)². The log-ratio is held within ±20, so that a hopeless ratio is large and not infinite. """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    free, held = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.where(mask, torch.maximum(free, held), 0.0).sum() / denom
    stats = {
        "clip": ((held > free) & mask).sum() / denom,
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * log_ratio.square().sum() / denom,
    }
    return loss, {k: v.detach() for k, v in stats.items()}


def value_loss(value, old_value, ret, mask, clip, denom):
    """½ the larger squared error of the critic and of the critic held within ±clip of its old self, summed /
    denom."""
    mask = mask.bool()
    held = old_value + (value - old_value).clamp(-clip, clip)
    free_error, held_error = (value - ret).square(), (held - ret).square()
    loss = 0.5 * torch.where(mask, torch.maximum(free_error, held_error), 0.0).sum() / denom
    return loss, {"value_clip": (((held_error > free_error) & mask).sum() / denom).detach()}


def adapt_beta(beta, kl, cfg, samples):
    """The adaptive KL controller of arXiv 1909.08593: beta moves so that kl comes to cfg.kl_target."""
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return beta * (1 + error * samples / cfg.kl_horizon)


# ------------------------------------------------------------------------------------------------------------
# Scoring whole responses


def call_reward(name, fn, prompt, text, row):
    try:
        value = float(fn(prompt, text, row))
    except Exception as e:
        raise RunError(f"reward {name} raised {type(e).__name__}: {e} (prompt {prompt!r}, response {text!r})") from e
    if value != value or value in (float("inf"), float("-inf")):
        raise RunError(f"reward {name} returned {value} (prompt {prompt!r}, response {text!r}); it must be finite")
    return value


@torch.no_grad()
def score_responses(roll, texts, rows, rm, rewards):
    """Rollout → score (B,): the reward model at the last token, or the weighted sum of the reward functions
    on the text."""
    if rm is not None:
        return rm.rewards(roll.tokens, roll.lengths)
    score = [sum(w * call_reward(name, fn, row["prompt"], text, row) for name, w, fn in rewards)
             for text, row in zip(texts, rows)]
    return torch.tensor(score, device=roll.tokens.device)


# ------------------------------------------------------------------------------------------------------------
# train


def load_models(cfg, task, device):
    """→ policy, ref, critic, reward model (or None), tokenizer."""
    policy, tok = hub.load(cfg.init, "--init", f"python train_sft.py --task {cfg.task}")
    ref, ref_tok = hub.load(cfg.ref, "--ref")
    rm, rm_tok = hub.load(cfg.rm, "--rm", f"python train_rm.py --task {cfg.task}") if cfg.rm else (None, tok)
    critic, critic_tok = hub.load(cfg.critic_init, "--critic_init")
    require(isinstance(policy, GPT) and tok, f"--init {cfg.init}: must be a language model with its tokenizer")
    require(isinstance(ref, GPT), f"--ref {cfg.ref}: must be a language model, and is a reward model")
    require(rm is None or isinstance(rm, ScalarModel), f"--rm {cfg.rm}: must be a reward model (train_rm.py makes one)")
    for flag, folder, other in (("ref", cfg.ref, ref_tok), ("rm", cfg.rm, rm_tok), ("critic_init", cfg.critic_init, critic_tok)):
        require(other == tok, f"--{flag} {folder}: its vocabulary differs from that of --init {cfg.init}; both must come from "
                "one SFT model")
    if isinstance(critic, GPT):
        critic = ScalarModel(critic)
        torch.nn.init.zeros_(critic.score.weight)  # with no reward model behind it, the best first guess is 0
    for frozen in filter(None, (ref, rm)):
        frozen.requires_grad_(False)
    return *(m and to_device(m, cfg, device) for m in (policy, ref, critic, rm)), tok


def load_prompts(cfg, task, tok, max_len):
    """→ training rows, held-out rows. Prompts that leave no room for the response are dropped, and counted
    aloud."""
    if cfg.data:
        train_rows, test_rows = split_by_hash(read_jsonl(cfg.data, ("prompt",), nonempty=("prompt",)), tasks.held_out)
    else:
        train_rows, test_rows = task.prompts("train", 3000, cfg.seed), task.prompts("test", cfg.eval_prompts, cfg.seed)
    room = max_len - cfg.max_new_tokens
    kept = [[r for r in rows if len(tok.encode(r["prompt"])) <= room] for rows in (train_rows, test_rows)]
    dropped = len(train_rows) + len(test_rows) - sum(map(len, kept))
    require(kept[0], f"no training prompt is left: {dropped} prompts are longer than {room} tokens, which the model's context "
            f"of {max_len} leaves beside --max_new_tokens {cfg.max_new_tokens}; the rest is held out (15%, by hash)")
    if dropped:
        print(f"dropped {dropped} prompts longer than {room} tokens (context {max_len} − --max_new_tokens {cfg.max_new_tokens})")
    return kept[0], kept[1][: cfg.eval_prompts]


def evaluate(policy, tok, cfg, rows, rm, rewards):
    """Mean score on held-out prompts, sampled and greedy."""
    out = {}
    for name, temperature in (("eval/reward", cfg.temperature), ("eval/greedy", 0.0)):
        seed = derive_seed(cfg.seed, "eval")
        rolls, texts = generate.respond(policy, tok, [r["prompt"] for r in rows], 1, cfg.max_new_tokens, temperature, seed)
        scores, i = [], 0
        for roll in rolls:
            j = i + len(roll.tokens)
            scores.append(score_responses(roll, texts[i:j], rows[i:j], rm, rewards))
            i = j
        out[name] = torch.cat(scores).mean().item()
    return out


def train(cfg):
    """Run PPO; leaves cfg.out/model (the policy) and cfg.out/critic → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    rewards = [tasks.load_reward(spec) for spec in cfg.reward]
    if not cfg.rm and not rewards:
        rewards = [(cfg.task, 1.0, task.reward)]
    policy, ref, critic, rm, tok = load_models(cfg, task, device)
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len)

    # detail 20: Adam's eps is 1e-5 (PyTorch's Adam with 1e-8 moves much further in the first steps); no
    # weight decay
    opt = torch.optim.AdamW([{"params": policy.parameters(), "peak": cfg.lr},
                             {"params": critic.parameters(), "peak": cfg.critic_lr}], lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    with Run(cfg, COLUMNS, SHOW, PANELS) as run:
        start, extra = run.start({"policy": policy, "critic": critic}, opt)
        beta = extra.get("beta", cfg.beta)
        if start == 0:
            prompts = [r["prompt"] for r in task.prompts("test", 256, cfg.seed)]
            if not cfg.data and not cfg.reward:
                _, texts = generate.respond(policy, tok, prompts, 1, cfg.max_new_tokens, cfg.temperature, cfg.seed)
                require(not (why := task.gate(prompts, texts)), why)
        for step in range(start, cfg.steps):
            clock = Clock()
            metrics = {}
            if test_rows and (step == 0 or (cfg.eval_every and step % cfg.eval_every == 0)):
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards)

            # ---- prompts → rollout. detail 21: the prompts are reshuffled when they end
            batch = [rows[i] for i in epoch_batches(len(rows), cfg.prompts_per_step, derive_seed(cfg.seed, "data"), step)]
            roll = generate.generate(policy, [tok.encode(r["prompt"]) for r in batch], cfg.group_size, cfg.max_new_tokens,
                                     cfg.temperature, tok.eos_id, derive_seed(cfg.seed, "rollout", step), pad_id=tok.pad_id)
            mask, old_logp = roll.mask, roll.logp  # (B, T); detail 7: without dropout these log-probs are the update's own

            # ---- reward. detail 12: the reward model is read at EOS
            batch = [batch[g] for g in roll.group.tolist()]
            texts = [tok.decode(ids) for ids in roll.responses()]
            score = score_responses(roll, texts, batch, rm, rewards)  # (B,)
            budget = cfg.tokens_per_microbatch
            ref_logp = roll.per_token(lambda x, m: ref.logprobs(x, m, cfg.temperature)[0], budget)  # (B, T)
            old_value = roll.per_token(critic.values, budget)  # (B, T)
            reward = shape_rewards(score, old_logp, ref_logp, mask, roll.finished, beta, cfg.no_eos_score)  # (B, T)
            if cfg.whiten_rewards:
                reward = whiten(reward, mask, shift_mean=False)  # detail 24

            # ---- advantage
            adv, ret = gae(reward, old_value, mask, cfg.gamma, cfg.lam)  # (B, T)
            adv = whiten(adv, mask)  # detail 25: over the whole rollout

            # ---- loss and update: epochs × minibatches × micro-batches
            lr_now = 1 - step / cfg.steps  # detail 20: linear to 0
            for group in opt.param_groups:
                group["lr"] = group["peak"] * lr_now
            sums, first_ratio = {}, None
            for epoch in range(cfg.epochs):
                order = torch.Generator().manual_seed(derive_seed(cfg.seed, "minibatches", step, epoch))
                for minibatch in torch.randperm(len(mask), generator=order).tensor_split(cfg.minibatches):
                    denom = mask[minibatch].sum()  # of this optimizer step, however it is cut into micro-batches
                    opt.zero_grad()
                    total, seen = 0.0, 0.0
                    for mb, T in roll.microbatches(minibatch, budget):
                        x, m = roll.tokens[mb, :T], mask[mb, :T]
                        logp, entropy = policy.logprobs(x, m, cfg.temperature)
                        pg, stats = policy_loss(logp, old_logp[mb, :T], adv[mb, :T], m, cfg.clip, denom)
                        value = critic.values(x, m)
                        vf, _ = value_loss(value, old_value[mb, :T], ret[mb, :T], m, cfg.value_clip, denom)
                        (pg + cfg.vf_coef * vf).backward()
                        total += pg.item() + cfg.vf_coef * vf.item()
                        seen = max(seen, stats["ratio_max"].item())
                        for name, v in (("clip", stats["clip"]), ("value_loss", vf), ("entropy", entropy.sum() / denom)):
                            sums[name] = sums.get(name, 0.0) + v.item()
                    first_ratio = first_ratio or seen
                    sums["ratio_max"] = max(sums.get("ratio_max", 0.0), seen)
                    gnorms = [torch.nn.utils.clip_grad_norm_(m.parameters(), cfg.max_grad_norm) for m in (policy, critic)]
                    run.check(step, total, sum(gnorms), f"samples {minibatch.tolist()[:4]} … of prompts such as "
                              f"{batch[minibatch[0]]['prompt']!r}")
                    opt.step()
                    for name, v in zip(("gnorm", "critic_gnorm"), gnorms):
                        sums[name] = sums.get(name, 0.0) + v.item()

            # ---- one log line
            updates, k1 = cfg.epochs * cfg.minibatches, ((old_logp - ref_logp) * mask).sum(1)  # nats per sequence, (B,)
            metrics |= {name: v if name == "ratio_max" else v / updates for name, v in sums.items()} | {
                "reward": score.mean().item(), "reward_se": score.std().item() / len(score) ** 0.5, "kl": k1.mean().item(),
                "len": roll.response_len.float().mean().item(), "stop": roll.finished.float().mean().item(),
                "explained_var": 1 - ((ret - old_value)[mask].var(correction=0) / ret[mask].var(correction=0)).item(),
                "beta": beta, "lr": cfg.lr * lr_now}
            if step == 0:
                run.log.say(f"first minibatch: largest ratio {first_ratio:.6f} (must be 1), KL to the reference "
                            f"{metrics['kl']:.6f}" + (" (must be 0)" if cfg.ref == cfg.init else ""))
            if cfg.kl_target:
                beta = adapt_beta(beta, metrics["kl"], cfg, len(mask))
            if step % cfg.sample_every == 0 or step == cfg.steps - 1:
                run.log.samples(step, [{"prompt": r["prompt"], "response": t, "reward": round(s, 4)}
                                       for r, t, s in zip(batch, texts, score.tolist())])
            done = step + 1
            if done == cfg.steps and test_rows:
                metrics |= evaluate(policy, tok, cfg, test_rows, rm, rewards)
            run.log.row(step, metrics | clock.columns(mask.sum().item()))
            run.checkpoint(done, lambda: (hub.save(policy, tok, f"{cfg.out}/model"),
                                          hub.save(critic, tok, f"{cfg.out}/critic")), {"beta": beta})
        run.log.last["kl"] = float(run.log.last.get("kl", 0.0))
    return run.log.last


if __name__ == "__main__":
    sys.exit(run_cli(Config, train, __doc__))
