"""One worker's training, in plain PyTorch: a step, and the measures of a split. Ray is not needed, nor other workers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from student.config import TrainConfig
from student.data import Batch
from student.losses import OBJECTIVES, Terms
from student.schedule import cosine_annealing, linear


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all workers, where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def worker_count() -> int:
    """Workers training together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass
class Sums:
    """Sums over positions, kept until they are asked for as means: what is reported is weighted by position, as the loss is."""

    names: list[str]
    values: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def of(terms: Terms, logits_MW: torch.Tensor, batch: Batch) -> Sums:
        """Of one batch on this worker."""
        right = logits_MW.argmax(-1) == batch.targets
        sums = {"loss": terms.loss.sum(), "positions": terms.loss.new_tensor(len(right))}
        sums |= {name: part.sum() for name, part in terms.parts.items()}
        sums |= {"right": right.sum(), "choices": batch.choice.sum(), "right_choices": (right & batch.choice).sum()}
        return Sums(list(sums), torch.stack([value.double() for value in sums.values()]))

    @staticmethod
    def total(parts: list[Sums]) -> Sums:
        """Of several batches together, at least one."""
        return Sums(parts[0].names, torch.stack([part.values for part in parts]).sum(0))

    def means(self) -> dict[str, float]:
        """Loss, its parts, and the share of steps (and of choice steps) where the likeliest token is the teacher's."""
        sums = dict(zip(self.names, self.values.tolist(), strict=True))
        positions, choices, right, right_choices = (
            sums.pop(name) for name in ("positions", "choices", "right", "right_choices")
        )
        means = {name: value / positions for name, value in sums.items()}
        return means | {"step_accuracy": right / positions, "choice_accuracy": right_choices / max(choices, 1)}


class Trainer:
    """Trains one student.

    Args:
        model: the student, wrapped for data parallelism where there are other workers.
        config: of the training.
        steps: of the whole training.
        peak: the highest learning rate.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, steps: int, peak: float, device: torch.device) -> None:
        self._model, self._config, self._steps, self._peak, self._device = model, config, steps, peak, device
        self._objective = OBJECTIVES[config.objective]
        self._optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=peak, betas=config.betas, fused=True)
        self.step_index = 0

    def kl_weight(self) -> float:
        """Weight of KL at this step of the curriculum: its first value at the first step, its last at the last."""
        progress = self.step_index / max(1, self._steps - 1)
        return linear(self._config.kl_start, self._config.kl_end, min(progress, 1.0))

    def step(self, batch: Batch, examples: int) -> tuple[Sums, dict[str, float]]:
        """One optimizer step.

        Args:
            batch: this worker's share of the step.
            examples: of all workers' shares together.

        Returns:
            The sums over all workers' positions, and the step's other metrics.
        """
        started = time.perf_counter()
        self._model.train()
        rate = self._peak * cosine_annealing(self.step_index, self._steps, self._config.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        terms, sums = self._forward(batch)
        positions = global_sum(torch.tensor(float(len(batch.targets)), device=self._device))
        # Data parallelism averages gradients over workers; the mean wanted is over the positions of all of them.
        (terms.loss.sum() * (worker_count() / positions)).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        sums.values = global_sum(sums.values)
        self.step_index += 1
        seconds = time.perf_counter() - started
        weights = {f"{name}_weight": weight for name, weight in terms.weights.items()}
        speed = {"examples_per_second": examples / seconds, "seconds_per_example": seconds / examples}
        return sums, {"learning_rate": rate, "gradient_norm": float(norm), **weights, **speed}

    @torch.inference_mode()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over a split, shared out among the workers; each has at least one batch, as all must join the sum."""
        self._model.eval()
        total = Sums.total([self._forward(batch)[1] for batch in batches])
        total.values = global_sum(total.values)
        return total.means()

    def _forward(self, batch: Batch) -> tuple[Terms, Sums]:
        batch = batch.to(self._device)
        logits_MW = self._model(batch.tokens, batch.predict).float()
        terms = self._objective(logits_MW, batch.teacher, batch.targets, self.kl_weight())
        return terms, Sums.of(terms, logits_MW, batch)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and the embedding, most of whose rows a corpus never touches, do not."""
    named = list(model.named_parameters())
    decays = [p for name, p in named if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embedding" in name]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
