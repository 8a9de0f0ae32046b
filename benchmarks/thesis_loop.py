"""`--against thesis-loop` of `benchmarks.training`: the product's batches against a loop over the steps of each answer.

The loop runs every step of an answer forward and backward by itself, as the thesis' 1.25 s an example suggests: step k reads
the comment and the answer's first k tokens and predicts one token. Gradients add up over all steps of a batch and the
optimizer steps once, which is generous to the loop. Model, type, loss, optimizer, allocator and examples are the same, all
contenders take turns on the same batches, and the loop's gradient has to be ours.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as HfTrainer

from benchmarks.inference_contenders import llama_config
from benchmarks.students import Contender, Data, spread
from student.config import TrainConfig
from student.data.examples import Batch
from student.model.checkpoint import Tensors
from student.model.model import Student
from student.train.order import Order
from student.train.strategy import DataParallel, make_strategy

STEPS = 4  # of the Trainer at a time
EQUAL = 1e-4  # relative error of the loop's gradient, float32
LABELS = {
    "choices": "Retort, choices",
    "full": "Retort, whole answers",
    "trainer": "`transformers`' Trainer, whole answers, the teacher's tokens as labels",
    "loop": "the loop, in batches",
    "loop-1": "the loop, one example at a time",
}


def passes(batch: Batch) -> Iterator[Batch]:
    """The thesis' loop: a batch for each step of the answers, of what the student has read by then and one target a row.

    Rows are cut to the longest of the pass. What a shorter row holds behind its target is padding: causality hides it.
    """
    length = batch.tokens.shape[1]
    row_M, column_M = batch.predict // length, batch.predict % length
    first_M = torch.cat([torch.ones(1, dtype=torch.bool), row_M.diff() != 0])
    step_M = column_M - column_M[first_M][row_M]
    for step in range(int(step_M.max()) + 1):
        mine = (step_M == step).nonzero()[:, 0]
        read = int(column_M[mine].max()) + 1
        predict = torch.arange(len(mine)) * read + column_M[mine]
        rest = (values[mine] for values in (batch.targets, batch.teacher, batch.lse, batch.choice, batch.state))
        yield Batch(batch.tokens[row_M[mine], :read], predict, *rest)


class Loop(Contender):
    """A student that trains by the thesis' loop.

    Args:
        data: of whole answers.
        config: of the training.
        device: where it trains.
        together: examples of one pass.
        strategy: holds the student; by default the configured one.
    """

    def __init__(
        self, data: Data, config: TrainConfig, device: torch.device, together: int, strategy: Any = make_strategy
    ) -> None:
        super().__init__(data, config, device, strategy)
        self._together = together

    def batches(self, indices: NDArray[np.int64]) -> list[Batch]:
        """The passes of one optimizer step."""
        groups = (indices[at : at + self._together] for at in range(0, len(indices), self._together))
        return [one.to(self._device) for group in groups for one in passes(self._data.examples.batch(group))]


class Ordinary(Contender):
    """What people would use for labels alone: a Llama of the student's sizes under the Trainer of `transformers`.

    Its feed-forward is gated, and two thirds as wide as the student's, so that both have equally many parameters; its input
    table is the student's, and its output table as wide as the student's own.
    """

    def __init__(self, data: Data, config: TrainConfig, device: torch.device) -> None:
        shape, self._data, self._device, self._config = data.shape, data, device, config
        sizes = llama_config(shape, shape.embeddings, shape.context, pad_token_id=0)
        self._model = LlamaForCausalLM(sizes)
        self._model.lm_head = torch.nn.Linear(shape.width, shape.output_vocabulary, bias=False)

    def batches(self, indices: NDArray[np.int64]) -> list[Batch]:
        """The whole batch; the model reads its tokens as rows of the student's embedding."""
        return [self._data.examples.batch(indices)]

    def step(self, indices: NDArray[np.int64], batches: list[Batch]) -> float:
        """Seconds of a step, of some that the Trainer makes: its own start is left out."""
        rows = torch.as_tensor(self._data.rows)[batches[0].tokens.long()].long()
        labels = torch.full_like(rows, -100)
        labels.view(-1)[batches[0].predict] = batches[0].targets.long()
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(rows),
            max_steps=STEPS,
            report_to=[],
            save_strategy="no",
            use_cpu=self._device.type == "cpu",
            bf16=self._config.precision == "bf16",
            disable_tqdm=True,
            logging_strategy="no",
        )
        examples = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)] * STEPS
        Labelled(model=self._model, args=arguments, train_dataset=examples, callbacks=[clock]).train()
        return statistics.median(clock.seconds[1:])


class Labelled(HfTrainer):
    """Cross-entropy of the next watched token, at the positions that have one."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        """See the Trainer."""
        logits = model(input_ids=inputs["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)


class Clock(TrainerCallback):
    """Takes the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the seconds."""
        self.seconds.append(time.perf_counter() - self._start)


class Kept(DataParallel):
    """Keeps the gradients of the last step."""

    kept: Tensors

    def __init__(self, student: Student, config: TrainConfig, device: torch.device) -> None:
        super().__init__(student.to(device), config)

    def step(self, rate: float) -> torch.Tensor:
        """See `Strategy`."""
        self.kept = self.gradients()
        return super().step(rate)


def gradient_error(data: Data, config: TrainConfig, device: torch.device, indices: NDArray[np.int64], together: int) -> float:
    """How far the loop's gradient lies from that of whole sequences, relative to it."""
    exact = config.model_copy(update={"precision": "float32"})
    ours = _gradient(Contender(data, exact, device, Kept), indices)
    loop = _gradient(Loop(data, exact, device, together, Kept), indices)
    return float((loop - ours).norm() / ours.norm())


def _gradient(contender: Contender, indices: NDArray[np.int64]) -> torch.Tensor:
    contender.step(indices, contender.batches(indices))
    return torch.cat([gradient.flatten() for gradient in contender.strategy.kept.values()])


def compare(data: Data, config: TrainConfig, device: torch.device, rounds: int, seconds: float, singles: int) -> dict[str, Any]:
    """Ours and the loop in turns on the same batches.

    Args:
        data: of whole answers.
        config: of the training.
        device: where to train.
        rounds: batches.
        seconds: a contender repeats a batch until so many have gone by in a round.
        singles: examples of a batch that the loop of one example a pass gets.
    """
    chosen = spread(Order(data.examples.lengths, config).epoch(1), data.examples, rounds)
    errors = {str(n): gradient_error(data, config, device, chosen[0][:4], n) for n in (1, 4)}
    if max(errors.values()) > EQUAL:
        raise SystemExit(f"the loop's gradient is not ours: relative errors {errors}")
    contenders: dict[str, Contender] = {
        "full": Contender(data, config, device),
        "choices": Contender(data.of("choices"), config, device),
        "trainer": Ordinary(data, config, device),
        "loop": Loop(data, config, device, config.batch_size),
        "loop-1": Loop(data, config, device, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number, indices in enumerate(chosen):
        for name, contender in contenders.items():
            mine = indices[:: max(1, len(indices) // singles)] if name == "loop-1" else indices
            rates[name].append(_rate(contender, mine, seconds, warm_up=number == 0))
            print(f"round {number + 1} {name}: {rates[name][-1]:.3f} examples/s", file=sys.stderr)
    return {"gradient_error": errors, "examples_per_second": rates, "batch_size": config.batch_size}


def _rate(contender: Contender, indices: NDArray[np.int64], seconds: float, warm_up: bool) -> float:
    batches, done, took = contender.batches(indices), 0, 0.0
    if warm_up:
        contender.step(indices, batches[:2])
    while not done or took < seconds:
        took += contender.step(indices, batches)
        done += len(indices)
    return done / took


def show_comparison(done: dict[str, Any]) -> None:
    """The table: medians over the rounds, of the ratios too."""
    rates = done["examples_per_second"]
    table = Table("", "examples/s", "rounds", "× loop, batches", "× loop, 1", box=None)
    for name, label in LABELS.items():
        against = [np.divide(rates[name], rates[other]) for other in ("loop", "loop-1")]
        ratios = [f"{np.median(r):.1f} ({r.min():.1f} to {r.max():.1f})" for r in against]
        rounds = " ".join(f"{rate:.3g}" for rate in rates[name])
        table.add_row(label, f"{statistics.median(rates[name]):.3g}", rounds, *ratios)
    Console(width=128).print(table)
    errors = ", ".join(f"{error:.1e} by {together}" for together, error in done["gradient_error"].items())
    print(f"relative error of the loop's gradient: {errors} together; batches of {done['batch_size']}")
