"""Process against outcome supervision: a reward model told which step is wrong, or only that the end is.

The problems are sums, their steps the running sums: `132031=` → `<14669A>|A`, one character each (A is 10). A
policy that makes slips (one step in five is off by one or two, and the rest follows from it)
writes solutions of six digits. The same solutions are labelled in two ways: each step right or wrong, nothing
behind the first mistake (`train_prm.py`), or the answer alone (`--kind outcome`). Both reward
models choose the best of n and are GRPO's reward, at six digits and at eight, which they were never taught.
"""

import math
import os
import random
import statistics

import torch

import train_grpo
import train_prm
import train_sft
from labs import common
from nanorlhf import generate, hub, tasks
from nanorlhf.errors import derive_seed
from nanorlhf.hub.files import write_jsonl
from nanorlhf.metrics import maj_at_k
from nanorlhf.rewards import score_responses

PAPER = "Lightman et al. 2023, Let's verify step by step (2305.20050); Hou et al. 2024, Does RLHF scale?"
QUESTION = "Is it worth more to know which step is wrong than to know that the answer is?"
PREDICTION = (
    "With the same labelled solutions the process reward model chooses better than the outcome reward model "
    "(78.2 against 72.4% in Lightman et al.); its lead is smaller on problems longer than it was trained on "
    "(Hou et al., arXiv 2412.06000: weaker generalisation)."
)
STATISTIC = (
    "Accuracy of the best of 16 at six digits, process minus outcome, both from 4,000 labelled solutions; "
    "seen if above 0. Paired by seed, Student's t 95%. Beside it: eight digits, GRPO, four times the labels."
)
DIFFERS = (
    "Sums instead of mathematics, labels by a checker instead of people, solutions of the one policy that is "
    "then improved, reward models that start from that policy (0.07M parameters)."
)
CHANGES = [
    "after 1 of 12 jobs: `thought`, the share of right thoughts, for GRPO had learnt `<344479>|>`",
    "after three seeds, where the lead was +0.39 ± 0.52, above 0 on each: two seeds more",
]
SEEDS = 5

SUMS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a sum's one character
DIGITS, LONGER = 6, 8  # of a problem; each is 0 to 3
SFT = dict(task="chain", tokenizer="bytes", n_layer=1, d_model=64, max_len=32, batch_size=64)
RM = dict(task="chain", steps=1200, batch_size=32, lr=3e-3, eval_every=0)
GRPO = dict(task="chain", steps=40, lr=3e-4, eval_prompts=64, sample_every=1000, reward_timeout=0.0)


def points(smoke):
    grid = [("process", 4000), ("outcome", 4000), ("outcome", 16000), ("truth", 0)]
    return [{"reward": kind, "labels": n} for kind, n in (grid[:2] if smoke else grid)]


def solve(prompt, slips=0.0, rng=random):
    """'132031=' → '<14669A>|A'; with probability `slips` a step is off by 1 or 2, and the rest follows."""
    total, sums = 0, ""
    for x in prompt[:-1]:
        total += int(x) + (rng.choice((-2, -1, 1, 2)) if rng.random() < slips else 0)
        total = min(max(total, 0), len(SUMS) - 1)
        sums += SUMS[total]
    return f"<{sums}>|{sums[-1]}"


def correct(prompt, response, row=None):
    """1 if the answer is right, whatever was thought: the outcome label, and GRPO's true reward."""
    return float(response.startswith("<") and response[-3:-1] == ">|" and response[-1] == solve(prompt)[-1])


def judge(prompt, response):
    """Labels of a response's steps, which its sums and its end close; None behind the first wrong one."""
    right = solve(prompt)
    labels = [int(response[: i + 1] == right[: i + 1]) for i, x in enumerate(response) if x in SUMS]
    labels.append(int(response == right))
    first = labels.index(0) + 1 if 0 in labels else len(labels)
    return labels[:first] + [None] * (len(labels) - first)


def prompts(digits, n, *seed, test=False):
    """n prompts with so many digits; held out or not by the text alone, as everywhere."""
    rng, found = random.Random(f"{digits} {n} {seed} {test}"), []
    while len(found) < n:
        prompt = "".join(rng.choices("0123", k=digits)) + "="
        found += [prompt] if tasks.held_out(prompt) == test else []
    return found


def file(name, rows):
    """Rows → a file among the stages; the same bytes, whichever job writes them."""
    os.makedirs(f"{common.root}/_stages", exist_ok=True)
    write_jsonl(f"{common.root}/_stages/process_{name}.jsonl", rows)
    return f"{common.root}/_stages/process_{name}.jsonl"


def policy(seed, smoke):
    """SFT on right solutions of both lengths, then on solutions with slips → run folder."""
    start = {}
    for slips, steps, lr in ((0.0, 600, 5e-3), (0.2, 200, 1e-3)):
        rng = random.Random(f"{seed} {slips}")
        asked = [p for k in (DIGITS, LONGER) for p in prompts(k, 50 if smoke else 20000, seed, slips)]
        rows = [{"prompt": p, "response": solve(p, slips, rng)} for p in asked]
        how = dict(data=file(f"sft_{seed}_{slips}_{len(rows)}", rows), steps=2 if smoke else steps, lr=lr)
        folder = common.trained(train_sft, seed=seed, **how, **start, **SFT)
        start = {"init": f"{folder}/model"}
    return folder


def sample(folder, asked, n, seed):
    """→ rollouts, responses of the policy in a run folder, n to each prompt."""
    model, tok = hub.load(f"{folder}/model")
    return generate.respond(model, tok, asked, n, LONGER + 5, seed=derive_seed(seed, "process"))


def reward_model(kind, labels, sft, seed, smoke):
    """Trained on solutions of six digits, the same ones for both kinds → run folder."""
    asked = prompts(DIGITS, 16000, seed, "labelled")[: 40 if smoke else labels]
    asked += prompts(DIGITS, 500, seed, test=True)
    label = judge if kind == "process" else lambda *pair: [int(correct(*pair))]
    rows = [{"prompt": p, "response": y, "labels": label(p, y)}
            for p, y in zip(asked, sample(sft, asked, 1, seed)[1])]
    how = dict(data=file(f"{kind}_{seed}_{len(rows)}", rows), init=f"{sft}/model", kind=kind)
    how |= dict(step_end=SUMS) if kind == "process" else {}
    return common.trained(train_prm, seed=seed, **how, **(RM | dict(steps=2) if smoke else RM))


@torch.no_grad()
def best_of_n(sft, rm, digits, seed, smoke):
    """Accuracy of the best by the reward model, without one of the most frequent answer; all n-subsets."""
    asked, total = prompts(digits, 4 if smoke else 128, seed, "best", test=True), 16 if smoke else 64
    rolls, texts = sample(sft, asked, total, seed)
    answers = [text[-1:] for text in texts]
    score = torch.cat([score_responses(roll, rm, None) for roll in rolls]) if rm else None
    right = torch.tensor([correct(asked[i // total], text) for i, text in enumerate(texts)]).view(-1, total)
    rows = []
    for n in (1, 4, 16) if smoke else (1, 4, 16, 64):
        votes = [maj_at_k(answers[i * total :][:total], x, n) for i, x in enumerate(right.tolist())]
        row = {"how": "best" if rm else "vote", "n": n, "acc": statistics.mean(votes)}
        if rm:
            share = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
            ordered = right.gather(1, score.view(-1, total).sort(1).indices)
            row["acc"] = (ordered @ torch.tensor(share)).mean().item()
        rows.append(row)
    return rows


def run(point, seed, smoke):
    sft, rm, how = policy(seed, smoke), None, dict(reward=[f"{__file__}:correct"])
    if point["labels"]:
        how = {"rm": reward_model(point["reward"], point["labels"], sft, seed, smoke) + "/model"}
        rm = hub.load(how["rm"])[0]
    asked = prompts(DIGITS, 3000, seed, "rl") + prompts(DIGITS, 64, seed, test=True)
    how |= dict(data=file(f"rl_{seed}", [{"prompt": p} for p in asked]), init=f"{sft}/model")
    final = common.trained(train_grpo, seed=seed, **how, **(GRPO | dict(steps=1) if smoke else GRPO))
    rows = []
    for digits in (DIGITS, LONGER):
        rows += [r | {"digits": digits} for r in best_of_n(sft, rm, digits, seed, smoke)]
        asked = prompts(digits, 8 if smoke else 512, seed, "grpo", test=True)
        texts = sample(final, asked, 1, seed)[1]
        sound = statistics.mean(y.startswith(solve(p)[:-2]) for p, y in zip(asked, texts))
        rows.append({"how": "grpo", "n": 1, "digits": digits, "thought": sound})
        rows[-1]["acc"] = statistics.mean(map(correct, asked, texts))
    return rows


def effects(rows):
    def best_of_16(kind):
        return common.by_seed(rows, "acc", how="best", n=16, digits=DIGITS, reward=kind, labels=4000)

    return {"accuracy, process less outcome": common.less(best_of_16("process"), best_of_16("outcome"))}


def verdict(rows):
    numbers, parts, leads = {}, [], []
    for what in ("best 6 acc", "best 8 acc", "grpo 6 acc", "grpo 6 thought", "grpo 8 acc"):
        how, digits, column = what.split()
        here = common.select(rows, how=how, digits=int(digits), n=16 if how == "best" else 1)
        found = {kind: common.by_seed(here, column, reward=kind[0], labels=kind[1]) for kind in kinds(rows)}
        leads.append(common.paired(found["process", 4000], found["outcome", 4000]))
        mean = {f"{kind} {n}": statistics.mean(x) for (kind, n), x in found.items() if x}
        numbers |= {f"{what}: {kind}": x for kind, x in mean.items()} | {f"{what}: lead": leads[-1][0]}
        a, b, name = mean["process 4000"], mean["outcome 4000"], what.replace("best", "best of 16,")
        parts.append(f"{name} {a:.2f} against {b:.2f}, {common.pm(*leads[-1])}")
    return common.seen(effects(rows)), "; ".join(parts), numbers


def kinds(rows):
    return list(dict.fromkeys((r["reward"], int(r["labels"])) for r in rows))


def figure(rows, path):
    fig, axes = common.axes(3)
    for j, digits in enumerate((DIGITS, LONGER)):
        for i, (kind, labels) in enumerate(kinds(rows)):
            here = common.select(rows, reward=kind, labels=labels, digits=digits)
            chosen = [r for r in here if r["how"] != "grpo"]
            common.line(axes[j], chosen, "n", "acc", f"{kind} {labels}" if labels else "vote, truth")
            mean, half = ([x] for x in common.mean_ci(common.by_seed(here, "acc", how="grpo")))
            axes[2].errorbar([i + j / 4], mean, half, fmt="os"[j], color=f"C{i}", capsize=2)
        axes[j].set(title=f"accuracy, best of n, {digits} digits", xlabel="n", xscale="log", ylim=(0, 1))
    axes[2].set(title="accuracy after GRPO: ● 6 digits, ■ 8", xticks=[], ylim=(0, 1))
    axes[0].legend(fontsize=7)
    common.save(fig, path)
