"""Scoring whole responses, by a reward function or a reward model, and the prompts to respond to.

Shared by the RL trainers: none of this may move a learning curve, or turn one algorithm into another.
"""

import torch

from nanorlhf import generate, tasks
from nanorlhf.data import split_by_hash
from nanorlhf.errors import blame, derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.run import dist
from nanorlhf.run.device import at_work
from nanorlhf.run.worker import load_reward, sum_rewards

SCORE_TOKENS = 1 << 14  # padded tokens that a reward model scores at once, to bound memory


def load_rewards(cfg):
    """The functions of --reward, else the task's own → [(name, weight, function)], called in this process."""
    return [load_reward(spec) for spec in cfg.reward] or [(cfg.task, 1.0, tasks.get(cfg.task).reward)]


@torch.no_grad()
def score_responses(roll, texts, rows, rm, rewards, parts=None):
    """Rollout of B rows, their texts and prompt rows → score (B,).

    The reward model `rm` at the last token (EOS, detail 12 of N+), or the product over the steps where it
    judges steps; where rm is None, the weighted sum of `rewards`, a list of (name, weight, function). The
    dict `parts` receives each alone: {name: (B,)}.
    """
    if rm is not None:
        size, score = max(1, SCORE_TOKENS // roll.tokens.shape[1]), roll.logp.new_zeros(len(roll.tokens))
        with at_work(rm):
            mine = dist.mine(roll.lengths)
            for mb in dist.paced(mine.split(size) if len(mine) else (), rm.values):
                score[mb] = rm.scores(roll.tokens[mb], roll.lengths[mb], roll.mask[mb])
        return dist.summed(score)  # detail 13: at no other position
    return sum_rewards(texts, rows, rewards, parts, roll.tokens.device)


def pass_gate(policy, tok, task, limit, seed):
    """UserError, saying why, if 256 held-out samples of the policy hold nothing that RL could select."""
    prompts = [row["prompt"] for row in task.prompts("test", 256, seed)]
    _, texts = generate.respond(policy, tok, prompts, 1, limit, seed=seed)
    why = task.gate(prompts, texts)
    require(why is None, why)


def evaluate(policy, tok, cfg, rows, rm, rewards, say=print, limit=None):
    """Mean score on held-out prompts → {"eval/reward": sampled, "eval/greedy": greedy}; may differ a lot.

    limit: tokens of a response at most, if not cfg.max_new_tokens.
    """
    out, limit = {}, limit or cfg.max_new_tokens
    for name, temperature in (("eval/reward", cfg.temperature), ("eval/greedy", 0.0)):
        prompts, seed = [r["prompt"] for r in rows], derive_seed(cfg.seed, "eval")
        rolls, texts = generate.respond(policy, tok, prompts, 1, limit, temperature, seed)
        if rm is None:
            score = sum_rewards(texts, rows, rewards)  # (N,)
        else:
            score = torch.cat([score_responses(roll, None, None, rm, rewards) for roll in rolls])
        out[name] = score.mean().item()
    say(f"held out ({len(rows)} prompts): sampled {out['eval/reward']:.3f}, greedy {out['eval/greedy']:.3f}")
    return out


def health(log_ratio, kl, adv, dead, stop, tokens, ref_is_init=True):
    """The first step's vital signs, in 80 columns (`dead` and `stop` stand in its row as well). A figure that
    is not as it must be is explained below.
    """
    kl_is = "no reference" if kl is None else f"KL {abs(kl):.6f}"
    line = f"health: ratio 1 ± {log_ratio:.0e} · {kl_is} · mean advantage {abs(adv):.3f} · {tokens} tokens"
    for bad, word in (
        (log_ratio > 1e-4, "ratio is not 1: sampling and scoring disagree"),
        (ref_is_init and kl is not None and abs(kl) > 1e-3, "KL is not 0: the reference is not the policy"),
        (abs(adv) > 0.1, "mean advantage is not near 0: rewards and groups do not belong together"),
        (dead > 0.8, "most groups are dead: there is little to learn from prompts so hard or so easy"),
        (stop < 0.5, "most responses are cut: raise --max_new_tokens"),
    ):
        line += f"\n  !! {word}" if bad else ""
    return line


def length_schedule(max_new_tokens, lengthen_at):
    """'24,40,64', '40,80' or '0.2' → limits [24, 40, 64]; steps [40, 80] or the truncation rate 0.2."""
    try:
        limits = [int(x) for x in str(max_new_tokens).split(",")]
    except ValueError:
        limits = []
    rising = bool(limits) and limits[0] > 0 and all(a < b for a, b in zip(limits, limits[1:]))
    require(rising, f"--max_new_tokens {max_new_tokens}: must be an integer, or rising ones such as 24,40,64")
    try:
        at = [float(x) for x in lengthen_at.split(",") if x]
        steps = [int(x) for x in at]
    except (ValueError, OverflowError):  # int(nan), int(inf)
        at, steps = [-1.0], [-1]
    if len(at) == 1 and 0 < at[0] < 1:
        return limits, at[0]
    want = f"{len(limits) - 1} rising steps, one for each lengthening, or a truncation rate such as 0.2"
    right = len(steps) == len(limits) - 1 and steps == at == sorted(set(at)) and min(steps, default=1) > 0
    require(right, f"--lengthen_at {lengthen_at!r}: must be {want}")
    return limits, steps


@torch.no_grad()
def fresh_samples(policy, ref, tok, rows, max_new_tokens, seed, budget=8192):
    """One response to each row's prompt → rollout, texts, {"kl", "entropy", "len", "stop"}.

    kl is the mean over samples of Σ_t (logp − ref_logp): nats per sequence, KL(policy‖ref). It may be a
    little negative where the two are near: it is an estimate.
    """
    prompts = [tok.encode_prompt(r["prompt"]) for r in rows]
    seed = derive_seed(seed, "eval")
    roll = generate.generate(policy, prompts, 1, max_new_tokens, 1.0, tok.eos_id, seed, pad_id=tok.pad_id)
    with at_work(ref):
        k1 = roll.logp - roll.per_token(lambda x, m: ref.logprobs(x, m)[0], budget)  # (B, T)
    entropy = roll.per_token(lambda x, m: policy.logprobs(x, m)[1], budget)  # (B, T)
    metrics = {
        "kl": k1.sum(1).mean().item(),
        "entropy": (entropy.sum() / roll.mask.sum()).item(),
        "len": roll.response_len.float().mean().item(),
        "stop": roll.finished.float().mean().item(),
    }
    return roll, [tok.decode(ids) for ids in roll.responses()], metrics


def load_prompts(cfg, task, tok, max_len, limit=None):
    """→ training rows, held-out rows. Prompts without room for a response are dropped, and counted.

    limit: tokens of a response at most, if not cfg.max_new_tokens.
    """
    limit = limit or cfg.max_new_tokens
    if cfg.data:
        rows = read_rows(cfg.data, "prompts", skip_bad=cfg.skip_bad_rows)
    else:
        rows = task.prompts("train", 3000, cfg.seed) + task.prompts("test", cfg.eval_prompts, cfg.seed)
    room = max_len - limit
    fit = [row for row in rows if _prompt_len(row, tok) <= room]  # detail 2: N+ truncates
    dropped, of = len(rows) - len(fit), f"--data {cfg.data}: " if cfg.data else ""
    train, test = split_by_hash(fit, tasks.held_out)
    why = f"longer than {room} tokens (the context of {max_len} less --max_new_tokens {limit})"
    long = f"{dropped} of {len(rows)} prompts are {why}"
    rest = f"{len(test)} are held out (15% of all prompts, by a hash)"
    left = ", ".join([long] * bool(dropped) + [rest] * bool(test))
    require(train, f"{of}no training prompt is left: {left}")
    if dropped:
        print(f"{of}{long}; dropped")
    return train, test[: cfg.eval_prompts]


def _prompt_len(row, tok):
    with blame(row.get("_at", "--task")):  # for a character that this model has no token for
        return len(tok.encode_prompt(row["prompt"]))
