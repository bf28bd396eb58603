"""Bug hunts: a copy of the repository with one bug of tests/mutants.py in it, and a run of it.

The student sees curves, samples and the copy's source, and finds the line. Hunts 1 to 12 belong to weeks; the
others are for whoever wants more. What a good answer says stands with the solutions.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

from course import compare, plug
from course.checking import HERE, load
from nanorlhf.errors import RunError, require

HOME = os.path.dirname(HERE)
EASY, MEDIUM, HARD = "easy", "medium", "hard"
COPIED = ("nanorlhf", "labs", "variants")
CACHES = shutil.ignore_patterns("__pycache__", "results")


@dataclass
class Hunt:
    mutant: str  # its name in tests/mutants.py
    level: str
    command: str  # trainer and flags; the model folders come from `needs`
    story: str  # what is handed to the student
    hints: list
    week: int = 0  # 0: of no week
    needs: dict = field(default_factory=dict)


CHAIN = {"init": plug.CHAIN_SFT}
REVIEWS = {"init": plug.REVIEWS_SFT}
DISTILL = {"init": plug.CHAIN_SFT, "teacher": plug.CHAIN_GRPO}
SFT = "train_sft.py --task chain --steps 300"
GRPO = "train_grpo.py --task chain --steps 30"
PPO = "train_ppo.py --task chain --steps 30"

HUNTS = {
    1: Hunt(
        "log-probs one position late",
        EASY,
        SFT,
        "A colleague is delighted: the loss is nearly 0 after a few hundred steps. Then she looks at the "
        "samples.",
        [
            "Which loss could a model not go below, if it only sees what is to the left of a token? Compare "
            "with the right run, and ask where the missing nats come from.",
            "A model that is shown the answer needs no skill. Which function decides what stands before a "
            "token?",
        ],
        week=1,
    ),
    2: Hunt(
        "SFT: EOS unscored",
        EASY,
        SFT,
        "The loss falls as it should. But the samples in samples.jsonl never seem to end.",
        [
            "Look at `len`: tokens that the loss counts, on average. By how much does it differ from the "
            "right run?",
            "One token of each response is not learnt. Where is the mask of a demonstration made?",
        ],
        week=2,
    ),
    3: Hunt(
        "pairwise loss: sign",
        EASY,
        "train_rm.py --task reviews --pairs 1000 --steps 80",
        "The loss falls smoothly, as it should. The reward model is worse than a coin.",
        [
            "`acc` counts pairs whose chosen response has the higher reward. To where does it go, and what "
            "does that say about the direction?",
            "Derive ∂loss/∂(chosen − rejected) at a margin of 0: which sign must it have?",
        ],
        week=3,
        needs=REVIEWS,
    ),
    4: Hunt(
        "advantage sign",
        EASY,
        PPO,
        "The policy had an accuracy of 0.4 and loses it within a few steps.",
        [
            "Which direction does `entropy` take, and which in the right run?",
            "Good responses are made unlikely. How many minus signs stand between the reward and the loss?",
        ],
        week=4,
        needs=CHAIN,
    ),
    5: Hunt(
        "wrong grouping of prompts and rewards",
        HARD,
        GRPO,
        "It learns. Slowly, and the logged reward is odd, but it learns.",
        [
            "At step 0 `reward` and `eval/reward` measure the same policy on prompts of the same kind. "
            "Compare them, in both runs.",
            "Every response is right or wrong by itself; the question is which prompt it is judged by. With "
            "G samples a prompt, rows 0 … G−1 belong to prompt 0.",
        ],
        week=5,
        needs=CHAIN,
    ),
    6: Hunt(
        "temperature forgotten in the sampler's log-prob",
        MEDIUM,
        GRPO + " --temperature 0.6",
        "At temperature 1 all is well. At 0.6 the first update already sees ratios that are not 1.",
        [
            "Read the health line of step 0, `gap` and `ratio_max` at step 0.",
            "Sampled and scored must be the same distribution. Who divides by the temperature, and who does "
            "not?",
        ],
        week=5,
        needs=CHAIN,
    ),
    7: Hunt(
        "critic is not trained",
        MEDIUM,
        PPO,
        "PPO learns here almost as well as ever. A reviewer asks what the critic is good for in this run.",
        [
            "Compare `explained_var` and `value_loss` of both runs, from the first step to the last.",
            "The critic has a loss and an optimizer. What stands between the two?",
        ],
        week=6,
        needs=CHAIN,
    ),
    8: Hunt(
        "no zero_grad",
        MEDIUM,
        PPO,
        "The reward rises, and yet every update seems to remember the ones before.",
        [
            "Compare `gnorm` in both runs: what is its size at the end, where little is left to learn?",
            "What does backward() do with a gradient that is already there?",
        ],
        week=6,
        needs=CHAIN,
    ),
    9: Hunt(
        "KL sign",
        MEDIUM,
        "train_ppo.py --task chain --beta 0.3",
        "With the KL penalty switched on the policy leaves its reference faster than without it.",
        [
            "`kl` with a penalty must end below `kl` without one. Where does it go?",
            "The reward of a token that the policy likes more than the reference does: should it be above or "
            "below 0?",
        ],
        week=7,
        needs=CHAIN,
    ),
    10: Hunt(
        "standard error over samples, not over prompts",
        HARD,
        "train_grpo.py --task countdown --steps 10",
        "The curves are those of the right run, digit by digit, but one column is too good to be true.",
        [
            "Find the only column that differs.",
            "32 prompts with 16 samples each: how many independent measurements are that, when some prompts "
            "are hard for every sample? Compute √(p(1 − p)/512) with the reward p of step 0.",
        ],
        week=8,
        needs={"init": ("train_sft", {"task": "countdown"})},
    ),
    11: Hunt(
        "kernel: no temperature in the gradient",
        HARD,
        GRPO + " --recipe gspo --temperature 0.6",
        "Reward, KL and ratio look right. One column is off by a constant factor at step 0.",
        [
            "Divide each column at step 0 by that of the right "
            "run. Which quotient is a number that you know?",
            "z = logits / T. By the chain rule ∂/∂logits has a factor. Adam hides it: why?",
        ],
        week=9,
        needs=CHAIN,
    ),
    12: Hunt(
        "distillation: sign of the advantage",
        EASY,
        "train_distill.py --task chain --as_reward true --steps 20",
        "The student runs away from its teacher.",
        [
            "`kl` is the distance to the teacher. In which direction does it go?",
            "With the teacher as a reward, which tokens must have a positive advantage: those that the "
            "teacher likes more than the student, or less?",
        ],
        week=10,
        needs=DISTILL,
    ),
}

# Of no week: a default run, and hints that say where.
MORE = {
    13: ("GAE: next value of this token", MEDIUM, PPO),
    14: ("max for min in the policy loss", MEDIUM, PPO),
    15: ("policy loss without a clip", HARD, PPO),
    16: ("score on the last token but one", EASY, PPO),
    17: ("GAE runs on behind the end", HARD, PPO),
    18: ("EOS unscored: mask by token id", MEDIUM, PPO),
    19: ("critic sees its own token", HARD, PPO),
    20: ("temperature forgotten in the update", EASY, PPO + " --temperature 0.6"),
    21: ("advantages not permuted", HARD, PPO),
    22: ("inverted ratio", MEDIUM, PPO),
    23: ("whitening: mean without the mask", HARD, PPO),
    24: ("old log-probs recomputed", MEDIUM, PPO + " --epochs 2"),
}


def hunts():
    """All hunts by number."""
    story = "Something is wrong with this run. Compare it with the right one, and find the line."
    out = dict(HUNTS)
    for number, (mutant, level, command) in MORE.items():
        out[number] = Hunt(mutant, level, command, story, [], needs=CHAIN)
    return out


def mutant_of(name):
    """The row of tests/mutants.py with this name → file, source, replacement."""
    path = os.path.join(HOME, "tests", "mutants.py")
    require(os.path.isfile(path), "tests/mutants.py, the list of bugs, is not in this copy of the repository")
    for row in load(path, "mutants").MUTANTS:
        if row[0] == name:
            return row[1:4]
    raise AssertionError(f"{name}: no such mutant")  # tests/test_course.py looks at every name


def function_around(text, source):
    """The name of the function in which a piece of source stands."""
    before = text[: text.index(source) + len(source)]
    names = re.findall(r"^ *def (\w+)", before, flags=re.M)
    return names[-1] if names else "the top of the file"


def show_list():
    """Print all hunts, by difficulty → exit status."""
    for level in (EASY, MEDIUM, HARD):
        print(f"{level}:")
        for number, hunt in hunts().items():
            if hunt.level == level:
                week = f"week {hunt.week}" if hunt.week else ""
                print(f"  {number:3}  {week:<8} python {hunt.command}")
    print("\npython -m course bug 3            plant it, run it, and see the curves")
    print("python -m course bug 3 --hint     a hint; --hint 2 says more; --reveal the line")
    return 0


def hunt(number, hint=0, reveal=False):
    """Run a hunt, or say something about it → exit status."""
    every = hunts()
    require(number in every, f"bug {number}: the hunts are 1 to {max(every)}; python -m course bug --list")
    chosen = every[number]
    if hint:
        return give_hint(chosen, hint)
    if reveal:
        return show_line(number, chosen)
    return plant_and_run(number, chosen)


def give_hint(hunt, hint):
    file, source, _ = mutant_of(hunt.mutant)
    with open(os.path.join(HOME, file), encoding="utf-8") as f:
        text = f.read()
    hints = [
        *hunt.hints,
        f"The line is in {file}.",
        f"It is in the function {function_around(text, source)}.",
    ]
    require(1 <= hint <= len(hints), f"--hint {hint}: there are the hints 1 to {len(hints)}, then --reveal")
    print(hints[hint - 1])
    return 0


def show_line(number, hunt):
    file, source, replacement = mutant_of(hunt.mutant)
    with open(os.path.join(HOME, file), encoding="utf-8") as f:
        text = f.read()
    wrong = text.replace(source, replacement)
    lines = difflib.unified_diff(text.splitlines(), wrong.splitlines(), file, f"{file} with the bug", n=2)
    print("\n".join(line.rstrip("\n") for line in lines))
    answers = os.path.join(HERE, "solutions", "hunts.py")
    if number in HUNTS and os.path.isfile(answers):
        print(f"\nA good answer: {load(answers, 'hunts_answers').ANSWERS[number]}")
    return 0


def copy_with_bug(folder, hunt):
    """The sources with the bug planted, without tests, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in COPIED:
        shutil.copytree(os.path.join(HOME, name), os.path.join(folder, name), ignore=CACHES)
    for name in os.listdir(HOME):
        if name.endswith((".py", ".toml")):
            shutil.copy(os.path.join(HOME, name), folder)
    file, source, replacement = mutant_of(hunt.mutant)
    path = os.path.join(folder, file)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(source, replacement))


def train(root, command, out):
    """Run a trainer of the repository at `root`; RunError with its last lines if it fails."""
    argv = [sys.executable, *command, "--seed", "0", "--threads", "1", "--device", "cpu"]
    argv += ["--overwrite", "--out", os.path.abspath(out)]
    done = subprocess.run(
        argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        raise RunError(" | ".join(lines[-3:]))
    return [line for line in lines if line.startswith(("health", "  !!"))]


def right_run(command):
    """The same command without a bug, run once for all hunts that have it → its folder, its health lines."""
    with open(os.path.join(HOME, command[0]), encoding="utf-8") as f:
        key = hashlib.sha256(" ".join([*command, f.read()]).encode()).hexdigest()[:12]
    folder = f"{plug.ROOT}/right-{key}"
    done = f"{folder}/health.txt"
    if not os.path.isfile(done):
        lines = train(HOME, command, folder)
        with open(done, "w", encoding="utf-8") as f:
            f.write("\n".join(lines))
    with open(done, encoding="utf-8") as f:
        return folder, f.read().splitlines()


def plant_and_run(number, hunt):
    home = f"{plug.ROOT}/bug-{number:02}"
    print(f"hunt {number} ({hunt.level}): {hunt.story}\n", flush=True)
    flags = []
    for flag, folder in plug.inputs_of(hunt.needs).items():
        flags += [f"--{flag}", os.path.abspath(folder)]
    command = [*hunt.command.split(), *flags]
    copy = f"{home}/repository"
    copy_with_bug(copy, hunt)
    print(f"running python {hunt.command} with the bug, and without it", flush=True)
    health = train(copy, command, f"{home}/run")
    right, right_health = right_run(command)
    for line in health:
        print(f"with the bug: {line}")
    for line in right_health:
        print(f"right:        {line}")
    show(right, f"{home}/run", f"{home}/beside_the_right_run.png")
    print(f"\nthe copy:  {copy} (the bug is one line of it; comparing it with this folder would be cheating)")
    print(f"the run:   {home}/run, with metrics.csv and samples.jsonl")
    print(f"a hint:    python -m course bug {number} --hint")
    return 0


def show(right, other, path):
    """First and last figures of both runs, and the picture of all columns."""
    ours = compare.load(right)
    rows = compare.load(other)
    names = compare.columns_of(ours)
    compare.ends_table(ours, rows, names, "right", "bug")
    if compare.picture(path, ours, rows, names, "the right run", "the run with the bug"):
        print(f"\ncurves:    {path}")
    compare.say_page(other, right)
