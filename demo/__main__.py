"""Write made-up scenes, or clips of them in motion, with their truth: `python -m demo OUT`."""

import argparse
import sys
from itertools import islice
from pathlib import Path

from demo.clips import write_clips
from demo.scenes import scenes
from demo.writers import FORMATS, TASKS, write, write_splits


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, help="scenes, 100 by default; or clips, 8 by default")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same scenes")
    parser.add_argument("--format", choices=(*FORMATS, "clips"), default="folder")
    parser.add_argument("--task", choices=TASKS, default="detect", help="which labels the YOLO format carries")
    parser.add_argument("--val", type=int, metavar="N", help="YOLO only: N more scenes, in val/ beside train/")
    args = parser.parse_args()
    count = args.count if args.count is not None else 8 if args.format == "clips" else 100
    if count < 1 or args.seed < 0:
        parser.error("--count must be at least 1, and --seed at least 0")
    if args.val is not None and (args.val < 1 or args.format != "yolo"):
        parser.error("--val must be at least 1, and goes with --format yolo")
    if args.format == "clips":
        write_clips(count, args.seed, args.out)
    elif args.val:
        made = scenes(count + args.val, args.seed)
        write_splits(islice(made, count), made, args.out, args.task)
    else:
        write(scenes(count, args.seed), args.out, args.format, args.task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
