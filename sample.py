"""Talk to any checkpoint: tokens appear as they are sampled.

    python sample.py --model runs/reviews-ppo/model --prompt "Hotel: The view was poor."
    python sample.py --model runs/reviews-ppo/model           one prompt a line, until an empty one
    python sample.py ... --n 4 --temperature 0.7 --top_p 0.9  several answers, from a sharper distribution
    python sample.py ... --logprobs                           one token a line, with its log-prob
    python sample.py ... --chat                               the prompt as a user's turn (chat template)

A model continues a text, or answers one turn: it has no memory of earlier prompts. The log-prob is that of
the distribution sampled from; with temperature 0 (greedy) it is the one at temperature 1.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from nanorlhf.errors import UserError, derive_seed, require
from nanorlhf.run.cli import check_ranges, run_cli
from nanorlhf.run.device import setup, to_device
from nanorlhf.run.models import load_model
from nanorlhf.sampling import Sampling, sample
from nanorlhf.tokenizer import Chat


@dataclass
class Config:
    model: str = "runs/reviews-sft/model"  # model folder: the model/ of a run, or a Hugging Face folder
    prompt: str = ""  # text to continue; empty: read prompts from the terminal or a pipe, one a line
    chat: bool = False  # the prompt is a user's turn, rendered by the model's chat template
    n: int = 1  # answers to each prompt
    max_new_tokens: int = 0  # length at most, EOS included; 0: what the context has room for
    temperature: float = 1.0  # below 1 sharper, above 1 flatter; 0: always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this probability
    logprobs: bool = False  # one token a line with its log-prob, and their sum
    seed: int = 0  # of sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    threads: int = 0  # CPU threads; 0: one below a million parameters, else torch's own choice

    def __post_init__(self):
        check_ranges(self, ("n", "top_p"))
        require(self.top_p <= 1, f"--top_p {self.top_p}: must not be above 1")


@torch.no_grad()
def stream(model, prompt, max_new_tokens, eos_id, seed, sampling):
    """Sample a response to one prompt (a list of ids), and yield (token, log-prob) at once, EOS included.

    The tokens are those of `generate.generate` with the same seed. max_new_tokens = 0: up to the end of the
    context. UserError for an empty prompt, and for one that leaves too little of the context.
    """
    require(prompt, "the prompt is empty: the model needs at least one token to continue")
    context = model.cfg.max_len
    room = max(context - len(prompt), 0)
    left = f"a prompt of {len(prompt)} tokens leaves {room} of the context of {context}"
    require(max(max_new_tokens, 1) <= room, f"--max_new_tokens {max_new_tokens}: {left}")
    if max_new_tokens == 0:
        max_new_tokens = room
    generator = torch.Generator().manual_seed(seed % 2**63)
    u = torch.rand(1, max_new_tokens, generator=generator).to(model.device)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    hidden = model(torch.tensor([prompt], device=model.device), cache)[:, -1]  # prefill: (1, D)
    for t in range(max_new_tokens):
        token, logp = sample(model.head_logits(hidden), u[:, t], sampling)
        yield token.item(), logp.item()
        if token.item() in (eos_id, *model.stop_ids):
            return
        if t + 1 < max_new_tokens:
            position = torch.tensor([len(prompt) + t], device=model.device)
            hidden = model(token[:, None], cache, position)[:, 0]


def show(tokens, tok, logprobs=False):
    """Print (token, log-prob) pairs as they come → (ids, their summed log-prob).

    A character of several tokens is printed when its last token is there: until then `decode` ends in the
    replacement character U+FFFD.
    """
    ids = []
    total = 0.0
    shown = ""
    for token, logp in tokens:
        ids.append(token)
        total += logp
        if logprobs:
            print(f"{logp:9.3f}  {tok.decode([token])!r}")
            continue
        text = tok.decode([i for i in ids if i != tok.eos_id])
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if logprobs:
        print(f"{total:9.3f}  in all, {len(ids)} tokens")
    else:
        text = tok.decode([i for i in ids if i != tok.eos_id])
        print(text[len(shown) :])
    return ids, total


def prompts(cfg):
    """Yield --prompt, or lines as they are typed, until an empty one or the end of the input."""
    if cfg.prompt:
        yield cfg.prompt
        return
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        yield line


def main(cfg):
    """Answer every prompt --n times, on the terminal → a list of (ids, summed log-prob)."""
    device = setup(cfg)
    model, tok = load_model("--model", cfg.model, "python train_sft.py", "language model")
    to_device(cfg, device, model)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    answers = []
    for number, prompt in enumerate(prompts(cfg)):
        if cfg.chat:
            prompt = Chat([{"role": "user", "content": prompt}])
        try:
            ids = tok.encode_prompt(prompt)
        except UserError as e:
            require(not cfg.prompt, f"--prompt: {e}")
            print(e)  # a slip of the keyboard does not end the conversation
            continue
        for i in range(cfg.n):
            if cfg.n > 1:
                print(f"── {i + 1}")
            if not cfg.logprobs:
                print(prompt, end="", flush=True)
            seed = derive_seed(cfg.seed, "sample", number, i)
            tokens = stream(model, ids, cfg.max_new_tokens, tok.eos_id, seed, sampling)
            answers.append(show(tokens, tok, cfg.logprobs))
    return answers


if __name__ == "__main__":
    sys.exit(run_cli(Config, main, __doc__))
