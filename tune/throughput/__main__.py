"""`python -m tune.throughput --yolo MODEL --data TRUTH --output DIR`; `--help` has the rest."""

import os
import sys

from tune.throughput.command import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of destructors: those of Ray's native code aborted two of five processes that had run jobs and actors
    # of their own (ray 2.60), with exit code 134 after all was done.
    os._exit(code)
