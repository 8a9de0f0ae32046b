"""One worker's training, in plain PyTorch: a step, and the measures of a split. Ray is not needed, nor other workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist

from student.config import TrainConfig
from student.data.examples import Batch
from student.model.shape import Shape
from student.prune.parent import Parent
from student.train.losses import Loss, Terms
from student.train.schedule import cosine_annealing
from student.train.strategy import Strategy, worker_count

WARM_UP = 0.05  # share of the steps with a rising learning rate


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all workers, where there are several."""
    if worker_count() > 1:
        dist.all_reduce(values)
    return values


Totals = dict[str, float]


class Sums:
    """Sums over positions, kept where the student is until they are asked for."""

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, terms: Terms, logits_MC: torch.Tensor, batch: Batch, weights_M: torch.Tensor) -> None:
        """Adds one batch."""
        right = logits_MC.argmax(-1) == batch.targets
        sums = {name: (part * weights_M).sum() for name, part in {"loss": terms.loss, **terms.parts}.items()}
        sums |= {"weight": weights_M.sum(), "positions": torch.ones_like(weights_M).sum(), "right": right.sum()}
        sums |= {"choices": batch.choice.sum(), "right_choices": (right & batch.choice).sum()}
        sums |= {
            "answers": torch.full((), len(batch.tokens), device=right.device),
            "right_answers": _right_answers(right, batch),
        }
        for name, value in sums.items():
            self._values[name] = self._values[name] + value.double() if name in self._values else value.double()

    def totals(self) -> Totals:
        """Over all workers; all must ask."""
        return dict(zip(self._values, global_sum(torch.stack(list(self._values.values()))).tolist(), strict=True))


def _right_answers(right_M: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How many answers have every choice right, []: of a student that gives allowed tokens alone, those it decodes right."""
    row_M = batch.predict // batch.tokens.shape[1]
    wrong_B = torch.zeros(len(batch.tokens), device=right_M.device).index_add_(0, row_M, (batch.choice & ~right_M).float())
    return (wrong_B == 0).sum()


COUNTS = ("weight", "positions", "right", "choices", "right_choices", "answers", "right_answers")


def means(totals: Totals) -> dict[str, float]:
    """The loss and its parts, weighted as in training, and the share of steps, choice steps and answers that are right."""
    measures = {name: value / totals["weight"] for name, value in totals.items() if name not in COUNTS}
    return measures | {
        "step_accuracy": totals["right"] / totals["positions"],
        "choice_accuracy": totals["right_choices"] / max(totals["choices"], 1),
        "answer_accuracy": totals["right_answers"] / totals["answers"],
    }


class Trainer:
    """Trains one student.

    Args:
        loss: the objective; by default the configuration's, all tokens weighing alike.
        parent: what the student was cut from, where its hidden states are to be followed too.

    Attributes:
        step_index: how many steps were taken.
        schedule: the learning rate and the weight of each term in the last of them.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: TrainConfig,
        shape: Shape,
        steps: int,
        device: torch.device,
        loss: Loss | None = None,
        parent: Parent | None = None,
    ) -> None:
        self._strategy, self._config, self._steps, self._device = strategy, config, steps, device
        self._peak = config.peak_rate(shape.width)
        self._loss, self._parent = loss or Loss(config), parent
        self.step_index = 0
        self.schedule: dict[str, float] = {}
        self._rank = dist.get_rank() if worker_count() > 1 else 0

    @property
    def progress(self) -> float:
        """Share of the training that is done at the next step: 0 at the first, 1 at the last."""
        return min(self.step_index / max(1, self._steps - 1), 1.0)

    def step(self, parts: list[Batch], weight: float, sums: Sums) -> torch.Tensor:
        """One optimizer step.

        Args:
            parts: this worker's share of the step, on its device, as it is run one after another.
            weight: of all positions of all workers' shares, see `Examples.weight`.

        Returns:
            The norm of the whole gradient before clipping, [].
        """
        self._strategy.module.train()
        self._seed()
        for i, batch in enumerate(parts):
            with self._strategy.part(last=i == len(parts) - 1):
                terms, weights_M = self._forward(batch, sums, training=True)
                self._strategy.backward((terms.loss * weights_M).sum() / weight)
        rate = self._peak * cosine_annealing(self.step_index, self._steps, WARM_UP)
        norm = self._strategy.step(rate)
        weights = {f"{name}_weight": weight for name, weight in self._loss.weights(self.progress).items()}
        self.schedule = {"learning_rate": rate} | weights
        self.step_index += 1
        return norm

    def _seed(self) -> None:
        """Makes what is random in a step a function of its position: a resumed training draws what it would have drawn."""
        place = f"{self._config.seed} {self.step_index} {self._rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big")
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every kind of device, at each step

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over a split, shared out among the workers; each has at least one batch, as all must join the sum."""
        self._strategy.module.eval()
        sums = Sums()
        for batch in batches:
            self._forward(batch, sums, training=False)
        return means(sums.totals())

    def term_gradients(self, batch: Batch) -> dict[str, float]:
        """How hard each term pulls: the norm of its weighted gradient with respect to the logits, by term.

        What lies before the logits is the same for all terms, so these norms compare as those of the parameters' gradients
        would. Of this worker's positions.
        """
        with torch.no_grad():
            logits_MC = self._logits(batch)
        logits_MC.requires_grad_()
        terms, weights_M = self._terms(logits_MC, batch, training=True)
        norms = {}
        for name, part in terms.parts.items():
            mean = terms.weights[name] * (part * weights_M).sum() / weights_M.sum()
            (gradient,) = torch.autograd.grad(mean, logits_MC)
            norms[f"{name}_gradient"] = float(gradient.norm())
        return norms

    def _forward(self, batch: Batch, sums: Sums, training: bool) -> tuple[Terms, torch.Tensor]:
        logits_MC = self._logits(batch)
        terms, weights_M = self._terms(logits_MC, batch, training)
        if self._parent and training:
            hidden_M = self._parent(batch)
            terms = replace(
                terms, loss=terms.loss + self._config.hidden * hidden_M, parts=terms.parts | {"hidden": hidden_M.detach()}
            )
        sums.add(terms, logits_MC, batch, weights_M)
        return terms, weights_M

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits_MC: torch.Tensor = self._strategy.module(*batch.inputs)
        return logits_MC.float()

    def _terms(self, logits_MC: torch.Tensor, batch: Batch, training: bool) -> tuple[Terms, torch.Tensor]:
        terms = self._loss(logits_MC, batch.teacher.float(), batch.lse, batch.targets, self.progress, training)
        return terms, torch.where(batch.choice, 1.0, self._config.forced_weight)
