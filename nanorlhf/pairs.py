"""Preference pairs for the reward model and for DPO: made here by a Bradley–Terry draw, or read from files.

Pairs that cannot be used are dropped and counted. Nothing here may move a learning curve.
"""

import os
import random
from typing import NamedTuple

import torch

from nanorlhf import generate, tasks
from nanorlhf.data import encode_pair, split_by_hash
from nanorlhf.errors import derive_seed, require
from nanorlhf.hub.files import read_jsonl, write_jsonl
from nanorlhf.hub.formats import read_rows
from nanorlhf.rewards import load_prompts
from nanorlhf.run import dist

KEYS = ("prompt", "chosen", "rejected")
HELD_OUT_PAIRS = 512


def make_pairs(cfg, task, model, tok):
    """Sample pairs and let `tasks.prefer` label them → paths of pairs.jsonl and pairs_heldout.jsonl.

    The SFT model writes two responses to each prompt. Training labels are noisy (cfg.tau), held-out labels
    are the exact order of gold; gold is used nowhere else in training. Fewer pairs with the same seed are the
    first of many, so that all stages see the same labels.
    """
    train_path = f"{cfg.out}/pairs.jsonl"
    test_path = f"{cfg.out}/pairs_heldout.jsonl"
    if cfg.resume:
        exist = os.path.exists(train_path) and os.path.exists(test_path)
        if dist.gather(exist)[0]:  # all processes go by the first one's answer
            return train_path, test_path
    train = draw_pairs(cfg, task, model, tok, "train", cfg.pairs, cfg.tau)
    write_first(train_path, train)
    test = draw_pairs(cfg, task, model, tok, "test", HELD_OUT_PAIRS, 0.0)
    write_first(test_path, test)
    return train_path, test_path


def draw_pairs(cfg, task, model, tok, split, n, tau):
    """Label two samples to each of n prompts, with noise tau → rows; equal pairs are left out."""
    prompts = [row["prompt"] for row in task.prompts(split, n, cfg.seed)]
    seed = derive_seed(cfg.seed, "pairs", split)
    _, texts = generate.respond(model, tok, prompts, 2, task.max_new_tokens, seed=seed)
    rng = random.Random(seed)
    rows = []
    for prompt, a, b in zip(prompts, texts[::2], texts[1::2]):
        if a == b:
            continue
        if tau == 0 and tasks.gold(prompt, a) == tasks.gold(prompt, b):
            continue
        chosen, rejected = tasks.prefer(prompt, a, b, rng, tau)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_first(path, rows):
    """`write_jsonl` by the first process; the other processes wait until the file is there."""
    if dist.rank() == 0:
        write_jsonl(path, rows)
    dist.wait()


def load_rows(cfg, task, policy, tok, unpaired=False):
    """→ training rows, held-out rows: of --data, split by their prompts, or of pairs that are made here."""
    if cfg.data:
        kind = "kto" if unpaired else "pairs"
        rows = read_rows(cfg.data, kind, skip_bad=cfg.skip_bad_rows)
        return split_by_hash(rows)
    train_path, test_path = make_pairs(cfg, task, policy, tok)
    return read_jsonl(train_path, KEYS), read_jsonl(test_path, KEYS)


def encode_pairs(rows, tok, max_len, split):
    """Rows of pairs → [(prompt ids, chosen ids + EOS, rejected ids + EOS)].

    Pairs of equal responses, and pairs longer than max_len tokens, are dropped and counted. split: the word
    for these rows in the message, such as "training". UserError if more than half have equal responses.
    """
    pairs = []
    same = 0
    long = 0
    for row in rows:
        at = row.get("_at", "")
        chosen = encode_pair(tok, row["prompt"], row["chosen"], max_len, at)
        rejected = encode_pair(tok, row["prompt"], row["rejected"], max_len, at)
        if row["chosen"] == row["rejected"]:
            same += 1
        elif chosen is None or rejected is None:
            long += 1
        else:
            pairs.append((*chosen, rejected[1]))
    equal = f"{same} of {len(rows)} {split} pairs have equal responses, more than half"
    require(2 * same <= len(rows), f"{equal}: there is too little to learn")
    if same or long:
        dropped = f"dropped {same + long} of {len(rows)} {split} pairs: {same} with equal responses"
        print(f"{dropped}, {long} longer than the context of {max_len} tokens")
    return pairs


def require_both(cfg, train, test):
    left = f"{len(train)} training and {len(test)} held-out pairs are left"
    require(train and test, f"--data {cfg.data}: {left}, both are needed (15% of the prompts are held out)")


# ------------------------------------------------------------------------------------------------------------
# what DPO and KTO train on


class Example(NamedTuple):
    """A prompt and two responses, as ids with EOS: chosen and rejected.

    With KTO: a response, and a mismatched one, written to another prompt, from which z0 is estimated.
    """

    prompt: list[int]
    first: list[int]
    second: list[int]
    liked: bool = True  # KTO: whether `first` is a good response


def to_examples(pairs, kto, max_len):
    """[(prompt, chosen, rejected)] or, with kto, also [(prompt, response, liked)] → Examples; all as ids.

    KTO makes two examples of a pair. The mismatched response of an example stands half the data away, since
    in neighbouring rows it would answer the same prompt. It is always the same one, so that one pass of the
    reference is enough, and it is cut where it exceeds the context.

    >>> to_examples([([1], [2, 0], True), ([3], [4, 0], False)], True, max_len=9)[0]
    Example(prompt=[1], first=[2, 0], second=[4, 0], liked=True)
    """
    if not kto:
        return [Example(prompt, chosen, rejected) for prompt, chosen, rejected in pairs]
    rows = []
    for prompt, response, other in pairs:
        if isinstance(other, bool):
            rows.append((prompt, response, other))
        else:
            rows.append((prompt, response, True))
            rows.append((prompt, other, False))
    half = len(rows) // 2
    far = rows[half:] + rows[:half]
    examples = []
    for (prompt, response, liked), (_, mismatched, _) in zip(rows, far):
        room = max_len - len(prompt)
        examples.append(Example(prompt, response, mismatched[:room], liked))
    return examples


def encode_examples(rows, tok, kto, max_len, split):
    """Rows of a file → Examples; those that cannot be used are dropped and counted, as in `encode_pairs`."""
    if not rows or "chosen" in rows[0]:
        pairs = encode_pairs(rows, tok, max_len, split)
        return to_examples(pairs, kto, max_len)
    labelled = []
    for row in rows:
        pair = encode_pair(tok, row["prompt"], row["completion"], max_len, row["_at"])
        if pair is not None:
            labelled.append((*pair, row["label"]))
    dropped = len(rows) - len(labelled)
    if dropped:
        count = f"{dropped} of {len(rows)} {split} responses"
        print(f"dropped {count}: longer than the context of {max_len} tokens")
    return to_examples(labelled, kto, max_len)


def load_examples(cfg, task, policy, tok, kto):
    """→ training Examples, held-out Examples, training rows, held-out rows.

    The rows are for sampling: only those whose prompts leave room for cfg.max_new_tokens.
    """
    max_len = policy.cfg.max_len
    train_rows, test_rows = load_rows(cfg, task, policy, tok, unpaired=kto)
    train = encode_examples(train_rows, tok, kto, max_len, "training")
    test = encode_examples(test_rows, tok, kto, max_len, "held-out")
    require_both(cfg, train, test)
    room = max_len - cfg.max_new_tokens

    def fits(row):
        return len(tok.encode_prompt(row["prompt"])) <= room

    train_rows = [row for row in train_rows if fits(row)]
    test_rows = [row for row in test_rows if fits(row)]
    none_left = f"every prompt is longer than {room} tokens (the context less --max_new_tokens)"
    require(train_rows and test_rows, none_left)
    return train, test, train_rows, test_rows[: cfg.eval_prompts]


def load_data(cfg, policy, tok, rewards):
    """DPO's data → labelled Examples, held-out Examples, training rows and held-out rows to sample for.

    There are no Examples where a reward judges samples from the start.
    """
    task = tasks.get(cfg.task)
    if cfg.uses_labels:
        return load_examples(cfg, task, policy, tok, cfg.loss == "kto")
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len, cfg.max_new_tokens, rewards)
    return [], [], rows, test_rows


def padded_lengths(examples):
    """Tokens that each example takes in a padded batch: two rows, as long as the longer response → (N,).

    >>> padded_lengths([Example([1], [2, 0], [3, 0]), Example([1], [2, 2, 2, 0], [3, 0])])
    tensor([ 6, 10])
    """
    longest = [len(e.prompt) + max(len(e.first), len(e.second)) for e in examples]
    return 2 * torch.tensor(longest, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------------
# the pairs of DPO's online rounds, kept in files for a run that is resumed


def write_round(cfg, number, rows):
    """Write the rows of a round. A round that found none takes those of the round before once more.

    UserError for the first round that samples: with labelled pairs that is number 1.
    """
    if not rows:
        first = 1 if cfg.uses_labels else 0
        tie = "all samples of every prompt scored the same: no pair to learn from"
        require(number > first, f"--online: {tie}")
        rows = read_jsonl(round_path(cfg, number - 1), KEYS)
    write_first(round_path(cfg, number), rows)


def read_round(cfg, number, max_len):
    """→ Examples of a round, by the ids that were sampled."""
    ids = [row["ids"] for row in read_jsonl(round_path(cfg, number), KEYS)]
    return to_examples(ids, cfg.loss == "kto", max_len)


def round_path(cfg, number):
    return f"{cfg.out}/pairs-round-{number}.jsonl"
