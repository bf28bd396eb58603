"""Which divergence does what when the student cannot represent the teacher: a toy that can be enumerated.

    python bench/distill.py                   five seeds, 20 CPU-seconds → bench/results/distill_toy.csv
    python bench/distill.py --smoke           a few steps of one seed, printed and not written

Six prompts, one token of ten as the response. For each prompt the teacher gives 0.45 to two tokens each and
shares the rest. The student's logits have rank two, so it cannot give every prompt two tokens of its own.
Each divergence is descended exactly, from three random starts, and the lowest end counts. `kept` is the
student's mass on the teacher's two tokens, `covered` the smaller of its two probabilities over 0.45; both are
means over the prompts.

Distillation of *countdown* against GRPO is measured by a lab: python -m labs distillation.
"""

import sys

import torch
from main_job import ROOT, write

sys.path.insert(0, ROOT)

import train_distill  # noqa: E402

V = 10  # tokens
RANK = 2  # of the student's logits
PROMPTS = range(6)
KINDS = {"reverse": {}, "forward": {"divergence": "forward"}, "jsd": {"divergence": "jsd"}}


def two_modes(seed):
    """(6, V): 0.45 for each of two tokens, drawn for every prompt; the others share 0.1."""
    p = torch.full((len(PROMPTS), V), 0.1 / (V - 2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in p:
        row[torch.randperm(V, generator=generator)[:2]] = 0.45
    return p


def fitted(kind, want, seed, steps):
    """The student's log-probs (6, V) at the end of a descent on the mean divergence, and that divergence."""
    cfg = train_distill.Config(**KINDS[kind])
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(PROMPTS), RANK, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, RANK, generator=generator, dtype=torch.float64).requires_grad_()
    ref_weight = torch.eye(V, dtype=torch.float64)  # so the teacher's logits are its log-probs
    opt = torch.optim.Adam([hidden, weight], lr=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        opt.zero_grad()
        loss = train_distill.divergence(hidden, weight, want.log(), ref_weight, cfg).mean()
        loss.backward()
        opt.step()
    return (hidden @ weight.T).log_softmax(-1).detach(), loss.item()


def toy_seed(seed, steps, starts):
    want = two_modes(seed)
    logq = want.log()
    row = {"seed": seed}
    for kind in KINDS:
        logp, _ = min((fitted(kind, want, start, steps) for start in range(starts)), key=lambda end: end[1])
        p = logp.exp()
        both = p[want > 0.4].view(len(PROMPTS), 2)
        row[f"reverse_kl_{kind}"] = (p * (logp - logq)).sum(-1).mean().item()
        row[f"forward_kl_{kind}"] = (want * (logq - logp)).sum(-1).mean().item()
        row[f"kept_{kind}"] = both.sum(1).mean().item()
        row[f"covered_{kind}"] = (both.amin(1) / 0.45).mean().item()
        row[f"entropy_{kind}"] = -(p * logp).sum(-1).mean().item()
    return row


def toy(steps=300, starts=3, seeds=5):
    return [toy_seed(seed, steps, starts) for seed in range(seeds)]


def main():
    smoke = "--smoke" in sys.argv[1:]
    torch.set_num_threads(1)
    rows = toy(steps=3, starts=1, seeds=1) if smoke else toy()
    if not smoke:
        write("distill_toy", rows)
    for row in rows:
        print(*(f"{name} {value:.3f}" for name, value in row.items() if name != "seed"))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    main()
