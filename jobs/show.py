"""A job's results as a page to look at: `python -m jobs.show OUT`; see --help."""

import sys

from shardsight.cli import show

if __name__ == "__main__":
    sys.exit(show())
