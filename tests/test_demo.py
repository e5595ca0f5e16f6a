"""Scenes: the same for the same seed, and their truth is true."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO

from demo.scenes import COLOURS, KINDS, Scene, scene, scenes
from demo.writers import FORMATS, TASKS, write


def test_same_seed_same_scene() -> None:
    assert (scene(3, 9).image == scene(3, 9).image).all()
    assert scene(3, 9).image.shape != scene(4, 9).image.shape or (scene(3, 9).image != scene(4, 9).image).any()


def test_truth(some_scenes: list[Scene]) -> None:
    """Boxes, masks, points and colours say what is in the picture."""
    kinds, colours, sizes, overlaps = set(), set(), [], 0
    for one in some_scenes:
        height, width = one.image.shape[:2]
        assert 1 <= len(one.shapes) <= 8
        assert not np.any(np.sum([shape.mask for shape in one.shapes], 0) > 1)
        for shape in one.shapes:
            kinds.add(shape.kind)
            colours.add(shape.colour)
            x1, y1, x2, y2 = shape.box
            sizes.append(max(x2 - x1, y2 - y1))
            assert shape.mask[y1:y2, x1:x2].sum() == shape.mask.sum() > 0
            assert shape.mask[y1].any() and shape.mask[y2 - 1].any() and shape.mask[:, x1].any()
            assert (shape.corners >= 0).all() and (shape.corners <= (width + 1, height + 1)).all()
            assert shape.keypoints.shape == (5, 3) and set(shape.keypoints[:, 2]) <= {1, 2}
            overlaps += (shape.keypoints[:, 2] == 1).any()
            middle = np.median(one.image[shape.mask], 0)
            nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - middle).sum())
            assert nearest == shape.colour
    assert kinds == set(KINDS) and colours == set(COLOURS)
    assert min(sizes) < 40 and max(sizes) > 200 and overlaps > 10
    assert sum(shape.word is not None for one in some_scenes for shape in one.shapes) > 20


@pytest.mark.parametrize("format", FORMATS)
def test_writers(format: str, tmp_path: Path) -> None:
    made = list(scenes(3, 5))
    write(made, tmp_path, format)
    if format == "tar":
        with tarfile.open(tmp_path / "shard-000000.tar") as tar:
            names = tar.getnames()
        assert names == [f"{one.name}.{suffix}" for one in made for suffix in ("jpg", "json")]
    elif format == "parquet":
        rows = pq.read_table(tmp_path / "scenes.parquet").to_pylist()
        assert [row["image"]["path"] for row in rows] == [f"{one.name}.jpg" for one in made]
        assert len(json.loads(rows[0]["truth"])["shapes"]) == len(made[0].shapes)
    else:
        assert sorted(path.stem for path in (tmp_path / "images").iterdir()) == [one.name for one in made]
    if format == "paligemma":
        lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
        assert len(lines) == 6 * len(made) and all((tmp_path / line["image"]).exists() for line in lines)
        masks = [line["suffix"] for line in lines if line["prefix"].startswith("segment")]
        assert len(masks) == len(made) and all(mask.count("<seg") % 16 == 0 < mask.count("<seg") for mask in masks)
    if format == "coco":
        assert len(COCO(tmp_path / "annotations.json").anns) == sum(len(one.shapes) for one in made)


@pytest.mark.parametrize("task", TASKS)
def test_yolo_labels_are_read_by_ultralytics(task: str, tmp_path: Path) -> None:
    made = list(scenes(4, 6))
    write(made, tmp_path, "yolo", task)
    if task == "classify":
        assert len(list(tmp_path.glob("*/*.jpg"))) == 4
        return
    from ultralytics.data.utils import check_det_dataset, verify_image_label

    data = check_det_dataset(tmp_path / "data.yaml")
    points = data.get("kpt_shape", (0, 0))
    for one in made:
        files = tmp_path / "images" / f"{one.name}.jpg", tmp_path / "labels" / f"{one.name}.txt"
        found = verify_image_label((*map(str, files), "", task == "pose", 6, *points, False))
        assert found[5:9] == [0, 1, 0, 0] or found[5:9] == (0, 1, 0, 0), found[5:]
        assert len(found[1]) == len(one.shapes)
