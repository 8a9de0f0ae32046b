from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

from student.serve.turns import TURN, Pieces, Turns


def encoded(items: list[object]) -> object:
    return json.loads(b"".join(asyncio.run(Turns().encode('{"a":[', items, "]}"))))


def test_a_list_is_what_json_makes_of_it():
    for items in ([], [{"a": "é"}, None, [1.5, True]], [[i] * 1000 for i in range(1000)]):
        assert encoded(items) == {"a": items}


def test_a_long_list_is_sent_in_pieces_with_its_whole_length():
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    pieces = asyncio.run(Turns().encode("[", ["x" * 1000] * 20_000, "]"))
    assert len(pieces) > 2
    asyncio.run(Pieces(pieces)({}, None, send))
    start, *bodies = sent
    assert dict(start["headers"])[b"content-length"] == str(sum(map(len, pieces))).encode()
    assert [body["body"] for body in bodies] == pieces
    assert [body["more_body"] for body in bodies] == [True] * (len(pieces) - 1) + [False]


def test_a_long_list_lets_others_on_and_long_lists_take_turns():
    async def main() -> tuple[list[str], int]:
        turns, order, rounds = Turns(), [], 0

        def slow(name: str) -> Iterator[int]:
            loop = asyncio.get_running_loop()
            for i in range(5):
                end = loop.time() + 1.1 * TURN
                while loop.time() < end:
                    pass
                order.append(name)
                yield i

        async def count() -> None:
            nonlocal rounds
            while True:
                order.append("round")
                rounds += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await asyncio.gather(*(turns.encode("[", slow(name), "]") for name in "ab"))
        counting.cancel()
        return order, rounds

    order, rounds = asyncio.run(main())
    assert (order.count("a"), order.count("b")) == (5, 5)
    first = 2  # both begin in the first round
    later = " ".join(order[first:])
    assert "a b" not in later
    assert "b a" not in later
    assert rounds >= 8
