"""One variant of a benchmark in a process of its own, which does one step each time that it is told to.

    python -m bench.worker        what bench starts, with {"who": "ours", "job": "sft", ...} on stdin

A whole train() runs here; at the end of each of its steps it reports and waits. So the variants of a row can
take turns, no peer's imports count as ours, and a step is what a user gets, its data, logging and all. CPU
seconds are those of the process (waiting costs none), memory is its largest resident set since it began.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Failed(Exception):
    """A worker that ended by itself: its last line on stderr."""


class Worker:
    """The parent's side."""

    def __init__(self, spec, log, python=sys.executable):
        quiet = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                     HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")  # fmt: skip
        self.log = log
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                [python, "-m", "bench.worker"], cwd=ROOT, env=os.environ | quiet, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self.process.stdin.write(json.dumps(spec) + "\n")

    def step(self):
        """One step more → {"cpu", "wall", "mib", "tokens", ...}; the first includes start and warm-up."""
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            with open(self.log, errors="replace") as f:
                lines = [line.strip() for line in f if line.strip()]
            raise Failed(lines[-1] if lines else "no message")
        return json.loads(reply)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Turn:
    """The child's side: wait() before the first step, done(...) at the end of each."""

    def __init__(self):
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what trainers print does not get between the replies

    def wait(self):
        if not sys.stdin.readline():
            os._exit(0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def done(self, **more):
        """Report the step that ends here, and wait until the next one is asked for."""
        synchronize()
        reply = {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}
        print(json.dumps(reply | {"mib": peak_mib()} | more), file=self.replies, flush=True)
        self.wait()


def synchronize():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib():
    """Largest resident set so far, or with a GPU the most that torch held there; MiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def lengths_of(plan, step):
    """The planned response lengths of one step: the same multiset each time, in another order."""
    import random

    order = list(plan)
    random.Random(step).shuffle(order)
    return order


if __name__ == "__main__":
    spec, turn = json.loads(sys.stdin.readline()), Turn()
    turn.wait()
    with contextlib.ExitStack() as stack:
        if os.environ.get("NANORLHF_FAKE_GPU"):  # of --gpu --fake
            from bench import gpu

            stack.enter_context(gpu.device(fake=True))
        importlib.import_module(f"bench.{spec['who']}").run(spec, turn)
