"""Is what tune.throughput chooses as fast and as accurate as it said? `python -m benchmarks.choice WORK`.

One search while nothing else runs, and one while another process computes all the time. Then jobs of 1,000 pictures
with each choice's best.yaml and with the defaults, alternating; and each choice's accuracy, measured by itself. All of
it stays in WORK, so that a stopped run goes on.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
import yaml

import shardsight
from demo.scenes import scenes
from demo.writers import write
from tune.throughput import command

WEIGHTS = Path(__file__).parents[1] / "demo" / "weights" / "detect.pt"
LABELLED, PICTURES, ROUNDS = 60, 1000, 3
SPACE = ("--imgsz", "288", "--format", "openvino:int8", "--decode", "scaled", "--precision", "fp32")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    running = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()


def _spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work: Path = parser.parse_args().work.absolute()
    for name, count, kind in (("labelled", LABELLED, "coco"), ("pictures", PICTURES, "folder")):
        if not (work / name).exists():
            write(scenes(count, 4000), work / name, kind)
    truth = work / "labelled" / "annotations.json"
    print(
        "| search | chosen | times as fast: it said | jobs | accuracy: it said | by itself |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for name, processes in (("quiet", 0), ("busy", 1)):
        out = work / name
        with busy(processes):
            if code := command.main(["--yolo", str(WEIGHTS), "--data", str(truth), "--output", str(out), *SPACE]):
                raise SystemExit(code)
        rows = pq.read_table(out / "trials.parquet").to_pylist()
        best = next(row for row in rows if row["best"])
        config = yaml.safe_load((out / "best.yaml").read_text())["configuration"]
        speeds = []
        for _ in range(ROUNDS):
            one, other = (
                shardsight.annotate(work / "pictures", output=work / "rows", overwrite=True, **options)
                for options in (config, {"yolo": str(WEIGHTS)})
            )
            speeds.append(other.content["seconds"] / one.content["seconds"])
        models = {key: value for key, value in config.items() if key in ("imgsz", "precision", "scaled_decode")}
        report = shardsight.evaluate(
            truth, output=work / f"{name}-evaluated", yolo=[config["yolo"]], rounds=0, overwrite=True, **models
        )
        accuracy = report.models[0]["figures"]["boxes"]["measures"]["mAP50-95"]["value"]
        said = best["pictures_per_second"] / rows[0]["pictures_per_second"]
        found = f"{median(speeds):.2f} ({', '.join(f'{speed:.2f}' for speed in speeds)})"
        print(
            f"| {name} | {best['name']} | {said:.2f} | {found} | {best['accuracy']:.4f} | {accuracy:.4f} |", flush=True
        )


if __name__ == "__main__":
    main()
