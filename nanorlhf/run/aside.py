"""A program aside: foreign work that may never end, done in a process of its own under limits.

Comparing `9^{9^{9}}` keeps Python inside one multiplication for hours, and two loops of a chat template may
count to 10^10; no signal handler and no thread can interrupt them. The kernel ends a process. `Aside` is this
side, `serve` the other: a line of JSON each way. Neither imports torch: the program starts in a moment.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

from nanorlhf.errors import RunError

try:
    import resource
except ImportError:  # Windows
    resource = None

WAIT = 60  # seconds; a machine under load, or without limits of the processor's time, gets as many


class Aside:
    """The program `python -m module`, started by the first question, and again after one that ended it.

    seconds: of the processor's time, for one answer.
    """

    def __init__(self, module, seconds):
        self.module = module
        self.seconds = seconds
        self.process = None
        self.pid = 0  # of the process that started it: a fork must not share its pipes
        self.lock = threading.Lock()  # two threads must not read each other's answers

    def ask(self, question):
        """→ the answer, or None if it takes too long. RunError if the program ends otherwise."""
        with self.lock:
            if self.pid != os.getpid() or self.process.poll() is not None:
                self.start()
            alarm = threading.Timer(WAIT, self.process.kill)
            alarm.daemon = True
            alarm.start()
            answer = ""
            try:
                print(json.dumps([self.seconds, question]), file=self.process.stdin, flush=True)
                answer = self.process.stdout.readline()
            except OSError:
                pass  # it has ended, as the empty answer says
            except BaseException:  # Ctrl-C: this answer must not be taken for that of the next question
                self.process.kill()
                self.process.wait()
                raise
            finally:
                alarm.cancel()
            if answer:
                return json.loads(answer)
            status = self.process.wait()
        if status >= 0:  # no signal ended it
            raise RunError(f"the program {self.module} ended with status {status}")
        return None

    def start(self):
        self.pid = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )


def serve(answer, memory=None):
    """The program's main loop: answer(question) for every line, until the other end closes.

    memory: bytes that the process may take. An answer that takes longer than it may ends the program.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    if memory:
        limit("RLIMIT_AS", memory)
    for line in sys.stdin:
        seconds, question = json.loads(line)
        limit("RLIMIT_CPU", math.ceil(time.process_time()) + seconds)
        print(json.dumps(answer(question)), flush=True)


def limit(name, most):
    """Set a limit of this process. Windows has none, and macOS not all: there the other side waits."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        resource.setrlimit(number, (most, hard))
