"""The process in which a student's code runs: `python -m course.worker FOLDER 6:gae 6:whiten`.

It prints one JSON object a line: {"start": "3:pairwise_loss"}, then {"item", "passed", "message"}. What the
student's code prints goes to the error output. course/grading.py ends this process where a check takes too
long.
"""

import json
import os
import sys

# The kernel of week 9 runs in Python, without a GPU. Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

from course import checking  # noqa: E402


def load_mine(path, week):
    """A student's file → its module, or None and what is wrong with it."""
    try:
        return checking.load(path, f"mine_{week:02}"), ""
    except Exception as error:
        return None, checking.explain(error, path)


def main(argv):
    folder, *items = argv
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr

    def say(line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    torch.set_num_threads(1)
    files = {}  # {week: (module or None, what is wrong with it)}
    for item in items:
        say({"start": item})
        number, name = item.split(":")
        week = int(number)
        path = os.path.join(folder, checking.folder_of(week), "exercise.py")
        if week not in files:
            files[week] = load_mine(path, week)
        module, message = files[week]
        passed = False
        if module is not None:
            function = getattr(module, name, None)
            if function is None:
                message = f"there is no function {name} in exercise.py any more; keep the names as handed out"
            else:
                check = getattr(checking.load_check(week), f"check_{name}")
                passed, message = checking.judge(check, function, path)
        say({"item": item, "passed": passed, "message": message})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
