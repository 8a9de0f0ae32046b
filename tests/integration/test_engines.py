"""The vLLM engine against the transformers one: the same answers and raw logits, however the engine schedules its work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from pipeline.base.runtime import start_ray
from pipeline.config import TeacherConfig
from pipeline.task.compilation import compile_automaton
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import load_teacher_tokenizer
from pipeline.teacher.capture import Captured
from pipeline.teacher.engines import Job, Request, engine_environment, open_teacher
from tests.conftest import RealCase
from tests.tiny import save_conditional, save_teacher, tiny_task

LOGIT_TOLERANCE = 1e-4
MARGIN = 1e-3  # two tokens closer than this may change places


class Case:
    """A teacher, its task compiled, and prompts to answer."""

    def __init__(self, model: Path, task_path: Path | None, texts: list[str], extra_watched: int = 64) -> None:
        self.model = str(model)
        task = tiny_task() if task_path is None else load_task(str(task_path))
        tokenizer = load_teacher_tokenizer(self.model)
        self.automaton = compile_automaton(task, tokenizer)
        self.end_id = tokenizer.end_id
        self.prompts = tokenizer.prompt(task).ids(texts, tokenizer)
        others = np.setdiff1d(np.arange(tokenizer.size, dtype=np.int32), self.automaton.tokens)[:extra_watched]
        self.watched = np.concatenate([self.automaton.tokens, others])

    def capture(
        self, config: TeacherConfig, patch: Callable[[], None] | None = None, requests: list[Request] | None = None, **job: Any
    ) -> tuple[Captured, int]:
        """Answers in a process of its own, as in production; also how often a request came back after preemption."""
        start_ray()
        about = Job(self.automaton, self.end_id, max(map(len, self.prompts)), self.watched, **job)
        asked = requests or [Request(prompt) for prompt in self.prompts]
        options: dict[str, Any] = {"num_cpus": 0.5, "max_calls": 1, "runtime_env": {"env_vars": engine_environment(config)}}
        return ray.get(ray.remote(**options)(_capture).remote(self.model, config, about, asked, patch))

    def margins(self, captured: Captured) -> np.ndarray:
        """Least distance at each answer between the chosen token's logit and the next allowed one's."""
        margins = np.full(len(self.prompts), np.inf)
        for row, length in enumerate(captured.lengths):
            answer = captured.tokens[row, :length]
            allowed = self.automaton.allowed[self.automaton.walk(answer)[:-1]]
            logits = np.where(allowed, captured.logits[row, :length, : len(self.automaton.tokens)], -np.inf)
            top = np.sort(logits, axis=1)[:, -2:]
            margins[row] = (top[:, 1] - top[:, 0]).min()
        return margins


def _capture(model: str, config: TeacherConfig, job: Job, asked: list[Request], patch: Callable[[], None] | None) -> Any:
    resumed = [0]
    if config.engine == "vllm":
        from pipeline.teacher import vllm_engine

        add = vllm_engine.CapturingProcessor._add

        def counting(self: Any, slot: int, about: dict[str, Any], output: list[int]) -> None:
            resumed[0] += len(output) > 0
            add(self, slot, about, output)

        vllm_engine.CapturingProcessor._add = counting  # type: ignore[method-assign]
    if patch:
        patch()
    teacher, third = open_teacher(model, config, job), -(-len(asked) // 3)
    threading.Thread(target=teacher.run, daemon=True).start()
    with ThreadPoolExecutor(3) as threads:  # what is asked beside one another goes through the engine together
        found = list(threads.map(teacher.record, (asked[start : start + third] for start in range(0, len(asked), third))))
    return Captured.join(found), resumed[0]


def few_cache_blocks() -> None:
    """So little cache that running requests must be preempted."""
    from pipeline.teacher import vllm_engine

    options = vllm_engine._platform_options
    vllm_engine._platform_options = lambda config: options(config) | {"num_gpu_blocks_override": 16}


def assert_same(case: Case, ours: Captured, reference: Captured) -> None:
    """Equal answers wherever the reference is sure, and equal logits along equal answers."""
    same = np.array([a.tolist() == b.tolist() for a, b in zip(_answers(ours), _answers(reference), strict=True)])
    assert (same | (case.margins(reference) < MARGIN)).all()
    assert same.mean() > 0.9
    steps = int(reference.lengths.max())
    assert ours.kept[same].any()
    for name in ("logits", "lse"):
        error = np.abs(getattr(ours, name)[same, :steps] - getattr(reference, name)[same, :steps])
        assert error[ours.kept[same, :steps]].max() < LOGIT_TOLERANCE, name


def _answers(captured: Captured) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(captured.tokens, captured.lengths, strict=True)]


def float32(engine: str, **settings: Any) -> TeacherConfig:
    return TeacherConfig(engine=engine, dtype="float32", **settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tiny-teacher")
    save_teacher(folder, seed=0)
    texts = [f"comment {i} " + "good bad fine " * (i % 9) for i in range(48)]
    return Case(folder, None, texts)


@pytest.fixture(scope="module")
def tiny_reference(tiny: Case) -> Captured:
    return tiny.capture(float32("transformers"))[0]


@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({}, True),
        pytest.param({"capture": "choices"}, False, marks=pytest.mark.slow),
        pytest.param({"jump": False}, True, marks=pytest.mark.slow),
    ],
)
def test_vllm_equals_transformers_when_prefills_are_chunked_and_requests_preempted(
    tiny: Case, tiny_reference: Captured, options: dict[str, Any], preempts: bool
) -> None:
    config = float32("vllm", max_num_seqs=32, max_num_batched_tokens=48)
    ours, resumed = tiny.capture(config, few_cache_blocks, **options)
    assert resumed > 0 or not preempts, "nothing was preempted: the test does not test what it says"
    assert_same(tiny, ours, tiny_reference)


@pytest.mark.slow
def test_processes_that_share_an_engines_weights_answer_as_one(tiny: Case, tiny_reference: Captured) -> None:
    ours, _ = tiny.capture(float32("vllm", tensor_parallel=2))
    assert_same(tiny, ours, tiny_reference)


@pytest.mark.slow
def test_given_answers_are_scored_as_they_are_and_equal_prompts_too(tiny: Case, tiny_reference: Captured) -> None:
    """Every prompt three times: twice with the teacher's answer, once with another's, so that cached blocks are met."""
    own = [answer.tolist() for answer in _answers(tiny_reference)]
    given = [*own, *own, *own[1:], own[0]]
    requests = [Request(prompt, answer) for prompt, answer in zip(tiny.prompts * 3, given, strict=True)]
    ours, _ = tiny.capture(float32("vllm", max_num_seqs=16), requests=requests)
    plain, _ = tiny.capture(float32("transformers"), requests=requests)
    assert [answer.tolist() for answer in _answers(ours)] == given
    assert ours.kept.sum() == sum(map(len, given))
    for name in ("logits", "lse"):
        assert np.abs(getattr(ours, name) - getattr(plain, name)).max() < LOGIT_TOLERANCE, name
        first = getattr(ours, name)[: len(own)] - getattr(tiny_reference, name)
        assert np.abs(first).max() < LOGIT_TOLERANCE, name


@pytest.mark.slow
def test_samples_repeat_by_seed_and_spread_as_the_teacher_does(tiny: Case) -> None:
    requests = [Request(tiny.prompts[0], seed=seed) for seed in [*range(200), *reversed(range(200))]]
    ours, _ = tiny.capture(float32("vllm"), requests=requests, temperature=1.5)
    answers = [answer.tolist() for answer in _answers(ours)]
    assert answers[:200] == answers[:199:-1]
    first = int(np.flatnonzero(~tiny.automaton.forced[tiny.automaton.walk(_answers(ours)[0])[:-1]])[0])
    allowed = np.flatnonzero(tiny.automaton.allowed[tiny.automaton.walk(_answers(ours)[0])[first]])
    scores = np.exp(ours.logits[0, first, allowed].astype(np.float64) / 1.5)
    counts = np.array([(ours.tokens[:, first] == tiny.automaton.tokens[column]).sum() for column in allowed])
    assert counts.sum() == len(requests)
    expected = scores / scores.sum() * len(requests)
    assert (np.abs(counts - expected) < 5 * np.sqrt(2 * expected) + 1).all(), (counts, expected)


def test_vllm_draws_each_answer_by_its_own_seed_and_the_jobs_temperature(tiny: Case) -> None:
    from pipeline.teacher.vllm_engine import VllmTeacher

    teacher = object.__new__(VllmTeacher)  # without its engine
    teacher._job = Job(tiny.automaton, tiny.end_id, 60, tiny.watched, temperature=0.7)
    sampling = [teacher._sampling(Request([5], seed=seed), row, [], uncached=False) for row, seed in enumerate((3, 9, None))]
    assert [(one.seed, one.temperature) for one in sampling] == [(3, 0.7), (9, 0.7), (None, 0.7)]


@pytest.mark.slow
def test_conditional_generation_checkpoint_goes_through_both_engines(tmp_path: Path) -> None:
    save_conditional(tmp_path, seed=1)
    case = Case(tmp_path, None, [f"comment {i}" for i in range(6)])
    assert_same(case, case.capture(float32("vllm"))[0], case.capture(float32("transformers"))[0])


@pytest.mark.slow
def test_real_teacher_float32_and_bfloat16(real_case: RealCase) -> None:
    case = Case(real_case.teacher, real_case.task, real_case.texts(500))
    reference, _ = case.capture(float32("transformers", max_num_seqs=50))
    for settings in ({}, {"max_num_batched_tokens": 256, "max_num_seqs": 64}):
        assert_same(case, case.capture(float32("vllm", **settings))[0], reference)
    case = Case(real_case.teacher, real_case.task, real_case.texts(100))  # a CPU may have to emulate bfloat16
    ours, _ = case.capture(TeacherConfig(dtype="bfloat16"))
    truth = forced_logprobs(case, ours, torch.float32)
    theirs = forced_logprobs(case, ours, torch.bfloat16)
    mine = np.concatenate([(ours.logits[i] - ours.lse[i][:, :1])[:n] for i, n in enumerate(ours.lengths)])
    error, theirs_error = (float(np.sqrt(np.mean((x - truth) ** 2))) for x in (mine, theirs))
    assert error <= 1.5 * theirs_error, f"ours {error:.5f}, transformers {theirs_error:.5f}"


@torch.inference_mode()
def forced_logprobs(case: Case, captured: Captured, dtype: torch.dtype) -> np.ndarray:
    """Watched log-probabilities along given answers by one plain forward pass each: float32 [M, W]."""
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype).eval()
    rows = []
    for prompt, answer in zip(case.prompts, _answers(captured), strict=True):
        ids = torch.tensor([[*prompt, *answer[:-1].tolist()]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        rows.append(logits.log_softmax(-1)[:, torch.as_tensor(case.watched, dtype=torch.int64)].numpy())
    return np.concatenate(rows)


def test_language_weights_are_found_under_either_name() -> None:
    from pipeline.teacher.gemma3_text import _language_weights

    tensor = torch.zeros(1)
    names = ["language_model.model.norm.weight", "model.language_model.norm.weight", "lm_head.weight"]
    vision = ["vision_tower.a", "model.vision_tower.a", "multi_modal_projector.b", "model.multi_modal_projector.b"]
    found = [name for name, _ in _language_weights((name, tensor) for name in names + vision)]
    assert found == ["model.norm.weight", "model.norm.weight", "lm_head.weight"]
