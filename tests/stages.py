"""The trainers at their smallest: words of letters to reverse, models of one layer, runs of 50 ms."""

import random
from pathlib import Path

import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_prm
import train_rm
import train_sft
from nanorlhf.hub.files import write_jsonl

TRAINERS = [train_sft, train_rm, train_ppo, train_grpo, train_dpo, train_distill]
LOSS = {train_sft: "sft_loss", train_rm: "pairwise_loss", train_ppo: "policy_loss", train_grpo: "policy_loss"}
LOSS |= {train_dpo: "preference_loss", train_distill: "divergence"}


def words(n, seed=0, letters="abcdef"):
    """n demonstrations of a rule that depends on the prompt: `abc=` → `cba`."""
    rng = random.Random(seed)
    drawn = ["".join(rng.choices(letters, k=3)) for _ in range(n)]
    return [{"prompt": f"{word}=", "response": word[::-1]} for word in drawn]


def rows_of(trainer, n=64):
    """n rows of the data that this trainer reads; in pairs, the rejected word is any other."""
    rows, rng = words(n), random.Random("rejected")
    if trainer not in (train_rm, train_dpo):
        return rows
    other = ["".join(rng.choices("abcdef", k=rng.randint(1, 4))) for _ in rows]
    return [{"prompt": r["prompt"], "chosen": r["response"], "rejected": o} for r, o in zip(rows, other)]


def jsonl(path, rows):
    """Write rows → the path, as a flag takes it."""
    write_jsonl(path, rows)
    return str(path)


def tastes(n, seed=0):
    """`+abc:` likes x and `-abc:` dislikes it: neither the response alone nor its length tells who wins."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        prompt = rng.choice("+-") + "".join(rng.choices("abcdef", k=3)) + ":"
        pair = ["".join(rng.choices("xy", k=rng.randint(2, 5))) for _ in range(2)]
        few, many = sorted(pair, key=lambda text: text.count("x"))
        if few.count("x") < many.count("x"):
            chosen, rejected = (many, few) if prompt[0] == "+" else (few, many)
            rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    return rows


class Stages:
    """A folder with data files, and the models that later stages start from: SFT, reward model, teacher."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for trainer in TRAINERS:
            write_jsonl(self.folder / f"{trainer.__name__}.jsonl", rows_of(trainer))
        for trainer, name in ((train_sft, "sft"), (train_rm, "rm")):
            trainer.train(self.config(trainer, self.folder / name))
        teacher = self.config(train_sft, self.folder / "teacher", seed=1, d_model=48)
        train_sft.train(teacher)

    @classmethod
    def at(cls, folder):
        """Those that another process has made there."""
        found = cls.__new__(cls)
        found.folder = Path(folder)
        return found

    def flags(self, trainer, out, **more):
        """The flags of a run of 6 steps into `out`, a checkpoint every 2.

        On the CPU, also in a process of its own: a Mac's GPU cannot be hidden from one.
        """
        flags = dict(data=f"{self.folder}/{trainer.__name__}.jsonl", out=str(out), steps=6, lr=0.01,
                     save_every=2, threads=1, device="cpu")  # fmt: skip
        if trainer is train_sft:
            flags |= dict(n_layer=1, n_head=2, d_model=32, max_len=16, tokenizer="chars", batch_size=8)
        else:
            flags |= dict(init=f"{self.folder}/sft/model")
        if trainer in (train_rm, train_prm, train_dpo):
            flags |= dict(batch_size=8)
        if trainer is train_dpo:
            flags |= dict(max_new_tokens=5, eval_prompts=4)
        if trainer in (train_ppo, train_grpo):
            flags |= dict(rm=f"{self.folder}/rm/model", prompts_per_step=8, max_new_tokens=5, minibatches=2,
                          eval_prompts=4, sample_every=1)  # fmt: skip
        if trainer is train_distill:
            flags |= dict(teacher=f"{self.folder}/teacher/model", prompts_per_step=8, group_size=2,
                          max_new_tokens=5, eval_prompts=4, sample_every=1)  # fmt: skip
        if trainer is train_grpo:
            flags |= dict(prompts_per_step=4, group_size=4, max_new_tokens=5, off_policy_steps=1)
        return flags | more

    def config(self, trainer, out, **more):
        return trainer.Config(**self.flags(trainer, out, **more))
