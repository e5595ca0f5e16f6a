"""The service: `serve run serve.app:app yolo=MODEL paligemma=MODEL`, or `serve deploy serve/config.yaml`.

Pictures come in at Door, which checks, reads and decodes them as the job does; Detector and Speaker hold the job's own
model classes (replicas.py), a deployment each, with as many replicas as there is work for.
"""

import asyncio
import base64
import importlib.resources
import io
import os
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from serve import chat, tensors
from serve.guard import MOST_BYTES, Guard, Problem, digest, fault, too_large
from serve.models import Detector, Speaker, Thresholds, pack, unpack
from shardsight.decode.frames import Load
from shardsight.decode.pictures import MAX_PIXELS
from shardsight.models import lineup
from shardsight.models.info import ModelDied
from shardsight.models.lineup import Lineup
from shardsight.row import ROW, Failure, frame_of
from shardsight.settings import Class, Models
from shardsight.sources import Record
from shardsight.storage import Storage, is_remote

# Read by Serve's proxies, where Ray is started from here.
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.guard:outside")

PAGE = Path(__file__).parent / "page"
PICTURES_FIELD = "image"
# What decoding says of what is no picture at all, and of one that is too large; all else is damaged.
_STATUS = {"NotAnImage": 415, "TooManyPixels": 413}
T = TypeVar("T")


class Arguments(Models):
    """What `serve run` and config.yaml may set, besides the models and how they look at a picture."""

    max_bytes: int = Field(20 << 20, ge=1, le=MOST_BYTES, description="most of a request's body")
    max_pixels: int = Field(50_000_000, ge=1, description="most of a picture, checked before it is decoded")
    deadline: float = Field(60, gt=0, description="seconds, for the request to come and the answer to go")
    room: int = Field(128, ge=1, description="requests that are worked on at once; further ones get 429")
    allowed_prefixes: list[str] = Field([], description="s3:// prefixes whose pictures may be asked for by uri")
    gpus: float = Field(0, ge=0, description="of a replica; less than 1 lets replicas share one")
    replicas: int = Field(
        1, ge=1, description="of each model, at the most; on a CPU, one has use for a machine's cores"
    )

    @field_validator("paligemma", "allowed_prefixes", mode="before")
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


def _of_the_job(name: str) -> Any:
    return Models.model_fields[name]


class Options(BaseModel):
    """How one picture is looked at; as the job's flags of the same names."""

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
        description="a data: uri with the encoded picture, or an s3:// uri under an allowed prefix",
        examples=[chat.EXAMPLE],
    )


def app(arguments: Arguments) -> serve.Application:
    """The application that Serve runs. Raises ModelError, UsageError."""
    models = lineup.known(arguments)
    if not models:
        raise ValueError("no model: give yolo=MODEL, paligemma=MODEL or both")
    keys = [key.strip() for key in os.environ.get("SHARDSIGHT_API_KEYS", "").split(",")]
    cores = os.cpu_count() or 1
    bound: dict[str, Any] = {}
    for name, own in lineup.arguments(models, arguments).items():
        kind = Detector if name == "yolo" else Speaker
        # OpenMP's threads, PaliGemma's, wait for each other by computing: they are not to take all.
        threads = cores if len(models) == 1 or kind is Detector else max(1, cores // 2)
        bound[name] = serve.deployment(
            kind,
            name=name.replace(" ", "-"),
            max_ongoing_requests=arguments.room,
            max_queued_requests=arguments.room,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=arguments.deadline,
            max_surge_percent=100,
            logging_config={"enable_access_log": False},  # safety.py writes it
            autoscaling_config={"min_replicas": 1, "max_replicas": arguments.replicas, "target_ongoing_requests": 32},
            ray_actor_options={"num_cpus": 0 if arguments.gpus else 0.5, "num_gpus": arguments.gpus},
        ).bind(own | {"threads": threads, "keep_frames": False})  # Door has them
    found: serve.Application = Door.bind(arguments, models, [digest(key) for key in keys if key], bound)  # type: ignore
    return found


@serve.deployment(
    max_ongoing_requests=1000,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=60,
    logging_config={"enable_access_log": False},
    max_surge_percent=100,  # in an update the new one comes before the old one goes
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Door:
    """Checks, reads and decodes what comes, and asks the models.

    keys: digests of those that may ask. handles: of the models' deployments, by their names in the lineup.
    """

    def __init__(
        self, arguments: Arguments, models: Lineup, keys: list[bytes], handles: dict[str, DeploymentHandle]
    ) -> None:
        self.arguments, self.models, self.keys, self.handles = arguments, models, keys, handles
        self.storage = Storage(arguments.storage, retry_seconds=arguments.deadline / 4)

    def __serve_build_asgi_app__(self) -> Any:
        api = FastAPI(title="Shardsight", version=version("shardsight"), docs_url=None, redoc_url=None)
        for kind in (Problem, HTTPException, RequestValidationError, Exception):
            api.add_exception_handler(kind, _problem)
        body = {"schema": Body.model_json_schema(ref_template="#/components/schemas/{model}")}
        picture = {"type": "string", "format": "binary"}
        form = Options.model_json_schema()
        form = form | {"properties": form["properties"] | {PICTURES_FIELD: picture}, "required": [PICTURES_FIELD]}
        content = {"multipart/form-data": {"schema": form}, "application/json": body}

        @api.post(
            "/v1/annotate",
            summary="One picture → its row",
            openapi_extra={"requestBody": {"required": True, "content": content}},
            responses={status: {"description": text} for status, text in _REFUSALS.items()},
        )
        async def annotate(request: Request) -> JSONResponse:
            name, data, options = await self.picture(request)
            return JSONResponse(await self.row(name, data, options))

        @api.get("/healthz", summary="Whether the service lives")
        async def healthz() -> dict[str, str]:
            return {"status": "ok"}

        @api.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")

        @api.get("/docs", include_in_schema=False)
        async def docs() -> HTMLResponse:
            return HTMLResponse(_DOCS)

        swagger = importlib.resources.files("swagger_ui_bundle").joinpath("vendor")
        newest = max(Path(str(swagger)).glob("swagger-ui-*"))
        api.mount("/page", StaticFiles(directory=PAGE))
        api.mount("/docs", StaticFiles(directory=newest))
        chat.add(api, self)
        tensors.add(api, self)
        routes = [getattr(route, "path", "") for route in api.routes]
        limits = self.arguments
        return Guard(api, self.keys, limits.max_bytes, limits.deadline, limits.room, routes)

    async def picture(self, request: Request) -> tuple[str, bytes, Options]:
        """A request's picture: its name, its bytes, and how to look at it. Raises Problem."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=64, max_part_size=64 << 10) as form:
                upload = form.get(PICTURES_FIELD)
                if not isinstance(upload, UploadFile):
                    raise Problem(422, f"the form lacks a file named {PICTURES_FIELD!r}")
                names = {name for name in form if name != PICTURES_FIELD}
                many = {"prompt", "classes"}
                given = {name: form.getlist(name) if name in many else form[name] for name in names}
                # With ? for half of a character, which some encodings of forms can say and JSON cannot.
                name = (upload.filename or "picture").encode(errors="replace").decode()
                return name, await upload.read(), _checked(Options, given)
        if kind == "application/json":
            asked = _checked(Body, await request.body())
            return *await self.fetch(asked.image), asked
        raise Problem(415, "send multipart/form-data with a file named 'image', or application/json with an 'image'")

    def thresholds(self, given: dict[str, Any]) -> Options:
        """Of the parameters of an inference request. Raises Problem."""
        return _checked(Options, {name: given[name] for name in ("conf", "iou", "max_det", "classes") if name in given})

    async def fetch(self, image: str) -> tuple[str, bytes]:
        """What a caller names: a data uri, or a picture under an allowed prefix. Raises Problem."""
        if image.startswith("data:"):
            head, comma, data = image.partition(",")
            try:
                if not comma or not head.endswith(";base64"):
                    raise ValueError
                return "data:", base64.b64decode(data, validate=True)
            except ValueError:
                raise Problem(422, "the data uri is not data:image/…;base64,…") from None
        plain = is_remote(image) and not any(part in (".", "..") for part in image.split("/"))
        if not (plain and image.startswith(tuple(self.arguments.allowed_prefixes))):
            raise Problem(422, "image: expected a data: uri, or an s3:// uri under a prefix that this server allows")
        most = self.arguments.max_bytes
        try:
            size = await asyncio.to_thread(self.storage.size, image)
            picture = await asyncio.to_thread(self.storage.read, image) if size <= most else b""
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise Problem(422, "there is no picture of that name that this server may read") from None
        except Exception:  # botocore's are of no kind that tells them apart
            raise Problem(503, "the store of the picture cannot be reached", after=5) from None
        if size > most:
            raise too_large(most)
        return image, picture

    async def loaded(self, name: str, data: bytes, models: Lineup, on: str = "image") -> dict[str, Any]:
        """Encoded bytes → a row with its frame, as the job makes it. Raises Problem."""
        load = lineup.load(models, self.arguments.model_copy(update={"on": on}), self.storage)

        def decoded() -> dict[str, Any]:
            _check_pixels(data, self.arguments.max_pixels)
            return load.row(Record(None, 0, name, name, data))

        return _without_error(await asyncio.to_thread(decoded))

    async def frame(self, data: bytes, name: str) -> np.ndarray:
        """Encoded bytes → RGB uint8 (h, w, 3) for that model alone. Raises Problem."""
        row = await self.loaded("picture", data, {name: self.models[name]})
        return frame_of(row["frame"], row["frame_height"], row["frame_width"])

    async def speak(
        self, name: str, frame: np.ndarray, text: str, max_tokens: int, temperature: float, stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """As Speaker.speak. Raises Problem."""
        handle = self.handles[name].options(stream=True)
        response = handle.speak.remote(frame, text, max_tokens, temperature, stream)
        try:
            async for said in response:
                yield said
        except _KNOWN as error:
            raise _known(error) from None
        finally:
            response.cancel()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0, max_concurrent_batches=2)
    async def detect(self, rows: list[dict[str, Any]], thresholds: list[Thresholds]) -> list[dict[str, Any]]:
        """As Detector, of several requests in one call: what comes while two are under way is the next. Raises Problem.

        Together here, since a call from process to process takes as long as the model does.
        """
        asked = pack(Load.table(rows))
        found = unpack(await _answer(self.handles["yolo"].remote(asked, thresholds)))
        return [row | one for row, one in zip(rows, found.to_pylist(), strict=True)]

    async def row(self, name: str, data: bytes, options: Options) -> dict[str, Any]:
        """The row of the contract. Raises Problem, with the row in it where its `error` says what is wrong."""
        asks = bool(options.prompt) or options.on == "regions"
        models = {name: model for name, model in self.models.items() if asks or name == "yolo"}
        if asks and list(models) == ["yolo"]:
            raise Problem(422, "prompt: this server has no PaliGemma to ask")
        if not models:
            raise Problem(422, "prompt: this server has PaliGemma alone, which has to be asked something")
        if options.on == "regions" and ("yolo" not in models or len(options.prompt) > 1):
            raise Problem(422, "on: regions takes one prompt, and a server with both models")
        row = await self.loaded(name, data, models, options.on)
        prompts = options.prompt or ["caption en"]
        classes = None if options.classes is None else tuple(options.classes)
        for model, handle in self.handles.items():
            if model == "yolo" and model in models:
                thresholds = options.conf, options.iou, options.max_det, classes
                row = await self.detect(row, thresholds)
            elif model in models:
                regions = options.on == "regions"
                asked = pack(Load.table([row])), prompts, regions, options.max_tokens
                (said,) = unpack(await _answer(handle.annotate.remote(*asked))).to_pylist()
                row |= said
            row = _without_error(row)
        return _row(row)


_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Shardsight's API</title><link rel="icon" href="/page/icon.svg">
<link rel="stylesheet" href="/docs/swagger-ui.css"><script src="/docs/swagger-ui-bundle.js"></script>
<script src="/page/docs.js"></script></head><body><div id="swagger-ui"></div></body></html>
"""
_REFUSALS = {
    401: "No valid key",
    413: "Too many bytes, or pixels",
    415: "Not a picture",
    422: "A damaged picture, or an option that makes no sense",
    429: "Too many requests; try again after Retry-After seconds",
    503: "The model has just failed, and is started anew",
    504: "No answer within the deadline",
}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ROW.names}


def _without_error(row: dict[str, Any]) -> dict[str, Any]:
    error = row["error"]
    if error is None:
        return row
    foreseen = error["stage"] == "decode" or error["type"] == "PromptTooLong"
    raise Problem(_STATUS.get(error["type"], 422 if foreseen else 500), error["message"], row=_row(row))


def _check_pixels(data: bytes, most: int) -> None:
    """By the picture's head alone. What has none is for the decoder to refuse."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception:
        return
    if most < width * height <= MAX_PIXELS:  # beyond that, decoding refuses it, as in the job
        raise Problem(413, f"{width}×{height} pixels; at most {most:,} are decoded here")


def _checked(kind: type[T], given: Any) -> T:
    """A model of pydantic's, from JSON or a dict. Raises Problem."""
    try:
        if isinstance(given, bytes):
            return kind.model_validate_json(given)  # type: ignore[attr-defined]
        return kind.model_validate(given)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Problem(422, f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")) from None


async def _answer(response: Any) -> Any:
    """A replica's answer. Nobody waiting any more, it need not be computed. Raises Problem."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except _KNOWN as error:
        raise _known(error) from None


_KNOWN = (BackPressureError, RayActorError, DeploymentUnavailableError, ModelDied, Failure)


def _known(error: Exception) -> Problem:
    if isinstance(error, BackPressureError):
        return Problem(429, "the model has more to do than it can: try again later", after=1)
    if isinstance(error, Failure):
        return Problem(422, error.message)
    return Problem(503, "the model has just failed, and is started anew: try again", after=5)


async def _problem(request: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = Problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    elif isinstance(error, HTTPException):
        error = Problem(error.status_code, str(error.detail))
    elif not isinstance(error, Problem):
        error = fault()
    return JSONResponse(error.body(request.url.path, request.state.request_id), error.status, error.headers())
