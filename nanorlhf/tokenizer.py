"""Text to token ids and back: bytes, characters, a byte-level BPE trained here, or the one of a Hugging Face
folder; chat templates on top.

One class around one `tiktoken.Encoding`. The encoding is always built from ranks at hand, never fetched by
name, so nothing in this file opens a connection. What tiktoken could not do exactly is refused.

Text can never become a control token (end of text, begin of a turn): a user who types "<|im_end|>" gets
ordinary ids. Only code that appends `tok.eos_id`, and a chat template, write control tokens.
"""

import base64
import functools
import heapq
import itertools
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import regex
import tiktoken

from nanorlhf.errors import UserError, blame, require

LONG = 10_000  # characters of a word, from which on it is left out when ranks are learnt
FILE = "nanorlhf_tokenizer.json"  # of kind "chars"; the others are saved as tokenizer.json
ONE_CHAR = r"[\s\S]"  # not (?s). , which the regular expressions of transformers read otherwise
# Words keep the space before them, as in GPT-2, so that a sentence costs about one token a word. Unlike
# GPT-2's, this pattern never looks ahead: `\s+(?!\S)` backtracks, and dies on a million spaces in a row.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
RESERVED = [f"reserved_special_token_{i}" for i in range(248)]
LLAMA3_CONTROL = ["begin_of_text", "end_of_text", *RESERVED[:2], "finetune_right_pad_id", RESERVED[2],
                  "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", *RESERVED[3:]]
# A file of ranks says neither its pattern nor its control tokens: file → pattern, first control id, names.
RANKS = {
    "r50k_base.tiktoken": (GPT2, 50256, ["endoftext"]),
    "tokenizer.model": (LLAMA3, 128000, LLAMA3_CONTROL),
}
COPIED = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", "vocab.bpe", "encoder.json", "chat_template.jinja",
          "chat_template.json", "generation_config.json", *RANKS]  # fmt: skip
MARK = "\udfff"  # a lone surrogate: no text that tiktoken is given holds one


class Inexact(Exception):
    """Why a tokenizer's files cannot be read exactly."""


class Chat(str):
    """A prompt that is a conversation. As str its plain text, for tokenizers without a chat template; as
    `messages` [{"role", "content"}] what a template renders, and the assistant is to answer."""

    def __new__(cls, messages: list[dict], text: str | None = None):
        self = super().__new__(cls, plain_text(messages) if text is None else text)
        self.messages = messages
        return self

    def __getnewargs__(self):  # pickle: rewards run in a process of their own
        return self.messages, str(self)


def plain_text(messages: list[dict]) -> str:
    """The conversation up to where the assistant is to answer: the template of folders without one."""
    # It ends in no space: that one belongs to the first token of the answer.
    return "".join(f"{m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages) + "Assistant:\n"


class Tokenizer:
    """`ranks` are the bytes of each id; `pattern` cuts text into the pieces that merges never cross.

    kind       "bytes", "chars" or "bpe"; all but "chars" need every single byte among their tokens
    tokens     the bytes of ids 0 … R-1, then eos_id = R and pad_id = R+1; or {bytes: id}, with `control`
    control    {text: id} of tokens that no text encodes to
    words      {text: id} of added tokens that are no control tokens (<think>): found in text, longest first
    late       of these, the ones to be found after normalisation to NFC (if `nfc`) and not before
    eos, pad   texts of control tokens; pad is never EOS, where there is none some other id serves
    stop       more ids that end a response; `stop_ids` has them behind eos_id
    bos        ids that begin every prompt without a chat template
    template   the chat template (Jinja), `names` its variables, such as eos_token
    source     {file name: contents} that `save` copies
    library    a `tokenizers.Tokenizer` that does the work in place of tiktoken

    Raises UserError for tokens that tiktoken could not use, ValueError for a pattern that is none.
    """

    def __init__(self, kind: str, pattern: str, tokens: Sequence[bytes] | dict[bytes, int], control=None,
                 words=None, late=(), nfc=False, eos="<|eos|>", pad="<|pad|>", stop=(), bos=(), template=None,
                 names=None, source=None, library=None):  # fmt: skip
        ranks = tokens if isinstance(tokens, dict) else {token: rank for rank, token in enumerate(tokens)}
        if not library and (not tokens or b"" in ranks or len(ranks) != len(tokens)):
            raise UserError("tokenizer: tokens must be present, non-empty and all different")
        if kind not in ("bytes", "chars", "bpe", "library"):
            raise UserError(f"tokenizer: unknown kind {kind!r}, expected bytes, chars or bpe")
        if kind == "chars" and any(token.decode(errors="replace")[:1].encode() != token for token in tokens):
            raise UserError("tokenizer: every token of kind chars must be one character")
        if kind in ("bytes", "bpe") and any(bytes([b]) not in ranks for b in range(256)):
            raise UserError("tokenizer: all 256 single bytes must be tokens, or some text has no ids")
        self.kind, self.name = kind, f"nanorlhf-{kind}"
        self.pattern, self.ranks, self.tokens = pattern, ranks, list(ranks)
        self.control = control or {eos: len(ranks), pad: len(ranks) + 1}  # detail 3: pad is not EOS
        self.words, self.late, self.nfc = words or {}, frozenset(late), nfc
        self.added = self.control | self.words
        self.eos_id = self.control[eos]
        others = [self.control.get(pad), *self.control.values(), 0, 1]
        self.pad_id = next(i for i in others if i not in (None, self.eos_id))
        self.stop_ids = [self.eos_id, *(i for i in stop if i != self.eos_id)]
        self.bos_ids, self.template, self.names = list(bos), template, names or {"eos_token": eos}
        self.source, self.library = source or {}, library
        self._shown = {i: token for token, i in ranks.items()}
        self._shown |= {i: text.encode() for text, i in self.added.items()}
        self.vocab_size = 1 + max([*self._shown, library.get_vocab_size() - 1 if library else 0])
        early = self.words.keys() - self.late
        self._early, self._late, self._control = map(_any_of, (early, self.late, early | self.control.keys()))
        self._forbidden = _any_of(self.control)
        self.encoding = library or tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_bytes(cls) -> "Tokenizer":
        """One id per byte, id = byte value; vocab_size 258."""
        return cls("bytes", ONE_CHAR, [bytes([b]) for b in range(256)])

    @classmethod
    def from_chars(cls, alphabet: str) -> "Tokenizer":
        """One id per character, in the order of `alphabet`. UserError when it is empty or repeats one."""
        repeated = [c for c, n in Counter(alphabet).items() if n > 1]
        if not alphabet or repeated:
            what = f"repeats {repeated[0]!r}" if repeated else "is empty"
            raise UserError(f"tokenizer: the alphabet {what}; give every character once")
        return cls("chars", ONE_CHAR, [c.encode(errors="surrogatepass") for c in alphabet])

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) on `texts`.

        vocab_size counts the ranks, the 256 bytes included; eos and pad come on top. Fewer are learnt,
        without error, when no pair occurs twice any more. Deterministic: among equally frequent pairs the one
        with the lowest ids wins, so the order of the texts does not matter. UserError for vocab_size < 256.
        """
        if vocab_size < 256:
            raise UserError(f"tokenizer: vocab_size {vocab_size} is below 256, the single bytes alone")
        counts = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            counts.update(regex.findall(WORDS, text))
        # Ordinary text has no lone surrogates; tiktoken would read each as U+FFFD, here it counts as "?".
        # A run of a million spaces is no word: each merge would walk it once more, for minutes.
        words = [(list(word.encode(errors="replace")), n) for word, n in counts.items() if len(word) < LONG]
        return cls("bpe", WORDS, _learn(words, vocab_size))

    # --------------------------------------------------------------------------------------------------------
    # ids

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of `text`; a lone surrogate is read as U+FFFD.

        control   take control tokens in the text for what they say: for what a chat template wrote, never for
                  what a user did. Without it the ids never hold one, and begin with no BOS.

        Raises UserError for a character outside the alphabet (kind "chars"), and for a text on which the
        pattern overflows: GPT-2's does on a million spaces in a row.
        """
        out = []
        for i, part in enumerate(_split(self._control if control else self._early, text)):
            if i % 2:
                out.append(self.added[part])
                continue
            part = part.replace(MARK, "") if control else part
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            for j, piece in enumerate(_split(self._late, part)):
                out += [self.words[piece]] if j % 2 else self._ordinary(piece)
        return out

    def _ordinary(self, text):
        if self.library:
            return self.library.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids
        if self.kind == "chars":
            alphabet = b"".join(self.tokens).decode()
            unknown = [c for c in text if c not in alphabet]
            if unknown:  # tiktoken panics on bytes it has no rank for
                raise UserError(f"tokenizer: character {unknown[0]!r} is not in alphabet {alphabet[:100]!r}")
        try:
            # Not encode_ordinary: where the regex gives up, that one panics past `except Exception`.
            return self.encoding.encode(text, disallowed_special=())
        except ValueError as e:
            raise UserError(f"tokenizer: {len(text)} characters of text are too many ({e}); cut it") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Control tokens are shown as <|eos|>, <|pad|>; bytes that are no UTF-8, and ids that
        no token has (a model's vocabulary is often padded beyond the tokenizer's), become U+FFFD."""
        if self.library:
            known = [i for i in ids if 0 <= i < self.vocab_size]
            return self.library.decode(known, skip_special_tokens=False)
        return b"".join(self._shown.get(i, b"\xef\xbf\xbd") for i in ids).decode(errors="replace")

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of what a policy is to answer: a `Chat` through the template, if there is one; else BOS (where
        the folder's tokenizer writes one) and the text."""
        if isinstance(prompt, Chat) and self.template:
            return self.encode(self.render(prompt.messages, True), control=True)
        return self.bos_ids + self.encode(prompt)

    def encode_response(self, prompt: str, response: str) -> list[int]:
        """Ids of `response` to `prompt`, with the EOS: what the policy would have to sample.

        Tokenized apart from the prompt, because a merge across the boundary is one that no policy can sample.
        To a Chat: what the template writes behind its own generation prompt, up to the end of the turn;
        the bare response where the template rewrites the prompt once it is answered.
        """
        if isinstance(prompt, Chat) and self.template:
            before = self.render(prompt.messages, True)
            answer = {"role": "assistant", "content": response.removeprefix(" ")}  # a transcript's space
            whole = self.render([*prompt.messages, answer], False)
            if whole.startswith(before):
                ids = self.encode(whole[len(before) :], control=True)
                end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), None)
                return ids[:end] if end else [*ids, self.eos_id]
        return [*self.encode(response), self.eos_id]

    def encode_chat(self, messages: list[dict]) -> list[tuple[list[int], list[bool]]]:
        """A conversation → (ids, mask) rows; the mask is True on the tokens that the assistant is to sample.

        One row where every turn's prompt begins with the ids of the turns before. A template that rewrites
        earlier turns (Qwen3 drops their thoughts), or ends none with EOS, gives rows of their own to turns:
        each is trained on behind exactly the ids it would be sampled behind.
        """
        rows = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i > 0:
                prompt = Chat(messages[:i])
                p, r = self.encode_prompt(prompt), self.encode_response(prompt, message["content"])
                goes_on = rows and p[: len(rows[-1][0])] == rows[-1][0]
                mask = rows.pop()[1] if goes_on else []
                rows.append((p + r, mask + [False] * (len(p) - len(mask)) + [True] * len(r)))
        return rows

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The chat template's text for these messages, as `apply_chat_template` of transformers has it, but
        for a MARK inside every control token that a message holds: `encode(…, control=True)` removes it.

        UserError for what the template refuses. The template is a stranger's program: it runs in a sandbox.
        """
        try:
            return _compile(self.template).render(
                messages=self._disarm(messages), add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self.names,
            )  # fmt: skip
        except Exception as e:  # whatever a stranger's program raises
            reason = " ".join(f"{e or type(e).__name__}".split())
            raise UserError(f"chat template: {reason}") from None

    def _disarm(self, x):
        if isinstance(x, (list, tuple)):
            return [self._disarm(item) for item in x]
        if isinstance(x, dict):
            return {key: self._disarm(item) for key, item in x.items()}
        if isinstance(x, str):
            x = regex.sub("[\ud800-\udfff]", "\ufffd", x)
            while self._forbidden.search(x):  # again where two of them overlap
                x = self._forbidden.sub(lambda m: m[0][0] + MARK + m[0][1:], x)
        return x

    # --------------------------------------------------------------------------------------------------------
    # files

    def __eq__(self, other) -> bool:
        """Same pattern, ranks and added tokens, hence the same ids for every text."""
        return isinstance(other, Tokenizer) and self._parts() == other._parts()

    def _parts(self):
        library = self.library and self.library.to_str()
        return self.pattern, self.ranks, self.control, self.words, self.late, self.nfc, self.eos_id, library

    def files(self) -> dict[str, bytes]:
        """{file name: contents} of a saved tokenizer, for `checkpoint.write_folder`: its source's files, and
        tokenizer.json where the source has none, so that transformers and vLLM read the folder.

        Kind "chars" has no counterpart there, as it refuses unknown characters: it has a file of its own.
        """
        if self.kind == "chars":
            tokens = [base64.b64encode(token).decode() for token in self.tokens]
            return {FILE: json.dumps({"kind": self.kind, "pattern": self.pattern, "tokens": tokens}).encode()}
        out = dict(self.source)
        if not self.library and "tokenizer.json" not in out:
            out["tokenizer.json"] = json.dumps(self._to_json(), ensure_ascii=False).encode()
        if "tokenizer_config.json" not in out:
            shown = {i: text for text, i in self.control.items()}
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                      "eos_token": shown[self.eos_id], "pad_token": shown.get(self.pad_id)}  # fmt: skip
            out["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        return out

    def _to_json(self):
        spell = {i: "".join(CHARS[b] for b in token) for token, i in self.ranks.items()}
        vocab = {text: i for i, text in sorted(spell.items())}
        pieces = [_derive(text, vocab) for text in vocab if len(text) > 1]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        how = dict(single_word=False, lstrip=False, rstrip=False)
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [
                dict(id=i, content=text, **how, normalized=text in self.late, special=text in self.control)
                for text, i in sorted(self.added.items(), key=lambda item: item[1])
            ],
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True, "vocab": vocab,
                      "merges": [" ".join(pair) for pair in pieces if len(pair) == 2]},
        }  # fmt: skip

    def save(self, folder) -> None:
        """Write `files()` into `folder`, which is made when it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).unlink(missing_ok=True)  # it would come first
        for name, data in self.files().items():
            (Path(folder) / name).write_bytes(data)

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """The tokenizer of a folder: ours, tokenizer.json, vocab.bpe + encoder.json, vocab.json + merges.txt,
        or a known file of ranks (RANKS), in this order.

        UserError naming the file when it is missing or damaged, or when tiktoken could not give the same ids
        as transformers. Such a tokenizer.json is read by the `tokenizers` package where that is installed.
        """
        path = next((p for p in map(Path(folder).joinpath, LOADERS) if p.is_file()), Path(folder) / FILE)
        try:
            return LOADERS[path.name](cls, path)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}; expected the file that Tokenizer.save writes") from None
        except Inexact as e:
            return cls(**_through_library(path, e))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError) as e:
            raise UserError(f"{path}: damaged ({e!r:.200}); expected a tokenizer's file") from None

    @classmethod
    def present(cls, folder) -> bool:
        """Whether the folder holds any file that `load` would try to read."""
        return any((Path(folder) / name).is_file() for name in LOADERS)

    def _load_ours(cls, path):
        data = json.loads(path.read_text("utf-8"))
        tokens = [base64.b64decode(token, validate=True) for token in data["tokens"]]
        return cls(data["kind"], data["pattern"], tokens)

    def _load_json(cls, path):
        return cls(**_parts_of(json.loads(path.read_text("utf-8")), path.parent))

    def _load_gpt2(cls, path):
        """vocab.json + merges.txt, as older folders have them, or OpenAI's encoder.json + vocab.bpe: neither
        says the pattern, and the added tokens stand elsewhere."""
        config = _read(path.parent / "tokenizer_config.json")
        kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
        _need(kind in ("GPT2Tokenizer", "Qwen2Tokenizer"), f"{path.name} of a {kind} says no split pattern")
        merges = path.with_name({"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}[path.name])
        lines = merges.read_text("utf-8").split("\n")  # not splitlines: U+0085 is a byte's spelling
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("#version")]
        vocab = json.loads(path.read_text("utf-8"))
        added = config.get("added_tokens_decoder") or {
            i: {"content": text, "special": True}
            for text, i in (_read(path.with_name("added_tokens.json")) or {"<|endoftext|>": None}).items()
        }
        plain = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=False)
        added = [plain | x | {"id": vocab.get(x["content"], i)} for i, x in added.items()]
        pattern = QWEN if kind == "Qwen2Tokenizer" else GPT2
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                 {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space") or False,
                  "use_regex": False}]  # fmt: skip
        return cls(**_parts_of({
            "added_tokens": [x | {"id": int(x["id"])} for x in added],
            "normalizer": {"type": "NFC"} if kind == "Qwen2Tokenizer" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "model": {"type": "BPE", "vocab": vocab, "merges": lines},
        }, path.parent))  # fmt: skip

    def _load_ranks(cls, path):
        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            raise Inexact("no lines of base64 and rank: a SentencePiece model, no byte-level BPE") from None
        pattern, first, names = RANKS[path.name]
        _need(len(ranks) == first, f"{len(ranks)} ranks, {first} are expected of a file of this name")
        control = {f"<|{name}|>": first + i for i, name in enumerate(names)}
        return cls("bpe", pattern, ranks, **_roles(path.parent, control))


LOADERS = {FILE: Tokenizer._load_ours, "tokenizer.json": Tokenizer._load_json,
           "encoder.json": Tokenizer._load_gpt2, "vocab.json": Tokenizer._load_gpt2,
           **dict.fromkeys(RANKS, Tokenizer._load_ranks)}  # fmt: skip
# How tokenizer.json spells a byte: printable ones as they are, the others as the characters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


def _any_of(texts):
    """A pattern that finds the longest of `texts` at the leftmost place, and captures it; None for none."""
    longest = sorted(texts, key=lambda text: (-len(text), text))
    return regex.compile(f"({'|'.join(map(regex.escape, longest))})") if longest else None


def _split(pattern, text):
    return pattern.split(text) if pattern else [text]


@functools.lru_cache(4)
def _compile(template):
    import jinja2  # here: not every run has a chat template
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # {% generation %} marks what the assistant says; we find it by rendering
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **how):
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson  # jinja2's own escapes HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(template)


# ------------------------------------------------------------------------------------------------------------
# a tokenizer.json, exactly or not at all


def _need(ok, reason):
    if not ok:
        raise Inexact(reason)


def _derive(token: str, ranks: dict[str, int]) -> list[str]:
    """The pieces that BPE cuts `token` into when it may use merges of lower rank only."""
    parts = list(token)
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, 1 << 60), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _check_merges(vocab, merges, ignore_merges):
    """Inexact unless tiktoken, which merges by the rank of the result, gives the ids that the merges give.

    Where two neighbours x, y are to become the token s, everything of lower rank inside s has been merged,
    and nothing has crossed its ends; so (x, y) is what `_derive` says of s. It is enough, then, that this
    pair is a listed merge, for every token; other pairs listed for s never meet. A token that `_derive`
    leaves in more than two pieces is never merged into, only found whole: as by ignore_merges (Llama 3).
    """
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    made = [vocab["".join(pair)] for pair in pairs]
    _need(made == sorted(made), "its merges are not in the order of the ids")
    listed = set(pairs)
    for token in vocab:
        parts = _derive(token, vocab)
        if len(parts) == 2:
            _need(tuple(parts) in listed, f"no merge {' '.join(parts)}, though {token} is a token")
        elif len(parts) > 2:
            _need(ignore_merges, f"no merge makes the token {token}")


def _pattern_of(pre):
    """The pre-tokenizer of a tokenizer.json as one pattern that cuts text into the same pieces."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    *first, last = steps
    kinds = "+".join(step["type"] for step in steps)
    _need(last["type"] == "ByteLevel", f"pre-tokenizer {kinds}: no byte-level BPE")
    _need(not last.get("add_prefix_space", True), "add_prefix_space writes a space before the text")
    if kinds == "ByteLevel" and last.get("use_regex", True):
        return GPT2
    if kinds == "Digits+ByteLevel" and last.get("use_regex", True):
        # Digits are cut out first: they take no space before them, and the space before them ends a piece.
        digits = r"\p{N}" if first[0].get("individual_digits") else r"\p{N}+"
        return GPT2.replace(r" ?\p{N}+", digits).replace(r"\s+(?!", r"\s+(?=\p{N})|\s+(?!")
    _need(kinds == "Split+ByteLevel" and not last.get("use_regex", True), f"pre-tokenizer {kinds} is unknown")
    how = first[0]["behavior"], first[0].get("invert", False)
    _need(how == ("Isolated", False) and "Regex" in first[0]["pattern"], f"a split of behavior {how}")
    return first[0]["pattern"]["Regex"]


def _parts_of(spec, folder):
    """A tokenizer.json → what Tokenizer is made of. Inexact where that would not give the same ids."""
    model, normal = spec["model"], spec.get("normalizer")
    _need(model.get("type", "BPE") == "BPE", f"a model of type {model.get('type')}, no byte-level BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _need(not model.get(key), f"{key}={model.get(key)!r}")
    steps = normal.get("normalizers", [normal]) if normal else []
    _need(all(step["type"] == "NFC" for step in steps), f"normalizer {'+'.join(s['type'] for s in steps)}")
    pattern = _pattern_of(spec["pre_tokenizer"])
    control, words, late = {}, {}, []
    for token in spec.get("added_tokens", []):
        text = token["content"]
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token[key]]
        _need(not odd, f"the added token {text!r} has {' and '.join(odd)}")
        _need(len(text) > 1 or not token["special"], f"the control token {text!r} is a single character")
        (control if token["special"] else words)[text] = token["id"]
        late += [text] * (token["normalized"] and not token["special"])
    vocab = {text: i for text, i in model["vocab"].items() if {**control, **words}.get(text) != i}
    _need(all(c in vocab for c in CHARS.values()), "not every single byte is a token: text would be lost")
    spelt = {char: b for b, char in CHARS.items()}
    unspelt = [text for text in vocab if not set(text) <= spelt.keys()]
    _need(not unspelt, f"the token {(unspelt or [''])[0]!r} is not spelt in bytes")
    _check_merges(vocab, model["merges"], model.get("ignore_merges", False))
    ranks = {bytes(map(spelt.get, text)): i for text, i in sorted(vocab.items(), key=lambda item: item[1])}
    sample = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000, 7)))) + "it's 12 x\r\n \t."
    _need(sample == "".join(regex.findall(f"(?:{pattern})", sample)), "its split pattern drops characters")
    added = control | words
    post = spec.get("post_processor") or {"type": "none"}
    after = post["processors"] if post["type"] == "Sequence" else [post]
    single = next((p["single"] for p in after if p["type"] == "TemplateProcessing"), [])
    before = itertools.takewhile(lambda item: "SpecialToken" in item, single)  # what stands before the text
    bos = [added[item["SpecialToken"]["id"]] for item in before]
    kind = "bpe" if len(ranks) > 256 else "bytes"
    return dict(kind=kind, pattern=pattern, tokens=ranks, words=words, late=late, nfc=bool(steps), bos=bos,
                **_roles(folder, control))  # fmt: skip


def _read(path):
    with blame(path, ValueError):
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        require(isinstance(found, dict), "is not a JSON object")
    return found


def beside(folder) -> dict[str, bytes]:
    """{file name: contents} of what travels with a model, beside its weights and config.json."""
    return {path.name: path.read_bytes() for path in map(Path(folder).joinpath, COPIED) if path.is_file()}


def stop_ids(folder) -> list[int]:
    """The ids that end a response; generation_config.json goes before config.json, as in transformers."""
    settings = _read(Path(folder) / "config.json") | _read(Path(folder) / "generation_config.json")
    ids = settings.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]


def _roles(folder, control):
    """What the folder's other files say: which control token ends a text, which pads; the chat template."""
    config = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    names = {key: x["content"] if isinstance(x, dict) else x
             for key, x in config.items() if key[3:] == "_token" and x}  # fmt: skip
    stop = stop_ids(folder)
    shown = {i: text for text, i in control.items()}
    ends = names.get("eos_token"), *map(shown.get, stop), "<|endoftext|>"
    eos = next((text for text in ends if text in control), None)
    _need(eos, "neither eos_token nor eos_token_id names a control token")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((x["template"] for x in template if x["name"] == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return dict(control=control, eos=eos, pad=names.get("pad_token"), stop=stop, template=template,
                names=names | {"eos_token": eos}, source=beside(folder))  # fmt: skip


def _through_library(path, why):
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: {why}; pip install tokenizers lets that package read it") from None
    if path.name != "tokenizer.json":
        raise UserError(f"{path}: {why}; save it as tokenizer.json with transformers first") from None
    try:
        library = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        library.encode_special_tokens = True  # text never becomes a control token
        library.no_truncation()
        library.no_padding()
        added = library.get_added_tokens_decoder().items()
        roles = _roles(path.parent, {token.content: i for i, token in added if token.special})
    except Exception as e:  # Inexact, or what the package raises: a bare Exception
        raise UserError(f"{path}: {why}; {' '.join(str(e).split())}") from None
    return dict(kind="library", pattern="", tokens={}, library=library, **roles)


# ------------------------------------------------------------------------------------------------------------
# training


def _learn(words: list[tuple[list[int], int]], vocab_size: int) -> list[bytes]:
    """The tokens of a byte-level BPE in rank order: the 256 bytes, then one per merge.

    words    (byte values of one distinct word, how often it occurs); overwritten

    Each step merges the most frequent pair, but touches only the words that contain it. The heap is lazy: an
    entry may be stale, yet never too low, because a pair's count only rises in the step that made one of its
    two tokens, and that step pushes it. So the first entry that is still true is the maximum.

    A byte string s has one derivation: whatever becomes the token s was merged only inside s, hence by the
    same steps wherever it stood. So new tokens are never duplicates, and tiktoken, which knows the rank of a
    concatenation but not its two halves, applies exactly these merges.
    """
    tokens = [bytes([b]) for b in range(256)]
    pairs = Counter()
    where = defaultdict(set)  # pair → words that hold it, or once held it
    for w, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        n, best = heapq.heappop(heap)
        if -n != pairs[best]:
            heapq.heappush(heap, (-pairs[best], best))
            continue
        if -n < 2:
            break
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        made = set()
        for w in where.pop(best):
            old, n = words[w]
            ids = merge(old, best, new)
            words[w] = (ids, n)
            for pair in zip(old, old[1:]):
                pairs[pair] -= n
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
                if new in pair:
                    where[pair].add(w)
                    made.add(pair)
        for pair in made:
            heapq.heappush(heap, (-pairs[pair], pair))
    return tokens


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with every `pair`, from left to right and without overlap, replaced by the fresh id `new`."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out
