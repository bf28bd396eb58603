"""Writes golden vectors of variants/ that TRL's own trainers compute, in float64.

    pip install trl==1.16.0 transformers torch
    python tests/golden/make_variants_dpo.py

DPOTrainer._compute_loss is called with an object that has the few attributes which it reads, and with a model
that returns given log-probs. It returns a mean, so each pair goes alone.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "variants/golden"
PAIRS = {  # sums over the responses; what the reference gives; lengths in tokens
    "logp_w": [-10.0, -12.5, -3.25, -40.0, -8.0],
    "logp_l": [-11.0, -9.75, -30.0, -8.5, -8.0],
    "ref_w": [-10.5, -12.25, -9.0, -33.0, -8.5],
    "ref_l": [-10.75, -11.0, -12.0, -9.25, -7.5],
    "len_w": [5, 8, 3, 16, 4],
    "len_l": [6, 3, 12, 5, 4],
}
ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)


def outputs(tensors):
    """What a model returns for one pair: `tensors` (2, T) of its tokens, and what only the log reads."""
    zeros = torch.zeros_like(tensors["log_probs"])
    return SimpleNamespace(entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), **tensors)


def spread(total, length, width):
    """A sum over `length` tokens → (1, width): equal parts, then zeros."""
    return torch.cat([(total / length).expand(length), torch.zeros(width - length)])[None]


def dpo(pair, settings):
    """One pair of TRL's DPO: {name: tensor (1,)}, attributes of the trainer → scalar."""
    len_w, len_l = int(pair["len_w"]), int(pair["len_l"])
    width = max(len_w, len_l)
    mask = torch.zeros(2, 1 + width)  # one prompt token
    mask[0, 1 : 1 + len_w] = 1
    mask[1, 1 : 1 + len_l] = 1
    rows = [spread(pair["logp_w"], len_w, width), spread(pair["logp_l"], len_l, width)]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False,
        label_smoothing=0.0, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    vars(trainer).update(settings)
    inputs = {
        "input_ids": torch.zeros(2, 1 + width, dtype=torch.int64),
        "attention_mask": torch.ones(2, 1 + width),
        "completion_mask": mask,
        "ref_chosen_logps": pair["ref_w"],
        "ref_rejected_logps": pair["ref_l"],
    }
    tensors = {"log_probs": torch.cat(rows)}
    if "sharp_w" in pair:
        sharp = [spread(pair["sharp_w"], len_w, width), spread(pair["sharp_l"], len_l, width)]
        tensors["log_sum_sq_probs"] = (2 * tensors["log_probs"] - torch.cat(sharp)).detach()
    model = lambda **kwargs: outputs(tensors)  # noqa: E731
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def call_dpo(own, settings):
    """The call of preference_loss that must give TRL's numbers; own: parameters that are not the pairs'."""
    values, grad_w, grad_l = [], [], []
    for i in range(len(PAIRS["logp_w"])):
        pair = {key: torch.tensor([column[i]]) for key, column in PAIRS.items()}
        leaves = [pair["logp_w"].requires_grad_(), pair["logp_l"].requires_grad_()]
        loss = dpo(pair, settings)
        g_w, g_l = torch.autograd.grad(loss, leaves, allow_unused=True)
        values.append(loss.item())
        grad_w.append(g_w.item())
        grad_l.append(g_l.item())
    gradient = {"logp_w": grad_w, "logp_l": grad_l}
    return {"function": "preference_loss", "inputs": PAIRS | own, "value": values, "gradient": gradient}


def write(name, origin, calls):
    found = {"origin": f"trl {trl.__version__}: {origin}", "calls": calls}
    (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(name)


def simple(name, loss_type, betas=(0.1, 1.0), **settings):
    calls = []
    for beta in betas:
        own = {"beta": beta}
        if "label_smoothing" in settings:
            own["label_smoothing"] = settings["label_smoothing"]
        calls.append(call_dpo(own, {"beta": beta, "loss_types": [loss_type], **settings}))
    write(name, f"DPOTrainer._compute_loss, loss_type {loss_type}", calls)


def divergence(name, kind):
    calls = [call_dpo({"beta": 0.5}, {"beta": 0.5, "loss_types": ["sigmoid"], "f_divergence_type": kind})]
    write(name, f"DPOTrainer._compute_loss, loss_type sigmoid, f_divergence_type {kind}", calls)


def wpo():
    """sharp: sums of the log-probs at temperature ½, from which the log of Σ π² follows (variants/wpo.py)."""
    own = {"sharp_w": [-7.0, -9.5, -1.0, -38.0, -8.25], "sharp_l": [-8.5, -9.0, -26.0, -9.0, -6.0]}
    PAIRS.update(own)
    calls = [call_dpo({"beta": 0.1}, {"beta": 0.1, "loss_types": ["sigmoid"], "use_weighting": True})]
    write("wpo", "DPOTrainer._compute_loss, loss_type sigmoid, use_weighting", calls)


def rewards(name, origin, own, settings):
    """RewardTrainer.compute_loss of three pairs; own: inputs of both; settings: of the trainer alone."""
    pairs = {"chosen": [2.0, 0.5, 1.0], "rejected": [0.25, 0.5, 3.0]}
    leaves = {key: torch.tensor(value).requires_grad_() for key, value in pairs.items()}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=ACCELERATOR, _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(**settings),
    )  # fmt: skip
    logits = torch.cat([leaves["chosen"], leaves["rejected"]])[:, None]
    inputs = {key: torch.tensor(value) for key, value in own.items()}
    model = lambda **kwargs: SimpleNamespace(logits=logits)  # noqa: E731
    loss = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    g_chosen, g_rejected = torch.autograd.grad(loss, leaves.values())
    gradient = {"chosen": g_chosen.tolist(), "rejected": g_rejected.tolist()}
    call = {"function": "pairwise_loss", "inputs": pairs | own, "value": loss.item(), "gradient": gradient}
    write(name, origin, [call])


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for name in ("apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard", "discopop"):
        simple(name, name)
    simple("exo_pair", "exo_pair", label_smoothing=0.125)
    divergence("fdpo_js", "js_divergence")
    divergence("fdpo_forward", "forward_kl")
    centre = {"center_rewards_coefficient": 0.01}
    rewards("rm_centre", "RewardTrainer.compute_loss, center_rewards_coefficient 0.01", {}, centre)
    margin = {"margin": [1.0, 0.0, 0.5]}
    rewards("rm_margin", "RewardTrainer.compute_loss, margin", margin, {"center_rewards_coefficient": None})
    simple("dpo_length_norm", "sigmoid_norm", betas=(1.0, 5.0))
    wpo()  # the last: it adds to PAIRS
