"""Defaults that belong to the size of a model or to the user's data, where those of a toy task are wrong."""

import contextlib
import math

from nanorlhf.errors import UserError, require
from nanorlhf.hub import weights
from nanorlhf.hub.folder import find
from nanorlhf.kernels import bf16
from nanorlhf.run.device import LARGE, device_of

RANK = 16  # of the adapters of a real model; --lora_rank 0 trains all of its weights
# trainer → its learning rate for all weights, for adapters, and where the two are from. Adapters learn at
# about ten times the rate: QLoRA's SFT (arXiv 2305.14314) takes 2e-4.
REAL = {
    "sft": (2e-5, 2e-4, "Zephyr, arXiv 2310.16944, and QLoRA, arXiv 2305.14314"),
    "rm": (9e-6, 9e-5, "InstructGPT, arXiv 2203.02155; ten times it for adapters"),
    "prm": (9e-6, 9e-5, "InstructGPT's reward model, arXiv 2203.02155; ten times it for adapters"),
    "ppo": (3e-6, 3e-5, "N+, arXiv 2403.17031; ten times it for adapters"),
    "grpo": (2e-5, 4e-4, "measured on SmolLM2-135M; DeepSeekMath, arXiv 2402.03300, has 1e-6 for 7B"),
    "dpo": (5e-7, 5e-6, "Zephyr, arXiv 2310.16944; ten times it for adapters"),
    "distill": (5e-6, 5e-5, "MiniLLM, arXiv 2306.08543; ten times it for adapters"),
}
# Sampling that GRPO's rates were measured with: as many samples an update as 16 × 16 in four minibatches.
REAL_SAMPLING = {"grpo": dict(prompts_per_step=8, group_size=8, minibatches=1)}

FROM_DATA = "steps max_len max_new_tokens eval_prompts".split()  # flags that the user's own data decides
LEAST_STEPS = 100  # few rows would be over before anything is learnt
LONGEST = 1024  # tokens; a longer context of a new model, or a longer response, must be asked for
HELD_OUT = 128  # prompts to measure on, at most


def n_parameters(folder):
    """The numbers in a model's folder or .gguf, by the headers of its files; 0 without any.

    The loader, which comes next, names a damaged file and what is wrong with it.
    """
    total = 0
    with contextlib.suppress(UserError, *weights.DAMAGE):
        for file in weights.files_of(find(folder)):
            with weights.opened(file) as f:
                total += sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())
    return total


def of_real_model(cfg):
    """→ {flag: its default} where --init is above LARGE, as those of a task would destroy it; else {}."""
    if not cfg.init or n_parameters(cfg.init) <= LARGE:
        return {}
    rank = cfg.lora_rank
    if rank is None:
        rank = 0 if cfg.dtype == "bf16_weights" else RANK  # adapters are trained in fp32
    full, adapters, _ = REAL[cfg.method]
    lr = adapters if rank else full
    return dict(lora_rank=rank, lr=lr, critic_lr=lr) | REAL_SAMPLING.get(cfg.method, {})


def taken(cfg, flags):
    """The line that says which defaults of a real model were taken; none for no flags."""
    if not flags:
        return []
    values = " ".join(f"--{name} {getattr(cfg, name)}" for name in flags)
    source = f" (lr: {REAL[cfg.method][2]})" if "lr" in flags else ""
    return [f"--init of {n_parameters(cfg.init) / 1e6:,.0f}M parameters: {values}{source}"]


def reads_reference(cfg):
    """Whether GRPO or PPO, as these flags set it up, has a KL to weigh; the others always read theirs."""
    if cfg.method == "grpo":
        return cfg.kl != "none" or cfg.ref_every
    return cfg.method != "ppo" or cfg.beta or cfg.kl_target


def pick_dtype(cfg):
    """Settle --dtype auto: bfloat16 for a real model if the device has units for it, else float32.

    → the lines that say so. A small model stays in fp32, whose curves are the committed ones.
    """
    units = bf16.has_units(cfg.device)
    if cfg.dtype == "bfloat16" and not units and device_of(cfg) == "cpu":
        return ["--dtype bfloat16: this processor has no bf16 units, --dtype float32 is faster on it"]
    if cfg.dtype != "auto":
        return []
    cfg.dtype = "float32"
    if not units or not cfg.is_real:
        return []
    cfg.dtype = "bfloat16"
    return ["--dtype bfloat16: this device has bf16 units; log-probs are rounded to about 1e-2 (see gap)"]


def context_for(pairs):
    """Context of a new model: room for the longest prompt with the longest response, at most LONGEST.

    pairs   (ids, mask of the response), as `data.encode_demonstrations` gives them

    >>> context_for([([5, 6, 7, 0], [False, False, True, True]), ([5, 0], [False, True])])
    4
    """
    prompts = [mask.index(True) for _, mask in pairs]
    responses = [len(mask) - mask.index(True) for _, mask in pairs]
    return min(LONGEST, max(prompts) + max(responses))


def response_limit(longest_prompt, max_len, path, rows, tok):
    """Tokens that a response may have: the room behind the longest prompt of the data file. Printed, too.

    Where that is above LONGEST it is the longest response in the data: a "response", or an "answer" that is
    worked out (GSM8K). UserError without one for each row: responses of minutes must be asked for.
    """
    room = max_len - longest_prompt
    limit = room
    by = f"{path} and the model's context"
    examples = [text for row in rows if (text := _worked_out(row))]
    if room > LONGEST and len(examples) == len(rows):
        limit = min(room, 1 + max(len(tok.encode(text)) for text in examples))  # and EOS
        by = f"the longest response in {path}"
    ask = f"the longest prompt leaves room for {room:,} tokens; give the longest response, such as 512"
    require(0 < limit <= LONGEST, f"--max_new_tokens: {ask}")
    print(f"--max_new_tokens {limit}: by {by}")
    return limit


def _worked_out(row):
    """A response in a row of prompts, or "". A bare "answer" is none: a model may say more than "42"."""
    if isinstance(row.get("response"), str):
        return row["response"]
    answer = row.get("answer")
    return answer if isinstance(answer, str) and "####" in answer else ""


PAPERS = {
    "grpo": "DeepSeekMath, arXiv 2402.03300",
    "dr_grpo": "Dr. GRPO, arXiv 2503.20783",
    "rloo": "RLOO, arXiv 2402.14740",
    "reinforce++": "REINFORCE++ with baseline, arXiv 2501.03262",
    "dapo": "DAPO, arXiv 2503.14476",
    "gspo": "GSPO, arXiv 2507.18071",
    "cispo": "MiniMax-M1, arXiv 2506.13585",
    "scalerl": "ScaleRL, arXiv 2510.13786",
    "r1_zero": "DeepSeek-R1-Zero, arXiv 2501.12948",
    "deepscaler": "DeepScaleR",
}

# What a recipe of GRPO sets. A flag that it does not name comes from the first entry, which is no paper's.
# docs/recipes.md has every published detail, and beside it what is different here, or missing, and why.
RECIPES = {
    "": dict(
        norm="group_std",
        ratio="token",
        loss="clip",
        clip_low=0.2,
        clip_high=0.2,
        agg="token",
        kl="none",
        kl_in="loss",
        kl_unbiased=True,
        beta=0.0,
        ref_every=0,
        entropy_coef=0.0,
        constant_lr_after=0,
        adam_eps=1e-8,
        weight_decay=0.0,
        off_policy_steps=0,
        dead_groups="keep",
        no_positive_resampling=0.0,
        overlong_penalty=0.0,
    ),
    "grpo": dict(agg="seq_mean", kl="k3", kl_unbiased=False, beta=0.04),
    # without 1/std and 1/length, which bias the gradient
    "dr_grpo": dict(norm="none", agg="seq_sum_const"),
    "rloo": dict(
        norm="leave_one_out",
        loss="reinforce",
        agg="seq_sum_const",
        kl="k1",
        kl_in="reward",
        beta=0.05,
        minibatches=1,
    ),
    # its variant with a baseline; the plain one has no groups, and k1 in the reward of each token
    "reinforce++": dict(norm="batch_whiten", kl="k2", kl_unbiased=False, beta=0.01),
    # give --max_new_tokens room: the soft penalty takes the last fifth
    "dapo": dict(clip_high=0.28, constant_lr_after=20, dead_groups="refill", overlong_penalty=1.0),
    "gspo": dict(ratio="sequence", agg="seq_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": dict(loss="cispo"),
    "scalerl": dict(
        norm="batch_std",
        loss="cispo",
        agg="prompt_mean",
        minibatches=1,
        constant_lr_after=100,
        adam_eps=1e-15,
        weight_decay=0.01,
        off_policy_steps=8,
        dead_groups="drop",
        no_positive_resampling=0.9,
    ),
    "r1_zero": dict(agg="seq_mean", kl="k3", kl_unbiased=False, beta=0.001, ref_every=400, minibatches=16),
    # and --max_new_tokens 24,40,64, --temperature 0.6
    "deepscaler": dict(kl="k3", kl_unbiased=False, beta=0.001, entropy_coef=0.001, constant_lr_after=1),
}


def recipe_lines(cfg, recipe):
    """A recipe's flags as they are resolved, one a line, and beside each the paper that its value is from."""
    paper = PAPERS.get(cfg.recipe, cfg.recipe)
    lines = [f"--recipe {cfg.recipe}: {paper}"]
    for name, default in (cfg.DEFAULTS | recipe).items():
        if name in FROM_DATA:
            continue
        flag = f"--{name} {getattr(cfg, name)}"
        by = paper if name in recipe else "default"
        if getattr(cfg, name) != default:
            by = "given"
        lines.append(f"  {flag:<32}{by}")
    return lines
