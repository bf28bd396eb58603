"""The parts of recipes/smollm2_cpu.sh and recipes/smollm2_all.sh: each file is a small program."""

import inspect
import sys
from pathlib import Path

from nanorlhf.errors import OneLine


def command(main, doc):
    """Call main with the words of the command line. Where their number is wrong, print the doc."""
    words = sys.argv[1:]
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        sys.exit(doc)
    try:
        sys.exit(main(*words))
    except OneLine as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
