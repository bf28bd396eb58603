"""What tests/test_dist.py starts with torchrun: every trainer at its smallest, by two processes.

    torchrun --standalone --nproc_per_node=2 tests/ranks.py STAGES OUT

STAGES: a folder that stages.Stages has filled. The runs of one process are made by the same functions.
"""

import contextlib
import json
import sys

import torch
from stages import Stages

import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import checkpoint, common, dist, generate, hub

STEPS = 20
RUNS = {  # name → trainer, flags; several micro-batches each, and not the same number on both ranks
    "sft": (train_sft, dict(tokens_per_microbatch=30, eval_every=10)),
    "rm": (train_rm, dict(tokens_per_microbatch=60, eval_every=10)),
    "dpo": (train_dpo, dict(tokens_per_microbatch=60, eval_every=10)),
    "ppo": (train_ppo, dict(tokens_per_microbatch=60, kl_target=1.0)),
    "grpo": (train_grpo, dict(tokens_per_microbatch=60, off_policy_steps=0, kl="k3", beta=0.1)),
}
SHORT = {  # of which a few steps are enough
    "kto": (train_dpo, dict(loss="kto", tokens_per_microbatch=60, steps=4)),
    "dapo": (train_grpo, dict(recipe="dapo", off_policy_steps=0, steps=4)),
    "online": (train_dpo, dict(online=2, pairs=16, judge="self", steps=4)),
    "lean": (train_ppo, dict(checkpoint_activations=True, frozen_dtype="bfloat16", steps=4)),
    "old": (train_grpo, dict(off_policy_steps=1, steps=4)),  # not sharded
    "bf16": (train_sft, dict(dtype="bfloat16", steps=4)),
}
ALL, ROUGH = RUNS | SHORT, ("bf16", "lean")  # those in less than float64
PROMPTS = [[1], [2, 3, 4], [5], [1, 2], [3, 3, 3, 3]]  # the second rank has one more than the first


@contextlib.contextmanager
def precision(dtype):
    """Inside, models are loaded, made and run in this dtype, whatever --dtype says."""
    load, before = hub.load, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    hub.load = lambda *args, **kw: (lambda model, tok: (model.to(dtype), tok))(*load(*args, **kw))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        hub.load = load


def run(stages, name, out, **more):
    """Train; out/exact.json gets loss and gradient norm of every optimizer step with all their digits."""
    trainer, flags = ALL[name]
    seen, check = [], checkpoint.Run.check

    def record(self, step, loss, gnorm, *rest):
        seen.append((loss, gnorm))
        check(self, step, loss, gnorm, *rest)

    checkpoint.Run.check = record
    try:
        trainer.train(stages.config(trainer, out, **dict(steps=STEPS, save_every=10) | flags | more))
    finally:
        checkpoint.Run.check = check
    if dist.rank() == 0:
        with open(f"{out}/exact.json", "w") as f:
            json.dump(seen, f)


def sample(model):
    """Responses of 1 to 12 tokens: one rank is done long before the other."""
    return generate.generate(model, PROMPTS, 3, 12, eos_id=9, seed=5, pad_id=0)


def main(stages, out):
    common.pyplot = lambda: None
    stages = Stages.at(stages)
    with precision(torch.float64):
        for shard in (False, True):
            kind = "fsdp" if shard else "ddp"
            for name in (*RUNS, "kto", "dapo", "online", *["old"] * (not shard)):
                run(stages, name, f"{out}/{name}-{kind}", shard=shard)
        for name in ("sft", "ppo"):  # begun by one process
            run(stages, name, f"{out}/{name}-begun", shard=True, resume=True)
    for shard in (False, True):
        for name in ("sft", "dpo"):
            run(stages, name, f"{out}/{name}-fp32-{'fsdp' if shard else 'ddp'}", shard=shard)
    for name in ROUGH:
        run(stages, name, f"{out}/{name}-fsdp", shard=True)

    model, _ = hub.load(f"{stages.folder}/sft/model")
    cfg = stages.config(train_sft, f"{out}/none", shard=True)
    dist.spread(cfg, model)
    roll = sample(model)
    loss = model.logprobs(roll.tokens, roll.mask)[0].sum()  # and the sharded model still trains
    loss.backward()
    if dist.rank() == 0:
        torch.save([roll.tokens, roll.mask, roll.logp, loss.detach()], f"{out}/roll.pt")
    dist.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
