"""One request's texts through the service: its limits, its client's patience, and what each failure is in HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from student.serve.batcher import Closed, Failed, Overloaded
from student.serve.errors import CLIENT_GONE, Refused
from student.serve.service import Result, Service


async def results(
    request: Request, service: Service, texts: list[Any], value_probabilities: bool = False, ask: bool = False
) -> list[Result]:
    """See `Service.classify`. What still waits is forgotten when the client hangs up.

    Raises:
        Refused: 413, 429, 500, 503 or 504, saying what to do.
    """
    config = service.config
    if len(texts) > config.max_texts:
        raise Refused(413, f"{len(texts):,} texts at once: send at most {config.max_texts:,} (serve.max_texts)", "too_many")
    if ask and service.teacher is None:
        raise Refused(400, "there is no teacher here: start the service with --teacher MODEL", "no_teacher")
    working = asyncio.create_task(service.classify(texts, value_probabilities, ask))
    leaving = asyncio.create_task(_hung_up(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(CLIENT_GONE, "the client has gone")
        return working.result()
    except Overloaded as error:
        raise Refused(429, str(error), "overloaded", {"Retry-After": str(error.retry_after)}) from None
    except TimeoutError:
        raise Refused(504, f"no answer within {config.timeout_seconds:g} s: try again with fewer texts", "timeout") from None
    except Closed:
        raise Refused(503, "the service is stopping: ask another, or try again in a while", "stopping") from None
    except Failed as error:
        raise Refused(500, f"the student failed ({error}); the service's log says more", "failed") from None
    finally:
        working.cancel()
        leaving.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
