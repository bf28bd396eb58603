"""A run as a page, a diagnosis or a plot.

    python -m nanorlhf.look RUN [RUN ...]            look.html in the first folder
    python -m nanorlhf.look --doctor RUN             what is wrong with the run, in words
    python -m nanorlhf.look --plot RUN RUN ...       a picture of the curves of many runs
"""

import sys

from nanorlhf.errors import UserError, require, shown, visible
from nanorlhf.look import doctor, page


def main(argv=None):
    """→ exit status: 0, or 2 for a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["--plot"]:  # the first, as it has flags and a --help of its own
            from nanorlhf.look import plots

            plots.main_plot(words[1:])
        elif "-h" in words or "--help" in words:
            print(__doc__.strip())
        elif "--doctor" in words:
            folders = [word for word in words if word != "--doctor"]
            require(len(folders) == 1, "--doctor: name one run folder")
            doctor.main(folders[0])
        else:
            unknown = [word for word in words if word.startswith("-")]
            require(not unknown, f"unknown flag {unknown[:1]}; there are --doctor and --plot")
            require(words, "name a run folder, such as runs/reviews-ppo")
            print(visible(page.write(words)))
    except doctor.UNREADABLE as e:
        problem = str(e)
        if not isinstance(e, (UserError, OSError)):
            problem = f"{' '.join(words)}: a file of the run is damaged ({type(e).__name__}: {e})"
        print(f"nanorlhf.look: error: {shown(problem)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
