"""What SCALE.md computes with: `python -m benchmarks.scale`.

What the driver of a job spends on inputs and on the evidence of results; and the seconds of one core in which a picture
is decoded, by its kind, and in which YOLOv8 computes it, by its size. The networks have random weights, which cost the
same.
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil

from benchmarks.video import make_clips
from demo.run import photographs
from shardsight.decode import video
from shardsight.decode.pictures import decode
from shardsight.decode.video import Sampling
from shardsight.models.yolo.model import Yolo
from shardsight.results.coverage import Coverage, UnitCoverage, hashes
from shardsight.sources.listing import PAGE, Listing
from shardsight.storage import Entry, Storage

LOOSE, UNITS, RECORDS = 2_000_000, 100_000, 10_000
VERSION = f"{1:016x}"
SCALES, IMGSZ, BATCH, FRAMES = "nsmlx", 640, 4, 200


def main() -> None:
    driver()
    nodes()


def driver() -> None:
    listing = Listing([], Storage())
    spent("a loose picture, listed", LOOSE, lambda: _list(listing, LOOSE, "pictures/{:09}.jpg"))
    spent("a tar, listed", UNITS, lambda: _list(listing, UNITS, "shards/{:06}.tar"))
    footers: list[Coverage] = []
    spent("a footer of one tar", UNITS, lambda: footers.extend(map(_footer, range(UNITS))))
    began = time.perf_counter()
    Coverage.union(footers)
    print(f"their union: {time.perf_counter() - began:.1f} s; one is {len(footers[0].dumps())} bytes")
    names = np.sort(hashes(f"s3://bucket/pictures/{n:09}.jpg" for n in range(RECORDS)))
    loose = Coverage({}, names, np.ones(RECORDS, "<u8"), RECORDS)
    print(f"a footer of {RECORDS:,} loose pictures: {len(loose.dumps()):,} bytes")


def nodes() -> None:
    """Prints milliseconds of a core, and which share of the cores decoding takes of a job without GPUs."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        computed = {scale: _computing(scale, Path(folder)) for scale in SCALES}
        needed = Yolo(str(_random(SCALES[0], Path(folder))), imgsz=IMGSZ).input.needed_size
        decoded = _decoding(needed, Path(folder))
    print("| ms of a core | | " + " | ".join(f"YOLOv8{scale}" for scale in SCALES) + " |")
    print("|---|---:|" + "---:|" * len(SCALES))
    print("| computing | | " + " | ".join(f"{1000 * spent:.0f}" for spent in computed.values()) + " |")
    for name, spent in decoded.items():
        shares = " | ".join(f"{spent / (spent + model):.0%}" for model in computed.values())
        print(f"| decoding {name} | {1000 * spent:.1f} | {shares} |")


def _random(scale: str, folder: Path) -> Path:
    """A YOLOv8 of that size."""
    from ultralytics import YOLO

    path = folder / f"yolov8{scale}.pt"
    if not path.exists():
        YOLO(f"yolov8{scale}.yaml").save(path)
    return path


def _computing(scale: str, folder: Path) -> float:
    """Seconds of one core for a picture of 16:9, at the precision `auto`."""
    yolo = Yolo(str(_random(scale, folder)), imgsz=IMGSZ, threads=1)
    width, height = yolo.input.place(1280, 720).outer
    batch = np.random.default_rng(0).integers(0, 255, (BATCH, height, width, 3), np.uint8)
    return _fastest(lambda: yolo.compiled(batch)) / BATCH


def _decoding(needed: Callable[[int, int], tuple[int, int]], folder: Path) -> dict[str, float]:
    """Kind of picture → seconds of one core to decode it at the size that YOLO needs."""
    photo = cv2.imread(str(photographs()[0]))
    found = {}
    for width, height, ending in ((1280, 720, ".jpg"), (4000, 3000, ".jpg"), (1280, 720, ".png"), (4000, 3000, ".png")):
        picture = cv2.resize(photo, (width, height), interpolation=cv2.INTER_CUBIC)
        data = cv2.imencode(ending, picture)[1].tobytes()
        name = f"a {'PNG' if ending == '.png' else 'JPEG'} of {width}×{height}"
        found[name] = _fastest(lambda data=data: decode(data, needed))  # type: ignore[misc]
    make_clips(folder / "clips", 1, FRAMES)
    clip = (folder / "clips" / "00000.mp4").read_bytes()
    whole = _fastest(lambda: sum(1 for _ in video.read(io.BytesIO(clip), Sampling(), needed)))
    return found | {"a frame of 1280×720, H.264": whole / FRAMES}


def _fastest(work: Callable[[], object], times: int = 5) -> float:
    """Seconds, without the first time."""
    spent = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent[1:])


def _list(listing: Listing, count: int, name: str) -> None:
    for start in range(0, count, PAGE):
        listing._add([Entry(f"s3://bucket/{name.format(n)}", 100, VERSION) for n in range(start, start + PAGE)], None)


def _footer(number: int) -> Coverage:
    unit = UnitCoverage([(0, RECORDS)], {}, {}, RECORDS, VERSION)
    return Coverage.loads(Coverage({f"s3://bucket/shards/{number:06}.tar": unit}, rows=RECORDS).dumps())


def spent(what: str, count: int, work: Callable[[], None]) -> None:
    """Print memory and time of each of `count` things."""
    process, began = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    work()
    memory = process.memory_info().rss - before
    print(f"{what}: {memory / count:,.0f} bytes, {(time.perf_counter() - began) / count * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
