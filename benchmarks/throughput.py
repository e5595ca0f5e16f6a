"""Pictures per second of ours and of the peers, on the same work: `make bench`.

Photo-like JPEGs of 1280×720 → YOLOv8n → Parquet: what a user waits for, the whole command over few and over many, and
the rate of its stream once it flows. See measuring.py. Nothing else should run on the machine.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import duckdb
import numpy as np

from benchmarks import measuring
from benchmarks.contenders import CONTENDERS
from demo.run import WEIGHTS, photographs

SIZES = (16, 400, 4000)
PEERS = ("ultralytics", "ultralytics_all", "ray_data", "daft")
NAMES = {
    "shardsight": "Shardsight, defaults",
    "shardsight_exact": "Shardsight, fp32, full decoding",
    "shardsight_int8": "Shardsight, int8",
    "ultralytics": "ultralytics `predict(stream=True)`",
    "ultralytics_all": "the same, told to use every core",
    "ray_data": "Ray Data, as its guide writes it",
    "daft": "Daft, as its guide writes it",
    "limit": "the model alone, input in memory",
}


def make_pictures(folder: Path, count: int) -> None:
    """Crops of the two photographs in ultralytics, 1280×720, mirrored, at many scales, with some noise."""
    folder.mkdir(parents=True)
    sources = [cv2.imread(str(path)) for path in photographs()]
    rng = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % 2]
        height, width = source.shape[:2]
        share = rng.uniform(0.5, 1.0)
        crop_width = int(min(width, height * 16 / 9) * share)
        crop_height = crop_width * 9 // 16
        x, y = rng.integers(0, width - crop_width + 1), rng.integers(0, height - crop_height + 1)
        crop = source[y : y + crop_height, x : x + crop_width]
        picture = cv2.resize(crop, (1280, 720), interpolation=cv2.INTER_CUBIC)[:, :: rng.choice([-1, 1])]
        picture = np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:05}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])


def copies(work: Path, sizes: Sequence[int]) -> dict[int, Path]:
    """Size → a folder of so many pictures; smaller ones have the first of the largest, which is the last size."""
    folders = {size: work / str(size) for size in sizes}
    make_pictures(folders[sizes[-1]], sizes[-1])
    for size in sizes[:-1]:
        folders[size].mkdir()
        for path in sorted(folders[sizes[-1]].iterdir())[:size]:
            shutil.copy(path, folders[size])
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of pictures")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "detect.pt")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="repeatable; all by default")
    args = measuring.arguments(parser)
    if args.quick:
        args.sizes, args.rounds = SIZES[:2], 1
    sizes = sorted(args.sizes)
    with tempfile.TemporaryDirectory() as work:
        folders = copies(Path(work), sizes)

        def command(name: str, size: int) -> list[object]:
            out = Path(work) / "out"
            shutil.rmtree(out, ignore_errors=True)
            return ["benchmarks.contenders", name, folders[size], out, args.weights, args.imgsz]

        def found(name: str, size: int) -> int | None:
            return None if name == "limit" else objects(Path(work) / "out", size)

        runs = measuring.contest(args.only or list(CONTENDERS), sizes, args.rounds, command, found)
    text = report(runs, args)
    print(text)
    if args.record:
        title = measuring.card("Pictures", args)
        measuring.record(title, text)
        draw(runs, measuring.HERE / f"{re.sub('[^a-z0-9]+', '-', title.lower())}.svg")


def objects(out: Path, rows: int) -> int:
    """Detections in a contender's results. Exits unless these are so many rows without errors."""
    ((count, good, found),) = duckdb.sql(
        f"select count(*), count(detections), sum(len(detections)) from '{out}/**/*.parquet'"
    ).fetchall()
    if (count, good) != (rows, rows):
        sys.exit(f"{out} should have {rows} rows with detections: it has {count}, and {count - good} of them without")
    return int(found)


def report(runs: measuring.Runs, args: argparse.Namespace) -> str:
    work = f"JPEGs of 1280×720, {args.weights.name} at imgsz {args.imgsz}, median of {args.rounds} alternating rounds "
    work += "(least–most), int8 calibrated in the first of them, the model alone in the precision of the defaults"
    made = measuring.table(runs, NAMES, PEERS, "pictures", bare=("limit",))
    said = measuring.conditions(work, ("ultralytics", "ray", "daft", "torch", "openvino"))
    return f"{made}\n\n{said}. {measuring.noise(runs)}\n"


def draw(runs: measuring.Runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    medians = {name: measuring.median(list(one.values())[-1], "rate") for name, one in reversed(runs.items())}
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(medians) + 0.8))
    colours = ["#1f77b4" if name.startswith("shardsight") else "#999999" for name in medians]
    bars = axes.barh([NAMES[name].replace("`", "") for name in medians], list(medians.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("pictures per second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
