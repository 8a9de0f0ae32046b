from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch

import student.train.worker
from student.config import TrainConfig
from student.train.worker import _Worker


class Meeting:
    """What two workers do together; one that waits for the other in vain breaks the barrier."""

    def __init__(self) -> None:
        self._barrier, self._parts = threading.Barrier(2, timeout=10), dict[int, torch.Tensor]()
        self.looks = 0

    def sum(self, mine: torch.Tensor) -> torch.Tensor:
        self._parts[threading.get_ident()] = mine
        self._barrier.wait()
        total = sum(self._parts.values(), torch.zeros_like(mine))
        self._barrier.wait()
        return total

    def look(self) -> None:
        self.looks += 1
        self._barrier.wait()


@pytest.mark.parametrize("stopping", [0, 1])
def test_all_workers_look_for_a_notice_or_none_does(monkeypatch: pytest.MonkeyPatch, stopping: int) -> None:
    """One that left it out, as it knew already that it has to stop, would hold up the others for ever."""
    meeting = Meeting()
    monkeypatch.setattr(student.train.worker, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(student.train.worker, "global_sum", meeting.sum)
    monkeypatch.setattr(ray.train, "get_preemption_info", meeting.look)
    loop: Any = SimpleNamespace(device=torch.device("cpu"))
    training: Any = SimpleNamespace(config=TrainConfig())
    compiled: Any = None

    def run(rank: int) -> list[tuple[bool, bool]]:
        sender: Any = SimpleNamespace(stopping=False)
        worker, agreed = _Worker(loop, training, compiled, sender, rank), []
        for i in range(5):
            sender.stopping = i >= 3 and rank == stopping
            agreed.append(worker._agree())
        return agreed

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second == [(False, False)] * 3 + [(True, False)] * 2
    assert meeting.looks == 2 * 4  # the first step asks for the first look


def test_a_notice_is_saved_for_once_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student.train.worker, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(student.train.worker, "global_sum", lambda wishes: wishes)
    notices = iter([None, "the machine goes", "the machine goes"])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(notices))
    loop: Any = SimpleNamespace(device=torch.device("cpu"))
    training: Any = SimpleNamespace(config=TrainConfig())
    sender: Any = SimpleNamespace(stopping=False)
    compiled: Any = None
    worker = _Worker(loop, training, compiled, sender, rank=0)
    assert [worker._agree() for _ in range(4)] == [(False, False), (False, False), (False, True), (False, False)]
