"""What may be set: by who runs the service (Arguments), and by who asks it (Options, Body)."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve.problem import MAX_BODY_BYTES, Problem
from shardsight.models.yolo.trackers import TRACKERS, tracker_settings
from shardsight.settings import Class, Models
from shardsight.storage import is_remote

HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-z:.%]+\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
STORES = "s3://, gs:// or az://"
_ORIGIN = re.compile(f"https?://{HOST.pattern}", HOST.flags)
# A grey picture, for /docs to try with.
EXAMPLE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAAAAACEICPDAAAAJ0lEQVR42u3MMREAAAgEoNfkRjeEmwcBqMlNRyAQCAQC"
    "gUAgEDwNFm0oAOBnO1pYAAAAAElFTkSuQmCC"
)
Model = TypeVar("Model", bound=BaseModel)


def as_list(value: Any) -> Any:
    """A single text may stand for a list of one."""
    return [value] if isinstance(value, str) else value


class Arguments(Models):
    """What `serve run` and config.yaml may set. Those of the job are the defaults of a request's options."""

    max_bytes: int = Field(20 << 20, ge=1, le=MAX_BODY_BYTES, description="of a request's body, also when unpacked")
    max_pixels: int = Field(50_000_000, ge=1, description="of a picture or frame, checked before it is decoded")
    max_video_bytes: int = Field(48 << 20, ge=1, le=MAX_BODY_BYTES, description="the same, of a video's request")
    max_video_seconds: float = Field(30, gt=0, description="of a video")
    max_frames: int = Field(300, ge=1, description="of a video that are annotated, after fps, every or keyframes")
    max_videos: int = Field(4, ge=1, description="videos processed at once; further ones get 429")
    deadline: float = Field(60, gt=0, description="seconds for the request to arrive and the answer to be sent")
    max_concurrent: int = Field(128, ge=1, description="requests processed at once; further ones get 429")
    allowed_prefixes: list[str] = Field([], description=f"{STORES} prefixes whose pictures may be asked for by uri")
    allowed_origins: list[str] = Field([], description="sites whose pages may call this server, as https://HOST[:PORT]")
    root_path: str = Field("", description="path below which a proxy in front publishes this server, as /vision")
    gpus: float = Field(0, ge=0, description="per replica; less than 1 lets replicas share one")
    replicas: int = Field(1, ge=1, description="at most, per model; on a CPU, one uses all cores of a machine")

    _lists = field_validator("paligemma", "prompt", "allowed_prefixes", "allowed_origins", mode="before")(as_list)

    @field_validator("allowed_prefixes")
    @classmethod
    def _prefixes(cls, value: list[str]) -> list[str]:
        for prefix in value:
            if not is_remote(prefix):
                raise ValueError(f"{prefix}: expected an {STORES} prefix, as s3://BUCKET/ or s3://BUCKET/FOLDER/")
        return [prefix.rstrip("/") + "/" for prefix in value]

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        found = [origin.rstrip("/").lower() for origin in value]
        for origin in found:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin}: expected http://HOST[:PORT] or https://HOST[:PORT], without a path")
        return found

    @model_validator(mode="after")
    def _tracker(self) -> Self:
        """Raises UsageError."""
        if self.track:
            tracker_settings(self.track, self.track_config)
        return self

    @field_validator("root_path")
    @classmethod
    def _root_path(cls, value: str) -> str:
        path = value.rstrip("/")
        if path and not path.startswith("/"):
            raise ValueError(f"{value}: expected a path as /vision")
        return path


def _of_the_job(name: str) -> Any:
    return Models.model_fields[name]


class Options(BaseModel):
    """How one picture is processed; as the job's flags of the same names."""

    model_config = ConfigDict(extra="forbid")

    conf: float | None = _of_the_job("conf")
    iou: float = _of_the_job("iou")
    max_det: int = _of_the_job("max_det")
    classes: list[Class] | None = _of_the_job("classes")
    prompt: list[str] = Field([], max_length=16, description="for PaliGemma; nothing by default")
    on: Literal["image", "regions"] = _of_the_job("on")
    max_tokens: int = _of_the_job("max_tokens")

    _list = field_validator("prompt", mode="before")(as_list)
    _numbers = field_validator("classes", mode="before")(Models._numbers.__func__)  # type: ignore[attr-defined]
    _prompt = field_validator("prompt")(Models._prompt.__func__)  # type: ignore[attr-defined]

    @property
    def thresholds(self) -> tuple[float, float, int, tuple[int, ...] | None]:
        """(conf, iou, max_det, classes), as in ultralytics, with the job's default of conf."""
        tracks = isinstance(self, VideoOptions) and self.track
        conf = (0.1 if tracks else 0.25) if self.conf is None else self.conf
        return conf, self.iou, self.max_det, None if self.classes is None else tuple(self.classes)


class VideoOptions(Options):
    """The same of a video, and which of its frames."""

    fps: float | None = _of_the_job("fps")
    every: int | None = _of_the_job("every")
    keyframes: bool = _of_the_job("keyframes")
    track: str | None = Field(
        None, description="keep identities through the video", json_schema_extra={"enum": list(TRACKERS)}
    )

    @field_validator("track")
    @classmethod
    def _track(cls, value: str | None) -> str | None:
        if value is not None and value not in TRACKERS:
            raise ValueError(f"there is no tracker {value[:40]}: choose from {', '.join(TRACKERS)}")
        return value

    @model_validator(mode="after")
    def _one_sampling(self) -> Self:
        if sum(map(bool, (self.fps, self.every, self.keyframes))) > 1:
            raise ValueError("fps, every and keyframes each say which frames of a video: give one of them")
        return self


class Body(Options):
    """A picture by name, as JSON."""

    image: str = Field(
        description=f"a data: uri with the encoded picture, or an {STORES} uri under an allowed prefix",
        examples=[EXAMPLE],
    )


class VideoBody(VideoOptions):
    """A video by name, as JSON."""

    video: str = Field(description=f"a data: uri with the encoded video, or an {STORES} uri under an allowed prefix")


SomeOptions = TypeVar("SomeOptions", bound=Options)
_SAMPLING = {"fps", "every", "keyframes"}


def options(arguments: Arguments, kind: type[SomeOptions], given: dict[str, Any]) -> SomeOptions:
    """A request's options, with the server's settings as defaults. Raises Problem."""
    names = set(kind.model_fields) - (_SAMPLING if _SAMPLING & set(given) else set())
    found = checked(kind, arguments.model_dump(include=names) | given)
    if found.max_tokens > arguments.max_tokens:
        raise Problem(422, f"max_tokens: at most {arguments.max_tokens} on this server, not {found.max_tokens}")
    return found


def checked(kind: type[Model], given: Any, status: int = 422) -> Model:
    """Validate what a client sent. Raises Problem, which names the wrong field."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            nested = len(first["loc"]) > 1
            reason = "unknown: leave it out" if nested else f"unknown: choose from {', '.join(kind.model_fields)}"
        raise Problem(status, f"{place}: {reason}".removeprefix(": ")) from None


def no_query(query: Mapping[str, Any], status: int) -> None:
    """For protocols whose parameters are all in the body. Raises Problem."""
    if query:
        raise Problem(status, f"{next(iter(query))}: the query is not read here: give it in the body")


def json_object(body: bytes, status: int = 422) -> dict[str, Any]:
    """Raises Problem."""
    try:
        found = pydantic_core.from_json(body)
    except ValueError as error:
        raise Problem(status, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Problem(status, "the body must be a JSON object, as {…}")
    return found


def body_schema(kind: type[BaseModel], path: str) -> dict[str, Any]:
    """The schema of a POST's JSON body for the OpenAPI document, from whose root references are resolved."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema/$defs"
    return kind.model_json_schema(ref_template=place + "/{model}")
