"""A training in a process of its own, that saves at each report and may be killed: see test_resume.

Run as `python -m tests.numerics.resume SHARDS FOLDER [STEP SECONDS]`: killed so many seconds after that step began.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch

import student.train.loop
from pipeline.shards.manifest import open_shards
from student.config import StudentConfig, TrainConfig
from student.model.checkpoint import assembled, save_student
from student.train.checkpoint import load_position, save_position
from student.train.loop import Loop, Position, Training

STUDENT = StudentConfig(layers=1, width=16, heads=2, mlp=32, dropout=0.1, sequence="full")
CONFIG = TrainConfig(epochs=5, batch_size=10, learning_rate=3e-3, log_every=3)  # no divisor of an epoch's steps


def main(shards_folder: str, folder: Path, step: int | None = None, seconds: float = 0) -> None:
    """Trains to the end from what the folder holds; leaves the measures of each report in it."""
    torch.set_num_threads(1)
    student.train.loop.GRADIENTS_EVERY = 20
    shards = open_shards(shards_folder)
    training = Training.of(STUDENT, CONFIG, shards)
    loop = Loop(training, shards)
    if saved := sorted(folder.glob("step-*")):
        state, position = load_position(str(saved[-1]))
        loop.go_on_from(state, Position(**position))
    if step is not None:
        _arm(loop, step, seconds)
    for report in loop.run():
        with (folder / "measures.jsonl").open("a") as stream:
            stream.write(json.dumps([report.step, report.epoch_ended, report.row]) + "\n")
        save(loop, training, folder / f"step-{report.step:04d}-{len(loop.position.history)}")
    (folder / "done").touch()


def save(loop: Loop, training: Training, folder: Path) -> None:
    """Writes a checkpoint as the workers do; the folder appears when it is whole."""
    state, unfinished = loop.state(), folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    whole = assembled(training.shape, state.average | {"rows": torch.from_numpy(training.rows)})
    save_student(str(unfinished), whole, loop.validation.compiled)
    save_position(str(unfinished), state, loop.position.as_dict())
    unfinished.rename(folder)


def _arm(loop: Loop, fatal: int, seconds: float) -> None:
    """Has the process killed, wherever it is by then: in a step, in a save, or between them."""
    trainer, step = loop._trainer, loop._trainer.step

    def watched(*arguments: object) -> torch.Tensor:
        if trainer.step_index == fatal:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return step(*arguments)  # type: ignore[arg-type]

    trainer.step = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *(kind(given) for kind, given in zip((int, float), sys.argv[3:], strict=False)))
