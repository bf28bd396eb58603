"""python -m labs: see labs/run.py, whose functions a spawned process can import."""

import sys

from labs.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
