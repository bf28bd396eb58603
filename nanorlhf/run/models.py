"""The models of a run, read from the folders that its flags name; an error begins with the flag."""

import contextlib
import math
import os
import re

import torch

from nanorlhf import hub, lora
from nanorlhf.data import encode_demonstrations
from nanorlhf.errors import UserError, memory_for, require
from nanorlhf.model import GPT, ScalarModel
from nanorlhf.run import defaults
from nanorlhf.run.device import to_device
from nanorlhf.tokenizer import Tokenizer


@contextlib.contextmanager
def _named(flag):
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


SMALLER = "take a smaller model, or --dtype bf16_weights in training"

# owner/name on the Hugging Face Hub, and the old names there that have no owner
HUB_NAME = (
    r"(?!(runs|models|out|data|\.+)/|.*\.gguf$)[\w.-]+/(?!model$)[\w.-]+|(distil)?gpt2(-medium|-large|-xl)?"
)
# run folders of the trainers' defaults; there are no preferences for chain and countdown
MADE = r"runs/(?!(?:chain|countdown)-(?:rm|dpo))(reviews|chain|countdown)-(sft|rm|ppo|grpo|dpo|distill)/model"


def _remedy(flag, folder, kind):
    """What to add to "does not exist": the line that makes or fetches this very folder, or nothing."""
    folder = os.path.normpath(folder)
    owner, name = os.path.split(folder)
    if re.fullmatch(HUB_NAME, folder) and not os.path.isdir(owner or folder):
        local = f"models/{name}"
        return f" here; fetch it: hf download {folder} --local-dir {local}, and give {flag} {local}"
    made = re.fullmatch(MADE, folder)
    if not made or kind and (kind == "reward model") != (made[2] == "rm"):
        return ""
    return f"; make it with: python train_{made[2]}.py --task {made[1]}"


def load_model(flag, folder, kind="", like=None, shard=False, weights=True):
    """hub.load(folder, …) → (model, tokenizer). UserError begins with `flag`, and ends with what to do."""
    with _named(flag), memory_for(f"{flag} {folder}", SMALLER):
        try:
            model, tok = hub.load(folder, kind, like=like, shard=shard, weights=weights)
        except hub.Missing as error:
            raise UserError(f"{error}{_remedy(flag, folder, kind)}") from None
    if hasattr(model, "fill"):  # --shard: the files are read later, by dist.spread
        read = model.fill

        def fill(model):
            with _named(flag):
                read(model)

        model.fill = fill
    return model, tok


def new_tokenizer(cfg, task, rows, test_rows):
    """Train the tokenizer of SFT's new model on the demonstrations; they say --max_len of own data."""
    kind = cfg.tokenizer or ("bpe" if cfg.data else task.tokenizer)
    if kind == "chars":  # the characters of the held-out rows belong to the alphabet, or they had no ids
        rows = rows + test_rows
    texts = [row[key] for row in rows for key in ("prompt", "response")]
    tok = Tokenizer.learn(kind, texts, task.alphabet, cfg.vocab_size)
    if cfg.max_len is None:
        cfg.max_len = defaults.context_for(encode_demonstrations(rows, tok, max_len=math.inf))
        print(f"--max_len {cfg.max_len}: the longest prompt and the longest response of {cfg.data}")
    return tok


def load_init(cfg, device):
    """The model of --init, a language model → (model, tokenizer). No weights are read for the meta device."""
    return load_model("--init", cfg.init, "language model", shard=cfg.shard, weights=device.type != "meta")


def load_models(cfg, device):
    """→ policy, reference (None with --ref none), reward model (or None), tokenizer; models on the device.

    In distillation the policy is the student, and the teacher stands in the place of the reference.

    All must share one vocabulary. With adapters (cfg.lora_rank) the policy's frozen self is the reference,
    unless that is another folder or is to follow the policy (cfg.ref_every). On the meta device (--dry_run)
    no weights are read.
    """
    policy, ref, _, rm, tok = load_models_and_critic(cfg, device)
    return policy, ref, rm, tok


def load_models_and_critic(cfg, device):
    """`load_models` for PPO → policy, reference, critic, reward model, tokenizer.

    A critic that starts from a language model gets a head of zeros: the best first guess of a return.
    """
    ppo = hasattr(cfg, "critic_init")
    policy, tok = load_init(cfg, device)
    options = dict(like=tok, shard=cfg.shard, weights=device.type != "meta")
    ref = rm = critic = None
    ref_flag = "teacher" if hasattr(cfg, "teacher") else "ref"
    ref_folder = getattr(cfg, ref_flag)
    moves = getattr(cfg, "ref_every", 0)
    shares = cfg.lora_rank and ref_folder == cfg.init and not moves  # the policy without its adapters
    if ref_folder != "none" and not shares:
        ref = load_model(f"--{ref_flag}", ref_folder, "language model", **options)[0]
        short = f"--{ref_flag} {ref_folder}: its context of {ref.cfg.max_len} tokens is shorter than"
        fits = ref_flag == "ref" or ref.cfg.max_len >= policy.cfg.max_len
        require(fits, f"{short} the {policy.cfg.max_len} of --init {cfg.init}")
    if getattr(cfg, "rm", ""):
        rm = load_model("--rm", cfg.rm, "reward model", **options)[0]
    if ppo:
        critic = load_model("--critic_init", cfg.critic_init, **options)[0]
        if isinstance(critic, GPT):
            critic = ScalarModel(critic)
            torch.nn.init.zeros_(critic.score.weight)
    # Adapters come after all models: their random numbers are drawn last.
    frozen = lora.add(policy, cfg.lora_rank, cfg.dtype)
    if shares:
        ref = frozen
    if ppo:
        lora.add(critic, cfg.lora_rank, cfg.dtype)
    with memory_for("the models", SMALLER):
        to_device(cfg, device, policy, ref, critic, rm)
    return policy, ref, critic, rm, tok
