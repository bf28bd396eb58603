"""Rows in, padded batches out: JSON-lines files, prompt and response, masks from lengths, resumable order."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from nanorlhf.common import UserError


def read_jsonl(
    path, required: tuple[str, ...], flag: str = "--data", nonempty: tuple[str, ...] = ()
) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file, one JSON object a line; blank lines are skipped.

    required   keys that every row must have, as strings; other keys are left as they are
    nonempty   of these, the keys that must hold more than whitespace
    flag       the command-line flag that gave the path, named in errors

    Each row also gets "_at", its place as "file:line", for later messages about it. UTF-8, with or without a
    BOM; LF or CRLF. Anything else raises a UserError that names the flag, the file and the line.
    """
    where = f"{flag}: {path}"
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":  # what the file is, not what it is called
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{where}: damaged gzip file ({e}); fetch or compress it again") from None
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}; expected a .jsonl or .jsonl.gz file") from None
    if data[:4] == b"PAR1":
        to_json = "pandas.read_parquet(p).to_json(q, orient='records', lines=True)"
        raise UserError(f"{where}: a Parquet file, expected JSON lines; convert it: {to_json}")

    rows = []
    # Bytes are split at newlines only: str.splitlines also breaks at U+2028, which JSON strings may hold.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            row = _parse(line, f"{where}:{number}")
            _check(row, required, nonempty, f"{where}:{number}")
            row["_at"] = f"{path}:{number}"
            rows.append(row)
    if not rows:
        what = "only blank lines" if data else "the file is empty"
        raise UserError(f"{where}: {what}; expected rows like {_example(required)}")
    return rows


def _parse(line: bytes, where: str) -> dict:
    if b"\0" in line:
        raise UserError(f"{where}: a NUL byte; JSON lines are plain UTF-8 text (UTF-16, or damaged?)")

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        row = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 (byte {e.start + 1} of the line); save it as UTF-8") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: bad JSON at column {e.colno} ({e.msg}); expected an object") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: bad JSON ({e}); expected an object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {_json_type(row)}; expected one object a line, like {{...}}")
    return row


def require_keys(rows: list[dict], required: tuple[str, ...], flag: str, nonempty=()) -> None:
    """The checks of `read_jsonl` on rows that it has read already, for files that may hold several kinds."""
    for row in rows:
        _check(row, required, nonempty, f"{flag}: {row['_at']}")


def _check(row: dict, required: tuple[str, ...], nonempty: tuple[str, ...], where: str) -> None:
    hint = f"(a row is {_example(required)})"
    for key in required:
        if key not in row:
            raise UserError(f'{where}: missing key "{key}" {hint}')
        if not isinstance(row[key], str):
            raise UserError(f'{where}: "{key}" is a {_json_type(row[key])}, expected a string {hint}')
    for key in nonempty:
        if not row[key].strip():
            raise UserError(f'{where}: "{key}" is empty, expected some text {hint}')


def _example(required: Iterable[str]) -> str:
    return "{" + ", ".join(f'"{key}": …' for key in required) + "}"


def _json_type(x) -> str:
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
    """(train, test): test has the rows whose prompt is `held_out`; by prompt, so none is in both."""
    train, test = [], []
    for row in rows:
        (test if held_out(row["prompt"]) else train).append(row)
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
    """(prompt ids, response ids + [eos]), or None when together beyond max_len tokens: drop it, and count it.

    The two are tokenized apart, because a policy is given the prompt's ids and then writes ids of its own: a
    merge across the boundary is one it could never sample. `at` ("file:line") starts the message of a
    UserError, raised for a prompt without tokens and for text that `tok` cannot encode.
    """
    prefix = f"{at}: " if at else ""
    try:
        prompt_ids, response_ids = tok.encode(prompt), tok.encode(response)
    except UserError as e:
        raise UserError(f"{prefix}{e}") from None
    if not prompt_ids:
        raise UserError(f"{prefix}the prompt is empty; a response needs at least one token before it")
    response_ids = response_ids + [tok.eos_id]  # detail 3
    # detail 4: never truncated; what does not fit is dropped
    return (prompt_ids, response_ids) if len(prompt_ids) + len(response_ids) <= max_len else None


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
    lengths = [int(length) for length in lengths]
    groups, longest = [], 0  # longest: of the last group, its first row
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (budget == 0 or (len(groups[-1]) + 1) * longest <= budget):
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = lengths[i]
    return groups
