"""What every run of the tests does: hides GPUs, starts with the slowest files, says how far it is.

    NANORLHF_TEST_GPU=1 pytest      the tests marked `gpu`, on the GPU; without it no test sees a GPU
"""

import functools
import os
import time
from collections import Counter

import pytest

TEST_GPU = os.environ.get("NANORLHF_TEST_GPU") == "1"
if not TEST_GPU:
    # Somebody may be training there. Processes that a test starts inherit both; torch and Triton are not
    # imported yet, and read them then.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["TRITON_INTERPRET"] = "1"  # the very kernels that run on a GPU, in Python

import torch  # noqa: E402

if not TEST_GPU:
    # A Mac's GPU; no variable of the environment hides it. torch's own function is cached, too, and the
    # compiler of torch 2.15 asks for the function inside the cache.
    torch.backends.mps.is_available = functools.lru_cache(lambda: False)

# CPU seconds of the files above five of them, without rows marked slow: `make test` on two slow cores.
SECONDS = {
    "test_dist.py": 45, "test_optimum.py": 36, "test_triton.py": 35, "test_dpo.py": 35, "test_saving.py": 30,
    "test_runs.py": 30, "test_demo.py": 26, "test_grpo.py": 19, "test_rewards.py": 17, "test_machines.py": 14,
    "test_plan.py": 13, "test_hub.py": 12, "test_slots.py": 11, "test_training.py": 11, "test_cli.py": 11,
    "test_sft.py": 10, "test_input.py": 9, "test_generate.py": 9, "test_rm.py": 8, "test_ppo.py": 8,
    "test_labs.py": 8, "test_distill.py": 8, "test_learning_ppo.py": 7, "test_kernels.py": 6,
    "test_course.py": 25, "test_evaluate.py": 7, "test_variants.py": 20,
    "test_notebooks.py": 30, "test_recipes.py": 13, "test_fake_device.py": 15,
}  # fmt: skip
OTHERS = 2  # of any other file
SHOWN = 1000  # a run of fewer tests is over soon


def file_of(nodeid):
    return nodeid.partition("::")[0].rpartition("/")[2]


def seconds_of(nodeid):
    return SECONDS.get(file_of(nodeid), OTHERS)


def pytest_collection_modifyitems(config, items):
    """With NANORLHF_TEST_GPU=1 only the tests marked `gpu` run: the others hold numbers of the CPU.

    The slowest files come first: at the end no worker then waits for another that has just begun one.
    """
    if TEST_GPU:
        if not torch.cuda.is_available():
            raise pytest.UsageError("NANORLHF_TEST_GPU=1, but this torch sees no GPU")
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("gpu") is None])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: -seconds_of(item.nodeid))


class Progress:
    """A plugin that prints how much of the expected time is over, ten times in a run.

    A share of the tests would mislead: 50 of 2,700 take a tenth of the time.
    """

    def __init__(self, nodeids, workers, say, clock=time.monotonic):
        in_file = Counter(map(file_of, nodeids))
        self.seconds = {nodeid: seconds_of(nodeid) / in_file[file_of(nodeid)] for nodeid in nodeids}
        self.total = sum(self.seconds.values())
        self.over = 0.0
        self.next = 0.1
        self.say = say
        self.clock = clock
        self.start = clock()
        cores = "two slow cores" if workers == 2 else f"{workers} slow core" + "s" * (workers > 1)
        say(f"{len(nodeids):,} tests, about {self.total / workers / 60:.0f} minutes on {cores}")

    def pytest_runtest_logfinish(self, nodeid):
        self.over += self.seconds.pop(nodeid, 0.0)
        share = self.over / self.total
        if share < self.next or not self.seconds:
            return
        self.next = share + 0.1
        passed = (self.clock() - self.start) / 60
        left = passed / share - passed
        self.say(f"{share:.0%} of the work after {passed:.1f} minutes, about {left:.1f} to go")


def begin(config, nodeids):
    """Register a Progress in the process that prints, before the first of many tests."""
    plugins = config.pluginmanager
    reporter = plugins.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or plugins.has_plugin("progress"):
        return
    if len(nodeids) < SHOWN:
        return

    def say(line):
        reporter.write_line(f"\n{line}")

    workers = getattr(config.option, "numprocesses", None) or 1
    plugins.register(Progress(nodeids, workers, say), "progress")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    begin(node.config, ids)


def pytest_collection_finish(session):
    begin(session.config, [item.nodeid for item in session.items])
