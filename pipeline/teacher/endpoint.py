"""A teacher behind an OpenAI-compatible API: a chat completion an answer, with the likeliest other tokens if it lists them."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from pipeline.base import storage
from pipeline.base.errors import UserError, clip
from pipeline.config import TeacherConfig
from pipeline.task.task import Task
from pipeline.task.values import Scalar, Values
from pipeline.teacher.alternatives import Step, value_shares
from pipeline.teacher.usage import Usage

log = logging.getLogger(__name__)

ALTERNATIVES = 20  # to each token: what OpenAI gives at most
RETRIES, TIMEOUT = 6, 120.0  # of the client, which waits longer each time, or as long as the server asks; seconds
SPARE = 64  # tokens that an answer may take beyond the characters of the longest
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


@dataclass(frozen=True)
class Reply:
    """What one call gave.

    Attributes:
        values: of the answer; None where it is none of the task's.
        shares: of each value of each field; None where the endpoint lists no alternatives.
        reason: why there are no values.
    """

    values: Values | None
    shares: list[list[float]] | None
    reason: str
    usage: Usage


class Endpoint:
    """Asks one task's question.

    Raises:
        UserError: the URL holds credentials, or is none.
    """

    def __init__(self, model: str, config: TeacherConfig, task: Task) -> None:
        url = str(config.url)
        if not url.startswith(("http://", "https://")):
            raise UserError(f"teacher.url is {url!r}: give the address of an OpenAI-compatible API, as https://host/v1")
        storage.refuse_credentials(url)
        key = os.environ.get(config.key) or "none"  # servers of one's own ask for none
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        self._task, self._url = task, url
        self._model = model
        self._optional: dict[str, Any] = {
            "temperature": config.temperature,
            "seed": None,
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
            "response_format": {"type": "json_schema", "json_schema": _schema(task)},
            "max_tokens": SPARE + task.longest,
        }
        if task.template:  # what vLLM and others take beside OpenAI's options
            self._optional["extra_body"] = {"chat_template_kwargs": task.template}

    def bound(self, most_tokens: int) -> Usage:
        """About the most that a call takes for a text of at most so many tokens."""
        known = sum(len(text.encode()) for _, text in self._task.turns(""))
        return Usage(1, known + 4 * most_tokens, SPARE + self._task.longest)

    async def ask(self, text: str, seed: int) -> Reply:
        """One call. What the server refuses of what is not needed is left out from then on.

        Raises:
            openai.APIError: the call failed, with all its retries.
            ValueError: what came back is no JSON.
            UserError: no other call would do better: a wrong key, model or address, or an unknown certificate.
        """
        messages = [{"role": role, "content": turn} for role, turn in self._task.turns(text)]
        create: Any = self._client.chat.completions.create  # whose types know no options that may be left out
        while True:
            options = {name: seed if name == "seed" else value for name, value in self._optional.items()}
            try:
                return self._read(await create(model=self._model, messages=messages, **options))
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UserError(f"{self._url} refuses the calls: {clip(str(error), 300)}") from error
            except openai.APIConnectionError as error:
                if "CERTIFICATE_VERIFY_FAILED" not in str(error.__cause__):
                    raise
                raise UserError(
                    f"{self._url} shows a certificate that nobody here vouches for: {clip(str(error.__cause__), 200)}. Name "
                    "the file of one's own authority in $SSL_CERT_FILE"
                ) from error
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._leave_out(str(error)):
                    raise

    def _leave_out(self, said: str) -> bool:
        """Leaves out what a server's refusal names; false where it names nothing that could be."""
        refused = [name for name in self._optional if name.removeprefix("top_") in said or name in said]
        for name in refused:
            del self._optional[name]
        if refused:
            log.warning("%s takes no %s: asking without", self._url, " and no ".join(refused))
        return bool(refused)

    def _read(self, done: Any) -> Reply:
        if not isinstance(done, ChatCompletion) or not done.choices:
            return Reply(None, None, f"the endpoint gave no completion: {clip(str(done), 200)}", Usage(1))
        choice, usage = done.choices[0], done.usage
        paid = Usage(1, usage.prompt_tokens, usage.completion_tokens) if usage else Usage(1)
        said = choice.message.content or ""
        if choice.message.refusal or choice.finish_reason == "content_filter":
            return Reply(None, None, f"the endpoint refused: {clip(choice.message.refusal or choice.finish_reason, 200)}", paid)
        values = self._task.fit(said[said.find("{") : said.rfind("}") + 1])
        if values is None:
            cut = ", which was cut for its length" if choice.finish_reason == "length" else ""
            return Reply(None, None, f"the answer does not fit the task: {clip(said, 200)!r}{cut}", paid)
        steps = _steps(choice)
        return Reply(values, value_shares(self._task, values, steps) if steps else None, "", paid)


def _steps(choice: Any) -> list[Step]:
    """The tokens with their alternatives; none where an endpoint does not give them."""
    given = (choice.logprobs and choice.logprobs.content) or []
    return [
        Step(_bytes(step), {_bytes(other): math.exp(other.logprob) for other in [*step.top_logprobs, step]}) for step in given
    ]


def _bytes(token: Any) -> bytes:
    """A token as it is: its text cannot show half a character."""
    return token.token.encode() if token.bytes is None else bytes(token.bytes)


def _schema(task: Task) -> dict[str, Any]:
    """The task as JSON Schema, in the strict form that OpenAI asks for."""
    fields = {name: _values(values) for name, values in task.fields.items()}
    for name, rule in task.lists.items():
        bounds = {"minItems": rule.min, "maxItems": rule.most(len(task.fields[name]))}
        fields[name] = {"type": "array", "items": fields[name], **bounds}
    return {"name": "answer", "schema": _object(task.nested(fields), set(map(task.path, fields))), "strict": True}


def _values(values: list[Scalar]) -> dict[str, Any]:
    return {"type": list(dict.fromkeys(JSON_TYPES[type(value)] for value in values)), "enum": values}


def _object(members: dict[str, Any], fields: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of the schemas of fields, by their paths, and of objects of such."""
    properties = {
        name: member if (*path, name) in fields else _object(member, fields, (*path, name)) for name, member in members.items()
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
