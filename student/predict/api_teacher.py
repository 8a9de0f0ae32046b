"""An OpenAI-compatible API beside the student, asked like any other teacher."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from typing import Any, Literal

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.extract.votes import answer_and_votes
from pipeline.shards.shares import capture_votes
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Value
from pipeline.teacher.asker import Asker, may_try_again
from pipeline.teacher.endpoint import Endpoint
from pipeline.teacher.spending import Spending
from pipeline.teacher.usage import Usage
from student.predict.recorded import Recorded


class ApiTeacher:
    """Answers by chat completions. One thread may ask at a time.

    Args:
        folder: for each text's answer, so that none is paid for twice; None keeps none, and counts what is spent from now.

    Raises:
        UserError: the API's address is none, or holds credentials.
    """

    state: Literal["ready"] = "ready"

    def __init__(self, model: str, config: TeacherConfig, compiled: CompiledTask, folder: str | None = None) -> None:
        self.name, self._requests, self._folder, self._compiled = model, config.requests, folder, compiled
        self._endpoint = Endpoint(model, config, compiled.task)
        self._known = _kept(folder) if folder else {}
        spent = sum((Usage(**record["spent"]) for record in self._known.values()), Usage())
        self._spending = Spending(config, spent, self._endpoint.bound(compiled.task.comments.max_tokens))
        self._loop = asyncio.new_event_loop()  # of its own: the client keeps its connections, and Ray's threads have loops
        threading.Thread(target=self._loop.run_forever, name="api", daemon=True).start()

    def _records(self, texts: list[str]) -> list[dict[str, Any]]:
        asker = Asker(self._endpoint, self._spending)
        records = asyncio.run_coroutine_threadsafe(self._ask(asker, texts), self._loop).result()
        failed = [record["reason"] for record in records if not (record["values"] or record["spent"]["calls"])]
        if asker.ended or (failed and self._folder):  # what is written counts as asked; a service may ask again
            raise UserError(f"the teacher {self.name}: {asker.ended or failed[0]}. Run the same command again to go on")
        return records

    def answer(self, texts: list[str]) -> list[dict[str, Value] | None]:
        """Its answers, by field; None to a text that it has no answer of the task to. See `record`."""
        return self.record(texts).by_text(len(texts), self._compiled)

    def record(self, texts: list[str]) -> Recorded:
        """Its answers with how likely it lists them, as votes over the required tokens.

        Raises:
            UserError: it refuses all calls, fails again and again, or the budget allows no further one.
        """
        found = [answer_and_votes(self._compiled, [record]) for record in self._records(texts)]
        pairs = [pair for pair in found if pair]
        answers, votes = [answer for answer, _ in pairs], [some for _, some in pairs]
        captured = capture_votes(answers, votes, self._compiled.automaton)
        return Recorded([i for i, pair in enumerate(found) if pair], captured)

    async def _ask(self, asker: Asker, texts: list[str]) -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(self._requests)

        async def one(text: str) -> dict[str, Any]:
            async with gate:
                return await self._record(asker, text)

        found = await asyncio.gather(*map(one, dict.fromkeys(texts)))
        by_text = dict(zip(dict.fromkeys(texts), found, strict=True))
        return [by_text[text] for text in texts]

    async def _record(self, asker: Asker, text: str) -> dict[str, Any]:
        """What became of a text, now or in an earlier run."""
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        before = self._known.get(key)
        if before and not may_try_again(before):
            return before
        record = await asker.record(text, paid=Usage(**before["spent"]) if before else None)
        if self._folder and record["spent"]["calls"]:
            self._known[key] = record
            await asyncio.to_thread(storage.write_json, storage.join(self._folder, f"{key}.json"), record)
        return record

    def close(self) -> None:
        """Ends its connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)


def _kept(folder: str) -> dict[str, dict[str, Any]]:
    """What earlier runs were answered, by the hash of the text."""
    names = [name for name in storage.list_files(folder) if name.endswith(".json")]
    return {name.removesuffix(".json"): storage.read_json(storage.join(folder, name)) for name in names}
