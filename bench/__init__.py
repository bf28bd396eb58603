"""Our numbers beside the peers': `python -m bench`. The other scripts here are run on their own."""
