"""Our variants, each in a process of its own (bench/worker.py): a whole train(), or the bare model."""

import importlib
import time

import torch

import train_sft
from bench.worker import lengths_of
from nanorlhf import generate, hub
from nanorlhf.run import log

FIRST = ("loss", "logp_chosen", "logp_rejected")  # what is reported of the first step, to be compared


def run(spec, turn):
    torch.set_num_threads(1)
    if spec["job"] == "bare":
        return bare(spec, turn)
    if spec.get("lengths"):
        plan_lengths(spec["lengths"])
    if "eos" in spec:
        force_eos(spec["eos"])
    trainer = importlib.import_module(f"train_{spec['job']}")
    extra = count_reference(trainer, spec["config"]["batch_size"]) if spec["job"] == "dpo" else {}
    log_row = log.Log.row

    first = {}

    def row(self, step, metrics):
        log_row(self, step, metrics)
        if step == 0:
            first.update({name: metrics[name] for name in FIRST if name in metrics})
        turn.done(tokens=round(metrics["tok_s"] * metrics["s"]), first=first, **extra)

    log.Log.row = row
    trainer.train(trainer.Config(**spec["config"]))


def plan_lengths(plan):
    """Let the rows of every rollout of this many rows end at these lengths, whatever the model says.

    The plan is written into the table of uniform numbers: EOS is the last id, so that u = 1 draws it and
    u < 0.9 does not. No other line of the sampler is touched.
    """
    prepare, steps = generate.prepare, iter(range(1 << 30))

    def planned(*args):
        out = prepare(*args)
        u = out.uniforms  # (rows, positions)
        if len(u) == len(plan):
            u.mul_(0.9)
            for b, length in enumerate(lengths_of(plan, next(steps))):
                u[b, length - 1 :] = 1.0
        return out

    generate.prepare = planned


def force_eos(eos_id):
    """Let u = 1 draw EOS and no other number: the EOS of a published model is not the last id."""
    sample = generate.sample

    def forced(logits, u, sampling):
        ends = u == 1.0
        logits[:, eos_id] = -torch.inf
        token, logp = sample(logits, u.clamp(max=0.9), sampling)
        token[ends] = eos_id
        return token, logp

    generate.sample = forced


def count_reference(trainer, batch_size):
    """DPO scores the reference once per pair, before the first step: the share of a step of the first epoch
    → {"cpu_more": seconds to be added to each step}, filled while the run starts."""
    cache, extra = trainer.cache_logps, {"cpu_more": 0.0}

    def timed(model, examples, *args):
        start = time.process_time()
        out = cache(model, examples, *args)
        if len(examples) > batch_size:
            extra["cpu_more"] = (time.process_time() - start) * batch_size / len(examples)
        return out

    trainer.cache_logps = timed
    return extra


def bare(spec, turn):
    """Forward, loss, backward and AdamW on the same tokens again and again."""
    model, _ = hub.load(spec["model"])
    model.to(spec["device"])
    model.compute_dtype = torch.bfloat16 if spec["dtype"] == "bfloat16" else None
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=spec["device"] == "cuda")
    tokens = torch.tensor(spec["tokens"], device=spec["device"])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    cfg = train_sft.Config()  # and so micro-batches of 1,024 tokens
    batch = dict(tokens=tokens, mask=mask, lengths=mask.sum(1).cpu() + 1, denom=mask.sum())
    first = None
    while True:
        opt.zero_grad()
        loss = train_sft.gradient(model, batch, cfg)["loss"]
        opt.step()
        first = loss if first is None else first
        turn.done(tokens=tokens.numel(), first_loss=first)
