"""What a user may set of an evaluation, and the job of each of its models."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from shardsight.errors import UsageError
from shardsight.settings import Options, Settings, help_of
from shardsight.sources import absolute


class Evaluation(Options):
    """Compare models on labelled pictures: how right each is, how fast, and which one to take."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True)

    data: str = Field(
        description="labelled pictures, local or in a store: COCO JSON, ultralytics' data.yaml or folder of classes, "
        "JSONL of image, prefix and suffix, VQA JSON, or RefCOCO's refs.json"
    )
    output: str = Field(description="folder or prefix for report.html, report.json, rows/*.parquet and models/")
    yolo: list[str] = Field([], description="YOLOv8 weights (.pt) or an export; repeatable")
    conf: float = Field(
        0.001, ge=0, le=1, description="least score of a detection; low, as average precision counts weak ones too"
    )
    paligemma: list[str] = Field(
        [], description="a PaliGemma 1 or 2: a folder, or its name on Hugging Face's hub; repeatable"
    )
    prompt: list[str] = Field(
        [],
        description="what PaliGemma is asked about each picture, repeatable; by default what the labels ask, or detect "
        "of all their classes",
    )
    adapter: list[str] = Field(
        [], description="folder of a LoRA adapter, repeatable: a further model over the one --paligemma"
    )
    price: float | None = Field(None, gt=0, description="of this machine per hour: adds the cost of a million pictures")
    rounds: int = Field(5, ge=0, description="rounds in which speed is measured; 0 leaves it out")
    limit: int | None = Field(None, ge=1, description="the first N pictures only")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete what is in the output and start again")
    config: str | None = Field(None, description="YAML with these names, or an earlier report.json; flags win")
    verbose: CliToggleFlag[bool] = Field(False, description="show what Ray and the models log, too")

    @field_validator("data", "output")
    @classmethod
    def _place(cls, value: str) -> str:
        return absolute(value)

    @field_validator("yolo", "adapter")
    @classmethod
    def _paths(cls, value: list[str]) -> list[str]:
        return [absolute(one) for one in value]

    @model_validator(mode="after")
    def _models(self) -> Self:
        if not (self.yolo or self.paligemma):
            raise ValueError("no model: give --yolo MODEL, --paligemma MODEL or both")
        for name in ("prompt", "revision", "adapter"):
            if getattr(self, name) and not self.paligemma:
                raise ValueError(f"--{name} needs a model to ask: give --paligemma MODEL")
        if self.adapter and len(self.paligemma) > 1:
            raise ValueError(f"--adapter belongs to one model: give one --paligemma, not {len(self.paligemma)}")
        for name in ("yolo", "paligemma", "adapter"):
            given = getattr(self, name)
            if twice := next((one for one in given if given.count(one) > 1), None):
                raise ValueError(f"--{name} {twice} is given twice: give each model once")
        return self

    def candidates(self) -> list["Candidate"]:
        """The models in the order in which they are given, YOLO first."""
        paths = [Path(path) for path in [*self.yolo, *self.paligemma, *self.adapter]]
        names = iter(unique_names(paths))
        found = [Candidate(next(names), yolo=path) for path in self.yolo]
        found += [Candidate(next(names), paligemma=path) for path in self.paligemma]
        return found + [Candidate(next(names), paligemma=self.paligemma[0], adapter=path) for path in self.adapter]

    def job(self, model: "Candidate", **more: Any) -> Settings:
        """The settings of the job of one of the models. more: settings of the job, over those that both have."""
        both = {name: getattr(self, name) for name in Options.model_fields}
        own = {"yolo": model.yolo, "paligemma": [model.paligemma] if model.paligemma else [], "adapter": model.adapter}
        out = f"{self.output.rstrip('/')}/models/{model.folder}"
        # As ultralytics' val counts boxes, so that its figures, which YOLO's authors publish, can be compared.
        alone: dict[str, Any] = {} if model.paligemma else {"prompt": [], "revision": None, "multi_label": True}
        # Whatever fails counts against the model in the report.
        rest = {"output": out, "max_error_rate": 1.0, "overwrite": self.overwrite, "verbose": self.verbose}
        return Settings(**(both | own | alone | rest | more))


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated. name: unique among them, and as short as it can be for a reader."""

    name: str
    yolo: str | None = None
    paligemma: str | None = None
    adapter: str | None = None

    @property
    def path(self) -> str:
        return self.adapter or self.yolo or self.paligemma or ""

    @property
    def folder(self) -> str:
        """The name as one of a file."""
        return re.sub(r"[^\w.+-]+", "-", self.name)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Files' names; where several are the same, with the nearest of their folders that tell them apart in front.

    a/run1/weights/best.pt and a/run2/weights/best.pt are run1/best.pt and run2/best.pt. Different names also make
    different names of files. Raises UsageError for a path given twice.
    """
    names = [path.name for path in paths]
    for name in set(names):
        same = [index for index, other in enumerate(names) if other == name]
        if len(same) == 1:
            continue
        parents = [[*reversed(paths[index].parts[:-1])] for index in same]
        for index, own in zip(same, parents, strict=True):
            others = [other for other in parents if other is not own]
            telling = (
                part
                for depth, part in enumerate(own)
                if all(depth >= len(other) or other[depth] != part for other in others)
            )
            names[index] = f"{next(telling, '/'.join(paths[index].parts[:-1]))}/{name}"
    folders = [Candidate(name).folder for name in names]
    if twice := next((index for index, folder in enumerate(folders) if folders.index(folder) < index), None):
        raise UsageError(f"{paths[folders.index(folders[twice])]} and {paths[twice]} have one name: rename one of them")
    return names


_HELP = {
    "Input and output": {
        **{"data": "PATH", "output": "PATH", "limit": "N", "storage": "KEY=VALUE", "overwrite": "", "config": "FILE"},
        **{"verbose": ""},
    },
    "YOLO": {"yolo": "PATH", "conf": "0..1", "iou": "0..1", "max_det": "N", "imgsz": "N or H,W", "batch_size": "N"},
    "PaliGemma": {
        **{"paligemma": "PATH or NAME", "adapter": "PATH", "revision": "NAME", "prompt": "TEXT", "max_tokens": "N"},
    },
    "Speed": {"precision": "auto|fp32|bf16|fp16", "scaled_decode": "", "rounds": "N", "price": "PER_HOUR"},
}
_EXAMPLES = """Examples:
  {command} --data coco/annotations.json --yolo yolov8n.pt --yolo yolov8s.pt --output evaluated
  {command} --data data.yaml --yolo best.pt --yolo best_openvino_model --price 0.40 --output evaluated
  {command} --data questions.jsonl --paligemma base --adapter lora --output s3://bucket/evaluated

The same command goes on where an interrupted one stopped. Exit codes: 0 done, 1 stopped by a fault and resumable, 2 the
request is wrong, 130 interrupted and resumable."""


def help_text(command: str) -> str:
    """What `command --help` prints."""
    usage = f"{command} --data PATH [--yolo PATH ...] [--paligemma PATH ...] --output PATH"
    return help_of(Evaluation, _HELP, usage, _EXAMPLES.format(command=command))


def command_of(configuration: dict[str, Any]) -> str:
    """The command line that repeats an evaluation, from its `record()`; defaults are left out."""
    words = ["python -m jobs.evaluate"]
    for name, field in Evaluation.model_fields.items():
        value = configuration.get(name)
        if value in (None, field.get_default(call_default_factory=True)):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            flag = f"--no-{flag[2:]}"
        pairs = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else None
        size = ",".join(map(str, value)) if name == "imgsz" and isinstance(value, list) else None
        several = pairs or ([size] if size else value if isinstance(value, list) else [value])
        words += [flag if isinstance(value, bool) else f"{flag} {shlex.quote(str(one))}" for one in several]
    return " ".join(words)
