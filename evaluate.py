"""What a checkpoint is worth: pass@k, maj@k, mean reward, win rate, KL, accuracy on preference pairs.

    python evaluate.py --task chain --model runs/chain-ppo/model --n 16 --k 1,4,16
    python evaluate.py --model runs/reviews-dpo/model --ref runs/reviews-sft/model \\
                       --rm runs/reviews-rm/model --pairs runs/reviews-dpo/pairs_heldout.jsonl
    python evaluate.py --probe --model models/SmolLM2-135M-Instruct --data sums.jsonl \\
                       --reward nanorlhf/answers.py:last_number --n 8 --max_new_tokens 16
    evaluate.evaluate(evaluate.Config(model=..., data="test.jsonl", reward=[score])) in Python

    pass@k   1 − C(n−c, k) / C(n, k), c of n samples right: unbiased; 1 − (1 − c/n)^k is not (2107.03374)
    maj@k    the mean reward of the most frequent answer among k of the n samples, over all ways to choose the
             k and to break ties
    win      share of samples that score higher than the reference's on the same prompt; ties count half
    kl       KL(model‖ref), nats per sequence: by k1 = Σ log π − log π_ref on the model's own samples, and
             exactly over the vocabulary at each of their tokens, which has the same mean and less noise
    pairs    share of pairs in order, by the reward model (rm_acc) and by DPO's own reward
             log π_model − log π_ref (implicit_acc); ties count half
    --probe  before RL: greedy, the share of greedy answers that are right; dead, the share of prompts whose n
             samples all score the same, from which GRPO learns nothing; five samples; whether RL can begin

`±` is the standard error over prompts: samples of one prompt are not independent. A win rate judged by the
reward model that a policy was trained on is no evidence. Judges like long answers: compare the lengths too.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, field

import torch

from nanorlhf import generate, tasks
from nanorlhf.data import microbatches, pad_responses
from nanorlhf.errors import blame, derive_seed, require, shown
from nanorlhf.hub.formats import read_rows
from nanorlhf.kernels import linear_kl
from nanorlhf.metrics import maj_at_k, mean_se, pass_at_k
from nanorlhf.pairs import encode_pairs
from nanorlhf.rewards import score_responses
from nanorlhf.rollout import Rollout
from nanorlhf.run.cli import Machine, check_ranges, run_cli
from nanorlhf.run.defaults import response_limit
from nanorlhf.run.device import setup, to_device
from nanorlhf.run.models import load_model
from nanorlhf.run.worker import rewards_of
from nanorlhf.tokenizer import Chat

TOKENS = 4096  # padded tokens that a model reads at once
ANSWER = {"chain": r"\|([0-9])$"}  # what votes in maj@k: the digit, with or without a thought before it


@dataclass
class Config(Machine):
    # data
    model: str = "runs/reviews-sft/model"  # model folder
    ref: str = ""  # a second model folder: win rate and KL
    task: str = "reviews"  # built-in task: reviews, chain or countdown; held-out prompts and the reward
    data: str = ""  # file of prompts (formats: docs/data.md), all of which are used
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    rm: str = ""  # reward model folder, in place of a reward function
    pairs: str = ""  # JSONL of preference pairs, for the accuracy of --rm and of the model's own reward
    prompts: int = 0  # prompts at most; 0: all of --data, 256 of a built-in task, with --probe 64

    # sampling
    n: int = 16  # samples per prompt
    max_new_tokens: int = 0  # response length at most, EOS included; 0: what the task, or --data, needs
    temperature: float = 1.0  # of sampling
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this probability

    # evaluation
    probe: bool = False  # before RL: can it begin here? Five samples and one sentence
    k: list[int] = field(default_factory=lambda: [1, 4, 8, 16])  # which k of pass@k and maj@k, up to n
    right: float = 0.5  # a sample whose reward is above it is right, for pass@k
    answer: str = ""  # regular expression; its last group votes in maj@k. Empty: the task's own, or all text

    # run
    out: str = ""  # JSON file to write the figures to

    def __post_init__(self):
        if not self.data:
            self.max_new_tokens = self.max_new_tokens or tasks.get(self.task).max_new_tokens
        check_ranges(self, ("n", "k", "top_p"), any_sign=("seed", "right"))
        if self.probe:
            self.prompts = self.prompts or 64
            require(not self.rm, "--probe: counts right samples, which --rm does not know; give --reward")
            differ = self.n > 1 and self.temperature > 0
            require(differ, "--probe: needs --n 2 or more samples per prompt, at a --temperature above 0")
        require(min(self.k) <= self.n, f"--k {min(self.k)}: must not be above --n {self.n}")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        judge = self.rm or self.ref
        require(judge or not self.pairs, "--pairs: give --rm or --ref, whose accuracy it measures")
        folder = os.path.dirname(self.out) or "."
        require(os.path.isdir(folder), f"--out {self.out}: there is no folder {folder}")
        plain = os.path.isfile(self.out) or not os.path.exists(self.out)
        require(plain, f"--out {self.out}: is no file")  # a pipe would be waited for
        broken = re.error, OverflowError, RecursionError
        with blame(f"--answer {self.answer}: not a regular expression", *broken):
            re.compile(self.answer)


def voted(text, pattern):
    """What a response votes for: the last group of the pattern, or the whole text without a match.

    >>> voted("<652633>|3", "[|]([0-9])$"), voted(" so what ", "[|]([0-9])$")
    ('3', 'so what')
    """
    found = re.search(pattern, text) if pattern else None
    return found[found.re.groups] if found else text.strip()


def wins(score, other):
    """1 where a score is higher than the other, 0.5 where they tie, 0 elsewhere."""
    return (score > other).float() + 0.5 * (score == other).float()


def win_rate(score, other):
    """Scores (P, n) of two models on the same prompts → share of wins, all samples against all; its s.e."""
    pairwise = wins(score[:, :, None], other[:, None, :])  # (P, n, n)
    return mean_se(pairwise)


@torch.no_grad()
def kl_per_token(model, other, tokens, mask, temperature=1.0):
    """Exact KL(model‖other) over the vocabulary at each sampled token (B, T), 0 outside the mask."""
    hidden = model.hidden_before(tokens, mask)
    other_hidden = other.hidden_before(tokens, mask)
    kl = linear_kl(hidden, model.unembedding, other_hidden, other.unembedding, temperature)
    out = torch.zeros(mask.shape, device=kl.device)
    out[mask] = kl
    return out


@torch.no_grad()
def pairs_accuracy(pairs, device, score):
    """Share of pairs that a score puts in order, ties half → mean, s.e.

    pairs   [(prompt, chosen, rejected)] as ids
    score   tokens (B, T), lengths (B,), mask (B, T) → (B,)
    """
    right = torch.zeros(len(pairs))
    longest = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
    for batch in microbatches(longest, TOKENS):
        rows = []
        for i in batch:
            prompt, chosen, rejected = pairs[i]
            rows += [(prompt, chosen), (prompt, rejected)]
        tokens, lengths, mask = pad_responses(rows, device)
        scores = score(tokens, lengths, mask)
        require(scores.isfinite().all(), "--pairs: the model gives scores that are not finite")
        chosen_score, rejected_score = scores.view(-1, 2).unbind(1)
        right[batch] = wins(chosen_score, rejected_score).cpu()
    return mean_se(right)


def load_rows(cfg, task, tok, max_len, rewards):
    """The prompts to respond to: those of --data, or held-out ones of the task; says how many."""
    if cfg.data:
        rows = read_rows(cfg.data, "prompts", check=rewards.check)
        chosen = rows[: cfg.prompts or None]
        longest = 0
        for row in chosen:
            with blame(row["_at"]):
                n = len(tok.encode_prompt(row["prompt"]))
                room = f"a prompt of {n} tokens leaves no room for --max_new_tokens {cfg.max_new_tokens}"
                require(n + cfg.max_new_tokens <= max_len, f"{room} in the context of {max_len}")
            longest = max(longest, n)
        if not cfg.max_new_tokens:
            cfg.max_new_tokens = response_limit(longest, max_len, cfg.data, chosen, tok)
        print(f"{len(chosen)} of the {len(rows)} prompts of {cfg.data} are scored, {cfg.n} samples of each")
        return chosen
    rows = task.prompts("test", cfg.prompts or 256, cfg.seed)
    print(f"{len(rows)} held-out prompts of --task {cfg.task} are scored, {cfg.n} samples of each")
    for row in rows:
        with blame("--task"):
            rewards.check(row)
    return rows


def answer_figures(texts, score, cfg):
    """Texts, scores (P, n) → {"pass@k": (mean, s.e.), "maj@k": ...}."""
    n = cfg.n
    pattern = cfg.answer or ANSWER.get(cfg.task)
    votes = [voted(text, pattern) for text in texts]
    right = (score > cfg.right).sum(1).tolist()
    figures = {}
    for k in cfg.k:
        if k > n:
            continue
        passed = [pass_at_k(n, c, k) for c in right]
        majority = []
        for i, rewards in enumerate(score.tolist()):
            answers = votes[i * n : (i + 1) * n]
            majority.append(maj_at_k(answers, rewards, k))
        figures[f"pass@{k}"] = mean_se(torch.tensor(passed))
        figures[f"maj@{k}"] = mean_se(torch.tensor(majority))
    return figures


def kl_figures(model, other, roll, cfg):
    """KL(model‖other) on the model's own samples → {"kl_k1", "kl", "kl_per_token": (mean, s.e.)}."""

    def exact(tokens, mask):
        return kl_per_token(model, other, tokens, mask, cfg.temperature)

    kl = roll.per_token(exact, TOKENS)  # (B, T)
    k1 = roll.logp - roll.logp_under(other, cfg.temperature, TOKENS)
    per_token = kl.sum() / roll.mask.sum()
    return {
        "kl_k1": mean_se(k1.sum(1).view(-1, cfg.n)),
        "kl": mean_se(kl.sum(1).view(-1, cfg.n)),
        "kl_per_token": (per_token.item(), math.nan),
    }


def pair_figures(model, other, rm, tok, cfg):
    """Accuracy on the pairs of --pairs → {"rm_acc", "implicit_acc": (mean, s.e.)}."""
    rows = read_rows(cfg.pairs, "pairs", "--pairs")
    pairs = encode_pairs(rows, tok, model.cfg.max_len, "given")
    require(pairs, f"--pairs {cfg.pairs}: no usable pair is left")

    def implicit(tokens, lengths, mask):
        logp = model.logprobs(tokens, mask)[0]
        return (logp - other.logprobs(tokens, mask)[0]).sum(1)

    figures = {}
    if rm:
        figures["rm_acc"] = pairs_accuracy(pairs, model.device, rm.scores)
    if other:
        figures["implicit_acc"] = pairs_accuracy(pairs, model.device, implicit)
    return figures


def probe_figures(model, tok, rows, roll, rewards, cfg):
    """Print the first sample of five prompts → what --probe adds, {"greedy", "dead": (mean, s.e.)}."""
    for i in range(0, len(roll), cfg.n)[:5]:
        prompt = roll.rows[i]["prompt"]
        if isinstance(prompt, Chat):
            prompt = prompt.messages[-1]["content"]
        print(f"  {shown(prompt, 60)} → {shown(roll.texts[i], 60)}   reward {roll.reward[i]:g}")
    greedy = generate.sample_in_batches(model, tok, rows, 1, cfg.max_new_tokens, temperature=0.0)
    right = torch.cat([score_responses(each, None, rewards) for each in greedy]) > cfg.right
    groups = roll.reward.view(-1, cfg.n)
    dead = groups.amax(1) == groups.amin(1)
    return {"greedy": mean_se(right), "dead": mean_se(dead)}


def can_begin(right, dead):
    """Shares of right samples and of dead groups → one sentence: whether RL can begin."""
    if right == 0 and dead == 1:
        advice = "RL cannot begin, nothing is right: take easier prompts, or SFT first"
    elif right >= 0.9:
        advice = "RL has nothing to teach here: take harder prompts"
    elif dead > 0.8:
        advice = "RL can hardly begin, samples of a prompt rarely differ: take other prompts, or SFT first"
    elif right < 0.1:
        advice = "RL can begin, slowly: 0.1 to 0.5 right is better, by easier prompts or SFT first"
    elif right <= 0.5:
        advice = "RL can begin, from a good place"
    else:
        advice = "RL can begin; more than half is right already"
    return f"{right:.0%} of the samples are right, {dead:.0%} of the groups are dead: {advice}"


@torch.no_grad()
def evaluate(cfg):
    """Measure what the flags ask for, print it, write it to --out → {name: mean, name_se: s.e.}."""
    device = setup(cfg)
    task = tasks.get(cfg.task)
    model, tok = load_model("--model", cfg.model, "language model")
    other = rm = None
    if cfg.ref:
        other = load_model("--ref", cfg.ref, "language model", tok)[0]
    if cfg.rm:
        rm = load_model("--rm", cfg.rm, "reward model", tok)[0]
    to_device(cfg, device, model, other, rm)
    rewards = rewards_of(task, cfg.reward)
    has_score = bool(rm or rewards.functions)
    require(has_score or other, "nothing to measure by: give --rm, --reward or --ref")
    require(has_score or not cfg.probe, "--probe: give --reward, which says what is right")
    rows = load_rows(cfg, task, tok, model.cfg.max_len, rewards)

    figures = {}  # name → (mean, s.e.)
    scores = {}
    policies = {"": model, "ref_": other} if other else {"": model}
    for name, policy in policies.items():
        rolls = generate.sample_in_batches(
            policy,
            tok,
            rows,
            cfg.n,
            cfg.max_new_tokens,
            cfg.temperature,
            seed=derive_seed(cfg.seed, "evaluate", name),
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )
        if has_score:
            for roll in rolls:
                roll.reward = score_responses(roll, rm, rewards)
        roll = Rollout.cat(rolls)
        if has_score:
            scores[name] = roll.reward.view(-1, cfg.n)
            figures[f"{name}reward"] = mean_se(scores[name])
        figures[f"{name}len"] = mean_se(roll.response_len.view(-1, cfg.n))
        figures[f"{name}stop"] = mean_se(roll.finished.view(-1, cfg.n))
        if rewards.functions and not rm:  # a function says what is right; no score of a reward model does
            for figure, value in answer_figures(roll.texts, scores[name], cfg).items():
                figures[name + figure] = value
        if cfg.probe and policy is model:
            figures |= probe_figures(model, tok, rows, roll, rewards, cfg)
        unfiltered = cfg.temperature > 0 and cfg.top_k == 0 and cfg.top_p == 1
        if policy is model and other and unfiltered:
            figures |= kl_figures(model, other, roll, cfg)
    if has_score and other:
        figures["win"] = win_rate(scores[""], scores["ref_"])
    if cfg.pairs:
        figures |= pair_figures(model, other, rm, tok, cfg)
    flat = report(figures, cfg.out)
    if cfg.probe:
        right = (scores[""] > cfg.right).float().mean().item()
        print(can_begin(right, flat["dead"]))
    return flat


def report(figures, path):
    """Print {name: (mean, s.e.)} and write it to the path, if there is one → {name: mean, name_se: s.e.}."""
    flat = {}
    for name, (mean, se) in figures.items():
        flat[name] = mean
        line = f"{name:<16}{mean:10.4f}"
        if math.isfinite(se):
            line += f" ± {se:.4f}"
            flat[f"{name}_se"] = se
        print(line)
    if path:
        with blame(f"--out {path}", OSError), open(path, "w") as f:
            json.dump(flat, f, indent=2)
    return flat


if __name__ == "__main__":
    sys.exit(run_cli(Config, evaluate, __doc__))
