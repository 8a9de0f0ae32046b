from __future__ import annotations

import asyncio
import random
import threading

import pytest

from student.serve.batcher import Batcher, Closed, Failed, Overloaded


class Work:
    """Doubles numbers, at its gate; fails on 13 and forgets 14."""

    def __init__(self) -> None:
        self.gate, self.batches = threading.Event(), list[list[int]]()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.gate.wait(20)
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items if item != 14]


def batcher(work: Work, batch: int = 16, queue: int = 10_000, threads: int = 1) -> Batcher[int, int]:
    return Batcher(work, batch, queue, lambda size, seconds: None, threads)


async def begun(work: Work, count: int = 1) -> None:
    while len(work.batches) < count:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("threads", [1, 3])
def test_callers_are_kept_apart_under_load(threads: int):
    work, rng = Work(), random.Random(0)
    asked = [[rng.randrange(100, 10_000) for _ in range(rng.randrange(40))] for _ in range(200)]

    async def ask() -> list[list[int]]:
        batches = batcher(work, threads=threads)
        return await asyncio.gather(*(batches.answer(items) for items in asked))

    assert asyncio.run(ask()) == [[2 * item for item in items] for items in asked]
    sizes = [len(items) for items in work.batches]
    assert max(sizes) <= 16
    assert sum(sizes) == sum(map(len, asked))
    assert len(sizes) < 1.2 * sum(sizes) / 16 + 2  # what waits shares batches


def test_several_threads_share_a_request_and_its_answers_are_in_order():
    work = Work()
    work.gate.clear()

    async def ask() -> list[int]:
        batches = batcher(work, batch=100, threads=2)
        asked = asyncio.create_task(batches.answer(list(range(20, 60))))
        await begun(work, 2)
        work.gate.set()
        return await asked

    assert asyncio.run(ask()) == [2 * item for item in range(20, 60)]
    assert sorted(map(len, work.batches)) == [20, 20]


def test_more_than_may_wait_is_refused_and_the_rest_is_answered():
    work = Work()

    async def ask() -> None:
        batches = batcher(work, batch=4, queue=10)
        work.gate.clear()
        first = asyncio.create_task(batches.answer([0]))
        await begun(work)
        waiting = asyncio.create_task(batches.answer(list(range(20, 30))))
        await asyncio.sleep(0)
        assert batches.waiting == 10
        with pytest.raises(Overloaded) as refused:
            await batches.answer([1])
        assert 1 <= refused.value.retry_after <= 60
        work.gate.set()
        assert await first == [0]
        assert len(await waiting) == 10
        assert await batches.answer([1]) == [2]

    asyncio.run(ask())


def test_the_wait_is_estimated_from_the_pace():
    batches = batcher(Work(), queue=1)
    batches._measure(10, 20.0)
    batches._waiting = 5
    with pytest.raises(Overloaded) as refused:
        asyncio.run(batches.answer([1]))
    assert refused.value.retry_after == 10


def test_what_a_gone_caller_asked_is_never_worked_on():
    work = Work()

    async def ask() -> None:
        batches = batcher(work, batch=4)
        work.gate.clear()
        first = asyncio.create_task(batches.answer([0, 1]))
        await begun(work)
        gone, stays = (asyncio.create_task(batches.answer(items)) for items in ([50] * 9, [7]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        assert batches.waiting == 1
        first.cancel()  # while it is worked on
        work.gate.set()
        assert await stays == [14]

    asyncio.run(ask())
    assert work.batches == [[0, 1], [7]]


@pytest.mark.parametrize(("culprit", "message"), [(13, "ValueError: 13"), (14, "1 answers to 2 items")])
def test_a_failing_batch_fails_its_callers_alone(culprit: int, message: str):
    work = Work()

    async def ask() -> None:
        batches = batcher(work, batch=2)
        work.gate.clear()
        before = asyncio.create_task(batches.answer([1, 2]))
        await begun(work)
        hit = asyncio.create_task(batches.answer([culprit, 3, 4, 5]))
        after = asyncio.create_task(batches.answer([6]))
        await asyncio.sleep(0)
        work.gate.set()
        assert await before == [2, 4]
        with pytest.raises(Failed, match=message):
            await hit
        assert await after == [12]
        assert await batches.answer([8]) == [16]
        assert batches.waiting == 0

    asyncio.run(ask())
    assert [4, 5] not in work.batches


def test_a_long_request_does_not_hold_up_a_short_one():
    work = Work()

    async def ask() -> None:
        batches = batcher(work, batch=4)
        work.gate.clear()
        long = asyncio.create_task(batches.answer([100] * 40))
        await begun(work)
        short = asyncio.create_task(batches.answer([7]))
        await asyncio.sleep(0)
        work.gate.set()
        assert await short == [14]
        assert len(await long) == 40

    asyncio.run(ask())
    assert 7 in work.batches[2]  # one batch was being worked on, one was the long request's turn


def test_closing_answers_what_waits():
    work = Work()

    async def ask() -> None:
        batches = batcher(work, batch=2)
        asked = [asyncio.create_task(batches.answer([i] * 3)) for i in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batches.close)
        assert await asyncio.gather(*asked) == [[2 * i] * 3 for i in range(5)]
        with pytest.raises(Closed):
            await batches.answer([1])

    asyncio.run(ask())
