"""The teacher on Hugging Face transformers: slow and plain, the reference the vLLM engine is tested against."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.capture import Captured, Census, CensusResult, Constraint, Recorder
from pipeline.config import TeacherConfig
from pipeline.teacher import Job


class TransformersTeacher:
    """See `pipeline.teacher.Teacher`."""

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, revision=config.revision, dtype=config.dtype)
        self._model.to(self._device).eval()
        self._job = job
        self._batch = config.max_num_seqs
        self._constraint = Constraint(job.automaton, self._device)
        self._observer: Recorder | Census = job.observer(self._device)

    def record(self, prompts: list[list[int]]) -> Captured:
        """See `Teacher`."""
        return self._drain(self._answer(prompts))

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `Teacher`."""
        self._answer(prompts)
        return self._drain()

    def _drain(self, *answers: list[list[int]]) -> Any:
        return self._observer.drain(*answers)  # type: ignore[call-arg]

    def _answer(self, prompts: list[list[int]]) -> list[list[int]]:
        starts = range(0, len(prompts), self._batch)
        batches = (self._answer_batch(prompts[start : start + self._batch], start) for start in starts)
        return list(itertools.chain.from_iterable(batches))

    @torch.inference_mode()
    def _answer_batch(self, prompts: list[list[int]], first_row: int) -> list[list[int]]:
        """Greedy decoding of one left-padded batch, step by step."""
        inputs, mask = self._pad(prompts)
        states = torch.zeros(len(prompts), dtype=torch.int64, device=self._device)
        answers: list[list[int]] = [[] for _ in prompts]
        cache = None
        for step in range(self._job.automaton.longest):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
            output = self._model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            active = states != self._job.automaton.end
            rows = np.where(active.cpu(), np.arange(len(prompts)) + first_row, -1)
            self._observer.observe(logits, states, rows, np.full(len(prompts), step))
            self._constraint.apply(logits, states)
            tokens = logits.argmax(1).where(active, self._job.end_id)
            for answer, token, go in zip(answers, tokens.tolist(), active.tolist(), strict=True):
                answer += [token] if go else []
            states = self._constraint.advance(states, tokens).where(active, states)
            if bool((states == self._job.automaton.end).all()):
                break
            inputs, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return answers

    def _pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded int64 [N, T] and its mask."""
        longest = max(map(len, prompts))
        inputs = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(prompts):
            inputs[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        return inputs.to(self._device), mask.to(self._device)
