"""OpenAI's chat completions for PaliGemma: https://platform.openai.com/docs/api-reference/chat."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Path
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from serve.guard import Problem
from shardsight.models.paligemma.prompts import Prompt, PromptError

if TYPE_CHECKING:
    from serve.app import Door

STARTED = int(time.time())
# A grey picture, for /docs to try with.
EXAMPLE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAAAAACEICPDAAAAJ0lEQVR42u3MMREAAAgEoNfkRjeEmwcBqMlNRyAQCAQC"
    "gUAgEDwNFm0oAOBnO1pYAAAAAElFTkSuQmCC"
)


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


_ASKED = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": EXAMPLE}}]
_QUESTION = [{"role": "user", "content": _ASKED}]


class Completion(BaseModel):
    """What clients send that has no meaning for PaliGemma, as `user`, is ignored; what would change the answer and
    cannot be done is refused."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(examples=["paligemma"])
    messages: list[ChatMessage] = Field(min_length=1, examples=[_QUESTION])
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 by default: the likeliest token each time")
    logprobs: bool = False
    n: Literal[1] = 1


def add(api: FastAPI, door: "Door") -> None:
    """Add the endpoints."""
    names = [name for name in door.models if name != "yolo"]

    def known(name: str) -> str:
        if name.replace("-", " ") not in names:
            raise Problem(404, f"there is no model {name!r}: choose from {', '.join(listed) or 'none'}")
        return name.replace("-", " ")

    listed = [name.replace(" ", "-") for name in names]

    @api.get("/v1/models", summary="The PaliGemmas that may be asked")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in listed]}

    @api.get("/v1/models/{name}", summary="One of them")
    async def model(name: Annotated[str, Path(examples=["paligemma"])]) -> dict[str, Any]:
        known(name)
        return _model(name)

    @api.post("/v1/chat/completions", summary="Ask PaliGemma about a picture", response_model=None)
    async def completions(asked: Completion) -> JSONResponse | StreamingResponse:
        name = known(asked.model)
        text, image = _question(asked.messages)
        data = (await door.fetch(image))[1]
        frame = await door.frame(data, name)
        most = asked.max_completion_tokens or asked.max_tokens or door.arguments.max_tokens
        said = door.speak(name, frame, text, most, asked.temperature or 0.0, asked.stream)
        first = await anext(said)  # what cannot be asked fails here, while the status can still say so
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return StreamingResponse(_events(head, _all(first, said), asked), media_type="text/event-stream")
        last = [first, *[more async for more in said]][-1]
        choice = {"index": 0, "message": {"role": "assistant", "content": last["text"], "refusal": None}}
        choice |= {"finish_reason": last["finish_reason"], "logprobs": _logprobs(last, 0) if asked.logprobs else None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(last)})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "shardsight"}


def _question(messages: list[ChatMessage]) -> tuple[str, str]:
    """The last user's text and picture; PaliGemma knows neither roles nor turns."""
    message = messages[-1]
    if message.role != "user" or not isinstance(message.content, list):
        raise Problem(400, "the last message has to be the user's, with a text and an image_url")
    texts = [part.text for part in message.content if part.type == "text" and part.text]
    images = [part.image_url.url for part in message.content if part.image_url]
    if len(texts) != 1 or len(images) != 1:
        raise Problem(400, f"PaliGemma takes one text and one picture, not {len(texts)} and {len(images)}")
    try:
        return Prompt.of(texts[0]).text, images[0]
    except PromptError as error:
        raise Problem(400, str(error)) from None


async def _all(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    yield first
    async for said in rest:
        yield said


async def _events(head: dict[str, Any], saying: AsyncIterator[dict[str, Any]], asked: Completion) -> AsyncIterator[str]:
    """Server-sent events: what is new of the answer each time."""
    head = head | {"object": "chat.completion.chunk"}
    text, count, said = "", 0, {}
    yield _event(head, {"role": "assistant", "content": ""})
    async for said in saying:
        now = said["text"]
        if now.endswith("\ufffd") and not said["finish_reason"]:  # half a character
            continue
        new, logprobs = now.removeprefix(text), _logprobs(said, count) if asked.logprobs else None
        text, count = now, len(said["tokens"])
        if new or logprobs:
            yield _event(head, {"content": new}, logprobs=logprobs)
    yield _event(head, {}, said["finish_reason"])
    if asked.stream_options and asked.stream_options.include_usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(said)})}\n\n"
    yield "data: [DONE]\n\n"


def _event(head: dict[str, Any], delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **more}
    return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"


def _logprobs(said: dict[str, Any], start: int) -> dict[str, Any]:
    pairs = list(zip(said["tokens"], said["logprobs"], strict=True))[start:]
    return {
        "content": [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in pairs
        ],
        "refusal": None,
    }


def _usage(said: dict[str, Any]) -> dict[str, int]:
    prompt, completion = said["prompt_tokens"], len(said["tokens"])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
