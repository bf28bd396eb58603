"""python -m variants: see variants/__init__.py."""

import sys

from variants import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
