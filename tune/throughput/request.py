"""What a user may set of a search for throughput."""

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from shardsight.models.yolo.formats import FORMATS
from shardsight.settings import Declared, help_of
from shardsight.sources import absolute

FEWEST_ROUNDS = 10  # with which choice.is_faster can say so: 2 ** -10 < SIGNIFICANT


class Settings(Declared):
    """Find the fastest configuration that is as accurate as the first --yolo with the defaults of jobs.annotate."""

    model_config = SettingsConfigDict(extra="forbid", cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True)

    yolo: list[str] = Field(min_length=1, description="YOLOv8 weights (.pt) or an export; repeatable, the usual first")
    data: str = Field(description="labelled pictures, as for jobs.evaluate")
    output: str = Field(description="folder or prefix for best.yaml, trials.parquet, report.html, exports, accuracy")
    within: float = Field(0.3, ge=0, description="points of the main measure that the choice may lose")
    format: list[str] = Field(
        [],
        description="exports to try, as openvino:int8,onnx; pytorch tries none; by default openvino:int8 and onnx, on "
        "a GPU engine:fp16 and onnx:fp16, of what this machine can export",
    )
    imgsz: list[int] = Field([], description="input sizes; by default the model's own, three quarters and half of it")
    precision: list[Literal["fp32", "bf16", "fp16"]] = Field(
        [], description="of the weights themselves; by default auto and fp32"
    )
    decode: list[Literal["scaled", "full"]] = Field(
        [], description="as --scaled-decode and --no-scaled-decode of jobs.annotate; both by default"
    )
    batch_size: list[int] = Field([], description="pictures at once; by default half, twice and four times the usual")
    actors: list[int] = Field([], description="processes that compute; by default those next to the usual that fit")
    limit: int | None = Field(None, ge=1, description="the first N pictures only")
    rounds: int = Field(
        16, ge=FEWEST_ROUNDS, description="in which a finalist and the fastest so far are timed, alternating"
    )
    seconds: float = Field(2.0, gt=0, description="of a round")
    storage: dict[str, str] = Field({}, description="of an object store, as for jobs.annotate")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete the search in the output and start again")
    config: str | None = Field(None, description="YAML with these names, or an earlier sweep.json; flags win")
    verbose: CliToggleFlag[bool] = Field(False, description="show what Ray logs, too")

    @field_validator("data", "output")
    @classmethod
    def _place(cls, value: str) -> str:
        return absolute(value.rstrip("/"))

    @field_validator("yolo")
    @classmethod
    def _yolo(cls, value: list[str]) -> list[str]:
        found = [absolute(one) for one in value]
        if twice := next((one for one in found if found.count(one) > 1), None):
            raise ValueError(f"{twice} is given twice: give each model once")
        return found

    @field_validator("format")
    @classmethod
    def _format(cls, value: list[str]) -> list[str]:
        """Each as NAME:PRECISION."""
        found = []
        for name, _, precision in (text.partition(":") for one in value for text in one.split(",")):
            if name == "pytorch" and not precision:
                found.append(name)
                continue
            if name not in FORMATS:
                raise ValueError(f"there is no {name}: choose from pytorch, {', '.join(FORMATS)}")
            precision = precision or FORMATS[name].precisions[0]
            if precision not in FORMATS[name].precisions:
                raise ValueError(f"{name} has no {precision}: choose from {', '.join(FORMATS[name].precisions)}")
            found.append(f"{name}:{precision}")
        return found

    @field_validator("imgsz", "batch_size", "actors")
    @classmethod
    def _numbers(cls, value: list[int], info: Any) -> list[int]:
        least = 32 if info.field_name == "imgsz" else 1
        if value and min(value) < least:
            raise ValueError(f"expected {least} or more, not {min(value)}")
        return sorted(set(value))


# What another run may have otherwise, and go on with the same search.
FREE = {"output", "storage", "within", "rounds"}
_HELP = {
    "Models and data": {"yolo": "PATH", "data": "PATH", "output": "PATH", "limit": "N", "storage": "KEY=VALUE"},
    "What is tried": {
        **{"format": "NAME[:PRECISION],...", "imgsz": "N,...", "precision": "fp32,bf16,fp16", "decode": "scaled,full"},
        **{"batch_size": "N,...", "actors": "N,..."},
    },
    "The choice": {"within": "POINTS", "rounds": "N", "seconds": "S"},
    "The search": {"config": "FILE", "overwrite": "", "verbose": ""},
}
_EXAMPLES = """Examples:
  {command} --yolo best.pt --data data.yaml --output fast
  {command} --yolo yolov8s.pt --yolo yolov8n.pt --data coco.json --output fast --imgsz 480,640
  python -m jobs.annotate pictures/ --output out --config fast/best.yaml
  serve run fast/best.yaml

Timed is what a job does from encoded bytes to rows, without reading and writing. What is not 5 % faster than the
defaults beyond doubt, in rounds that alternate, is not chosen. The same command goes on where an interrupted one
stopped; another --within chooses anew from what is measured. Exit codes: 0 done, 1 stopped by a fault and resumable,
2 the request is wrong, 130 interrupted and resumable."""


def help_text(command: str) -> str:
    """What `command --help` prints."""
    usage = f"{command} --yolo PATH [--yolo PATH ...] --data PATH --output PATH"
    return help_of(Settings, _HELP, usage, _EXAMPLES.format(command=command))
