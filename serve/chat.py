"""OpenAI's chat completions for PaliGemma: https://platform.openai.com/docs/api-reference/chat."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.arguments import EXAMPLE, as_list, body_schema, checked, json_object, no_query
from serve.problem import Problem
from serve.service import Gateway
from shardsight.models.paligemma.prompts import Prompt, PromptError, Sampling

STARTED = int(time.time())
LIMITS = """One user message with one text and one picture, a `data:` uri or an `s3://`, `gs://` or `az://` uri under \
an allowed prefix; PaliGemma was trained without system messages and without several turns.

The text is one of PaliGemma's forms: `caption en`, `ocr`, `answer en QUESTION`, `detect a ; b`, `segment a`, or free \
text for models of PaliGemma 2 mix.

The parameters below are honoured. Those that cannot change the answer (`user`, `metadata`, `service_tier`, …) are \
accepted, and so are default values of others (`n: 1`, `tools: []`, …). All else is refused by name."""
# Parameters that cannot change the answer.
NEUTRAL = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Parameters that are not implemented, with the values, besides null, that are accepted as they ask for nothing.
UNUSED: dict[str, list[Any]] = {
    "n": [1], "top_logprobs": [0], "presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}],
    "response_format": [{"type": "text"}], "modalities": [["text"]],
    "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none", "auto"],
    "store": [False], "reasoning_effort": ["none"], "verbosity": ["medium"],
    "audio": [], "prediction": [], "web_search_options": [],
}  # fmt: skip


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
    def _check_role(cls, value: Any) -> Any:
        role = value.get("role") if isinstance(value, dict) else None
        if isinstance(role, str) and role != "user":
            raise ValueError(f"PaliGemma takes no {role[:40]} messages: send one user message")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("PaliGemma takes one text and one picture: give a list of a text and an image_url")
        return value


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding of events: accepted, not done


_ASKED = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": EXAMPLE}}]
_QUESTION = [{"role": "user", "content": _ASKED}]


class Completion(_Strict):
    """The parameters of a chat completion that are honoured."""

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

    _list = field_validator("stop", mode="before")(as_list)

    @model_validator(mode="before")
    @classmethod
    def _check_unused(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, nothing in UNUSED.items():
            if (given := value.get(name)) is not None and given not in nothing:
                raise ValueError(f"{name}: {json.dumps(given)[:100]} is not supported with PaliGemma: leave it out")
        return {name: given for name, given in value.items() if name not in NEUTRAL and name not in UNUSED}

    @field_validator("stream_options")
    @classmethod
    def _check_stream(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("allowed only with stream: true")
        return value

    def sampling(self, limit: int) -> Sampling:
        """limit: of max_tokens on this server. Raises Problem."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (getattr(self, name) or 0) > limit:
                raise Problem(400, f"{name}: at most {limit} on this server, not {getattr(self, name)}")
        tokens, top_p = self.max_completion_tokens or self.max_tokens, 1.0 if self.top_p is None else self.top_p
        return Sampling(tokens, self.temperature or 0.0, top_p, self.seed, tuple(self.stop or ()))


def add(api: FastAPI, gateway: Gateway) -> None:
    """Add the endpoints."""
    names = {name.replace(" ", "-"): name for name in gateway.models if name != "yolo"}

    def known(name: str) -> str:
        if name not in names:
            raise Problem(404, f"there is no model {name!r}: choose from {', '.join(names) or 'none'}")
        return names[name]

    @api.get("/v1/models", summary="The PaliGemma models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in names]}

    @api.get("/v1/models/{name}", summary="One of them")
    async def model(name: Annotated[str, Path(examples=["paligemma"])]) -> dict[str, Any]:
        known(name)
        return _model(name)

    path = "/v1/chat/completions"
    content = {"application/json": {"schema": body_schema(Completion, path)}}

    @api.post(
        path,
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
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            parts = gateway.generate(name, frame, text, sampling)
            first = await anext(parts)  # a refusal is raised here, before the response has begun
            return StreamingResponse(_events(head, first, parts, asked), media_type="text/event-stream")
        last = await gateway.whole(name, frame, text, sampling)
        choice = {"index": 0, "message": {"role": "assistant", "content": last["text"], "refusal": None}}
        choice |= {"finish_reason": last["finish_reason"], "logprobs": _logprobs(last, 0) if asked.logprobs else None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(last)})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "shardsight"}


def _question(messages: list[ChatMessage]) -> tuple[str, str]:
    """The text and the picture of the one message. Raises Problem."""
    if len(messages) != 1:
        raise Problem(400, f"messages: PaliGemma answers one message without a history, not {len(messages)}")
    content = messages[0].content
    texts = [part.text for part in content if part.type == "text" and part.text]
    images = [part.image_url.url for part in content if part.type == "image_url" and part.image_url]
    if len(texts) != 1 or len(images) != 1 or len(content) != 2:
        found = f"{len(texts)} and {len(images)} of {len(content)} parts"
        raise Problem(400, f"messages: PaliGemma takes one text and one picture, not {found}")
    try:
        return Prompt.of(texts[0]).text, images[0]
    except PromptError as error:
        raise Problem(400, str(error)) from None


async def _events(
    head: dict[str, Any], first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], asked: Completion
) -> AsyncIterator[str]:
    """Server-sent events, each with what the answer has gained. first, rest: the parts of Gateway.generate."""
    head = head | {"object": "chat.completion.chunk"}
    text, count, part, following = "", 0, first, first
    yield _event(head, {"role": "assistant", "content": ""})
    while following:
        part = following
        if part["finish_reason"] or not part["text"].endswith("\ufffd"):  # else its last character is incomplete
            new, logprobs = part["text"].removeprefix(text), _logprobs(part, count) if asked.logprobs else None
            text, count = part["text"], len(part["tokens"])
            if new or logprobs:
                yield _event(head, {"content": new}, logprobs=logprobs)
        following = await anext(rest, {})
    yield _event(head, {}, part["finish_reason"])
    if asked.stream_options and asked.stream_options.include_usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(part)})}\n\n"
    yield "data: [DONE]\n\n"


def _event(head: dict[str, Any], delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **more}
    return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"


def _logprobs(part: dict[str, Any], start: int) -> dict[str, Any]:
    pairs = zip(part["tokens"][start:], part["logprobs"][start:], strict=True)
    content = [{"token": token, "logprob": p, "bytes": list(token.encode()), "top_logprobs": []} for token, p in pairs]
    return {"content": content, "refusal": None}


def _usage(part: dict[str, Any]) -> dict[str, int]:
    prompt, completion = part["prompt_tokens"], len(part["tokens"])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
