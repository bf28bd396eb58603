"""Writes golden vectors of the variants whose method no published code computes here: plain Python, no torch.

    python tests/golden/make_variants_reference.py

Each is the paper's formula written in another way than in the variant: sums over all later tokens in place of
a recursion, derivatives by hand in place of autograd.
"""

import json
import math
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "variants/golden"


def write(name, origin, calls):
    found = {"origin": f"reference: {origin}", "calls": calls}
    (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(name)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def odpo():
    """−log σ(z), z = βΔ − α log m; dL/dlogp_w = −β (1 − σ(z)) = −dL/dlogp_l."""
    beta = 0.25
    alpha = 0.5
    margins = [0.5, 1.0, 2.5, 0.125]
    logp_w = [-10.0, -12.5, -3.25, -8.0]
    logp_l = [-11.0, -9.75, -30.0, -8.0]
    ref_w = [-10.5, -12.25, -9.0, -8.5]
    ref_l = [-10.75, -11.0, -12.0, -7.5]
    offset = [alpha * math.log(m) for m in margins]
    z = [beta * (a - b - c + d) - o for a, b, c, d, o in zip(logp_w, logp_l, ref_w, ref_l, offset)]
    gradient = [-beta * (1 - sigmoid(x)) for x in z]
    call = {
        "function": "preference_loss",
        "inputs": {"logp_w": logp_w, "logp_l": logp_l, "ref_w": ref_w, "ref_l": ref_l, "beta": beta,
                   "offset": offset},
        "value": [math.log(1 + math.exp(-x)) for x in z],
        "gradient": {"logp_w": gradient, "logp_l": [-g for g in gradient]},
    }  # fmt: skip
    write("odpo", "arXiv 2402.10571, equation of the loss, f = log", [call])


REWARD = [[0.0, 0.25, -0.5, 1.0], [0.0, -1.0, 2.0, 9.0]]  # column 0 is a prompt, the 9s are pads
VALUE = [[9.0, 0.5, -0.25, 0.75], [9.0, 1.5, 0.5, 9.0]]
MASK = [[0, 1, 1, 1], [0, 1, 1, 0]]


def gae(gamma, lam_of_row):
    """A_t = Σ_{s ≥ t} (γλ)^{s−t} (r_s + γ V_{s+1} − V_s), the sum written out → nested lists, 0 outside."""
    rows = []
    for reward, value, mask, lam in zip(REWARD, VALUE, MASK, lam_of_row):
        inside = [t for t, m in enumerate(mask) if m]
        last = inside[-1]
        row = [0.0] * len(mask)
        for t in inside:
            for s in range(t, last + 1):
                next_value = value[s + 1] if s < last else 0.0
                row[t] += (gamma * lam) ** (s - t) * (reward[s] + gamma * next_value - value[s])
        rows.append(row)
    return rows


def targets(gamma, lam):
    """What the critic learns: A_t + V_t; with λ = 1 it is the discounted return."""
    adv = gae(gamma, [lam] * len(MASK))
    return [[m * (a + v) for a, v, m in zip(*row)] for row in zip(adv, VALUE, MASK)]


def decoupled_gae():
    gamma, lam = 0.9, 0.5
    inputs = {"reward": REWARD, "value": VALUE, "mask": MASK, "gamma": gamma, "lam": lam}
    calls = []
    for critic_lam in (1.0, 0.8):
        call = {"function": "decoupled_gae", "inputs": inputs | {"critic_lam": critic_lam}}
        call["values"] = [gae(gamma, [lam] * 2), targets(gamma, critic_lam)]
        calls.append(call | {"gradient": {}})
    write("decoupled_gae", "arXiv 2503.01491, the sums of GAE written out", calls)


def length_adaptive_lam():
    """Lengths 3 and 2: λ = 1 − 1/3α, 1 − 1/2α."""
    calls = []
    for alpha in (2.0, 0.05):
        lam = [max(0.0, 1 - 1 / (alpha * length)) for length in (3, 2)]
        inputs = {"reward": REWARD, "value": VALUE, "mask": MASK, "gamma": 1.0, "alpha": alpha}
        call = {"function": "length_adaptive_gae", "inputs": inputs}
        calls.append(call | {"values": [gae(1.0, lam), targets(1.0, 1.0)], "gradient": {}})
    write("length_adaptive_lam", "arXiv 2504.05118, λ = 1 − 1/(α l), the sums of GAE written out", calls)


def value_pretraining():
    """lr 1 over 10 steps, down to 0; the policy stands still in the first 4."""
    config = {"critic_steps": 4, "lr": 1.0, "steps": 10}
    calls = []
    for step, rate in ((0, 0.0), (3, 0.0), (4, 0.6), (9, 0.1)):
        call = {"function": "policy_rate", "inputs": {"step": step}, "config": config}
        calls.append(call | {"value": rate, "gradient": {}})
    write("value_pretraining", "arXiv 2503.01491, the policy is fixed at first", calls)


def positive_nll():
    """Three of the four tokens belong to right answers; the derivative is −1/3 there."""
    logp = [[0.0, -1.5, -0.25], [0.0, -4.0, -2.0]]
    right = [[False, True, True], [False, True, False]]
    calls = []
    for denom, value in ((3.0, 5.75 / 3), (8.0, 5.75 / 8)):  # a part of a step has the denominator of all
        inputs = {"logp": logp, "right": right, "denom": [denom]}
        gradient = [[-1 / denom if r else 0.0 for r in row] for row in right]
        call = {"function": "positive_loss", "inputs": inputs, "value": [value]}
        calls.append(call | {"gradient": {"logp": gradient}})
    write("positive_nll", "arXiv 2504.05118, mean over the tokens of right answers", calls)


def prm_first_error():
    """Steps end at tokens 2, 3, 5 and 6; behind the first 0 there are no labels. −1: none."""
    calls = []
    for labels, expected in (
        ([1, 0, 1, 1], [-1, -1, 1, 0, -1, -1, -1]),
        ([1, None, 0, 0], [-1, -1, 1, -1, -1, 0, -1]),
        ([1, 1, 1, 1], [-1, -1, 1, 1, -1, 1, 1]),
    ):
        plain = {"ends": [2, 3, 5, 6], "labels": labels}
        calls.append({"function": "label_tokens", "plain": plain, "value": expected, "gradient": {}})
    write("prm_first_error", "arXiv 2305.20050, labels up to the first error", calls)


def prm_soft():
    """−(p log q + (1−p) log (1−q)), q = σ(z); the derivative is q − p."""
    logit = [0.0, 2.0, -1.5, 0.25]
    label = [0.125, 0.875, 0.5, 1.0]
    q = [sigmoid(z) for z in logit]
    loss = sum(-p * math.log(x) - (1 - p) * math.log(1 - x) for p, x in zip(label, q)) / 4
    call = {"function": "step_loss", "inputs": {"logit": logit, "label": label, "denom": 4}, "value": loss}
    gradient = {"logit": [(x - p) / 4 for p, x in zip(label, q)]}
    write("prm_soft", "arXiv 2312.08935, cross-entropy with a soft label", [call | {"gradient": gradient}])


if __name__ == "__main__":
    odpo()
    decoupled_gae()
    length_adaptive_lam()
    value_pretraining()
    positive_nll()
    prm_first_error()
    prm_soft()
