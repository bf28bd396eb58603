"""Talk to any checkpoint: tokens appear as they are sampled.

    python sample.py --model runs/reviews-ppo/model --prompt "Hotel: The view was poor."
    python sample.py --model runs/reviews-ppo/model           one prompt a line, until an empty one
    python sample.py ... --n 4 --temperature 0.7 --top_p 0.9  several answers, from a sharper distribution
    python sample.py ... --logprobs                           one token a line, with its log-prob
    python sample.py ... --chat                               the prompt as a user's turn, shown in the
                                                              chat template that the model reads

A model continues a text, or answers one turn: it has no memory of earlier prompts. Each answer ends in [EOS],
where the model ended it, or in [cut after 40 tokens]. The log-prob is that of the distribution sampled from;
with temperature 0 (greedy) it is the one at temperature 1.
"""

import re
import shutil
import sys
from dataclasses import dataclass

import torch

from nanorlhf.errors import UserError, blame, derive_seed, require, visible
from nanorlhf.generate import prefill, prepare
from nanorlhf.kernels.bf16 import cast_once
from nanorlhf.run.cli import Machine, check_ranges, run_cli
from nanorlhf.run.device import setup, to_device
from nanorlhf.run.models import load_model
from nanorlhf.sampling import Sampling, sample
from nanorlhf.tokenizer import Chat

HELP = """A line is a prompt: the model continues it, or with --chat answers it.
It does not remember earlier prompts. An answer ends in [EOS] where the model
ended it, or in [cut after 40 tokens], at --max_new_tokens or where the context
is full. An empty line or Ctrl-D leaves. `python sample.py --help` lists the
flags: --temperature, --top_p, --n, --logprobs and more."""
# Two columns wide: Chinese, Japanese, Korean, emoji. A line may break before and after each.
WIDE = re.compile("[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U0001f300-\U0001faff]")
WORD_ENDS = re.compile(rf"(?<=\S)(?= )|(?=\n)|(?<=\n)|(?={WIDE.pattern})|(?<={WIDE.pattern})")


@dataclass
class Config(Machine):
    model: str = "runs/reviews-sft/model"  # model folder: the model/ of a run, or a Hugging Face folder
    prompt: str = ""  # text to continue; empty: read prompts from the terminal or a pipe, one a line
    chat: bool = False  # the prompt is a user's turn, rendered by the model's chat template
    n: int = 1  # answers to each prompt
    max_new_tokens: int = 0  # length at most, EOS included; 0: what the context has room for
    temperature: float = 1.0  # below 1 sharper, above 1 flatter; 0: always the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this probability
    logprobs: bool = False  # one token a line with its log-prob, and their sum

    def __post_init__(self):
        check_ranges(self, ("n", "top_p"))


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
    batch = prepare(model, [prompt], 1, max_new_tokens, sampling.temperature, eos_id, seed)
    cache, hidden = prefill(model, batch)  # hidden: (1, D)
    for t in range(max_new_tokens):
        token, logp = sample(model.head_logits(hidden), batch.uniforms[:, t], sampling)
        yield token.item(), logp.item()
        if torch.isin(token, batch.stop_ids):
            return
        if t + 1 < max_new_tokens:
            position = batch.prompt_len + t
            hidden = model(token[:, None], cache, position)[:, 0]


def cells(text):
    """The columns that a text takes on a terminal."""
    return len(text) + len(WIDE.findall(text))


class Screen:
    """Prints a text that grows; on a terminal, a word that would cross the edge goes to the next line.

    Control characters are shown as escapes. Obeyed, they would let a model clear the screen.
    """

    def __init__(self):
        self.width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0  # 0: no edge
        self.column = 0  # columns of this line that are in use
        self.held = ""  # a word that may still grow, with the blanks before it

    def write(self, text):
        text = visible(text)
        if not self.width:
            print(text, end="", flush=True)
            return
        *words, self.held = WORD_ENDS.split(self.held + text.replace("\t", "    "))
        for word in words:
            self.put(word)

    def put(self, word):
        if word != "\n" and self.column and self.column + cells(word) > self.width:
            word = "\n" + word.lstrip(" ")
        print(word, end="", flush=True)
        _, newline, line = word.rpartition("\n")
        self.column = cells(line) + (0 if newline else self.column)

    def end(self):
        self.put(self.held)
        print()


def show(tokens, tok, logprobs=False, screen=None, stops=()):
    """Print (token, log-prob) pairs as they come, and how they end → (ids, their summed log-prob).

    A character of several tokens is printed when its last token is there: until then `decode` ends in the
    replacement character U+FFFD. stops: the ids besides EOS that end an answer.
    """
    screen = screen or Screen()
    ids = []
    total = 0.0
    text = shown = ""
    end = "nothing"
    for token, logp in tokens:
        ids.append(token)
        total += logp
        stopped = token in (tok.eos_id, *stops)
        end = "EOS" if stopped else f"cut after {len(ids)} tokens"
        if logprobs:
            print(f"{logp:9.3f}  {end if stopped else repr(tok.decode([token]))}")
        elif not stopped:
            text = tok.decode(ids)
            if not text.endswith("\ufffd"):
                screen.write(text[len(shown) :])
                shown = text
    if logprobs:
        print(f"{total:9.3f}  in all, {len(ids)} tokens, [{end}]")
    else:
        screen.write(f"{text[len(shown) :]} [{end}]")
        screen.end()
    return ids, total


def prompts(cfg):
    """Yield --prompt, or lines as they are typed, until an empty one or the end of the input."""
    if cfg.prompt:
        yield cfg.prompt
        return
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print("/help: what one may type")
    while True:
        try:
            with blame("standard input", UnicodeDecodeError):
                line = input("prompt> " if at_terminal else "")
        except EOFError:
            return
        if not line:
            return
        if line.strip() == "/help":
            print(HELP)
        else:
            yield line


def main(cfg):
    """Answer every prompt --n times, on the terminal → a list of (ids, summed log-prob)."""
    device = setup(cfg)
    model, tok = load_model("--model", cfg.model, "language model")
    to_device(cfg, device, model)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    answers = []
    with cast_once(model):
        for number, prompt in enumerate(prompts(cfg)):
            if cfg.chat:
                prompt = Chat([{"role": "user", "content": prompt}])
            try:
                ids = tok.encode_prompt(prompt)
                for i in range(cfg.n):
                    if cfg.n > 1:
                        print(f"── {i + 1}")
                    screen = Screen()
                    if not cfg.logprobs:
                        screen.write(tok.decode(ids) if cfg.chat else prompt)
                    seed = derive_seed(cfg.seed, "sample", number, i)
                    tokens = stream(model, ids, cfg.max_new_tokens, tok.eos_id, seed, sampling)
                    answers.append(show(tokens, tok, cfg.logprobs, screen, model.stop_ids))
            except UserError as e:
                require(not cfg.prompt, f"--prompt: {e}")
                print(e)  # a slip of the keyboard does not end the conversation
    return answers


if __name__ == "__main__":
    sys.exit(run_cli(Config, main, __doc__))
