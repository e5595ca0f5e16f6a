"""`python -m tune.throughput --yolo MODEL --data TRUTH --output DIR`; `--help` has the rest."""

import sys

from tune.throughput.command import main

if __name__ == "__main__":
    sys.exit(main())
