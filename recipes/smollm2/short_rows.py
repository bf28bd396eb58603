"""The short rows of a data file, for a run of minutes: some to train on, others held out.

    python -m recipes.smollm2.short_rows FILE FOLDER/NAME CHARACTERS TRAIN HELDOUT

writes FOLDER/NAME.jsonl and FOLDER/NAME-heldout.jsonl: the first HELDOUT and the next TRAIN rows of FILE,
in any format of docs/data.md, whose JSON has at most CHARACTERS characters.
"""

import json
import os
import sys

from nanorlhf.errors import UserError, blame, require
from nanorlhf.hub.files import parse, read_objects


def short_rows(path, characters, most):
    """The first rows of the file, `most` of them, of at most so many characters of JSON → their texts."""
    texts = []
    for at, item in read_objects(path, "FILE", ()):
        with blame(at):
            text = json.dumps(parse(item), ensure_ascii=False)
        if len(text) <= characters:
            texts.append(text)
        if len(texts) == most:
            return texts
    raise UserError(f"{path}: {len(texts)} rows have at most {characters} characters, {most} are needed")


def main(path, name, characters, n_train, n_held_out):
    texts = short_rows(path, int(characters), int(n_train) + int(n_held_out))
    held_out = texts[: int(n_held_out)]
    train = texts[int(n_held_out) :]
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    for end, part in (("", train), ("-heldout", held_out)):
        with open(f"{name}{end}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(text + "\n" for text in part)
    print(f"{name}.jsonl: {len(train)} rows, {name}-heldout.jsonl: {len(held_out)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    try:
        require(all(number.isdigit() for number in sys.argv[3:]), "CHARACTERS, TRAIN, HELDOUT: whole numbers")
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"recipes.smollm2.short_rows: error: {error}")
