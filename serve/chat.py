"""OpenAI's chat completions for PaliGemma: https://platform.openai.com/docs/api-reference/chat."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.arguments import EXAMPLE, checked, json_object, no_query
from serve.guard import Problem
from serve.service import Gateway, Sampling
from shardsight.models.paligemma.prompts import Prompt, PromptError

STARTED = int(time.time())
LIMITS = """One user message with one text and one picture, a `data:` uri or an `s3://` uri under an allowed prefix; \
PaliGemma was trained without system messages and without several turns.

The text is one of PaliGemma's forms: `caption en`, `ocr`, `answer en QUESTION`, `detect a ; b`, `segment a`, or free \
text for models of PaliGemma 2 mix.

Of the protocol's parameters, those below are honoured; those that cannot change the answer (as `user`, `metadata`, \
`service_tier`) are accepted, and so are values that ask for nothing (as `n: 1`, `tools: []`); all others are refused \
by name."""
# Parameters that cannot change the answer.
NEUTRAL = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Parameters that this server does not implement, with the values besides null that ask for nothing.
UNUSED: dict[str, list[Any]] = {
    "n": [1],
    "top_logprobs": [0],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "store": [False],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto"] | None = Field(None, description="the model has one resolution: auto alone")


class Part(_Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(_Strict):
    role: Literal["user"]
    content: list[Part]

    @model_validator(mode="before")
    @classmethod
    def _of_a_user(cls, value: Any) -> Any:
        role = value.get("role") if isinstance(value, dict) else None
        if isinstance(role, str) and role != "user":
            raise ValueError(f"PaliGemma takes no {role[:40]} messages: send one user message")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _with_a_picture(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("PaliGemma takes one text and one picture: give a list of a text and an image_url")
        return value


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads events, which changes no answer


_ASKED = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": EXAMPLE}}]
_QUESTION = [{"role": "user", "content": _ASKED}]


class Completion(_Strict):
    """A chat completion's parameters that are honoured."""

    model: str = Field(examples=["paligemma"])
    messages: list[ChatMessage] = Field(min_length=1, examples=[_QUESTION])
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 by default: the likeliest token each time")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same answer")
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, max_length=4, description="a text, or up to four, before which the answer ends"
    )
    logprobs: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _unused(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, nothing in UNUSED.items():
            if (given := value.get(name)) is not None and given not in nothing:
                raise ValueError(f"{name}: {json.dumps(given)[:100]} is not supported with PaliGemma: leave it out")
        return {name: given for name, given in value.items() if name not in NEUTRAL and name not in UNUSED}

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("allowed with stream: true alone")
        return value

    def sampling(self, most: int) -> Sampling:
        """most: tokens of an answer on this server. Raises Problem."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (getattr(self, name) or 0) > most:
                raise Problem(400, f"{name}: at most {most} on this server, not {getattr(self, name)}")
        limit, top_p = self.max_completion_tokens or self.max_tokens or most, 1.0 if self.top_p is None else self.top_p
        return Sampling(limit, self.temperature or 0.0, top_p, self.seed, tuple(self.stop or ()))


def add(api: FastAPI, gateway: Gateway) -> None:
    """Add the endpoints."""
    names = [name for name in gateway.models if name != "yolo"]
    listed = [name.replace(" ", "-") for name in names]

    def known(name: str) -> str:
        if name not in listed:
            raise Problem(404, f"there is no model {name!r}: choose from {', '.join(listed) or 'none'}")
        return names[listed.index(name)]

    @api.get("/v1/models", summary="The PaliGemmas that may be asked")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in listed]}

    @api.get("/v1/models/{name}", summary="One of them")
    async def model(name: Annotated[str, Path(examples=["paligemma"])]) -> dict[str, Any]:
        known(name)
        return _model(name)

    content = {"application/json": {"schema": _inlined(Completion.model_json_schema())}}

    @api.post(
        "/v1/chat/completions",
        summary="Ask PaliGemma about a picture",
        description=LIMITS,
        response_model=None,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def completions(request: Request) -> JSONResponse | StreamingResponse:
        no_query(request.query_params, 400)
        asked = checked(Completion, json_object(await request.body(), 400), 400)
        name, sampling = known(asked.model), asked.sampling(gateway.arguments.max_tokens)
        text, image = _question(asked.messages)
        frame = await gateway.pictures.frame((await gateway.pictures.fetch(image))[1], {name: gateway.models[name]})
        parts = gateway.generate(name, frame, text, sampling, bool(asked.stream))
        first = await anext(parts)  # what cannot be asked fails here, while the status can still say so
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return StreamingResponse(_events(head, _all(first, parts), asked), media_type="text/event-stream")
        last = [first, *[part async for part in parts]][-1]
        choice = {"index": 0, "message": {"role": "assistant", "content": last["text"], "refusal": None}}
        choice |= {"finish_reason": last["finish_reason"], "logprobs": _logprobs(last, 0) if asked.logprobs else None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(last)})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "shardsight"}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references, which would be looked for in the whole document."""
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in node.items()}

    found: dict[str, Any] = inlined(schema)
    return found


def _question(messages: list[ChatMessage]) -> tuple[str, str]:
    """The text and the picture of the one message. Raises Problem."""
    if len(messages) != 1:
        raise Problem(400, f"messages: PaliGemma answers one message without a history, not {len(messages)}")
    content = messages[0].content
    texts = [part.text for part in content if part.type == "text" and part.text]
    images = [part.image_url.url for part in content if part.type == "image_url" and part.image_url]
    if len(texts) != 1 or len(images) != 1 or len(content) != 2:
        raise Problem(
            400,
            f"messages: PaliGemma takes one text and one picture, not {len(texts)} and {len(images)} of "
            f"{len(content)} parts",
        )
    try:
        return Prompt.of(texts[0]).text, images[0]
    except PromptError as error:
        raise Problem(400, str(error)) from None


async def _all(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    yield first
    async for part in rest:
        yield part


async def _events(head: dict[str, Any], parts: AsyncIterator[dict[str, Any]], asked: Completion) -> AsyncIterator[str]:
    """Server-sent events: what is new of the answer each time."""
    head = head | {"object": "chat.completion.chunk"}
    text, count, said = "", 0, {}
    yield _event(head, {"role": "assistant", "content": ""})
    async for said in parts:
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
