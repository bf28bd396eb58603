"""Which optimum does each algorithm really reach? The trainers against exact enumeration.

    python bench/optimum.py                  five seeds, about 10 CPU minutes → bench/results/optimum.csv
    python bench/optimum.py --seeds 0,1      other seeds
    python bench/optimum.py --draw           docs/img/optimum.png from the CSV

A policy with 4 tokens and responses of at most 3 has 40 responses: nanorlhf.exact computes the optimum π* ∝
π_ref exp(r/β) of RLHF, and `Tree` the fixed points of the losses that lead elsewhere. Here every
algorithm is trained from π_ref until it settles, by the trainers' own train(), and KLs are sums over all
responses. docs/optimum.md explains the results; tests/test_optimum.py asserts them.
"""

import contextlib
import copy
import csv
import io
import json
import os
import sys
import tempfile
import time
from functools import partial

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CSV = os.path.join(ROOT, "bench", "results", "optimum.csv")
sys.path.insert(0, ROOT)

import train_distill  # noqa: E402
import train_grpo  # noqa: E402
import train_ppo  # noqa: E402
from labs.common import frontier  # noqa: E402
from nanorlhf import exact, hub  # noqa: E402
from nanorlhf.model import GPT, GPTConfig  # noqa: E402
from nanorlhf.tokenizer import Tokenizer  # noqa: E402
from train_dpo import preference_loss  # noqa: E402

TOK = Tokenizer.from_chars("ab")  # with EOS and pad four ids; the policy may sample pad like any other
PROMPT = "a"
LIMIT, BETA = 3, 1.0


class Tree(exact.Tree):
    """All responses, with what dynamic programming from the longest prefixes to the empty one needs.

    levels        one mask (S,) for each length: the prefixes of this length
    ends, follow  (S, V): whether token a after prefix s ends a response; the index of the response s + a
                  where it does, of the prefix s + a elsewhere
    """

    def __init__(self, vocab_size, max_new_tokens, eos_id):
        super().__init__(vocab_size, max_new_tokens, eos_id)
        responses = {y: i for i, y in enumerate(self.responses)}
        prefixes = {s: i for i, s in enumerate(self.prefixes)}
        longer = [(*s, a) for s in self.prefixes for a in range(vocab_size)]
        follow = [responses[s] if s in responses else prefixes[s] for s in longer]
        self.ends = torch.tensor([s in responses for s in longer]).view(-1, vocab_size)
        self.follow = torch.tensor(follow).view(-1, vocab_size)
        of_length = torch.tensor([len(s) for s in self.prefixes])
        self.levels = [of_length == length for length in range(max_new_tokens)]

    def from_logp(self, logp):
        """Log-probs of the responses (N,) → the policy (S, V): log π(a|s) = log P(s a …) − log P(s …)."""
        mass = torch.full(self.ends.shape, -torch.inf, dtype=logp.dtype)  # log P(s a …)
        for level in reversed(self.levels):  # the longest prefixes first
            prefix_mass = mass.logsumexp(-1)  # (S,)
            mass[level] = self._after(level, logp, prefix_mass)
        return mass - mass.logsumexp(-1, keepdim=True)

    def backward_induction(self, ref, reward, rule):
        """The policy (S, V) that is rule(ref, Q) at every prefix, where Q(s,a) = E_π[r | s,a] under itself.

        ref (S, V); reward (N,); rule takes log π_ref(·|s) and Q(s,·), (k, V) each, and gives log π(·|s), as
        `exact.optimum` does. The longest prefixes come first: there Q is the reward itself.
        """
        table = torch.empty_like(ref)
        value = torch.zeros(len(ref), dtype=ref.dtype)  # E_π[r | s]
        for level in reversed(self.levels):
            q = self._after(level, reward, value)
            logp = rule(ref[level], q)
            table[level] = logp
            value[level] = (logp.exp() * q).sum(-1)
        return table

    def _after(self, level, of_responses, of_prefixes):
        """Values of responses (N,) and of prefixes (S,) → (k, V): those of s + a for each s of a level."""
        ends = self.ends[level]
        follow = self.follow[level]
        out = torch.empty(ends.shape, dtype=of_prefixes.dtype)
        out[ends] = of_responses[follow[ends]]
        out[~ends] = of_prefixes[follow[~ends]]
        return out


TREE = Tree(TOK.vocab_size, LIMIT, TOK.eos_id)
TEXTS = [TOK.decode(y[:-1] if y[-1] == TOK.eos_id else y) for y in TREE.responses]  # all different

REWARD_FILE = "def reward(prompt, response, row):\n    return row['reward'][response]\n"


# The fixed points of other losses than RLHF's objective


def mean_std(logp, x):
    """Mean and standard deviation of x (N,) under the distribution with log-probs logp (N,)."""
    p = logp.exp()
    mean = (p * x).sum()
    variance = (p * (x - mean).square()).sum()
    return mean, variance.sqrt()


def reverse_kl_rule(ref, q, beta):
    """Maximise E[Q] − β KL(π‖π_ref) over π(·|s): π ∝ π_ref exp(Q/β). k2, k3 × ratio in the loss reach it."""
    return exact.optimum(ref, q, beta)


def forward_kl_rule(ref, q, beta):
    """Maximise E[Q] − β KL(π_ref‖π) over π(·|s): π = β π_ref / (λ − Q). Plain k3 in the loss reaches it.

    λ > max Q is the root of Σ_a π(a|s) = 1, found by bisection. At the lower end of the bracket one token
    alone has probability 1; at the upper end no token has more than under the reference.
    """
    weight = beta * ref.exp()
    low = (q + weight).amax(-1, keepdim=True)
    high = q.amax(-1, keepdim=True) + beta
    for _ in range(100):
        lam = (low + high) / 2
        total = (weight / (lam - q)).sum(-1, keepdim=True)
        low = torch.where(total > 1, lam, low)
        high = torch.where(total > 1, high, lam)
    logits = ref + torch.log(beta / (high - q))
    return logits.log_softmax(-1)


def normalised(tree, ref, reward, beta, rule=reverse_kl_rule):
    """Backward induction with the reward r / σ, where σ is r's standard deviation under the result itself.

    → the policy (S, V) and σ: what GRPO with norm="group_std" leads to in large groups. σ starts from the
    reference and falls, as in training. ValueError if it falls to 0: the policy collapses (β is too small).
    """
    sigma = mean_std(tree.logp(ref), reward)[1]
    for _ in range(10000):
        scaled_rule = partial(rule, beta=beta * sigma)
        table = tree.backward_induction(ref, reward, scaled_rule)
        old = sigma
        sigma = mean_std(tree.logp(table), reward)[1]
        if abs(old - sigma) <= 1e-12 * old:
            return table, sigma
        if not sigma > 1e-6 * abs(reward).max():
            break
    raise ValueError(f"beta {beta}: the policy collapses on the best response; no spread of rewards is left")


def table(model):
    with torch.no_grad():
        return TREE.table(model, TOK.encode(PROMPT))


def kl(policy, other):
    """Exact KL of whole responses."""
    return exact.kl(TREE.logp(policy), TREE.logp(other)).item()


def pi_star(ref, reward):
    return TREE.from_logp(exact.optimum(TREE.logp(ref), reward, BETA))


def reverse_kl(ref, reward):
    return TREE.backward_induction(ref, reward, lambda s, q: reverse_kl_rule(s, q, BETA))


def forward_kl(ref, reward):
    return TREE.backward_induction(ref, reward, lambda s, q: forward_kl_rule(s, q, BETA))


def over_sigma(ref, reward):
    return normalised(TREE, ref, reward, BETA)[0]


# What the algorithms share: one optimizer step on each batch, so that nothing is clipped or off-policy
COMMON = dict(steps=200, lr=7e-3, minibatches=1, max_grad_norm=1e6, beta=BETA, tokens_per_microbatch=0,
              eval_prompts=0, save_every=0)
PPO = dict(prompts_per_step=256, max_new_tokens=LIMIT, lr=5e-3, critic_lr=1e-2, gamma=1.0, lam=1.0,
           whiten_advantages=False)
GROUPS = dict(prompts_per_step=32, group_size=8, max_new_tokens=LIMIT, agg="seq_sum_const")
LARGE = GROUPS | dict(prompts_per_step=1, group_size=512)  # a mean and a σ that hardly depend on the sample
IN_LOSS = LARGE | dict(kl_in="loss", kl_unbiased=False, norm="none")
DISTILL = dict(prompts_per_step=16, group_size=8, max_new_tokens=LIMIT, steps=200, lr=7e-3, max_grad_norm=1e6,
               tokens_per_microbatch=0, eval_prompts=0, save_every=0)

# name → trainer, its flags, the fixed point: π* or another policy, None where there is none
ALGORITHMS = {
    "ppo": (train_ppo, PPO, pi_star),
    "dr_grpo": (train_grpo, GROUPS | dict(norm="none", kl="k1", kl_in="reward"), pi_star),
    "rloo": (train_grpo, GROUPS | dict(recipe="rloo"), pi_star),
    "grpo_k1_reward": (train_grpo, LARGE | dict(norm="group_std", kl="k1", kl_in="reward"), pi_star),
    "dpo": (None, {}, pi_star),
    "k2_loss": (train_grpo, IN_LOSS | dict(kl="k2"), reverse_kl),
    "k3_ratio_loss": (train_grpo, IN_LOSS | dict(kl="k3", kl_unbiased=True), reverse_kl),
    "k3_loss": (train_grpo, IN_LOSS | dict(kl="k3"), forward_kl),
    "grpo_k2_loss": (train_grpo, IN_LOSS | dict(kl="k2", norm="group_std"), over_sigma),
    "exact_loss": (train_grpo, IN_LOSS | dict(kl="exact"), reverse_kl),
    "ppo_exact_loss": (train_ppo, PPO | dict(kl="exact"), reverse_kl),
    "k1_loss": (train_grpo, IN_LOSS | dict(kl="k1"), None),
    "k3_reward": (train_grpo, LARGE | dict(norm="none", kl="k3", kl_in="reward"), None),
    # distillation from a teacher that is π*, which the student can represent
    "distill_reverse": (train_distill, DISTILL, pi_star),
    "distill_forward": (train_distill, DISTILL | dict(divergence="forward"), pi_star),
    "distill_jsd": (train_distill, DISTILL | dict(divergence="jsd"), pi_star),
    "distill_as_reward": (train_distill, DISTILL | dict(as_reward=True, prompts_per_step=64), pi_star),
}


class Problem:
    """A random reference policy, and a random reward of every response.

    Rewards are drawn until the distributions to be told apart differ: π* from π_ref in both directions, and
    from the other fixed points.
    """

    def __init__(self, seed, folder):
        self.seed, self.folder = seed, folder
        torch.manual_seed(seed)
        shape = dict(n_layer=1, n_head=4, d_model=32, max_len=1 + LIMIT, tied=False)
        self.model = GPT(GPTConfig.gpt2(TOK.vocab_size, **shape))
        self.model.lm_head.weight.data *= 0.5  # no response so rare that nobody samples it
        self.ref, self.reward = table(self.model), None
        while self.reward is None or not self.tells_apart():
            self.reward = 1.2 * torch.randn(len(TEXTS), dtype=torch.float64)
        hub.save(self.model, TOK, f"{folder}/ref")
        row = {"prompt": PROMPT, "reward": dict(zip(TEXTS, self.reward.tolist()))}
        for name, text in (("prompts.jsonl", json.dumps(row)), ("reward.py", REWARD_FILE)):
            with open(f"{folder}/{name}", "w") as f:
                f.write(text)

    def tells_apart(self):
        try:
            star, *others = (self.fixed_point(rule) for rule in (pi_star, reverse_kl, forward_kl, over_sigma))
        except ValueError:  # group_std would collapse
            return False
        far = kl(star, self.ref) > 0.55 and kl(self.ref, star) > 0.35
        near = max(kl(x, self.ref) for x in (star, *others)) < 1.2
        return far and near and min(kl(other, star) for other in others) > 0.08

    def fixed_point(self, rule):
        return rule(self.ref, self.reward)

    def measure(self, policy, rule):
        """→ KL to π*, KL to the algorithm's own fixed point, KL to π_ref, expected reward."""
        return {
            "star": kl(policy, self.fixed_point(pi_star)),
            "own": kl(policy, self.fixed_point(rule)) if rule else None,
            "ref": kl(policy, self.ref),
            "reward": mean_std(TREE.logp(policy), self.reward)[0].item(),
        }


def train_with(trainer, flags, problem, name):
    """Train through the trainer's own train() → the policy."""
    folder, out = problem.folder, f"{problem.folder}/{name}"
    cfg = trainer.Config(
        data=f"{folder}/prompts.jsonl", reward=[f"{folder}/reward.py:reward"], init=f"{folder}/ref", out=out,
        seed=problem.seed, overwrite=True, sample_every=10**6, reward_timeout=0, **COMMON | flags,
    )
    if trainer is train_ppo:
        cfg.no_eos_score = None  # a truncated response has its reward like any other
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(cfg)
    return table(hub.load(f"{out}/model")[0])


def model_of(policy, model, steps=1000, lr=1e-2):
    """A copy of `model` that is fitted to a policy (S, V), to about 1e-4 nats at every prefix."""
    model = copy.deepcopy(model)
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        opt.zero_grad()
        exact.kl(policy, TREE.table(model, TOK.encode(PROMPT))).sum().backward()
        opt.step()
    return model


def distil(flags, problem, name):
    """Train through train_distill.train(), from π_ref, with π* as the teacher → the policy."""
    folder = problem.folder
    teacher = f"{folder}/teacher"
    if not os.path.exists(teacher):
        hub.save(model_of(problem.fixed_point(pi_star), problem.model), TOK, teacher)
    out = f"{folder}/{name}"
    cfg = train_distill.Config(
        data=f"{folder}/prompts.jsonl", init=f"{folder}/ref", teacher=teacher, out=out, seed=problem.seed,
        overwrite=True, sample_every=10**6, **flags,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train_distill.train(cfg)
    return table(hub.load(f"{out}/model")[0])


def train_dpo(problem, pairs=1_000_000, steps=300, lr=5e-3):
    """DPO on pairs drawn from π_ref and labelled by Bradley–Terry with the same rewards → the policy.

    Equal pairs are counted, not repeated, and a step sees them all. (train_dpo.train reads text, which always
    ends with EOS; here a truncated response counts.)
    """
    draw, ref, reward = torch.Generator().manual_seed(problem.seed), TREE.logp(problem.ref), problem.reward
    a, b = ref.exp().multinomial(2 * pairs, True, generator=draw).view(2, pairs)
    a_wins = torch.rand(pairs, generator=draw, dtype=torch.float64) < (reward[a] - reward[b]).sigmoid()
    chosen_rejected = torch.where(a_wins, torch.stack([a, b]), torch.stack([b, a]))
    (w, l), times = chosen_rejected.unique(dim=1, return_counts=True)
    model = copy.deepcopy(problem.model)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        opt.zero_grad()
        logp = TREE.logp(TREE.table(model, TOK.encode(PROMPT)))
        losses, *_ = preference_loss(logp[w], logp[l], ref[w], ref[l], BETA, loss="dpo")
        ((times / pairs) * losses).sum().backward()
        opt.step()
    return table(model)


def run(name, problem):
    """Train one algorithm on the problem → its measures, and the CPU seconds it took."""
    trainer, flags, rule = ALGORITHMS[name]
    start = time.process_time()
    if trainer is None:
        policy = train_dpo(problem)
    elif trainer is train_distill:
        policy = distil(flags, problem, name)
    else:
        policy = train_with(trainer, flags, problem, name)
    return problem.measure(policy, rule) | {"cpu_seconds": time.process_time() - start}


def run_all(seeds):
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            problem = Problem(seed, folder)
            ideal = problem.measure(problem.fixed_point(pi_star), None)
            row = {"seed": seed} | {f"star_{k}": ideal[k] for k in ("ref", "reward")}
            for name in ALGORITHMS:
                row |= {f"{name}_{k}": v for k, v in run(name, problem).items() if v is not None}
                own = f"{row[f'{name}_own']:.4f}" if f"{name}_own" in row else "(none)"
                star = f"{row[f'{name}_star']:.4f}"
                print(f"seed {seed}  {name:<15} KL to π* {star}, to its own {own}", flush=True)
            rows.append(row)
    with open(CSV, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" for k, v in row.items()} for row in rows)


def draw():
    """Left: how far each algorithm ends from π* and from its own fixed point. Right: reward against KL."""
    from nanorlhf.look.plots import pyplot, save_figure

    plt = pyplot()
    if plt is None:
        return
    with open(CSV, newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    fig, (a, b) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for y, name in enumerate(ALGORITHMS):
        for key, marker, colour in (("star", "o", "tab:blue"), ("own", "x", "tab:red")):
            values = [r[f"{name}_{key}"] for r in rows if f"{name}_{key}" in r]
            a.plot(values, [-y] * len(values), marker, color=colour, alpha=0.7)
    a.plot([], [], "o", color="tab:blue", label="to π*")
    a.plot([], [], "x", color="tab:red", label="to its own fixed point")
    a.axvline(0.02, color="black", ls=":", label="0.02 nats")
    a.set(xscale="log", title="KL from the trained policy, five seeds", xlabel="nats",
          yticks=[-y for y in range(len(ALGORITHMS))], yticklabels=ALGORITHMS)
    with tempfile.TemporaryDirectory() as folder:  # the frontier of the first seed
        problem = Problem(int(rows[0]["seed"]), folder)
    betas = [10 ** (x / 40) for x in range(80, -60, -1)]
    b.plot(*frontier(TREE.logp(problem.ref), problem.reward, betas), color="black",
           label="exact frontier: tilts of π_ref")
    b.plot(rows[0]["star_ref"], rows[0]["star_reward"], "*", ms=16, color="black", label="π*, β = 1")
    for i, name in enumerate(ALGORITHMS):
        point = rows[0][f"{name}_ref"], rows[0][f"{name}_reward"]
        b.plot(*point, "os^vDPX"[i % 7], color=f"C{i % 10}", alpha=0.8, label=name)
    b.set(title="reward against KL(π‖π_ref), seed 0", xlabel="nats", ylabel="expected reward")
    for ax in (a, b):
        ax.grid(alpha=0.25)
    a.legend(fontsize=8)
    b.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # inside it would cover the frontier
    save_figure(fig, os.path.join(ROOT, "docs", "img", "optimum.png"))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    torch.set_num_threads(1)
    if sys.argv[1:] != ["--draw"]:
        seeds = sys.argv[2] if sys.argv[1:2] == ["--seeds"] else "0,1,2,3,4"
        run_all(map(int, seeds.split(",")))
    draw()
