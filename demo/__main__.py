"""Write made-up scenes with their truth: `python -m demo OUT`."""

import argparse
import sys
from pathlib import Path

from demo.scenes import scenes
from demo.writers import FORMATS, TASKS, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=100, help="scenes; 100 by default")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same scenes")
    parser.add_argument("--format", choices=FORMATS, default="folder")
    parser.add_argument("--task", choices=TASKS, default="detect", help="which labels the YOLO format carries")
    args = parser.parse_args()
    if args.count < 1 or args.seed < 0:
        parser.error("--count must be at least 1, and --seed at least 0")
    write(scenes(args.count, args.seed), args.out, args.format, args.task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
