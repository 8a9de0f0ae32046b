"""An OpenAI-compatible API on loopback that knows one rule, counts what it was paid for, and fails when it is told to.

    python -m tests.integration.api PORT COUNTS [FAULTS [CERTIFICATE]]

COUNTS is a file with a line for each answer that was sent whole: its text. FAULTS is the share of calls that go wrong: late,
no JSON, cut, none of the task's values, refused for their rate, an error of the server, a connection that breaks. With a
certificate and its key in one file, it speaks HTTPS.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import ssl
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

ANSWERS = ("good", "bad")
SURE = 0.8  # how likely the answer is; the other has the rest
TOKENS = (7, 3)  # tokens of each call that are read and written


class Api:
    """What it has done so far."""

    def __init__(self, counts: Path, faults: float, refused: tuple[str, ...] = ()) -> None:
        self._counts, self._faults, self._refused = counts, faults, refused
        self._calls: dict[str, int] = {}
        self.keys: set[str] = set()

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One chat completion."""
        asked = await request.json()
        self.keys.add(request.headers.get("Authorization", ""))
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        named = [name for name in self._refused if name in asked]
        if named:
            return web.json_response({"error": {"message": f"{named[0]} is not supported"}}, status=400)
        text = asked["messages"][-1]["content"].rsplit("\n", 1)[-1]
        fault = self._fault(text)
        if fault == "late":
            await asyncio.sleep(0.3)
        elif fault in ("rate", "error"):
            status = 429 if fault == "rate" else 500
            return web.json_response({"error": {"message": fault}}, status=status, headers={"Retry-After": "0.01"})
        elif fault == "garbage":
            return web.Response(text='{"choices": [', content_type="application/json")
        elif fault == "empty":
            return web.json_response({"choices": []})
        elif fault == "broken" and request.transport:
            request.transport.close()
            return web.Response()
        response = web.json_response(self._completion(text, fault, asked))
        with self._counts.open("a") as stream:
            stream.write(text + "\n")
        return response

    def _fault(self, text: str) -> str:
        self._calls[text] = self._calls.get(text, 0) + 1
        number = int.from_bytes(hashlib.sha256(f"{text} {self._calls[text]}".encode()).digest()[:4], "big") / 2**32
        kinds = ("late", "wrong", "cut", "foreign", "rate", "error", "broken", "garbage", "empty")
        return kinds[int(number / self._faults * len(kinds))] if number < self._faults else ""

    def _completion(self, text: str, fault: str, asked: dict[str, Any]) -> dict[str, Any]:
        taken = ANSWERS["bad" in text]
        content = {"wrong": "I am sorry", "cut": '{"mood": "go', "foreign": '{"mood": "so-so"}'}.get(
            fault, json.dumps({"mood": taken})
        )
        listed = [{"token": part, "bytes": None} for part in ('{"mood": "', taken, '"}')] if not fault else []
        for item, (token, share) in zip(listed, ((0, 1.0), (1, SURE), (2, 1.0)), strict=False):
            other = ANSWERS[taken == "good"] if token == 1 else "x"
            both = ((item["token"], share), (other, max(1 - share, 1e-9)))
            item |= {"logprob": math.log(share)}
            item["top_logprobs"] = [{"token": name, "bytes": None, "logprob": math.log(p)} for name, p in both]
        choice = {
            "index": 0,
            "finish_reason": "length" if fault == "cut" else "stop",
            "message": {"role": "assistant", "content": content},
            "logprobs": {"content": listed} if asked.get("logprobs") else None,
        }
        usage = {"prompt_tokens": TOKENS[0], "completion_tokens": TOKENS[1], "total_tokens": sum(TOKENS)}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


if __name__ == "__main__":
    port, counts, *given = sys.argv[1:]
    faults, certificate = [*given, *("0", "")[len(given) :]]
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if certificate else None
    if tls:
        tls.load_cert_chain(certificate)
    web.run_app(Api(Path(counts), float(faults)).app(), host="127.0.0.1", port=int(port), print=None, ssl_context=tls)
