"""What runs on 1, 8 and 64 GPUs: memory, bytes exchanged in a GRPO step. Nothing is measured.

    python -m bench.scaling            print the tables, and write them into docs/scaling.md

Memory comes from nanorlhf/run/plan.py, which counts it from the model's own modules (on the meta device);
what is cut over the GPUs, and what is exchanged, from the formulas in docs/scaling.md.
"""

import os
import types

import torch

from bench import table
from nanorlhf.kernels.slots import SLOTS
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import plan

PAGE = os.path.join(table.ROOT, "docs", "scaling.md")
GPU, GIB = 80, 1 << 30  # GiB of the GPU that the tables are about
PROMPTS, GROUP, PROMPT, NEW = 64, 8, 256, 768  # 512 responses a step, all as long as they may be
ON_CUDA = types.SimpleNamespace(device="cuda")  # what a plan asks of a Config
MINIBATCHES, MICROBATCH = 4, 8192  # optimizer steps; padded tokens at once on a GPU


def qwen(n_layer, n_head, n_kv_head, d_model, d_ff, tied=False, vocab=151_936, **kw):
    how = dict(n_kv_head=n_kv_head, d_ff=d_ff, tied=tied, qkv_bias=True, max_len=4096) | kw
    return GPTConfig.llama(vocab, n_layer=n_layer, n_head=n_head, d_model=d_model, **how)


MODELS = {  # as in the config.json of Qwen2.5 and of Llama 3
    "0.5B": qwen(24, 14, 2, 896, 4864, tied=True),
    "1.5B": qwen(28, 12, 2, 1536, 8960, tied=True),
    "7B": qwen(28, 28, 4, 3584, 18944),
    "14B": qwen(48, 40, 8, 5120, 13824),
    "32B": qwen(64, 40, 8, 5120, 27648),
    "70B": qwen(80, 64, 8, 8192, 28672, vocab=128_256, qkv_bias=False),
}


def build(name):
    with plan.META:
        model = GPT(MODELS[name])
    model.compute_dtype, model.recompute = torch.bfloat16, True
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


def memory(model, gpus, shard):
    """Bytes on each GPU → {part: bytes of it that always lie there}, {phase: bytes at work in it}.

    A reference lies beside the policy.
    """
    P, block, c = count(model), count(model.blocks[0]), plan.width(model)
    outside = P - model.cfg.n_layer * block
    cut = gpus if shard else 1
    resident = {"weights": 4 * P / cut, "gradients": 4 * P / cut, "AdamW": 8 * P / cut,
                "reference": 4 * P / cut}  # fmt: skip
    update = sum(plan.update_parts(ON_CUDA, [model], MICROBATCH).values())
    slots = min(SLOTS, PROMPTS * GROUP // gpus)
    sampling = plan.sampling_parts(model, slots, PROMPT + NEW, PROMPT)
    if shard:  # what is gathered is in bf16 already; two blocks, as the second is on its way
        update -= plan.layer_bytes(model)[1] + c * model.wte.weight.numel()
        update += 2 * c * block + (c + 4) * block + (2 * c + 4) * outside  # and gradients, of one block
        sampling["weights cast once"] = c * P + c * model.wte.weight.numel()
    return resident, {"update": update, "sampling": sum(sampling.values())}


def fits(model, gpus, shard, phase):
    resident, work = memory(model, gpus, shard)
    total = sum(resident.values()) + work[phase] + plan.CONTEXT
    return total / GIB


def exchanged(model, gpus, shard):
    """Bytes that a GPU sends (and receives) in a GRPO step → {phase: bytes}."""
    P, share = count(model), (gpus - 1) / gpus
    tokens = PROMPTS * GROUP * (PROMPT + NEW) / gpus
    passes = max(MINIBATCHES, -(-tokens // MICROBATCH))
    if not shard:
        return {"update": MINIBATCHES * 2 * share * 4 * P}
    return {"sampling": share * 2 * P, "scoring": -(-tokens // MICROBATCH) * share * 2 * P,
            "update": passes * share * (2 + 2 + 4) * P}  # fmt: skip


def lines(head, rows):
    """A markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)) + "\n"


WAYS = [(1, False), (8, False), (8, True), (64, True)]
NAMES = ["1 GPU", "8, copies", "8, `--shard`", "64, `--shard`"]


def tables():
    built = {name: build(name) for name in MODELS}
    parts, sizes, wires = [], {"update": [], "sampling": []}, []
    for name, model in built.items():
        for phase, rows in sizes.items():
            need = [fits(model, *way, phase) for way in WAYS]
            rows.append([name, f"{count(model) / 1e9:.2f}",
                         *(f"**{x:.0f}**" if x <= GPU else f"{x:,.0f}" for x in need)])  # fmt: skip
        sent = [sum(exchanged(model, *way).values()) / 1e9 for way in WAYS[1:]]
        wires.append([name, *(f"{x:,.0f}" for x in sent)])
    for way, title in zip(WAYS, NAMES):
        resident, work = memory(built["7B"], *way)
        parts.append([title, *(f"{x / GIB:.1f}" for x in (*resident.values(), *work.values()))])
    model = ["model", "parameters, 10⁹", *NAMES]
    kinds = [*memory(built["7B"], 1, False)[0], "update", "sampling"]
    return {
        "scaling_parts": lines(["7B", *kinds], parts),
        "scaling_update": lines(model, sizes["update"]),
        "scaling_sampling": lines(model, sizes["sampling"]),
        "scaling_wire": lines(["model", *NAMES[1:]], wires),
    }


if __name__ == "__main__":
    found = tables()
    print("\n".join(found.values()))
    table.fill(PAGE, found)
