"""SHIM until the merge."""
import torch

from nanorlhf import hub, lora
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.run.device import to_device


def load_critic(cfg, device, tok):
    critic, _ = hub.load(cfg.critic_init, "--critic_init", "", like=tok, shard=cfg.shard)
    if isinstance(critic, GPT):
        critic = ScalarModel(critic)
        torch.nn.init.zeros_(critic.score.weight)
    lora.add(critic, cfg.lora_rank, cfg.dtype)
    to_device(cfg, device, critic)
    return critic
