"""Models side by side on labelled pictures: `python -m jobs.evaluate --data PATH --yolo M --output DIR`; see --help."""

import sys

from shardsight.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
