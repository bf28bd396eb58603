"""The course: ten weeks from one log-probability to PPO, with exercises that know when they are solved.

    python -m course                  the weeks, and what of each is solved
    python -m course check 4          check week 4; --mine FOLDER takes your files from elsewhere
    python -m course run 4            your functions in the real trainer, your curve beside ours
    python -m course bug 3            a copy of the repository with a bug in it, and a run of it
    python -m course diff 3           what step 3 of the ladder changes in step 2
    python -m course handout OUT      the repository without the solutions

README.md in this folder is the calendar; weekNN/README.md is where a week begins.
"""
