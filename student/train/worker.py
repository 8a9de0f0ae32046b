"""What runs in each worker of the Ray Train job: the loop, its reports to the driver, and its checkpoints."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from pipeline.base.version import check_code_version
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Examples
from student.decode.decode import Decoder
from student.model.checkpoint import assembled, save_student
from student.model.model import Student
from student.train.channel import Sender
from student.train.checkpoint import load_position, save_position
from student.train.loop import Loop, Position, Training
from student.train.machine import Machine
from student.train.trainer import global_sum

SCORE = "disagreement"  # picks the best epoch, see `disagreement`
LOOK_EVERY = 2.0  # seconds between two looks for a notice that a machine goes
UNSCORED = 1e30  # of a checkpoint within an epoch: Ray Train would take one without a score for the best
SAMPLES = 4  # validation answers decoded after each epoch, for the report


def work(settings: dict[str, Any]) -> None:
    """Runs in every worker."""
    check_code_version()
    context, training = ray.train.get_context(), settings["training"]
    rank, workers = context.get_world_rank(), context.get_world_size()
    shards = open_shards(settings["shards"])
    loop = Loop(training, shards, rank, workers, ray.train.torch.get_device())
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state, position = load_position(folder)
            loop.go_on_from(state, Position(**position))
    _Worker(loop, training, shards.compiled, Sender(settings["channel"] if rank == 0 else None), rank).run()


def disagreement(row: dict[str, float]) -> float:
    """What orders epochs, the best first: the share of held-out answers that differ, and among equals the divergence in nats.

    Cross-entropy stands in where the objective has no divergence. It is no part of the share, which is at least 1 / N apart.
    """
    return 1 - row["validation_answer_accuracy"] + 1e-9 * row.get("validation_kl", row["validation_ce"])


@dataclass
class _Worker:
    loop: Loop
    training: Training
    compiled: CompiledTask
    sender: Sender
    rank: int
    machine: Machine = field(default_factory=Machine)
    saved: float = field(default_factory=time.monotonic)
    looked: float = field(default_factory=time.monotonic)
    look: bool = False
    noticed: bool = False  # that a machine goes

    def run(self) -> None:
        """Trains to the end, or until it is asked to stop; what was reached is saved in either case."""
        for report in self.loop.run():
            self.sender.add(report.step, report.row | self.machine.measures())
            if report.epoch_ended:
                self.sender.send()
            stop, due = self._agree()
            if stop or due or report.epoch_ended:
                self._save(disagreement(report.row) if report.epoch_ended else UNSCORED)
            if stop:
                return

    def _agree(self) -> tuple[bool, bool]:
        """Whether to stop, which the driver decides, and whether to save, as the clock or a notice that a machine goes wants.

        After a notice the training goes on: when the machine is gone, Ray Train starts all workers again from what was saved.
        Looking for a notice waits for all workers. So all look or none does, once in a while by the first one's clock.
        """
        notice = self.look and ray.train.get_preemption_info() is not None
        now, first = time.monotonic(), self.rank == 0
        due = (notice and not self.noticed) or (first and now - self.saved > 60 * self.training.config.checkpoint_minutes)
        self.noticed |= notice
        look = first and now - self.looked > LOOK_EVERY
        wishes = [float(self.sender.stopping), float(due), float(look)]
        stop, save, self.look = (wish > 0 for wish in global_sum(torch.tensor(wishes, device=self.loop.device)).tolist())
        self.looked = now if self.look else self.looked
        return stop, save

    def _save(self, score: float) -> None:
        """Hands Ray Train a checkpoint, which it uploads while the training goes on."""
        state, position = self.loop.state(), self.loop.position
        metrics = {"step": position.step, "epoch": len(position.history), SCORE: score}
        checkpoint = None
        if self.rank == 0:
            student = assembled(self.training.shape, state.average | self.loop.constants)
            if score != UNSCORED:
                position.history[-1]["samples"] = samples(student, self.compiled, self.loop.validation, SAMPLES)
            folder = tempfile.mkdtemp(prefix="retort-")  # Ray Train deletes it once it is uploaded
            save_student(folder, student, self.compiled)
            save_position(folder, state, position.as_dict())
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            metrics,
            checkpoint,
            checkpoint_dir_name=f"step-{position.step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        self.saved = time.monotonic()


def samples(student: Student, compiled: CompiledTask, examples: Examples, count: int) -> list[dict[str, str]]:
    """The first few comments of a split, each with the teacher's answer and the student's."""
    rows = range(min(count, len(examples)))
    if not rows:
        return []
    prefixes = [examples.prefix(i) for i in rows]
    decoder, decode = Decoder(student, compiled), compiled.tokenizer.decode
    constrained, free = decoder.constrained(prefixes), decoder.free(prefixes)
    return [
        {
            "comment": examples.text(i),
            "teacher": decode(examples.answer(i).tolist()),
            "student": decode(constrained.tokens[i]),
            "unconstrained": decode(free.tokens[i]),
        }
        for i in rows
    ]
