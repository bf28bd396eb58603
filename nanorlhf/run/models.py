"""The models of a run, read from the folders that its flags name; an error begins with the flag."""

import contextlib
import os

import torch

from nanorlhf import hub, lora
from nanorlhf.errors import UserError, require
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.run.device import to_device


@contextlib.contextmanager
def _named(flag):
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def load_model(flag, folder, hint="", kind="", like=None, shard=False, weights=True):
    """hub.load(folder, …) → (model, tokenizer). UserError begins with `flag`.

    hint: the command that makes such a folder; an error says it where there is none.
    """
    with _named(flag):
        try:
            model, tok = hub.load(folder, kind, like=like, shard=shard, weights=weights)
        except hub.Missing as error:
            run, name = os.path.split(os.path.normpath(folder))
            if hint and run and name == "model":
                hint = f"{hint} --out {run}"
            make = f"; make it with: {hint}" if hint else ""
            raise UserError(f"{error}{make}") from None
    if hasattr(model, "fill"):  # --shard: the files are read later, by dist.spread
        read = model.fill

        def fill(model):
            with _named(flag):
                read(model)

        model.fill = fill
    return model, tok


def load_models(cfg, device):
    """→ policy, reference, reward model (None without --rm, --ref none), tokenizer, the models on the device.

    All must share one vocabulary. With adapters (cfg.lora_rank) the policy's frozen self is the reference,
    unless that is another folder or is to follow the policy (cfg.ref_every). On the meta device (--dry_run)
    no weights are read.
    """
    policy, ref, rm, tok = _load(cfg, device)
    ref = _adapt(cfg, policy, ref)
    to_device(cfg, device, policy, ref, rm)
    return policy, ref, rm, tok


def load_models_and_critic(cfg, device):
    """`load_models` for PPO → policy, reference, critic, reward model, tokenizer.

    A critic that starts from a language model gets a head of zeros: the best first guess of a return.
    """
    require(cfg.ref != "none", "--ref none: PPO's reward holds the KL to a reference; name its folder")
    policy, ref, rm, tok = _load(cfg, device)
    hint = f"python train_rm.py --task {cfg.task}"
    critic, _ = load_model("--critic_init", cfg.critic_init, hint, **_options(cfg, device, tok))
    if isinstance(critic, GPT):
        critic = ScalarModel(critic)
        torch.nn.init.zeros_(critic.score.weight)
    # Adapters come after all models: their random numbers are drawn last.
    ref = _adapt(cfg, policy, ref)
    lora.add(critic, cfg.lora_rank, cfg.dtype)
    to_device(cfg, device, policy, ref, critic, rm)
    return policy, ref, critic, rm, tok


def _load(cfg, device):
    sft = f"python train_sft.py --task {cfg.task}"
    pairs = f"python train_rm.py --task {cfg.task}"
    ref = None
    rm = None
    policy, tok = load_model("--init", cfg.init, sft, "language model", **_options(cfg, device))
    options = _options(cfg, device, tok)
    if cfg.ref != "none":
        ref, _ = load_model("--ref", cfg.ref, sft, "language model", **options)
    if cfg.rm:
        rm, _ = load_model("--rm", cfg.rm, pairs, "reward model", **options)
    return policy, ref, rm, tok


def _options(cfg, device, tok=None):
    return dict(like=tok, shard=cfg.shard, weights=device.type != "meta")


def _adapt(cfg, policy, ref):
    """Add adapters to the policy → the reference, which is its frozen self where --ref is --init."""
    frozen = lora.add(policy, cfg.lora_rank, cfg.dtype)
    if frozen and cfg.ref == cfg.init and not getattr(cfg, "ref_every", 0):
        return frozen
    return ref
