"""`retort serve`: the process around the application, which ends without dropping a request."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import ssl
from functools import partial
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER

from pipeline.base import storage
from pipeline.base.console import say
from pipeline.base.errors import UserError
from pipeline.base.signals import STOPPED
from pipeline.task.compiled import CompiledTask
from student.config import ServeConfig, StudentSettings
from student.decode.answerer import Answerer
from student.evaluate.evidence import EVIDENCE, load_evidence, thresholds_of
from student.model.checkpoint import load_student
from student.predict.predict import taught_as
from student.predict.teacher import Teacher, make_teacher
from student.serve.app import create_app
from student.serve.connection import Connection
from student.serve.drift import Drift
from student.serve.pool import AnswererPool
from student.serve.service import Service
from student.serve.taught import SHARDS, KeptTeacher

KEEP_ALIVE = 75  # seconds of an idle connection: more than clients keep theirs, or both would take the last moment for theirs
LINGER = 0.5  # seconds in which a request already on its way over an idle connection may arrive
LOOK = 0.02  # seconds between two looks at the connections


def serve(config: StudentSettings, student_folder: str, folder: str | None = None) -> None:
    """Serves a student until a signal ends it.

    Args:
        folder: where the teacher's answers are kept, and what audits find; None keeps nothing.

    Raises:
        UserError: no student, a teacher that does not fit it, a port that cannot be had, or requests that were left without an
            answer when it ended.
    """
    settings = config.serve
    if settings.audit and config.answer.teacher is None:
        raise UserError("an audit asks a teacher: name it (--teacher)")
    if settings.audit and folder:
        if storage.is_uri(folder):
            raise UserError(f"audits are kept on a disk, one line each, and {folder} is none: name another --out")
        os.makedirs(folder, exist_ok=True)
    if settings.certificate:
        _require_certificate(settings)
    listener = _listen(settings)
    compiled = load_student(student_folder)[1]
    thresholds, found = thresholds_of(config.answer, student_folder, compiled.task)
    evaluated = storage.exists(storage.join(student_folder, EVIDENCE))
    drift = Drift(load_evidence(student_folder, compiled.task), compiled.task) if evaluated else None
    answerer = _answerer(config, student_folder, compiled, thresholds)
    teacher = _teacher(config, compiled, folder) if config.answer.teacher else None
    service = Service(answerer, settings, teacher, found, folder, drift)
    _announce(settings, listener.getsockname()[1], service)
    gc.freeze()  # what is loaded stays: to look through it for garbage takes a third of a second, now and then
    server = DrainingServer(service)
    server.run(sockets=[listener])
    service.close()
    if server.left:
        raise UserError(
            f"ended with {server.left} requests unanswered: serve.drain_seconds, {settings.drain_seconds:g} s, were over. "
            "Raise it with --set, and what stops the service must wait as long"
        )


def _answerer(
    config: StudentSettings, folder: str, compiled: CompiledTask, thresholds: dict[str, float]
) -> Answerer | AnswererPool:
    workers, threads, weights = config.serve.workers, config.serve.threads, config.answer.weights
    if workers > 1:
        each = threads or max(1, (os.cpu_count() or 1) // workers)
        return AnswererPool(folder, compiled, weights, thresholds, workers, each)
    if threads:
        torch.set_num_threads(threads)
    return Answerer.load(folder, weights, thresholds)


def _teacher(config: StudentSettings, compiled: CompiledTask, folder: str | None) -> Teacher | KeptTeacher:
    teacher = make_teacher(str(config.answer.teacher), config.teacher, compiled)
    if folder is None:
        return teacher
    kind = config.teacher
    return KeptTeacher(teacher, kind.engine, taught_as(compiled, kind), storage.join(folder, SHARDS))


def _listen(settings: ServeConfig) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen at port {settings.port} of {settings.host}: {error.strerror or error}. Name another with --port; "
            "--port 0 takes a free one"
        ) from error


def _require_certificate(settings: ServeConfig) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(str(settings.certificate), settings.private_key)
    except OSError as error:  # an SSLError is one
        files = " and ".join(filter(None, (settings.certificate, settings.private_key)))
        raise UserError(f"cannot speak HTTPS with {files}: {error.strerror or error}") from error


def _announce(settings: ServeConfig, port: int, service: Service) -> None:
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104 - compared, not bound
    scheme = "https" if settings.certificate else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    key = f"""-H "Authorization: Bearer ${settings.key}" """ if settings.key else ""
    lines = [
        f"{service.task.name} at {url}",
        f"""try it   curl {url}/classify {key}-H 'Content-Type: application/json' -d '{{"text": "I love it"}}'""",
        "Ctrl-C finishes the requests in flight and ends; twice ends at once",
    ]
    say("\n".join(lines))


class DrainingServer(uvicorn.Server):
    """A uvicorn that drops no request which has reached this machine when it is asked to stop.

    The original closes its port with those who wait to be let in, and idle connections with what was just sent over them.

    Attributes:
        left: requests without a whole answer when the time to stop in was up.
    """

    def __init__(self, service: Service) -> None:
        self._service, self.left = service, 0
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=Connection,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                ssl_certfile=service.config.certificate,
                ssl_keyfile=service.config.private_key,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal: the first has `shutdown` called, and the second does not wait for it."""
        if self.should_exit:
            os._exit(STOPPED)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets nobody in any more, and returns when everyone in here is answered and gone, or the time is up."""
        self._service.draining = True
        self.server_state.default_headers.append(CLOSE_HEADER)
        await self._stop_listening(sockets or [])
        start = asyncio.get_running_loop().time()
        while (connections := self._connections) and self._passed(start) < self._service.config.drain_seconds:
            for connection in connections:
                if connection.busy or (self._passed(start) > LINGER and not _unread(connection)):
                    connection.shutdown()  # now if idle, else when the answer is sent
            await asyncio.sleep(LOOK)
        self.left = sum(connection.unanswered or _unread(connection) for connection in self._connections)

    @property
    def _connections(self) -> list[Connection]:
        return [connection for connection in self.server_state.connections if isinstance(connection, Connection)]

    def _passed(self, start: float) -> float:
        return asyncio.get_running_loop().time() - start

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Closes the port, and takes those in who had connected before and wait in the kernel's queue."""
        rest = [listener.dup() for listener in sockets]
        for server in self.servers:
            server.close()
        waiting = [connection for listener in rest for connection in _accept_all(listener)]
        loop = asyncio.get_running_loop()
        kind: Any = self.config.http_protocol_class
        protocol = partial(kind, self.config, self.server_state, self.lifespan.state)
        for connection in waiting:
            await loop.connect_accepted_socket(protocol, connection, ssl=self.config.ssl)


def _accept_all(listener: socket.socket) -> list[socket.socket]:
    connections = []
    with listener:
        listener.setblocking(False)
        while True:
            try:
                connections.append(listener.accept()[0])
            except BlockingIOError:
                return connections


def _unread(connection: Any) -> bool:
    """Whether something has come over it that was not read yet."""
    if connection.transport.is_closing():
        return False
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
