"""What a picture costs as a job grows: `python -m benchmarks.growth`.

Small JPEGs → YOLOv8n at a small size → Parquet, so that what a picture costs beside the model is most of it. Of 1,000
drawn scenes, by hard links, as many as are asked for. Nothing else should run on the machine.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import duckdb

from benchmarks import measuring
from demo.run import WEIGHTS
from demo.scenes import scenes
from demo.writers import jpeg

SIZES = (1_000, 10_000, 100_000)
IMGSZ, DRAWN = 96, 1_000


def make_pictures(folder: Path, count: int) -> None:
    """So many JPEGs, 1,000 a folder; those of the first are drawn, all others are links to them."""
    for number, scene in enumerate(scenes(min(DRAWN, count), 1)):
        path = _path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(scene))
    for number in range(DRAWN, count):
        path = _path(folder, number)
        path.parent.mkdir(exist_ok=True)
        os.link(_path(folder, number % DRAWN), path)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number // DRAWN:04}" / f"{number % DRAWN:04}.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of pictures")
    args = measuring.arguments(parser)
    sizes = sorted(args.sizes)[:2] if args.quick else sorted(args.sizes)
    columns = ["pictures", "whole command, s", "ms a picture", "driver, MB", "all processes, MB"]
    lines = ["| " + " | ".join([*columns, "DuckDB counts labels, s"]) + " |", "|---:|---:|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as work:
        for size in sizes:
            make_pictures(Path(work) / str(size), size)

        def command(name: str, size: int) -> list[object]:
            out = Path(work) / f"out-{size}"
            shutil.rmtree(out, ignore_errors=True)
            return ["benchmarks.contenders", name, Path(work) / str(size), out, WEIGHTS / "detect.pt", IMGSZ]

        runs = measuring.contest(["shardsight"], sizes, args.rounds, command)
        read = {size: counted(Path(work) / f"out-{size}", size) for size in sizes}
    for size, some in runs["shardsight"].items():
        seconds, rate = measuring.median(some, "seconds"), measuring.median(some, "rate")
        driver, peak = measuring.median(some, "own_mb"), measuring.median(some, "peak_mb")
        lines.append(
            f"| {size:,} | {seconds:.1f} | {1000 / rate:.2f} | {driver:,.0f} | {peak:,.0f} | {read[size]:.2f} |"
        )
    work = f"JPEGs of 224×224, YOLOv8n at imgsz {IMGSZ}, median of {args.rounds} rounds"
    said = measuring.conditions(work, ("ray", "openvino", "duckdb"))
    text = "\n".join([*lines, "", f"{said}. {measuring.noise(runs)}"])
    print(text)
    if args.record:
        measuring.record(measuring.card("As work grows", args), text)


def counted(out: Path, size: int) -> float:
    """Seconds in which DuckDB counts the labels of a job's results, which are to be complete."""
    rows = f"'{out}/results/*.parquet'"
    assert duckdb.sql(f"select count(*), count(distinct id) from {rows}").fetchall() == [(size, size)]
    began = time.perf_counter()
    duckdb.sql(f"select d.label, count(*) from {rows}, unnest(detections) as t(d) group by 1").fetchall()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
