"""What a checkpoint is worth: pass@k, maj@k, mean reward, win rate, KL, accuracy on preference pairs.

    python evaluate.py --task chain --model runs/chain-ppo/model --n 16 --k 1,4,16
    python evaluate.py --model runs/reviews-dpo/model --against runs/reviews-sft/model \\
                       --rm runs/reviews-rm/model --pairs runs/reviews-dpo/pairs_heldout.jsonl

    pass@k   1 − C(n−c, k) / C(n, k), c of n samples right: unbiased; 1 − (1 − c/n)^k is not (2107.03374)
    maj@k    the mean reward of the answer most frequent among k of the n samples, over all ways to choose k
             and to break ties
    win      share of samples that score higher than the other model's on the same prompt; ties count half
    kl       KL(model‖against), nats per sequence: by k1 = Σ log π − log π' on the model's own samples, and
             exactly over the vocabulary at each of their tokens, which has the same mean and less noise
    pairs    share of pairs in order, by the reward model (rm_acc) and by DPO's own reward
             log π_model − log π_against (implicit_acc); ties count half

`±` is the standard error over prompts: samples of one prompt are not independent. A win rate judged by the
reward model that a policy was trained on is no evidence; lengths are reported, for judges like long answers.
"""

import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

from nanorlhf import generate, tasks
from nanorlhf.data import microbatches, pad, response_mask
from nanorlhf.errors import UserError, derive_seed, require
from nanorlhf.hub.formats import read_rows
from nanorlhf.kernels import linear_kl
from nanorlhf.metrics import maj_at_k, mean_se, pass_at_k
from nanorlhf.pairs import encode_pairs
from nanorlhf.rewards import score_responses
from nanorlhf.run import worker
from nanorlhf.run.cli import check_ranges, run_cli
from nanorlhf.run.device import setup, to_device
from nanorlhf.run.models import load_model

ANSWER = {"chain": r"\|([0-9])$"}  # what votes in maj@k: the digit, however it was found


@dataclass
class Config:
    model: str = "runs/reviews-sft/model"  # model folder
    against: str = ""  # a second model folder: win rate and KL
    task: str = "reviews"  # built-in task: reviews, chain or countdown; held-out prompts and the reward
    data: str = ""  # file of prompts (formats: nanorlhf/hub/formats.py); held-out ones, if any
    reward: list[str] = field(default_factory=list)  # path/to/file.py:name, or :name*0.2; repeatable, summed
    rm: str = ""  # reward model folder, in place of a reward function
    pairs: str = ""  # JSONL of preference pairs, for the accuracy of --rm and of the model's own reward
    n: int = 16  # samples per prompt
    k: str = "1,4,16"  # which k of pass@k and maj@k, up to n
    right: float = 0.5  # a sample whose reward is above it is right, for pass@k
    answer: str = ""  # regular expression; its last group votes in maj@k. Empty: the task's own, or all text
    prompts: int = 256  # prompts at most
    max_new_tokens: int = 0  # response length at most, EOS included; 0: what the task needs
    temperature: float = 1.0  # of sampling
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this probability
    seed: int = 0  # of sampling
    out: str = ""  # JSON file to write the figures to
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    threads: int = 0  # CPU threads; 0: one below a million parameters, else torch's own choice

    def __post_init__(self):
        self.max_new_tokens = self.max_new_tokens or tasks.get(self.task).max_new_tokens
        check_ranges(self, ("n", "prompts", "top_p"), any_sign=("seed", "right"))
        require(re.fullmatch(r"\d+(,\d+)*", self.k), f"--k {self.k}: must be numbers such as 1,4,16")
        ks = [int(k) for k in self.k.split(",")]
        require(min(ks) > 0 and min(ks) <= self.n, f"--k {self.k}: must lie between 1 and --n {self.n}")
        require(not (self.rm and self.reward), "--rm and --reward: give one of the two")
        judge = self.rm or self.against
        require(judge or not self.pairs, "--pairs: give --rm or --against, whose accuracy it measures")
        folder = os.path.dirname(self.out) or "."
        require(os.path.isdir(folder), f"--out {self.out}: there is no folder {folder}")
        try:
            re.compile(self.answer)
        except re.error as e:
            raise UserError(f"--answer {self.answer}: not a regular expression ({e})") from None
        require(self.top_p <= 1, f"--top_p {self.top_p}: must not be above 1")


def voted(text, pattern):
    """What a response votes for: the last group of the pattern; the whole text where that does not occur."""
    found = re.search(pattern, text) if pattern else None
    return found[found.re.groups] if found else text.strip()


def win_rate(mine, theirs):
    """Scores (P, n) of two models on the same prompts → every sample against every, ties half: mean, s.e."""
    a, b = mine[:, :, None], theirs[:, None, :]  # (P, n, n)
    return mean_se((a > b).double() + 0.5 * (a == b).double())


@torch.no_grad()
def kl_per_token(model, other, tokens, mask, temperature=1.0):
    """Exact KL(model‖other) over the vocabulary at each sampled token (B, T), 0 outside the mask."""
    keep = mask[:, 1:]
    hidden, ref = (m(tokens[:, :-1])[keep] for m in (model, other))  # hidden[t-1] predicts token t
    kl = linear_kl(hidden, model.unembedding, ref, other.unembedding, temperature)
    return torch.zeros(mask.shape, device=kl.device).index_put(mask.nonzero(as_tuple=True), kl)


@torch.no_grad()
def pairs_accuracy(pairs, tok, device, score):
    """(prompt, chosen, rejected) ids, score(tokens, lengths, mask) → share in order, ties half; its s.e."""
    order = torch.zeros(len(pairs))
    for mb in microbatches([len(p) + max(len(w), len(l)) for p, w, l in pairs], 4096):
        rows = [(pairs[i][0], y) for i in mb for y in pairs[i][1:]]
        tokens, lengths = pad([p + y for p, y in rows], tok.pad_id)
        mask = response_mask([len(p) for p, _ in rows], lengths, tokens.shape[1])
        found = score(*(t.to(device) for t in (tokens, lengths, mask))).view(-1, 2)
        order[mb] = ((found[:, 0] > found[:, 1]) + 0.5 * (found[:, 0] == found[:, 1])).float().cpu()
    return mean_se(order)


@torch.no_grad()
def main(cfg):
    """Measure what the flags ask for, print it, write it to --out → {name: mean, name_se: s.e.}."""
    device, task = setup(cfg), tasks.get(cfg.task)
    hint = f"python train_sft.py --task {cfg.task}"
    model, tok = load_model("--model", cfg.model, hint, "language model")
    other = load_model("--against", cfg.against, "", "language model", tok)[0] if cfg.against else None
    rm = load_model("--rm", cfg.rm, "", "reward model", tok)[0] if cfg.rm else None
    model, other, rm = to_device(cfg, device, model, other, rm)
    rewards = [worker.load_reward(spec) for spec in cfg.reward]
    rewards = rewards or ([(cfg.task, 1.0, task.reward)] if task.reward else [])
    scorer = bool(rm or rewards)
    require(scorer or other, "nothing to measure by: give --rm, --reward or --against")
    rows = read_rows(cfg.data, "prompts") if cfg.data else []
    kept = [row for row in rows if tasks.held_out(row["prompt"])]
    if rows and not kept:
        print(f"--data {cfg.data}: no prompt is held out (15% are, by a hash); all are used")
    rows = (kept or rows)[: cfg.prompts] or task.prompts("test", cfg.prompts, cfg.seed)

    out, score, P, n = {}, {}, len(rows), cfg.n
    for name, policy in (("", model), ("against_", other)):
        if policy is None:
            continue
        rolls, texts = generate.respond(
            policy, tok, [r["prompt"] for r in rows], n, cfg.max_new_tokens, cfg.temperature,
            derive_seed(cfg.seed, "evaluate", name), top_k=cfg.top_k, top_p=cfg.top_p, desc="sampling",
        )
        ends = list(itertools.accumulate(len(roll.tokens) for roll in rolls))
        parts = [slice(end - len(roll.tokens), end) for end, roll in zip(ends, rolls)]
        if scorer:
            asked = [row for row in rows for _ in range(n)]
            found = [score_responses(r, texts[i], asked[i], rm, rewards) for r, i in zip(rolls, parts)]
            score[name] = torch.cat(found).view(P, n)
            out[f"{name}reward"] = mean_se(score[name])
        out[f"{name}len"] = mean_se(torch.cat([roll.response_len for roll in rolls]).view(P, n))
        out[f"{name}stop"] = mean_se(torch.cat([roll.finished for roll in rolls]).view(P, n))
        if scorer and not rm:  # a function may say what is right; a reward model's score has no such line
            votes = [voted(text, cfg.answer or ANSWER.get(cfg.task)) for text in texts]
            for k in (k for k in map(int, cfg.k.split(",")) if k <= n):
                c = (score[name] > cfg.right).sum(1).tolist()
                out[f"{name}pass@{k}"] = mean_se(torch.tensor([pass_at_k(n, x, k) for x in c]))
                maj = [maj_at_k(votes[i * n : i * n + n], s, k) for i, s in enumerate(score[name].tolist())]
                out[f"{name}maj@{k}"] = mean_se(torch.tensor(maj))
        if policy is model and other and cfg.temperature and not cfg.top_k and cfg.top_p == 1:
            T = cfg.temperature
            k1 = [(r.logp - other.logprobs(r.tokens, r.mask, T)[0]).sum(1) for r in rolls]
            exact = [kl_per_token(model, other, r.tokens, r.mask, T) for r in rolls]
            out["kl_k1"] = mean_se(torch.cat(k1).view(P, n))
            out["kl"] = mean_se(torch.cat([x.sum(1) for x in exact]).view(P, n))
            per_token = sum(x.sum() for x in exact) / sum(r.mask.sum() for r in rolls)
            out["kl_per_token"] = per_token.item(), math.nan
    if scorer and other:
        out["win"] = win_rate(score[""], score["against_"])
    if cfg.pairs:
        pairs = encode_pairs(read_rows(cfg.pairs, "pairs", "--pairs"), tok, model.cfg.max_len, "given")
        require(pairs, f"--pairs {cfg.pairs}: no usable pair is left")
        if rm:
            out["rm_acc"] = pairs_accuracy(pairs, tok, device, rm.scores)
        if other:

            def implicit(x, length, mask):
                return (model.logprobs(x, mask)[0] - other.logprobs(x, mask)[0]).sum(1)

            out["implicit_acc"] = pairs_accuracy(pairs, tok, device, implicit)
    for name, (mean, se) in out.items():
        print(f"{name:<16}{mean:10.4f}" + (f" ± {se:.4f}" if math.isfinite(se) else ""))
    flat = {name: mean for name, (mean, _) in out.items()}
    flat |= {f"{name}_se": se for name, (_, se) in out.items() if math.isfinite(se)}
    if cfg.out:
        with open(f"{cfg.out}.tmp", "w") as f:
            json.dump(flat, f, indent=2)
        os.replace(f"{cfg.out}.tmp", cfg.out)
    return flat


if __name__ == "__main__":
    sys.exit(run_cli(Config, main, __doc__))
