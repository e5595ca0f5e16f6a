"""The service: `serve run serve.app:app yolo=MODEL paligemma=MODEL`, or `serve deploy serve/config.yaml`.

The Gateway checks, reads and decodes pictures as the job does; YoloReplica and PaliGemmaReplica hold the job's own
model classes, a deployment each, whose replicas are scaled with the load.
"""

import importlib.resources
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from click import ClickException
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from ray import serve
from starlette.exceptions import HTTPException

import shardsight
from serve import chat, tensors
from serve.arguments import Arguments, Body, Options, VideoBody, VideoOptions
from serve.guard import ANNOTATE, Guard, digest
from serve.pictures import FIELDS
from serve.problem import Problem, server_error
from serve.service import Gateway, PaliGemmaReplica, YoloReplica
from shardsight.actors import gpu_memory
from shardsight.errors import UsageError
from shardsight.models import selection

# Read by Serve's proxies, where Ray is started from here.
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.guard:proxy_middleware")

PAGE = Path(__file__).parent / "page"
VIEWER = Path(shardsight.__file__).parent / "viewer"
MAX_CALLS = 1000  # of the Gateway at once, whatever they ask for
_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Shardsight's API</title><link rel="icon" href="page/icon.svg">
<link rel="stylesheet" href="docs/swagger-ui.css"><script src="docs/swagger-ui-bundle.js"></script>
<script src="page/docs.js"></script></head><body><div id="swagger-ui"></div></body></html>
"""
_OPTIONS = (
    "Options are fields of the form or of the JSON, or of the query; `prompt` and `classes` may be repeated. Bodies "
    "may be packed with gzip or deflate."
)
_REFUSALS = {
    401: "No valid key",
    413: "Too many bytes or pixels, or frames or seconds of a video",
    415: "No picture or video, or a kind of body that is not supported",
    422: "A damaged picture or video, one without frames, or a wrong option",
    429: "Too many requests; try again after Retry-After seconds",
    503: "The model has failed and is being restarted",
    504: "No answer within the deadline",
}


class Refused(UsageError, ClickException):
    """A wrong request, of which `serve run`, a command of click's, shows the sentence alone."""

    exit_code = 2


def app(arguments: Arguments) -> serve.Application:
    """The application that Serve runs. Raises Refused."""
    try:
        models = selection.inspect(arguments)
    except UsageError as error:
        raise Refused(str(error)) from error
    if not models:
        raise Refused("no model: give yolo=MODEL, paligemma=MODEL or both")
    keys = [key.strip() for key in os.environ.get("SHARDSIGHT_API_KEYS", "").split(",") if key.strip()]
    cores = os.cpu_count() or 1
    handles: dict[str, Any] = {}
    untracked = arguments.model_copy(update={"track": None})  # a replica makes a tracker for each video
    for name, own in selection.arguments(models, untracked).items():
        yolo = name == "yolo"
        # PaliGemma's OpenMP threads wait for each other in busy loops: they must leave cores to YOLO.
        own["threads"] = cores if len(models) == 1 or yolo else max(1, cores // 2)
        if not yolo:
            own["memory"] = gpu_memory(arguments.gpus)
        handles[name] = serve.deployment(
            YoloReplica if yolo else PaliGemmaReplica,
            name=name.replace(" ", "-"),
            max_ongoing_requests=arguments.max_concurrent + 8,  # and probes of readiness
            max_queued_requests=arguments.max_concurrent,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=arguments.deadline,
            max_surge_percent=100,
            logging_config={"enable_access_log": False},  # guard.py writes it
            autoscaling_config={"min_replicas": 1, "max_replicas": arguments.replicas, "target_ongoing_requests": 32},
            ray_actor_options={"num_cpus": 0 if arguments.gpus else 0.5, "num_gpus": arguments.gpus},
        ).bind(own)
    found: serve.Application = Ingress.bind(arguments, models, [digest(key) for key in keys], handles)  # type: ignore
    return found


@serve.deployment(
    name="Gateway",
    max_ongoing_requests=MAX_CALLS,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=60,
    logging_config={"enable_access_log": False},
    max_surge_percent=100,  # an update starts the new one before it stops the old one
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Ingress(Gateway):
    """The Gateway with its routes."""

    def __serve_build_asgi_app__(self) -> Any:
        return asgi(self)


def asgi(gateway: Gateway) -> Guard:
    """All routes, behind the guard."""
    api = FastAPI(title="Shardsight", version=version("shardsight"), docs_url=None, redoc_url=None)
    for kind in (Problem, HTTPException, RequestValidationError, Exception):
        api.add_exception_handler(kind, _problem)
    _annotate(api, gateway)
    _pages(api)
    chat.add(api, gateway)
    tensors.add(api, gateway)
    return Guard(api, gateway.arguments, gateway.keys, api.routes)


def _annotate(api: FastAPI, gateway: Gateway) -> None:
    bodies = [kind.model_json_schema(ref_template="#/components/schemas/{model}") for kind in (Body, VideoBody)]
    file = {"type": "string", "format": "binary"}
    options = VideoOptions.model_json_schema()["properties"]
    form: dict[str, Any] = {"type": "object", "properties": options | dict.fromkeys(FIELDS, file)}
    form["oneOf"] = [{"required": [field]} for field in FIELDS]
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": {"oneOf": bodies}}}
    kinds = ("image/jpeg", "image/png", "application/octet-stream", "video/mp4", "video/webm")
    content |= {kind: {"schema": file} for kind in kinds}
    query = [{"name": name, "in": "query", "schema": schema} for name, schema in options.items()]
    of_videos = ", ".join(name for name in options if name not in Options.model_fields)
    limits = gateway.arguments

    @api.post(
        ANNOTATE,
        summary="One picture → its row; a short video → {rows: [a row per frame]}",
        description=f"{_OPTIONS} Of videos: {of_videos}. A video lasts {limits.max_video_seconds:g} s and has "
        f"{limits.max_frames} frames to annotate at most. If one is damaged, the refusal has the others' `rows`.",
        openapi_extra={"requestBody": {"required": True, "content": content}, "parameters": query},
        responses={status: {"description": text} for status, text in _REFUSALS.items()},
    )
    async def annotate(request: Request) -> JSONResponse:
        asked = await gateway.pictures.of(request)
        if isinstance(asked.options, VideoOptions):
            return JSONResponse({"rows": await gateway.rows(asked.name, asked.data, asked.options)})
        return JSONResponse(await gateway.row(asked.name, asked.data, asked.options))


def _pages(api: FastAPI) -> None:
    @api.get("/healthz", summary="Whether the service runs")
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
    for path, folder in {"/page": PAGE, "/viewer": VIEWER, "/docs": newest}.items():
        api.mount(path, StaticFiles(directory=folder))


async def _problem(request: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = Problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    elif isinstance(error, HTTPException):
        error = Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    elif not isinstance(error, Problem):
        error = server_error()
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return error.response(path, request.state.request_id)
