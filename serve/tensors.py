"""Open Inference Protocol for YOLO, with its binary tensors: https://github.com/kserve/open-inference-protocol.

Input: `image` BYTES [n], encoded pictures, base64 in JSON. Parameters: the job's `conf`, `iou`, `max_det`, `classes`.

Outputs, for m detections in all n pictures: `image` INT32 [m], the index of the picture; `boxes` FP32 [m, 4], x1, y1,
x2, y2 in its pixels; `scores` FP32 [m]; `class_ids` INT32 [m]; `labels` BYTES [m]; and `rows` BYTES [n], rows as JSON.
"""

import asyncio
import json
import re
import struct
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from serve.arguments import EXAMPLE, Options, body_schema, checked, json_object, no_query, options
from serve.pictures import decode_base64
from serve.problem import Problem
from serve.service import Gateway

MAX_PICTURES = 64  # per request
THRESHOLDS = ("conf", "iou", "max_det", "classes")
LENGTH = "inference-header-content-length"
OUTPUTS = {
    "image": ("INT32", [-1]),
    "boxes": ("FP32", [-1, 4]),
    "scores": ("FP32", [-1]),
    "class_ids": ("INT32", [-1]),
    "labels": ("BYTES", [-1]),
    "rows": ("BYTES", [-1]),
}
_NUMPY = {"INT32": np.int32, "FP32": np.float32}


class Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    datatype: str = ""
    shape: list[int] = []
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


_ASKED = [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE.partition(",")[2]]}]


class Inference(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=1, examples=[_ASKED])
    outputs: list[Tensor] = []
    parameters: dict[str, Any] = {}


def add(api: FastAPI, gateway: Gateway) -> None:
    """Add the endpoints."""

    @api.get("/v2", summary="Name, version and extensions")
    async def server() -> dict[str, Any]:
        return {"name": "shardsight", "version": version("shardsight"), "extensions": ["binary_tensor_data"]}

    @api.get("/v2/health/live", summary="Whether the server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @api.get("/v2/health/ready", summary="Whether a replica of each model answers; 503 if not")
    async def ready() -> JSONResponse:
        found = await gateway.ready()
        return JSONResponse({"ready": found}, 200 if found else 503)

    if "yolo" in gateway.models:
        _add_yolo(api, gateway)


def _add_yolo(api: FastAPI, gateway: Gateway) -> None:
    @api.get("/v2/models/yolo", summary="Inputs and outputs of YOLO")
    async def model() -> dict[str, Any]:
        outputs = [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in OUTPUTS.items()]
        inputs = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
        found = {"name": "yolo", "versions": ["1"], "platform": "ultralytics", "inputs": inputs, "outputs": outputs}
        return found | {"parameters": {"task": getattr(gateway.models["yolo"], "task", None)}}

    @api.get("/v2/models/yolo/ready", summary="Whether a replica of YOLO answers; 503 if not")
    async def model_ready() -> JSONResponse:
        found = await gateway.ready("yolo")
        return JSONResponse({"name": "yolo", "ready": found}, 200 if found else 503)

    path = "/v2/models/yolo/infer"
    schema = body_schema(Inference, path)
    content = {"application/json": {"schema": schema}, "application/octet-stream": {"schema": {"type": "string"}}}

    @api.post(
        path,
        summary="Pictures → detections",
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def infer(request: Request) -> Response:
        no_query(request.query_params, 400)
        asked, pictures = _read(await request.body(), request.headers.get(LENGTH))
        given = {name: value for name, value in asked.parameters.items() if name != "binary_data_output"}
        _check_known(given, THRESHOLDS, "parameters")
        found = options(gateway.arguments, Options, given | {"prompt": [], "on": "image"})
        rows = await asyncio.gather(*(gateway.row(f"image {n}", data, found) for n, data in enumerate(pictures)))
        return _response(asked, list(rows))


def _check_known(given: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """Raises Problem where a parameter would be ignored."""
    if unknown := sorted(set(given) - set(known)):
        raise Problem(400, f"{place}.{unknown[0]}: not supported: choose from {', '.join(known)}")


def _read(body: bytes, length: str | None) -> tuple[Inference, list[bytes]]:
    """The request and its pictures. Raises Problem."""
    end = len(body) if length is None else int(length) if re.fullmatch(r"[0-9]{1,12}", length) else -1
    if not 0 <= end <= len(body):
        raise Problem(400, f"{LENGTH} is {(length or '')[:40]!r}, and the body has {len(body)} bytes")
    asked = checked(Inference, json_object(body[:end], 400), 400)
    tensor, rest = asked.inputs[0], body[end:]
    if tensor.name != "image" or tensor.datatype != "BYTES":
        raise Problem(400, f"expected one input, image of BYTES, not {tensor.name} of {tensor.datatype or 'nothing'}")
    _check_known(tensor.parameters, ("binary_data_size",), "inputs.0.parameters")
    size = tensor.parameters.get("binary_data_size")
    try:
        if size is None:
            nested = [one if isinstance(one, list) else [one] for one in tensor.data or []]  # of shape [n, 1]
            pictures = [decode_base64(text) for part in nested for text in part]
        elif size != len(rest):
            raise ValueError(f"{size} bytes announced, {len(rest)} came")
        else:
            pictures = _split(rest)
    except (ValueError, TypeError, struct.error) as error:
        raise Problem(400, f"the tensor image cannot be read: {error}") from None
    if tensor.shape not in ([len(pictures)], [len(pictures), 1]) or not 0 < len(pictures) <= MAX_PICTURES:
        raise Problem(
            400, f"image has shape {tensor.shape} and {len(pictures)} pictures: give [n], of 1 to {MAX_PICTURES}"
        )
    return asked, pictures


def _split(data: bytes) -> list[bytes]:
    """The elements of a binary BYTES tensor, each after its length of 4 bytes. Raises ValueError, struct.error."""
    parts, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            raise ValueError("its last element is cut short")
        parts.append(data[at - length : at])
    return parts


def _response(asked: Inference, rows: list[dict[str, Any]]) -> Response:
    """Raises Problem."""
    found = [(index, one) for index, row in enumerate(rows) for one in row["detections"] or row["classes"] or []]
    values: dict[str, Any] = {
        "image": [index for index, _ in found],
        "boxes": [[one.get(side) for side in ("x1", "y1", "x2", "y2")] for _, one in found],
        "scores": [one["score"] for _, one in found],
        "class_ids": [one["class_id"] for _, one in found],
        "labels": [one["label"] for _, one in found],
        "rows": [json.dumps(row) for row in rows],
    }
    outputs, binary = [], b""
    for tensor in asked.outputs or [Tensor(name=name) for name in OUTPUTS]:
        if tensor.name not in OUTPUTS:
            raise Problem(400, f"there is no output {tensor.name}: choose from {', '.join(OUTPUTS)}")
        _check_known(tensor.parameters, ("binary_data",), f"outputs.{tensor.name}.parameters")
        (kind, shape), value = OUTPUTS[tensor.name], values[tensor.name]
        output: dict[str, Any] = {"name": tensor.name, "datatype": kind, "shape": [len(value), *shape[1:]]}
        if tensor.parameters.get("binary_data", asked.parameters.get("binary_data_output")):
            raw = _raw(kind, value)
            output["parameters"] = {"binary_data_size": len(raw)}
            binary += raw
        else:
            output["data"] = [x for box in value for x in box] if tensor.name == "boxes" else value
        outputs.append(output)
    answer = {"model_name": "yolo", "model_version": "1", "outputs": outputs} | ({"id": asked.id} if asked.id else {})
    if not binary:
        return JSONResponse(answer)
    head = json.dumps(answer).encode()
    return Response(head + binary, media_type="application/octet-stream", headers={LENGTH: str(len(head))})


def _raw(kind: str, value: list[Any]) -> bytes:
    """A tensor's values in binary; NaN where a class has no box."""
    if kind == "BYTES":
        return b"".join(struct.pack("<I", len(one.encode())) + one.encode() for one in value)
    return np.array([[np.nan if x is None else x for x in np.atleast_1d(one)] for one in value], _NUMPY[kind]).tobytes()
