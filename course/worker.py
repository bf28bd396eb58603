"""The process in which a student's code runs: `python -m course.worker FOLDER 3 gae whiten ...`.

It prints one JSON object a line: {"start": exercise}, then {"exercise", "passed", "message"}. What the
student's code prints goes to the error output. course/grading.py ends this process where a check takes too long.
"""

import json
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels of week 9 run in Python; read when Triton is imported

import torch  # noqa: E402

from course import checking  # noqa: E402


def main(argv):
    folder, week, *exercises = argv
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr

    def say(line):
        out.write(json.dumps(line) + "\n")
        out.flush()

    torch.set_num_threads(1)
    checks = checking.load_check(int(week))
    path = os.path.join(folder, "exercise.py")
    say({"start": "exercise.py"})
    try:
        mine = checking.load(path, f"mine_{int(week):02}")
    except Exception as error:
        message = checking.explain(error, path)
        for name in exercises:
            say({"exercise": name, "passed": False, "message": message})
        return 0
    for name in exercises:
        say({"start": name})
        function = getattr(mine, name, None)
        if function is None:
            passed = False
            message = f"there is no function {name} in exercise.py any more; keep the names as handed out"
        else:
            check = getattr(checks, f"check_{name}")
            passed, message = checking.judge(check, function, path)
        say({"exercise": name, "passed": passed, "message": message})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
