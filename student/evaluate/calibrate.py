"""Temperatures that make a student's probabilities mean what they say, one a field, fitted on held-out comments.

Source: Guo et al., "On Calibration of Modern Neural Networks", 2017. What is likeliest stays so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from pipeline.task.compiled import CompiledTask
from student.data.examples import Batch
from student.decode.choices import Choices
from student.decode.fields import Fields
from student.model.model import Student

LEAST, MOST = 0.1, 10.0  # temperatures


@torch.inference_mode()
def fit_temperatures(model: Student, compiled: CompiledTask, batches: Iterable[Batch]) -> dict[str, float]:
    """For each field the temperature under which the teacher's choices, after its own choices before them, are likeliest.

    Args:
        model: in evaluation mode.
    """
    device = next(model.parameters()).device
    fields = Fields(compiled, Choices(compiled, forced_read=model.shape.sequence == "full")).by_state
    allowed_SR = torch.as_tensor(compiled.automaton.allowed)
    logits, targets, field = [], [], []
    for batch in batches:
        at = batch.choice
        logits_MR = model(*batch.to(device).inputs).float().cpu()[at, : allowed_SR.shape[1]]
        logits.append(logits_MR.masked_fill(~allowed_SR[batch.state[at]], -torch.inf))
        targets.append(batch.targets[at])
        field.append(fields[batch.state[at].numpy()])
    logits_NR, targets_N, field_N = torch.cat(logits).double(), torch.cat(targets), np.concatenate(field)
    return {name: _fit(logits_NR[field_N == i], targets_N[field_N == i]) for i, name in enumerate(compiled.task.fields)}


def _fit(logits_NR: torch.Tensor, targets_N: torch.Tensor) -> float:
    if not len(targets_N):  # a field of one value
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_NR / np.exp(log_temperature), targets_N))

    found = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded")
    return round(float(np.exp(found.x)), 4)
