"""Pictures → Parquet: `python -m jobs.annotate INPUT... --output OUT --yolo MODEL --paligemma MODEL`; see --help."""

import sys

from shardsight.cli import annotate

if __name__ == "__main__":
    sys.exit(annotate())
