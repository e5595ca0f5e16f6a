"""What may be set: by who runs the service (Arguments), and by who asks it (Options, Body)."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve.guard import MOST_BYTES, Problem
from shardsight.settings import Class, Models
from shardsight.storage import is_remote

# A grey picture, for /docs to try with.
EXAMPLE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAAAAACEICPDAAAAJ0lEQVR42u3MMREAAAgEoNfkRjeEmwcBqMlNRyAQCAQC"
    "gUAgEDwNFm0oAOBnO1pYAAAAAElFTkSuQmCC"
)
Model = TypeVar("Model", bound=BaseModel)


class Arguments(Models):
    """What `serve run` and config.yaml may set. The job's settings among them are the defaults of a request's."""

    max_bytes: int = Field(20 << 20, ge=1, le=MOST_BYTES, description="most of a request's body, also when unpacked")
    max_pixels: int = Field(50_000_000, ge=1, description="most of a picture, checked before it is decoded")
    deadline: float = Field(60, gt=0, description="seconds for the request to arrive and the answer to be sent")
    max_concurrent: int = Field(128, ge=1, description="requests processed at once; further ones get 429")
    allowed_prefixes: list[str] = Field([], description="s3:// prefixes whose pictures may be asked for by uri")
    allowed_origins: list[str] = Field([], description="sites whose pages may call this server, as https://HOST[:PORT]")
    root_path: str = Field("", description="path below which a proxy in front publishes this server, as /vision")
    gpus: float = Field(0, ge=0, description="of a replica; less than 1 lets replicas share one")
    replicas: int = Field(1, ge=1, description="most of each model; on a CPU, one makes use of a machine's cores")

    @field_validator("paligemma", "prompt", "allowed_prefixes", "allowed_origins", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """One alone may be given as it is, as `serve run` does."""
        return [value] if isinstance(value, str) else value

    @field_validator("allowed_prefixes")
    @classmethod
    def _prefixes(cls, value: list[str]) -> list[str]:
        for prefix in value:
            if not is_remote(prefix):
                raise ValueError(f"{prefix}: expected s3://BUCKET/ or s3://BUCKET/FOLDER/")
        return [prefix.rstrip("/") + "/" for prefix in value]

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        found = [origin.rstrip("/").lower() for origin in value]
        for origin in found:
            parts = urlsplit(origin)  # raises ValueError
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin}: expected http://HOST[:PORT] or https://HOST[:PORT], without a path")
        return found

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

    conf: float = _of_the_job("conf")
    iou: float = _of_the_job("iou")
    max_det: int = _of_the_job("max_det")
    classes: list[Class] | None = _of_the_job("classes")
    prompt: list[str] = Field([], max_length=16, description="what PaliGemma is asked; nothing by default")
    on: Literal["image", "regions"] = _of_the_job("on")
    max_tokens: int = _of_the_job("max_tokens")

    _numbers = field_validator("classes", mode="before")(Models._numbers.__func__)  # type: ignore[attr-defined]
    _prompt = field_validator("prompt")(Models._prompt.__func__)  # type: ignore[attr-defined]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Body(Options):
    """A picture by name, as JSON."""

    image: str = Field(
        description="a data: uri with the encoded picture, or an s3:// uri under an allowed prefix", examples=[EXAMPLE]
    )


SomeOptions = TypeVar("SomeOptions", bound=Options)


def options(arguments: Arguments, kind: type[SomeOptions], given: dict[str, Any]) -> SomeOptions:
    """What a request asks for, with the server's own settings as defaults. Raises Problem."""
    found = checked(kind, arguments.model_dump(include=set(Options.model_fields)) | given)
    if found.max_tokens > arguments.max_tokens:
        raise Problem(422, f"max_tokens: at most {arguments.max_tokens} on this server, not {found.max_tokens}")
    return found


def checked(kind: type[Model], given: Any, status: int = 422) -> Model:
    """What a caller sent, as a model of pydantic's. Raises Problem, which names what is wrong."""
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
    """Of a protocol whose parameters all are in the body. Raises Problem."""
    if query:
        raise Problem(status, f"{next(iter(query))}: nothing is read from the query: give it in the body")


def json_object(body: bytes, status: int = 422) -> dict[str, Any]:
    """A body of JSON. Raises Problem."""
    try:
        found = pydantic_core.from_json(body)
    except ValueError as error:
        raise Problem(status, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Problem(status, "the body has to be a JSON object, as {…}")
    return found
