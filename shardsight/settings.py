"""What a user may set: flags, YAML and checks from one declaration."""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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

from shardsight.models.paligemma.prompts import Prompt
from shardsight.sources import absolute
from shardsight.storage import OPTIONS

# Settings that change no row: another value goes on with the same output.
_FREE = {
    "output", "batch_size", "yolo_actors", "paligemma_actors", "gpus_per_actor", "rows_per_file", "storage",
    "overwrite", "retry_errors", "max_error_rate", "config",
}  # fmt: skip
_SECRET = ("account_key", "client_secret", "connection_string", "key", "sas_token", "secret", "token")
_KEYS = "; ".join(f"{', '.join(keys)} for {scheme}://" for scheme, keys in OPTIONS.items())
Class = Annotated[int, Field(ge=0, lt=2**31)]


class UsageError(Exception):
    """The request is wrong: one sentence that says what to do. The commands exit with 2."""


class Models(BaseSettings):
    """What every door takes: the models, and how they look at a picture."""

    model_config = SettingsConfigDict(extra="forbid")

    yolo: str | None = Field(None, description="weights (.pt), or an export: .onnx, …_openvino_model/, .engine, …")
    conf: float = Field(0.25, ge=0, le=1, description="least score of a detection")
    iou: float = Field(0.7, ge=0, le=1, description="overlap above which NMS drops the weaker detection")
    max_det: int = Field(300, ge=1, description="most detections of a picture")
    classes: list[Class] | None = Field(None, description="class ids to keep, as 0,2,5; all by default")
    imgsz: int | list[int] | None = Field(None, description="input size, N or HEIGHT,WIDTH; the model's own by default")
    paligemma: list[str] = Field(
        [],
        description="folder, or name on Hugging Face's hub, of a PaliGemma 1 or 2; repeatable, for other resolutions",
    )
    resolution: str = Field(
        "auto",
        description="auto: of several --paligemma the lowest in which nothing is small; N: the one of N pixels",
    )
    small_box: float = Field(
        16, ge=0, description="pixels of the model's input; a picture with a smaller box from YOLO goes to a larger one"
    )
    lost_detail: float = Field(
        0.08, ge=0, le=1, description="contrast; a picture whose finest part loses more of it goes to a larger one"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    adapter: str | None = Field(None, description="folder of a LoRA adapter of it, as peft saves it")
    prompt: list[str] = Field(
        [],
        description="what PaliGemma is asked, repeatable: caption en (by default), ocr, answer en QUESTION, "
        "detect a ; b, segment a",
    )
    on: Literal["image", "regions"] = Field(
        "image", description="PaliGemma sees the whole picture, or the crop of each of YOLO's detections"
    )
    max_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    scaled_decode: CliImplicitFlag[bool] = Field(True, description="decode JPEGs no larger than the model needs")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: fp16 on CUDA, bf16 on a CPU that computes in it, else fp32"
    )
    batch_size: int | None = Field(None, ge=1, description="pictures the model takes at once; 64 on a GPU, else 16")
    storage: dict[str, str] = Field({}, description=f"KEY=VALUE for stores, repeatable: {_KEYS}")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # no environment: a variable named OUTPUT must not move anybody's results

    @field_validator("yolo", "adapter")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        """As any other folder would say it, so that job.json is understood there."""
        return value and absolute(value)

    @field_validator("paligemma")
    @classmethod
    def _paligemma(cls, value: list[str]) -> list[str]:
        """Folders, or names on the hub as they are."""
        return [absolute(one) if os.path.exists(os.path.expanduser(one)) else one for one in value]

    @field_validator("resolution")
    @classmethod
    def _resolution(cls, value: str) -> str:
        if value != "auto" and not value.isdecimal():
            raise ValueError("expected auto or a number of pixels")
        return value

    @field_validator("classes", "imgsz", mode="before")
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


class Settings(Models):
    """Annotate pictures with YOLOv8, PaliGemma or both, and write Parquet, each input exactly once."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_prog_name="python -m jobs.annotate", cli_avoid_json=True, cli_hide_none_type=True
    )

    inputs: CliPositionalArg[list[str]] = Field(
        [],
        description="files, folders, globs or s3:// prefixes: pictures, .tar (WebDataset), .parquet with encoded "
        "images, or a .txt/.csv/.jsonl list of uris",
    )
    output: str = Field(description="folder or s3:// prefix; holds results/*.parquet and job.json")
    yolo_actors: str | None = Field(None, description="MIN:MAX model processes; sized to the cluster by default")
    paligemma_actors: str | None = Field(None, description="the same, of PaliGemma")
    gpus_per_actor: float | None = Field(None, ge=0, description="1 where there are GPUs; less lets actors share one")
    rows_per_file: int = Field(10_000, ge=1, description="most rows of a results file")
    uri_column: str | None = Field(None, description="column of uris, in Parquet and in .csv or .jsonl lists")
    keep_images: CliToggleFlag[bool] = Field(False, description="store the encoded pictures too")
    limit: int | None = Field(None, ge=1, description="the first N inputs only")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete what is in the output and start again")
    retry_errors: CliToggleFlag[bool] = Field(False, description="run the inputs again that failed")
    max_error_rate: float = Field(0.1, ge=0, le=1, description="share of failed inputs above which the job exits 3")
    config: str | None = Field(None, description="YAML with these names, or an earlier job.json; flags win")

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
            raise ValueError("no input: give files, folders, globs or s3:// prefixes")
        for name in ("prompt", "revision", "adapter"):
            if getattr(self, name) and not self.paligemma:
                raise ValueError(f"--{name} needs a model to ask: give --paligemma MODEL")
        if not (self.yolo or self.paligemma):
            raise ValueError("no model: give --yolo MODEL, --paligemma MODEL or both")
        if self.on == "regions" and not (self.yolo and self.paligemma):
            raise ValueError("--on regions asks PaliGemma about YOLO's detections: give both --yolo and --paligemma")
        if self.adapter and len(self.paligemma) > 1:
            raise ValueError(f"--adapter belongs to one model: give one --paligemma, not {len(self.paligemma)}")
        if self.on == "regions" and len(self.prompt) > 1:
            raise ValueError(f"--on regions takes one --prompt, as a detection has one text, not {len(self.prompt)}")
        if self.paligemma and not self.prompt:
            self.prompt = ["caption en"]
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the rows say."""
        return {name: value for name, value in self.record().items() if name not in _FREE}

    def record(self) -> dict[str, Any]:
        """Every setting, for job.json; secrets are left out."""
        values = self.model_dump(exclude={"overwrite", "retry_errors", "config"})
        values["storage"] = {name: value for name, value in self.storage.items() if name not in _SECRET}
        return values


def _split(entry: Any) -> list[str]:
    return [part for part in str(entry).strip("[] ").replace(" ", "").split(",") if part]


def parse(arguments: list[str]) -> Settings:
    """Command line, over `--config`, over defaults. Raises UsageError; prints and exits on --help."""
    verbatim: dict[str, list[str]] = {}

    def parse_args(parser: Any, arguments: list[str]) -> Any:
        """Inputs before, between and after flags; and word for word, as pydantic-settings splits at commas."""
        parsed = parser.parse_intermixed_args(arguments)
        for name in ("inputs", "prompt", "paligemma"):
            value = vars(parsed).pop(name, None)
            if isinstance(value, list) and value:
                verbatim[name] = value
        return parsed

    try:
        values = _config(arguments)
        source: Any = CliSettingsSource(
            Settings, cli_parse_args=arguments, cli_exit_on_error=False, parse_args_method=parse_args
        )
        return Settings(_cli_settings_source=source, **(values | verbatim))  # type: ignore[call-arg]
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    except SettingsError as error:
        raise UsageError(f"{str(error).removeprefix('error parsing CLI: ')}; see --help") from None


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
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UsageError(f"--config {path} does not exist: check the name") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no settings: write NAME: VALUE, one a line")
    content = content.get("configuration", content)  # an earlier job.json
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, as one sentence."""
    first = error.errors()[0]
    place = str(first["loc"][0]) if first["loc"] else ""
    name = "INPUT" if place == "inputs" else f"--{place.replace('_', '-')}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name} is missing; see --help"
    if first["type"] == "extra_forbidden":
        return f"there is no setting {place}; see --help"
    given = "" if not place or first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{name}: {message[0].lower() + message[1:]}{given}" if place else message
