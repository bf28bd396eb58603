"""`python -m course run N`: a short run of the real trainer, in which the student's functions replace ours.

Each week names the attributes of our modules that are replaced before train(cfg), by a few lines that give
the student's function its arguments. The same run with our functions is made once and kept.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch

from course import compare
from course.checking import explain, folder_of, is_stub
from course.checking import load as load_file
from labs import common
from nanorlhf.errors import require

ROOT = "out/course"  # runs and the models that they start from


@dataclass
class Plug:
    trainer: str  # the module whose train(cfg) is run
    functions: list  # names of the student's functions that take part
    replaced: Callable  # the student's module → [(owner, attribute, function)]
    show: list  # columns for the table and the picture
    flags: dict = field(default_factory=dict)
    needs: dict = field(default_factory=dict)  # flag of a model folder: (trainer, its flags)


CHAIN_SFT = ("train_sft", {"task": "chain"})
REVIEWS_SFT = ("train_sft", {"task": "reviews"})
CHAIN_GRPO = ("train_grpo", {"task": "chain"})


def week01(mine):
    from nanorlhf import model
    from nanorlhf.kernels import torch_backend

    def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None, backend=None, loss=None):
        logits = hidden @ weight.T
        logp = mine.log_probs(logits, targets, temperature)
        entropy = mine.entropy(logits / temperature)
        if loss is None:
            return logp, entropy
        total, stats = loss(logp, entropy, slice(None))
        return total, torch_backend.stack_stats([stats]), logp.detach(), entropy.detach()

    return [(model, "linear_logprob", linear_logprob)]


def week02(mine):
    import train_sft
    from nanorlhf import data, generate

    def sft_loss(logp, mask, denom):
        return mine.sft_loss(logp, mask.bool(), denom)

    return [
        (train_sft, "sft_loss", sft_loss),
        (data, "pad", mine.pad_right),
        (generate, "response_mask", mine.response_mask),
    ]


def week03(mine):
    import train_rm
    from nanorlhf.model import ScalarModel

    def rewards(self, tokens, lengths):
        return mine.reward_at_end(self.logits(tokens), lengths)

    return [(train_rm, "pairwise_loss", mine.pairwise_loss), (ScalarModel, "rewards", rewards)]


def week04(mine):
    import train_grpo

    def advantages(reward, group, norm, std_eps, length):
        prompts = int(group.max()) + 1
        return mine.leave_one_out(reward.view(prompts, -1)).flatten()

    def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
        denom = 1 / w.max()  # with --agg token every token of the step has the weight 1 / denom
        loss = mine.reinforce_loss(logp, adv, mask.bool(), denom)
        return loss, {"clip": torch.zeros(()), "ratio_max": (logp - old_logp).detach().exp().max()}

    return [(train_grpo, "advantages", advantages), (train_grpo, "policy_loss", policy_loss)]


def week05(mine):
    import train_grpo

    def advantages(reward, group, norm, std_eps, length):
        return mine.group_advantages(reward, group, std_eps)

    def token_weights(mask, group, cfg):
        return mine.token_weights(mask.bool(), cfg.agg, cfg.limits[-1])

    def policy_loss(logp, old_logp, ref_logp, adv, mask, w, cfg):
        mask = mask.bool()
        loss = mine.clipped_loss(logp, old_logp, adv, mask, w, cfg.clip_low, cfg.clip_high)
        ratio = torch.where(mask, logp - old_logp, 0.0).exp().detach()
        held = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        is_clipped = (-adv[:, None] * held > -adv[:, None] * ratio) & mask
        return loss, {"clip": (w * is_clipped).sum(), "ratio_max": (ratio * mask).max()}

    return [
        (train_grpo, "advantages", advantages),
        (train_grpo, "token_weights", token_weights),
        (train_grpo, "policy_loss", policy_loss),
    ]


def week06(mine):
    import train_ppo

    def whiten(x, mask, shift_mean=True):
        return mine.whiten(x, mask)

    def value_loss(value, old_value, ret, mask, clip, denom):
        loss = mine.value_loss(value, old_value, ret, mask, clip, denom)
        return loss, {"value_clip": torch.zeros(())}

    return [
        (train_ppo, "shape_rewards", mine.shape_rewards),
        (train_ppo, "gae", mine.gae),
        (train_ppo, "whiten", whiten),
        (train_ppo, "value_loss", value_loss),
    ]


def week07(mine):
    import train_dpo

    def preference_loss(logp_w, logp_l, ref_w, ref_l, beta, loss="dpo", **others):
        losses = mine.dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
        chosen = beta * (logp_w - ref_w).detach()
        rejected = beta * (logp_l - ref_l).detach()
        return losses, chosen, rejected

    return [(train_dpo, "preference_loss", preference_loss)]


def week08(mine):
    from nanorlhf import metrics, tasks

    def reward(self, prompt, response, row=None):
        return mine.chain_reward(prompt, response)

    def mean_se(x):
        mean, error = mine.mean_and_error(x.double())
        return float(mean), float(error)

    return [(tasks.Chain, "reward", reward), (metrics, "mean_se", mean_se)]


def week09(mine):
    from nanorlhf import model
    from nanorlhf.kernels import torch_backend

    class TiledLogProbs(torch.autograd.Function):
        """The student's forward and backward pass, four columns of logits at a time."""

        @staticmethod
        def forward(ctx, hidden, weight, targets):
            ctx.save_for_backward(hidden, weight, targets)
            return mine.tiled_log_probs(hidden, weight, targets, 4)

        @staticmethod
        def backward(ctx, grad):
            hidden, weight, targets = ctx.saved_tensors
            d_logits = mine.logprob_backward(hidden @ weight.T, targets, grad)
            return d_logits @ weight, d_logits.T @ hidden, None

    def linear_logprob(hidden, weight, targets, temperature=1.0, bias=None, backend=None, loss=None):
        logp = TiledLogProbs.apply(hidden / temperature, weight, targets)
        with torch.no_grad():
            all_logp = (hidden @ weight.T / temperature).log_softmax(-1)
            entropy = -(all_logp.exp() * all_logp).sum(-1)
        if loss is None:
            return logp, entropy
        total, stats = loss(logp, entropy, slice(None))
        return total, torch_backend.stack_stats([stats]), logp.detach(), entropy

    return [(model, "linear_logprob", linear_logprob)]


def week10(mine):
    import train_distill
    from nanorlhf.kernels import linear_kl

    def divergence_loss(student, teacher, mb, cfg):
        with torch.no_grad():
            ref_hidden = teacher.hidden_before(mb["tokens"], mb["mask"])
        hidden = student.hidden_before(mb["tokens"], mb["mask"])
        logits = hidden @ student.unembedding.T / cfg.temperature
        ref_logits = ref_hidden @ teacher.unembedding.T / cfg.temperature
        every = torch.ones(1, len(logits), dtype=torch.bool)
        denom = 1 / mb["w"].max()  # every token of the step has the weight 1 / denom
        loss = mine.distillation_loss(logits[None], ref_logits[None], every, denom)
        with torch.no_grad():
            kl = linear_kl(hidden, student.unembedding, ref_hidden, teacher.unembedding, cfg.temperature)
        return loss, kl

    return [(train_distill, "divergence_loss", divergence_loss)]


PLUGS = {
    1: Plug(
        "train_sft",
        ["log_probs", "entropy"],
        week01,
        ["loss", "eval/loss", "gnorm"],
        {"task": "chain", "steps": 300},
    ),
    2: Plug(
        "train_sft",
        ["pad_right", "response_mask", "sft_loss"],
        week02,
        ["loss", "eval/loss", "len"],
        {"task": "chain", "steps": 300},
    ),
    3: Plug(
        "train_rm",
        ["pairwise_loss", "reward_at_end"],
        week03,
        ["loss", "acc", "eval/acc"],
        {"task": "reviews", "pairs": 1000, "steps": 80},
        {"init": REVIEWS_SFT},
    ),
    4: Plug(
        "train_grpo",
        ["leave_one_out", "reinforce_loss"],
        week04,
        ["reward", "entropy", "len"],
        {
            "task": "chain",
            "norm": "leave_one_out",
            "loss": "reinforce",
            "minibatches": 1,
            "lr": 1e-3,
            "steps": 30,
        },
        {"init": CHAIN_SFT},
    ),
    5: Plug(
        "train_grpo",
        ["group_advantages", "token_weights", "clipped_loss"],
        week05,
        ["reward", "clip", "dead"],
        {"task": "chain", "steps": 30},
        {"init": CHAIN_SFT},
    ),
    6: Plug(
        "train_ppo",
        ["shape_rewards", "gae", "whiten", "value_loss"],
        week06,
        ["reward", "kl", "explained_var"],
        {"task": "chain", "beta": 0.05, "steps": 30},
        {"init": CHAIN_SFT},
    ),
    7: Plug(
        "train_dpo",
        ["dpo_loss"],
        week07,
        ["loss", "margin", "kl"],
        {"task": "reviews", "pairs": 1000, "steps": 60},
        {"init": REVIEWS_SFT},
    ),
    8: Plug(
        "train_grpo",
        ["chain_reward", "mean_and_error"],
        week08,
        ["reward", "reward_se", "eval/reward"],
        {"task": "chain", "steps": 30},
        {"init": CHAIN_SFT},
    ),
    9: Plug(
        "train_sft",
        ["tiled_log_probs", "logprob_backward"],
        week09,
        ["loss", "eval/loss", "gnorm"],
        {"task": "chain", "steps": 100},
    ),
    10: Plug(
        "train_distill",
        ["distillation_loss"],
        week10,
        ["loss", "kl", "reward"],
        {"task": "chain", "steps": 20},
        {"init": CHAIN_SFT, "teacher": CHAIN_GRPO},
    ),
}


def stage(trainer, flags):
    """The run folder of a stage that the course's runs share; it is trained where it is missing."""
    common.root = ROOT
    module = importlib.import_module(trainer)
    inputs = {}
    if trainer != "train_sft":
        inputs["init"] = stage("train_sft", {"task": flags["task"]}) + "/model"
    return common.trained(module, **flags, **inputs)


def inputs_of(needs):
    """{flag: (trainer, its flags)} → {flag: model folder}, with a line for each that may take a while."""
    folders = {}
    for flag, (trainer, flags) in needs.items():
        print(f"--{flag}: {trainer} on {flags['task']}, trained here the first time", flush=True)
        folders[flag] = stage(trainer, flags) + "/model"
    return folders


def load_mine(week, mine):
    path = os.path.join(os.path.abspath(mine), folder_of(week), "exercise.py")
    require(os.path.isfile(path), f"--mine {mine}: there is no {folder_of(week)}/exercise.py in this folder")
    try:
        return load_file(path, f"mine_{week:02}"), path
    except Exception as error:
        require(False, explain(error, path))


def run(week, mine, steps=None):
    """Run the week's trainer with our functions (once) and with the student's → exit status."""
    plug = PLUGS[week]
    module, path = load_mine(week, mine)
    names = ", ".join(plug.functions)
    print(f"week {week}: {names} in {plug.trainer}.py; the first time our own run is made too", flush=True)
    trainer = importlib.import_module(plug.trainer)
    flags = plug.flags | ({"steps": steps} if steps else {})
    flags |= inputs_of(plug.needs)
    common.root = ROOT
    ours = common.trained(trainer, **flags)
    yours = f"{ROOT}/{folder_of(week)}/yours"
    config = {"device": "cpu", "threads": 1, "save_every": 0, "out": yours, "overwrite": True} | flags
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, function in plug.replaced(module):
                stack.enter_context(mock.patch.object(owner, name, function))
            trainer.train(trainer.Config(**config))
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, NameError) as error:
        if is_stub(error):
            print(f"{explain(error, path)}: one of {names}. First: python -m course check {week}")
            return 1
        print(f"the run stopped in your code or behind it: {explain(error, path)}", file=sys.stderr)
        return 1
    return tell(ours, yours, plug.show)


def tell(ours, yours, names):
    """Table, picture and verdict of the two runs → exit status."""
    right = compare.load(ours)
    own = compare.load(yours)
    compare.table(right, own, names)
    path = compare.picture(f"{yours}/beside_ours.png", right, own, compare.columns_of(right))
    if path:
        print(f"your curves beside ours: {path}")
    compare.say_page(yours, ours)
    difference, name, step = compare.largest_difference(right, own)
    if difference < 1e-3:
        print("Your run is our run: no figure differs by more than a thousandth.")
        return 0
    print(f"Your run is another one: the largest difference is in {name} at step {step}.")
    print(
        "If the first steps agree to six digits and the difference grows later, it is rounding (a sum in "
        "another order) and no mistake."
    )
    return 1
