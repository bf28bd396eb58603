"""What a run folder holds, read without complaint about lines that a full disk or a crash cut short."""

import contextlib
import gzip
import json
import zlib
from pathlib import Path

from nanorlhf.errors import require


def read_rows(out):
    """metrics.csv of a run folder → one dict a step, without the lines that a full disk cut short."""
    return read_metrics(Path(out, "metrics.csv"))


def read_metrics(path):
    """The same, of a file of any name."""
    require(path.is_file(), f"{path}: is no file")  # of a pipe or a device the end never comes
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        columns = f.readline().rstrip("\n").split(",")
        for line in f:
            cells = line.rstrip("\n").split(",")
            if len(cells) != len(columns):
                continue
            with contextlib.suppress(ValueError):  # a damaged line
                numbers = [float(cell) if cell else None for cell in cells]
                rows.append(dict(zip(columns, numbers)) | {"step": int(cells[0])})
    return rows


def read_config(out):
    """config.json of a run folder → {flag: value}; {} where there is none, or none that can be read."""
    path = Path(out, "config.json")
    if not path.is_file():
        return {}
    with contextlib.suppress(ValueError):  # cut short
        config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return config if isinstance(config, dict) else {}
    return {}


def read_tokens(out):
    """tokens.jsonl.gz of a run folder → its records, up to the first that is damaged; [] without the file."""
    path = Path(out, "tokens.jsonl.gz")
    records = []
    if path.is_file():
        with contextlib.suppress(EOFError, OSError, ValueError, zlib.error), gzip.open(path, "rt") as f:
            for line in f:
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
