"""Convert a GGUF, llama.cpp's model in one file, to a Hugging Face folder with fp32 weights.

    python -m nanorlhf.hub convert MODEL.gguf FOLDER
"""

import os
import sys

from nanorlhf import hub
from nanorlhf.errors import RunError, UserError, require


def main(argv):
    """Exit status: 0, 2 for a user's mistake, 1 for a full disk."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    try:
        usage = "usage: python -m nanorlhf.hub convert MODEL.gguf FOLDER"
        require(len(argv) == 3 and argv[0] == "convert", usage)
        source, folder = argv[1:]
        for path in (folder, f"{folder}.tmp", f"{folder}.old"):  # the last two are written to, and removed
            require(not os.path.lexists(path), f"{path} is there already; name a new folder")
        model, tok = hub.load(source)
        hub.save(model, tok, folder)
    except (UserError, RunError) as error:
        print(f"python -m nanorlhf.hub: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters of {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
