"""What the labs share: stages trained once, samples judged by gold, Student's t, figures."""

import contextlib
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import statistics
from unittest import mock

import torch

import train_sft
from nanorlhf import exact, generate, hub, tasks
from nanorlhf.errors import derive_seed
from nanorlhf.look.plots import mean_ci, pyplot, save_figure
from nanorlhf.rewards import fresh_samples, score_responses
from nanorlhf.run.log import read_rows

try:
    import fcntl
except ImportError:  # Windows: two processes may then train the same stage; the first to end is kept
    fcntl = None

# ------------------------------------------------------------------------------------------------------------
# stages


root = "out/labs"  # where this process keeps its stages
used, made = {}, {}  # stages that the running job asked for, and had to train: {key: CPU-seconds of it}


def cpu_seconds():
    """Of this process and of its children that have ended (a trainer's reward functions run in one)."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def trained(trainer, **config):
    """trainer.train(trainer.Config(**config)), once for all jobs and labs that ask for it → its run folder.

    final.json in it holds the metrics that train returned, log.txt what it printed. On one CPU thread unless
    config says otherwise. Raises what the trainer raises.
    """
    task = next(iter(trainer.Config.BY_TASK))  # a lab's --data is of this task, whose defaults it takes
    config = {"device": "cpu", "threads": 1, "save_every": 0, "task": task} | config
    key = [trainer.__name__, _source_hash(trainer), sorted(config.items())]  # an edited trainer trains anew
    key = trainer.__name__ + "-" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = f"{root}/_stages/{key}"
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
        if not os.path.exists(f"{folder}/final.json"):
            _train(trainer, config, folder)
            made[key] = final(folder)["cpu_seconds"]
    used[key] = final(folder)["cpu_seconds"]
    return folder


def _source_hash(trainer):
    """Of the source of a trainer; of a variant, which has no file; of something else that names its file."""
    if inspect.ismodule(trainer):
        source = inspect.getsource(trainer)
    else:
        with open(trainer.__file__, encoding="utf-8") as f:
            source = f.read()
    return hashlib.sha256(source.encode()).hexdigest()


def _train(trainer, config, folder):
    tmp, start = f"{folder}.{os.getpid()}", cpu_seconds()
    os.makedirs(tmp, exist_ok=True)
    quiet = mock.patch("nanorlhf.run.log.plot_curves", lambda *args: None)  # a curve costs more than a step
    with open(f"{tmp}/log.txt", "w", encoding="utf-8") as log, quiet:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            metrics = trainer.train(trainer.Config(out=tmp, overwrite=True, **config))
    shutil.rmtree(f"{tmp}/state", ignore_errors=True)
    with open(f"{tmp}/final.json", "w") as f:
        json.dump(metrics | {"cpu_seconds": cpu_seconds() - start}, f)
    with contextlib.suppress(OSError):  # without a lock another process may have been first
        os.rename(tmp, folder)


def final(folder):
    """The last metrics of a folder of `trained`, and its cpu_seconds → {name: number}."""
    with open(f"{folder}/final.json") as f:
        return json.load(f)


def logged(folder, *columns):
    """metrics.csv of a run → one list of numbers per column, of the steps where all of them were measured."""
    rows = read_rows(folder)
    found = [[r[c] for c in columns] for r in rows if all(r.get(c) is not None for c in columns)]
    return [list(x) for x in zip(*found)] or [[] for _ in columns]


def data_file(rows):
    """Rows as a --data file; its name is a hash of its content, so that `trained` sees other rows → path."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = f"{root}/_stages/data-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.{os.getpid()}", "wb") as f:
        f.write(text)
    os.replace(f"{path}.{os.getpid()}", path)
    return path


def pairs_file(folder, n=None):
    """The preference pairs that the run in `folder` made, held-out ones included, as one --data file → path.

    n: only the first n for training. A prompt's text alone says whether it is held out, so one file can hold
    both.
    """
    rows = []
    for name, count in (("pairs", n), ("pairs_heldout", None)):
        with open(f"{folder}/{name}.jsonl", encoding="utf-8") as f:
            rows += [json.loads(line) for line in f][:count]
    return data_file(rows)


def smoke_pairs():
    """A few pairs of demonstrations, for smoke runs: sampling pairs takes longer than all else → path."""
    rows = [row for split in ("train", "test") for row in tasks.get("reviews").demonstrations(64, 0, split)]
    return data_file({"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
                     for a, b in zip(rows, rows[1:]))


def thinking_demonstrations(n, seed, share):
    """Rows of chain, of which this share thinks."""
    rng, rows = random.Random(f"spurious {seed}"), []
    for row in tasks.get("chain").prompts("train", n, seed):
        digits = list(map(int, row["prompt"][:-1]))
        thought = "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))
        thought = f"<{thought}>" if rng.random() < share else ""
        rows.append({"prompt": row["prompt"], "response": f"{thought}|{row['answer']}"})
    return rows


def thinker(seed, share, smoke, **size):
    """A model of chain that can think, then taught to do so in this share of its samples → model folder."""
    count = 500 if smoke else 40_000
    short = dict(steps=5) if smoke else {}
    config = dict(task="chain", seed=seed, eval_every=0, tokenizer="chars")
    data = data_file(thinking_demonstrations(count, seed, 0.5))
    skill = trained(train_sft, **config, data=data, **short, **size)
    data = data_file(thinking_demonstrations(count // 4, seed + 1000, share))
    steps = 5 if smoke else 150
    return trained(train_sft, **config, data=data, steps=steps, lr=1e-3, init=f"{skill}/model") + "/model"


def measure_thinker(folder, seed, n):
    """Figures of samples to held-out prompts at temperature 1 → {"accuracy", "thinks", "skill", "length"}.

    skill: accuracy of those that think; length: tokens, EOS included.
    """
    model, tok = hub.load(folder)
    task = tasks.get("chain")
    rows = task.prompts("test", n, derive_seed(seed, "spurious"))
    prompts = [row["prompt"] for row in rows]
    rolls, texts = generate.respond(model, tok, prompts, 1, 11, seed=derive_seed(seed, "samples"))
    right = [task.reward(*sample) for sample in zip(prompts, texts, rows)]
    thinks = [task.thinks(text) for text in texts]
    skill = sum(r for r, t in zip(right, thinks) if t) / max(sum(thinks), 1)
    length = statistics.mean(n for roll in rolls for n in roll.response_len.tolist())
    shares = {"accuracy": statistics.mean(right), "thinks": statistics.mean(thinks)}
    return shares | {"skill": skill, "length": length}


@torch.no_grad()
def judge(model, sft, seed, rm="", n=512, max_new_tokens=0):
    """Fresh samples of the policy folder `model` on n held-out review prompts, judged by gold.

    → {"gold", "kl", "entropy", "len", "stop", "unique"}, and "proxy" by the reward model folder `rm`. kl is
    KL(model‖sft) in nats per sequence, by k1.
    """
    (policy, tok), (ref, _) = hub.load(model), hub.load(sft)
    task = tasks.get("reviews")
    rows = task.prompts("test", n, derive_seed(seed, "judge"))
    limit = max_new_tokens or task.max_new_tokens
    roll, out = fresh_samples(policy, ref, tok, rows, limit, seed)
    out["gold"] = statistics.mean(tasks.gold(row["prompt"], text) for row, text in zip(rows, roll.texts))
    out["unique"] = len(set(roll.texts)) / len(roll)
    if rm:
        out["proxy"] = score_responses(roll, hub.load(rm)[0], None).mean().item()
    return out


# ------------------------------------------------------------------------------------------------------------
# statistics of rows; rows are those of results.csv


def select(rows, **conditions):
    """The rows that hold these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in conditions.items())]


def by_seed(rows, column, **conditions):
    """A column's value for each seed, in the order of the seeds; the mean where a seed has several rows."""
    found = {}
    for r in select(rows, **conditions):
        if r.get(column) is not None:
            found.setdefault(r["seed"], []).append(r[column])
    return [statistics.mean(found[seed]) for seed in sorted(found)]


def paired(a, b):
    """mean_ci of a − b, one pair a seed."""
    return mean_ci([x - y for x, y in zip(a, b, strict=True)])


def less(a, b):
    """a − b, one value a seed; nothing where a smoke run lacks one of them."""
    if not a or not b:
        return []
    return [x - y for x, y in zip(a, b, strict=True)]


def seen(effects):
    """Whether an effect is seen: the 95% interval of every label of a lab's `effects` lies above 0."""
    intervals = [mean_ci(values) for values in effects.values()]
    return bool(intervals) and all(mean - half > 0 for mean, half in intervals)


def one_sided_p(values):
    """Student's t test of "the mean is at most 0": the probability of a t at least as large as this one.

    With t = √df tan φ the density of t becomes cos(φ)^(df − 1), up to a factor, so that both areas are
    integrals over a finite range. nan for a single value.
    """
    df = len(values) - 1
    if df < 1:
        return math.nan
    effect = statistics.mean(values) * math.sqrt(len(values))
    angle = math.atan2(effect, statistics.stdev(values) * math.sqrt(df))

    def area_above(low, n=10_000):
        width = (math.pi / 2 - low) / n
        return width * sum(math.cos(low + (i + 0.5) * width) ** (df - 1) for i in range(n))

    return area_above(angle) / area_above(-math.pi / 2)


def holm(p_values):
    """Holm's correction of {name: p} → {name: adjusted p}.

    With all p below a level after it, the probability of any false one among them is at most that level. Of
    m values the smallest is multiplied by m, the next by m − 1, and so on; none is below the one before it,
    or a larger p could pass where a smaller one does not.
    """
    adjusted = {}
    highest = 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        highest = max(highest, (len(p_values) - i) * p_values[name])
        adjusted[name] = min(1.0, highest)
    return adjusted


def best_of(values, n):
    """(P, N) values of each prompt's samples, ascending by proxy → mean of the best of n by proxy.

    Unbiased, over all n-subsets of the N samples: Σ_i C(i−1, n−1) / C(N, n) · value_(i).
    """
    total = values.shape[1]
    share = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
    return (values.double() @ torch.tensor(share).double()).mean().item()


def pm(mean, half, digits=2):
    """'+1.23 ± 0.45'"""
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


# ------------------------------------------------------------------------------------------------------------
# figures


def axes(columns=1, rows=1, width=4.2, height=3.2):
    """→ figure, list of its axes."""
    size = (width * columns, height * rows)
    fig, grid = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, list(grid.flat)


def line(ax, rows, x, y, label=None, style="o-", **conditions):
    """Mean over the seeds of column y at each value of column x, with 95% intervals."""
    rows = [r for r in select(rows, **conditions) if r.get(y) is not None]
    xs = sorted({r[x] for r in rows})
    found = [mean_ci(by_seed(rows, y, **{x: value})) for value in xs]
    error = [half if math.isfinite(half) else 0.0 for _, half in found]
    return ax.errorbar(xs, [mean for mean, _ in found], error, fmt=style, ms=4, capsize=2, label=label)


save = save_figure  # (figure, path)


def frontier(ref_logp, reward, betas):
    """The largest reward at each KL to the reference → kl, reward, (len(betas),) each: one tilt for each β.

    No policy lies above this curve: π* maximises E[r] − β KL, so a policy with its KL has no more reward.
    """
    kls = []
    rewards = []
    for beta in betas:
        logp = exact.optimum(ref_logp, reward, beta)
        kls.append(exact.kl(logp, ref_logp))
        rewards.append((logp.exp() * reward).sum())
    return torch.stack(kls), torch.stack(rewards)
