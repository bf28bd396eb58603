"""Rows in, padded batches out: files of JSON, prompt and response, masks from lengths, resumable order."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from nanorlhf.errors import UserError, blame
from nanorlhf.run import dist


def read_jsonl(
    path, required: tuple[str, ...], flag: str = "--data", nonempty: tuple[str, ...] = ()
) -> list[dict]:
    """The rows of a file of our own shape: JSON lines, or what else `read_objects` takes.

    required   keys that every row must have, as strings; other keys are left as they are
    nonempty   of these, the keys that must hold more than whitespace
    flag       the command-line flag that gave the path, named in errors

    Each row also gets "_at", its place as "file:line", for later messages about it. UserError, naming the
    flag, the file and the line, for anything else.
    """
    rows = []
    for at, item in read_objects(path, flag, required):
        with blame(f"{flag}: {at}"):
            row = parse(item)
            check_text(row, required, nonempty)
        rows.append(row | {"_at": at})
    return rows


def read_objects(path, flag: str, required: tuple[str, ...]) -> list[tuple[str, object]]:
    """The rows of a file, still to be parsed → [("file:line" or "file:row 7", item)].

    JSON lines (blank ones are skipped), one JSON array (rows are counted), either also gzipped, or Parquet
    where pyarrow is installed.
    UTF-8, with or without a BOM; LF or CRLF. UserError when the file is missing, damaged or empty.
    """
    where = f"{flag}: {path}"
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":  # what the file is, not what it is called
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{where}: damaged gzip file ({e}); fetch or compress it again") from None
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}; expected a .jsonl, .json, .gz or .parquet file") from None
    size, data = len(data), data.removeprefix(b"\xef\xbb\xbf")
    if data[:4] == b"PAR1":
        rows = _read_parquet(data, where)
    elif data.lstrip()[:1] == b"[":
        with blame(where):
            rows = _load(data)
    else:
        # Split at newlines only: str.splitlines also breaks at U+2028, which JSON strings may hold.
        lines = enumerate(data.split(b"\n"), start=1)
        rows = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not rows:
        what = "only blank lines" if size else "the file is empty"
        raise UserError(f"{where}: {what}; expected rows like {_example(required)}")
    if isinstance(rows[0], tuple):
        return rows
    return [(f"{path}:row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_parquet(data, where):
    try:
        from pyarrow import BufferReader, parquet
    except ImportError:
        to_json = "pandas.read_parquet(p).to_json(q, orient='records', lines=True)"
        need = "a Parquet file: pip install pyarrow, or convert it"
        raise UserError(f"{where}: {need}: {to_json}") from None
    try:
        return parquet.read_table(BufferReader(data)).to_pylist()
    except (ValueError, OSError) as e:
        raise UserError(f"{where}: damaged Parquet file ({' '.join(str(e).split())})") from None


def parse(item) -> dict:
    """An item of `read_objects` → its object. UserError, without the place, for what is none."""
    row = _load(item) if isinstance(item, bytes) else item
    if not isinstance(row, dict):
        raise UserError(f"a JSON {json_type(row)}; expected one object a row, like {{...}}")
    return row


def _load(data: bytes):
    if b"\0" in data:
        raise UserError("a NUL byte; JSON is plain UTF-8 text (UTF-16, or damaged?)")

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 (byte {e.start + 1} of the row); save it as UTF-8") from None
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}, " * (b"\n" in data.strip())
        raise UserError(f"bad JSON at {line}column {e.colno} ({e.msg}); expected an object") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"bad JSON ({e}); expected an object") from None


def check_text(row: dict, required: tuple[str, ...], nonempty: tuple[str, ...] = ()) -> None:
    """UserError unless the row has these keys, as strings, and of these some with more than whitespace."""
    hint = f"(a row is {_example(required)})"
    for key in required:
        if key not in row:
            raise UserError(f'missing key "{key}" {hint}')
        if not isinstance(row[key], str):
            raise UserError(f'"{key}" is a {json_type(row[key])}, expected a string {hint}')
    for key in nonempty:
        if not row[key].strip():
            raise UserError(f'"{key}" is empty, expected some text {hint}')


def _example(required: Iterable[str]) -> str:
    return "{" + ", ".join(f'"{key}": …' for key in required) + "}"


def json_type(x) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(x), "number")


def write_jsonl(path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines, without the "_at" that `read_jsonl` adds; ValueError for NaN and infinities,
    which are not JSON. Atomic: after a crash or a full disk there is the old file or the whole new one."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as f:
            for row in rows:
                row = {key: value for key, value in row.items() if key != "_at"}
                line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                # A lone surrogate has no UTF-8; what backslashreplace makes of it is its JSON escape.
                f.write(line.encode("utf-8", "backslashreplace"))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def split_by_hash(rows: list[dict], held_out: Callable[[str], bool]) -> tuple[list[dict], list[dict]]:
    """(train, test): test has the rows whose prompt is `held_out`; by prompt, so none is in both. A document
    without a prompt goes by its text."""
    train, test = [], []
    for row in rows:
        (test if held_out(row["prompt"] or row["response"]) else train).append(row)
    return train, test


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged id lists → tokens (B, T) int64, padded on the right to the longest row; lengths (B,) int64."""
    lengths = [len(row) for row in rows]
    tokens = torch.full((len(rows), max(lengths, default=0)), pad_id, dtype=torch.int64)  # (B, T)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return tokens, torch.tensor(lengths, dtype=torch.int64)


def encode_pair(
    tok, prompt: str, response: str, max_len: int, at: str = ""
) -> tuple[list[int], list[int]] | None:
    """(prompt ids, response ids with EOS), or None when together beyond max_len tokens: drop and count it.

    The two are tokenized apart, because a policy is given the prompt's ids and then writes ids of its own: a
    merge across the boundary is one it could never sample. Without a prompt the response is a document, which
    follows an EOS. `at` ("file:line") starts the message of a UserError, for text that `tok` cannot encode.
    """
    with blame(at):
        prompt_ids = tok.encode_prompt(prompt) or [tok.eos_id]
        response_ids = tok.encode_response(prompt, response)  # detail 3
    # detail 4: never truncated; what does not fit is dropped
    return (prompt_ids, response_ids) if len(prompt_ids) + len(response_ids) <= max_len else None


def encode_demonstration(tok, row: dict, max_len: int) -> list[tuple[list[int], list[bool]] | None]:
    """{"prompt", "response"} → [(ids, mask of the response's)], None in place of what exceeds max_len tokens.

    Of a conversation ("turns") every answer of the assistant counts; see Tokenizer.encode_chat.
    """
    if "turns" not in row:
        pair = encode_pair(tok, row["prompt"], row["response"], max_len, row.get("_at", ""))
        return [pair and (pair[0] + pair[1], [False] * len(pair[0]) + [True] * len(pair[1]))]
    with blame(row.get("_at", "")):
        found = tok.encode_chat(row["turns"])
    return [x if len(x[0]) <= max_len else None for x in found]


def response_mask(prompt_lens, lengths, T: int) -> torch.Tensor:
    """(B, T) bool, True on the tokens of the response, its EOS among them.

    prompt_lens, lengths   (B,) tokens of the prompt, and of prompt and response together; lists or tensors
    From lengths, never from ids: a prompt may hold any id. ValueError unless 0 ≤ prompt ≤ length ≤ T.
    """
    prompt_lens = torch.as_tensor(prompt_lens, dtype=torch.int64)
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=prompt_lens.device)
    if ((prompt_lens < 0) | (prompt_lens > lengths) | (lengths > T)).any():
        raise ValueError(f"response_mask needs 0 <= prompt_lens <= lengths <= T = {T}")
    position = torch.arange(T, device=prompt_lens.device)  # (T,)
    return (position >= prompt_lens[:, None]) & (position < lengths[:, None])  # (B, T)


def pad_responses(rows, device):
    """(prompt ids, response ids) → tokens (B, T), prompt and response together; mask (B, T) of the response.

    The pads are 0, as would be any id: attention is causal, so no token sees a pad behind it.

    >>> tokens, mask = pad_responses([([5, 6], [7]), ([5], [8, 9, 4])], "cpu")
    >>> tokens.tolist()
    [[5, 6, 7, 0], [5, 8, 9, 4]]
    >>> mask.int().tolist()
    [[0, 0, 1, 0], [0, 1, 1, 1]]
    """
    tokens, lengths = pad([prompt + response for prompt, response in rows], 0)
    mask = response_mask([len(prompt) for prompt, _ in rows], lengths, tokens.shape[1])
    return tokens.to(device), mask.to(device)


def epoch_batches(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of batch number `step`, of `batch` rows out of n, walking a fresh permutation in every epoch.

    A pure function of (seed, step): whoever resumes needs `step` and nothing else. Every epoch holds each
    index once. A batch may lie across epochs and may be larger than n, so no row is ever dropped. Permutation
    e comes from Philox with the key (seed, e); O(n) per epoch touched.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"epoch_batches needs n >= 1, batch >= 1, step >= 0, got {n}, {batch}, {step}")
    start, end = step * batch, (step + 1) * batch
    out = []
    for epoch in range(start // n, (end - 1) // n + 1):
        key = np.array([seed % 2**64, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(n)
        out += order[max(start - epoch * n, 0) : end - epoch * n].tolist()
    return out


def microbatches(lengths, tokens_per_microbatch: int) -> list[list[int]]:
    """Row indices in groups with rows × longest ≤ tokens_per_microbatch, where a row alone may exceed it.

    lengths   (B,) ints, list or tensor
    The budget is in tokens, padding included; 0 puts everything in one group. Longest rows first, so that a
    budget too large for the memory fails at once; equal lengths by index. Every row stands in exactly one
    group. UserError for a negative budget.
    """
    budget = tokens_per_microbatch
    if budget < 0:
        raise UserError(f"--tokens_per_microbatch: {budget} is negative; expected tokens, or 0 for all")
    lengths = torch.as_tensor(lengths).tolist()  # from a GPU in one copy, not one a row
    groups, longest = [], 0  # longest: of the last group, its first row
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (budget == 0 or (len(groups[-1]) + 1) * longest <= budget):
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = lengths[i]
    return groups


def fill_rows(out, lengths, cut, compute, *passes):
    """Compute the rows of `out` (B, ...), zeros before, in parts → out, on every process the same.

    lengths  (B,) tensor: processes share the rows out by it
    cut      lengths of the rows of this process → lists of indices into them
    compute  indices (b,) of rows → their values (b, ...)
    """
    my_rows = dist.mine(lengths)
    for part in dist.paced(cut(lengths[my_rows]), *passes):
        rows = my_rows[part]
        out[rows] = compute(rows)
    return dist.summed(out)


def pack(tokens, mask, lengths):
    """Ragged rows one after the other, in fewer of them → tokens, mask (R, T'), lengths (R,), doc (R, T').

    tokens, mask, lengths   (B, T), (B, T), (B,), as `pad` gives them
    doc[r, t] is the number of the row that this token comes from, -1 on pads (id 0). First fit: longest rows
    first, equal lengths by index, each goes into the first packed row that has room. No packed row is longer
    than the longest row: beyond that, attention, which grows with the square, costs more than pads do.
    """
    lengths = torch.as_tensor(lengths).tolist()  # from a GPU in one copy, not one a row
    groups, used = [], []  # rows of each packed row, its tokens
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = next((r for r, n in enumerate(used) if n + lengths[i] <= max(lengths)), len(groups))
        if r == len(groups):
            groups.append([])
            used.append(0)
        groups[r].append(i)
        used[r] += lengths[i]
    shape = len(groups), max(used, default=0)  # (R, T')
    packed, counted, doc = tokens.new_zeros(shape), mask.new_zeros(shape), tokens.new_full(shape, -1)
    for r, group in enumerate(groups):
        end = 0
        for i in group:
            start, end = end, end + lengths[i]
            packed[r, start:end], counted[r, start:end] = tokens[i, : lengths[i]], mask[i, : lengths[i]]
            doc[r, start:end] = i
    return packed, counted, torch.tensor(used, dtype=torch.int64), doc
