"""A program aside: foreign work that may never end, done in a process of its own under limits.

Comparing `9^{9^{9}}` keeps Python inside one multiplication for hours, two loops of a chat template may count
to 10^10, and a user's reward function may hang, exit or crash; no signal handler and no thread can interrupt
them all. The kernel ends a process. `Aside` is this side, `serve` the other. Neither imports torch: the
program starts in a moment.
"""

import contextlib
import json
import os
import pickle
import queue
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
LONGEST = 1 << 27  # bytes of an answer


class Aside:
    """The program of this module, started by the first question, and again after one that ended it.

    seconds: of the processor's time, for one answer; 0: what all cores give while it is waited for. stderr:
    where the program's messages go; None: where ours go.
    """

    def __init__(self, module, seconds=0, stderr=subprocess.DEVNULL):
        self.module = module
        self.seconds = seconds
        self.stderr = stderr
        self.process = None
        self.owner = 0  # the number of the process that started it: a fork must not share its pipes
        self.number = 0  # of the last question: an answer has the number of its question
        self.lock = threading.Lock()  # two threads must not read each other's answers

    def ask(self, question):
        """→ the answer, or None if it takes too long. RunError if the program ends otherwise."""
        answer, why = self.answer(question, WAIT)
        if why and self.process.returncode >= 0:  # no signal ended it
            raise RunError(f"the program {self.module} {why}")
        return answer

    def answer(self, question, wait, flag=""):
        """→ (answer, ""), or (None, why there is none within `wait` seconds); then the program is ended.

        flag: what says how long to wait, for the message.
        """
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            self.number += 1
            alarm = threading.Timer(wait, self.process.kill)
            alarm.daemon = True
            alarm.start()
            started = time.monotonic()
            line = b""
            try:
                # No pickle comes back: loading one could run code here.
                seconds = self.seconds or wait * (os.cpu_count() or 1)
                pickle.dump((self.number, seconds, question), self.process.stdin)
                self.process.stdin.flush()
                line = self.process.stdout.readline(LONGEST)
                number, answer = json.loads(line)
                if number == self.number:
                    return answer, ""
            except (OSError, ValueError, TypeError, RecursionError):
                pass  # it has ended, or a reward function wrote to its pipe
            except BaseException:  # Ctrl-C: this answer must not be taken for that of the next question
                self.end()
                raise
            finally:
                alarm.cancel()
            if line:
                why = "wrote bytes of its own to the pipe of its process"
            elif time.monotonic() - started >= wait:
                why = f"took more than {wait:g} s{flag}"
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
                why = f"ended its process (status {self.process.returncode})"
            self.end()
            return None, why

    def start(self):
        self.owner = os.getpid()
        # In PYTHONPATH the path would reach what a reward function starts, another version of Python say.
        path = f"import sys; sys.path[:] = {list(map(str, sys.path))}"
        run = f"import runpy; runpy.run_module({self.module!r}, run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{path}; {run}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            start_new_session=True,  # a group of its own, which killpg ends
        )

    def end(self):
        """End the program, with all that it started."""
        with contextlib.suppress(OSError, AttributeError):  # Windows has no groups of processes
            os.killpg(self.process.pid, signal.SIGKILL)  # before wait, which frees the number for others
        self.process.kill()
        self.process.wait()


def serve(answer, memory=None):
    """The program's main loop: answer(question) for every question, until the other end closes.

    memory: bytes that the process may take. An answer that takes longer than it may ends the program.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    if memory:
        with contextlib.suppress(ValueError, OSError, AttributeError):  # macOS refuses it, Windows has none
            resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed (2>&-): the next file would take its number
    pipe = os.dup(1)
    answers = os.fdopen(pipe, "w")
    os.dup2(2, 1)  # what else is printed goes to stderr, not between the answers
    if hasattr(os, "register_at_fork"):  # or the other side would wait for the end of every fork, too
        os.register_at_fork(after_in_child=lambda: os.dup2(2, pipe))
    questions = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    me = os.getpid()
    while True:
        number, seconds, question = questions.get()
        set_timer(seconds)  # for one call of re.match that keeps all threads from running, `_read` too
        found = answer(question)
        set_timer(0)
        if os.getpid() != me:
            os._exit(0)  # a reward function called os.fork, and this is the child: only the parent may answer
        print(json.dumps([number, found]), file=answers, flush=True)


def _read(questions):
    """Put the questions into the queue. End the program, even one that hangs, when the other end closes."""
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a reward function must not read the questions
    with contextlib.suppress(EOFError):
        while True:
            questions.put(pickle.load(source))
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def set_timer(seconds):
    """End this process when it has taken so many seconds of the processor's time; 0: never."""
    if hasattr(signal, "setitimer"):  # not on Windows, where the other side waits
        signal.setitimer(signal.ITIMER_PROF, seconds)
