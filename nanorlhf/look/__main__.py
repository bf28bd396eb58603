"""Look at runs: python -m nanorlhf.look --doctor RUN, python -m nanorlhf.look --plot RUN RUN ..."""

import sys

from nanorlhf.errors import UserError, require
from nanorlhf.look import doctor, plots


def main(argv):
    require(len(argv) > 1 and argv[0] in ("--doctor", "--plot"), __doc__)
    if argv[0] == "--plot":
        plots.main_plot(argv[1:])
    else:
        doctor.main(argv[1])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
