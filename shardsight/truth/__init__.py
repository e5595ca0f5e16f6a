"""Labelled sets: COCO JSON, ultralytics' data.yaml and folders of classes, JSONL of questions, VQA and RefCOCO."""

import json

import yaml

from shardsight.errors import UsageError
from shardsight.sources import absolute
from shardsight.storage import Storage, StorageError, explain
from shardsight.truth.coco import is_coco, read_coco
from shardsight.truth.labels import BOXES, MISSING, OTHER_SIZE, Sample, Thing, Truth
from shardsight.truth.refs import is_refs, read_refs, refuse_pickle
from shardsight.truth.text import is_vqa, read_jsonl, read_vqa
from shardsight.truth.yolo import read_folder, read_yaml

__all__ = ["BOXES", "MISSING", "OTHER_SIZE", "Sample", "Thing", "Truth", "read"]

_KINDS = (
    "COCO JSON, ultralytics' data.yaml or folder of classes, JSONL of image, prefix and suffix, VQA JSON, or RefCOCO's "
    "refs.json"
)


def read(path: str, storage: Storage, task: str | None = None, split: str | None = None) -> Truth:
    """The labelled set at a path or uri, of the kind that its content shows. Raises UsageError.

    task: of the models, where the labels allow several. split: which to read of a set that names several; by default
    val, else test, else train.
    """
    path = absolute(path.rstrip("/"))
    refuse_pickle(path)
    try:
        if storage.is_folder(path):
            inside = f"{path}/data.yaml"
            return read(inside, storage, task, split) if storage.exists(inside) else read_folder(path, storage)
        text = storage.read(path).decode("utf-8-sig")
    except UsageError:
        raise
    except (OSError, ValueError, StorageError) as error:
        raise UsageError(f"--data {explain(path, error)}") from error
    try:
        if path.endswith((".yaml", ".yml")):
            content = yaml.safe_load(text)
            if isinstance(content, dict) and "names" in content:
                return read_yaml(path, content, storage, task, split)
        elif path.endswith(".jsonl"):
            return read_jsonl(path, text, storage)
        else:
            content = json.loads(text)
            if is_coco(content):
                return read_coco(path, content, storage, task)
            if is_vqa(content):
                return read_vqa(path, content, storage)
            if is_refs(content):
                return read_refs(path, content, storage, split)
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UsageError(f"--data {path} cannot be read as labels: {reason}") from error
    raise UsageError(f"--data {path} is no labelled set that is known: give {_KINDS}")
