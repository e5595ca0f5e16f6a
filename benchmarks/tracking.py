"""Tracks of ours and of ultralytics against the truth of made-up clips: `python -m benchmarks.tracking`.

Each of ultralytics' trackers, with its own defaults and the demo's detector: once by `YOLO.track`, a video at a time,
and once by our job over all videos at once, at the same precision and threshold, with frames decoded in full. Both
should have the same figures.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import conditions
from demo.clips import write_clips
from demo.run import WEIGHTS
from demo.score import tracks_of
from shardsight.measures.tracks import Frame, Video, read_mot, scores

HERE = Path(__file__).parent
TRACKERS = ("botsort", "bytetrack", "tracktrack", "fasttrack", "ocsort", "deepocsort")
CONF = 0.1  # what both take where nothing is said
COLUMNS = ["HOTA", "DetA", "AssA", "MOTA", "IDF1"]


def by_ultralytics(clips: list[Path], weights: Path, tracker: str) -> dict[str, Video]:
    from ultralytics import YOLO

    found = {}
    for clip in clips:
        results = YOLO(weights).track(
            str(clip), persist=True, stream=True, tracker=f"{tracker}.yaml", conf=CONF, verbose=False
        )
        found[clip.stem] = [_frame(result.boxes) for result in results]
    return found


def _frame(boxes: Any) -> Frame:
    """A frame without tracks has boxes without ids."""
    return ([], []) if boxes.id is None else (boxes.id.int().tolist(), boxes.xyxy.tolist())


def by_job(folder: Path, out: Path, weights: Path, tracker: str) -> dict[str, Video]:
    command = [sys.executable, "-m", "jobs.annotate", folder, "--output", out, "--yolo", weights, "--track", tracker]
    done = subprocess.run(
        [*map(str, command), "--precision", "fp32", "--no-scaled-decode", "--conf", str(CONF)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the job failed:\n{done.stderr[-3000:]}")
    return tracks_of(out / "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "detect.pt")
    parser.add_argument("--tracker", choices=TRACKERS, action="append", help="repeatable; all by default")
    parser.add_argument("--without-job", action="store_true", help="ultralytics alone")
    parser.add_argument("--record", action="store_true", help="write the table beside this file")
    args = parser.parse_args()
    lines = [f"| | | {' | '.join(COLUMNS)} | id switches |", f"|---|---|{'---:|' * (len(COLUMNS) + 1)}"]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "clips"
        write_clips(args.count, args.seed, folder)
        clips = sorted(folder.glob("*.mp4"))
        for tracker in args.tracker or TRACKERS:
            found = {"ultralytics": by_ultralytics(clips, args.weights, tracker)}
            lengths = {name: len(video) for name, video in found["ultralytics"].items()}
            truth = {name: read_mot(folder / name / "gt" / "gt.txt", length) for name, length in lengths.items()}
            if not args.without_job:
                found["Shardsight"] = by_job(folder, Path(work) / tracker, args.weights, tracker)
            for name, videos in found.items():
                lines.append(_line(tracker, name, scores(truth, videos)))
                print(lines[-1], flush=True)
    work_done = f"{args.count} made-up clips of 4 to 6 s, YOLOv8n in fp32, conf {CONF}"
    table = "\n".join([*lines, "", conditions(work_done, ("ultralytics", "trackeval", "torch")), ""])
    print(table)
    if args.record:
        (HERE / "tracking.md").write_text(table)


def _line(tracker: str, name: str, figures: dict[str, float]) -> str:
    percent = " | ".join(f"{100 * figures[column]:.1f}" for column in COLUMNS)
    return f"| {tracker} | {name} | {percent} | {figures['switches']:.0f} |"


if __name__ == "__main__":
    main()
