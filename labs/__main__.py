"""python -m labs: see run.py, replication.py and gallery.py, whose functions a spawned process can import."""

import sys

from labs import gallery, replication, run

if __name__ == "__main__":
    argv = sys.argv[1:]
    if argv[:1] == ["replicate"]:
        sys.exit(replication.main(argv[1:]))
    if not argv or argv[0] == "gallery":
        sys.exit(gallery.main(argv))
    sys.exit(run.main(argv))
