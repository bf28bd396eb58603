"""The flags that spend time or precision to save memory: what they may change, and what they must not."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import STYLES, V, randint, tiny

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from nanorlhf import hub, lora
from nanorlhf.model import ScalarModel
from nanorlhf.run import device

CPU = torch.device("cpu")
X, MASK = randint(V, 3, 9), torch.arange(9).expand(3, 9) > 2


def flags(**given):
    plain = dict(dtype="float32", device="cpu", threads=1, save_memory=False, shard=False)
    return SimpleNamespace(**plain | given)


def gradients_of(model):
    """Gradients of a loss of both heads, and how many numbers were kept for the backward pass."""
    model.zero_grad()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        logp, entropy = model.logprobs(X, MASK)
        loss = (logp.sin() + 0.1 * entropy).sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], sum(kept)


@pytest.mark.parametrize("style", STYLES)
def test_checkpointing_keeps_less_and_changes_no_bit(style):
    model = tiny(style, n_layer=4)
    want, all_kept = gradients_of(model)
    device.to_device(flags(save_memory=True), CPU, model)
    got, kept = gradients_of(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kept < 0.5 * all_kept


@pytest.mark.parametrize("trainer", [train_sft, train_rm, train_ppo, train_grpo, train_dpo, train_distill])
def test_checkpointing_reaches_every_trainer(trainer, stages, tmp_path, no_curves):
    """Blocks run once more for each micro-batch, and the weights come out the same."""
    weights, calls = [], []
    for again in (False, True):
        out = tmp_path / str(again)
        with mock.patch("nanorlhf.model.checkpoint", wraps=torch.utils.checkpoint.checkpoint) as spy:
            trainer.train(stages.config(trainer, out, steps=2, save_memory=again))
        weights.append(hub.load(f"{out}/model")[0].state_dict())
        calls.append(spy.call_count)
    assert calls[0] == 0 < calls[1]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_bfloat16_is_for_frozen_matrices_alone():
    """Not for the policy, norms and biases, a reward model's head, nor for what LoRA shares."""
    policy, ref, rm = tiny("pythia"), tiny("llama", seed=1), ScalarModel(tiny("qwen3", seed=2))
    device.freeze(flags(dtype="bfloat16"), ref, rm, None, trained=(policy,))
    assert {p.dtype for p in policy.parameters()} == {rm.score.weight.dtype} == {torch.float32}
    for model in (ref, rm.trunk):
        for name, p in model.named_parameters():
            is_head = model is ref and name == "wte.weight"  # tied; a CPU reads it in fp32
            assert p.dtype == (torch.bfloat16 if p.dim() > 1 and not is_head else torch.float32)
    plain, adapted = tiny(), tiny()
    shared = lora.add(adapted, 2)
    device.freeze(flags(), plain, trained=())
    device.freeze(flags(dtype="bfloat16", save_memory=True), shared, trained=(adapted,))
    assert all(p.dtype == torch.float32 for model in (plain, shared) for p in model.parameters())
    assert not hasattr(shared, "home")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scalar", [False, True])
def test_with_bf16_activations_frozen_bf16_weights_change_nothing(style, scalar):
    """A weight is cast to the activations' dtype at its use anyhow; learned positions are added before."""
    ref = tiny(style)
    model = ScalarModel(ref) if scalar else ref
    device.to_device(flags(dtype="bfloat16"), CPU, model)
    want = [model.values(X, MASK)] if scalar else model.logprobs(X, MASK)
    device.freeze(flags(dtype="bfloat16"), model, trained=())
    got = [model.values(X, MASK)] if scalar else model.logprobs(X, MASK)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("trainer", [train_ppo, train_grpo, train_dpo, train_distill])
def test_frozen_bfloat16_reaches_the_trainers(trainer, stages, tmp_path, no_curves, spy):
    """The policy's weights stay in fp32, and KL is 0 at the start."""
    frozen = spy(trainer, "freeze")
    kl = dict(kl="k3", beta=0.1) if trainer is train_grpo else {}
    flags = dict(steps=1, lr=1e-9, dtype="bfloat16", save_every=0) | kl
    trainer.train(stages.config(trainer, tmp_path / "run", **flags))
    (_, ref, *_), _ = frozen[0]
    assert ref.blocks[0].attn.o.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in hub.load(f"{tmp_path}/run/model")[0].parameters())


@pytest.mark.parametrize("kl", ["exact", "estimated"])
@pytest.mark.parametrize("trainer", [train_ppo, train_grpo, train_dpo, train_distill])
def test_offloaded_models_are_at_work_when_they_are_used(
    trainer, kl, stages, tmp_path, no_curves, monkeypatch
):
    """A device that is none: each frozen model must be there in every forward pass, and away at the end."""
    seen, freeze = [], device.freeze

    def pretend(cfg, *models, trained):
        for model in filter(None, models):
            model.home, model.where = "device", "cpu"
            model.to = lambda where, m=model: setattr(m, "where", where)
            trunk = getattr(model, "trunk", model)
            trunk.register_forward_pre_hook(lambda *_, m=model: seen.append((m, m.where)))

    monkeypatch.setattr(trainer, "freeze", pretend)
    online = dict(online=2, pairs=16, rm=f"{stages.folder}/rm/model") if trainer is train_dpo else {}
    flags = {}
    if kl == "exact":
        if trainer in (train_dpo, train_distill):
            pytest.skip("has no such flag")
        flags = dict(kl="exact", beta=0.1)
    elif trainer is train_grpo:
        flags = dict(kl="k3", beta=0.1)
    trainer.train(stages.config(trainer, tmp_path / "run", steps=2, **online, **flags))
    frozen = {model for model, _ in seen}
    assert len(frozen) == (1 if trainer is train_distill else 2), "the teacher; reference and reward model"
    assert {where for _, where in seen} == {"device"} and {model.where for model, _ in seen} == {"cpu"}
    assert device.freeze is freeze


def test_on_the_cpu_frozen_models_stay_where_they_are():
    ref = tiny()
    device.freeze(flags(save_memory=True), ref, trained=())
    with device.at_work(ref), device.at_work(None):
        assert ref.device == CPU and not hasattr(ref, "home")
