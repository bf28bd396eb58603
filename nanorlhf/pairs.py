"""Preferences for the reward model and for DPO: made here by a Bradley–Terry draw, or read from files.

What cannot be used is dropped and counted. Nothing here may move a learning curve.
"""

import os
import random
from typing import NamedTuple

import torch

from nanorlhf import generate, tasks
from nanorlhf.data import encode_pair, read_jsonl, split_by_hash, write_jsonl
from nanorlhf.errors import derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.rewards import load_prompts
from nanorlhf.run import dist

KEYS = ("prompt", "chosen", "rejected")


def make_pairs(cfg, task, model, tok):
    """Write pairs.jsonl (noisy labels) and pairs_heldout.jsonl (the exact order of gold) → paths.

    Two samples of the SFT model for each prompt, as a labelling team would be shown. Gold enters only here.
    Of one seed, fewer pairs are the first of many: all stages see the same labels.
    """
    paths = f"{cfg.out}/pairs.jsonl", f"{cfg.out}/pairs_heldout.jsonl"
    if cfg.resume and dist.gather(all(map(os.path.exists, paths)))[0]:  # as the first process sees it
        return paths
    for path, split, n, tau in ((paths[0], "train", cfg.pairs, cfg.tau), (paths[1], "test", 512, 0.0)):
        prompts = [r["prompt"] for r in task.prompts(split, n, cfg.seed)]
        seed = derive_seed(cfg.seed, "pairs", split)
        _, texts = generate.respond(model, tok, prompts, 2, task.max_new_tokens, seed=seed, desc="pairs")
        rng, rows = random.Random(seed), []
        for prompt, a, b in zip(prompts, texts[::2], texts[1::2]):
            if a != b and (tau > 0 or tasks.gold(prompt, a) != tasks.gold(prompt, b)):
                rows.append(dict(zip(KEYS, (prompt, *tasks.prefer(prompt, a, b, rng, tau)))))
        write_first(path, rows)
    return paths


def write_first(path, rows):
    """write_jsonl, of several processes by the first; the others wait until it is there."""
    if dist.rank() == 0:
        write_jsonl(path, rows)
    dist.wait()


def load_rows(cfg, task, policy, tok, unpaired=False):
    """→ training rows, held-out rows: of --data, split by their prompts, or the pairs that are made here."""
    if cfg.data:
        rows = read_rows(cfg.data, "kto" if unpaired else "pairs", skip_bad=cfg.skip_bad_rows)
        return split_by_hash(rows, tasks.held_out)
    return [read_jsonl(path, KEYS) for path in make_pairs(cfg, task, policy, tok)]


def encode_pairs(rows, tok, max_len, what):
    """Rows → (prompt ids, chosen ids + EOS, rejected ids + EOS); the unusable are dropped, and counted."""
    pairs, same, long = [], 0, 0
    for r in rows:
        sides = [encode_pair(tok, r["prompt"], r[key], max_len, r.get("_at", "")) for key in KEYS[1:]]
        if r["chosen"] == r["rejected"]:
            same += 1
        elif None in sides:
            long += 1
        else:
            pairs.append((sides[0][0], sides[0][1], sides[1][1]))
    equal = f"{same} of {len(rows)} {what} pairs have equal responses, more than half"
    require(2 * same <= len(rows), f"{equal}: there is too little to learn")
    if same or long:
        print(f"dropped {same + long} of {len(rows)} {what} pairs: {same} with equal responses, "
              f"{long} longer than the context of {max_len} tokens")
    return pairs


def require_both(cfg, train, test):
    left = f"{len(train)} training and {len(test)} held-out pairs are left"
    require(train and test, f"--data {cfg.data}: {left}, both are needed (15% of the prompts are held out)")


# ------------------------------------------------------------------------------------------------------------
# what DPO and KTO train on


class Example(NamedTuple):
    """A pair: chosen and rejected, ids with EOS. For KTO: a response, and one to another prompt, for z0."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    liked: bool = True


def to_examples(pairs, kto, max_len):
    """(prompt, chosen, rejected) ids, or (prompt, response, liked) → Examples. KTO takes pairs apart.

    Its mismatched response is the one half the data away, cut where it exceeds the context: in neighbouring
    rows it would answer the same prompt, and a fixed one needs only one pass of the reference.
    """
    if not kto:
        return [Example(*pair) for pair in pairs]
    rows = []
    for p, y, other in pairs:
        rows += [(p, y, other)] if isinstance(other, bool) else [(p, y, True), (p, other, False)]
    far = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
    return [Example(p, y, z[: max_len - len(p)], liked) for (p, y, liked), (_, z, _) in zip(rows, far)]


def encode_examples(rows, tok, kto, max_len, what):
    """Rows of a file → Examples; the unusable are dropped, and counted."""
    if not rows or "chosen" in rows[0]:
        return to_examples(encode_pairs(rows, tok, max_len, what), kto, max_len)
    ids = [encode_pair(tok, r["prompt"], r["completion"], max_len, r["_at"]) for r in rows]
    kept = [(*pair, r["label"]) for pair, r in zip(ids, rows) if pair]
    if len(kept) < len(rows):
        n = f"{len(rows) - len(kept)} of {len(rows)} {what} responses"
        print(f"dropped {n}: longer than the context of {max_len} tokens")
    return to_examples(kept, kto, max_len)


def load_examples(cfg, task, policy, tok, kto):
    """→ training and held-out Examples, and the rows of each whose prompts have room for a response."""
    max_len = policy.cfg.max_len
    rows = load_rows(cfg, task, policy, tok, unpaired=kto)
    train, test = (encode_examples(part, tok, kto, max_len, what)
                   for part, what in zip(rows, ("training", "held-out")))
    require_both(cfg, train, test)
    room = max_len - cfg.max_new_tokens
    fit = [[r for r in part if len(tok.encode_prompt(r["prompt"])) <= room] for part in rows]
    require(all(fit), f"every prompt is longer than {room} tokens (the context less --max_new_tokens)")
    return train, test, fit[0], fit[1][: cfg.eval_prompts]


def load_data(cfg, policy, tok):
    """DPO's data → labelled Examples, held-out Examples, training rows and held-out rows to sample for.

    There are no Examples where a reward judges samples from the start.
    """
    task = tasks.get(cfg.task)
    if cfg.uses_labels:
        return load_examples(cfg, task, policy, tok, cfg.loss == "kto")
    rows, test_rows = load_prompts(cfg, task, tok, policy.cfg.max_len)
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
