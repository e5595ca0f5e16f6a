"""Where a job's seconds go until its first row, and after its last: `python -m benchmarks.startup`.

Sixteen pictures through YOLOv8n, with a Ray of the job's own, several times; medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import conditions
from benchmarks.throughput import make_pictures
from demo.run import WEIGHTS
from shardsight import actors

NOTES = "STARTUP_NOTES"  # names the file in which the job's processes note when a part has ended
COUNT = 16


def ended(part: str, at: float | None = None) -> None:
    with open(os.environ[NOTES], "a") as file:
        file.write(f"{at or time.time()} {part}\n")


class Noted(actors.Annotator):
    """Notes the parts of an actor. What it has imported before its class was there, counts as its process."""

    def __init__(self, *arguments: Any) -> None:
        ended("the actor's process, and Ray Data in it")
        import torch  # noqa: F401

        ended("torch")
        super().__init__(*arguments)
        ended("ultralytics and the weights")
        _ = self.model.compiled.together
        ended("the network, compiled before")

    def __call__(self, table: Any) -> Any:
        found = super().__call__(table)
        ended("the first batch")
        return found


def job(folder: str, out: str) -> None:
    """The job's command, with its parts noted."""
    ended("begun", psutil.Process().create_time())
    ended("Python and imports")
    from shardsight import cli, cluster, job, pipeline, progress

    def noting(owner: Any, name: str, before: str, after: str = "") -> None:
        original = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            ended(before)
            result = original(*arguments, **named)
            if after:
                ended(after)
            return result

        setattr(owner, name, noted)

    noting(job, "run", "settings")
    noting(cluster, "join", "listing, and what the model is", "Ray")
    noting(cluster, "leave", "results written and proved", "Ray's end")
    noting(progress.Progress, "add", "the first row")
    pipeline.Annotator = Noted  # type: ignore[misc]
    sys.exit(cli.annotate([folder, "--output", out, "--yolo", str(WEIGHTS / "detect.pt"), "--imgsz", "640"]))


def parts(folder: Path, out: Path) -> dict[str, float]:
    """Part → seconds, of one run, in their order; a part that ends several times counts up to the first."""
    with tempfile.NamedTemporaryFile("r") as notes:
        command = [sys.executable, "-m", "benchmarks.startup", "--run", str(folder), str(out)]
        subprocess.run(command, check=True, env=os.environ | {NOTES: notes.name}, stderr=subprocess.DEVNULL)
        lines = sorted((float(at), part) for at, _, part in (line.strip().partition(" ") for line in notes))
    found: dict[str, float] = {}
    before = lines[0][0]
    for at, part in lines[1:]:
        if part not in found:
            found[part] = at - before
            before = at
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "OUT"), help="one run, in which the parts are noted")
    args = parser.parse_args()
    if args.run:
        job(*args.run)
    seconds = defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as work:
        make_pictures(Path(work) / "in", COUNT)
        for number in range(args.rounds + 1):
            found = parts(Path(work) / "in", Path(work) / str(number))
            for part, spent in found.items() if number else ():  # the first fills the caches
                seconds[part].append(spent)
    print("| until the end of | s | since the command |\n|---|---:|---:|")
    since = 0.0
    for part, each in seconds.items():
        since += statistics.median(each)
        print(f"| {part} | {statistics.median(each):.2f} | {since:.1f} |")
    print(f"\n{conditions(f'{COUNT} JPEGs, median of {args.rounds} runs', ('ray', 'torch', 'openvino'))}")


if __name__ == "__main__":
    main()
