"""Defaults that belong to the size of the model or to the data, where those of a toy task would be wrong."""

import glob
import inspect
import math
import os
import re
import sys

from safetensors import SafetensorError, safe_open

from nanorlhf.errors import require

LARGE = 50_000_000  # parameters; above, the learning rates of the built-in tasks would destroy the model
PUBLISHED = {  # trainer → learning rate for a large model that is trained further, and who published it
    "sft": (2e-5, "Zephyr, arXiv 2310.16944"),
    "rm": (9e-6, "InstructGPT, arXiv 2203.02155"),
    "prm": (9e-6, "InstructGPT's reward model, arXiv 2203.02155"),
    "ppo": (3e-6, "N+, arXiv 2403.17031"),
    "grpo": (1e-6, "DeepSeekMath, arXiv 2402.03300"),
    "dpo": (5e-7, "Zephyr, arXiv 2310.16944"),
}
NEW = (6e-4, "GPT-3 Small, arXiv 2005.14165")  # the same for a large model that starts from nothing
BEARS = {"sft": 1e-4, "rm": 1e-4, "prm": 1e-4, "ppo": 3e-5, "grpo": 3e-5, "dpo": 5e-6}  # more must be given
LORA = 10  # adapters are published with about ten times the learning rate (QLoRA's SFT: 2e-4), bear twenty
LORA_BEARS = 20

PASSES = {"sft": 3, "rm": 1, "prm": 1, "ppo": 1, "grpo": 1, "dpo": 1}  # over data of one's own
LEAST_STEPS = 100  # of so many steps at least, since few rows would be over before anything is learnt
LONGEST_CONTEXT = 1024  # of a new model on data of one's own; --max_len goes further
LONGEST_RESPONSE = 1024  # a longer one must be asked for, because it costs minutes a step
HELD_OUT = 128  # prompts of one's own to measure on, at most
DERIVED = ("steps", "max_len", "max_new_tokens", "eval_prompts")  # flags that data of one's own decides


def n_parameters(folder):
    """The numbers in a folder's safetensors files, read from their headers; 0 where there are none."""
    total = 0
    for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        try:
            with safe_open(path, "pt") as f:
                total += sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())
        except (OSError, SafetensorError):
            return 0  # the loader names the damaged file and what is wrong with it
    return total


def by_size(cfg, method, table):
    """→ ({} or the learning rates of a model above LARGE, [] or a line about them).

    table: the task's defaults, for the layers and the width of a new model.
    """
    if cfg.init:
        n = n_parameters(cfg.init)
        lr, source = PUBLISHED[method]
        bears = BEARS[method]
        if cfg.lora_rank:
            lr *= LORA
            bears *= LORA_BEARS
    else:
        n = 12 * (cfg.n_layer or table["n_layer"]) * (cfg.d_model or table["d_model"]) ** 2
        lr, source = NEW
        bears = lr
    if n <= LARGE:
        return {}, []
    size = f"a model of {n / 1e6:,.0f}M parameters"
    rates = {"lr": lr}
    if hasattr(cfg, "critic_lr"):
        rates["critic_lr"] = lr
    notes = []
    for name, rate in rates.items():
        given = getattr(cfg, name)
        if given is None:
            adapters = f", times {LORA} for adapters" if cfg.init and cfg.lora_rank else ""
            notes.append(f"--{name} {rate:g}: the published one for {size} ({source}{adapters})")
        elif given > bears:
            notes.append(f"warning: --{name} {given:g} is above {bears:g}, which {size} bears as a rule")
    return rates, notes


def steps_for(method, rows, batch):
    """Steps for so many rows of one's own, `batch` a step: PASSES over them, at least LEAST_STEPS."""
    return max(LEAST_STEPS, math.ceil(PASSES[method] * rows / batch))


def context_for(pairs):
    """Context of a new model: the longest prompt with the longest response, at most LONGEST_CONTEXT.

    pairs   (ids, mask of the response), as `data.encode_demonstrations` gives them

    >>> context_for([([5, 6, 7, 0], [False, False, True, True]), ([5, 0], [False, True])])
    4
    """
    prompts = [mask.index(True) for _, mask in pairs]
    responses = [len(mask) - prompt for (_, mask), prompt in zip(pairs, prompts)]
    return min(LONGEST_CONTEXT, max(prompts) + max(responses))


def response_limit(prompts, max_len):
    """Tokens that a response may have: the room behind the longest of the prompts, at least half the context.

    prompts   tokens of each prompt
    UserError above LONGEST_RESPONSE: then --max_new_tokens must be given.

    >>> response_limit([10, 24], max_len=64), response_limit([10, 60], max_len=64)
    (40, 32)
    """
    room = max(max_len - max(prompts), max_len // 2)
    ask = f"--max_new_tokens: give the longest response, such as 512; there is room for {room:,} tokens"
    require(room <= LONGEST_RESPONSE, ask)
    return room


# ------------------------------------------------------------------------------------------------------------
# What a recipe sets


def paper_of(cfg):
    """The comment above the recipe's entry in the trainer's RECIPES, which names its paper."""
    source = inspect.getsource(sys.modules[type(cfg).__module__])
    found = re.search(rf'^    # (.+)\n    "{re.escape(cfg.recipe)}": dict\(', source, re.M)
    return found[1] if found else "no paper"


def recipe_lines(cfg, recipe, origin):
    """A recipe's flags as they are resolved, one a line, each with the paper that it comes from.

    recipe: its flags. origin: {flag: the table that its value comes from}; given flags are not in it.
    """
    paper = paper_of(cfg)
    lines = [f"--recipe {cfg.recipe}: {paper}"]
    short = paper.partition(" (")[0].partition(";")[0]
    for name in cfg.DEFAULTS | recipe:
        where = {"recipe": short, "": "the command line"}.get(origin.get(name, ""), "default")
        flag = f"--{name} {getattr(cfg, name)}"
        lines.append(f"  {flag:<32}{where}")
    return lines
