"""The data set of a training as ultralytics will read it: what is there, what is wrong with it, and its hash."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shardsight.errors import UsageError
from shardsight.models.yolo.ultralytics_import import YOLO  # first: it imports ultralytics without side effects

# isort: split
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import ClassificationDataset, YOLODataset
from ultralytics.data.utils import check_cls_dataset, check_det_dataset

from shardsight.models.info import ModelError

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Data:
    """pictures: of each split. problems: what ultralytics says of a picture that it leaves out or changes, with the
    split before it. sha256: of the labels' contents, and of the pictures' names and sizes.
    """

    path: str
    names: dict[int, str]
    pictures: dict[str, int]
    problems: list[str]
    sha256: str


def inspect_model(path: str) -> str:
    """The task of weights or of an architecture by ultralytics. Raises ModelError."""
    if path.endswith(".pt") and not Path(path).exists():
        raise ModelError(
            f"there are no weights at {path}: give a .pt file, or an architecture, as yolov8n.yaml; "
            "nothing is downloaded"
        )
    if not path.endswith((".pt", ".yaml", ".yml")):
        raise ModelError(f"{path} cannot be trained: give a .pt file, or an architecture as yolov8n.yaml")
    try:
        return str(YOLO(path).task)
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded as a YOLO model: {' '.join(str(error).split())[:300]}") from error


def inspect_data(path: str, task: str) -> Data:
    """Read every label and the head of every picture, once, and leave ultralytics' cache of them for the trials.

    path: a data.yaml; for classify, a folder with a folder a class. Raises UsageError.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UsageError(
            f"there is no data set at {path}: give a data.yaml, or for classify a folder; nothing is downloaded"
        )
    if task == "classify" and not (where / "train").is_dir():  # ultralytics would copy the pictures into new folders
        raise UsageError(
            f"--data {path} has no folder `train`: for classify give a folder with train/CLASS and val/CLASS"
        )
    try:
        data = check_cls_dataset(where) if task == "classify" else check_det_dataset(str(where), autodownload=False)
        scans = {split: _scan(split, data, task) for split in _SPLITS if data.get(split)}
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        raise UsageError(f"--data {path} cannot be used to train a model for {task}: {said}") from error
    if missing := [split for split in _SPLITS if not scans.get(split) or not scans[split].pictures]:
        raise UsageError(f"--data {path} has no pictures for {missing[0]}: a training needs {' and '.join(_SPLITS)}")
    digest = hashlib.sha256(repr(sorted(data["names"].items())).encode())
    for split, scan in scans.items():
        for one in sorted(scan.pictures):
            digest.update(f"{split} {one.name} {one.stat().st_size if one.exists() else 0}\n".encode())
        for one in sorted(scan.labels):
            digest.update(one.read_bytes() if one.exists() else b"-")
    return Data(
        path=str(where.resolve()),
        names=dict(data["names"]),
        pictures={split: scan.kept for split, scan in scans.items()},
        problems=[f"{split}: {text}" for split, scan in scans.items() for text in scan.problems],
        sha256=digest.hexdigest(),
    )


@dataclass(frozen=True)
class _Scan:
    pictures: list[Path]
    labels: list[Path]
    kept: int
    problems: list[str]


class _Dataset(YOLODataset):  # type: ignore[misc]  # ultralytics has no types
    """Keeps what ultralytics says of the labels, which it otherwise logs."""

    def get_labels(self) -> list[dict[str, Any]]:
        self.all_pictures = list(self.im_files)
        labels: list[dict[str, Any]] = super().get_labels()
        return labels

    def _load_or_scan_cache(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._load_or_scan_cache(*args, **kwargs)
        self.said = list(found[0].get("msgs") or ())
        return found


def _scan(split: str, data: dict[str, Any], task: str) -> _Scan:
    if task == "classify":
        args = SimpleNamespace(**vars(get_cfg(overrides={"task": task, "imgsz": 32})))
        listed = [Path(file) for file, _ in _listed(data[split])]
        kept = ClassificationDataset(root=data[split], args=args, augment=False, prefix="")
        problems = [
            f"{file}: cannot be read" for file in sorted(set(map(str, listed)) - {one[0] for one in kept.samples})
        ]
        return _Scan(listed, [], len(kept.samples), problems)
    dataset = _Dataset(img_path=data[split], data=data, task=task, augment=False, imgsz=32, hyp=get_cfg())
    labels = [Path(one) for one in dataset.label_files]
    said = [" ".join(text.split()) for text in dataset.said]
    return _Scan([Path(one) for one in dataset.all_pictures], labels, len(dataset.labels), said)


def _listed(folder: Any) -> list[tuple[str, int]]:
    from torchvision.datasets import ImageFolder

    samples: list[tuple[str, int]] = ImageFolder(str(folder), allow_empty=True).samples
    return samples
