"""A contender of the benchmarks, for their tests: python -m tests.contender MEGABYTES.

It leaves a process behind, which holds as much memory and computes as long.
"""

import os
import sys
import time

from benchmarks.measuring import done

if __name__ == "__main__":
    megabytes = int(sys.argv[1])
    if os.fork():
        done(1)
    elif os.fork():
        os._exit(0)
    held = os.urandom(1) * (megabytes << 20)
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass
    done(1)
