"""What RL changed in a model and what it left alone: the last stage of recipes/smollm2_cpu.sh.

    python -m recipes.smollm2.report RUN BASE       RUN: the recipe's folder; BASE: folder of the model before

It reads before.json and after.json (evaluate.py --probe on held-out sums), stages.csv, heldout.jsonl and
grpo/ of RUN. Both models answer five held-out sums and the 20 prompts of other_prompts.jsonl greedily; the
trained one also answers the 20 by sampling, for the KL. It writes

    RUN/report.md, curves.png   the page: figures, curves, answers before and after
    RUN/report.json             the figures alone, which bench/smollm2.py gathers over seeds

kl_others is KL(trained‖base), exact over the vocabulary at every token that the trained model samples at
temperature 1 behind the 20 prompts: of each response the mean over its tokens, in nats a token, and of
these the mean ± its standard error.
"""

import csv
import os
import time

import torch

from evaluate import kl_per_token
from nanorlhf import generate, hub
from nanorlhf.errors import derive_seed, require, shown
from nanorlhf.hub.files import read_json
from nanorlhf.hub.formats import read_rows
from nanorlhf.look.plots import plot_curves
from nanorlhf.metrics import mean_se
from nanorlhf.run.folders import read_rows as read_metrics
from nanorlhf.run.folders import write_json
from recipes.smollm2 import command

OTHERS = os.path.join(os.path.dirname(__file__), "other_prompts.jsonl")
LONGEST = 40  # tokens of an answer to one of the other prompts
READ = ("grpo/config.json", "before.json", "after.json", "stages.csv")  # what the stages have written


def prompts_of(path):
    return [row["prompt"] for row in read_rows(path, "prompts", "")]


def question(prompt):
    """What a chat asks last."""
    return prompt.messages[-1]["content"]


def answers(model, tok, prompts, limit):
    """Greedy answers, one to each prompt."""
    _, texts = generate.respond(model, tok, prompts, 1, limit, temperature=0.0)
    return texts


@torch.no_grad()
def kl_on(prompts, model, base, tok, seed):
    """KL(model‖base) in nats a token on sampled answers to these prompts → mean over the answers, s.e."""
    seed = derive_seed(seed, "others")
    (roll,), _ = generate.respond(model, tok, prompts, 1, LONGEST, temperature=1.0, seed=seed)
    kl = kl_per_token(model, base, roll.tokens, roll.mask)  # (B, T)
    return mean_se(kl.sum(1) / roll.mask.sum(1))


def stage_figures(path):
    """stages.csv → {"cpu_seconds", "peak_mb", "first_point", "wall_seconds"}.

    wall_seconds: from the begin of the first stage until now. first_point: from there to the first row of a
    metrics.csv.
    """
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    began = float(rows[0]["began"])
    figures = {
        "cpu_seconds": sum(float(row["cpu_seconds"]) for row in rows),
        "peak_mb": max(float(row["peak_mb"]) for row in rows),
    }
    for row in rows:
        if row["first_row"]:
            figures["first_point"] = float(row["began"]) + float(row["first_row"]) - began
    figures["wall_seconds"] = time.time() - began
    return figures


# ------------------------------------------------------------------------------------------------------------
# the page


def side_by_side(prompts, before, after):
    """Markdown table of prompts and their answers before and after."""
    lines = ["| prompt | before | after |", "|---|---|---|"]
    for prompt, old, new in zip(prompts, before, after):
        texts = [question(prompt), old, new]
        cells = [shown(text.strip(), 300).replace("|", r"\|") for text in texts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(figures, sums, others):
    """report.md; sums and others are tables of `side_by_side`."""

    def change(name):
        before = f"{figures[f'{name}_before']:.3f} ± {figures[f'{name}_before_se']:.3f}"
        after = f"{figures[f'{name}_after']:.3f} ± {figures[f'{name}_after_se']:.3f}"
        return f"{before} | {after}"

    cost = f"{figures['wall_seconds']:.0f} s wall, {figures['cpu_seconds']:.0f} CPU-seconds"
    same = f"{figures['same_answers']} of these {figures['n_others']} greedy answers"
    kl = f"{figures['kl_others']:.4f} ± {figures['kl_others_se']:.4f}"
    return f"""# GRPO on {figures["model"]}, seed {figures["seed"]}

Held-out sums: no pair of their numbers was trained on, in any order. ± is the standard error over prompts.

| | before | after |
|---|---|---|
| right, sampled at temperature 1 | {change("pass@1")} |
| right, greedy | {change("greedy")} |
| at least one of 8 samples right | {change("pass@8")} |
| response length, tokens | {change("len")} |
| dead groups (8 samples, all equal) | {change("dead")} |

![curves](curves.png)

{cost}, at most {figures["peak_mb"]:.0f} MB, a download included. The curve's first point: after
{figures["first_point"]:.0f} s.

## Sums

{sums}

## Other prompts

Does it still answer other questions as before? {same} (at most
{LONGEST} tokens) are the same, letter by letter. KL(after‖before) on sampled answers: {kl} nats a token.

{others}
"""


def main(run, base_folder):
    for name in READ:
        path = f"{run}/{name}"
        require(os.path.isfile(path), f"{path} is missing: run recipes/smollm2_cpu.sh, which writes it")
    flags = read_json(f"{run}/grpo/config.json")
    figures = {"seed": flags["seed"], "model": os.path.basename(os.path.normpath(base_folder))}
    for name in ("before", "after"):
        measured = read_json(f"{run}/{name}.json")
        for figure in ("pass@1", "pass@8", "greedy", "len", "dead"):
            figures[f"{figure}_{name}"] = measured[figure]
            figures[f"{figure}_{name}_se"] = measured[f"{figure}_se"]

    base, tok = hub.load(base_folder)
    trained, _ = hub.load(f"{run}/grpo/model")
    sums = prompts_of(f"{run}/heldout.jsonl")[:5]
    others = prompts_of(OTHERS)
    tables = []
    for asked, limit in ((sums, flags["max_new_tokens"]), (others, LONGEST)):
        before = answers(base, tok, asked, limit)
        after = answers(trained, tok, asked, limit)
        tables.append(side_by_side(asked, before, after))
        for prompt, old, new in list(zip(asked, before, after))[:5]:
            print(f"\n{shown(question(prompt), 76)}")
            print(f"  before │ {shown(old, 68)}\n  after  │ {shown(new, 68)}")
    same = sum(old == new for old, new in zip(before, after))  # of the others, which came last
    kl, kl_se = kl_on(others, trained, base, tok, flags["seed"])
    n_others = len(others)
    figures |= {"same_answers": same, "n_others": n_others, "kl_others": kl, "kl_others_se": kl_se}

    figures |= stage_figures(f"{run}/stages.csv")
    plot_curves(run, read_metrics(f"{run}/grpo"), [("reward", "eval/reward", "eval/greedy"), "len", "dead"])
    write_json(f"{run}/report.json", figures)
    with open(f"{run}/report.md", "w", encoding="utf-8") as f:
        f.write(page(figures, tables[0], tables[1]))
    right = f"{figures['pass@1_before']:.2f} → {figures['pass@1_after']:.2f} right, sampled"
    greedy = f"{figures['greedy_before']:.2f} → {figures['greedy_after']:.2f} greedy"
    print(f"\nheld-out sums: {right}, {greedy}")
    print(
        f"other prompts: KL {kl:.4f} ± {kl_se:.4f} nats a token, {same} of {n_others} greedy answers the same"
    )
    print(f"{figures['wall_seconds']:.0f} s; the page: {run}/report.md")


if __name__ == "__main__":
    command(main, __doc__)
