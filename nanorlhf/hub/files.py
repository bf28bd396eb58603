"""Read and write files of rows: JSON lines, one JSON array, gzip, Parquet → dicts that know their line.

`read_jsonl` reads files that have our own keys; `formats.py` reads other people's formats, also from here.
"""

import gzip
import json
import os
import zlib
from pathlib import Path

from nanorlhf.errors import UserError, blame, require

LFS = b"version https://git-lfs"
# The first bytes of files that hold no rows: what they are, and what to do.
OTHER_FILES = {
    b"\xfd7zXZ": "an xz archive; unpack it first: unxz FILE",
    b"PK\3\4": "a zip archive; unpack it first: unzip FILE",
    b"BZh": "a bzip2 archive; unpack it first: bunzip2 FILE",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first: unzstd FILE",
    LFS: "a Git LFS pointer, not the file itself; fetch that: git lfs pull",
    b"<": "a web page or XML, no JSON; download the file itself",
}


def read_jsonl(path, required, nonempty=(), flag="--data"):
    """Read a file whose rows have our own keys, in any form that `read_objects` takes → list of dicts.

    required   tuple of the keys that every row must have, with strings as values; other keys stay as they are
    nonempty   those of the required keys whose value must be more than whitespace

    Each row also gets "_at", its place as "file:line". UserError, naming flag, file and line, for a row
    that is not so.
    """
    rows = []
    for at, item in read_objects(path, flag, required):
        with blame(f"{flag}: {at}"):
            row = parse(item)
            check_text(row, required, nonempty)
        row["_at"] = at
        rows.append(row)
    return rows


def read_objects(path, flag, required):
    """Read a file without parsing its rows → [("file:line" or "file:row 7", item)]; `parse` takes an item.

    Takes JSON lines (blank ones are skipped) or one JSON array, either of them also gzipped, and Parquet
    where pyarrow is installed. Text is UTF-8, with or without a byte order mark, with LF or CRLF.
    UserError, naming the flag and the file, if it is missing, damaged or empty.
    """
    where = f"{flag}: {path}"
    data = _read_bytes(path, where)
    size = len(data)
    data = data.removeprefix(b"\xef\xbb\xbf")  # the byte order mark
    place = f"{path}:row "
    if data[:4] == b"PAR1":
        items = _read_parquet(data, where)
    elif data.lstrip()[:1] == b"[":
        with blame(where):
            items = _load(data)
    else:
        for start, message in OTHER_FILES.items():
            require(not data.startswith(start), f"{where}: {message}")
        # Split at newlines only: str.splitlines also breaks at U+2028, which JSON strings may hold.
        items = [line.rstrip() for line in data.split(b"\n")]
        place = f"{path}:"
    rows = [(f"{place}{n}", item) for n, item in enumerate(items, start=1) if item != b""]
    problem = "only blank lines" if size else "the file is empty"
    require(rows, f"{where}: {problem}; expected rows like {_example(required)}")
    return rows


def require_regular(path, where):
    """UserError for what is there and no file: a pipe would be waited for, and a device has no end."""
    regular = os.path.isfile(path) or not os.path.exists(path)
    require(regular, f"{where}: is no regular file; a pipe or a device may have no end")


def _read_bytes(path, where):
    require_regular(path, where)
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":  # gzip is known by its first bytes: a name may lack the .gz
            data = gzip.decompress(data)
        return data
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{where}: damaged gzip file ({e}); fetch or compress it again") from None
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}; expected a .jsonl, .json, .gz or .parquet file") from None


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
        raise UserError(f"{where}: damaged Parquet file ({e})") from None


def parse(item):
    """Parse an item of `read_objects` → its object. UserError, without the place, if it is not an object."""
    row = _load(item) if isinstance(item, bytes) else item
    require(isinstance(row, dict), f"a JSON {json_type(row)}; expected one object a row, like {{...}}")
    return row


def _load(data):
    require(b"\0" not in data, "a NUL byte; JSON is plain UTF-8 text (UTF-16, or damaged?)")

    def refuse(constant):  # Python would take NaN and Infinity
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 (byte {e.start + 1} of the row); save it as UTF-8") from None
    except json.JSONDecodeError as e:
        at = f"column {e.colno}"
        if b"\n" in data.strip():
            at = f"line {e.lineno}, {at}"
        cure = "an object"
        if data.rstrip()[-1:] in (b"{", b"[", b","):  # pretty-printed
            cure = "each object on one line: jq -c . FILE > NEW.jsonl"
        raise UserError(f"bad JSON at {at} ({e.msg}); expected {cure}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"bad JSON ({e}); expected an object") from None


def check_text(row, required, nonempty=()):
    """UserError unless the row has all required keys, as strings, and text in those that are `nonempty`."""
    hint = f"(a row is {_example(required)})"
    for key in required:
        require(key in row, f'missing key "{key}" {hint}')
        text = row[key]
        require(isinstance(text, str), f'"{key}" is a {json_type(text)}, expected a string {hint}')
    for key in nonempty:
        require(row[key].strip(), f'"{key}" is empty, expected some text {hint}')


def _example(required):
    return "{" + ", ".join(f'"{key}": …' for key in required) + "}"


def json_type(x):
    """The JSON name of a Python value's type, such as "object" for a dict."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(x), "number")


def read_json(path):
    """The object in a JSON file; {} where there is no such file. UserError, naming the file, if it is bad."""
    path = Path(path)
    if not path.is_file():
        return {}
    with blame(path, ValueError, OSError, RecursionError):  # the last: 100,000 brackets, one in another
        found = json.loads(path.read_text("utf-8"))
        require(isinstance(found, dict), "is not a JSON object")
    return found


def write_jsonl(path, rows):
    """Write rows, an iterable of dicts, as JSON lines, without the "_at" that `read_jsonl` adds.

    The file is written beside its place and then renamed: after a crash or on a full disk there is the old
    file or the whole new one. ValueError for NaN and infinities, which JSON does not have.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as f:
            for row in rows:
                row = dict(row)
                row.pop("_at", None)
                line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                # UTF-8 cannot hold a lone surrogate; backslashreplace writes its JSON escape, \ud800.
                f.write(line.encode("utf-8", "backslashreplace"))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
