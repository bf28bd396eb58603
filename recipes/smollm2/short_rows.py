"""The short rows of a data file, for a run of minutes: some to train on, others held out.

    python -m recipes.smollm2.short_rows FILE FOLDER/NAME CHARACTERS TRAIN HELDOUT

writes FOLDER/NAME.jsonl and FOLDER/NAME-heldout.jsonl: the first HELDOUT and the next TRAIN rows of FILE,
in any format of docs/data.md, whose JSON has at most CHARACTERS characters.
"""

import json
import os

from nanorlhf.errors import UserError, blame, require
from nanorlhf.hub.files import parse, read_objects, write_jsonl
from recipes.smollm2 import command


def short_rows(path, characters, most):
    """The first rows of the file, `most` of them, of at most so many characters of JSON."""
    rows = []
    for at, item in read_objects(path, "FILE", ()):
        with blame(at):
            row = parse(item)
        if len(json.dumps(row, ensure_ascii=False)) <= characters:
            rows.append(row)
        if len(rows) == most:
            return rows
    raise UserError(f"{path}: {len(rows)} rows have at most {characters} characters, {most} are needed")


def main(path, name, characters, n_train, n_held_out):
    numbers = (characters, n_train, n_held_out)
    require(all(map(str.isdigit, numbers)), "CHARACTERS, TRAIN, HELDOUT: whole numbers")
    rows = short_rows(path, int(characters), int(n_train) + int(n_held_out))
    held_out = rows[: int(n_held_out)]
    train = rows[int(n_held_out) :]
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    write_jsonl(f"{name}.jsonl", train)
    write_jsonl(f"{name}-heldout.jsonl", held_out)
    print(f"{name}.jsonl: {len(train)} rows, {name}-heldout.jsonl: {len(held_out)} rows")


if __name__ == "__main__":
    command(main, __doc__)
