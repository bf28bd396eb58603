"""Every paper of the field in miniature: one file a paper, ending in a figure, a CSV and a verdict."""
