"""Text → number: the score of a response, by a reward function or a reward model. And the prompts.

Shared by the RL trainers: none of this may move a learning curve, or turn one algorithm into another.
"""

import torch
from tqdm import tqdm

from nanorlhf import generate
from nanorlhf.data import fill_rows, load_split
from nanorlhf.errors import RunError, blame, derive_seed, require
from nanorlhf.metrics import sample_figures
from nanorlhf.run.defaults import HELD_OUT, response_limit
from nanorlhf.run.device import at_work

LARGEST = 1e15  # of a reward. PPO's value loss adds up squares in fp32, which holds 10^8 of 1e15² = 1e30
SCORE_TOKENS = 1 << 14  # padded tokens that a reward model scores at once, to bound memory


@torch.no_grad()
def score_responses(roll, rm, rewards):
    """Rollout of B rows → score (B,) of each response.

    The reward model `rm` at the last token (EOS, detail 12 of N+), or the product over the steps where it
    judges steps. Where rm is None, the weighted sum of the reward functions, which see the texts and the rows
    of the rollout; then roll.reward_parts receives what each gave, (B, functions). RunError for a score that
    is not finite, or above LARGEST.
    """
    B, T = roll.tokens.shape
    if rm is None:
        functions = rewards.functions

        def call(index):
            samples = index.tolist()
            texts = [roll.texts[i] for i in samples]
            rows = [roll.rows[i] for i in samples]
            columns = [rewards.values(i, texts, rows) for i in range(len(functions))]
            return torch.tensor(columns).T

        values = torch.zeros(B, len(functions))  # on the CPU
        fill_rows(values, torch.ones(B), 0, call)
        roll.reward_parts = values.to(roll.tokens.device)
        name = " + ".join(f"{function.weight:g} × {function.name}" for function in functions)
        score = torch.zeros_like(roll.logp[:, 0])
        for function, part in zip(functions, roll.reward_parts.unbind(1)):
            score += function.weight * part
    else:

        def compute(rows):
            return rm.scores(roll.tokens[rows], roll.lengths[rows], roll.mask[rows])

        name = "the reward model"
        padded = torch.full((B,), T)  # tokens of each row
        with at_work(rm):
            score = fill_rows(roll.logp.new_zeros(B), padded, SCORE_TOKENS, compute, rm.values)  # detail 13
    # NaN would spoil every weight, or pass for a group whose rewards are all equal, and train nothing
    for i in (~(score.abs() <= LARGEST)).nonzero().flatten().tolist():
        sample = f"prompt {roll.rows[i]['prompt']!r:.150}, response {roll.texts[i]!r:.150}"
        raise RunError(f"{name}: a reward of {score[i].item():g} ({sample}); it must be within ±{LARGEST:g}")
    return score


def unit_of(x):
    """A power of two that x can be divided by, exactly, so that its squares do not overflow; 1 below 1e15.

    RunError if x is not finite: NaN is not above itself, and its group would pass for a dead one.

    >>> unit_of(torch.tensor([3.0, -5.0])), unit_of(torch.tensor([2.0**100, 1.0])) == 2.0**100
    (tensor(1.), tensor(True))
    """
    largest = x.abs().max()
    if not largest.isfinite():
        raise RunError("a reward, or the KL in it, is not finite; is the reference (--ref) whole?")
    return torch.where(largest < 1e15, 1.0, largest.log2().floor().exp2())


def gate_problem(policy, tok, task, limit, seed):
    """Why 256 held-out samples of the policy hold nothing that RL could select; None if they do."""
    seed = derive_seed(seed, "gate")
    rows = task.prompts("test", 256, seed)
    prompts = [row["prompt"] for row in rows]
    _, texts = generate.respond(policy, tok, prompts, 1, limit, seed=seed)
    return task.gate(prompts, texts)


def pass_gate(policy, tok, task, limit, seed):
    """UserError with the `gate_problem`, if there is one: RL would be in vain."""
    problem = gate_problem(policy, tok, task, limit, seed)
    require(problem is None, problem)


def evaluate(policy, tok, rows, score, temperature, seed, limit, record=None):
    """Mean score on held-out prompts, printed, and → {"eval/reward": sampled, "eval/greedy": greedy}.

    score(roll) → (B,); temperature: of the sampled ones; limit: longest response in tokens. The first
    rollout of the sampled ones goes to record(roll, score).
    """
    seed = derive_seed(seed, "eval")
    out = {}
    for name, heat in (("eval/reward", temperature), ("eval/greedy", 0.0)):
        rolls = generate.sample_in_batches(policy, tok, rows, 1, limit, heat, seed)
        scores = [score(roll) for roll in rolls]
        if record and heat:
            record(rolls[0], scores[0])
        out[name] = torch.cat(scores).mean().item()
    means = f"sampled {out['eval/reward']:.3f}, greedy {out['eval/greedy']:.3f}"
    tqdm.write(f"held out ({len(rows)} prompts): {means}")
    return out


@torch.no_grad()
def fresh_samples(policy, ref, tok, rows, max_new_tokens, seed, budget=8192):
    """One response to each row's prompt → rollout with texts and rows, {"kl", "entropy", "len", "stop"}.

    kl is the mean over samples of Σ_t (logp − ref_logp): nats per sequence, KL(policy‖ref). It may be a
    little negative where the two are near, because it is an estimate.
    """
    seed = derive_seed(seed, "eval")
    (roll,) = generate.sample_in_batches(policy, tok, rows, 1, max_new_tokens, 1.0, seed, batch=len(rows))
    ref_logp = roll.logp_under(ref, 1.0, budget)  # (B, T)
    kl = (roll.logp - ref_logp).sum(1)  # (B,)

    def entropies(tokens, mask):
        return policy.logprobs(tokens, mask)[1]

    entropy = roll.per_token(entropies, budget)  # (B, T)
    metrics = {
        "kl": kl.mean().item(),
        "entropy": (entropy.sum() / roll.mask.sum()).item(),
    }
    return roll, metrics | sample_figures(roll, 1)


def load_prompts(cfg, task, tok, max_len, limit, rewards):
    """→ training rows, held-out rows; each row gets "_ids", its prompt as tokens.

    Prompts without room for a response of `limit` tokens are dropped, and counted. A row that lacks what one
    of the rewards needs, such as an answer that it can read, is a bad row: found in mid-run, it would end the
    run.
    """
    if cfg.data:
        judged = getattr(cfg, "rm", "")  # by a model, which takes any row
        train, test = load_split(cfg, "prompts", None if judged else rewards.check)
    else:
        train = task.prompts("train", 3000, cfg.seed)
        test = task.prompts("test", cfg.eval_prompts, cfg.seed)
    rows = train + test
    for row in rows:
        with blame(row.get("_at", "--task")):  # for a character that this model has no token for
            if not cfg.data:
                rewards.check(row)
            row["_ids"] = tok.encode_prompt(row["prompt"])
    if limit is None:
        limit = response_limit(max(len(row["_ids"]) for row in rows), max_len, cfg.data, rows, tok)
        cfg.fill_limit(limit)
    room = max_len - limit
    train = [row for row in train if len(row["_ids"]) <= room]  # detail 2: N+ truncates
    test = [row for row in test if len(row["_ids"]) <= room]
    n_long = len(rows) - len(train) - len(test)
    why = f"longer than {room} tokens (the context of {max_len} less --max_new_tokens {limit})"
    dropped = f"{n_long} of {len(rows)} prompts are {why}"
    held_out = f"{len(test)} are held out"
    require(train, f"{cfg.data or task.name}: no training prompt is left: {dropped}, {held_out}")
    if n_long:
        print(f"{dropped}; dropped")
    if cfg.own_data:
        cfg.fill_steps(train)
        if cfg.eval_prompts is None:
            cfg.eval_prompts = len(test) if cfg.eval_data else min(len(test), HELD_OUT)
    if cfg.data and 0 < cfg.eval_prompts < len(test):
        print(f"held out: the first {cfg.eval_prompts} of {len(test)} prompts are used (--eval_prompts)")
    return train, test[: cfg.eval_prompts]
