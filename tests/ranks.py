"""What tests/test_dist.py starts: every trainer at its smallest, by two processes.

    python tests/ranks.py STAGES OUT

STAGES: a folder that stages.Stages has filled. The runs of one process are made by the same functions.
Twice the processes are killed in mid-run; what they have begun is resumed the third time. This does what
`torchrun --standalone --nproc_per_node=2 --max_restarts=2` does, but forks the six processes from one that
has imported torch: seven imports were a third of the time.
"""

import contextlib
import json
import os
import signal
import sys
import traceback

import torch
from stages import Stages
from torch.distributed import fsdp

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import errors, generate, hub
from nanorlhf.hub import folder
from nanorlhf.look import plots
from nanorlhf.model import ScalarModel
from nanorlhf.run import checkpoint, dist, sharding

STEPS = 8
HALF = STEPS // 2  # steps between checkpoints
RUNS = {  # name → trainer, flags; several micro-batches each, and not the same number on both ranks
    "sft": (train_sft, dict(tokens_per_microbatch=30, eval_every=HALF)),
    "rm": (train_rm, dict(tokens_per_microbatch=60, eval_every=HALF)),
    "dpo": (train_dpo, dict(tokens_per_microbatch=60, eval_every=HALF)),
    "ppo": (train_ppo, dict(tokens_per_microbatch=60, kl_target=1.0)),
    "grpo": (train_grpo, dict(tokens_per_microbatch=60, off_policy_steps=0, kl="k3", beta=0.1)),
    "distill": (train_distill, dict(tokens_per_microbatch=60)),
}
SHORT = {  # of which a few steps are enough
    "kto": (train_dpo, dict(loss="kto", tokens_per_microbatch=60, steps=4)),
    "dapo": (train_grpo, dict(recipe="dapo", off_policy_steps=0, steps=4)),
    "online": (train_dpo, dict(online=2, online_ref="round", pairs=16, judge="self", steps=4)),
    "lean": (train_dpo, dict(save_memory=True, dtype="bfloat16", steps=4)),  # bf16 samples other tokens
    "lora": (train_ppo, dict(lora_rank=2, tokens_per_microbatch=60, steps=4)),
    "exact": (train_grpo, dict(kl="exact", beta=0.1, tokens_per_microbatch=60, off_policy_steps=0, steps=4)),
    "exact_ppo": (train_ppo, dict(kl="exact", tokens_per_microbatch=60, steps=4)),
    "jsd": (train_distill, dict(divergence="jsd", lora_rank=2, tokens_per_microbatch=60, steps=4)),
    "as_reward": (train_distill, dict(as_reward=True, tokens_per_microbatch=60, steps=4)),
    "old": (train_grpo, dict(off_policy_steps=1, steps=4)),  # not sharded
    "bf16": (train_sft, dict(dtype="bfloat16", steps=4)),
}
ALL, ROUGH = RUNS | SHORT, ("bf16", "lean")  # those in less than float64
FILES = "gpt2", "llama-gqa-untied", "qwen3", "pythia"  # one of each layout of tensors
PROMPTS = [[1], [2, 3, 4], [5], [1, 2], [3, 3, 3, 3]]  # the second rank has one more than the first


@contextlib.contextmanager
def precision(dtype):
    """Inside, models are loaded, made and run in this dtype, whatever --dtype says."""
    load, before = hub.load, torch.get_default_dtype()

    def precise(*args, **kwargs):
        model, tok = load(*args, **kwargs)
        return model.to(dtype), tok

    torch.set_default_dtype(dtype)
    hub.load = folder.load = precise  # hub.load_models calls the latter
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        hub.load = folder.load = load


def run(stages, name, out, **more):
    """Train; out/exact.json gets loss and gradient norm of every optimizer step with all their digits."""
    trainer, flags = ALL[name]
    seen, check = [], checkpoint.Run.check

    def record(self, step, loss, gnorm, *rest):
        seen.append((loss, gnorm))
        check(self, step, loss, gnorm, *rest)

    checkpoint.Run.check = record
    try:
        trainer.train(stages.config(trainer, out, **dict(steps=STEPS, save_every=HALF) | flags | more))
    finally:
        checkpoint.Run.check = check
    if dist.rank() == 0:
        with open(f"{out}/exact.json", "w") as f:
            json.dump(seen, f)


def sample(model):
    """Responses of 1 to 12 tokens: one rank is done long before the other."""
    return generate.generate(model, PROMPTS, 3, 12, eos_id=9, seed=5)


@contextlib.contextmanager
def offloading():
    """Inside, FSDP2 takes its way of offloading frozen models, although they are at home on the CPU."""
    shard, policy = sharding.shard, fsdp.CPUOffloadPolicy

    def offload_frozen(model, mesh, dtype, offload):
        shard(model, mesh, dtype, offload=not next(model.parameters()).requires_grad)

    sharding.shard = offload_frozen
    fsdp.CPUOffloadPolicy = lambda: policy(pin_memory=False)
    yield
    sharding.shard, fsdp.CPUOffloadPolicy = shard, policy


def memory_of_load(cfg, folder):
    """Bytes by which this process has grown at most, looked at for every tensor of a model that is read."""

    def size():  # without the pages of the file itself, which are the operating system's to drop
        return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

    if not os.path.exists("/proc/self/status"):
        return None
    piece, before, seen = sharding.piece, size(), []
    sharding.piece = lambda *args: (seen.append(size()), piece(*args))[1]
    model, _ = hub.load(folder, shard=True)
    dist.spread(cfg, model)
    sharding.piece = piece
    return max(*seen, size()) - before


def killed(stages, out, kind):
    """A run that kill -9 ends: in a gradient after the first checkpoint, or in the write of the second."""
    module, name, last = (sharding, "write", 1) if kind == "fsdp" else (train_dpo, "gradient", HALF + 2)
    real, calls = getattr(module, name), []

    def deadly(*args, **kw):
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(name)
        return real(*args, **kw)

    setattr(module, name, deadly)
    run(stages, "dpo", f"{out}/dpo-killed-{kind}", shard=kind == "fsdp")


def main(stages, out):
    plots.pyplot = lambda: None
    stages = Stages.at(stages)
    times = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if times < 2:
        killed(stages, out, ("ddp", "fsdp")[times])
    with precision(torch.float64):
        for shard in (False, True):
            kind = "fsdp" if shard else "ddp"
            for name in (*RUNS, "kto", "dapo", "online", "lora", "jsd", "as_reward", "exact", "exact_ppo",
                         *["old"] * (not shard)):
                run(stages, name, f"{out}/{name}-{kind}", shard=shard)
        for name in ("sft", "ppo"):  # begun by one process
            run(stages, name, f"{out}/{name}-begun", shard=True, resume=True)
    for shard in (False, True):
        for name in ("sft", "dpo"):
            run(stages, name, f"{out}/{name}-fp32-{'fsdp' if shard else 'ddp'}", shard=shard)
        run(stages, "dpo", f"{out}/dpo-killed-{'fsdp' if shard else 'ddp'}", shard=shard, resume=True)
    run(stages, "bf16", f"{out}/bf16-fsdp", shard=True)
    with contextlib.suppress(errors.RunError):
        run(stages, "sft", f"{out}/spoilt", shard=True, lr=1e30)
    with offloading():
        run(stages, "lean", f"{out}/lean-fsdp", shard=True)

    cfg = stages.config(train_sft, f"{out}/none", shard=True)
    for style in FILES:
        whole = hub.load(f"{out}/{style}")[0]
        model = hub.load(f"{out}/{style}", shard=True)[0]
        dist.spread(cfg, model)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(sharding.full(p), q) and len(sharding.local(p)) < max(2, len(q)), style
    grown = dist.gather(memory_of_load(cfg, f"{out}/large"))

    model, _ = hub.load(f"{stages.folder}/sft/model", shard=True)
    dist.spread(cfg, model)
    roll = sample(model)
    rm = ScalarModel(hub.load(f"{stages.folder}/sft/model", shard=True)[0])
    dist.spread(cfg, rm)  # train_rm samples its pairs from the trunk
    assert torch.equal(sample(rm.trunk).tokens, roll.tokens)
    loss = model.logprobs(roll.tokens, roll.mask)[0].sum()  # and the sharded model still trains
    loss.backward()
    if dist.rank() == 0:
        torch.save([roll.tokens, roll.mask, roll.logp, loss.detach()], f"{out}/roll.pt")
        with open(f"{out}/grown.json", "w") as f:
            json.dump(grown, f)
    dist.finish()


def fork(rank, attempt, port, argv):
    """→ the pid of a new process that runs `main(*argv)` as torchrun would have started it."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=f"{port}", TORCHELASTIC_RUN_ID="tests")
    os.environ |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=f"{attempt}")
    status = 1
    try:
        main(*argv)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def agent(argv):
    """Two processes; when one fails, the other is ended and both start anew, at most twice → exit status.

    The store outlives them, as torchrun's does: an attempt must not find the addresses of the one before.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for attempt in range(3):
        alive = {fork(rank, attempt, store.port, argv) for rank in range(2)}
        failed = False
        while alive:
            pid, status = os.wait()
            alive.remove(pid)
            if status and not failed:
                failed = True
                for other in alive:
                    os.kill(other, signal.SIGKILL)
        if not failed:
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(agent(sys.argv[1:]))
