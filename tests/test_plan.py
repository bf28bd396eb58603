"""--dry_run: its figures against real tensors and what autograd keeps."""

import importlib
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import STYLES, V, randint, tiny
from stages import TRAINERS
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import hub, lora
from nanorlhf.data import epoch_batches, microbatches, pad
from nanorlhf.errors import derive_seed
from nanorlhf.hub import tokenizer_files
from nanorlhf.kernels import bf16, slots
from nanorlhf.run import plan, worker
from nanorlhf.run.cli import parse
from nanorlhf.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
FAMILIES = ("gpt2", "llama-gqa-untied", "qwen2", "qwen3", "pythia")
BF16 = torch.bfloat16


def without_weights(folder):
    """The folder's model on the meta device."""
    return hub.load(folder, weights=False)[0]


@pytest.mark.parametrize("style", FAMILIES)
def test_parameters_weights_and_optimizer_are_those_of_the_real_tensors(style, tmp_path):
    """From config.json alone; then one real AdamW step, whose gradients and moments are weighed."""
    hub.save(tiny(style), None, tmp_path)
    for rank in (0, 2):
        real = hub.load(tmp_path)[0]
        (tmp_path / "model.safetensors").rename(tmp_path / "away")
        meta = without_weights(tmp_path)
        (tmp_path / "away").rename(tmp_path / "model.safetensors")
        models = []
        for model in (real, meta):
            ref = lora.add(model, rank, "bfloat16")
            models.append([model, ref or model])
        shapes = [{k: (p.shape, p.dtype) for k, p in m.state_dict().items()} for m, _ in models]
        assert shapes[0] == shapes[1] and next(meta.parameters()).is_meta
        storages = {p.data_ptr(): p.nbytes for m in models[0] for p in m.parameters()}
        assert plan.n_bytes(models[1]) == sum(storages.values())
        opt = torch.optim.AdamW(real.parameters())
        real.logprobs(randint(V, 2, 6), torch.arange(6).expand(2, 6) > 1)[0].sum().backward()
        opt.step()
        moments = [x.nbytes for s in opt.state.values() for name, x in s.items() if name != "step"]
        gradients = [p.grad.nbytes for p in real.parameters() if p.grad is not None]
        assert plan.trained_bytes([meta]) == sum(gradients) and 2 * sum(gradients) == sum(moments)


def kept(model, x, mask):
    """Bytes of all storages that autograd keeps for the backward pass, weights aside."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), t  # alive, or its address would serve twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.logprobs(x, mask)  # noqa: F841  (the graph must live)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("style", STYLES)
def test_activations_are_what_autograd_keeps(style, rank, dtype):
    """Another layer costs that much, to 3%; the whole model at most what is said, and nearly that."""
    x, found = randint(V, 4, 201), []
    mask = torch.arange(201).expand(4, 201) > 0
    for layers in (2, 3):
        model = tiny(style, n_layer=layers, d_model=128, d_ff=192, max_len=201)
        lora.add(model, rank, "bfloat16" if dtype else None)
        model.compute_dtype = dtype
        found.append(kept(model, x, mask))
    per_token, once = plan.layer_bytes(model)
    assert found[1] - found[0] == pytest.approx(800 * per_token + once, rel=0.03)
    said = plan.activation_bytes(model, 800)
    assert 0.85 * said < found[1] < 1.06 * said  # here, tables of positions are large


def test_checkpointed_blocks_keep_their_input():
    """Another layer costs its input: inside it, nothing is kept for the backward pass."""
    x, mask = randint(V, 3, 13), torch.arange(13).expand(3, 13) > 4
    found, planned = [], []
    for layers in (2, 3):
        model = tiny(n_layer=layers)
        model.recompute = True
        found.append(kept(model, x, mask))
        planned.append(plan.activation_bytes(model, 36))
    assert found[1] - found[0] == planned[1] - planned[0] == 36 * 4 * model.cfg.d_model


def test_a_tile_of_logits_is_the_kernels():
    backend = pytest.importorskip("nanorlhf.kernels.triton_backend")
    assert (plan.TILES, plan.STORED) == (backend.TILE_BYTES, backend.STORED_BYTES)


def test_the_largest_micro_batch_is_that_of_training():
    """Of the very batches that a run draws: 6 steps of 4 rows, cut at 40 tokens."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(50)]
    cfg = SimpleNamespace(seed=3, steps=6, tokens_per_microbatch=40)
    sizes, cuts = [], []
    for step in range(6):
        rows = epoch_batches(50, 4, derive_seed(3, "data"), step)
        cuts.append(microbatches([lengths[i] for i in rows], 40))
        for part in cuts[-1]:
            tokens, _ = pad([[0] * lengths[rows[i]] for i in part], 0)
            sizes.append(tokens.numel())
    assert plan._microbatch(cfg, lengths, 4) == (max(sizes), max(map(len, cuts))) and max(sizes) < 40
    assert plan._microbatch(cfg, [7] * 50, 4, repeats=3) == (35, 3)  # of 12 rows 5, 5 and 2


def test_gradients_take_the_place_of_activations_in_a_step_of_one_micro_batch():
    """All weights are trained: with two micro-batches the gradients of the first lie beside the second."""
    cfg, model = SimpleNamespace(device="cpu"), tiny()
    several, one = (plan.update_parts(cfg, [model], 400, n)["activations"] for n in (2, 1))
    assert several == plan.activation_bytes(model, 400) and one == several - plan.trained_bytes([model]) > 0
    assert plan.update_parts(cfg, [model], 1, 1)["activations"] == 0


def test_weights_that_are_cast_once_are_counted_in_scoring_and_sampling():
    """As cast_once makes them: bf16 copies; on a CPU not of the unembedding."""
    cfg, model = SimpleNamespace(device="cpu"), tiny()
    for dtype in (None, BF16):
        model.compute_dtype = dtype
        with bf16.cast_once(model):
            layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
            made = sum(vars(layer)["weight"].nbytes for layer in layers if "weight" in vars(layer))
        assert (made > 0) == (dtype is BF16)
        assert plan.forward_parts(cfg, model, 9)["weights cast once"] == made
        sampled = plan.sampling_parts(model, 3, 9, 5, on_gpu=False)
        assert sampled["weights cast once"] == made


def test_weights_that_are_cast_stay_beside_the_gradients():
    """In a step of one micro-batch gradients take the place of activations: a bf16 copy is none of these."""
    cfg, model = SimpleNamespace(device="cpu"), tiny()
    model.compute_dtype = BF16
    with bf16.cast_once(model):
        layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
        copies = sum(vars(layer)["weight"].nbytes for layer in layers if "weight" in vars(layer))
    assert copies and plan.update_parts(cfg, [model], 1, 1)["activations"] == copies


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("style", ["llama-gqa-untied", "qwen3"])
def test_operations_are_those_that_torch_counts(style, rank):
    """FlopCounterMode counts attention's own products too: few here. The last token has no target."""
    model = tiny(style, n_layer=3, d_model=64, d_ff=96, vocab_size=50)
    lora.add(model, rank)
    tokens = randint(50, 8, 17)
    mask = torch.arange(17).expand(8, 17) > 8
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.logprobs(tokens, mask)
    said = plan.pass_flops(model, 8 * 16, 8 * 8)
    assert said == pytest.approx(forward.get_total_flops(), rel=0.06)
    with FlopCounterMode(display=False) as both:
        logp, _ = model.logprobs(tokens, mask)
        logp.sum().backward()
    assert plan.update_flops(model, 8 * 16, 8 * 8) == pytest.approx(both.get_total_flops(), rel=0.12)


# the command line


def dry_run(monkeypatch, capsys, trainer, *argv):
    """→ status, stdout, stderr of `python train_x.py --dry_run ...`"""
    monkeypatch.setattr(sys, "argv", [f"{trainer}.py", *argv, "--dry_run"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{trainer}.py"), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def as_flags(flags):
    return [x for name, value in flags.items() for x in (f"--{name}", str(value))]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.__name__)
def test_every_trainer_plans_without_weights_and_writes_nothing(trainer, rank, stages, tmp_path, monkeypatch,
                                                                capsys):  # fmt: skip
    for name in ("sft", "rm"):
        shutil.copytree(stages.folder / name / "model", tmp_path / name / "model")
        (tmp_path / name / "model" / "model.safetensors").unlink()
    flags = stages.flags(trainer, tmp_path / "out", lora_rank=rank)
    if rank:  # a new model of SFT has no weights that adapters could belong to
        flags.setdefault("init", f"{stages.folder}/sft/model")
    for name in ("init", "rm"):
        if name in flags:
            flags[name] = flags[name].replace(str(stages.folder), str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = dry_run(monkeypatch, capsys, trainer.__name__, *as_flags(flags))
    assert (status, err) == (0, "") and sorted(tmp_path.rglob("*")) == before
    assert max(map(len, out[out.index("dry run") :].splitlines())) <= 80
    figures = dict(re.findall(r"^  (\S.*?) {2,}([\d.]+)(?:  |$)", out, re.M))
    assert float(figures["at most"]) >= 0.2 and "optimizer (AdamW's two moments)" in figures
    assert "frozen" in out or "own" in out or "trained" in out
    assert "GPU" not in out and "CUDA" not in out and "memory of this machine's CPU, GiB" in out
    rates = re.findall(r"^  (\w[\w ]*?) +[\d.]+ TFLOP +[\d,.]+ GFLOP/s +[\d.]+ s$", out, re.M)
    samples = trainer.__name__ in ("train_ppo", "train_grpo", "train_distill")
    assert rates[-1] == "update" and ("sampling" in rates) == samples
    assert re.search(r"^  a step .* s; 6 steps .* minutes$", out, re.M)


def test_a_dry_run_finds_what_is_wrong_with_the_data(stages, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "abc=", "response": "cba"}\n{"prompt": 3, "response": ""}\n')
    status, _, err = dry_run(monkeypatch, capsys, "train_sft", "--data", str(bad), "--out", f"{tmp_path}/out")
    assert status == 2 and f"{bad}:2" in err and err.count("\n") == 1


QWEN = dict(  # Qwen2.5-1.5B, as published
    hidden_act="silu", hidden_size=1536, intermediate_size=8960, max_position_embeddings=131072,
    model_type="qwen2", num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2,
    rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip


def qwen(folder, head):
    folder.mkdir()
    files = tokenizer_files.files(Tokenizer.from_bytes()) | {
        "config.json": json.dumps(QWEN | {"architectures": [f"Qwen2For{head}"]}).encode()
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def prompts(folder):
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"{i:0400}"} for i in range(300)]  # 400 tokens each: the tokenizer here is bytes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ppo_with_adapters_on_a_model_of_1_5_billion_fits_24_gib(tmp_path, monkeypatch, capsys):
    """Policy, critic and a reward model of that size; without adapters it does not."""
    path = prompts(tmp_path)
    models = qwen(tmp_path / "lm", "CausalLM"), qwen(tmp_path / "rm", "SequenceClassification")
    flags = f"--init {models[0]} --rm {models[1]} --data {path} --dtype bfloat16 --prompts_per_step 64"
    flags += " --device cuda --tokens_per_microbatch 1024"
    flags = [*flags.split(), "--max_new_tokens", "256", "--eval_prompts", "64"]
    size = {}
    for rank in (0, 16):
        status, out, _ = dry_run(monkeypatch, capsys, "train_ppo", *flags, "--lora_rank", str(rank))
        size[rank] = float(re.search(r"^  at most +([\d.]+)", out, re.M)[1])
        assert status == 0 and "1,543,714,304 parameters" in out  # as Qwen states it: 1.54 billion
    assert size[16] < 24 < 48 < size[0]


def test_the_plan_samples_as_many_rows_at_once_as_the_sampler_does(tmp_path, monkeypatch, capsys):
    """512 answers: of 2,048 tokens 256 fit a large GPU at once, of 16,384 fewer fit any; so says how_many.

    GPUs are named up to the smallest that samples all 256; the figures are those of the last.
    """
    folder = qwen(tmp_path / "lm", "CausalLM")
    flags = f"--init {folder} --data {prompts(tmp_path)} --dtype bfloat16 --kl none --device cuda"
    flags += " --lora_rank 0"
    flags += f" --reward {ROOT}/nanorlhf/answers.py:think_format --prompts_per_step 32 --group_size 16"
    model = without_weights(folder)
    model.compute_dtype = BF16
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    for new, most in ((2048, 256), (16384, 128)):
        more = f"{flags} --save_memory --max_new_tokens {new}".split()
        status, out, err = dry_run(monkeypatch, capsys, "train_grpo", *more)
        figures = {name: float(x) for name, x in re.findall(r"^  (\S.*?) {2,}([\d.]+)(?:  |$)", out, re.M)}
        held = "weights", "gradients", "optimizer (AdamW's two moments)", "CUDA's own, about"
        taken = sum(figures[name] for name in held)
        fits = re.findall(r"fits a GPU of (\d+) GiB(?:, sampling (\d+) of 256 rows at once)?", out)
        assert (status, err) == (0, "") and len(fits) >= 2 and figures["at most"] <= float(fits[-1][0])
        for gpu, rows in fits:
            free = int((float(gpu) - taken) * plan.GIB)
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
            assert abs(int(rows or 256) - slots.how_many(model, 512, 400 + new)) <= 1  # figures are rounded
        rows = int(fits[-1][1] or 256)
        assert (rows == 256) == (most == 256) and rows <= most
        cache = model.new_cache(rows, 400 + new).kv.nbytes / plan.GIB  # of the meta device
        assert abs(figures["sampling: KV cache"] - cache) < 0.01




# recipes


RECIPES = [("nplus_tldr", {"SIZE": size}, ["sft", "rm", "ppo"]) for size in ("1b", "2.8b", "6.9b")]
RECIPES += [("deepscaler", {}, ["grpo"] * 3), ("dpo_ultrafeedback", {}, ["sft", "dpo"])]
RECIPES += [("r1_zero_gsm8k", {"SIZE": size}, ["grpo"]) for size in ("0.5B", "1.5B")]
RECIPES += [("phoenix_german", {}, ["sft", "dpo"])]


@pytest.mark.skipif(not shutil.which("bash"), reason="recipes are bash scripts")
@pytest.mark.parametrize("recipe, env, stages", RECIPES)
def test_every_command_of_a_recipe_parses_and_goes_on_from_the_one_before(recipe, env, stages, tmp_path):
    """The script is run, with a `python` that writes down what it is asked."""
    script = ROOT / "recipes" / f"{recipe}.sh"
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\t" "$@" >> argv\necho >> argv\n')
    fake.chmod(0o755)
    env = os.environ | env | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command, how = ["bash", script, "--seed", "7"], dict(capture_output=True, text=True)
    run = subprocess.run(command, cwd=tmp_path, env=env, **how)
    assert run.returncode == 0 and re.fullmatch(rf"{recipe}, after .* [(].*\d{{4}}.*[)]: .*\n", run.stdout)
    shown = re.findall(r"^\+ python (train_\w+)\.py (.*)$", run.stderr, re.M)
    assert [name for name, _ in shown] == [f"train_{stage}" for stage in stages]
    assert all("$" not in flags for _, flags in shown)
    lines = [line.rstrip("\t").split("\t") for line in (tmp_path / "argv").read_text().splitlines()]
    commands = [line for line in lines if line[0] != "-"]
    assert [name for name, *_ in commands] == [f"train_{stage}.py" for stage in stages]
    made = {"models"}
    for (_, *argv), stage in zip(commands, stages):
        cfg = parse(importlib.import_module(f"train_{stage}").Config, argv)
        assert cfg.seed == 7 and cfg.dtype == "bfloat16"
        for folder in filter(None, (cfg.init, getattr(cfg, "rm", ""))):
            assert folder in made or folder.startswith("models/")
        for spec in getattr(cfg, "reward", []):
            assert (ROOT / spec.partition(":")[0]).exists() and worker.load_reward(str(ROOT / spec))
        made.add(f"{cfg.out}/model")


def test_all_recipes_are_run_above():
    scripts = {path.stem for path in (ROOT / "recipes").glob("*.sh")}
    in_test_recipes = {"smollm2_cpu", "smollm2_all"}
    assert scripts - in_test_recipes == {name for name, *_ in RECIPES} and in_test_recipes < scripts
