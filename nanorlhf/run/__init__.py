"""What makes a run a run: command line, log, checkpoints, devices, processes, the process of rewards.

Leave it closed to understand an algorithm: nothing in here may move a learning curve.
Open it to learn how a run is resumed bit for bit, or how one trainer becomes eight processes.
"""
