"""DPO on `reviews`: how far β lets the policy go, and the whole family of losses, judged by gold.

    python bench/dpo_beta.py                  β 0.3, 0.1, 0.03; 8 minutes; writes results/dpo_beta.csv
    python bench/dpo_beta.py --losses         every --loss; 20 minutes; writes results/dpo_losses.csv
    python bench/dpo_beta.py --seeds 0,1      other seeds than 0, 1, 2

One SFT model and one file of pairs per seed, shared by all its runs. Everything is measured on 512 held-out
samples after training; no run ever reads gold. The first run of a seed makes its own pairs, as
`python train_dpo.py` does, and its CPU seconds are those of SFT, pairs and DPO together.
"""

import statistics
import sys
import tempfile

import torch
from main_job import ROOT, print_row, rows_of, run, show, write

sys.path.insert(0, ROOT)
from demo import mean_se  # noqa: E402
from nanorlhf import generate, hub, tasks  # noqa: E402
from nanorlhf.errors import derive_seed  # noqa: E402

BETAS = (0.3, 0.1, 0.03)
LOSSES = ("dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "dpo_nll")


@torch.no_grad()
def judge(folder, sft, seed):
    """Fresh samples on held-out prompts → gold, KL to SFT (nats per sequence), length and more."""
    policy, tok = hub.load(folder)
    task = tasks.get("reviews")
    seed = derive_seed(seed, "judge")
    prompts = [r["prompt"] for r in task.prompts("test", 512, seed)]
    rolls, texts = generate.respond(policy, tok, prompts, 1, task.max_new_tokens, seed=seed)
    gold, se = mean_se(torch.tensor([tasks.gold(p, t) for p, t in zip(prompts, texts)]))
    kl, kl_se = mean_se(torch.cat([(r.logp - sft.logprobs(r.tokens, r.mask)[0]).sum(1) for r in rolls]))
    parts = [tasks.gold_parts(p, t)["ill_formed"] for p, t in zip(prompts, texts)]
    length = torch.cat([r.response_len for r in rolls]).float().mean().item()
    return {"gold": gold, "gold_se": se, "kl": kl, "kl_se": kl_se, "len": length,
            "unique": len(set(texts)) / len(texts), "ill_formed": statistics.mean(parts)}


def figures(folder):
    """Of the run's own log: last values."""
    rows = rows_of(folder)
    names = ("eval/acc", "logp_chosen", "logp_rejected", "entropy")
    return {name.removeprefix("eval/"): [float(r[name]) for r in rows if r[name]][-1] for name in names}


def seed_runs(seed, tmp, variants):
    """One SFT, then a DPO run per {column: value} of flags → rows, the first of them the SFT model's own."""
    sft = f"{tmp}/{seed}-sft"
    cpu_sft = run("train_sft.py", "--seed", str(seed), "--out", sft)
    model, data, rows = hub.load(f"{sft}/model")[0], [], []
    base = judge(f"{sft}/model", model, seed)
    for flags in variants:
        out = f"{tmp}/{seed}-dpo-{'-'.join(map(str, flags.values()))}"
        argv = [x for name, value in flags.items() for x in (f"--{name}", str(value))]
        cpu = run("train_dpo.py", "--seed", str(seed), "--init", f"{sft}/model", "--out", out, *argv, *data)
        if not data:  # held-out prompts are recognised by their hash, so one file can hold both
            path = f"{tmp}/{seed}-pairs.jsonl"
            with open(path, "w", encoding="utf-8") as f:
                for name in ("pairs", "pairs_heldout"):
                    with open(f"{out}/{name}.jsonl", encoding="utf-8") as part:
                        f.write(part.read())
            data, cpu = ["--data", path], cpu + cpu_sft
        row = flags | {"seed": seed, "gold_sft": base["gold"]} | judge(f"{out}/model", model, seed)
        rows.append(row | figures(out) | {"cpu_seconds": cpu})
        print_row(rows[-1])
    return rows


def wide(rows, key):
    """One row a seed, a column for every figure of every variant: gold_0.3, gold_0.1, …"""
    out = {}
    for r in rows:
        row = out.setdefault(r["seed"], {"seed": r["seed"], "gold_sft": r["gold_sft"]})
        row |= {f"{k}_{r[key]}": v for k, v in r.items() if k not in (key, "seed", "gold_sft")}
    return list(out.values())


def main():
    args = sys.argv[1:]
    losses = "--losses" in args
    seeds = args[args.index("--seeds") + 1].split(",") if "--seeds" in args else ["0", "1", "2"]
    variants = [{"loss": x} for x in LOSSES] if losses else [{"beta": x} for x in BETAS]
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for seed in seeds:
            rows += seed_runs(int(seed), tmp, variants)
            write("dpo_losses" if losses else "dpo_beta", wide(rows, "loss" if losses else "beta"))
    first = [r for r in rows if r.get("beta") == 0.3 or r.get("loss") == "dpo"]
    show("python train_dpo.py", first, {
        "CPU seconds with SFT and pairs": (lambda r: r["cpu_seconds"], "≤ 90", lambda v: v <= 90),
        "gold, DPO − SFT": (lambda r: r["gold"] - r["gold_sft"], "≥ 1.5", lambda v: v >= 1.5),
        "KL(policy‖SFT), nats per sequence": (lambda r: r["kl"], "≤ 6", lambda v: v <= 6),
    })
    if not losses:
        lowest = [a | {"best": b["gold"]} for a, b in zip((r for r in rows if r["beta"] == BETAS[-1]), first)]
        show("python train_dpo.py --beta 0.03", lowest, {
            "gold, below that of β = 0.3 by": (lambda r: r["best"] - r["gold"], "≥ 1", lambda v: v >= 1),
        })


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
