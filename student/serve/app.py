"""The web application: the page, `/classify`, what watches it, and OpenAI's API."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from fastapi import Body, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, Response

from pipeline.base.errors import UserError
from student.serve import openai
from student.serve.calls import results
from student.serve.errors import ErrorBody, add_handlers
from student.serve.guard import Guard
from student.serve.messages import EXAMPLES, ClassifyRequest, ClassifyResponse, TaskBody, result_body, task_body
from student.serve.metrics import Measured
from student.serve.service import Service
from student.serve.turns import Pieces

PAGE = Path(__file__).with_name("page.html")

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused: it is wrong, too large, or one too many."},
    "5XX": {"model": ErrorBody, "description": "The service fails, takes too long, or is stopping."},
}


def create_app(service: Service) -> FastAPI:
    """The application around a service.

    Raises:
        UserError: the variable that should hold its key does not.
    """
    # The usual pages over /openapi.json would load their scripts from elsewhere.
    app = FastAPI(title=f"Retort: {service.task.name}", docs_url=None, redoc_url=None, responses=ERRORS)
    add_handlers(app)
    app.add_middleware(Guard, config=service.config, turns=service.turns, key=_key(service.config.key))
    app.add_middleware(Measured, metrics=service.metrics)
    _add_routes(app, service)
    _add_pages(app, service)
    app.include_router(openai.router(service))
    return app


def _key(variable: str | None) -> str | None:
    """What callers must send."""
    if variable and not os.environ.get(variable):
        raise UserError(f"serve.key: the environment variable {variable} holds no key")
    return os.environ[variable] if variable else None


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/classify", response_model=ClassifyResponse)
    async def classify(request: Request, body: ClassifyRequest = Body(examples=EXAMPLES)) -> Response:  # noqa: B008 - FastAPI's way
        """Answers one text or several."""
        found = await results(request, service, body.all_texts, body.probabilities, body.teacher)
        # as it is: to validate our own answer takes longer than to make it
        bodies = (result_body(result, body, service.task) for result in found)
        return Pieces(await service.turns.encode('{"results":[', bodies, "]}"))

    @app.get("/task")
    async def task() -> TaskBody:
        """What the student does, and the limits of a request."""
        return task_body(service)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 while requests are welcome, 503 when the service is stopping."""
        status, code = ("stopping", 503) if service.draining else ("ready", 200)
        return JSONResponse({"status": status}, code)

    @app.get("/metrics")
    async def metrics() -> Response:
        """In Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI, service: Service) -> None:
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page)}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _policy(page: str) -> str:
    """Lets a browser run and apply what is written in the page, and ask this service; nothing else."""
    inline = {tag: re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("script", "style")}
    allowed = [f"{tag}-src {' '.join(map(_digest, texts))}" for tag, texts in inline.items()]
    rest = ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return "; ".join(["default-src 'none'", *allowed, *rest])


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
