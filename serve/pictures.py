"""A request's picture or video: the forms in which it may come; and the decoding of pictures as in the job."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.arguments import STORES, Arguments, Body, Options, VideoBody, VideoOptions, json_object, options
from serve.problem import Problem, too_large
from shardsight.decode.pictures import MAX_PIXELS, stored_size
from shardsight.models import selection
from shardsight.models.selection import ModelInfos
from shardsight.object_stores import Rejected, StorageError
from shardsight.row import ROW, frame_of
from shardsight.sources import Record
from shardsight.storage import Storage, is_remote

IMAGE, VIDEO = FIELDS = "image", "video"
LISTS = ("prompt", "classes")  # the options that may be given several times
# By the error type of decoding; every other type is a damaged picture or video, 422.
STATUS = {"NotAnImage": 415, "NotAVideo": 415, "TooManyPixels": 413, "TooManySeconds": 413, "TooManyFrames": 413}
_ACCEPTED = (
    f"send multipart/form-data with a file named '{IMAGE}' or '{VIDEO}', a picture's bytes with a content-type of "
    f"image/jpeg, image/png, … or application/octet-stream, a video's with one of video/mp4, …, or application/json "
    f"with an '{IMAGE}' or a '{VIDEO}'"
)


@dataclass(frozen=True)
class Asked:
    """A picture, or with VideoOptions a video: its name, its bytes and how it is processed."""

    name: str
    data: bytes
    options: Options


@dataclass(frozen=True)
class Pictures:
    """Reads the pictures and videos of requests, and decodes pictures. storage: of those given by uri."""

    arguments: Arguments
    storage: Storage

    async def of(self, request: Request) -> Asked:
        """What a request asks about, with the options of its query and body. Raises Problem."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        query = _values(request.query_params)
        if kind == "multipart/form-data":
            async with _form(request) as (form, field):
                return await self._uploaded(form, field, query)
        if kind == "application/json":
            given = _joined(query, json_object(await request.body()))
            if VIDEO in given and IMAGE not in given:
                video = options(self.arguments, VideoBody, given)
                return Asked(*await self.fetch(video.video, VIDEO), video)
            picture = options(self.arguments, Body, given)
            return Asked(*await self.fetch(picture.image), picture)
        if kind.startswith("image/") or kind == "application/octet-stream":
            data = self._limited(await request.body(), IMAGE)
            return Asked("picture", data, options(self.arguments, Options, query))
        if kind.startswith("video/"):
            return Asked("video", await request.body(), options(self.arguments, VideoOptions, query))
        raise Problem(415, f"{kind or 'a body without a content-type'} is not read here: {_ACCEPTED}")

    async def _uploaded(self, form: FormData, field: str, query: dict[str, Any]) -> Asked:
        """The file of a form. Raises Problem."""
        upload = form[field]
        assert isinstance(upload, UploadFile)
        if (upload.size or 0) > self._limit(field):
            raise too_large(self._limit(field))
        # With ? for lone surrogates, which a form in UTF-7 can have and JSON in UTF-8 cannot.
        name = (upload.filename or ("picture" if field == IMAGE else "video")).encode(errors="replace").decode()
        given = _joined(query, _values(FormData([one for one in form.multi_items() if one[0] != field])))
        asked = options(self.arguments, Options if field == IMAGE else VideoOptions, given)
        return Asked(name, await upload.read(), asked)

    def _limit(self, field: str) -> int:
        return self.arguments.max_bytes if field == IMAGE else self.arguments.max_video_bytes

    def _limited(self, data: bytes, field: str) -> bytes:
        if len(data) > self._limit(field):
            raise too_large(self._limit(field))
        return data

    async def fetch(self, uri: str, field: str = IMAGE) -> tuple[str, bytes]:
        """(name, bytes) of a data uri, or of a picture or video under an allowed prefix. Raises Problem."""
        if uri[:5].lower() == "data:":
            return "data:", self._limited(_decode_data_uri(uri), field)
        plain = is_remote(uri) and not any(part in (".", "..") for part in uri.split("/"))
        if not (plain and uri.startswith(tuple(self.arguments.allowed_prefixes))):
            kind = "image/jpeg" if field == IMAGE else "video/mp4"
            forms = f"a data: uri (data:{kind};base64,…), or an {STORES} uri under a prefix that this server allows"
            raise Problem(422, f"{field}: expected {forms}")
        limit = self._limit(field)
        what = "picture" if field == IMAGE else field
        try:
            size = await asyncio.to_thread(self.storage.size, uri)
            data = await asyncio.to_thread(self.storage.read, uri) if size <= limit else b""
        except (FileNotFoundError, PermissionError, IsADirectoryError, Rejected):
            raise Problem(422, f"there is no {what} of that name that this server may read") from None
        except StorageError:
            raise Problem(503, f"the store of the {what} cannot be reached", retry_after=5) from None
        if size > limit:
            raise too_large(limit)
        return uri, data

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
    raise Problem(STATUS.get(error["type"], 422), error["message"], row=public(row))


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
        raise Problem(422, "the data uri is not data:image/…;base64,… or data:video/…;base64,…") from None


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[tuple[FormData, str]]:
    """A form, and which of its fields is the file. Raises Problem."""
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=64 << 10) as form:
            field = next((name for name in FIELDS if isinstance(form.get(name), UploadFile)), None)
            if field is None:
                raise _no_file(form)
            if field == IMAGE and (form[field].content_type or "").lower().startswith("video/"):  # type: ignore
                raise Problem(415, f"{IMAGE} is a video: send it as {VIDEO}, as curl --form {VIDEO}=@FILE does")
            yield form, field
    except HTTPException as error:
        raise Problem(error.status_code, f"the form cannot be read: {error.detail}") from None
    except ValueError as error:  # a UnicodeError among them, of bytes that are not in the form's charset
        raise Problem(400, f"the form cannot be read: {error}") from None


def _no_file(form: FormData) -> Problem:
    files = [name for name, value in form.multi_items() if isinstance(value, UploadFile)]
    for field in FIELDS:
        if field in form:
            return Problem(422, f"{field} is text in this form: send a file, as curl --form {field}=@FILE does")
    found = f": its file is named {files[0]!r}" if files else ""
    return Problem(422, f"the form lacks a file named {IMAGE!r} or {VIDEO!r}{found}")


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
