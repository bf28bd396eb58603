"""Text to token ids and back: bytes, single characters, or a byte-level BPE trained here.

One class around one `tiktoken.Encoding`. The encoding is always built from ranks at hand, never fetched by
name, so nothing in this file opens a connection.

Ids are the ranks 0 … R-1, then `eos_id` = R and `pad_id` = R+1. Text can never become one of these two: a
user who types "<|eos|>" gets seven ordinary bytes, and only code that appends `tok.eos_id` ends a response.
"""

import base64
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import tiktoken

from nanorlhf.common import UserError

FILE = "nanorlhf_tokenizer.json"
ONE_CHAR = r"(?s)."
# Words keep the space before them, as in GPT-2, so that a sentence costs about one token a word. Unlike
# GPT-2's, this pattern never looks ahead: `\s+(?!\S)` backtracks, and dies on a million spaces in a row.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"


class Tokenizer:
    """`tokens[i]` are the bytes of id i; `pattern` cuts text into the pieces that merges never cross.

    kind     "bytes", "chars" or "bpe"; all but "chars" need every single byte among their tokens
    Raises UserError for tokens that tiktoken could not use, ValueError for a pattern that is none.
    """

    def __init__(self, kind: str, pattern: str, tokens: Sequence[bytes]):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if not tokens or b"" in ranks or len(ranks) != len(tokens):
            raise UserError("tokenizer: tokens must be present, non-empty and all different")
        if kind not in ("bytes", "chars", "bpe"):
            raise UserError(f"tokenizer: unknown kind {kind!r}, expected bytes, chars or bpe")
        if kind == "chars" and any(token.decode(errors="replace")[:1].encode() != token for token in tokens):
            raise UserError("tokenizer: every token of kind chars must be one character")
        if kind != "chars" and any(bytes([b]) not in ranks for b in range(256)):
            raise UserError("tokenizer: all 256 single bytes must be tokens, or some text has no ids")
        self.kind, self.name = kind, f"nanorlhf-{kind}"
        self.pattern, self.tokens = pattern, list(tokens)
        self.eos_id, self.pad_id = len(tokens), len(tokens) + 1  # detail 3: pad is not EOS
        self.vocab_size = len(tokens) + 2
        self.specials = {"<|eos|>": self.eos_id, "<|pad|>": self.pad_id}
        self._shown = self.tokens + [text.encode() for text in self.specials]
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials
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
        words = [(list(word.encode(errors="replace")), n) for word, n in counts.items()]
        return cls("bpe", WORDS, _learn(words, vocab_size))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never eos or pad. A lone surrogate is read as U+FFFD.

        Raises UserError for a character outside the alphabet (kind "chars"), and for a text on which the
        pattern overflows: GPT-2's does on a million spaces in a row.
        """
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
        """Text of `ids`. Specials are shown as <|eos|> and <|pad|>; bytes that are no UTF-8, and ids that no
        token has (a model's vocabulary is often padded beyond the tokenizer's), become U+FFFD."""
        parts = [self._shown[i] if 0 <= i < self.vocab_size else "\ufffd".encode() for i in ids]
        return b"".join(parts).decode(errors="replace")

    def __eq__(self, other) -> bool:
        """Same pattern and same ranks, hence the same ids for every text."""
        return isinstance(other, Tokenizer) and (self.pattern, self.tokens) == (other.pattern, other.tokens)

    def files(self) -> dict[str, bytes]:
        """{file name: contents} of a saved tokenizer, for `checkpoint.write_folder`."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return {FILE: json.dumps({"kind": self.kind, "pattern": self.pattern, "tokens": tokens}).encode()}

    def save(self, folder) -> None:
        """Write `folder`/nanorlhf_tokenizer.json; the folder is made when it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (Path(folder) / name).write_bytes(data)

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """The tokenizer that `save` wrote. UserError naming the file when it is missing or damaged."""
        path = Path(folder) / FILE
        try:
            data = json.loads(path.read_text("utf-8"))
            tokens = [base64.b64decode(token, validate=True) for token in data["tokens"]]
            return cls(data["kind"], data["pattern"], tokens)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}; expected the file that Tokenizer.save writes") from None
        except (ValueError, KeyError, TypeError, RecursionError, UserError) as e:
            raise UserError(f"{path}: damaged ({e!r}); expected kind, pattern and tokens in base64") from None


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
