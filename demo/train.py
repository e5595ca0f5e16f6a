"""Train the demo's YOLOv8 weights on made-up scenes: `python -m demo.train --work DIR`.

Each task's scenes and checkpoints stay in DIR, so that a stopped run goes on where it was. The finished
weights, in half precision, replace those in demo/weights. With `--further SEED` training starts
from the weights that are there, on scenes of that seed, at half the learning rate and for half as long.
"""

import argparse
import json
import os
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from demo.scenes import scene
from demo.writers import TASKS, write

WEIGHTS = Path(__file__).parent / "weights"
TRAIN_SEED, UNSEEN_SEED, UNSEEN = 1000, 2000, 500


@dataclass(frozen=True)
class Recipe:
    """scenes and epochs to train; width of the network, 0.25 being YOLOv8n's.

    imgsz: of training. larger: what prediction gains from on top of it, pixels, as measured.
    """

    scenes: int
    epochs: int
    imgsz: int = 320
    larger: int = 0
    width: float = 0.25

    @property
    def predict_imgsz(self) -> int:
        return self.imgsz + self.larger


RECIPES = {
    "detect": Recipe(scenes=5000, epochs=10, larger=64),  # COCO mAP50-95 at 320, 384, 448: 0.867, 0.887, 0.882
    "segment": Recipe(scenes=2000, epochs=7, width=0.125),
    "pose": Recipe(scenes=2000, epochs=7, width=0.125),
    "obb": Recipe(scenes=2000, epochs=7, width=0.125),
    "classify": Recipe(scenes=4000, epochs=12, imgsz=160, width=0.125),
}
_SUFFIX = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}


def train(task: str, work: Path, further: int | None = None) -> None:
    """Train one task's model, measure it on scenes that it never saw, and put it among the weights."""
    import torch
    import yaml
    from ultralytics import YOLO

    recipe = RECIPES[task]
    data = _data(task, recipe, work / task, TRAIN_SEED if further is None else further)
    config = work / f"yolov8n{_SUFFIX[task]}.yaml"
    config.write_text(yaml.safe_dump(_architecture(task, recipe.width)))
    last = work / "runs" / task / "weights" / "last.pt"

    torch.set_num_threads(os.cpu_count() or 1)
    model = YOLO(str(last if last.exists() else config if further is None else WEIGHTS / f"{task}.pt"))
    # Twice as fast on a CPU as fp32 in channels-first, which is what ultralytics does there.
    model.add_callback("on_pretrain_routine_end", _bf16_channels_last)
    rate, epochs = (0.002, recipe.epochs) if further is None else (0.001, recipe.epochs // 2)
    model.train(
        **{"data": str(data), "imgsz": recipe.imgsz, "epochs": epochs, "resume": last.exists()},
        **{"batch": 16, "workers": 2, "device": "cpu" if not torch.cuda.is_available() else 0, "cache": "ram"},
        **{"optimizer": "AdamW", "lr0": rate, "lrf": 0.01, "warmup_epochs": 0.5, "amp": False, "val": False},
        # Every scene is new already: no mosaic, which would cut shapes in a way that scenes never do.
        **{"mosaic": 0, "scale": 0.1, "translate": 0.05, "hsv_h": 0, "hsv_s": 0.2, "hsv_v": 0.2},
        **{"auto_augment": None, "erasing": 0, "plots": False, "seed": 0},
        **{"project": str(work / "runs"), "name": task, "exist_ok": True},
    )
    metrics = YOLO(str(last)).val(
        data=str(data), imgsz=recipe.predict_imgsz, rect=True, plots=False, device="cpu", workers=0
    )
    figures = {key: round(float(value), 4) for key, value in metrics.results_dict.items()}
    print(task, figures)
    _publish(last, task, recipe)
    path = WEIGHTS / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {task: figures}, indent=1, sort_keys=True) + "\n")


def _data(task: str, recipe: Recipe, folder: Path, seed: int) -> Path:
    done = folder / "done"
    if not done.exists():
        for part, count, start in (("train", recipe.scenes, seed), ("val", UNSEEN, UNSEEN_SEED)):
            with get_context("spawn").Pool() as pool:
                write(pool.imap(partial(scene, seed=start), range(count), chunksize=8), folder / part, "yolo", task)
        if task != "classify":
            text = (folder / "train" / "data.yaml").read_text()
            text = text.replace("train: images", "train: train/images").replace("val: images", "val: val/images")
            (folder / "data.yaml").write_text(f"path: {folder}\n{text}")
        done.touch()
    return folder if task == "classify" else folder / "data.yaml"


def _architecture(task: str, width: float) -> dict[str, Any]:
    """ultralytics' own YOLOv8 of that task, at another width."""
    import ultralytics
    import yaml

    path = Path(ultralytics.__file__).parent / "cfg" / "models" / "v8" / f"yolov8{_SUFFIX[task]}.yaml"
    architecture: dict[str, Any] = yaml.safe_load(path.read_text())
    architecture["scales"] = {"n": [0.33, width, 1024]}
    if task == "pose":
        architecture["kpt_shape"] = [5, 3]
    return architecture


def _bf16_channels_last(trainer: Any) -> None:
    import torch

    trainer.amp = torch.tensor(True)
    trainer.model = trainer.model.to(memory_format=torch.channels_last)


def _publish(checkpoint: Path, task: str, recipe: Recipe) -> None:
    """Keep what prediction needs, in half precision, without a trace of where it was trained."""
    import torch
    from ultralytics.utils import IterableSimpleNamespace

    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = (content["ema"] or content["model"]).half()
    args = {"imgsz": recipe.predict_imgsz, "task": task, "data": "demo/scenes.py", "single_cls": False}
    model.args = IterableSimpleNamespace(**args)
    model.yaml.pop("yaml_file", None)
    for name in ("criterion", "pt_path"):
        if hasattr(model, name):
            delattr(model, name)
    for parameter in model.parameters():
        parameter.requires_grad = False
    kept = {"model": model, "train_args": args, "version": content["version"], "license": "AGPL-3.0"}
    WEIGHTS.mkdir(exist_ok=True)
    torch.save(kept, WEIGHTS / f"{task}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where scenes and checkpoints go")
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable; all by default")
    parser.add_argument("--further", type=int, metavar="SEED", help="go on from the weights that are there")
    args = parser.parse_args()
    os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_CONFIG_DIR=str(args.work.resolve()))
    for task in args.task or TASKS:
        train(task, args.work.resolve(), args.further)


if __name__ == "__main__":
    main()
