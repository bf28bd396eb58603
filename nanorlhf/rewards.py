"""Scoring whole responses, by a reward function or a reward model, and the prompts to respond to.

Shared by the RL trainers: none of this may move a learning curve, or turn one algorithm into another.
"""

import math

import torch

from nanorlhf import generate, tasks
from nanorlhf.common import RunError, UserError, derive_seed, require
from nanorlhf.data import read_jsonl, split_by_hash

SCORE_TOKENS = 1 << 14  # padded tokens that a reward model scores at once, to bound memory


def call_reward(name, fn, prompt, text, row):
    """One call of a user's reward function → float; RunError naming the sample if that fails."""
    sample = f"(prompt {prompt!r}, response {text!r})"
    try:
        value = float(fn(prompt, text, row))
    except UserError as e:  # a built-in reward meets a prompt that is not of its task
        raise UserError(f"{row.get('_at', name)}: {e}") from None
    except (Exception, SystemExit) as e:
        raise RunError(f"reward {name} raised {type(e).__name__}: {e} {sample}") from e
    if not math.isfinite(value):
        raise RunError(f"reward {name} returned {value} {sample}; it must be finite")
    return value


@torch.no_grad()
def score_responses(roll, texts, rows, rm, rewards):
    """Rollout of B rows, their texts and prompt rows → score (B,).

    The reward model `rm` at the last token (EOS, detail 12 of N+); where rm is None, the weighted sum of
    `rewards`, a list of (name, weight, function).
    """
    if rm is not None:
        size = max(1, SCORE_TOKENS // roll.tokens.shape[1])  # rows at once
        parts = zip(roll.tokens.split(size), roll.lengths.split(size))
        return torch.cat([rm.rewards(*part) for part in parts])  # detail 13: at no other position
    score = [
        sum(weight * call_reward(name, fn, row["prompt"], text, row) for name, weight, fn in rewards)
        for text, row in zip(texts, rows, strict=True)
    ]
    return torch.tensor(score, device=roll.tokens.device)


def pass_gate(policy, tok, task, limit, seed):
    """UserError, saying why, if 256 held-out samples of the policy hold nothing that RL could select."""
    prompts = [row["prompt"] for row in task.prompts("test", 256, seed)]
    _, texts = generate.respond(policy, tok, prompts, 1, limit, seed=seed)
    why = task.gate(prompts, texts)
    require(why is None, why)


def evaluate(policy, tok, cfg, rows, rm, rewards, say=print):
    """Mean score on held-out prompts → {"eval/reward": sampled, "eval/greedy": greedy}; may differ a lot."""
    out = {}
    for name, temperature in (("eval/reward", cfg.temperature), ("eval/greedy", 0.0)):
        prompts, seed = [r["prompt"] for r in rows], derive_seed(cfg.seed, "eval")
        rolls, texts = generate.respond(policy, tok, prompts, 1, cfg.max_new_tokens, temperature, seed)
        scores, start = [], 0
        for roll in rolls:
            part = slice(start, start := start + len(roll.tokens))
            scores.append(score_responses(roll, texts[part], rows[part], rm, rewards))
        out[name] = torch.cat(scores).mean().item()
    say(f"held out ({len(rows)} prompts): sampled {out['eval/reward']:.3f}, greedy {out['eval/greedy']:.3f}")
    return out


def load_prompts(cfg, task, tok, max_len):
    """→ training rows, held-out rows. Prompts without room for a response are dropped, and counted."""
    if cfg.data:
        rows = read_jsonl(cfg.data, ("prompt",), nonempty=("prompt",))
    else:
        rows = task.prompts("train", 3000, cfg.seed) + task.prompts("test", cfg.eval_prompts, cfg.seed)
    room = max_len - cfg.max_new_tokens
    fit = [row for row in rows if _prompt_len(row, tok) <= room]  # detail 2: N+ truncates
    dropped, of = len(rows) - len(fit), f"--data {cfg.data}: " if cfg.data else ""
    train, test = split_by_hash(fit, tasks.held_out)
    why = f"longer than {room} tokens (the context of {max_len} less --max_new_tokens {cfg.max_new_tokens})"
    long = f"{dropped} of {len(rows)} prompts are {why}"
    rest = f"{len(test)} are held out (15% of all prompts, by a hash)"
    left = ", ".join([long] * bool(dropped) + [rest] * bool(test))
    require(train, f"{of}no training prompt is left: {left}")
    if dropped:
        print(f"{of}{long}; dropped")
    return train, test[: cfg.eval_prompts]


def _prompt_len(row, tok):
    try:
        return len(tok.encode(row["prompt"]))
    except UserError as e:  # a character that this model has no token for
        raise UserError(f"{row.get('_at', '--task')}: {e}") from None
