"""The teacher on Hugging Face transformers: slow and plain, the reference the vLLM engine is tested against."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import TeacherConfig
from pipeline.teacher.capture import Captured, Census, CensusResult, Constraint, Recorder
from pipeline.teacher.engines import Job, Request, weights_type


class TransformersTeacher:
    """See `pipeline.teacher.engines.TeacherEngine`."""

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, revision=config.revision, dtype=weights_type(config))
        self._model.to(self._device).eval()
        _give_float32_head(self._model)
        self._job = job
        self._batch = config.max_num_seqs
        self._constraint = Constraint(job.automaton, self._device)
        self._lock = threading.Lock()
        self._observer: Recorder | Census = job.observer(self._device)

    def record(self, requests: list[Request]) -> Captured:
        """See `TeacherEngine`."""
        with self._lock:
            answers = self._answer(requests)
            return self._drain(answers, self._job.wanted(answers))

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `TeacherEngine`."""
        self._answer([Request(prompt) for prompt in prompts])
        return self._drain()

    def run(self) -> None:
        """See `TeacherEngine`: each thread does its own."""

    def _drain(self, *arguments: Any) -> Any:
        return self._observer.drain(*arguments)

    def _answer(self, requests: list[Request]) -> list[list[int]]:
        starts = range(0, len(requests), self._batch)
        batches = (self._answer_batch(requests[start : start + self._batch], start) for start in starts)
        return list(itertools.chain.from_iterable(batches))

    @torch.inference_mode()
    def _answer_batch(self, requests: list[Request], first_row: int) -> list[list[int]]:
        """Decodes one left-padded batch, step by step."""
        inputs, mask = self._pad([request.prompt for request in requests])
        states = torch.zeros(len(requests), dtype=torch.int64, device=self._device)
        answers: list[list[int]] = [[] for _ in requests]
        choose = _Chooser(requests, self._job, self._device)
        cache = None
        for step in range(self._job.automaton.longest):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
            output = self._model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = output.past_key_values, output.logits[:, -1]
            active = states != self._job.automaton.end
            rows = np.where(active.cpu(), np.arange(len(requests)) + first_row, -1)
            self._observer.observe(logits, states, rows, np.full(len(requests), step))
            self._constraint.apply(logits, states)
            tokens = choose(logits, step).where(active, self._job.end_id)
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


def _give_float32_head(model: Any) -> None:
    """Makes logits float32, as vLLM's are: in bf16 two values are often equally likely, and a token's id decides.

    The embedding, which may be the same tensor, stays as it is.
    """
    head = model.get_output_embeddings()
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, torch.nn.Parameter(parameter.float(), requires_grad=False))
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


class _Chooser:
    """The next tokens of a batch: as given, sampled, or the likeliest."""

    def __init__(self, requests: list[Request], job: Job, device: torch.device) -> None:
        self._given = [request.answer for request in requests]
        self._temperature = job.temperature
        self._generators = [torch.Generator(device).manual_seed(request.seed or 0) for request in requests]

    def __call__(self, logits_NV: torch.Tensor, step: int) -> torch.Tensor:
        """int64 [N]."""
        tokens = self._sample(logits_NV) if self._temperature else logits_NV.argmax(1)
        for row, answer in enumerate(self._given):
            if answer is not None and step < len(answer):
                tokens[row] = answer[step]
        return tokens

    def _sample(self, logits_NV: torch.Tensor) -> torch.Tensor:
        rows = (logits_NV / self._temperature).softmax(1)
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(rows, self._generators, strict=True)])
