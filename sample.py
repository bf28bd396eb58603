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

from nanorlhf import generate, hub
from nanorlhf.errors import UserError, derive_seed, require
from nanorlhf.run.cli import check_ranges, run_cli
from nanorlhf.run.device import setup, to_device
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
def stream(model, prompt, max_new_tokens, eos_id, seed, temperature=1.0, top_k=0, top_p=1.0):
    """Token ids of one prompt → yields (token, log-prob) as sampled, EOS included.

    One row of `generate.generate`, from the same seed. max_new_tokens = 0: to the end of the context.
    """
    room = model.cfg.max_len - len(prompt)
    require(prompt, "the prompt is empty: the model needs at least one token to continue")
    left = f"a prompt of {len(prompt)} tokens leaves {max(room, 0)} of the context of {model.cfg.max_len}"
    require(max(max_new_tokens, 1) <= room, f"--max_new_tokens {max_new_tokens}: {left}")
    max_new_tokens = max_new_tokens or room
    u = torch.rand(1, max_new_tokens, generator=torch.Generator().manual_seed(seed % 2**63)).to(model.device)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    last = model(torch.tensor([prompt], device=model.device), cache)[:, -1]  # (1, D)
    sampling = generate.Sampling(temperature, top_k, top_p)
    for t in range(max_new_tokens):
        token, logp = generate.sample(model.head_logits(last), u[:, t], sampling)
        yield token.item(), logp.item()
        if token.item() in (eos_id, *model.stop_ids):
            return
        if t + 1 < max_new_tokens:
            last = model(token[:, None], cache, torch.tensor([len(prompt) + t], device=model.device))[:, 0]


def show(tokens, tok, logprobs=False):
    """Print tokens as they come → (ids, their summed log-prob). Half a character waits for its other half."""
    ids, shown, total, write = [], "", 0.0, sys.stdout.write
    for token, logp in tokens:
        ids.append(token)
        total += logp
        if logprobs:
            write(f"{logp:9.3f}  {tok.decode([token])!r}\n")
            continue
        text = tok.decode(ids[:-1] if token == tok.eos_id else ids)
        if not text.endswith("\ufffd"):
            write(text[len(shown) :])
            shown = text
            sys.stdout.flush()
    if logprobs:
        write(f"{total:9.3f}  in all, {len(ids)} tokens\n")
    else:
        write(tok.decode([i for i in ids if i != tok.eos_id])[len(shown) :] + "\n")
    return ids, total


def prompts(cfg):
    """The one prompt given, or lines as they are typed, until an empty one or the end of the input."""
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
    device = setup(cfg)
    model, tok = hub.load(cfg.model, "--model", "python train_sft.py", "language model")
    to_device(cfg, device, model)
    answers = []
    for number, prompt in enumerate(prompts(cfg)):
        try:
            turn = Chat([{"role": "user", "content": prompt}]) if cfg.chat else prompt
            ids = tok.encode_prompt(turn)
        except UserError as e:  # a slip of the keyboard does not end the conversation
            require(not cfg.prompt, f"--prompt: {e}")
            print(e)
            continue
        for i in range(cfg.n):
            if cfg.n > 1:
                print(f"── {i + 1}")
            if not cfg.logprobs:
                print(turn, end="", flush=True)
            seed = derive_seed(cfg.seed, "sample", number, i)
            how = cfg.temperature, cfg.top_k, cfg.top_p
            tokens = stream(model, ids, cfg.max_new_tokens, tok.eos_id, seed, *how)
            answers.append(show(tokens, tok, cfg.logprobs))
    return answers


if __name__ == "__main__":
    sys.exit(run_cli(Config, main, __doc__))
