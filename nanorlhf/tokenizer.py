"""Text to token ids and back: bytes, characters, a byte-level BPE trained here, or a published tokenizer.

One class around one `tiktoken.Encoding`. The encoding is always built from ranks at hand, never fetched by
name, so nothing here opens a connection. `hub/tokenizer_files.py` reads and writes the files of tokenizers,
`hub/chat.py` renders chat templates.

Text never becomes a control token (end of text, begin of a turn): a user who types "<|im_end|>" gets
ordinary ids. Only code that appends `tok.eos_id`, and a chat template, write control tokens.
"""

import heapq
import unicodedata
from collections import Counter, defaultdict

import regex
import tiktoken

from nanorlhf.errors import UserError, require

LONG = 10_000  # characters; a word as long as this is left out when a BPE is trained
ONE_CHAR = r"[\s\S]"  # not (?s). , which the regular expressions of transformers read otherwise
# Words keep the space before them, as in GPT-2, so that a sentence costs about one token a word. Unlike
# GPT-2's, this pattern never looks ahead: `\s+(?!\S)` backtracks, and dies on a million spaces in a row.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
MARK = "\udfff"  # hub/chat.py breaks a user's control tokens with it; a lone surrogate, so no text holds one


class Chat(str):
    """A prompt that is a conversation, which the assistant is to answer.

    `messages` is [{"role", "content"}], for tokenizers with a chat template; as a str it is the plain text
    for those without one. `seen` is the text that a model has read, once it has answered.
    """

    seen = None

    def __new__(cls, messages, text=None):
        if text is None:
            # It ends in no space: that one belongs to the first token of the answer.
            turns = [f"{m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages]
            text = "".join(turns) + "Assistant:\n"
        self = super().__new__(cls, text)
        self.messages = messages
        return self

    def __getnewargs__(self):  # pickle: rewards run in a process of their own
        return self.messages, str(self)


class Tokenizer:
    """`ranks` are the bytes of each id; `pattern` cuts text into pieces, which no merge crosses.

    kind       "bytes", "chars" or "bpe"
    tokens     the bytes of ids 0 … R-1, all different, then eos_id = R and pad_id = R+1; or {bytes: id}, with
               `control`
    control    {text: id} of tokens that no text encodes to

    Published tokenizers have more:

    eos, pad   texts of control tokens; if `pad` is none, another id pads, but never EOS
    words      {text: id} of added tokens that are not control tokens (<think>); found in text, longest first
    late       the words that are found after normalisation to NFC, the others before
    nfc        whether text is normalised to NFC
    stop       more ids that end a response, besides EOS
    bos        ids that begin every prompt without a chat template
    template   a `hub.chat.Template`, or None
    source     {file name: contents} that saving copies

    Raises ValueError for a pattern that is no regex.
    """

    def __init__(
        self,
        kind,
        pattern,
        tokens,
        control=None,
        eos="<|eos|>",
        pad="<|pad|>",
        words=(),
        late=(),
        nfc=False,
        stop=(),
        bos=(),
        template=None,
        source=(),
    ):
        self.kind = kind
        self.pattern = pattern
        if isinstance(tokens, dict):
            self.ranks = tokens
        else:
            self.ranks = {token: i for i, token in enumerate(tokens)}
        self.gaps = {b for b in range(256) if bytes([b]) not in self.ranks}  # bytes that are no token
        self.encoding = self._make_encoding()
        size = len(self.ranks)
        self.control = control or {eos: size, pad: size + 1}  # detail 3: pad is not EOS
        self.eos_id = self.control[eos]
        ids = [self.control.get(pad, self.eos_id), *self.control.values(), 0, 1]
        self.pad_id = next(i for i in ids if i != self.eos_id)
        self.stop_ids = {self.eos_id, *stop}
        self.bos_ids = list(bos)
        self.template = template
        self.source = dict(source)
        self.words = dict(words)
        self.late = frozenset(late)
        self.nfc = nfc
        self.added = self.control | self.words
        early = self.words.keys() - self.late
        self._early = any_of(early)
        self._early_or_control = any_of(early | self.control.keys())
        self._late = any_of(self.late)
        self._bytes = {i: token for token, i in self.ranks.items()}
        for text, i in self.added.items():
            self._bytes[i] = text.encode()
        self.vocab_size = 1 + max(self._bytes)

    def _make_encoding(self):
        return tiktoken.Encoding("ours", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})

    @classmethod
    def learn(cls, kind, texts, alphabet="", vocab_size=576):
        """A new tokenizer for these texts: "bytes", "chars" (of texts and alphabet), "bpe" of vocab_size."""
        if kind == "bytes":
            return cls.from_bytes()
        if kind == "bpe":
            return cls.train_bpe(texts, vocab_size)
        return cls.from_chars("".join(sorted(set("".join(texts)) | set(alphabet))))

    @classmethod
    def from_bytes(cls):
        """One id per byte, id = byte value.

        >>> tok = Tokenizer.from_bytes()
        >>> tok.encode("hé"), tok.eos_id, tok.pad_id, tok.vocab_size
        ([104, 195, 169], 256, 257, 258)
        """
        return cls("bytes", ONE_CHAR, [bytes([b]) for b in range(256)])

    @classmethod
    def from_chars(cls, alphabet):
        """One id per character, in the order of `alphabet`. UserError when it is empty, repeats one or has a
        lone surrogate.

        >>> tok = Tokenizer.from_chars("ab=")
        >>> tok.encode("b=a"), tok.eos_id, tok.pad_id
        ([1, 2, 0], 3, 4)
        """
        require(alphabet, "tokenizer: the alphabet is empty; give every character once")
        char, n = Counter(alphabet).most_common(1)[0]
        require(n == 1, f"tokenizer: the alphabet repeats {char!r}; give every character once")
        surrogate = regex.search("[\ud800-\udfff]", alphabet)
        require(not surrogate, "tokenizer: a lone surrogate in the alphabet is no character")
        return cls("chars", ONE_CHAR, [c.encode() for c in alphabet])

    @classmethod
    def train_bpe(cls, texts, vocab_size):
        """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) on `texts`.

        vocab_size counts the ranks, the 256 bytes included; eos and pad come on top. Fewer are learnt,
        without error, when no pair occurs twice any more. Deterministic: among equally frequent pairs the one
        with the lowest ids wins, so the order of the texts does not matter. UserError for vocab_size < 256.

        >>> tok = Tokenizer.train_bpe(["abab abab"], 300)
        >>> list(tok.ranks)[256:]
        [b'ab', b'abab']
        """
        require(vocab_size >= 256, f"tokenizer: vocab_size {vocab_size} is below 256, the single bytes alone")
        counts = Counter()
        for text in texts:
            counts.update(regex.findall(WORDS, text))
        # tiktoken would read a lone surrogate as U+FFFD; here it counts as "?", and ordinary text has none.
        # A run of a million spaces is left out: each merge would walk it once more, for minutes.
        words = []
        for word, n in counts.items():
            if len(word) < LONG:
                words.append((list(word.encode(errors="replace")), n))
        return cls("bpe", WORDS, learn_bpe(words, vocab_size))

    def __eq__(self, other):
        """Same pattern, ranks and added tokens, hence the same ids for every text."""
        return isinstance(other, Tokenizer) and self._parts() == other._parts()

    def _parts(self):
        return self.pattern, self.ranks, self.control, self.words, self.late, self.nfc, self.eos_id

    # --------------------------------------------------------------------------------------------------------
    # ids

    def encode(self, text, control=False):
        """Text → list of ids; a lone surrogate is read as U+FFFD.

        control   whether control tokens in the text become their ids: True for the output of a chat template,
                  never for a user's text. Without it the ids hold no control token, not even BOS.

        Raises UserError for a character that needs a byte which is no token, where transformers drops it
        (U+0013 in SmolLM2), and for a text on which the pattern overflows: GPT-2's does on a million spaces.
        """
        ids = []
        pattern = self._early_or_control if control else self._early
        for i, part in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            if control:
                part = part.replace(MARK, "")
            if self.nfc:
                part = unicodedata.normalize("NFC", part)
            for j, piece in enumerate(self._late.split(part)):
                if j % 2:
                    ids.append(self.words[piece])
                else:
                    ids += self._ordinary(piece)
        return ids

    def _ordinary(self, text):
        for char in sorted(set(text)) if self.gaps else []:
            spelt = char.encode(errors="surrogatepass")
            if spelt not in self.ranks and not self.gaps.isdisjoint(spelt):  # tiktoken would panic
                alphabet = b"".join(self.ranks).decode(errors="replace")
                raise UserError(f"tokenizer: character {char!r} is not in alphabet {alphabet[:100]!r}")
        try:
            # Not encode_ordinary: where the regex gives up, that one panics past `except Exception`.
            return self.encoding.encode(text, disallowed_special=())
        except ValueError as e:
            raise UserError(f"tokenizer: {len(text)} characters of text are too many ({e}); cut it") from None

    def decode(self, ids):
        """Ids, in any iterable → their text; control tokens are shown, as <|eos|>.

        Bytes that are not UTF-8 become U+FFFD, and so do ids without a token: a model's vocabulary is often
        padded beyond the tokenizer's.
        """
        unknown = "\ufffd".encode()
        pieces = [self._bytes.get(i, unknown) for i in ids]
        return b"".join(pieces).decode(errors="replace")

    def encode_prompt(self, prompt):
        """A prompt, which the policy is to answer → list of ids.

        A `Chat` goes through the chat template, if there is one. Any other prompt is BOS and the text; most
        tokenizers have no BOS.
        """
        if isinstance(prompt, Chat) and self.template:
            text = self.template.render(prompt.messages, True)
            return self.encode(text, control=True)
        return self.bos_ids + self.encode(prompt)

    def encode_response(self, prompt, response):
        """The response to a prompt → list of its ids, with the EOS: what the policy would have to sample.

        It is tokenized apart from the prompt, because no policy can sample a merge across the boundary. The
        response to a Chat is what the template writes behind its own generation prompt, up to the end of the
        turn. UserError where that would not be the response.

        >>> Tokenizer.from_chars("ab=").encode_response("a=", "b")  # EOS is 3
        [1, 3]
        """
        if isinstance(prompt, Chat) and self.template:
            if prompt.endswith(":"):  # of a transcript, where a space follows; a template writes its own
                response = response.removeprefix(" ")
            before, text = self.template.render_response(prompt.messages, response)
            ids = self.encode_behind(before, text, control=True)
            for i, token in enumerate(ids):
                if token in self.stop_ids:
                    return ids[: i + 1]
            return [*ids, self.eos_id]
        return [*self.encode_behind(prompt, response), self.eos_id]

    def encode_behind(self, before, text, control=False):
        """Text that stands behind another → its ids, apart from those of the other."""
        return self.encode(text, control)

    def encode_chat(self, messages):
        """A conversation, [{"role", "content"}] → list of rows (ids, mask).

        The mask is True on the tokens that the assistant is to sample, but for answers of "train": False.

        It is one row if every turn's prompt begins with the ids of the turns before. If a template rewrites
        earlier turns (Qwen3 drops their thoughts), or ends none with EOS, such a turn gets a row of its own:
        each answer is trained on behind exactly the ids it would be sampled behind.

        >>> talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        >>> tok = Tokenizer.from_bytes()
        >>> ((ids, mask),) = tok.encode_chat(talk)
        >>> tok.decode([i for i, sampled in zip(ids, mask) if sampled])
        '2<|eos|>'
        """
        rows = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0 or not message.get("train", True):
                continue
            chat = Chat(messages[:i])
            prompt = self.encode_prompt(chat)
            response = self.encode_response(chat, message["content"])
            ids, mask = rows[-1] if rows else ([], [])
            if prompt[: len(ids)] == ids:  # the row goes on
                del rows[-1:]
            else:
                mask = []
            between = [False] * (len(prompt) - len(mask))
            mask = mask + between + [True] * len(response)
            rows.append((prompt + response, mask))
        return rows


def any_of(texts):
    """A pattern that finds and captures the longest of `texts` at the leftmost place; for none it finds none.

    So pattern.split(text) has ordinary text at the even places and matches at the odd ones.
    """
    longest = sorted(texts, key=lambda text: (-len(text), text))
    either = "|".join(map(regex.escape, longest)) or "(?!)"  # without a text: what matches nowhere
    return regex.compile(f"({either})")


# ------------------------------------------------------------------------------------------------------------
# training


def learn_bpe(words, vocab_size):
    """The tokens of a byte-level BPE in rank order: the 256 bytes, then one per merge.

    words    (byte values of one distinct word, how often it occurs); overwritten

    Each step merges the most frequent pair, but touches only the words that contain it. The heap is lazy: an
    entry may be stale, yet never too low, because a pair's count only rises in the step that made one of its
    two tokens, and that step pushes it. So the first entry that is still true is the maximum.

    Two merges never make the same bytes: the bytes of a token are merged only among themselves, hence by the
    same steps wherever they stand. So tiktoken, which knows the rank of a concatenation but not its two
    halves, applies exactly these merges.
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


def merge(ids, pair, new):
    """`ids` with every `pair`, from left to right and without overlap, replaced by the fresh id `new`.

    >>> merge([1, 1, 1, 2, 1, 1], (1, 1), 9)
    [9, 1, 2, 9]
    """
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out
