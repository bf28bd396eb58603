"""The optimizer step that stopped a run, in a notebook: where does the first NaN come from?

`Run.check` calls `save` when loss or gradient is not finite. The file holds the trainer's name, its flags,
the models as they were before the update, and the batch. The recipe:

    from nanorlhf.run import replay
    trainer, models, batch, cfg = replay.load("runs/chain-grpo/bad-step-12.pt")
    with torch.autograd.detect_anomaly():  # names the line of the forward pass whose gradient is NaN first
        trainer.gradient(*models, batch, cfg)
"""

import dataclasses
import importlib
import os
import re

import torch

from nanorlhf import lora
from nanorlhf.errors import UserError, reason_of, require
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.run import dist, sharding
from nanorlhf.run.cli import to_json
from nanorlhf.run.device import setup, to_device


def save(path, trainer, cfg, step, models, batch):
    """Write the file; all processes must call this. models: those that trainer.gradient takes, in order."""
    content = {
        "trainer": trainer,
        "config": to_json(cfg),
        "step": step,
        "models": [_packed(model) for model in models],
        "batch": batch,
    }
    if dist.rank() == 0:
        torch.save(content, f"{path}.tmp")  # which stays there if the disk is full
        os.replace(f"{path}.tmp", path)
    dist.wait()  # the others' error, raised earlier, would end this process in mid-write


def _packed(model):
    """→ dict of a model's config and weights, the weights on rank 0 only."""
    trunk = model.trunk
    weights = {}
    for name, x in model.state_dict().items():  # one at a time: the whole of a sharded model may not fit
        x = sharding.full(x)
        if dist.rank() == 0:
            weights[name] = x.cpu()
    return {
        "scalar": isinstance(model, ScalarModel),
        "step_ids": getattr(model, "step_ids", None),
        "n_ids": trunk.n_ids,
        "config": dataclasses.asdict(trunk.cfg),
        "weights": weights,
    }


def load(path):
    """→ the trainer's module, the models and the batch on the run's device, the trainer's Config.

    Raises UserError for a file that `save` did not write. The file is read without running code from it.
    """
    require(os.path.isfile(path), f"{path}: cannot be read: no such file")  # a pipe would be waited for
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:  # torch's reader raises whatever the bytes of a file that is none lead it to
        raise UserError(f"{path}: cannot be read: {reason_of(e)}") from None
    ours = isinstance(content, dict) and re.fullmatch("train_[a-z_]+", str(content.get("trainer")))
    require(ours, f"{path}: was not written by Run.check")
    try:
        return _rebuilt(content)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as e:
        raise UserError(f"{path}: was not written by this version of Run.check ({reason_of(e)})") from None


def _rebuilt(content):
    """What a file holds → what `load` returns."""
    trainer = importlib.import_module(content["trainer"])
    cfg = trainer.Config(**content["config"] | {"shard": False})
    if cfg.device == "cuda" and not torch.cuda.is_available():
        print("this torch sees no GPU: on the CPU, where rounding differs")
        cfg.device = "cpu"
    device = setup(cfg)
    models = [_unpacked(saved, cfg.dtype) for saved in content["models"]]
    to_device(cfg, device, *models)
    batch = content["batch"]
    for name, x in batch.items():
        if isinstance(x, torch.Tensor):
            batch[name] = x.to(device)
    return trainer, models, batch, cfg


def _unpacked(saved, dtype):
    model = GPT(GPTConfig(**saved["config"]))
    model.n_ids = saved["n_ids"]
    if saved["scalar"]:
        model = ScalarModel(model)
        model.step_ids = saved["step_ids"]
    weights = saved["weights"]
    lora.add(model, lora.rank_in(weights), dtype)
    model.load_state_dict(weights)
    return model
