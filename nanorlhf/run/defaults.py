"""Defaults that belong to the size of a model or to the user's data, where those of a toy task are wrong."""

import contextlib
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nanorlhf.errors import require

LARGE = 50_000_000  # parameters; the learning rates of the built-in tasks would destroy such a model
PUBLISHED = {  # trainer → learning rate for a pretrained model above LARGE, and who published it
    "sft": (2e-5, "Zephyr, arXiv 2310.16944"),
    "rm": (9e-6, "InstructGPT, arXiv 2203.02155"),
    "prm": (9e-6, "InstructGPT's reward model, arXiv 2203.02155"),
    "ppo": (3e-6, "N+, arXiv 2403.17031"),
    "grpo": (1e-6, "DeepSeekMath, arXiv 2402.03300"),
    "dpo": (5e-7, "Zephyr, arXiv 2310.16944"),
    "distill": (5e-6, "MiniLLM, arXiv 2306.08543"),
}
LORA = 10  # adapters learn at about ten times the rate: QLoRA's SFT (arXiv 2305.14314) takes 2e-4

FROM_DATA = "steps max_len max_new_tokens eval_prompts".split()  # flags that the user's own data decides
LEAST_STEPS = 100  # few rows would be over before anything is learnt
LONGEST = 1024  # tokens; a longer context of a new model, or a longer response, must be asked for
HELD_OUT = 128  # prompts to measure on, at most


def n_parameters(folder):
    """The numbers in a folder's safetensors files, by their headers; 0 without any."""
    total = 0
    for path in filter(Path.is_file, Path(folder).glob("*.safetensors")):  # a pipe would be waited for
        # The loader, which comes next, names a damaged file and what is wrong with it.
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as f:
            total += sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())
    return total


def fill_rates(cfg, flags):
    """Set these flags to the published learning rate if --init is above LARGE → lines that say so."""
    n = n_parameters(cfg.init) if cfg.init else 0
    if n <= LARGE:
        return []
    lr, source = PUBLISHED[cfg.method]
    if cfg.lora_rank:
        lr *= LORA
    for name in flags:
        setattr(cfg, name, lr)
    return [f"--{name} {lr:g}: the published one for {n / 1e6:,.0f}M parameters ({source})" for name in flags]


def context_for(pairs):
    """Context of a new model: room for the longest prompt with the longest response, at most LONGEST.

    pairs   (ids, mask of the response), as `data.encode_demonstrations` gives them

    >>> context_for([([5, 6, 7, 0], [False, False, True, True]), ([5, 0], [False, True])])
    4
    """
    prompts = [mask.index(True) for _, mask in pairs]
    responses = [len(mask) - mask.index(True) for _, mask in pairs]
    return min(LONGEST, max(prompts) + max(responses))


def response_limit(longest_prompt, max_len):
    """Tokens that a response may have: the room behind the longest prompt.

    UserError where there is none, and above LONGEST: responses of minutes must be asked for.

    >>> response_limit(24, max_len=64)
    40
    """
    room = max_len - longest_prompt
    ask = f"the longest prompt leaves room for {room:,} tokens; give the longest response, such as 512"
    require(0 < room <= LONGEST, f"--max_new_tokens: {ask}")
    return room


PAPERS = {
    "grpo": "DeepSeekMath, arXiv 2402.03300",
    "dr_grpo": "Dr. GRPO, arXiv 2503.20783",
    "rloo": "RLOO, arXiv 2402.14740",
    "reinforce++": "REINFORCE++, arXiv 2501.03262",
    "dapo": "DAPO, arXiv 2503.14476",
    "gspo": "GSPO, arXiv 2507.18071",
    "cispo": "MiniMax-M1, arXiv 2506.13585",
    "scalerl": "ScaleRL, arXiv 2510.13786",
    "r1_zero": "DeepSeek-R1-Zero, arXiv 2501.12948",
    "deepscaler": "DeepScaleR",
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
