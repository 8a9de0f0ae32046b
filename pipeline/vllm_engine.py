"""The teacher on vLLM's V1 model runner: a logits processor that watches raw logits, then constrains them.

Structured outputs are not used: vLLM applies a grammar before any processor, and masked logits are not raw logits.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.automaton import Automaton
from pipeline.capture import Captured, Census, CensusResult, Constraint, Recorder
from pipeline.config import TeacherConfig
from pipeline.gemma3_text import CLASS_OVERRIDES, text_config
from pipeline.teacher import Job

SETTINGS = "retort"  # the key of `additional_config` that carries the job to the processor, in whichever process it lives
ROW = "retort_row"  # the key of `extra_args` that says which answer of the batch a request is


class CapturingProcessor(LogitsProcessor):
    """Shows the observer the raw logits of each request's next token, then leaves only what the automaton allows.

    Requests stand in slots that vLLM adds, moves and frees. A slot's step is the number of tokens its request has so
    far, which stays right when a prefill is cut into chunks or a request is preempted and read again.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        settings = vllm_config.additional_config[SETTINGS]
        automaton = Automaton.load(settings["automaton"])
        job = Job(automaton, settings["end_id"], settings["max_prompt"], _as_array(settings["watched"]))
        slots = vllm_config.scheduler_config.max_num_seqs
        self.observer: Recorder | Census = job.observer(device)
        self._device = device
        self._constraint = Constraint(automaton, device)
        self._rows = np.full(slots, -1, np.int64)
        self._steps = np.zeros(slots, np.int64)
        self._states = torch.zeros(slots, dtype=torch.int64, device=device)
        self._outputs: list[list[int]] = [[] for _ in range(slots)]

    def is_argmax_invariant(self) -> bool:
        """Constraining changes the likeliest token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests into, between and out of slots."""
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._rows[slot] = -1
        for slot, params, _, output in batch_update.added:
            self._add(slot, (params.extra_args or {}).get(ROW, -1), output)
        for a, b, direction in batch_update.moved:
            self._move(a, b, swap=direction == MoveDirectionality.SWAP)

    def _add(self, slot: int, row: int, output: list[int]) -> None:
        self._rows[slot], self._outputs[slot], self._steps[slot] = row, output, 0
        self._states[slot] = 0

    def _move(self, a: int, b: int, swap: bool) -> None:
        to, source = ([a, b], [b, a]) if swap else ([b], [a])
        self._rows[to], self._steps[to] = self._rows[source], self._steps[source]
        self._states[to] = self._states[source]
        moved = [self._outputs[slot] for slot in source]
        for slot, output in zip(to, moved, strict=True):
            self._outputs[slot] = output
        if not swap:
            self._rows[a] = -1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Observes and constrains one engine step: float32 [N, V], slot by slot."""
        n = len(logits)
        self._follow(n)
        states, rows = self._states[:n], self._rows[:n].copy()
        self.observer.observe(logits, states, rows, self._steps[:n].copy())
        if (rows >= 0).all():
            self._constraint.apply(logits, states)
        else:  # requests without a row, such as vLLM's own warm-up, are left alone
            mine = torch.as_tensor(rows >= 0, device=self._device)
            self._constraint.apply(logits, states.where(mine, -1))
        return logits

    def _follow(self, n: int) -> None:
        """Moves each slot's state along the tokens its request got since the last step: one, or all after preemption."""
        lengths = np.fromiter(map(len, self._outputs[:n]), np.int64, n)
        while (behind := np.flatnonzero((lengths > self._steps[:n]) & (self._rows[:n] >= 0))).size:
            tokens = [self._outputs[slot][self._steps[slot]] for slot in behind]
            at = torch.as_tensor(behind, device=self._device)
            self._states[at] = self._constraint.advance(self._states[at], torch.as_tensor(tokens, device=self._device))
            self._steps[behind] += 1


def _as_array(watched: list[int] | None) -> NDArray[np.int32] | None:
    return None if watched is None else np.array(watched, np.int32)


def _processor(worker: Any) -> CapturingProcessor:
    """The capturing processor inside a vLLM worker."""
    return next(p for p in worker.model_runner.input_batch.logitsprocs.all if isinstance(p, CapturingProcessor))


class VllmTeacher:
    """See `pipeline.teacher.Teacher`."""

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        self._job = job
        self._folder = tempfile.TemporaryDirectory(prefix="retort-")
        path = os.path.join(self._folder.name, "automaton.safetensors")
        job.automaton.save(path)
        watched = None if job.watched is None else job.watched.tolist()
        settings = {"automaton": path, "end_id": job.end_id, "max_prompt": job.max_prompt, "watched": watched}
        self._llm = LLM(
            model=model,
            revision=config.revision,
            dtype=config.dtype,
            max_model_len=job.max_length,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            gpu_memory_utilization=config.gpu_memory_utilization,
            async_scheduling=False,  # the processor must see each token before the next step
            generation_config="vllm",  # the checkpoint's own sampling defaults must not shorten answers
            hf_overrides=text_config,
            model_class_overrides=CLASS_OVERRIDES,
            skip_tokenizer_init=True,
            logits_processors=[CapturingProcessor],
            additional_config={SETTINGS: settings},
            **_platform_options(),
        )

    def record(self, prompts: list[list[int]]) -> Captured:
        """See `Teacher`."""
        return self._drain(self._answer(prompts))

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `Teacher`."""
        self._answer(prompts)
        return self._drain()

    def _answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """The answers' tokens, end token included."""
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        params = [self._sampling(row) for row, _ in zip(count(), prompts, strict=False)]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _sampling(self, row: int) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=self._job.automaton.longest,
            stop_token_ids=[self._job.end_id],
            ignore_eos=True,  # the automaton knows where an answer ends
            detokenize=False,
            extra_args={ROW: row},
        )

    def _drain(self, *answers: list[list[int]]) -> Any:
        """What the first worker's observer saw; with tensor parallelism each worker saw the same."""
        return self._llm.collective_rpc(lambda worker: _processor(worker).observer.drain(*answers))[0]


def _platform_options() -> dict[str, Any]:
    """On CPU: no compilation, and cache blocks short enough that prompts share their beginning (128 tokens by default)."""
    return {"enforce_eager": True, "block_size": 32} if current_platform.is_cpu() else {}
