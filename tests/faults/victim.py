"""A run in a process of its own that can be killed, and says in one byte of a file what it is doing."""

import os
import sys

PHASES = {"rollout": "r", "reward": "j", "update": "u", "saving": "s"}  # phase → the byte that says so


def train(name, argv, phase_file):
    """name.main(argv), once the calls that tell the phase have been wrapped. Ends with main's exit status.

    Without fsync: what was written outlasts a kill, if not a power cut, and the disk is slow.
    """
    import importlib

    import torch

    from nanorlhf import generate, hub
    from nanorlhf.look import plots
    from nanorlhf.run import checkpoint

    said = os.open(phase_file, os.O_RDWR | os.O_CREAT)

    def tell(letter):
        os.pwrite(said, letter.encode(), 0)

    def during(phase, function):
        def call(*args, **kw):
            around = os.pread(said, 1, 0).decode()
            tell(PHASES[phase])
            try:
                return function(*args, **kw)
            finally:
                tell(around)

        return call

    tell("-")
    trainer = importlib.import_module(name)
    plots.pyplot = lambda: None  # curves take longer than the run
    generate.generate = during("rollout", generate.generate)
    if hasattr(trainer, "score_responses"):
        trainer.score_responses = during("reward", trainer.score_responses)
    trainer.gradient = during("update", trainer.gradient)
    torch.optim.AdamW.step = during("update", torch.optim.AdamW.step)
    hub.save = during("saving", hub.save)  # model/
    checkpoint.Run.save = during("saving", checkpoint.Run.save)  # state/
    torch.set_num_threads(1)
    os.fsync = lambda fd: None
    sys.stdout = sys.stderr = open(f"{phase_file}.txt", "a", buffering=1)
    os._exit(trainer.main(argv))
