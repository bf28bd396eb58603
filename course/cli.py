"""`python -m course`: the weeks, the checks, a student's functions in the real trainers, bug hunts."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys

import course
from course import bugs, grading, notebook, plug
from course.checking import HERE, WEEKS, folder_of
from nanorlhf.errors import RunError, UserError, require

TITLES = {
    1: "language models, sampling, log-probs",
    2: "supervised fine-tuning and masks",
    3: "preferences and reward models",
    4: "the policy gradient",
    5: "GRPO and its family",
    6: "PPO: the critic and the details",
    7: "KL, over-optimisation, DPO",
    8: "verifiable rewards, pass@k, what RL adds",
    9: "kernels: from the softmax to the tile",
    10: "scaling laws, distillation, many GPUs",
}
MARKS = {True: "✔", False: "✘", None: "–"}
# Left out of a handout: the solutions, what is nearly a solution, and what is not of the repository.
NOT_HANDED_OUT = (
    "course/solutions",
    "tests/course_wrong",
    "tests/test_course.py",
    ".git",
    ".venv",
    "runs",
    "out",
    "build",
    "models",
)
CACHES = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info")


def parser():
    top = argparse.ArgumentParser(
        prog="python -m course",
        description=course.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_mine(top, default=HERE)
    commands = top.add_subparsers(dest="command", metavar="")

    check = commands.add_parser("check", help="check the exercises of a week; status 0 only if all pass")
    add_week(check)
    add_mine(check)
    check.add_argument("--json", action="store_true", help="print the result as JSON, for a grader")
    limit = "seconds that one check may take"
    check.add_argument("--seconds", type=float, default=grading.LIMIT, help=limit)

    run = commands.add_parser("run", help="train with your functions in place of ours")
    add_week(run)
    add_mine(run)
    run.add_argument("--steps", type=int, default=None, help="a shorter or longer run than the week's")

    bug = commands.add_parser("bug", help="a copy of the repository with a bug in it, and a run of it")
    bug.add_argument("number", type=int, nargs="?", help="of --list")
    bug.add_argument("--list", action="store_true", help="all hunts, by difficulty")
    bug.add_argument("--hint", type=int, nargs="?", const=1, default=0, help="a hint; --hint 2 says more")
    bug.add_argument("--reveal", action="store_true", help="the line, and what a good answer says")

    cells = commands.add_parser("notebook", help="run the cells of a week and write its notebook.ipynb")
    cells.add_argument("week", type=int, nargs="?", help="1 to 10; without one, all")

    diff = commands.add_parser("diff", help="what step N of the ladder changes in the step before")
    diff.add_argument("step", type=int, help="2 to 6")

    handout = commands.add_parser("handout", help="write the repository without the solutions into a folder")
    handout.add_argument("out", help="a folder that does not exist yet")
    return top


def add_week(command):
    command.add_argument("week", type=int, help="1 to 10")


def add_mine(command, default=argparse.SUPPRESS):
    """A command without --mine takes that of the program, which stands before it or is course/ itself."""
    where = "folder with your files, laid out as course/ is (week03/exercise.py); by default course/ itself"
    command.add_argument("--mine", default=default, help=where)


def require_week(week):
    require(week in WEEKS, f"week {week}: the course has the weeks 1 to {WEEKS[-1]}")


# ------------------------------------------------------------------------------------------------------------
# The commands: each returns the exit status


def list_weeks(mine):
    """One line a week: its title, and the exercises and points that the student's files reach."""
    require(os.path.isdir(mine), f"--mine {mine}: there is no such folder")
    present = [w for w in WEEKS if os.path.isfile(os.path.join(mine, folder_of(w), "exercise.py"))]
    results = grading.check_weeks(present, mine)
    for week in WEEKS:
        mark = " "
        solved = f"no {folder_of(week)}/exercise.py"
        if week in results:
            found = grading.summary(results[week])
            mark = "✔" if found["passed"] == found["exercises"] else " "
            solved = "{passed} of {exercises} solved, {points} of {of} points".format(**found)
        print(f"{mark} {week:2}  {TITLES[week]:<42}{solved}")
    print("\npython -m course check 1      check a week; course/week01/README.md is where it begins")
    return 0


def check_one(args):
    require_week(args.week)
    grading.require_file(args.week, args.mine)
    results = grading.check_weeks([args.week], args.mine, args.seconds)[args.week]
    found = grading.summary(results)
    status = 0 if found["passed"] == found["exercises"] else 1
    if args.json:
        exercises = [vars(result) for result in results]
        print(json.dumps({"week": args.week, **found, "results": exercises}, indent=2, ensure_ascii=False))
        return status
    print(f"week {args.week} · {TITLES[args.week]}")
    for result in results:
        got = result.points if result.passed else 0
        print(f"  {MARKS[result.passed]} {result.exercise:<20} {got} of {result.points} points")
    print(f"{found['passed']} of {found['exercises']} solved, {found['points']} of {found['of']} points")
    for result in results:
        if not result.passed and result.message:
            print(f"\n{result.exercise}: {result.message}")
            print(f"(the check: course/{folder_of(args.week)}/check.py, check_{result.exercise})")
            break
    if status == 0:
        mine = "" if args.mine == HERE else f" --mine {shlex.quote(args.mine)}"
        print(f"\nSolved. Next: python -m course run {args.week}{mine}, your functions in the real trainer")
    return status


def show_diff(step):
    try:
        from course import ladder
    except ImportError:
        raise UserError("the ladder, course/ladder/, is not in this copy of the course") from None
    require(2 <= step <= 6, f"diff {step}: the ladder has the steps 1 to 6, and step 1 has none before it")
    print(ladder.diff(step, colour=sys.stdout.isatty()))
    return 0


def write_notebooks(week):
    if week is not None:
        require_week(week)
    return notebook.write(WEEKS if week is None else [week])


def hand_out(out):
    """Copy the repository without the solutions, and without wrong answers that are nearly solutions."""
    require(not os.path.exists(out), f"handout {out}: it exists already; name a folder that does not")
    root = os.path.dirname(HERE)
    target = os.path.abspath(out)
    left_out = {os.path.join(root, name) for name in NOT_HANDED_OUT} | {target}

    def ignore(folder, names):
        skipped = {name for name in names if os.path.join(folder, name) in left_out}
        return skipped | CACHES(folder, names)

    shutil.copytree(root, target, ignore=ignore)
    print(f"{out}: the repository without the solutions; python -m course works there as here")
    return 0


def run_command(args):
    if args.command is None:
        return list_weeks(args.mine)
    if args.command == "check":
        return check_one(args)
    if args.command == "run":
        require_week(args.week)
        return plug.run(args.week, args.mine, args.steps)
    if args.command == "bug":
        if args.list or args.number is None:
            return bugs.show_list()
        return bugs.hunt(args.number, args.hint, args.reveal)
    if args.command == "diff":
        return show_diff(args.step)
    if args.command == "notebook":
        return write_notebooks(args.week)
    return hand_out(args.out)


def main(argv):
    """The command line → exit status: 0, 1 where an exercise is not solved, 2 for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows writes to a pipe in a code page without ✔ and β
            with contextlib.suppress(ValueError):
                stream.reconfigure(encoding="utf-8", errors="replace")
    args = parser().parse_args(argv)
    try:
        return run_command(args)
    except UserError as error:
        print(f"python -m course: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"python -m course: the run stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
