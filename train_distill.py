"""On-policy distillation: a student samples, and at every token learns the distribution of its teacher.

    p = π_student(· | x, y_<t)     q = π_teacher(· | x, y_<t)     y ~ π_student(· | x)
    L = 1/N Σ_rows Σ_t D(p, q)     N: the sampled tokens of the optimizer step

    --divergence reverse   KL(p‖q) = Σ_v p (log p − log q)     seeks a mode           arXiv 2306.08543
                 forward   KL(q‖p) = Σ_v q (log q − log p)     covers all of q        1503.02531
                 jsd       β KL(q‖m) + (1−β) KL(p‖m),   m = β q + (1−β) p             2306.13649

D is exact: a sum over the whole vocabulary, not over the one token that was sampled. No gradient flows
through the sampling (GKD, arXiv 2306.13649), so a token is not charged for the prefixes that it leads to.
Teacher and student share one tokenizer, as D compares them id by id.

`--as_reward` needs only the teacher's log-probs of the sampled tokens: A_t = log q(y_t) − log p_old(y_t)
is the advantage of token t, and −A_t p/p_old its loss, as in GRPO, whose clip never acts on policy. The
expected gradient is that of KL(p‖q), with sampling noise (K. Lu and Thinking Machines Lab, *On-Policy
Distillation*, 2025). With `--on_policy 0` the student learns on
the teacher's samples, and with `--from_data` on the responses of a file.

Where we deviate: one update per rollout, so that every step is on policy. GKD mixes its two sources of
responses at random; here a run has one. MiniLLM adds the gradient through the sampling, and a loss on text.

CPU   python train_distill.py                    runs/chain-sft learns from runs/chain-grpo
      python train_distill.py --task countdown
GPU   python train_distill.py --data prompts.jsonl --init runs/sft/model --teacher runs/teacher/model \
          --max_new_tokens 512 --dtype bfloat16
      not measured yet
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch

from nanorlhf import hub, tasks
from nanorlhf.data import epoch_batches, microbatches, take_rows, trim
from nanorlhf.errors import derive_seed, require
from nanorlhf.generate import sample_responses
from nanorlhf.kernels import linear_jsd, linear_kl
from nanorlhf.metrics import Figures, sample_figures
from nanorlhf.rewards import evaluate, fresh_samples, load_prompts, score_responses
from nanorlhf.run import dist, plan
from nanorlhf.run.checkpoint import Run
from nanorlhf.run.cli import Flags, check_ranges, run_cli
from nanorlhf.run.device import adamw, at_work, clip_gradient, freeze, lr_at, set_rate, setup
from nanorlhf.run.distilling import first_signs, require_responses, responses_of_data
from nanorlhf.run.log import Clock, due
from nanorlhf.run.models import load_models
from nanorlhf.run.worker import rewards_of

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(Flags):
    # data
    task: str = ""  # built-in task: chain (the default) or countdown; sets many defaults
    data: str = ""  # file of prompts (formats: docs/data.md), in place of the task's own
    init: str = ""  # student, the model folder to start from; empty: runs/TASK-sft/model
    teacher: str = ""  # model folder with the same tokenizer; empty: runs/TASK-grpo/model
    reward: list[str] = field(default_factory=list)  # for the log only: path/to/file.py:name; repeatable
    out: str = ""  # run folder; empty: runs/TASK-distill, or with --data runs/FILE-distill

    # method
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"  # of student and teacher, at every token
    jsd_beta: float = 0.5  # β of jsd: the teacher's share of the mixture m
    as_reward: bool = False  # log q − log p_old as the advantage of the sampled token, in GRPO's loss
    on_policy: bool = True  # the student samples; 0: the teacher does
    from_data: bool = False  # with --on_policy 0: learn on the "response" of each row of --data

    # optimisation
    steps: int | None = None  # rollouts, each for one update; of own data: 1 pass, at least 100
    lr: float | None = None  # peak learning rate: 5% linear warm-up, then linear down to a tenth
    max_grad_norm: float = 1.0  # gradient norm is clipped to it
    tokens_per_microbatch: int = 4096  # padded tokens at once (GPU: 32768); 0: all. Never moves the curve

    # sampling
    prompts_per_step: int | None = None  # prompts a rollout
    group_size: int = 4  # samples per prompt
    max_new_tokens: int | None = None  # longest response, EOS included
    temperature: float = 1.0  # of sampling, and of both distributions

    # evaluation
    eval_prompts: int | None = None  # held-out prompts to measure on; of own data 128, of --eval_data all
    eval_every: int = 0  # steps between these; 0: only before the first step and after the last
    sample_every: int = 5  # steps between rollouts written to samples.jsonl

    # run
    save_every: int = 50  # steps between checkpoints; 0: only at the end

    DEFAULTS: ClassVar = {"eval_prompts": 512}
    BY_TASK: ClassVar = {
        "chain": dict(steps=30, prompts_per_step=64, max_new_tokens=11, lr=1e-3),
        "countdown": dict(steps=200, prompts_per_step=64, max_new_tokens=6, lr=5e-4),
    }

    def __post_init__(self):
        self.fill("distill")
        counts = "steps prompts_per_step group_size max_new_tokens sample_every"
        check_ranges(self, f"{counts} lr temperature max_grad_norm".split())
        beta = self.jsd_beta
        require(0 < beta < 1, f"--jsd_beta {beta}: must be between 0 and 1; its ends are forward and reverse")
        fits = self.divergence == "reverse" and self.on_policy
        require(fits or not self.as_reward, "--as_reward: for --divergence reverse and --on_policy 1 only")


COLUMNS = (
    "step loss kl entropy len stop reward reward_se dead gnorm lr tok_s s eval/kl eval/reward eval/greedy"
).split()
SHOW = "loss kl entropy len stop reward gnorm".split()
PANELS = ["loss", ("kl", "eval/kl"), "entropy", ("reward", "eval/reward")]

# ------------------------------------------------------------------------------------------------------------
# Loss


def divergence(hidden, weight, ref_hidden, ref_weight, cfg):
    """→ (n,): D of the two distributions at n positions, exact; the teacher's is a constant.

    hidden (n, D) and weight (V, D): the student's; ref_hidden (n, D') and ref_weight (V, D'): the teacher's.

    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> student, teacher = torch.tensor([[1.0]]), torch.tensor([[0.0]])  # p = (0.27, 0.73), q = (0.5, 0.5)
    >>> divergence(student, weight, teacher, weight, Config(divergence="reverse"))
    tensor([0.1109])
    >>> divergence(student, weight, teacher, weight, Config(divergence="forward"))
    tensor([0.1201])
    """
    if cfg.divergence == "jsd":
        return linear_jsd(hidden, weight, ref_hidden, ref_weight, cfg.jsd_beta, cfg.temperature)
    # The kernel's `reverse` is KL(reference‖policy). Distillation calls that one forward.
    forward = cfg.divergence == "forward"
    return linear_kl(hidden, weight, ref_hidden, ref_weight, cfg.temperature, reverse=forward)


def reward_loss(student, teacher, mb, cfg):
    """`divergence_loss` from the sampled tokens alone (--as_reward); the KL is an estimate, log p − log q."""
    tokens = mb["tokens"]
    mask = mb["mask"]
    old_logp = mb["old_logp"]
    with torch.no_grad():
        teacher_logp, _ = teacher.logprobs(tokens, mask, cfg.temperature)
    logp, _ = student.logprobs(tokens, mask, cfg.temperature)
    adv = teacher_logp - old_logp  # (B, T): a token is not charged for what follows it
    ratio = torch.exp(logp - old_logp)  # 1, as there is one update per rollout; its gradient is ∇log p
    return -(mb["w"] * adv * ratio).sum(), -adv


def divergence_loss(student, teacher, mb, cfg):
    """A micro-batch → Σ w·D over its tokens, and KL(student‖teacher) at each, which has no gradient."""
    tokens = mb["tokens"]
    mask = mb["mask"]
    with torch.no_grad():
        ref_hidden = teacher.hidden_before(tokens, mask)  # (n, D')
    hidden = student.hidden_before(tokens, mask)  # (n, D)
    ref_weight = teacher.unembedding
    weight = student.unembedding
    losses = divergence(hidden, weight, ref_hidden, ref_weight, cfg)  # (n,)
    with torch.no_grad():
        kl = linear_kl(hidden, weight, ref_hidden, ref_weight, cfg.temperature)
    return (mb["w"][mask] * losses).sum(), kl


def gradient(student, teacher, batch, cfg):
    """Add up the gradient of one optimizer step, micro-batch by micro-batch → its figures.

    batch: tokens, mask, old_logp, w (B, T), lengths, and n_rows of the whole step. As w and n_rows are the
    step's, any part of its rows gives its part of the gradient and of the figures.
    """
    figures = Figures(loss="sum", kl="sum")
    microbatch_loss = reward_loss if cfg.as_reward else divergence_loss
    cut = microbatches(batch["lengths"], cfg.tokens_per_microbatch)
    with at_work(teacher):
        # one process: as they are; several: equally many
        for rows in dist.paced(cut, teacher.logprobs, student.logprobs):
            mb = trim(take_rows(batch, rows))
            loss, kl = microbatch_loss(student, teacher, mb, cfg)
            loss.backward()
            figures.add_tensors({"loss": loss, "kl": kl.sum()})
    figures.read()
    figures["kl"] /= batch["n_rows"]
    return figures


# ------------------------------------------------------------------------------------------------------------
# Sampling, and measuring


def next_rollout(student, teacher, tok, rows, cfg, step):
    """→ the Rollout of a step: samples of the student, or others (--on_policy 0, --from_data)."""
    order = epoch_batches(len(rows), cfg.prompts_per_step, derive_seed(cfg.seed, "data"), step)
    batch = [rows[i] for i in order]
    if cfg.from_data:
        return responses_of_data(batch, student.device)
    seed = derive_seed(cfg.seed, "rollout", step)
    sampler = student if cfg.on_policy else teacher
    with at_work(sampler):
        return sample_responses(
            sampler, tok, batch, cfg.group_size, cfg.max_new_tokens, cfg.temperature, seed
        )


def measure(student, teacher, tok, rows, score, cfg, record):
    """Held-out prompts → the KL, estimated from a sample each; the score, sampled and greedy."""
    limit = cfg.max_new_tokens
    _, figures = fresh_samples(student, teacher, tok, rows, limit, cfg.seed)
    metrics = {"eval/kl": figures["kl"]}
    if score:
        metrics |= evaluate(student, tok, rows, score, cfg.temperature, cfg.seed, limit, record)
    return metrics


# ------------------------------------------------------------------------------------------------------------
# train


def train(cfg):
    """Distil the teacher into the student; leaves cfg.out/model → dict of the final metrics."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    student, teacher, _, tok = load_models(cfg, device)
    freeze(cfg, teacher, trained=[student])
    rewards = rewards_of(None if cfg.own_data else task, cfg.reward)
    score = None
    if rewards.functions:
        score = partial(score_responses, rm=None, rewards=rewards)
    max_len = student.cfg.max_len
    rows, test_rows = load_prompts(cfg, task, tok, max_len, cfg.max_new_tokens, rewards)
    require_responses(cfg, rows, tok, max_len)
    dist.spread(cfg, student, frozen=(teacher,))  # one process: as they are; several: all get the same
    opt = adamw(student.parameters(), device, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)

    with Run(cfg, COLUMNS, SHOW, PANELS, tok) as run:
        start, _ = run.start({"model": student}, opt, frozen=(teacher,))
        for step in range(start, cfg.steps):
            metrics = {}
            if test_rows and due(step, cfg.eval_every):
                metrics |= measure(student, teacher, tok, test_rows, score, cfg, run.held_out)
            clock = Clock()

            # ---- prompts, rollout; the reward is only logged
            roll = next_rollout(student, teacher, tok, rows, cfg, step)
            n_tokens = int(roll.mask.sum())
            batch = roll.batch() | {"w": roll.mask / n_tokens, "n_rows": len(roll)}
            if score:
                roll.reward = score(roll)  # (B,)
            metrics |= sample_figures(roll, len(roll) // cfg.prompts_per_step)
            if not cfg.from_data:
                metrics["entropy"] = -roll.logp.sum().item() / n_tokens  # estimated, of the sampler

            # ---- loss and update
            run.rollout(step, roll, student, batch)
            opt.zero_grad()
            share = dist.share(batch)  # one process: all of it; several: this one's rows
            update = dist.whole_step(gradient(student, teacher, share, cfg), student)  # one process: as it is
            metrics |= update
            metrics["gnorm"] = clip_gradient(student, cfg.max_grad_norm)
            where = f"prompt {roll.rows[0]['prompt']!r}"
            run.check(step, update["loss"], metrics["gnorm"], where, batch, [student, teacher])
            if step == 0:
                run.log.say(first_signs(metrics, roll, student, cfg))
            metrics["lr"] = set_rate(opt, lr_at(step, cfg.steps, cfg.lr))
            opt.step()

            # ---- one log line
            metrics |= clock.columns(n_tokens)
            done = step + 1
            is_last = done == cfg.steps
            if is_last and test_rows:
                metrics |= measure(student, teacher, tok, test_rows, score, cfg, run.held_out)
            run.log.row(step, metrics)
            run.checkpoint(done, lambda: hub.save(student, tok, f"{cfg.out}/model"))
    return run.log.last


def main(argv=None):
    return run_cli(Config, train, __doc__, argv, dry_run=lambda cfg: plan.rl(cfg, load_models))


if __name__ == "__main__":
    sys.exit(main())
