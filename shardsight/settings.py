"""What a user may set: flags, YAML and checks from one declaration."""

import argparse
import os
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    CliSettingsSource,
    CliToggleFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from shardsight.errors import UsageError
from shardsight.models.paligemma.prompts import Prompt
from shardsight.models.yolo.trackers import TRACKERS, tracker_settings
from shardsight.sources import absolute
from shardsight.storage import OPTIONS

# Settings that change no row: another value goes on with the same output.
_FREE = {
    "output", "batch_size", "yolo_actors", "paligemma_actors", "gpus_per_actor", "label_selector", "rows_per_file",
    "storage", "overwrite", "retry_errors", "max_error_rate", "config", "verbose",
}  # fmt: skip
# Settings that change rows only where there is such a model, or where there are several PaliGemmas.
_OF_YOLO = {"conf", "iou", "max_det", "classes", "imgsz", "multi_label", "track", "track_config", "crops"}
_OF_PALIGEMMA = {"revision", "adapter", "prompt", "prompt_column", "on", "max_tokens", "clip_frames", "clip_seconds"}
_OF_SEVERAL = {"resolution", "small_box", "lost_detail"}
SECRET = ("account_key", "client_secret", "connection_string", "key", "sas_token", "secret", "token")
_KEYS = "; ".join(f"{', '.join(keys)} for {scheme}://" for scheme, keys in OPTIONS.items())
Class = Annotated[int, Field(ge=0, lt=2**31)]
Request = TypeVar("Request", bound=BaseSettings)


class Declared(BaseSettings):
    """Settings that come from flags and YAML alone, `storage` among them where they are recorded."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # no environment: a variable named OUTPUT must not move anybody's results

    def record(self) -> dict[str, Any]:
        """Every setting, for job.json and its like; secrets are left out."""
        values = self.model_dump(exclude={"overwrite", "retry_errors", "config", "verbose"})
        values["storage"] = {name: value for name, value in values["storage"].items() if name not in SECRET}
        return values


class Options(Declared):
    """Settings of job, service and evaluation alike: how models process a picture."""

    model_config = SettingsConfigDict(extra="forbid")

    conf: float | None = Field(
        None, ge=0, le=1, description="least score of a detection; 0.25, or 0.1 with --track, as in ultralytics"
    )
    iou: float = Field(0.7, ge=0, le=1, description="overlap above which the weaker of two detections is dropped")
    max_det: int = Field(300, ge=1, description="most detections of a picture")
    imgsz: int | list[int] | None = Field(None, description="input size, N or HEIGHT,WIDTH; the model's own by default")
    paligemma: list[str] = Field(
        [],
        description="a PaliGemma 1 or 2: a folder, local or in a store, or its name on Hugging Face's hub; repeat it "
        "for other resolutions",
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    prompt: list[str] = Field(
        [],
        description="what PaliGemma is asked, repeatable: 'caption en' (by default), 'ocr', 'answer en QUESTION', "
        "'detect a ; b', 'segment a'",
    )
    max_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    scaled_decode: CliImplicitFlag[bool] = Field(
        True, description="decode JPEGs and videos no larger than the models need"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto",
        description="auto is fp16 on CUDA, bf16 on a CPU that computes in it, else fp32; int8, of a YOLO on CPUs, is "
        "calibrated on some of the input; exports have their own",
    )
    batch_size: int | None = Field(None, ge=1, description="pictures that YOLO takes at once; 64 on a GPU, else 16")
    storage: dict[str, str] = Field({}, description=f"of the object store, repeatable: {_KEYS}")

    @field_validator("paligemma")
    @classmethod
    def _paligemma(cls, value: list[str]) -> list[str]:
        """Folders, or names on the hub as they are."""
        return [absolute(one) if os.path.exists(os.path.expanduser(one)) else one for one in value]

    @field_validator("classes", "imgsz", mode="before", check_fields=False)
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """`0,2`, `[0, 2]` and a repeated flag are lists; one number for imgsz is a number."""
        if value is None or isinstance(value, int):
            return value
        return [part for entry in (value if isinstance(value, list) else [value]) for part in _split(entry)]

    @field_validator("imgsz")
    @classmethod
    def _imgsz(cls, value: int | list[int] | None) -> int | list[int] | None:
        sides = value if isinstance(value, list) else [value or 640]
        if len(sides) not in (1, 2) or any(side < 32 for side in sides):
            raise ValueError("expected N or HEIGHT,WIDTH, of at least 32 pixels")
        return value if value is None else sides[0] if len(sides) == 1 else sides

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not any(name in keys for keys in OPTIONS.values()):
                raise ValueError(f"unknown key {name}: choose from {_KEYS}")
        return value

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: list[str]) -> list[str]:
        return [Prompt.of(text).text for text in value]


class Models(Options):
    """Settings of the job and the service alike: the models, and how they process pictures and videos."""

    yolo: str | None = Field(
        None, description="YOLOv8 weights (.pt), or an export: .onnx, _openvino_model/, .engine, …; local or in a store"
    )
    classes: list[Class] | None = Field(None, description="class ids to keep, as 0,2,5; all by default")
    resolution: str = Field(
        "auto",
        description="of several --paligemma: auto asks the lowest in which nothing is small, N the one of N pixels",
    )
    small_box: float = Field(
        16, ge=0, description="auto: a picture with a box of fewer pixels of the model's input goes to a larger model"
    )
    lost_detail: float = Field(
        0.08, ge=0, le=1, description="auto: a picture that loses more contrast than this goes to a larger model"
    )
    adapter: str | None = Field(None, description="folder of a LoRA adapter, as peft saves it")
    on: Literal["image", "regions"] = Field(
        "image", description="PaliGemma sees the whole picture, or the crop of each of YOLO's detections"
    )
    clip_frames: int | None = Field(
        None, ge=2, description="PaliGemma is asked about so many frames of a video together, of each --clip-seconds"
    )
    clip_seconds: float | None = Field(None, gt=0, description="length of a clip, see --clip-frames")
    fps: float | None = Field(None, gt=0, description="frames per second of a video; all of its frames by default")
    every: int | None = Field(None, ge=1, description="each Nth frame of a video")
    keyframes: CliToggleFlag[bool] = Field(False, description="the keyframes of a video")
    track: str | None = Field(
        None, description=f"keep identities through a video: {', '.join(TRACKERS)}; botsort if none is named"
    )
    track_config: str | dict[str, Any] | None = Field(
        None, description="YAML with settings of the tracker, as ultralytics has it"
    )

    @field_validator("yolo", "adapter")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        """Absolute, so that job.json can be used from any folder."""
        return value and absolute(value)

    @field_validator("resolution")
    @classmethod
    def _resolution(cls, value: str) -> str:
        if value != "auto" and not value.isdecimal():
            raise ValueError("expected auto or a number of pixels")
        return value


class Settings(Models):
    """Annotate pictures with YOLOv8, PaliGemma or both, and write Parquet, each input exactly once."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True)

    inputs: CliPositionalArg[list[str]] = Field(
        [],
        description="files, folders, globs or prefixes, local or s3://, gs://, az://: pictures, videos, .tar "
        "(WebDataset), .parquet with encoded pictures or videos, or .txt, .csv, .jsonl lists of paths and uris",
    )
    output: str = Field(description="folder or prefix for results/*.parquet and job.json")
    multi_label: CliToggleFlag[bool] = Field(
        False,
        description="a box is a detection for each of its classes above --conf, not only the best, as in ultralytics' "
        "val",
    )
    yolo_actors: str | None = Field(None, description="processes that compute YOLO; sized to the cluster by default")
    paligemma_actors: str | None = Field(None, description="the same for PaliGemma")
    gpus_per_actor: float | None = Field(None, ge=0, description="1 where there are GPUs; less lets actors share one")
    label_selector: dict[str, str] = Field(
        {}, description="the nodes that a job's processes may run on, by their labels in Ray, repeatable"
    )
    rows_per_file: int = Field(10_000, ge=1, description="most rows of a results file")
    prompt_column: str | None = Field(
        None, description="column of Parquet with a text, or a list of them, that each row's picture is asked about"
    )
    image_column: str | None = Field(None, description="column of encoded pictures in Parquet; found by default")
    uri_column: str | None = Field(None, description="column of paths or uris, in Parquet and in .csv or .jsonl lists")
    keep_images: CliToggleFlag[bool] = Field(
        False, description="store the encoded pictures with their rows; a JPEG of a video's frame"
    )
    crops: CliToggleFlag[bool] = Field(
        False, description="store a JPEG of each of YOLO's detections, cut out of the picture in full"
    )
    limit: int | None = Field(None, ge=1, description="the first N inputs only")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete what is in the output and start again")
    retry_errors: CliToggleFlag[bool] = Field(False, description="run the inputs again that failed")
    max_error_rate: float = Field(0.1, ge=0, le=1, description="share of rows with errors above which the job exits 3")
    config: str | None = Field(None, description="YAML with these names, or an earlier job.json; flags win")
    verbose: CliToggleFlag[bool] = Field(False, description="show what Ray and the models log, too")

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        return absolute(value)

    @field_validator("yolo_actors", "paligemma_actors")
    @classmethod
    def _actors(cls, value: str | None) -> str | None:
        if value is not None:
            low, _, high = value.partition(":")
            if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
                raise ValueError("expected N or MIN:MAX, as 1:4")
        return value

    @model_validator(mode="after")
    def _a_model(self) -> Self:
        if not self.inputs:
            raise ValueError("no input: give files, folders, globs or prefixes")
        for name in ("prompt", "prompt_column", "revision", "adapter"):
            if getattr(self, name) and not self.paligemma:
                raise ValueError(f"--{name.replace('_', '-')} needs a model to ask: give --paligemma MODEL")
        if not (self.yolo or self.paligemma):
            raise ValueError("no model: give --yolo MODEL, --paligemma MODEL or both")
        if self.on == "regions" and not (self.yolo and self.paligemma):
            raise ValueError("--on regions asks PaliGemma about YOLO's detections: give both --yolo and --paligemma")
        if self.crops and not self.yolo:
            raise ValueError("--crops stores what YOLO detects: give --yolo MODEL")
        self._check_video()
        if self.adapter and len(self.paligemma) > 1:
            raise ValueError(f"--adapter belongs to one model: give one --paligemma, not {len(self.paligemma)}")
        if self.on == "regions" and self.prompt_column:
            raise ValueError("--on regions takes its prompt from --prompt: leave --prompt-column out")
        if self.on == "regions" and len(self.prompt) > 1:
            raise ValueError(f"--on regions takes one --prompt, as a detection has one text, not {len(self.prompt)}")
        if self.paligemma and not self.prompt:
            self.prompt = ["caption en"]
        return self

    def _check_video(self) -> None:
        """Of videos: raises ValueError, UsageError."""
        if sum(bool(one) for one in (self.fps, self.every, self.keyframes)) > 1:
            raise ValueError("--fps, --every and --keyframes each say which frames of a video: give one of them")
        if self.track_config and not self.track:
            raise ValueError("--track-config is of a tracker: give --track, too")
        if self.track:
            if not self.yolo:
                raise ValueError("--track follows what YOLO detects: give --yolo MODEL")
            if self.multi_label:
                raise ValueError("--multi-label gives a box several classes, and --track one identity: leave one out")
            # In full, so that job.json says which they were, and a changed file refuses the resumption.
            self.track_config = tracker_settings(self.track, self.track_config)
        if self.conf is None:
            self.conf = 0.1 if self.track else 0.25
        if (self.clip_frames is None) != (self.clip_seconds is None):
            raise ValueError("--clip-frames and --clip-seconds say together what a clip is: give both")
        if self.clip_frames:
            if not self.paligemma:
                raise ValueError("--clip-frames asks PaliGemma about a video: give --paligemma MODEL")
            if self.track or self.on == "regions" or len(self.paligemma) > 1:
                raise ValueError("--clip-frames goes with one --paligemma, and neither with --track nor --on regions")

    def changed(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Of settings that decide what this job's rows say, those that an earlier job recorded otherwise: (old, new).

        before: its `record()`. What it lacks, as the version before had no such setting, had today's default.
        """
        free = set(_FREE)
        free |= set() if self.yolo else _OF_YOLO
        free |= set() if self.paligemma else _OF_PALIGEMMA
        free |= set() if len(self.paligemma) > 1 else _OF_SEVERAL
        pairs = {
            name: (before.get(name, type(self).model_fields[name].get_default(call_default_factory=True)), value)
            for name, value in self.record().items()
            if name not in free
        }
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _split(entry: Any) -> list[str]:
    return [part for part in str(entry).strip("[] ").replace(" ", "").split(",") if part]


def parse(arguments: list[str]) -> Settings:
    """Command line, over `--config`, over defaults. Raises UsageError."""
    return parse_as(Settings, arguments)


def parse_as(kind: type[Request], arguments: list[str]) -> Request:
    """The settings of any command, likewise."""
    verbatim: dict[str, list[str]] = {}

    def parse_args(parser: Any, arguments: list[str]) -> Any:
        """Inputs before, between and after flags; and word for word, as pydantic-settings splits at commas."""
        parsed = parser.parse_intermixed_args(arguments)
        for name in _texts(kind):
            value = vars(parsed).pop(name, None)
            if isinstance(value, list) and value:
                verbatim[name] = value
        return parsed

    for index, argument in enumerate(arguments):
        if argument == "--track" and (index + 1 == len(arguments) or arguments[index + 1].startswith("--")):
            arguments = [*arguments[: index + 1], "botsort", *arguments[index + 1 :]]
    try:
        values = _config(arguments)
        source: Any = CliSettingsSource(
            kind, cli_parse_args=arguments, cli_exit_on_error=False, parse_args_method=parse_args
        )
        given: dict[str, Any] = {"_cli_settings_source": source, **values, **verbatim}
        return kind(**given)
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    except SettingsError as error:
        raise UsageError(f"{str(error).removeprefix('error parsing CLI: ')}; see --help") from None


def settings(**options: Any) -> Settings:
    """The settings of a job as a program names them. Raises UsageError."""
    return settings_as(Settings, **options)


def settings_as(kind: type[Request], **options: Any) -> Request:
    """The settings of any command, likewise."""
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, os.PathLike) else value for name, value in options.items()
    }
    for name in _texts(kind) & given.keys():
        value = given[name]
        given[name] = [value] if isinstance(value, str) else [str(one) for one in value]
    try:
        return kind(**given)
    except ValidationError as error:
        raise UsageError(_sentence(error, flag="")) from None


def _texts(kind: type[BaseSettings]) -> set[str]:
    """The settings that are lists of texts, which may hold commas."""
    return {name for name, field in kind.model_fields.items() if field.annotation == list[str]}


def _config(arguments: list[str]) -> dict[str, Any]:
    """What the file that `--config` names says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see --help") from None
    if path is None:
        return {}
    content = read_yaml("--config", path, "holds no settings: write NAME: VALUE, one a line")
    content = content.get("configuration", content)  # an earlier job.json
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def read_yaml(flag: str, path: str, empty: str, instead: str = "") -> dict[Any, Any]:
    """A YAML file of names and values. empty: what is said of one that has none; instead: what else may be given.

    Raises UsageError.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{flag} {path} does not exist: check the name{instead}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{flag} {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{flag} {path} {empty}")
    return content


def _sentence(error: ValidationError, flag: str = "--") -> str:
    """The first thing that is wrong, as one sentence. flag: what stands before a setting's name."""
    first = error.errors()[0]
    place = str(first["loc"][0]) if first["loc"] else ""
    name = "INPUT" if place == "inputs" else f"{flag}{place.replace('_', '-') if flag else place}"
    message = first["msg"].removeprefix("Value error, ")
    help = "; see --help" if flag else ""
    if first["type"] == "missing":
        return f"{name} is missing{help}"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {place}{help}"
    given = "" if not place or first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{name}: {message[0].lower() + message[1:]}{given}" if place else message


# What --help says of the settings: group → name → what stands for its value.
_HELP = {
    "Input and output": {
        **{"inputs": "INPUT...", "output": "PATH", "limit": "N", "image_column": "NAME", "uri_column": "NAME"},
        **{"keep_images": "", "crops": "", "rows_per_file": "N", "storage": "KEY=VALUE"},
    },
    "YOLO": {
        **{"yolo": "PATH", "conf": "0..1", "iou": "0..1", "max_det": "N", "classes": "N,N,...", "imgsz": "N or H,W"},
        **{"multi_label": "", "batch_size": "N"},
    },
    "PaliGemma": {
        **{"paligemma": "PATH or NAME", "prompt": "TEXT", "on": "image|regions", "max_tokens": "N", "adapter": "PATH"},
        **{"prompt_column": "NAME"},
        **{"revision": "NAME", "resolution": "auto|N", "small_box": "PIXELS", "lost_detail": "0..1"},
    },
    "Video": {
        **{"fps": "F", "every": "N", "keyframes": "", "track": "NAME", "track_config": "FILE"},
        **{"clip_frames": "N", "clip_seconds": "S"},
    },
    "Speed": {
        **{"precision": "auto|fp32|bf16|fp16|int8", "scaled_decode": "", "yolo_actors": "MIN:MAX"},
        **{"paligemma_actors": "MIN:MAX", "gpus_per_actor": "F", "label_selector": "KEY=VALUE"},
    },
    "The job": {
        **{"config": "FILE", "overwrite": "", "retry_errors": "", "max_error_rate": "0..1", "verbose": ""},
    },
}
_EXAMPLES = """Examples:
  {command} pictures/ --output out --yolo yolov8n.pt
  {command} 's3://bucket/shards/*.tar' --output s3://bucket/out --yolo best.pt --conf 0.4 --classes 0,2
  {command} pictures/ --output out --paligemma google/paligemma2-3b-mix-448 --prompt 'detect cat ; dog'
  {command} clips/ --output out --yolo yolov8n.pt --track botsort
  {command} --config out/job.json --retry-errors

The same command goes on where an interrupted one stopped. Exit codes: 0 done, 1 stopped by a fault and resumable, 2 the
request is wrong, 3 done with more errors than --max-error-rate, 130 interrupted and resumable."""


def help_text(command: str) -> str:
    """What `command --help` prints."""
    usage = f"{command} INPUT... --output PATH [--yolo PATH] [--paligemma PATH --prompt TEXT]"
    return help_of(Settings, _HELP, usage, _EXAMPLES.format(command=command))


def help_of(kind: type[BaseSettings], groups: dict[str, dict[str, str]], usage: str, end: str, width: int = 100) -> str:
    """The help of a command with the settings `kind`. groups: as _HELP. end: stands after them."""
    lines = [f"Usage: {usage}", "", *textwrap.wrap(kind.__doc__ or "", width), ""]
    indent = " " * 30
    for group, names in groups.items():
        lines.append(f"{group}:")
        for name, value in names.items():
            field = kind.model_fields[name]
            default = field.get_default(call_default_factory=True) if not field.is_required() else None
            flag = "--" + name.replace("_", "-")
            if default is True:
                flag = f"{flag}, --no-{flag[2:]}"
            said = field.description or ""
            if isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != "auto":
                said += f"; {default:,}" if isinstance(default, int) else f"; {default}"
            left = f"  {value if name == 'inputs' else f'{flag} {value}'.rstrip()}"
            text = textwrap.wrap(said, width - len(indent))
            lines += [left] if len(left) >= len(indent) - 1 else [f"{left:{len(indent)}}{text.pop(0)}"]
            lines += [indent + line for line in text]
        lines.append("")
    return "\n".join([*lines, end])
