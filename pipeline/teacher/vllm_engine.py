"""The teacher on vLLM's V1 model runner: raw logits are read off the model, and forced tokens cost no step of their own.

Structured outputs are not used: vLLM applies a grammar before any processor, and masked logits are not raw logits.

A logits processor (vLLM's own interface) watches the raw logits of each request's next token and leaves only what the
automaton allows. Behind the sampler, the forced run that follows the sampled token is added to it, as if it had been
sampled too: the runner takes several tokens a step from its sampler (that is how speculative decoding returns them), and
its next step reads them all at once, like a piece of a prompt. So an answer costs about as many steps as it has choices,
and the logits at forced positions come from the hidden states of those pieces.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.task.forced import ForcedRuns, forced_runs
from pipeline.teacher.capture import Captured, Census, CensusResult, Constraint, Recorder, Seen
from pipeline.teacher.engines import Job, Request, weights_type
from pipeline.teacher.gemma3_text import CLASS_OVERRIDES, text_config

ROW, GIVEN = "retort_row", "retort_given"  # in `extra_args`: which answer a request is, and its tokens within the prompt
PLACEHOLDER = -1  # what vLLM leaves out of a sampled row
HIDDEN_ROWS = 512  # positions whose logits over the full vocabulary are computed at once


class CapturingProcessor(LogitsProcessor):
    """Shows the observer the raw logits of each position of an answer, then leaves only what the automaton allows.

    Requests stand in slots that vLLM adds, moves and frees. Which step of its answer a position is follows from the
    runner's own counts, which stay right when a prompt is cut into chunks or a request is preempted and read again.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._job = job = vllm_config.additional_config.job
        slots = vllm_config.scheduler_config.max_num_seqs
        self.observer: Recorder | Census = job.observer(device)
        self._device = device
        self._constraint = Constraint(job.automaton, device)
        self._runs = _DeviceRuns(_runs(job), device)
        self._rows = np.full(slots, -1, np.int64)
        self._given = np.zeros(slots, np.int64)  # tokens of the answer that stand in the prompt
        self._wanted = np.zeros((slots, job.automaton.longest), bool)
        self._states = torch.zeros(slots, dtype=torch.int64, device=device)
        self._live = np.zeros(0, bool)

    def attach(self, runner: Any, observes: bool) -> None:
        """Stands behind the runner's model, for the hidden states of every position, and behind its sampler.

        Args:
            observes: whether to show logits: with tensor parallelism each worker has the same.
        """
        self._runner = runner
        self._observe = self.observer.observe if observes else _pass_over
        forward = runner._model_forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            self._hidden = forward(*args, **kwargs)
            return self._hidden

        runner._model_forward = keep
        runner.sampler.register_forward_hook(self._extend)

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
            self._add(slot, params.extra_args or {}, output)
        for a, b, direction in batch_update.moved:
            self._move(a, b, swap=direction == MoveDirectionality.SWAP)

    def _add(self, slot: int, about: dict[str, Any], output: list[int]) -> None:
        given = about.get(GIVEN, [])
        self._rows[slot], self._given[slot] = about.get(ROW, -1), len(given)
        self._states[slot] = self._job.automaton.walk([*given, *output])[-1]  # output: of a request that was preempted
        self._wanted[slot] = self._job.capture == "all"
        if self._job.capture == "choices":  # only what is read from the prompt: a piece read later ends in its one choice
            states = self._job.automaton.walk(given)[:-1]
            self._wanted[slot, : len(given)] = ~self._job.automaton.forced[states]

    def _move(self, a: int, b: int, swap: bool) -> None:
        to, source = ([a, b], [b, a]) if swap else ([b], [a])
        columns: tuple[Any, ...] = (self._rows, self._given, self._wanted, self._states)
        for column in columns:
            column[to] = column[source]
        if not swap:
            self._rows[a] = -1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Observes and constrains one engine step: float32 [N, V], slot by slot."""
        n = len(logits)
        rows, states = self._rows[:n], self._states[:n]
        first, count = self._positions(n)
        live = ~self._runner.discard_request_mask.np[:n] & (rows >= 0)  # the others' prompts are not read to their ends
        self._observe_passed(first, count - live)
        self._observe(logits, states, np.where(live, rows, -1), first + count - 1)
        self._live = live
        self._constraint.apply(logits, states.where(self._on_device(live), -1))
        return logits

    def _positions(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The answer step that each slot's first position of this step predicts (negative in a prompt), and how many it has."""
        batch, edges = self._runner.input_batch, self._runner.query_start_loc.np[: n + 1]
        before = batch.num_computed_tokens_cpu[:n] - batch.num_prompt_tokens[:n]
        return before + 1 + self._given[:n], np.diff(edges).astype(np.int64)

    def _observe_passed(self, first: NDArray[np.int64], count: NDArray[np.int64]) -> None:
        """Observes the positions before each slot's last: they predict tokens already known."""
        if not isinstance(self.observer, Recorder):
            return
        slots = np.repeat(np.arange(len(count)), count)
        offset = np.arange(len(slots)) - np.repeat(np.cumsum(count) - count, count)
        steps = first[slots] + offset
        passed = (steps >= 0) & (self._rows[slots] >= 0) & self._wanted[slots, steps.clip(0, self._wanted.shape[1] - 1)]
        if not passed.any():
            return
        slots, steps = slots[passed], steps[passed]
        places = self._on_device(self._runner.query_start_loc.np[slots] + offset[passed])
        for start in range(0, len(places), HIDDEN_ROWS):
            part = slice(start, start + HIDDEN_ROWS)
            logits = self._runner.model.compute_logits(self._hidden[places[part]]).float()
            self._observe(logits, self._states[slots[part]], self._rows[slots[part]], steps[part])

    def _extend(self, _sampler: Any, _inputs: Any, output: Any) -> None:
        """Moves each slot's state along its sampled token and adds the forced run behind it: int32 [N, 1] to [N, 1 + X]."""
        n = len(self._live)
        live, states = self._on_device(self._live), self._states[:n]
        sampled_N1 = output.sampled_token_ids
        reached = self._constraint.advance(states, sampled_N1[:, 0].long()).where(live, states)
        self._states[:n] = self._runs.after[reached]
        output.sampled_token_ids = torch.cat([sampled_N1, self._runs.tokens[reached].to(sampled_N1.dtype)], 1)

    def _on_device(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values, device=self._device)


def _pass_over(*_: Any) -> None:
    """Observes nothing."""


class _DeviceRuns:
    """Forced runs on the logits' device.

    Attributes:
        tokens: int64 [S, X], `PLACEHOLDER` behind each run.
        after: int64 [S].
    """

    def __init__(self, runs: ForcedRuns, device: torch.device) -> None:
        inside = np.arange(runs.tokens.shape[1]) < runs.lengths[:, None]
        self.tokens = torch.as_tensor(np.where(inside, runs.tokens, PLACEHOLDER), device=device)
        self.after = torch.as_tensor(runs.after, device=device)


def _runs(job: Job) -> ForcedRuns:
    """What is added behind a sampled token. Where forced steps are recorded, an answer's last run must still be read."""
    if job.jumps:
        return forced_runs(job.automaton, through_end=job.capture == "choices")
    states = job.automaton.states
    return ForcedRuns(np.zeros((states, 0), np.int64), np.zeros(states, np.int64), np.arange(states))


@dataclass(frozen=True)
class Carried:
    """The job as `additional_config`, which brings it to the processor in whichever process that lives."""

    job: Job

    def compute_hash(self) -> str:
        """What vLLM keeps compiled models by, with its other settings: no job changes a model, so all share one."""
        return "retort"


def _processor(worker: Any) -> CapturingProcessor:
    """The capturing processor inside a vLLM worker."""
    return next(p for p in worker.model_runner.input_batch.logitsprocs.all if isinstance(p, CapturingProcessor))


@dataclass(eq=False)
class _Unit:
    """Requests that were asked together.

    Attributes:
        waiting: places of those that the engine does not have yet.
        answers: by place, tokens with the end token.
        first: the row of its first answer; rows are numbered over the engine's life.
        cached: whether its prompts may be read from the prefix cache.
        seen: what was recorded when the last answer has come; None for a census.
    """

    requests: list[Request]
    waiting: deque[int]
    answers: dict[int, list[int]] = field(default_factory=dict)
    first: int = 0
    cached: bool = True
    seen: Future[Seen | None] = field(default_factory=Future)

    def all_answers(self) -> list[list[int]]:
        """In the order of the requests."""
        return [self.answers[place] for place in range(len(self.requests))]


class VllmTeacher:
    """See `pipeline.teacher.engines.TeacherEngine`. Several threads may ask at a time.

    What they ask goes through the engine together, so that it does not run empty while one answer of a unit is long or a unit
    ends. The thread that opened it has it: on CPU another one computes up to a tenth slower, with a heap and OpenMP threads of
    its own beside the first one's.
    """

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        _require_gpu()
        self._job = job
        opening = forced_runs(job.automaton, through_end=False).of(0)
        self._opening = opening if job.jumps else []
        self._llm = LLM(
            model=model,
            revision=config.revision,
            dtype=weights_type(config),
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
            additional_config=Carried(job),
            **_platform_options(config),
        )
        self._llm.collective_rpc(lambda worker: _processor(worker).attach(worker.model_runner, worker.rank == 0))
        self._most = 2 * config.max_num_seqs  # requests that the engine has, so that some always wait
        self._asked: dict[str, tuple[_Unit, int]] = {}  # by the engine's name for a request: its unit and place
        self._arriving, self._arrived, self._units, self._rows = threading.Condition(), list[_Unit](), list[_Unit](), 0
        self._owner = threading.get_ident()

    def record(self, requests: list[Request]) -> Captured:
        """See `TeacherEngine`."""
        unit = self._ask(requests)
        seen, answers = unit.seen.result(), unit.all_answers()
        assert seen is not None  # noqa: S101 - for the types
        return seen.by_answer(answers, self._job.wanted(answers))

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `TeacherEngine`."""
        self._ask([Request(prompt) for prompt in prompts]).seen.result()
        return self._observer("drain")

    def run(self) -> None:
        """See `TeacherEngine`."""
        while True:
            self._step()

    def _ask(self, requests: list[Request]) -> _Unit:
        """Has requests answered, by the thread that has the engine."""
        unit = _Unit(requests, deque(range(len(requests))))
        with self._arriving:
            self._arrived.append(unit)
            self._arriving.notify()
        while threading.get_ident() == self._owner and not unit.seen.done():
            self._step()
        return unit

    def _step(self) -> None:
        """A step of the engine; where it fails, so does all that was asked."""
        try:
            self._take_on()
            self._feed()
            for output in self._llm.llm_engine.step():
                if output.finished:
                    self._note(output)
        except Exception as error:
            with self._arriving:
                failed, self._units, self._arrived = self._units + self._arrived, [], []
            for unit in failed:
                unit.seen.set_exception(error)

    def _take_on(self) -> None:
        """Takes on what has arrived, and waits for it where there is nothing to do."""
        with self._arriving:
            self._arriving.wait_for(lambda: self._units or self._arrived)
            arrived, self._arrived = self._arrived, []
        for unit in arrived:
            unit.first, self._rows = self._rows, self._rows + len(unit.requests)
            self._units.append(unit)
            self._end_if_answered(unit)  # of no requests

    def _feed(self) -> None:
        """Gives the engine as many requests as it may have, the first unit's first."""
        for unit in self._units:
            while unit.waiting and len(self._asked) < self._most:
                place = unit.waiting.popleft()
                request, name = unit.requests[place], str(unit.first + place)
                given = self._given(request)
                params = self._sampling(request, unit.first + place, given, not unit.cached)
                self._asked[name] = unit, place
                self._llm.llm_engine.add_request(name, tokens_input(request.prompt + given), params)

    def _note(self, output: Any) -> None:
        """Takes an answer."""
        unit, place = self._asked.pop(output.request_id)
        unit.answers[place] = [*self._given(unit.requests[place]), *output.outputs[0].token_ids]
        self._end_if_answered(unit)

    def _end_if_answered(self, unit: _Unit) -> None:
        if len(unit.answers) < len(unit.requests):
            return
        answers, recorded = unit.all_answers(), self._job.watched is not None
        lost = self._observer("missing", self._job.wanted(answers), unit.first) if recorded and unit.cached else []
        if lost:  # read from the prefix cache, where an equal request had left them: ask again without it
            self._observer("forget", [unit.first + place for place in lost])
            unit.cached, unit.waiting = False, deque(lost)
            for place in lost:
                del unit.answers[place]
        else:
            self._units.remove(unit)
            unit.seen.set_result(self._observer("take", unit.first, len(answers)) if recorded else None)

    def _given(self, request: Request) -> list[int]:
        """The part of the answer that is known beforehand: it is read with the prompt."""
        return self._opening if request.answer is None else request.answer[:-1]

    def _sampling(self, request: Request, row: int, given: list[int], uncached: bool) -> SamplingParams:
        return SamplingParams(
            temperature=self._job.temperature,
            seed=request.seed,
            max_tokens=self._job.automaton.longest - len(given),
            stop_token_ids=[self._job.end_id],
            ignore_eos=True,  # the automaton knows where an answer ends
            detokenize=False,
            extra_args={ROW: row, GIVEN: given},
            skip_clone=True,  # nobody else uses it
            skip_reading_prefix_cache=uncached,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _observer(self, method: str, *arguments: Any) -> Any:
        """Calls the first worker's observer; with tensor parallelism the others' have seen nothing."""
        return self._llm.collective_rpc(lambda worker: getattr(_processor(worker).observer, method)(*arguments))[0]


def _require_gpu() -> None:
    """Checks that a build for GPUs sees one.

    Raises:
        UserError: it does not, as where Ray reserved none.
    """
    if current_platform.is_cuda_alike() and not torch.cuda.device_count():
        raise UserError("vLLM's build here runs on GPUs, and the teacher has none: reserve one (--set teacher.gpus=1)")


def _platform_options(config: TeacherConfig) -> dict[str, Any]:
    """On CPU the shortest cache blocks there are, so that prompts share their beginning (128 tokens by default)."""
    cpu = current_platform.is_cpu()
    compiled = config.compile if config.compile is not None else not cpu
    processes = config.tensor_parallel
    parallel = {"tensor_parallel_size": processes, "distributed_executor_backend": "mp" if processes > 1 else None}
    return parallel | {"enforce_eager": not compiled} | ({"block_size": 32} if cpu else {})
