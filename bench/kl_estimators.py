"""How noisy is the gradient of each estimator of the KL in the loss, and what does the exact KL cost?

    python bench/kl_estimators.py            40 CPU seconds → bench/results/kl_estimators.csv
    python bench/kl_estimators.py --cost     seconds of a GRPO update without KL, with k3, with the exact KL

A policy with 4 tokens and responses of at most 3 has 40 responses. So the mean of a gradient over the samples
and its variance are sums, not estimates. The gradients are those of the trainer's own `microbatch_loss`, in
float64, with no advantage and β = 1. The policy is the reference with noise on its weights, as much as gives
the wanted KL. labs/kl_estimators.py asks what each estimator does to a run, and where it ends.
"""

import copy
import csv
import math
import os
import statistics
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CSV = os.path.join(ROOT, "bench", "results", "kl_estimators.csv")
sys.path.insert(0, ROOT)

import train_grpo  # noqa: E402
from nanorlhf import exact  # noqa: E402
from nanorlhf.model import GPT, GPTConfig  # noqa: E402

EOS, PAD, PROMPT = 3, 0, [1]
TREE = exact.Tree(4, 3, EOS)
ESTIMATORS = {
    "k1": dict(kl="k1", kl_unbiased=False),
    "k1_ratio": dict(kl="k1"),
    "k2": dict(kl="k2", kl_unbiased=False),
    "k3": dict(kl="k3", kl_unbiased=False),
    "k3_ratio": dict(kl="k3"),
    "exact": dict(kl="exact"),
}
DISTANCES = (0.01, 0.1, 1.0)  # nats per sequence
SEEDS = range(5)


def pair(seed, nats):
    """→ policy, reference: two GPTs in float64, KL(policy‖reference) = nats."""
    torch.manual_seed(seed)
    ref = GPT(GPTConfig.gpt2(4, n_layer=1, n_head=2, d_model=16, max_len=8)).double()
    for p in ref.parameters():
        p.data += 0.3 * torch.randn_like(p)
    noise = [torch.randn_like(p) for p in ref.parameters()]
    ref_logp = TREE.logp(TREE.table(ref, PROMPT))
    least, most = 0.0, 2.0  # the size of the noise
    for _ in range(60):
        size = (least + most) / 2
        policy = copy.deepcopy(ref)
        for p, step in zip(policy.parameters(), noise):
            p.data += size * step
        above = exact.kl(TREE.logp(TREE.table(policy, PROMPT)), ref_logp) > nats
        least, most = (least, size) if above else (size, most)
    return policy, ref


def moments(policy, ref, flags):
    """Gradient of a response's KL term → mean over all responses (P,), and the trace of the covariance."""
    cfg = train_grpo.Config(beta=1.0, max_new_tokens=3, **flags)
    mean = total = 0.0
    for response in TREE.responses:
        tokens = torch.tensor([[*PROMPT, *response]])
        mask = torch.arange(tokens.shape[1])[None] >= len(PROMPT)
        with torch.no_grad():
            logp, ref_logp = (model.logprobs(tokens, mask)[0] for model in (policy, ref))
        batch = dict(tokens=tokens, mask=mask, old_logp=logp, ref_logp=ref_logp, w=mask.double())
        batch["adv"] = torch.zeros(1)
        policy.zero_grad()
        loss, *_ = train_grpo.microbatch_loss(policy, batch, cfg, ref if cfg.kl == "exact" else None)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        probability = logp.sum().exp()
        mean = mean + probability * gradient
        total = total + probability * gradient.square().sum()
    return mean, (total - mean.square().sum()).item()


def measure(seed, nats):
    """→ {estimator_bias, estimator_noise}, in units of the norm of the right gradient, that of the exact KL.

    bias: the distance of the mean gradient from the right one. noise: the standard deviation of one sample's.
    """
    policy, ref = pair(seed, nats)
    right, _ = moments(policy, ref, ESTIMATORS["exact"])
    row = {"seed": seed, "nats": nats}
    for name, flags in ESTIMATORS.items():
        mean, variance = moments(policy, ref, flags)
        row[f"{name}_bias"] = ((mean - right).norm() / right.norm()).item()
        row[f"{name}_noise"] = math.sqrt(variance) / right.norm().item()
    return row


def cost(layers=4, width=256, vocab=8192, rows=16, length=128, times=5):
    """Print the median seconds of a gradient: a batch of whole rows, the reference's pass included."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig.gpt2(vocab, n_layer=layers, n_head=4, d_model=width, max_len=length))
    ref = copy.deepcopy(policy).requires_grad_(False)
    tokens = torch.randint(vocab, (rows, length))
    mask = (torch.arange(length) > 15).expand(rows, length)
    with torch.no_grad():
        logp = policy.logprobs(tokens, mask)[0]
    w = mask / mask.sum()
    batch = dict(tokens=tokens, mask=mask, old_logp=logp, ref_logp=logp, adv=torch.ones(rows), w=w)
    seconds = {"none": [], "k3": [], "exact": []}
    for _ in range(times):  # in turn, so that a change of the machine's load meets all
        for kl, found in seconds.items():
            cfg = train_grpo.Config(kl=kl, beta=None if kl == "none" else 0.1)
            start = time.perf_counter()
            train_grpo.microbatch_loss(policy, batch, cfg, ref if kl == "exact" else None)[0].backward()
            found.append(time.perf_counter() - start)
    for kl, found in seconds.items():
        print(f"--kl {kl:<6} {statistics.median(found):.3f} s")


def main():
    rows = [measure(seed, nats) for nats in DISTANCES for seed in SEEDS]
    table = []
    for seed in SEEDS:  # one row a seed, one column a distance: what docs/04-grpo.md reads
        wide = {"seed": seed}
        for row in rows:
            if row["seed"] == seed:
                figures = {k: v for k, v in row.items() if k not in ("seed", "nats")}
                wide |= {f"{k}_{row['nats']:g}": f"{v:.4g}" for k, v in figures.items()}
        table.append(wide)
    with open(CSV, "w", newline="") as f:
        writer = csv.DictWriter(f, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for nats in DISTANCES:
        for name in ESTIMATORS:
            at = [row for row in rows if row["nats"] == nats]
            bias, noise = (statistics.median(row[f"{name}_{k}"] for row in at) for k in ("bias", "noise"))
            print(f"{nats:>5g} nats  {name:<9} bias {bias:.3f}  noise {noise:.2f}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    torch.set_num_threads(1)
    cost() if "--cost" in sys.argv else main()
