"""docs/way-of-one-prompt.md against a step that runs: it passes every function of the page, and no other."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import train_grpo
from nanorlhf import hub, tasks
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/way-of-one-prompt.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| `([\w.]+)` \| \[`([\w/.]+\.py):(\d+)`\]", re.M)


def test_the_way_is_short():
    numbers, _, files, _ = zip(*ROW.findall(PAGE))
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    assert len(numbers) <= 35
    assert len(set(files)) <= 8
    assert f"{len(numbers)} functions in {len(set(files))} files" in PAGE


@pytest.fixture
def passed(tmp_path, monkeypatch):
    """{(file, name)} of our functions that one step of GRPO passes, from its prompts to its gradient."""
    task = tasks.get("chain")
    tok = Tokenizer.from_chars(task.alphabet)
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(tok.vocab_size, n_layer=1, n_head=2, d_model=32, max_len=32))
    hub.save(model, tok, f"{tmp_path}/model")
    rows = task.prompts("train", 4, 0)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = set()

    def trace(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            calls.add((file.relative_to(ROOT).as_posix(), frame.f_code.co_name))

    def from_here(*args, do=train_grpo.sample_step):
        sys.setprofile(trace)
        return do(*args)

    def to_here(*args, do=train_grpo.clip_gradient):
        sys.setprofile(None)
        return do(*args)

    monkeypatch.setattr(train_grpo, "sample_step", from_here)
    monkeypatch.setattr(train_grpo, "clip_gradient", to_here)
    cfg = train_grpo.Config(
        task="chain",
        data=f"{tmp_path}/prompts.jsonl",
        init=f"{tmp_path}/model",
        out=f"{tmp_path}/run",
        steps=1,
        prompts_per_step=4,
        group_size=4,
        eval_prompts=0,
        reward_timeout=0,
    )
    train_grpo.train(cfg)
    return calls


def test_every_function_of_the_page_is_passed(passed):
    for _, name, file, _ in ROW.findall(PAGE):
        name = name.split(".")[-1]
        names = {name, "__init__", "__post_init__"} if name[0].isupper() else {name}
        assert any((file, name) in passed for name in names), f"{name} of {file} is not called"


def test_the_page_leaves_out_no_function_of_the_floor(passed):
    """A new function on the way goes on the page, or among these helpers of a row that is there."""
    inside = {
        # the first two are properties; the next two belong to GPT.forward, the others to GPT.logprobs
        "nanorlhf/model.py": {"dtype", "trunk", "document_begins", "split_heads"}
        | {"scatter", "loss_of_chunk", "unembedding", "hidden_before"},
        "nanorlhf/metrics.py": {"add", "add_tensors", "read"},  # figures of the log line
        "nanorlhf/errors.py": {"visible"},  # control characters in samples.jsonl
        "nanorlhf/tasks.py": {"reward"},  # the last stop of the text
        "nanorlhf/rewards.py": {"call"},  # of score_responses
        "nanorlhf/rollout.py": {"changed", "compute", "logp", "lengths", "response_len"},
    }
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
    left = set()
    for file, name in passed:
        on_the_floor = re.fullmatch(r"train_grpo\.py|nanorlhf/\w+\.py", file)
        helper = name.startswith(("_", "<")) or name in inside.get(file, ())
        if on_the_floor and name not in told and not helper:
            left.add((file, name))
    assert left == set()
