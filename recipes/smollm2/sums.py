"""Sums as chats, for a small published model: some to train on, others with numbers never trained on.

    python -m recipes.smollm2.sums FOLDER [SEED]        → FOLDER/train.jsonl, FOLDER/heldout.jsonl

Of the 45 pairs of numbers from 1 to 9 the seed holds out 10, each in both orders: a model that was trained
on 3 + 4 has seen the answer of 4 + 3. Each sum is asked in four ways. The reward is
nanorlhf/answers.py:last_number.
"""

import itertools
import os
import random

from nanorlhf.hub.files import write_jsonl
from recipes.smollm2 import command

SYSTEM = {"role": "system", "content": "You are a calculator."}
PHRASINGS = ("{a} + {b} =", "{a} plus {b} =", "Add {a} and {b}.", "What is {a} + {b}?")
# With two digits the base model of 135M is never right, and there is nothing to select.
NUMBERS = range(1, 10)
HELD_OUT = 10  # of the 45 pairs of these numbers


def rows_of(pairs):
    """Unordered pairs of numbers → the rows that ask for their sums, in both orders and in four ways."""
    rows = []
    for pair in pairs:
        for a, b in sorted({pair, pair[::-1]}):
            for phrasing in PHRASINGS:
                question = {"role": "user", "content": phrasing.format(a=a, b=b)}
                rows.append({"messages": [SYSTEM, question], "answer": str(a + b)})
    return rows


def split(seed):
    """→ rows to train on, held-out rows; those in random order, so that the first 48 are a fair sample."""
    pairs = list(itertools.combinations_with_replacement(NUMBERS, 2))
    rng = random.Random(seed)
    rng.shuffle(pairs)
    held_out = rows_of(pairs[:HELD_OUT])
    rng.shuffle(held_out)
    return rows_of(sorted(pairs[HELD_OUT:])), held_out


def main(folder, seed="0"):
    os.makedirs(folder, exist_ok=True)
    for name, rows in zip(("train", "heldout"), split(int(seed))):
        write_jsonl(f"{folder}/{name}.jsonl", rows)
        print(f"{folder}/{name}.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    command(main, __doc__)
