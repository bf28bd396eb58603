"""The files of tokenizers, in and out: tokenizer.json, vocab.json + merges.txt, our own.

A byte-level BPE is read into a `Tokenizer`, which tiktoken runs, if that gives exactly the ids of the file's
own program. Any other tokenizer.json is run by the `tokenizers` package, or refused where that is missing.
"""

import base64
import contextlib
import itertools
import json
import math

import regex

from nanorlhf.errors import UserError, require
from nanorlhf.hub.chat import Template
from nanorlhf.hub.files import read_json
from nanorlhf.tokenizer import MARK, Tokenizer

REMOVED = "\ufdd0\ufdd1\ufdd2\ufdd3"  # no characters, so no text holds them; LibraryTokenizer's MARK
NO_PREFIX = {
    r'"prepend": "[^"]*"': '"prepend": ""',
    r'"prepend_scheme": "(first|always)"': '"prepend_scheme": "never"',
    r'"add_prefix_space": true': '"add_prefix_space": false',
}
FILE = "nanorlhf_tokenizer.json"  # of kind "chars"; the others are saved as tokenizer.json
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Digits are cut out first, each alone: they take no space before them, and a space before them ends a piece.
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(?!", r"\s+(?=\p{N})|\s+(?!")
TOKEN = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=False)  # an added one
COPIED = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt encoder.json vocab.bpe chat_template.jinja chat_template.json generation_config.json""".split()
# tokenizer.json spells a byte as one character: printable bytes as they are, the others from U+0100 on.
UNPRINTABLE = [*range(33), *range(127, 161), 173]
CHARS = {b: chr(b) for b in range(256)}
CHARS |= {b: chr(256 + i) for i, b in enumerate(UNPRINTABLE)}
BYTES = {char: b for b, char in CHARS.items()}


# Errors that a file leads to whose values have other types, or whose pattern cannot be compiled.
BROKEN = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError, regex.error


class Inexact(Exception):
    """Why a tokenizer's files cannot be read exactly."""


def _need(ok, reason):
    if not ok:
        raise Inexact(reason)


# ------------------------------------------------------------------------------------------------------------
# a folder's tokenizer


def load(folder):
    """The tokenizer of a folder, from the first of the files in LOADERS that is there; None without any.

    UserError naming the file when it is damaged, or when tiktoken could not give the same ids as
    transformers. Such a tokenizer.json is read by the `tokenizers` package where that is installed.
    """
    paths = [folder / name for name in LOADERS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    content = read_json(path)
    try:
        return LOADERS[path.name](path, content)
    except Inexact as reason:
        return _load_with_library(path, content, reason)
    except UserError as e:
        raise UserError(f"{path}: damaged: {e}") from None
    except BROKEN as e:
        raise UserError(f"{path}: damaged ({e!r:.200}); expected a tokenizer's file") from None


def files(tok):
    """{file name: contents} of a saved tokenizer: the files that it was read from.

    Where tokenizer.json is not among them it is made, so that transformers and vLLM read the folder. Kind
    "chars" has no counterpart there, as it refuses unknown characters: it has a file of its own.
    """
    if tok.kind == "chars":
        tokens = [base64.b64encode(token).decode() for token in tok.ranks]
        return {FILE: json.dumps({"kind": "chars", "tokens": tokens}).encode()}
    out = dict(tok.source)
    if "tokenizer.json" not in out:
        out["tokenizer.json"] = json.dumps(_to_json(tok), ensure_ascii=False).encode()
    if "tokenizer_config.json" not in out:
        texts = {i: text for text, i in tok.control.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": texts[tok.eos_id],
            "pad_token": texts.get(tok.pad_id),
        }
        out["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    return out


def beside(folder):
    """{file name: contents} of the files that travel with a model, besides its weights and config.json."""
    paths = [folder / name for name in COPIED]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def stop_ids(folder):
    """The ids that end a response; generation_config.json goes before config.json, as in transformers."""
    settings = read_json(folder / "config.json") | read_json(folder / "generation_config.json")
    ids = settings.get("eos_token_id")
    if not isinstance(ids, list):
        ids = [] if ids is None else [ids]
    good = all(type(i) is int and 0 <= i < 2**31 for i in ids)
    require(good, f"{folder}: eos_token_id is {ids!r}, no id and no list of ids")
    return ids


def _roles(folder, control, spec):
    """What a folder says of a `Tokenizer`: the tokens that begin, end and pad a text; the chat template."""
    config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    names = {}
    for key, token in config.items():
        if key[3:] == "_token" and token:
            names[key] = token["content"] if isinstance(token, dict) else token
    stop = stop_ids(folder)
    texts = {i: text for text, i in control.items()}
    candidates = [names.get("eos_token"), *map(texts.get, stop), "<|endoftext|>"]
    eos = next((text for text in candidates if text in control), None)
    _need(eos, "neither eos_token nor eos_token_id names a control token")
    names["eos_token"] = eos
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {x["name"]: x["template"] for x in template}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    if template:
        strange = [key for key, text in names.items() if key in template and text not in control]
        _need(not strange, f"the chat template's {' and '.join(strange)} is no control token")
        template = Template(template, names, control)
    bos = _bos(spec)
    _check_config(config, spec, bos and names.get("bos_token"))
    source = beside(folder)
    return dict(eos=eos, pad=names.get("pad_token"), stop=stop, bos=bos, template=template, source=source)


def _check_config(config, spec, bos):
    """Inexact where tokenizer_config.json contradicts tokenizer.json: transformers 4 and 5 follow either."""
    in_file = {token["id"]: token for token in spec.get("added_tokens", [])}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        same = in_file.get(int(i), {}) | token == in_file.get(int(i))
        _need(same, f"tokenizer_config.json describes the token {token['content']!r} otherwise")
    steps = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
    prefix = _without_prefix(steps) != json.dumps(steps)
    for key, right in (("add_bos_token", bool(bos)), ("add_prefix_space", prefix), ("add_eos_token", False)):
        agrees = config.get(key) in (None, right)
        _need(agrees, f"tokenizer_config.json has {key}={config.get(key)}, tokenizer.json has not")
    if str(config.get("tokenizer_class")).startswith("Llama") and "ByteLevel" not in str(steps):
        scheme = "always" if config.get("legacy") else "first"
        same = not steps["normalizer"] and steps["pre_tokenizer"].get("prepend_scheme") == scheme
        cure = 'or take the file as it stands: "tokenizer_class": "PreTrainedTokenizerFast"'
        _need(same, f"versions of transformers differ on a LlamaTokenizer with this tokenizer.json; {cure}")


# ------------------------------------------------------------------------------------------------------------
# one function for each kind of file


def _load_ours(path, data):
    require(data["kind"] == "chars", "its kind must be chars")
    alphabet = ""
    for token in data["tokens"]:
        char = base64.b64decode(token, validate=True).decode()
        require(len(char) == 1, "every token must be one character")
        alphabet += char
    return Tokenizer.from_chars(alphabet)


def _load_json(path, spec):
    tokens = [(token["content"], token["id"]) for token in spec.get("added_tokens") or []]
    require(len(dict(tokens)) == len(tokens), "an added token is there twice")
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        tokens += vocab.items()
    owner = {}
    for text, i in tokens:
        require(type(i) is int and 0 <= i < 2**31, f"the token {text!r} has the id {i!r}, no id below 2**31")
        require(owner.setdefault(i, text) == text, f"the tokens {owner[i]!r} and {text!r} have the id {i}")
    return _from_json(spec, path.parent)


def _load_gpt2(path, vocab):
    """vocab.json + merges.txt, as older folders have them, or OpenAI's encoder.json + vocab.bpe.

    They do not name their pattern, and the added tokens stand in other files.
    """
    folder = path.parent
    config = read_json(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    _need(kind in ("GPT2Tokenizer", "Qwen2Tokenizer"), f"vocab.json of a {kind} says no split pattern")
    qwen = kind == "Qwen2Tokenizer"
    merges = "merges.txt" if path.name == "vocab.json" else "vocab.bpe"
    require((folder / merges).is_file(), f"{merges} is no file")  # a pipe would be waited for
    lines = (folder / merges).read_text("utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    tokens = config.get("added_tokens_decoder")
    if not tokens:
        texts = read_json(folder / "added_tokens.json") or {"<|endoftext|>": None}
        tokens = {i: {"content": text, "special": True} for text, i in texts.items()}
    added = []
    for i, token in tokens.items():
        i = vocab.get(token["content"], i)
        added.append(TOKEN | token | {"id": int(i)})
    return _from_json(make_spec(vocab, merges, added, QWEN if qwen else GPT2, nfc=qwen), folder)


LOADERS = {
    FILE: _load_ours,
    "tokenizer.json": _load_json,
    "encoder.json": _load_gpt2,
    "vocab.json": _load_gpt2,
}


class LibraryTokenizer(Tokenizer):
    """A tokenizer that the `tokenizers` package runs, because tiktoken would not give the same ids.

    The package gets a text as a whole: what it does at a text's start, and beside control tokens, is its own.
    """

    def __init__(self, spec, control, roles):
        self.library = _run_by_library(spec)
        self.inside = _run_by_library(json.loads(_without_prefix(spec)))
        super().__init__("library", "", {}, control, **roles)
        self.vocab_size = max(self.vocab_size, self.library.get_vocab_size())

    def _make_encoding(self):
        return None

    def _parts(self):
        return *super()._parts(), self.library.to_str()

    def encode(self, text, control=False):
        return self._ids(self.library, text, control)

    def encode_behind(self, before, text, control=False):
        """As transformers cuts both together. Where a token would span them, `text` is cut alone, and as the
        inside of a text: no space is written before it."""
        first = self.encode(before, control)
        both = self.encode(before + text, control)
        if both[: len(first)] == first:
            return both[len(first) :]
        return self._ids(self.inside, text, control)

    def _ids(self, library, text, control):
        if control:
            text = text.replace(MARK, REMOVED)
        library.encode_special_tokens = not control  # without it, a user's text would become control tokens
        text = text.encode(errors="replace").decode()
        with _no_panic():
            return library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        known = [i for i in ids if 0 <= i < self.vocab_size]
        with _no_panic():
            return self.library.decode(known, skip_special_tokens=False)


@contextlib.contextmanager
def _no_panic():
    """Inside, what the package raises is a UserError. It is written in Rust: its panic is no Exception."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise UserError(f"the tokenizers package cannot use it ({e})") from None
        raise


def _run_by_library(spec):
    """The package's tokenizer of a tokenizer.json. It takes REMOVED out once it has found control tokens."""
    import tokenizers

    remove = {"type": "Replace", "pattern": {"String": REMOVED}, "content": ""}
    normalizer = {"type": "Sequence", "normalizers": [remove, *_steps(spec.get("normalizer"))]}
    with _no_panic():
        library = tokenizers.Tokenizer.from_str(json.dumps(spec | {"normalizer": normalizer}))
    library.no_truncation()
    library.no_padding()
    return library


def _without_prefix(spec):
    """The text of this tokenizer.json, but that it writes no space before a text."""
    text = json.dumps(spec)
    for setting, never in NO_PREFIX.items():
        text = regex.sub(setting, never, text)
    return text


def _load_with_library(path, spec, reason):
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: {reason}; pip install tokenizers lets that package read it") from None
    if path.name != "tokenizer.json":
        raise UserError(f"{path}: {reason}; save it as tokenizer.json with transformers first") from None
    try:
        control = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        tok = LibraryTokenizer(spec, control, _roles(path.parent, control, spec))
        unknown = spec["model"].get("unk_id", control.get(spec["model"].get("unk_token")))
        for text, i in control.items():
            typed = tok.encode(text[0] + MARK + text[1:], control=True)
            _need(i == unknown or i not in typed, f"a user's text {text!r} would be the control token")
        return tok
    except Exception as e:  # Inexact, or what the package raises: a bare Exception
        raise UserError(f"{path}: {reason}; {e}") from None


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json: read exactly, or not at all


def _from_json(spec, folder):
    """A Tokenizer that gives the ids of this tokenizer.json. Inexact where it would not."""
    model = spec["model"]
    kind = model.get("type", "BPE")
    _need(kind == "BPE", f"a model of type {kind}, no byte-level BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _need(not model.get(key), f"{key}={model.get(key)!r}")
    normalizers = _kinds(_steps(spec.get("normalizer")))
    _need(normalizers in ("none", "NFC"), f"normalizer {normalizers}")
    pattern = _pattern_of(_steps(spec["pre_tokenizer"]))
    control, words, late = _added_tokens(spec.get("added_tokens", []))
    added = control | words
    vocab = {text: i for text, i in model["vocab"].items() if added.get(text) != i}
    ranks = {}
    for text, i in vocab.items():
        _need(text and BYTES.keys() >= set(text), f"the token {text!r} is not spelt in bytes")
        ranks[bytes(BYTES[char] for char in text)] = i
    _check_merges(vocab, model["merges"], model.get("ignore_merges", False))
    _check_pattern(pattern)
    nfc = normalizers == "NFC"
    roles = _roles(folder, control, spec)
    kind = "bpe" if len(ranks) > 256 else "bytes"
    return Tokenizer(kind, pattern, ranks, control, words=words, late=late, nfc=nfc, **roles)


def _bos(spec):
    """The ids that the post-processor writes before a text. Inexact where it writes some behind it."""
    ids = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    bos = []
    for step in _steps(spec.get("post_processor")):
        if step["type"] == "TemplateProcessing":
            *bos, text = (item.get("SpecialToken", {}).get("id") for item in step["single"])
            _need(None not in bos and not text, "its post-processor writes tokens behind a text")
        else:
            _need(step["type"] == "ByteLevel", f"its post-processor is of type {step['type']}")
    return [ids[text] for text in bos]


def _steps(part):
    """The steps of a normaliser, a pre-tokenizer or a post-processor: one, those of a Sequence, or none."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    for key in ("normalizers", "pretokenizers", "processors"):
        if key in part:
            return part[key]
    raise Inexact("a sequence without steps")


def _kinds(steps):
    return "+".join(step["type"] for step in steps) or "none"


def _pattern_of(steps):
    """The pre-tokenizer of a tokenizer.json as one pattern that cuts text into the same pieces."""
    kinds = _kinds(steps)
    _need(kinds.endswith("ByteLevel"), f"pre-tokenizer {kinds}: no byte-level BPE")
    first = steps[0]
    last = steps[-1]
    _need(not last.get("add_prefix_space", True), "add_prefix_space writes a space before the text")
    if last.get("use_regex", True):
        if kinds == "ByteLevel":
            return GPT2
        _need(kinds == "Digits+ByteLevel", f"pre-tokenizer {kinds} is unknown")
        return DIGITS if first.get("individual_digits") else DIGITS.replace(r"|\p{N}|", r"|\p{N}+|")
    _need(kinds == "Split+ByteLevel", f"pre-tokenizer {kinds} is unknown")
    behavior = first["behavior"]
    isolated = behavior == "Isolated" and not first.get("invert") and "Regex" in first["pattern"]
    _need(isolated, f"a split of behavior {behavior} is not supported")
    return first["pattern"]["Regex"]


def _check_pattern(pattern):
    """Inexact for a pattern that leaves out characters between its pieces: tiktoken would drop them."""
    repeats = math.prod(max(1, int(n)) for n in regex.findall(r"(?<=[{,])\d+", pattern))
    small = len(pattern) < 10**4 and repeats < 10**5  # ((a{999}){999}){999} takes all memory
    _need(small, "its split pattern is too large")
    codes = itertools.chain(range(0xD800), range(0xE000, 0x20000, 7))
    sample = "".join(map(chr, codes)) + "it's 12 x\r\n \t."
    found = regex.finditer(f"(?:{pattern})", sample, timeout=5)  # TimeoutError: (x*)*y would take for ever
    pieces = [piece[0] for piece in found]
    right = all(pieces) and sample == "".join(pieces)  # an empty piece makes tiktoken panic
    _need(right, "its split pattern drops characters, or has empty pieces")


def _added_tokens(tokens):
    """The added tokens → {text: id} of control tokens, of words, and the words found after NFC."""
    control = {}
    words = {}
    late = []
    for token in tokens:
        text = token["content"]
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token[key]]
        _need(not odd, f"the added token {text!r} has {' and '.join(odd)}")
        if token["special"]:
            _need(len(text) > 1, f"the control token {text!r} is a single character")
            control[text] = token["id"]
            continue
        _need(text, "an added token is empty")  # it would be found before every character
        words[text] = token["id"]
        if token["normalized"]:
            late.append(text)
    return control, words, late


def _derive(token, ranks):
    """The pieces that BPE cuts `token` into when it may use merges of lower rank only.

    >>> _derive("abc", {"ab": 0, "bc": 1, "abc": 2})
    ['ab', 'c']
    """
    parts = list(token)
    while len(parts) > 2:
        pairs = enumerate(zip(parts, parts[1:]))
        rank, i = min((ranks.get(a + b, 1 << 60), i) for i, (a, b) in pairs)
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _check_merges(vocab, merges, ignore_merges):
    """Inexact unless tiktoken, which merges by the rank of the result, gives the ids that the merges give.

    When two neighbours x, y are to become the token s, everything of lower rank inside s has been merged, and
    nothing has crossed its ends; so (x, y) is the pair that `_derive` gives for s. So it is enough that this
    pair is a listed merge, for every token; other pairs listed for s never meet. A token that `_derive`
    leaves in more than two pieces is never merged, only found as a whole piece: by ignore_merges (Llama 3).
    """
    work = sum(len(token) ** 2 for token in vocab)  # of `_derive`: minutes for 20,000 characters
    _need(work < 3 * 10**7, "its tokens are too long")
    pairs = []
    for pair in merges:
        if isinstance(pair, str):
            pair = pair.split(" ")
        pairs.append(tuple(pair))
    made = [vocab["".join(pair)] for pair in pairs]
    _need(made == sorted(made), "its merges are not in the order of the ids")
    listed = set(pairs)
    for token in vocab:
        parts = _derive(token, vocab)
        if len(parts) == 2:
            _need(tuple(parts) in listed, f"no merge {' '.join(parts)}, though {token} is a token")
        elif len(parts) > 2:
            _need(ignore_merges, f"no merge makes the token {token}")


def _to_json(tok):
    """The tokenizer.json of a Tokenizer."""
    vocab = {}
    for token in sorted(tok.ranks, key=tok.ranks.get):
        vocab["".join(CHARS[b] for b in token)] = tok.ranks[token]
    merges = []
    for text in vocab:
        parts = _derive(text, vocab)
        if len(parts) == 2:
            merges.append(" ".join(parts))
    added = []
    for text in sorted(tok.added, key=tok.added.get):
        token = {
            "id": tok.added[text],
            "content": text,
            "normalized": text in tok.late,
            "special": text in tok.control,
        }
        added.append(TOKEN | token)
    return make_spec(vocab, merges, added, tok.pattern, tok.nfc, ignore_merges=True)


def make_spec(vocab, merges, added, pattern, nfc, ignore_merges=False):
    """A tokenizer.json: text is cut by the pattern, its bytes are spelt as characters and merged."""
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
