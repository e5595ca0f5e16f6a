"""A job's results in the format of another tool: `python -m jobs.convert OUT --to coco --output DIR`; see --help."""

import sys

from shardsight.cli import convert

if __name__ == "__main__":
    sys.exit(convert())
