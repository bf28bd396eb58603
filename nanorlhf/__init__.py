"""nanoRLHF: reinforcement learning on language models, small enough to read in an afternoon.

The files of this folder are the floor that one reads: from a prompt to an update. The folders in it are wings
that one may leave closed: kernels (the same numbers, faster), hub (other people's files), run (what makes a
run a run) and look (what a run looks like).
"""

__version__ = "0.1.0"
