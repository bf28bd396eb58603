"""What the weeks' notebooks train on: a task of three letters, files of it, and runs of a few seconds.

    bad:  →  bad     the letters again, or
    bad:  →  BAD     in capitals

Demonstrations do the one as often as the other, so that a model learns both and prefers neither. The reward
pays for capitals alone. Everything here is small enough for a cell of a notebook on a laptop.
"""

import contextlib
import functools
import io
import random
import tempfile
from pathlib import Path
from unittest import mock

from nanorlhf.hub.files import write_jsonl
from nanorlhf.look import plots

FOLDER = Path(tempfile.mkdtemp(prefix="nanorlhf-notebook-"))  # the files and the runs of this process
LETTERS = "abcde"


def capitals(prompt, response):
    """The reward: 1 if the response is the prompt's three letters in capitals, else 0."""
    return float(response == prompt[:-1].upper())


REWARD = f"{__file__}:capitals"  # for --reward


# ------------------------------------------------------------------------------------------------------------
# Files


def prompts(n, seed):
    """n prompts such as "bad:", drawn with replacement."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=3)) + ":" for _ in range(n)]


def write(name, rows):
    """Rows as a JSONL file → its path."""
    path = FOLDER / name
    write_jsonl(path, rows)
    return str(path)


def demonstrations(n=2000, seed=0):
    """A file of {"prompt", "response"}: small letters and capitals, as often the one as the other."""
    rng = random.Random(seed)
    rows = []
    for prompt in prompts(n, seed):
        letters = prompt[:-1]
        response = rng.choice((letters, letters.upper()))
        rows.append({"prompt": prompt, "response": response})
    return write("demonstrations.jsonl", rows)


def questions(n=400, seed=1):
    """A file of {"prompt"}, for trainers that sample the responses themselves."""
    return write("questions.jsonl", [{"prompt": prompt} for prompt in prompts(n, seed)])


def preferences(n=1000, seed=2, wrong=0.1):
    """A file of {"prompt", "chosen", "rejected"}: capitals win, but for a share of wrong labels."""
    rng = random.Random(seed)
    rows = []
    for prompt in prompts(n, seed):
        letters = prompt[:-1]
        pair = [letters.upper(), letters]
        if rng.random() < wrong:
            pair.reverse()
        rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    return write("preferences.jsonl", rows)


# ------------------------------------------------------------------------------------------------------------
# Runs

SFT = {  # flags of train_sft for a model that learns both answers within a hundred steps
    "tokenizer": "chars",
    "max_len": 16,
    "n_layer": 1,
    "d_model": 64,
    "batch_size": 64,
    "lr": 1e-2,
    "eval_every": 0,
}


def train(trainer, name, **flags):
    """trainer.train on one CPU thread without its log → what it returns; .path is the run's folder."""
    settings = {"device": "cpu", "threads": 1, "save_every": 0, "overwrite": True, "out": str(FOLDER / name)}
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        with mock.patch.object(plots, "pyplot", lambda: None):  # a picture takes longer than such a run
            return trainer.train(trainer.Config(**settings | flags))


@functools.cache
def start_model(steps=100):
    """The folder of a model that has learnt the demonstrations: where RL and preferences begin."""
    import train_sft

    run = train(train_sft, f"start-{steps}", data=demonstrations(), steps=steps, **SFT)
    return run.path + "/model"


def curve(rows, name, lines=8, digits=2, width=40):
    """Print a column of a run at about so many steps, with a bar: its share of the largest value."""
    measured = [row for row in rows if row.get(name) is not None]
    last = len(measured) - 1
    shown = sorted({round(i * last / (lines - 1)) for i in range(lines)})
    largest = max(abs(row[name]) for row in measured)
    print(f"step  {name}")
    for i in shown:
        value = round(measured[i][name], digits) + 0.0
        bar = "#" * round(width * abs(value) / largest)
        print(f"{measured[i]['step']:4}  {value:.{digits}f}  {bar}".rstrip())
