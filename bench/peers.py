"""The peers' variants, each in a process of its own (bench/worker.py). Nothing of ours is imported here.

TRL's trainers with their own defaults ("defaults"), or with gradient checkpointing off, which is faster on
models this small ("tuned"); transformers' GPT2LMHeadModel; nanoGPT's model where NANOGPT names its model.py.
All start from the folder that we saved, with its tokenizer.
"""

import importlib.util
import json
import os

import torch

from bench.reward import score
from bench.worker import lengths_of


def run(spec, turn):
    torch.set_num_threads(1)
    bare(spec, turn) if spec["job"] == "bare" else trl(spec, turn)


# ------------------------------------------------------------------------------------------------------------
# the bare model


def bare(spec, turn):
    kind, device = spec["variant"], spec["device"]
    if kind == "nanoGPT":
        model = nanogpt(spec)
    else:
        from transformers import AutoModelForCausalLM

        act = {"activation_function": "gelu_pytorch_tanh"} if kind == "HF, fused GELU" else {}
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, **act)
    model.to(device).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.tensor(spec["tokens"], device=device)
    bf16 = torch.autocast(device, torch.bfloat16, enabled=spec["dtype"] == "bfloat16")
    first = None
    while True:
        opt.zero_grad()
        with bf16:
            if kind == "nanoGPT":
                loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())[1]
            else:
                loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        opt.step()
        first = loss.item() if first is None else first
        turn.done(tokens=tokens.numel(), first_loss=first)


def nanogpt(spec):
    """nanoGPT's GPT with the folder's weights; its own matrices are (out, in), the folder's (in, out)."""
    from safetensors.torch import load_file

    module_spec = importlib.util.spec_from_file_location("nanogpt", os.environ["NANOGPT"])
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    with open(f"{spec['model']}/config.json") as f:
        cfg = json.load(f)
    size = {"n_layer": cfg["n_layer"], "n_head": cfg["n_head"], "n_embd": cfg["n_embd"]}
    size |= {"block_size": cfg["n_positions"], "vocab_size": cfg["vocab_size"]}
    model = module.GPT(module.GPTConfig(**size, dropout=0.0, bias=True))
    theirs, ours = model.state_dict(), load_file(f"{spec['model']}/model.safetensors")
    for name, tensor in ours.items():
        theirs[name].copy_(tensor.T if ".c_" in name and tensor.dim() == 2 else tensor)
    return model


# ------------------------------------------------------------------------------------------------------------
# TRL's trainers


def trl(spec, turn):
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    disable_progress_bars()
    job, out, cpu = spec["job"], spec["out"], spec["device"] == "cpu"
    name = {"sft": "SFT", "rm": "Reward", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}[job]
    with open(spec["data"]) as f:
        data = Dataset.from_list([json.loads(line) for line in f])
    tok = AutoTokenizer.from_pretrained(spec["model"])
    more = {"num_labels": 1} if job == "rm" else {}
    auto = AutoModelForSequenceClassification if job == "rm" else AutoModelForCausalLM
    bf16 = spec["dtype"] == "bfloat16"
    frozen_bf16 = bf16 and "lora_rank" in spec  # what is trained stays fp32
    dtype = torch.bfloat16 if frozen_bf16 else torch.float32
    model = auto.from_pretrained(spec["model"], dtype=dtype, **more)
    args = dict(
        output_dir=out, per_device_train_batch_size=spec["rows"], max_steps=10_000, learning_rate=1e-4,
        bf16=bf16, use_cpu=cpu, report_to="none", save_strategy="no", seed=0, logging_steps=1,
        disable_tqdm=True, gradient_checkpointing=spec["variant"] == "TRL defaults",
    )  # fmt: skip
    kw = dict(model=model, train_dataset=data, processing_class=tok)
    if "lora_rank" in spec:
        from peft import LoraConfig

        rank = spec["lora_rank"]
        kw["peft_config"] = LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    if job == "ppo":
        return ppo(spec, turn, args, tok, model, data)
    if job == "grpo":
        args |= dict(num_generations=spec["group"], max_completion_length=spec["new"], beta=0.0)
        kw["reward_funcs"] = lambda prompts, completions, **_: list(map(score, prompts, completions))
        plan_lengths(model, tok.eos_token_id, spec)
    trainer = getattr(trl, f"{name}Trainer")(args=getattr(trl, f"{name}Config")(**args), **kw)
    compute_loss, seen, first = trainer.compute_loss, {}, {}

    def counted(model, inputs, *rest, **named):
        seen["tokens"] = int(counted_tokens(inputs))
        return compute_loss(model, inputs, *rest, **named)

    class Hook(TrainerCallback):
        def on_step_end(self, *_, **__):
            turn.done(**seen, first=first)

        def on_log(self, *_, logs, **__):
            names = {"loss": "loss", "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected"}
            if not first:
                first.update({ours: logs[name] for name, ours in names.items() if name in logs})

    trainer.compute_loss = counted
    trainer.add_callback(Hook())
    trainer.train()


def ppo(spec, turn, args, tok, model, data):
    """The trainer that TRL 1.9.2 still has; one epoch, one minibatch, responses of full length."""
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    seen = plan_lengths(model, tok.eos_token_id, spec)
    scalar = (AutoModelForSequenceClassification.from_pretrained(spec["rm"], num_labels=1) for _ in "rv")
    reward_model, value_model = scalar
    ref_model = type(model).from_pretrained(spec["model"], dtype=torch.float32)
    args.pop("max_steps")
    args |= dict(num_ppo_epochs=1, num_mini_batches=1, response_length=spec["new"], temperature=1.0,
                 total_episodes=10_000 * spec["rows"], num_sample_generations=0)  # fmt: skip
    data = data.map(lambda row: {"input_ids": tok(row["prompt"]).input_ids}, remove_columns=["prompt"])

    class Hook(TrainerCallback):
        def on_step_end(self, *_, **__):
            turn.done(**seen)

    PPOTrainer(args=PPOConfig(**args), processing_class=tok, model=model, ref_model=ref_model,
               reward_model=reward_model, value_model=value_model, train_dataset=data, eval_dataset=data,
               callbacks=[Hook()]).train()  # fmt: skip


def counted_tokens(inputs):
    """The tokens that a step's figures count: of the loss; of the whole sequences for a reward model."""
    if "completion_mask" in inputs:
        return inputs["completion_mask"].sum()
    return (inputs["labels"] != -100).sum() if "labels" in inputs else inputs["attention_mask"].sum()


def plan_lengths(model, eos_id, spec):
    """Let every rollout end at the planned lengths: a logits processor allows EOS there and nowhere else.

    → {"tokens": those of the last rollout}, filled as it goes.
    """
    generate, plan, steps, seen = model.generate, spec["lengths"], iter(range(1 << 30)), {}

    class Planned:
        def __init__(self, prompt):
            self.prompt, self.ends = prompt, torch.tensor(lengths_of(plan, next(steps)))

        def __call__(self, ids, scores):
            ends = (self.ends == ids.shape[1] - self.prompt + 1).nonzero()[:, 0].to(scores.device)
            scores[:, eos_id] = -torch.inf
            scores[ends] = -torch.inf
            scores[ends, eos_id] = 0.0
            return scores

    def planned(**inputs):
        seen["tokens"] = sum(min(length, spec["new"]) for length in plan)
        return generate(**inputs, logits_processor=[Planned(inputs["input_ids"].shape[1])])

    model.generate = planned
    return seen
