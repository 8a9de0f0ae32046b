"""The seam between extraction and the engine that runs the teacher.

An engine answers prompts under the automaton and shows an observer every step's raw logits. Two engines stand behind it:
`vllm`, the fast one, and `transformers`, the plain one it is tested against.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.base.runtime import MALLOC
from pipeline.config import TeacherConfig
from pipeline.task.automaton import Automaton
from pipeline.teacher.capture import Captured, Census, CensusResult, Recorder

Capture = Literal["all", "choices"]


def weights_type(config: TeacherConfig) -> str:
    """What a teacher's weights are loaded as: a name that PyTorch has, or auto for the checkpoint's own."""
    emulated = not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())  # vLLM goes by this as well
    return "float32" if config.dtype == "auto" and emulated else config.dtype


@dataclass(frozen=True)
class Job:
    """What an engine is to do with each prompt.

    Attributes:
        automaton: the answers' automaton.
        end_id: the token that ends an answer.
        max_prompt: tokens of the longest prompt to come.
        watched: int32 [W], the tokens to record; None takes a census instead.
        capture: at which steps to record.
        temperature: of sampling; 0 is greedy.
        jump: whether to read forced tokens together with the choice before them, or each in a step of its own; only the
            vLLM engine jumps, and no census does.
    """

    automaton: Automaton
    end_id: int
    max_prompt: int
    watched: NDArray[np.int32] | None
    capture: Capture = "all"
    temperature: float = 0.0
    jump: bool = True

    @property
    def jumps(self) -> bool:
        """Whether forced tokens are read without a step of their own."""
        return self.jump and self.watched is not None

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self.max_prompt + self.automaton.longest

    def observer(self, device: torch.device) -> Recorder | Census:
        """A fresh observer on the device the logits are on."""
        return Census(self.automaton, device) if self.watched is None else Recorder(self.watched, device)

    def wanted(self, answers: list[list[int]]) -> NDArray[np.bool_]:
        """The steps of answers whose logits are to be kept: bool [N, T], T being the longest answer's tokens."""
        lengths = np.array([len(answer) for answer in answers], np.int64)
        wanted = np.arange(lengths.max(initial=0)) < lengths[:, None]
        if self.capture == "choices":
            states = self.automaton.states_before(np.array(answer, np.int32) for answer in answers)
            wanted[wanted] = ~self.automaton.forced[states]
        return wanted


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        prompt: its tokens.
        answer: the answer to take instead of the teacher's own, end token last.
        seed: of this answer's sampling.
    """

    prompt: list[int]
    answer: list[int] | None = None
    seed: int | None = None


class TeacherEngine(Protocol):
    """One engine, ready to answer."""

    def record(self, requests: list[Request]) -> Captured:
        """Answers prompts under the automaton, with the watched logits of the steps that `Job.capture` names."""

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """Answers prompts greedily under the automaton and sums probabilities over the full vocabulary."""

    def run(self) -> None:
        """Does, in the thread that opened the engine, what others ask, for ever; returns where each does its own."""


def open_teacher(model: str, config: TeacherConfig, job: Job) -> TeacherEngine:
    """Starts the configured engine in this process.

    Raises:
        UserError: the engine is not installed here, or cannot load the model.
    """
    try:
        if config.engine == "vllm":
            from pipeline.teacher.vllm_engine import VllmTeacher

            return VllmTeacher(model, config, job)
        from pipeline.teacher.transformers_engine import TransformersTeacher

        return TransformersTeacher(model, config, job)
    except ModuleNotFoundError as error:
        raise UserError(f"the {config.engine} engine is not installed here: {error}. See README, Install") from error


def engine_environment(config: TeacherConfig) -> dict[str, str]:
    """Environment variables an engine's process needs before it starts."""
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.actors)
    return MALLOC | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned engines on one host slow each other
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor's own process, and so does the capture
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # docs/extraction.md says what the second model runner lacks
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
