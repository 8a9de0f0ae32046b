"""OpenAI's chat completions on a student: a program that asks the teacher so can ask the student instead, unchanged.

The student reads the comment alone. It is found in the last user message by taking off the task's own prompt around it.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, StrictBool, StrictInt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipeline.task.task import Task
from pipeline.task.tokenization import COMMENT_MARK
from student.serve.calls import results
from student.serve.errors import Refused
from student.serve.service import Result, Service


class Message(BaseModel):
    """One of the conversation."""

    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None  # one error is enough to refuse it


class StreamOptions(BaseModel):
    """What a stream holds besides."""

    include_usage: StrictBool = False


class ChatRequest(BaseModel):
    """What is read of OpenAI's request. Of the rest, sampling above all, nothing would change an answer."""

    messages: Annotated[list[Message], Field(fail_fast=True)]
    model: str = ""
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: StrictBool | StrictInt | None = None


class Usage(BaseModel):
    """Tokens of the comment and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The student's."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatCompletion(BaseModel):
    """An answer, exactly as the teacher would write it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


def router(service: Service) -> APIRouter:
    """The routes under `/v1`."""
    routes, created = APIRouter(prefix="/v1", tags=["as OpenAI's"]), int(time.time())

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The student, by the name of its task."""
        model = {"id": service.task.name, "object": "model", "created": created, "owned_by": "retort"}
        return {"object": "list", "data": [model]}

    @routes.post("/chat/completions", response_model=ChatCompletion)
    async def complete(request: Request, body: ChatRequest) -> Response:
        """Answers the last user message."""
        _require_possible(body)
        comment = comment_of(_last_user_text(body.messages), service.task)
        (result,) = await results(request, service, [comment])
        completion = _completion(result, service)
        if not body.stream:
            return JSONResponse(completion.model_dump())
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Response(_events(completion, usage), media_type="text/event-stream")

    return routes


def comment_of(message: str, task: Task) -> str:
    """What is left of a user message without the task's prompt; all of it, where that is not around it."""
    head, tail = (part.strip() for part in task.user_turn(COMMENT_MARK).split(COMMENT_MARK))
    text = message.strip()
    if len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail):
        return text[len(head) : len(text) - len(tail)]
    return message


def _require_possible(body: ChatRequest) -> None:
    if body.n not in (None, 1):
        raise Refused(400, "n: the student has one answer to a comment; ask for one", "n")
    if body.tools or body.functions:
        raise Refused(400, "tools: the student answers in its task's JSON and calls none; leave them out", "tools")
    if body.logprobs:
        raise Refused(400, "logprobs: not given here; POST /classify tells the share of every value", "logprobs")


def _last_user_text(messages: list[Message]) -> str:
    content = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if content is None:
        raise Refused(400, "messages: none of role user; the comment to answer is the last of them", "no_user_message")
    if isinstance(content, str):
        return content
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
        raise Refused(400, "messages: a part is no text; the student reads nothing else", "not_text")
    return "".join(part["text"] for part in content)


def _completion(result: Result, service: Service) -> ChatCompletion:
    if result.values is None:
        raise Refused(400, f"the task's filters set this comment aside ({result.row.set_aside})", result.row.status)
    text = service.task.render(tuple(result.values.values()))
    prompt, answer = len(result.row.tokens), len(service.compiled.tokenizer.encode([text])[0])
    taught = result.source == "teacher" and service.teacher
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=taught.name if taught else service.task.name,
        choices=[Choice(message=AnswerMessage(content=text))],
        usage=Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer),
    )


def _events(completion: ChatCompletion, usage: bool) -> str:
    """The same as server-sent events. They come all at once, as the answer does."""
    head = completion.model_dump(include={"id", "created", "model"}) | {"object": "chat.completion.chunk"}
    delta = completion.choices[0].message.model_dump()
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    if usage:
        chunks.append({"choices": [], "usage": completion.usage.model_dump()})
    lines = [json.dumps(head | chunk) for chunk in chunks]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
