"""The curve of a whole training's loss stays what it was: see golden_loss.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.shards.manifest import Shards
from student.config import StudentConfig, TrainConfig
from student.train.loop import Loop, Training

GOLDEN = Path(__file__).with_name("golden_loss.txt")
RENEW = "RENEW_GOLDEN"
COMMAND = f"{RENEW}=1 .venv/bin/python -m pytest tests/numerics/test_golden.py"
WEIGHTS = {"kl_start": 0.8, "kl_end": 0.2, "ce_start": 0.2, "ce_end": 0.8}
CONFIG = TrainConfig(objective="curriculum", **WEIGHTS, epochs=4, batch_size=16, learning_rate=3e-3, log_every=1)
SEQUENCES = ("full", "choices")
LIMIT = 1e-4  # other processors round otherwise
HEADER = f"""\
# The loss of the debug student in each step of a training with the curriculum, on made-up shards, when it reads whole
# answers (full) or only the tokens that were choices. Any change of it is a change of what Retort trains; where it is meant,
# write the file anew: {COMMAND}
# step full choices
"""
Curves = dict[str, list[float]]


@pytest.fixture(scope="module")
def curves(shards: Shards) -> Iterator[Curves]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {sequence: _curve(shards, sequence) for sequence in SEQUENCES}
    torch.set_num_threads(threads)


def _curve(shards: Shards, sequence: str) -> list[float]:
    student = StudentConfig(layers=2, width=32, heads=2, mlp=64, sequence=sequence)
    loop = Loop(Training.of(student, CONFIG, shards), shards)
    return [report.row["loss"] for report in loop.run()]


def _read() -> Curves:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {sequence: [float(line[column]) for line in lines] for column, sequence in enumerate(SEQUENCES, 1)}


def _write(curves: Curves) -> None:
    steps = zip(*(curves[sequence] for sequence in SEQUENCES), strict=True)
    lines = [" ".join([f"{i:2d}", *(f"{loss:#.6g}" for loss in losses)]) for i, losses in enumerate(steps, 1)]
    GOLDEN.write_text(HEADER + "\n".join(lines) + "\n")


def _side_by_side(golden: list[float], found: list[float]) -> str:
    rows = [f"{i:4d}  {a:#10.6g}  {b:#10.6g}  {b / a - 1:+.1e}" for i, (a, b) in enumerate(zip(golden, found, strict=False), 1)]
    return "\n".join(["step      golden       found  difference", *rows, f"{len(golden)} and {len(found)} steps"])


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_the_loss_falls_along_the_golden_curve(curves: Curves, sequence: str) -> None:
    if os.environ.get(RENEW):
        _write(curves)
        pytest.skip(f"{GOLDEN.name} is written anew")
    golden, found = _read()[sequence], curves[sequence]
    if found != pytest.approx(golden, rel=LIMIT, abs=0):
        pytest.fail(
            f"{sequence}:\n{_side_by_side(golden, found)}\nwhere this is meant, write it anew: {COMMAND}", pytrace=False
        )
