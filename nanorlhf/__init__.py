"""nanoRLHF: reinforcement learning on language models, small enough to read in an afternoon."""

__version__ = "0.1.0"
