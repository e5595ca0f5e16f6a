"""Does a sweep find more than plain training? `python -m benchmarks.sweep WORK`.

For each of three seeds: a sweep of 8 trials under ASHA, its best by the validation scenes, and one training with
ultralytics' defaults of the same length (its `optimizer=auto`). Both are measured on scenes that no trial saw. All
of it stays in WORK, so that a stopped run goes on.
"""

import argparse
import json
from pathlib import Path

import shardsight
from demo.scenes import scenes
from demo.writers import write, write_splits
from tune import yolo

SEEDS = (1, 2, 3)
TRAIN, VAL, UNSEEN = 300, 100, 300  # scenes
EPOCHS, IMGSZ, SAMPLES = 12, 160, 8
SPACE = (
    "lr0: loguniform 3e-4 1e-2\nmosaic: uniform 0 1\nscale: uniform 0 0.9\nhsv_h: uniform 0 0.1\nbox: uniform 4 12\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work: Path = parser.parse_args().work.absolute()
    unseen = work / "unseen"
    if not (unseen / "data.yaml").exists():
        write(scenes(UNSEEN, 9000), unseen, "yolo")
    (work / "space.yaml").write_text(SPACE)
    print(
        "| seed | defaults, mAP50-95 on unseen scenes | best of the sweep | its hyperparameters |\n|---|---:|---:|---|"
    )
    for seed in SEEDS:
        data = work / f"data{seed}"
        if not (data / "data.yaml").exists():
            made = [*scenes(TRAIN + VAL, seed)]
            write_splits(made[:TRAIN], made[TRAIN:], data)
        common = ["--data", f"{data}/data.yaml", "--model", "yolov8n.yaml", "--imgsz", str(IMGSZ), "--seed", str(seed)]
        common += ["--epochs", str(EPOCHS), "--train", "batch=8"]
        sweep, plain = work / f"sweep{seed}", work / f"plain{seed}"
        runs = [(plain, ["--space", "none", "--samples", "1"])]
        runs += [(sweep, ["--space", f"{work}/space.yaml", "--samples", str(SAMPLES)])]
        for out, arguments in runs:
            if code := yolo.main([*common, *arguments, "--output", str(out)]):
                raise SystemExit(code)
        models = [str(out / "best" / "best.pt") for out in (plain, sweep)]
        report = shardsight.evaluate(
            unseen / "data.yaml", output=work / f"evaluation{seed}", yolo=models, rounds=0, imgsz=IMGSZ
        )
        measured = [model["figures"]["boxes"]["measures"]["mAP50-95"] for model in report.models]
        shown = (f"{one['value']:.3f} ({one['interval'][0]:.3f}–{one['interval'][1]:.3f})" for one in measured)
        config = json.loads((sweep / "best" / "best.json").read_text())["config"]
        chosen = ", ".join(f"{name} {value:.3g}" for name, value in config.items())
        print(f"| {seed} | {' | '.join(shown)} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
