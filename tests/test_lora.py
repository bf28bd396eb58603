"""LoRA: against the merged weights, the chain rule on whole gradients, and the base that must rest."""

import csv
import shutil

import pytest
import torch
from helpers import STYLES, V, randint, tiny
from runs import state
from stages import TRAINERS

import train_grpo
import train_ppo
import train_sft
from nanorlhf import hub, lora
from nanorlhf.errors import UserError
from nanorlhf.model import ScalarModel

F64 = torch.float64
TOKENS = randint(V, 3, 9)
MASK = torch.arange(9).expand(3, 9) > 2


def adapted(style="qwen3", rank=3, dtype=F64):
    """A model with adapters that are not at their start → model, its frozen self."""
    model = tiny(style, dtype=dtype)
    frozen = lora.add(model, rank)
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data = 0.02 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return model, frozen


@pytest.mark.parametrize("style", STYLES)
def test_starts_as_the_base_and_merges_into_one(style, tmp_path):
    """B = 0 changes nothing, to the bit; otherwise plain layers with W + α/r·BA say the same, saved too."""
    base = tiny(style, dtype=F64).logits(TOKENS)
    model = tiny(style, dtype=F64)
    frozen = lora.add(model, 3)
    assert torch.equal(model.logits(TOKENS), base) and torch.equal(frozen.logits(TOKENS), base)
    model, frozen = adapted(style)
    want = model.logits(TOKENS)
    assert torch.equal(frozen.logits(TOKENS), base) and (want - base).abs().max() > 1e-2
    plain = tiny(style, dtype=F64)
    for name, p in plain.named_parameters():
        layer = dict(model.named_modules())[name.rpartition(".")[0]]
        if name.endswith("weight") and hasattr(layer, "A"):
            p.data += 32 / 3 * torch.einsum("or,ri->oi", layer.B.data, layer.A.data)
    assert (plain.logits(TOKENS) - want).abs().max() < 1e-12
    weights = lora.merged_weights(model)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    assert (plain.logits(TOKENS) - want).abs().max() < 1e-12
    assert torch.equal(model.logits(TOKENS), want)  # merging leaves the adapters where they are
    hub.save(model, None, tmp_path / "m")
    assert (hub.load(tmp_path / "m")[0].logits(TOKENS) - want).abs().max() < 2e-5 * want.abs().max()


def test_every_linear_layer_and_nothing_else_is_trained():
    model, frozen = adapted("llama-bias")
    layers = "attn.q attn.k attn.v attn.o mlp.up mlp.down mlp.gate".split()
    want = {f"blocks.{i}.{layer}.{x}" for i in range(2) for layer in layers for x in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    assert not any(p.requires_grad for p in frozen.parameters())
    critic = ScalarModel(tiny("llama-bias"))
    lora.add(critic, 2)
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert trained == {f"trunk.{name}" for name in want} | {"score.weight"}


def test_the_gradient_is_the_whole_gradient_seen_through_the_other_factor():
    """∂L/∂B = α/r·(∂L/∂W) Aᵀ and ∂L/∂A = α/r·Bᵀ(∂L/∂W), with ∂L/∂W from the merged model."""
    model, _ = adapted("qwen2")
    model.logprobs(TOKENS, MASK)[0].sum().backward()
    whole = tiny("qwen2", dtype=F64)
    whole.load_state_dict(lora.merged_weights(model))
    whole.logprobs(TOKENS, MASK)[0].sum().backward()
    for name, layer in whole.named_modules():
        if name.startswith("blocks") and type(layer) is lora.Linear:
            mine = model.get_submodule(name)
            assert (mine.B.grad - 32 / 3 * layer.weight.grad @ mine.A.T).abs().max() < 1e-10, name
            assert (mine.A.grad - 32 / 3 * mine.B.T @ layer.weight.grad).abs().max() < 1e-10, name


def test_the_reference_costs_nothing_and_never_moves():
    """It shares every tensor with the model, before and after a step that moves the model."""
    model, frozen = adapted(dtype=torch.float32)
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in frozen.parameters())
    before, mine = frozen.logits(TOKENS), model.logits(TOKENS)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.logprobs(TOKENS, MASK)[0].sum().backward()
    opt.step()
    assert torch.equal(frozen.logits(TOKENS), before) and (model.logits(TOKENS) - mine).abs().max() > 0.1
    assert len(opt.state) == 28  # moments of A and B of 7 layers in 2 blocks, of nothing else
    model.to(F64)
    assert frozen.wte.weight is model.wte.weight  # moved together, or it would be a second copy


def test_exact_kl_to_the_frozen_self():
    """The adapters' gradient of the exact KL is that of all logits, and the frozen base has none."""
    model, frozen = adapted()
    *_, kl = model.logprobs(TOKENS, MASK, kl_to=frozen)
    kl.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    p, q = (m.logits(TOKENS[:, :-1]).log_softmax(-1) for m in (model, frozen))
    want = ((p.exp() * (p - q.detach())).sum(-1) * MASK[:, 1:]).sum()
    want.backward()
    assert kl.sum().item() == pytest.approx(want.item(), abs=1e-12) and want > 1e-3
    for name, param in trained.items():
        assert (got[name] - param.grad).abs().max() < 1e-12, name
    assert all(p.grad is None for p in frozen.parameters())


def test_frozen_matrices_in_bf16():
    """With activations in bf16 it makes no difference to the bit, forward and backward."""
    found = []
    for dtype in (None, "bfloat16"):
        model = tiny("llama-bias")
        model.compute_dtype = torch.bfloat16
        torch.manual_seed(0)
        frozen = lora.add(model, 2, dtype)
        for name, p in model.named_parameters():
            p.data += 0.1 * name.endswith(".B")
        logp, _ = model.logprobs(TOKENS, MASK)
        logp.sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
        found.append((logp, frozen.logprobs(TOKENS, MASK)[0], *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    matrices = [p for name, p in frozen.named_parameters() if "blocks" in name and p.dim() == 2]
    assert all(p.dtype == torch.bfloat16 for p in matrices)
    assert all(p.grad is None for p in frozen.parameters())
    assert model.blocks[0].attn.q.A.dtype == frozen.wte.weight.dtype == torch.float32


def test_a_base_in_bf16(tmp_path):
    """Adapters stay in fp32 on a base in bf16; what is saved is the sum, rounded once."""
    hub.save(tiny("qwen3"), None, tmp_path / "m")
    torch.set_default_dtype(torch.bfloat16)
    model = hub.load(tmp_path / "m")[0]
    torch.set_default_dtype(torch.float32)
    lora.add(model, 2)
    layer = model.blocks[0].mlp.up
    layer.B.data.normal_(std=0.1)
    assert layer.A.dtype == layer.B.dtype == torch.float32 and model(TOKENS).dtype == torch.bfloat16
    hub.save(model, None, tmp_path / "m")
    again = hub.load(tmp_path / "m")[0]
    want = (layer.weight.double() + 16 * layer.B.double() @ layer.A.double()).bfloat16()
    off = (again.blocks[0].mlp.up.weight - want.float()).abs() / want.float().abs()
    assert off.max() < 2**-7 and (off == 0).float().mean() > 0.95  # fp32 sums may fall on the other side


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)
def test_every_trainer(trainer, stages, tmp_path, no_curves):
    """The saved model differs from --init in its linear layers alone; a resumed run is the same run."""
    out, init = tmp_path / "run", f"{stages.folder}/sft/model"
    how = stages.flags(trainer, out, lora_rank=2, init=init)
    trainer.train(trainer.Config(**how))
    found = {name: hub.load(out / name)[0] for name in ("model", "critic") if (out / name).is_dir()}
    for name, model in found.items():
        shutil.rmtree(out / name)
        source = f"{stages.folder}/rm/model" if name == "critic" else init
        start = dict(hub.load(source)[0].named_parameters())
        for key, p in model.named_parameters():
            linear = "blocks" in key and key.endswith("weight") and "norm" not in key
            at = key if key in start else key.removeprefix("trunk.")
            assert key == "score.weight" or torch.equal(p, start[at]) != linear, (name, key)
    shutil.rmtree(out / "state/step-000006")
    trainer.train(trainer.Config(**how, resume=True))
    for name, model in found.items():
        again = hub.load(out / name)[0].parameters()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again, strict=True))


def copied(stages, tmp_path, name):
    shutil.copytree(stages.folder / name / "model", tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("trainer", [train_grpo, train_ppo], ids=lambda t: t.__name__)
def test_a_checkpoint_holds_adapters_and_no_base(trainer, stages, tmp_path, no_curves):
    """Nor do the older weights of GRPO's sampler. A ScalarModel's head, and its bias, are trained."""
    cfg = stages.config(trainer, tmp_path / "run", lora_rank=2)
    trainer.train(cfg)
    saved = state(tmp_path / "run")
    weights = list(saved["models"].values()) + saved["extra"].get("past", [])
    assert len(weights) == (2 if trainer is train_ppo else 3)
    names = {name for tensors in weights for name in tensors}
    assert {name for name in names if not name.endswith((".A", ".B"))} <= {"score.weight", "reward_bias"}
    base, _ = hub.load(cfg.init)
    assert len([name for name in weights[0] if name.endswith(".A")]) == sum(
        p.dim() == 2 for name, p in base.named_parameters() if "blocks" in name
    )
    flags = [flag for flag, *_ in saved["base"].values()]
    assert flags == (["--init", "--critic_init"] if trainer is train_ppo else ["--init"])


@pytest.mark.parametrize("flag, name", [("init", "sft"), ("critic_init", "rm")])
def test_row_65_base_of_adapters(flag, name, stages, tmp_path, no_curves):
    """R | --resume of adapters whose base has one other weight, or is gone | refused, with the flag, both
    sha256 and the folder that it was; a base that was moved is taken
    """
    flags = stages.flags(train_ppo, tmp_path / "run", lora_rank=2, steps=2)
    flags[flag] = copied(stages, tmp_path, name)
    train_ppo.train(train_ppo.Config(**flags))
    flags |= dict(steps=3, resume=True)
    (tmp_path / name).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"^--{flag} {flags[flag]} does not exist"):
        train_ppo.train(train_ppo.Config(**flags))
    train_ppo.train(train_ppo.Config(**flags | {flag: f"{tmp_path}/moved"}))
    model, tok = hub.load(tmp_path / "moved")
    model.trunk.blocks[0].attn.q.weight.data[0, 0] += 1e-4
    hub.save(model, tok, tmp_path / "moved")
    says = rf"--resume: --{flag} \S*moved is not the base that the adapters in .* belong to \(.*sha256"
    with pytest.raises(UserError, match=says):
        train_ppo.train(train_ppo.Config(**flags | {flag: f"{tmp_path}/moved", "steps": 4}))


def test_a_base_within_the_run_folder_would_be_overwritten(stages, tmp_path):
    init = copied(stages, tmp_path / "run", "sft")
    for rank in (2, 0):
        cfg = stages.config(train_sft, tmp_path / "run", init=init, lora_rank=rank, steps=1)
        if rank:
            with pytest.raises(UserError, match=f"^--init {init}: lies in --out {tmp_path}/run, where"):
                train_sft.train(cfg)
        else:
            train_sft.train(cfg)


def test_the_reference_of_a_run_is_the_frozen_base(stages, tmp_path, no_curves, spy):
    """With --ref left at --init nothing more is held; KL starts at 0 and does not stay there."""
    models = spy(train_grpo, "load_models")
    how = dict(lora_rank=2, kl="k3", beta=0.1, off_policy_steps=0, lr=0.05, eval_every=0)
    cfg = stages.config(train_grpo, tmp_path / "run", **how)
    train_grpo.train(cfg)
    policy, ref = models[0][1][:2]
    assert all(p.data_ptr() == dict(policy.named_parameters())[name].data_ptr()
               for name, p in ref.named_parameters())  # fmt: skip
    kl = [float(row["kl"]) for row in csv.DictReader(open(tmp_path / "run/metrics.csv"))]
    assert abs(kl[0]) < 1e-6 and abs(kl[-1]) > 1e-4
    init = hub.load(cfg.init)[0]
    assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), init.parameters()))
    other = stages.config(train_grpo, tmp_path / "other", **how, ref_every=2)  # it moves
    train_grpo.train(other)
    policy, ref = models[1][1][:2]
    assert ref.wte.weight is not policy.wte.weight
    moved = lora.merged_weights(policy)
    assert (ref.blocks[0].attn.q.weight != init.blocks[0].attn.q.weight).any()
    assert all(p.shape == moved[name].shape for name, p in ref.named_parameters())


def test_bf16_weights_are_refused():
    """Adapters are trained in fp32; the flag's other meaning would end in a traceback."""
    model = tiny()
    with pytest.raises(UserError, match="--dtype bf16_weights"):
        lora.add(model, 2, "bf16_weights")
    assert all(p.requires_grad for p in model.parameters())


def test_what_an_adapter_reads_has_the_size_of_its_input():
    """A x of an x with entries of size 1 has entries of size 1, however wide the layer is."""
    torch.manual_seed(0)
    for d_model in (16, 64):
        model = tiny(d_model=d_model)
        lora.add(model, 8)
        down = [p for name, p in model.named_parameters() if name.endswith(".A")]
        squares = torch.cat([p.square().sum(1) for p in down])
        assert len(squares) > 50 and 0.8 < squares.mean() < 1.2


def test_a_new_model_has_no_adapters():
    """They would belong to weights that no file holds: --resume with another --seed would draw others."""
    with pytest.raises(UserError, match="--lora_rank: adapters belong to a model; give --init"):
        train_sft.Config(lora_rank=2)
