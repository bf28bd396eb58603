"""Writes golden vectors of variants/ that verl's own functions compute, in float64.

    pip install verl==0.9.1 --no-deps; pip install torch numpy tensordict transformers
    python tests/golden/make_variants_ppo.py

The functions are called as they are, with stand-ins for packages that their module only imports.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

for package in ("ray", "omegaconf", "codetiming", "orjson"):  # verl imports them; the functions here use none
    sys.modules.setdefault(package, MagicMock())
from verl.trainer.ppo import core_algos  # noqa: E402

OUT = Path(__file__).resolve().parents[2] / "variants/golden"
VERSION = importlib.metadata.version("verl")


def write(name, origin, calls):
    found = {"origin": f"verl {VERSION}: core_algos.{origin}", "calls": calls}
    (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(name)


def ppo_dual_clip():
    """Ratios on both sides of both clips, advantages of both signs; two tokens are masked."""
    inputs = {
        "old_logp": [[-1.0, -2.0, -4.0, -3.0, -1.0], [-2.0, -1.5, -3.5, -0.5, -1.0]],
        "adv": [[1.0, -1.5, -2.0, 0.5, 9.0], [-0.5, 2.0, -1.0, -0.25, 9.0]],
        "mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "clip": 0.2,
        "denom": 8,
    }
    logp = torch.tensor([[-0.5, -1.0, -1.0, -4.0, -2.0], [-2.5, -1.25, -1.0, -0.5, -2.0]]).requires_grad_()
    old_logp, adv, mask = [torch.tensor(inputs[key]) for key in ("old_logp", "adv", "mask")]
    loss, *_ = core_algos.compute_policy_loss(old_logp, logp, adv, mask, cliprange=0.2, clip_ratio_c=3.0)
    (gradient,) = torch.autograd.grad(loss, logp)
    call = {"function": "policy_loss", "inputs": {"logp": logp.tolist()} | inputs, "value": loss.item()}
    write("ppo_dual_clip", "compute_policy_loss", [call | {"gradient": {"logp": gradient.tolist()}}])


def reinforce_pp():
    inputs = {
        "reward": [1.0, 0.0, -0.5],
        "penalty": [[0.25, -0.5, 0.125, 0.0], [0.5, 0.0, 0.0, 0.0], [-0.25, 0.75, 0.0, 0.0]],
        "mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]],
    }
    mask = torch.tensor(inputs["mask"])
    token_reward = -torch.tensor(inputs["penalty"])
    rows = torch.arange(len(mask))
    token_reward[rows, mask.sum(1) - 1] += torch.tensor(inputs["reward"])
    adv, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        token_reward, mask, config=SimpleNamespace(gamma=1.0)
    )
    call = {"function": "whitened_returns", "inputs": inputs, "value": adv.tolist(), "gradient": {}}
    write("reinforce_pp", "compute_reinforce_plus_plus_outcome_advantage", [call])


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    ppo_dual_clip()
    reinforce_pp()
