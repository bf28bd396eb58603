"""python -m labs: see labs/run.py and labs/replication.py, whose functions a spawned process can import."""

import sys

from labs import replication, run

if __name__ == "__main__":
    argv = sys.argv[1:]
    if argv[:1] == ["replicate"]:
        sys.exit(replication.main(argv[1:]))
    sys.exit(run.main(argv))
