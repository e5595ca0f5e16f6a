"""Scenes with their truth as the formats that people bring: folder, tar, Parquet, COCO, YOLO, PaliGemma's JSONL."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from pycocotools import mask as rle

from demo.questions import questions, seen
from demo.scenes import KEYPOINTS, KINDS, Scene, Shape

FORMATS = ("folder", "tar", "parquet", "coco", "yolo", "paligemma")
_MASKS = Path(__file__).parent / "weights" / "paligemma" / "vae-oid.npz"
TASKS = ("detect", "segment", "classify", "pose", "obb")


def write(scenes: Iterable[Scene], out: Path, format: str, task: str = "detect") -> None:
    """Write scenes below `out`; `task` says which labels the YOLO format carries.

    folder: images/*.jpg and truth.jsonl. tar: shard-NNNNNN.tar, 100 samples each, `.jpg` and `.json`.
    parquet: scenes.parquet, `image` as {bytes, path}, and the truth as JSON. coco: images/*.jpg and
    annotations.json. yolo: images/, labels/ and data.yaml; for classify a folder a class. paligemma: images/*.jpg
    and data.jsonl, a line for each question of questions.py: `image`, `prefix`, `suffix`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if format == "yolo":
        _write_yolo(scenes, out, task)
        _write_data_yaml(out, task, "images", "images")
    else:
        {
            **{"folder": _write_folder, "tar": _write_tar, "parquet": _write_parquet, "coco": _write_coco},
            "paligemma": _write_paligemma,
        }[format](scenes, out)


def write_splits(train: Iterable[Scene], val: Iterable[Scene], out: Path, task: str = "detect") -> None:
    """Write an ultralytics data set to train on: train/, val/ and data.yaml, which names both; for classify no yaml."""
    for name, part in (("train", train), ("val", val)):
        (out / name).mkdir(parents=True, exist_ok=True)
        _write_yolo(part, out / name, task)
    _write_data_yaml(out, task, "train/images", "val/images")


def jpeg(scene: Scene) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(scene.image), quality=92, colorsubsampling="420"))


def truth(scene: Scene) -> dict[str, Any]:
    """What is in the scene, ready for JSON."""
    return {
        "shapes": [
            {
                "kind": shape.kind,
                "colour": shape.colour,
                "word": shape.word,
                "box": list(shape.box),
                "mask": coco_rle(shape.mask),
                "keypoints": {name: point.tolist() for name, point in zip(KEYPOINTS, shape.keypoints, strict=True)},
                "corners": shape.corners.tolist(),
            }
            for shape in scene.shapes
        ]
    }


def coco_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool (H, W) → {"size": [H, W], "counts": str}, COCO's compressed RLE."""
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def _write_folder(scenes: Iterable[Scene], out: Path) -> None:
    (out / "images").mkdir(exist_ok=True)
    with (out / "truth.jsonl").open("w") as lines:
        for scene in scenes:
            (out / "images" / f"{scene.name}.jpg").write_bytes(jpeg(scene))
            lines.write(json.dumps({"file": f"images/{scene.name}.jpg", **truth(scene)}) + "\n")


def _write_tar(scenes: Iterable[Scene], out: Path, per_shard: int = 100) -> None:
    for number, shard in enumerate(batched(scenes, per_shard)):
        with tarfile.open(out / f"shard-{number:06d}.tar", "w") as tar:
            for scene in shard:
                for suffix, data in (("jpg", jpeg(scene)), ("json", json.dumps(truth(scene)).encode())):
                    member = tarfile.TarInfo(f"{scene.name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def batched(scenes: Iterable[Scene], count: int) -> Iterator[list[Scene]]:
    remaining = iter(scenes)
    while batch := list(islice(remaining, count)):
        yield batch


def _write_parquet(scenes: Iterable[Scene], out: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("name", pa.string()), ("truth", pa.string())])
    with pq.ParquetWriter(out / "scenes.parquet", schema) as writer:
        for scene in scenes:
            picture = {"bytes": jpeg(scene), "path": f"{scene.name}.jpg"}
            row = {"image": picture, "name": scene.name, "truth": json.dumps(truth(scene))}
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema))


def _write_coco(scenes: Iterable[Scene], out: Path) -> None:
    (out / "images").mkdir(exist_ok=True)

    def written() -> Iterator[Scene]:
        for scene in scenes:
            (out / "images" / f"{scene.name}.jpg").write_bytes(jpeg(scene))
            yield scene

    (out / "annotations.json").write_text(json.dumps(coco(written())))


def coco(scenes: Iterable[Scene]) -> dict[str, Any]:
    """The truth as COCO's annotations; category n + 1 is KINDS[n]."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes, 1):
        height, width = scene.image.shape[:2]
        images.append({"id": index, "file_name": f"{scene.name}.jpg", "width": width, "height": height})
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": KINDS.index(shape.kind) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(shape.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": coco_rle(shape.mask),
                    "keypoints": [round(float(value), 2) for value in shape.keypoints.ravel()],
                    "num_keypoints": len(KEYPOINTS),
                    "attributes": {"colour": shape.colour, "word": shape.word},
                }
            )
    categories = [{"id": index, "name": kind, "keypoints": list(KEYPOINTS)} for index, kind in enumerate(KINDS, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_paligemma(scenes: Iterable[Scene], out: Path) -> None:
    from shardsight.models.paligemma.masks import MaskEncoder, crop  # needs torch, which nothing else here does

    encoder = MaskEncoder.load(_MASKS)
    (out / "images").mkdir(exist_ok=True)
    with (out / "data.jsonl").open("w") as lines:
        for number, scene in enumerate(scenes):
            image = f"images/{scene.name}.jpg"
            (out / image).write_bytes(jpeg(scene))
            shapes = seen(scene)
            cuts = [crop(shape.mask, shape.box) for shape in scene.shapes]
            codes = encoder.encode(np.stack([cut for cut in cuts if cut is not None]))
            rng = np.random.default_rng(number)
            for prefix, suffix in questions(shapes, list(codes), rng):
                lines.write(json.dumps({"image": image, "prefix": prefix, "suffix": suffix}) + "\n")


def _write_yolo(scenes: Iterable[Scene], out: Path, task: str) -> None:
    """Labels as ultralytics reads them: class and coordinates in 0 to 1 of the picture."""
    for scene in scenes:
        if task == "classify":
            largest = max(scene.shapes, key=lambda shape: shape.mask.sum())
            path = out / largest.kind / f"{scene.name}.jpg"
        else:
            path = out / "images" / f"{scene.name}.jpg"
            label = out / "labels" / f"{scene.name}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text("".join(_yolo_line(shape, scene, task) + "\n" for shape in scene.shapes))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(scene))


def _write_data_yaml(out: Path, task: str, train: str, val: str) -> None:
    if task != "classify":  # whose classes are folders
        names = "".join(f"  {index}: {kind}\n" for index, kind in enumerate(KINDS))
        pose = f"kpt_shape: [{len(KEYPOINTS)}, 3]\nflip_idx: [0, 1, 4, 3, 2]\n" if task == "pose" else ""
        (out / "data.yaml").write_text(f"train: {train}\nval: {val}\n{pose}names:\n{names}")


def _yolo_line(shape: Shape, scene: Scene, task: str) -> str:
    size = np.array(scene.image.shape[1::-1], np.float64)
    x1, y1, x2, y2 = shape.box
    box = np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / np.tile(size, 2)
    values: np.ndarray | list[float]
    if task == "obb":
        values = (shape.corners / size).ravel()
    elif task == "segment":
        values = (_polygon(shape.mask) / size).ravel()
    elif task == "pose":
        points = [value for x, y, seen in shape.keypoints for value in (x / size[0], y / size[1], seen)]
        values = [*box, *points]
    else:
        values = box
    return " ".join([str(KINDS.index(shape.kind)), *(f"{value:.6f}" for value in values)])


def _polygon(mask: np.ndarray) -> np.ndarray:
    """The outline of the largest visible part, (n, 2). A hole is lost: YOLO's labels have none."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(contours, key=cv2.contourArea).reshape(-1, 2) + 0.5
