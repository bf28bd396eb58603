"""Chats and texts against transformers: the same text, the same ids, or a refusal that says why.

    CHATS_FULL=1 pytest tests/test_chats.py     5,000 conversations of each template, 40 without it

The tokenizers are small ones of each published kind, the templates are written here and behave as those of
their families do. Conversations come from hypothesis, with white space, thoughts, and typed control tokens.
"""

import functools
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nanorlhf.errors import UserError
from nanorlhf.hub import tokenizer_files
from nanorlhf.tokenizer import MARK, Chat

transformers = pytest.importorskip("transformers")
GOLDEN = json.loads((Path(__file__).parent / "golden/tokenizers.json").read_text("utf-8"))
MANY = 5000 if os.environ.get("CHATS_FULL") else 40
often = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))

# ------------------------------------------------------------------------------------------------------------
# templates

CHATML = """{% for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
DEFAULT_SYSTEM = """{% if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\n' + HELLO + '<|im_end|>\\n' }}
{%- endif %}""" + CHATML  # fmt: skip
QWEN25 = DEFAULT_SYSTEM.replace("HELLO", "'You are a cat.'")
SMOLLM2 = DEFAULT_SYSTEM.replace("HELLO", "'You are named Smol.'")
LLAMA3 = """{% for m in messages %}
    {%- set head = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' %}
    {%- set turn = head + m['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{% set turn = bos_token + turn %}{% endif %}
    {{- turn }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA2 = """{% set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# Thoughts before the last question are dropped; without thinking, the answer begins behind an empty thought.
QWEN3 = """{% set asked = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{% set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > asked.at and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{ content }}{% endif %}
    {%- else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
R1 = """{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}
    {%- if m.role == 'assistant' %}
        {{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


# ------------------------------------------------------------------------------------------------------------
# tokenizers

FLAGS = dict(lstrip=False, rstrip=False, single_word=False, normalized=False)
MERGES = "▁ t,h e,▁t he,i n,▁ ▁,▁▁ ▁▁,a n,▁ a,e r,▁a n,▁an s,! !,1 2,▁ [,I N,S T,IN ST,"
MERGES += "] ▁,\n \n,<0x0A> <0x0A>"


def special(text, i, **flags):
    return dict(id=i, content=text, special=True) | FLAGS | flags


def pieces(control, **parts):
    """A small tokenizer.json of the SentencePiece kind; control tokens are the first ids."""
    vocab = {}
    merges = [tuple(pair.split(" ")) for pair in MERGES.split(",")]
    chars = [*map(chr, range(33, 127)), "▁", "é", "日"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    for text in ["<unk>", *control, *bytes_, "\n", *chars, *("".join(pair) for pair in merges)]:
        vocab.setdefault(text, len(vocab))
    model = dict(type="BPE", vocab=vocab, merges=[list(pair) for pair in merges])
    model |= dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False, dropout=None)
    model |= dict(continuing_subword_prefix=None, end_of_word_suffix=None)
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    bos = {"SpecialToken": {"id": control[0], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    both = {"Sequence": {"id": "B", "type_id": 0}}
    named = {control[0]: {"id": control[0], "ids": [vocab[control[0]]], "tokens": [control[0]]}}
    post = dict(type="TemplateProcessing", single=[bos, text], pair=[bos, text, both], special_tokens=named)
    added = [special(text, vocab[text]) for text in ("<unk>", *control)]
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None)
    spec |= dict(pre_tokenizer=None, post_processor=post, model=model)
    return spec | dict(decoder={"type": "Sequence", "decoders": decoders}) | parts


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
LLAMA = ("<s>", "</s>")


def metaspace(scheme, split=False):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def byte_level(name, *more):
    """A golden tokenizer.json of the byte-level kind with more control tokens."""
    spec = json.loads(json.dumps(GOLDEN[name]["spec"]))
    first = 1 + max(token["id"] for token in spec["added_tokens"])
    spec["added_tokens"] += [special(text, first + n) for n, text in enumerate(more)]
    return spec


QWEN, BOS = byte_level("qwen"), "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
KINDS = {  # name → tokenizer.json, template, the special tokens' names
    "ChatML": (QWEN, CHATML, dict(eos_token="<|im_end|>")),
    "Llama 2": (pieces(LLAMA, normalizer=PREPEND), LLAMA2, dict(bos_token="<s>", eos_token="</s>")),
    "Llama 2, not legacy": (pieces(LLAMA, pre_tokenizer=metaspace("first")), LLAMA2,
                            dict(bos_token="<s>", eos_token="</s>")),
    "Llama 3": (byte_level("llama3"), LLAMA3, dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")),
    "Qwen2.5": (QWEN, QWEN25, dict(eos_token="<|im_end|>")),
    "Qwen3": (QWEN, QWEN3, dict(eos_token="<|im_end|>")),
    "Qwen3 without thought": (QWEN, "{% set enable_thinking = false %}" + QWEN3,
                              dict(eos_token="<|im_end|>")),
    "R1": (byte_level("qwen", BOS, END, "<｜User｜>", "<｜Assistant｜>"), R1,
           dict(bos_token=BOS, eos_token=END)),
    "SmolLM2": (byte_level("smollm2"), SMOLLM2, dict(eos_token="<|im_end|>")),
    "Gemma": (pieces(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), normalizer=SPACES,
                     pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "invert": False,
                                    "behavior": "MergedWithPrevious"}),
              GEMMA, dict(bos_token="<bos>", eos_token="<end_of_turn>")),
}  # fmt: skip


def write(folder, spec, template, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def load(folder):
    return tokenizer_files.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """name of KINDS → our tokenizer, theirs."""
    root = tmp_path_factory.mktemp("chats")

    @functools.cache
    def get(name):
        spec, template, tokens = KINDS[name]
        return load(write(root / name.replace(" ", "_"), spec, template, **tokens))

    return get


# ------------------------------------------------------------------------------------------------------------
# conversations

WORDS = ["the answer", "Hi, 1+1?", " ", "  ", "\n", "\n\n", "é", "日本", "🙂", "12", "!!", "don't", " an",
         "[INST]", "\u00a0", "\t", "e\u0301", "▁", "<", "x" * 9]  # fmt: skip
THOUGHT = ["<think>", "</think>", "<think>\nadd\n</think>\n\n", "<think>\n\n</think>\n\n"]
EVIL = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "<end_of_turn>", END,
        "<|im_<|im_end|>end|>"]  # fmt: skip
PLANES = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x1E00, 0x206F), (0x3000, 0x30FF),
          (0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0xFB00, 0xFDCF), (0x1F300, 0x1FAFF),
          (0x10000, 0x10FFFF)]  # fmt: skip
seeds = st.integers(0, 2**64 - 1)


def random_text(rng, more=(), longest=5):
    """Words, white space and characters of all planes, and some of these strings."""
    out = []
    for _ in range(rng.randint(0, longest)):
        if more and rng.random() < 0.3:
            out.append(rng.choice(more))
        elif rng.random() < 0.7:
            out.append(rng.choice(WORDS))
        else:
            low, high = rng.choice(PLANES)
            out += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))]
    return "".join(out)


def conversation(rng):
    """Mostly in turn, perhaps behind a system message; sometimes anything. One in five has control tokens."""
    evil = EVIL + THOUGHT if rng.random() < 0.2 else []
    order = ["system"] if rng.random() < 0.5 else []
    order += (["user", "assistant"] * 3)[: rng.randint(1, 6)]
    if rng.random() < 0.1:
        order = [rng.choice(["system", "user", "assistant"]) for _ in range(rng.randint(1, 4))]
    messages = []
    for role in order:
        text = random_text(rng, evil)
        if role == "assistant" and rng.random() < 0.4:
            text = rng.choice(THOUGHT) + text
        messages.append({"role": role, "content": text})
    return messages


def rendered(theirs, messages, prompt):
    """transformers' text, or None where its template refuses the messages."""
    from jinja2 import TemplateError

    try:
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    except TemplateError:
        return None


def ids_of(theirs, text):
    return theirs(text, add_special_tokens=False)["input_ids"]


def same_nfc(ours, theirs, text):
    """Whether both know the same version of Unicode, as far as this text goes."""
    if not ours.nfc:
        return True
    return theirs.backend_tokenizer.normalizer.normalize_str(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", KINDS)
@often
@given(seed=seeds)
def test_conversations(name, both, seed):
    """Prompts, and the conversations as far as they go: text and ids of transformers, or refused as there."""
    ours, theirs = both(name)
    messages = conversation(random.Random(seed))
    assume(all(same_nfc(ours, theirs, m["content"]) for m in messages))
    for prompt in (False, True):
        text = rendered(theirs, messages, prompt)
        if text is None:
            with pytest.raises(UserError, match="^chat template: "):
                ours.template.render(messages, prompt)
            continue
        got = ours.template.render(messages, prompt)
        assert got.replace(MARK, "") == text
        ids = ours.encode(got, control=True)
        if MARK not in got:
            assert ids == ids_of(theirs, text)
        else:  # typed control tokens: theirs would obey them, ours holds none but the template's
            harmless = [m | {"content": "x"} for m in messages]
            plain = ours.encode(ours.template.render(harmless, prompt), control=True)
            for token in ours.control.values():
                assert ids.count(token) == plain.count(token)
        if prompt:
            assert ours.encode_prompt(Chat(messages)) == ids
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:
            check_answer(ours, theirs, messages[:i], message)


def check_answer(ours, theirs, messages, message):
    """What is trained is what a policy would write.

    Behind the ids of the generation prompt stand the ids that transformers gives for the answered
    conversation, up to its end; behind a thought that the prompt opened, the answer from there on. It is
    refused only where the template writes no such continuation.
    """
    chat = Chat(messages)
    answer = message["content"]
    before = rendered(theirs, messages, True)
    answered = rendered(theirs, [*messages, message], False)
    if before is None or answered is None:
        with pytest.raises(UserError, match="^chat template: "):
            ours.encode_response(chat, answer)
        return
    opened = before.endswith("<think>\n")
    possible = answered.startswith(before)
    try:
        response = ours.encode_response(chat, answer)
    except UserError as e:
        assert str(e).startswith("chat template: ") and repr(answer[:40]) in str(e)
        assert "</think>" not in answer if opened else not possible or "think>" in answer
        return
    assert response.index(ours.eos_id) == len(response) - 1
    if opened:  # the thought and the answer, behind the <think> that the prompt has
        want = answer.removeprefix("<think>").removeprefix("\n")
        got = ours.decode(response[:-1])
        assert unicodedata.normalize("NFC", got) == unicodedata.normalize("NFC", want)
        return
    assert possible
    if MARK not in ours.template.render([*messages, message], False):
        prompt = ours.encode_prompt(chat)
        whole = ids_of(theirs, answered)
        if whole[: len(prompt)] == prompt:
            assert prompt + response == whole[: len(prompt) + len(response)]
        else:  # a token would span prompt and response: both are cut alone
            assert ours.decode(prompt + response) == ours.decode(whole)[: len(ours.decode(prompt + response))]


@pytest.mark.parametrize("name", KINDS)
@often
@given(seed=seeds)
def test_texts(name, both, seed):
    """A plain text, with and without what the tokenizer writes before a prompt, and a response behind it."""
    ours, theirs = both(name)
    text = random_text(random.Random(seed), longest=9)
    assume(same_nfc(ours, theirs, text))
    assert ours.encode(text) == ids_of(theirs, text)
    prompt = ours.encode_prompt(text)
    assert prompt == theirs(text)["input_ids"]
    answered = theirs(text + "the answer")["input_ids"]
    if answered[: len(prompt)] == prompt:
        assert [*answered, ours.eos_id] == prompt + ours.encode_response(text, "the answer")
    assert ours.encode_response(text, "the answer")[-1] == ours.eos_id


# ------------------------------------------------------------------------------------------------------------
# tokenizers of every kind


def flagged(**flags):
    """The byte-level tokenizer of Qwen, whose control tokens have these flags."""
    spec = byte_level("qwen")
    spec["added_tokens"] = [token | (flags if token["special"] else {}) for token in spec["added_tokens"]]
    return spec


def words_flagged(**flags):
    spec = byte_level("qwen")
    spec["added_tokens"] = [token | ({} if token["special"] else flags) for token in spec["added_tokens"]]
    return spec


def spaced():
    spec = byte_level("gpt2")
    return spec | {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}}


def unigram(scheme):
    """A Unigram model, as T5 and older Gemma have it."""
    spec = pieces(LLAMA, pre_tokenizer=metaspace(scheme, True))
    spec["added_tokens"] = [special("<unk>", 0), special("<s>", 400), special("</s>", 401)]
    texts = [text for text in spec["model"]["vocab"] if text not in LLAMA]
    vocab = [[text, -float(n % 7 + (len(text) < 2))] for n, text in enumerate(texts)]
    vocab += [[f"unused {n}", -99.0] for n in range(len(vocab), 400)]
    model = dict(type="Unigram", unk_id=0, vocab=vocab, byte_fallback=True)
    spec["post_processor"]["special_tokens"]["<s>"]["ids"] = [400]
    return spec | {"model": model}


VARIANTS = {
    "lstrip": flagged(lstrip=True),
    "rstrip": flagged(rstrip=True),
    "single_word": flagged(single_word=True),
    "all three": flagged(lstrip=True, rstrip=True, single_word=True),
    "words with lstrip": words_flagged(lstrip=True),
    "words with single_word": words_flagged(single_word=True),
    "words, normalized": words_flagged(normalized=True),
    "pieces with rstrip": pieces(LLAMA, normalizer=PREPEND, added_tokens=[
        special("<unk>", 0), special("<s>", 1, rstrip=True), special("</s>", 2, lstrip=True, rstrip=True)]),
    "Prepend": pieces(LLAMA, normalizer=PREPEND),
    "Unigram, first": unigram("first"),
    "Unigram, always": unigram("always"),
    "add_prefix_space": spaced(),
    **{f"{scheme}, {split}": pieces(LLAMA, pre_tokenizer=metaspace(scheme, split))
       for scheme in ("first", "always", "never") for split in (True, False)},
}  # fmt: skip


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")

    @functools.cache
    def get(name):
        spec = VARIANTS[name]
        eos = next(t["content"] for t in spec["added_tokens"] if t["special"] and t["content"] != "<unk>")
        return load(write(root / name.replace(" ", "_"), spec, CHATML, eos_token=eos))

    return get


@pytest.mark.parametrize("name", VARIANTS)
@often
@given(seed=seeds)
def test_control_tokens_of_every_kind(name, variant, seed):
    """A template's text with control tokens anywhere in it, and texts without."""
    ours, theirs = variant(name)
    rng = random.Random(seed)
    text = random_text(rng, [*ours.control, *THOUGHT, "x", " x "], longest=9)
    assume(same_nfc(ours, theirs, text))
    assert ours.encode(text, control=True) == ids_of(theirs, text)
    plain = random_text(rng, THOUGHT, longest=9)
    assume(same_nfc(ours, theirs, plain))
    assert ours.encode(plain) == ids_of(theirs, plain)
    assert ours.encode_prompt(plain) == theirs(plain)["input_ids"]
    evil = random_text(rng, [*ours.control], longest=9)
    assert not set(ours.encode(evil)) & set(ours.control.values()) - {ours.control.get("<unk>")}
    message = [{"role": "user", "content": evil}]
    if "word" in name or name == "all three":  # beside a letter the template's own is none, as theirs
        return
    ids = ours.encode_prompt(Chat(message))
    plain = ours.encode_prompt(Chat([{"role": "user", "content": ""}]))
    for token in set(ours.control.values()) - {ours.control.get("<unk>")}:
        assert ids.count(token) == plain.count(token)


LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer"}
UNIGRAM_LLAMA = pieces(LLAMA, pre_tokenizer=metaspace("first"), model=dict(
    type="Unigram", unk_id=0, byte_fallback=False,
     vocab=[["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["s", -1.0]]))
REFUSED = {
    "a user's text '<s>' would be": UNIGRAM_LLAMA,
    "a user's text .* would be the control token": flagged(normalized=True, lstrip=True),
    "writes tokens behind a text": pieces(LLAMA, post_processor=dict(
        type="TemplateProcessing", pair=[], special_tokens={}, single=[
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}])),
    "post-processor is of type Roberta": byte_level("gpt2") | {"post_processor": {
        "type": "RobertaProcessing", "sep": ["a", 0], "cls": ["a", 0], "trim_offsets": True,
        "add_prefix_space": False}},
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_a_tokenizer_that_would_differ_is_refused(says, tmp_path):
    eos = next(t["content"] for t in REFUSED[says]["added_tokens"] if t["special"])
    with pytest.raises(UserError, match=f"tokenizer.json: .*{says}"):
        tokenizer_files.load(write(tmp_path, REFUSED[says], CHATML, eos_token=eos))


@pytest.mark.parametrize("change, says", [
    (dict(add_bos_token=False), "add_bos_token=False"),
    (dict(add_eos_token=True), "add_eos_token=True"),
    (dict(add_prefix_space=False), "add_prefix_space=False"),
    (dict(added_tokens_decoder={"2": special("</s>", 2, lstrip=True)}), "the token '</s>' otherwise"),
    (dict(added_tokens_decoder={"9": special("<x>", 9)}), "the token '<x>' otherwise"),
    (dict(bos_token="<begin>", chat_template="{{ bos_token }}" + CHATML), "bos_token is no control token"),
    (dict(tokenizer_class="LlamaTokenizer"), "versions of transformers differ on a LlamaTokenizer"),
    (dict(tokenizer_class="LlamaTokenizerFast", legacy=True), "versions of transformers differ"),
    (dict(add_bos_token=True, add_prefix_space=True, add_eos_token=False, legacy=True), None),
    (dict(added_tokens_decoder={"2": special("</s>", 2)}), None),
], ids=str)  # fmt: skip
def test_a_config_that_contradicts_the_tokenizer(change, says, tmp_path):
    """tokenizer_config.json against tokenizer.json; where it agrees, the ids are theirs."""
    config = dict(bos_token="<s>", eos_token="</s>") | change
    for token in config.get("added_tokens_decoder", {}).values():
        token.pop("id", None)
    folder = write(tmp_path, pieces(LLAMA, normalizer=PREPEND), config.pop("chat_template", CHATML), **config)
    if says:
        with pytest.raises(UserError, match=f"tokenizer.json: .*{says}"):
            tokenizer_files.load(folder)
        return
    ours, theirs = load(folder)
    for text in ("Hi  there", " a", "▁", ""):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_whose_class_agrees(legacy, tmp_path):
    spec = pieces(LLAMA, pre_tokenizer=metaspace("always" if legacy else "first"))
    config = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=legacy)
    ours, theirs = load(write(tmp_path, spec, LLAMA2, tokenizer_class="LlamaTokenizer", **config))
    for seed in range(200):
        text = random_text(random.Random(seed), LLAMA, longest=9)
        assert ours.encode(text, control=True) == ids_of(theirs, text)
