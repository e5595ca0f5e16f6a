"""Frames per second of ours and of the peers on videos: `python -m benchmarks.video`.

Tasks as video_contenders.py describes them: boxes of every frame, a PNG of every box, and the decoding alone; of one
clip and of all of them. See measuring.py. Nothing else should run on the machine.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks import measuring
from benchmarks.throughput import PEERS as DETECTORS
from benchmarks.throughput import objects
from benchmarks.video_contenders import HEIGHT, TASKS, WIDTH
from demo.run import WEIGHTS, photographs

FPS = 25
PEERS = (*DETECTORS, "ffmpeg")
NAMES = {
    "shardsight": "Shardsight, defaults",
    "shardsight_exact": "Shardsight, fp32, full decoding",
    "ultralytics": "ultralytics, one process, told to use every core",
    "ray_data": "Ray Data, frames by PyAV",
    "daft": "Daft, `read_video_frames`",
    "ffmpeg": "FFmpeg's own command",
    "decoding": "decoding alone, PyAV on one thread",
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="clips")
    parser.add_argument("--length", type=int, default=100, help="of a clip, frames")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "detect.pt")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="repeatable; all by default")
    parser.add_argument("--only", choices=list(NAMES), action="append", help="contenders, repeatable; all by default")
    args = measuring.arguments(parser)
    if args.quick:
        args.count, args.rounds = 4, 1
    with tempfile.TemporaryDirectory() as work:
        folders = {1: Path(work) / "one", args.count: Path(work) / "all"}
        make_clips(folders[args.count], args.count, args.length)
        folders[1].mkdir(exist_ok=True)
        shutil.copy(folders[args.count] / "00000.mp4", folders[1])
        for task in args.task or TASKS:

            def command(name: str, size: int, task: str = task) -> list[object]:
                out = Path(work) / "out"
                shutil.rmtree(out, ignore_errors=True)
                return ["benchmarks.video_contenders", task, name, folders[size], out, args.weights]

            def found(name: str, size: int, task: str = task) -> int | None:
                counted = task == "detect" and name != "decoding"
                return objects(Path(work) / "out", size * args.length) if counted else None

            names = [name for name in TASKS[task] if not args.only or name in args.only]
            text = report(measuring.contest(names, list(folders), args.rounds, command, found), args)
            print(text)
            if args.record:
                measuring.record(measuring.card(f"Videos, {task}", args), text)


def report(runs: measuring.Runs, args: argparse.Namespace) -> str:
    work = (
        f"clips of {args.length} frames, H.264, {WIDTH}×{HEIGHT}, YOLOv8n, "
        f"median of {args.rounds} alternating rounds (least–most); columns of seconds by the number of clips"
    )
    made = measuring.table(runs, NAMES, PEERS, "frames", bare=("decoding",))
    said = measuring.conditions(work, ("ultralytics", "ray", "daft", "av", "torch", "openvino"))
    return f"{made}\n\n{said}. {measuring.noise(runs)}\n"


if __name__ == "__main__":
    main()
