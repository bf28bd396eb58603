"""The optimizer step that stopped a run, once more: where does the first number that is not finite come from?

    python -m nanorlhf.run.replay runs/chain-grpo/bad-step-12.pt

`Run.check` writes such a file when loss or gradient is not finite: the trainer's name, its flags, the models
as they were before the update, and the batch. `trainer.gradient(*models, batch, cfg)` is called on them.
Exit status 1 if it comes out not finite again, 0 if it does not, 2 for a file that cannot be read.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import pickle
import sys

import torch

from nanorlhf import lora
from nanorlhf.errors import UserError, require
from nanorlhf.model import GPT, GPTConfig, ScalarModel
from nanorlhf.run import dist, sharding
from nanorlhf.run.device import setup, to_device


def save(path, trainer, cfg, step, models, batch):
    """Write the file. models: those that trainer.gradient takes, in this order."""
    saved = []
    for model in models:
        trunk = getattr(model, "trunk", model)
        own = dict(scalar=trunk is not model, step_ids=getattr(model, "step_ids", None), n_ids=trunk.n_ids)
        weights = {}
        for name, x in model.state_dict().items():  # one after the other: the whole model may not fit
            x = sharding.full(x)
            if dist.rank() == 0:
                weights[name] = x.cpu()
        saved.append(own | dict(config=dataclasses.asdict(trunk.cfg), weights=weights))
    content = dict(trainer=trainer, config=dataclasses.asdict(cfg), step=step, models=saved, batch=batch)
    try:
        if dist.rank() == 0:
            torch.save(content, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # what a full disk leaves
            if dist.rank() == 0:
                os.unlink(f"{path}.tmp")
    dist.wait()  # before another rank says why they stop, which ends this one


def load(path):
    """→ the trainer's module, its Config, the step, the models and the batch, on the run's device."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{path}: cannot be read: {str(e).partition(chr(10))[0]}") from None
    require(isinstance(content, dict) and "trainer" in content, f"{path}: was not written by Run.check")
    require(content["trainer"].startswith("train_"), f"{path}: {content['trainer']} is no trainer")
    trainer = importlib.import_module(content["trainer"])
    cfg = trainer.Config(**content["config"] | {"shard": False})
    if cfg.device == "cuda" and not torch.cuda.is_available():
        print("this torch sees no GPU: on the CPU, where rounding differs")
        cfg.device = "cpu"
    cfg.compile = False  # the hooks of `watch` look into every module
    device, models = setup(cfg), []
    for saved in content["models"]:
        model = GPT(GPTConfig(**saved["config"]))
        model.n_ids = saved["n_ids"]
        if saved["scalar"]:
            model = ScalarModel(model)
            model.step_ids = saved["step_ids"]
        ranks = [len(x) for name, x in saved["weights"].items() if name.endswith(".A")]
        lora.add(model, ranks[0] if ranks else 0, cfg.dtype)
        model.load_state_dict(saved["weights"])
        models.append(model)
    to_device(cfg, device, *models)
    return trainer, cfg, content["step"], models, _to(content["batch"], device)


def _to(x, device):
    if isinstance(x, dict):
        return {key: _to(value, device) for key, value in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x


def watch(names, models):
    """Hooks on every module → a list that gets the names of those whose output is not finite, in order."""
    bad = []
    for name, model in zip(names, models):
        for where, module in model.named_modules():

            def look(module, args, out, name=name, where=where):
                if isinstance(out, torch.Tensor) and not out.isfinite().all():
                    bad.append(f"{name}.{where}")

            module.register_forward_hook(look)
    return bad


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        require(len(argv) == 1 and argv[0][:1] != "-", f"give one file\n\n{__doc__}")
        trainer, cfg, step, models, batch = load(argv[0])
    except UserError as e:
        print(f"replay: error: {e}", file=sys.stderr)
        return 2
    names = list(inspect.signature(trainer.gradient).parameters)
    weights = [(f"{name}.{k}", p) for name, m in zip(names, models) for k, p in m.named_parameters()]
    spoilt = [name for name, p in weights if not p.isfinite().all()]
    bad = watch(names, models)
    loss, _ = trainer.gradient(*models, batch, cfg)
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), torch.inf).item() for m in models]
    print(f"{trainer.__name__}, step {step}: loss {float(loss):g}")
    for name, norm in zip(names, norms):
        print(f"gradient norm of {name}: {norm:g}")
    print(f"first weights that are not finite: {spoilt[0] if spoilt else 'none'}")
    print(f"first module whose output is not finite: {bad[0] if bad else 'none'}")
    finite = all(map(torch.isfinite, map(torch.tensor, (float(loss), *norms))))
    print("not finite again" if not finite else "finite here: not reproduced")
    return int(not finite)


if __name__ == "__main__":
    sys.exit(main())
