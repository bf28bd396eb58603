"""Writes tokenizers.json beside it: a small tokenizer.json of every family, and the ids that the `tokenizers`
package gives to some texts.

    pip install tokenizers==0.23.3
    python tests/golden/make_tokenizers.py

Each has the settings of its family's real file: pre-tokenizer, normalizer, added tokens, post-processor. As
in Llama 3's real file, "llama3" lists every way to split a token into two others among its merges, and has
tokens that only a whole piece can become.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
CORPUS = ["Natalia sold 48/2 = 24 clips in May. She'll sell 1,234 more, won't she?\n\n",
          "日本語のテキスト。 ", "ab abc abcab bcabca cabcabca bcbc aaaa aaaaaaa aaa ",
          "the cat sat on the hat, ", "Äpfel für Björn: 12 121 1212 ¼\n", "🙂🙂 ",
          "   def f(x):\n        return x ** 2\n"] * 8  # fmt: skip
TEXTS = ["", " ", "the cat sat", "Natalia's 48/2=24 clips. SHE'LL sell 1,234", "don't  won't\tI'm",
         "   x\n\n\n  y  ", "a\r\n\r\nb \n ", "Äpfel fu\u0308r Bjo\u0308rn", "\u1100\u1161 \ufb01 \u2126",
         "½ Ⅷ ٣٤ 12a3 4", "日本語 テキスト", "🙂👩\u200d👩\u200d👧 \U00010348", "<|endoftext", "<tool_call>",
         "<think>\n1+1\n</think>\n\n2", "          ", "x       y", "\x00\x7f\x85\xa0\u3000", "'ſ 'S 's",
         "hatcatsat  hatcatsathat", "e\u0301<think>\u0338", "12345678 \t 9", "…“q”—x_y/z",
         "abcabcabcaab bcaaaaaaaaaaab",
         "a" * 40 + "!" * 9]  # fmt: skip


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


def special(*texts):
    return [AddedToken(f"<|{text}|>", special=True, normalized=False) for text in texts]


FAMILIES = {  # pre-tokenizer, normalizer, specials with the first ids, specials behind the vocabulary, others
    "gpt2": (byte_level(True), None, [], special("endoftext"), []),
    "pythia": (byte_level(True), normalizers.NFC(), special("endoftext", "padding"), [],
               [AddedToken(" " * n, normalized=True) for n in (8, 4, 3, 2)]),
    "smollm2": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]), None,
                special("endoftext", "im_start", "im_end"), [], []),
    "qwen": (split(QWEN), normalizers.NFC(), [], special("endoftext", "im_start", "im_end"),
             [AddedToken(x, normalized=False) for x in ("<think>", "</think>", "<tool_call>")]),
    "llama3": (split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), None, [],
               special("begin_of_text", "eot_id", "start_header_id", "end_header_id"), []),
}  # fmt: skip
WHOLE = "hatcatsat"  # no merge makes it of hat, cat and sat: only a whole piece becomes it
EOS = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "smollm2": "<|im_end|>"}

out = {"tokenizers": tokenizers.__version__, "texts": TEXTS}
for name, (pre, normal, first, last, words) in FAMILIES.items():
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre
    if normal:
        tok.normalizer = normal
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=first, show_progress=False)  # fmt: skip
    tok.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tok.to_str())
    if name == "llama3":
        vocab = spec["model"]["vocab"]
        vocab[WHOLE] = len(vocab)
        ways = [(vocab[t], vocab[t[:i]], vocab[t[i:]], [t[:i], t[i:]])
                for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
        spec["model"] |= {"merges": [way[3] for way in sorted(ways)], "ignore_merges": True}
        tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tok.add_special_tokens(last)
    tok.add_tokens(words)
    if name == "llama3":
        bos = "<|begin_of_text|>"
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
        )
    ids = [tok.encode(text, add_special_tokens=False).ids for text in TEXTS]
    out[name] = {"eos": EOS.get(name, "<|endoftext|>"), "spec": json.loads(tok.to_str()), "ids": ids}
text = json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n"
(HERE / "tokenizers.json").write_text(text, "utf-8")
