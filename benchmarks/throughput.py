"""Pictures per second of ours and of the peers, on the same work: `make bench`.

1,000 photo-like JPEGs of 1280×720 → YOLOv8n → Parquet. Each contender runs as a process of its own over a
few pictures and over all of them, and the difference gives its speed: start-up is apart. Contenders alternate,
and medians are given. Nothing else should run on the machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from benchmarks.contenders import CONTENDERS
from demo.run import WEIGHTS, photographs

HERE = Path(__file__).parent
FEW = 16
NAMES = {
    "shardsight": "Shardsight, defaults",
    "shardsight_exact": "Shardsight, fp32, full decoding",
    "ultralytics": "ultralytics `predict(stream=True)`",
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


def seconds(name: str, folder: Path, out: Path, weights: Path, imgsz: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    return timed("benchmarks.contenders", name, folder, out, weights, imgsz, printed=name == "limit")


def timed(module: str, *arguments: object, printed: bool) -> float:
    """Seconds that a contender takes as a process of its own, or with `printed` those that it says itself."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    spent = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.split()[-1]) if printed else spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "detect.pt")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="repeatable; all by default")
    parser.add_argument("--record", action="store_true", help="write the table and the picture beside this file")
    args = parser.parse_args()
    starts: dict[str, list[float]] = defaultdict(list)
    longs: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as work:
        few, all, out = Path(work) / "few", Path(work) / "all", Path(work) / "out"
        make_pictures(all, args.count)
        few.mkdir()
        for path in sorted(all.iterdir())[:FEW]:
            shutil.copy(path, few)
        names = args.only or list(CONTENDERS)
        for _ in range(args.rounds):
            for name in names:
                starts[name].append(seconds(name, few, out, args.weights, args.imgsz))
                longs[name].append(seconds(name, all, out, args.weights, args.imgsz))
                print(f"{name}: {starts[name][-1]:.1f} s for {FEW}, {longs[name][-1]:.1f} s for all", flush=True)
    table = report(starts, longs, args)
    print(table)
    if args.record:
        (HERE / "throughput.md").write_text(table)
        figures = {"pictures": args.count, "few": FEW, "seconds for few": starts, "seconds for all": longs}
        (HERE / "throughput.json").write_text(json.dumps(figures, indent=1) + "\n")
        draw({name: statistics.median(runs) for name, runs in rates(starts, longs, args.count).items()})


def rates(starts: dict[str, list[float]], longs: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    """Pictures per second of each round, beyond what a contender's start takes, which is its median over the rounds."""
    return {
        name: [(count - FEW) / (long - statistics.median(starts[name])) for long in runs]
        for name, runs in longs.items()
    }


def report(starts: dict[str, list[float]], longs: dict[str, list[float]], args: argparse.Namespace) -> str:
    speeds = rates(starts, longs, args.count)
    peers = [statistics.median(speeds[name]) for name in ("ultralytics", "ray_data", "daft") if name in speeds]
    fastest = max(peers, default=float("nan"))
    lines = ["| | pictures/s | spread | of the fastest peer | start-up, s |", "|---|---:|---:|---:|---:|"]
    for name, runs in speeds.items():
        median = statistics.median(runs)
        start = "" if name == "limit" else f"{statistics.median(starts[name]):.0f}"
        spread = f"{min(runs):.1f}–{max(runs):.1f}"
        lines.append(f"| {NAMES[name]} | {median:.1f} | {spread} | {median / fastest:.2f}× | {start} |")
    work = (
        f"{args.count:,} JPEGs of 1280×720, YOLOv8n at imgsz {args.imgsz}, median of {args.rounds} alternating rounds"
    )
    return "\n".join([*lines, "", conditions(work, ("ultralytics", "ray", "daft", "torch")), ""])


def conditions(work: str, packages: Sequence[str]) -> str:
    """What a table was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{datetime.now(UTC):%Y-%m-%d}, {cpu}, {os.cpu_count()} cores, no GPU; {work}; {versions}"


def draw(medians: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(medians) + 0.8))
    names = list(reversed(medians))
    colours = ["#1f77b4" if name.startswith("shardsight") else "#999999" for name in names]
    bars = axes.barh([NAMES[name].replace("`", "") for name in names], [medians[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("pictures per second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "throughput.svg")


if __name__ == "__main__":
    main()
