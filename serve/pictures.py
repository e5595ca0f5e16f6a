"""A request's picture: the forms in which it may come, and its decoding as in the job."""

import asyncio
import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.arguments import Arguments, Body, Options, json_object, options
from serve.problem import Problem, too_large
from shardsight.decode.pictures import MAX_PIXELS, stored_size
from shardsight.models import selection
from shardsight.models.selection import ModelInfos
from shardsight.object_stores import Rejected, StorageError
from shardsight.row import ROW, frame_of
from shardsight.sources import Record
from shardsight.storage import Storage, is_remote

FIELD = "image"
LISTS = ("prompt", "classes")  # the options that may be given several times
# By the error type of decoding; every other type is a damaged picture, 422.
_STATUS = {"NotAnImage": 415, "TooManyPixels": 413}
_ACCEPTED = (
    f"send multipart/form-data with a file named '{FIELD}', the picture's bytes with a content-type of image/jpeg, "
    f"image/png, … or application/octet-stream, or application/json with an '{FIELD}'"
)
_NO_VIDEO = "videos are not annotated here: send single pictures, or give the video's frames to the job"


@dataclass(frozen=True)
class Pictures:
    """Reads and decodes the pictures of requests. storage: of those given by uri."""

    arguments: Arguments
    storage: Storage

    async def of(self, request: Request) -> tuple[str, bytes, Options]:
        """(name of the picture, its bytes, options of query and body). Raises Problem."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        query = _values(request.query_params)
        if kind == "multipart/form-data":
            name, data, given = await _form(request)
            return name, data, options(self.arguments, Options, _joined(query, given))
        if kind == "application/json":
            asked = options(self.arguments, Body, _joined(query, json_object(await request.body())))
            return *await self.fetch(asked.image), asked
        if kind.startswith("image/") or kind == "application/octet-stream":
            return "picture", await request.body(), options(self.arguments, Options, query)
        if kind.startswith("video/"):
            raise Problem(415, _NO_VIDEO)
        raise Problem(415, f"{kind or 'a body without a content-type'} is not read here: {_ACCEPTED}")

    async def fetch(self, image: str) -> tuple[str, bytes]:
        """(name, bytes) of a data uri, or of a picture under an allowed prefix. Raises Problem."""
        if image[:5].lower() == "data:":
            return "data:", _decode_data_uri(image)
        plain = is_remote(image) and not any(part in (".", "..") for part in image.split("/"))
        if not (plain and image.startswith(tuple(self.arguments.allowed_prefixes))):
            forms = "a data: uri (data:image/jpeg;base64,…), or an s3:// uri under a prefix that this server allows"
            raise Problem(422, f"image: expected {forms}")
        limit = self.arguments.max_bytes
        try:
            size = await asyncio.to_thread(self.storage.size, image)
            picture = await asyncio.to_thread(self.storage.read, image) if size <= limit else b""
        except (FileNotFoundError, PermissionError, IsADirectoryError, Rejected):
            raise Problem(422, "there is no picture of that name that this server may read") from None
        except StorageError:
            raise Problem(503, "the store of the picture cannot be reached", retry_after=5) from None
        if size > limit:
            raise too_large(limit)
        return image, picture

    async def row(self, name: str, data: bytes, models: ModelInfos, on: str = "image") -> dict[str, Any]:
        """Encoded bytes → a row with its frame, as the job makes it for these models. Raises Problem."""
        load = selection.loader(models, self.arguments.model_copy(update={"on": on}), self.storage)

        def decoded() -> dict[str, Any]:
            _check_pixels(data, self.arguments.max_pixels)
            return load.row(Record(None, 0, name, name, data))

        return without_error(await asyncio.to_thread(decoded))

    async def frame(self, data: bytes, models: ModelInfos) -> np.ndarray:
        """Encoded bytes → RGB uint8 (h, w, 3). Raises Problem."""
        row = await self.row("picture", data, models)
        return frame_of(row["frame"], row["frame_height"], row["frame_width"])


def without_error(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself. Raises Problem, with the public row in it, where the row has an error."""
    if (error := row["error"]) is None:
        return row
    raise Problem(_STATUS.get(error["type"], 422), error["message"], row=public(row))


def public(row: dict[str, Any]) -> dict[str, Any]:
    """A row's columns that clients see."""
    return {name: row.get(name) for name in ROW.names}


def decode_base64(text: str) -> bytes:
    """Standard or URL-safe, with or without line breaks and padding. Raises ValueError."""
    plain = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _decode_data_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    try:
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ValueError
        return decode_base64(unquote_to_bytes(data).decode("ascii") if "%" in data else data)
    except ValueError:
        raise Problem(422, "the data uri is not data:image/…;base64,…") from None


async def _form(request: Request) -> tuple[str, bytes, dict[str, Any]]:
    """The picture's name and bytes, and the other fields. Raises Problem."""
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=64 << 10) as form:
            upload = form.get(FIELD)
            if not isinstance(upload, UploadFile):
                raise _no_picture(form)
            if (upload.content_type or "").lower().startswith("video/"):
                raise Problem(415, _NO_VIDEO)
            # With ? for lone surrogates, which a form in UTF-7 can have and JSON in UTF-8 cannot.
            name = (upload.filename or "picture").encode(errors="replace").decode()
            fields = FormData([(field, value) for field, value in form.multi_items() if field != FIELD])
            return name, await upload.read(), _values(fields)
    except HTTPException as error:
        raise Problem(error.status_code, f"the form cannot be read: {error.detail}") from None
    except ValueError as error:  # a UnicodeError among them, of bytes that are not in the form's charset
        raise Problem(400, f"the form cannot be read: {error}") from None


def _no_picture(form: FormData) -> Problem:
    files = [name for name, value in form.multi_items() if isinstance(value, UploadFile)]
    if FIELD in form:
        return Problem(422, f"{FIELD} is text in this form: send a file, as curl --form {FIELD}=@FILE does")
    if "video" in form:
        return Problem(415, _NO_VIDEO)
    found = f": its file is named {files[0]!r}" if files else ""
    return Problem(422, f"the form lacks a file named {FIELD!r}{found}")


def _values(given: QueryParams | FormData) -> dict[str, Any]:
    """LISTS as lists, all else as single values. Raises Problem."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(given):
        values = given.getlist(name)
        if name not in LISTS and len(values) > 1:
            raise Problem(422, f"{name}: given {len(values)} times, expected once")
        found[name] = values if name in LISTS else values[0]
    return found


def _joined(query: Mapping[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    if both := sorted(set(query) & set(body)):
        raise Problem(422, f"{both[0]}: given in the query and in the body, expected once")
    return {**query, **body}


def _check_pixels(data: bytes, limit: int) -> None:
    """By the picture's header alone. Without a readable header, the decoder refuses it. Raises Problem."""
    width, height = stored_size(data) or (0, 0)
    if limit < width * height <= MAX_PIXELS:  # beyond MAX_PIXELS, decoding makes an error row of it, as in the job
        raise Problem(413, f"{width}×{height} pixels; at most {limit:,} are decoded here")
