"""Frames per second of ours and of the peers on videos: `python -m benchmarks.video`.

Two tasks, as video_contenders.py describes them: boxes of every frame, and a PNG of every box. Each contender runs as a
process of its own over one clip and over all of them, and the difference gives its speed: start-up is apart.
Contenders alternate, and medians are given. Nothing else should run on the machine.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks.throughput import conditions, timed
from benchmarks.video_contenders import HEIGHT, TASKS, WIDTH
from demo.run import WEIGHTS, photographs

HERE = Path(__file__).parent
FPS = 25
NAMES = {
    "shardsight": "Shardsight, defaults",
    "shardsight_exact": "Shardsight, fp32, full decoding",
    "ultralytics": "ultralytics, one process",
    "ray_data": "Ray Data, frames by PyAV",
    "daft": "Daft, `read_video_frames`",
    "decoding": "decoding alone, PyAV on one thread",
}
Times = dict[str, list[float]]


def make_clips(folder: Path, count: int, length: int) -> None:
    """Clips of so many frames: a camera moves over the two photographs in ultralytics. H.264, 1280×720."""
    folder.mkdir(parents=True)
    sources = [cv2.imread(str(path))[..., ::-1] for path in photographs()]
    rng = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % 2]
        height, width = source.shape[:2]
        widths = np.linspace(*rng.uniform(0.5, 0.95, 2), length) * min(width, height * WIDTH / HEIGHT)
        x, y = (np.linspace(*rng.random(2), length) for _ in range(2))
        with av.open(folder / f"{number:05}.mp4", "w") as file:
            stream = file.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for w, right, down in zip(widths, x, y, strict=True):
                left, top = right * (width - w), down * (height - w * HEIGHT / WIDTH)
                view = np.array([[w / WIDTH, 0, left], [0, w / WIDTH, top]])
                flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
                picture = cv2.warpAffine(np.ascontiguousarray(source), view, (WIDTH, HEIGHT), flags=flags)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())


def seconds(task: str, name: str, folder: Path, out: Path, weights: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    return timed("benchmarks.video_contenders", task, name, folder, out, weights, printed=name == "decoding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="clips")
    parser.add_argument("--length", type=int, default=100, help="of a clip, frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "detect.pt")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="repeatable; all by default")
    parser.add_argument("--only", choices=list(NAMES), action="append", help="contenders, repeatable; all by default")
    parser.add_argument("--quick", action="store_true", help="one round over 3 clips of 25 frames, to see that it runs")
    parser.add_argument("--record", action="store_true", help="write the table beside this file")
    args = parser.parse_args()
    if args.quick:
        args.count, args.length, args.rounds = 3, 25, 1
    starts, longs = measure(args)
    table = report(starts, longs, args)
    print(table)
    if args.record:
        (HERE / "video.md").write_text(table)
        figures = {"clips": args.count, "frames of a clip": args.length, "seconds for one": starts, "for all": longs}
        (HERE / "video.json").write_text(json.dumps(figures, indent=1) + "\n")


def measure(args: argparse.Namespace) -> tuple[dict[str, Times], dict[str, Times]]:
    """Seconds of each round by task and contender: for one clip, and for all."""
    starts, longs = ({task: defaultdict(list) for task in args.task or TASKS} for _ in range(2))
    with tempfile.TemporaryDirectory() as work:
        one, all, out = Path(work) / "one", Path(work) / "all", Path(work) / "out"
        make_clips(all, args.count, args.length)
        one.mkdir()
        shutil.copy(all / "00000.mp4", one)
        runs = [(task, name) for task in starts for name in TASKS[task] if not args.only or name in args.only]
        for _ in range(args.rounds):
            for task, name in runs:
                starts[task][name].append(seconds(task, name, one, out, args.weights))
                longs[task][name].append(seconds(task, name, all, out, args.weights))
                print(f"{task}, {name}: {starts[task][name][-1]:.1f} s, {longs[task][name][-1]:.1f} s", flush=True)
    return starts, longs


def report(starts: dict[str, Times], longs: dict[str, Times], args: argparse.Namespace) -> str:
    frames = (args.count - 1) * args.length
    lines = []
    for task, times in longs.items():
        start = {name: statistics.median(runs) for name, runs in starts[task].items()}
        rates = {name: [frames / (long - start[name]) for long in runs] for name, runs in times.items()}
        peers = [statistics.median(rates[name]) for name in ("ultralytics", "ray_data", "daft") if name in rates]
        fastest = max(peers, default=float("nan"))
        lines += [f"| {task} | frames/s | spread | of the fastest peer | start-up, s |", "|---|---:|---:|---:|---:|"]
        for name, runs in rates.items():
            median, spread = statistics.median(runs), f"{min(runs):.1f}–{max(runs):.1f}"
            begun = "" if name == "decoding" else f"{start[name]:.0f}"
            lines.append(f"| {NAMES[name]} | {median:.1f} | {spread} | {median / fastest:.2f}× | {begun} |")
        lines.append("")
    work = (
        f"{args.count} clips of {args.length} frames, H.264, {WIDTH}×{HEIGHT}, YOLOv8n, "
        f"median of {args.rounds} alternating rounds; start-up includes a clip"
    )
    return "\n".join([*lines, conditions(work, ("ultralytics", "ray", "daft", "av", "torch")), ""])


if __name__ == "__main__":
    main()
