"""All that runs on a GPU: the same values as on the CPU, and no tensor left behind. A pretended GPU unless there is one.

See docs/gpu.md.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.reading import filter_rows, text_row
from pipeline.config import TeacherConfig
from pipeline.shards.manifest import Shards
from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import CompiledTask
from pipeline.task.forced import forced_runs
from pipeline.task.tokenization import load_teacher_tokenizer
from pipeline.teacher.capture import Census, Constraint
from pipeline.teacher.engines import Job, Request
from pipeline.teacher.transformers_engine import TransformersTeacher
from student.config import PruneConfig, TrainConfig
from student.decode.answerer import Answerer
from student.decode.decode import Decoder
from student.evaluate.calibrate import fit_temperatures
from student.evaluate.fidelity import step_measures, step_sums
from student.evaluate.speed import latency_before_training, latency_ms
from student.model.checkpoint import PRUNED, save_student
from student.prune.importance import importance, measure
from student.prune.sizes import Sizes
from student.prune.source import PruneSource
from student.prune.workers import ImportanceWorker
from student.train.loop import Loop, Training
from tests.accelerator import pretended
from tests.student import conftest
from tests.student.conftest import DEBUG
from tests.student.decode.test_decode import make_student, prefixes
from tests.student.prune.students import FAMILIES, examples_of, make
from tests.tiny import save_teacher, tiny_task

compiled, shards = conftest.compiled, conftest.shards

CPU = torch.device("cpu")
REAL = torch.cuda.is_available()
SLACK = 50 if REAL else 1  # a GPU adds in another order, and multiplies in TF32 when it trains


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr("student.train.loop.ThreadPoolExecutor", _Now)
    before = torch.backends.cuda.matmul.fp32_precision
    with nullcontext(torch.device("cuda", 0)) if REAL else pretended(monkeypatch) as device:
        yield device
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class _Now(Executor):
    """Threads do not share what pretends; what is made at once is the same."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*given, **named))
        return done


def close(found: torch.Tensor, wanted: torch.Tensor, exact: bool = True) -> None:
    assert found.is_cuda
    tolerance = (
        {"atol": SLACK * 1e-5, "rtol": SLACK * 1e-4} if exact else {"atol": 0.05 * wanted.abs().amax().item(), "rtol": 0.0}
    )
    torch.testing.assert_close(found.cpu().float(), wanted, **tolerance)


def test_tensors_of_both_devices_do_not_mix(gpu: torch.device) -> None:
    there = torch.ones(3, device="cuda")
    assert (there.device, (there + torch.tensor(1.0)).tolist()) == (gpu, [2, 2, 2])
    for mix in (lambda: there + torch.ones(3), lambda: torch.cat([there, torch.ones(3)]), lambda: there.numpy()):
        with pytest.raises(RuntimeError, match=r"cuda:0 and on the cpu|not supported"):
            mix()


@pytest.mark.skipif(REAL, reason="of what is pretended")
def test_attention_that_a_gpu_refuses_or_is_slow_at_is_refused(gpu: torch.device) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    queries, mask = torch.ones(1, 2, 3, 4, device=gpu, dtype=torch.bfloat16), torch.ones(3, 3, device=gpu)
    shared = queries[:, :1]
    with pytest.raises(AssertionError, match="float32 mask"):
        attend(queries, queries, queries, mask)
    attend(queries, shared, shared, None, enable_gqa=True)
    for slow in ((queries, shared, shared, mask > 0), (queries.float(), shared.float(), shared.float(), None)):
        with pytest.raises(AssertionError, match="slow kernel"):
            attend(*slow, enable_gqa=True)


@pytest.mark.parametrize("kind", ["float32", "bf16", "halved"])
def test_the_student_reads_whole_sequences(
    compiled: CompiledTask, shards: Shards, family: str, kind: str, gpu: torch.device
) -> None:
    model = make(compiled, family)
    batch = examples_of(shards, model).batch(np.arange(5))
    with torch.no_grad():
        wanted = model(batch.tokens, batch.predict), model(batch.tokens[:, :12])
    there = model.to(gpu)
    there = there.halved() if kind == "halved" else there
    there.bf16 = kind == "bf16"
    batch = batch.to(gpu)
    with torch.no_grad():
        close(there(batch.tokens, batch.predict), wanted[0], exact=kind == "float32")
        close(there(batch.tokens[:, :12]), wanted[1], exact=kind == "float32")


def trained(training: Training, shards: Shards, device: torch.device) -> dict[str, float]:
    """The measures of an epoch, the gradient of each term among them, and of the validation split."""
    loop, rows = Loop(training, shards, device=device), {}
    for report in loop.run():
        rows |= report.row
    assert next(loop._strategy.module.parameters()).device == device
    state = loop.state()
    assert all(tensor.device == CPU for part in vars(state).values() for tensor in part.values())
    loop.go_on_from(state, loop.position)
    with loop.averaged():
        measured = loop._trainer.measure(loop._held_out())
    assert measured["loss"] == pytest.approx(rows["validation_loss"])
    return {name: value for name, value in rows.items() if "second" not in name}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(epochs=1, batch_size=64, accumulation=2, log_every=100, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"tail": True, "balance": 0.5, "label_smoothing": 0.1, "objective": "temperature"},
        *({"objective": name} for name in ("curriculum", "topk", "slim", "reverse-kl", "hard-label")),
    ],
)
def test_a_training(shards: Shards, changes: dict[str, Any], gpu: torch.device) -> None:
    training = Training.of(DEBUG, config(**changes), shards)
    wanted = trained(training, shards, CPU)
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    found = trained(training, shards, gpu)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert "ce_gradient" in found or "kl_gradient" in found
    assert found == pytest.approx(wanted, rel=0.05 if "precision" in changes else SLACK * 1e-4)


def test_a_pruned_student_from_its_scores_to_its_training(
    compiled: CompiledTask, shards: Shards, family: str, gpu: torch.device, tmp_path: Path
) -> None:
    source, chosen, folder, pruned = make(compiled, family), np.arange(8), str(tmp_path / "source"), str(tmp_path / "cut")
    wanted = importance([measure(source, examples_of(shards, source), chosen, 4, 4)], source.shape.layers)
    save_student(folder, source, compiled)
    worker = ImportanceWorker(shards.folder, PruneSource(folder, source.shape))
    assert worker._model.rows.device == gpu
    scores = importance([worker.measure(chosen[:4], True), worker.measure(chosen[4:], False)], source.shape.layers)
    for name, values in vars(scores).items():
        np.testing.assert_allclose(values, getattr(wanted, name), rtol=SLACK * 1e-4, atol=SLACK * 1e-6, err_msg=name)
    whole = Sizes.of(source.shape)
    kept = worker.cut(Sizes(16, whole.heads, whole.groups, 24, 2), scores, pruned)
    about = {"source": {"student": folder}, "prune": PruneConfig().recipe(), "kept": kept.as_dict()}
    storage.write_json(storage.join(pruned, PRUNED), about)
    training = Training.of(DEBUG, config(init=pruned, hidden=1.0), shards)
    assert trained(training, shards, gpu) == pytest.approx(trained(training, shards, CPU), rel=SLACK * 1e-3)


@pytest.mark.parametrize("sequence", ["full", "choices"])
@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_answers(compiled: CompiledTask, sequence: str, family: str, weights: str, gpu: torch.device) -> None:
    model = make(compiled, family, sequence=sequence)
    model = model.halved() if weights == "bf16" else model
    asked, here = prefixes(compiled, 9), Decoder(model, compiled)
    wanted = here.constrained(asked, value_probabilities=True), here.free(asked), here.constrained(asked[3:4])
    there = Decoder(model.to(gpu), compiled)
    found = there.constrained(asked, value_probabilities=True), there.free(asked), there.constrained(asked[3:4])
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours.tokens) == len(theirs.tokens)
        if weights == "float32":  # attention in bf16 is another one than the CPU's
            assert (ours.calls, ours.tokens) == (theirs.calls, theirs.tokens)
            np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=SLACK * 1e-4)
    assert all(np.isfinite(shares).all() for shares in (found[0].value_probabilities or {}).values())


@pytest.mark.parametrize("weights", ["float32", "bf16"])
def test_a_saved_student_answers_there_by_itself(
    compiled: CompiledTask, weights: str, gpu: torch.device, tmp_path: Path
) -> None:
    save_student(str(tmp_path), make_student(compiled, 3, 6.0), compiled)
    rows = [text_row(i, f"good {i}") for i in range(3)]
    comments = filter_rows(rows, compiled.task.comments, compiled.tokenizer)
    answerer = Answerer.load(str(tmp_path), weights)
    assert answerer._decoder._device == gpu
    assert len(answerer.answer(comments)) == 3


def test_an_evaluations_measures(compiled: CompiledTask, shards: Shards, gpu: torch.device) -> None:
    model = make_student(compiled, 3, 6.0)
    examples = examples_of(shards, model)
    batches = [examples.batch(np.arange(start, start + 20)) for start in (0, 20)]
    wanted = step_measures(step_sums(model, batches)), fit_temperatures(model, compiled, batches)
    there = model.to(gpu)
    found = step_measures(step_sums(there, batches)), fit_temperatures(there, compiled, batches)
    assert found[1] == pytest.approx(wanted[1], rel=1e-2)
    assert found[0]["choice_kl"] == pytest.approx(wanted[0]["choice_kl"], rel=SLACK * 1e-4)
    assert latency_ms(there, compiled, examples) > 0
    assert latency_before_training(Training.of(DEBUG, config(), shards), shards.folder) > 0


def census(compiled: CompiledTask, device: torch.device) -> Any:
    """Of answers that follow the automaton, a choice at a time, on random logits."""
    automaton, rows = compiled.automaton, np.arange(6)
    census, constraint = Census(automaton, device), Constraint(automaton, device)
    states, generator = torch.zeros(len(rows), dtype=torch.int64, device=device), torch.Generator().manual_seed(0)
    for step in range(automaton.longest):
        logits = torch.randn(len(rows), compiled.tokenizer.size, generator=generator).to(device)
        going = states != automaton.end
        census.observe(logits, states, np.where(going.cpu().numpy(), rows, -1), np.full(len(rows), step))
        constraint.apply(logits, states.where(going, -1))
        states = constraint.advance(states, logits.argmax(-1)).where(going, states)
    return census.drain()


def test_a_calibration(compiled: CompiledTask, gpu: torch.device) -> None:
    found, wanted = census(compiled, gpu), census(compiled, CPU)
    assert found.preferred == wanted.preferred
    for name in ("visits", "allowed_mass", "mean_probability"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=SLACK * 1e-5)


def test_the_transformers_teacher(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path, 0)
    task, tokenizer = tiny_task(), load_teacher_tokenizer(str(tmp_path))
    automaton = compile_automaton(task, tokenizer)
    prompts = tokenizer.prompt(task).ids([f"comment {i}" for i in range(3)], tokenizer)
    job = Job(automaton, tokenizer.end_id, max(map(len, prompts)), automaton.tokens)
    config = TeacherConfig(engine="transformers", dtype="float32")
    monkeypatch.setattr("tests.accelerator._require_fast_attention", lambda *_: None)  # transformers' own affair
    found = TransformersTeacher(str(tmp_path), config, job)
    assert found._model.device == gpu
    found = found.record([Request(ids) for ids in prompts])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = TransformersTeacher(str(tmp_path), config, job).record([Request(ids) for ids in prompts])
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.logits, wanted.logits, atol=SLACK * 1e-4)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=SLACK * 1e-4)


@pytest.fixture(scope="session")  # so that it is imported before anything is pretended
def vllm() -> ModuleType:
    from pipeline.teacher import vllm_engine

    return vllm_engine


class Runner:
    """What the processor sees of vLLM's model runner, around a model whose logits follow from each token and its place."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(1)
        self._table, self._places = (torch.randn(size, 16, generator=draw).to(device) for size in (vocabulary, 200))
        self.input_batch = SimpleNamespace(
            num_computed_tokens_cpu=np.zeros(slots, np.int64), num_prompt_tokens=np.zeros(slots, np.int64)
        )
        self.query_start_loc = SimpleNamespace(np=np.zeros(slots + 1, np.int64))
        self.discard_request_mask = SimpleNamespace(np=np.zeros(slots, bool))
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ self._table.T)
        self.sampler = torch.nn.Module()
        self.sampler.forward = lambda logits: SimpleNamespace(sampled_token_ids=logits.argmax(-1, keepdim=True).int())

    def _model_forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self._table[tokens] + self._places[places]


def serve(
    vllm: ModuleType, job: Job, prompts: list[list[int]], vocabulary: int, device: torch.device
) -> tuple[list[list[int]], Any]:
    """Answers prompts as vLLM's scheduler would: a chunk of each a step; the last one moves to where one has ended."""
    slots = len(prompts)
    settings = SimpleNamespace(additional_config=vllm.Carried(job), scheduler_config=SimpleNamespace(max_num_seqs=slots))
    processor, runner = vllm.CapturingProcessor(settings, device, False), Runner(slots, vocabulary, device)
    processor.attach(runner, observes=True)
    given = forced_runs(job.automaton, through_end=False).of(0) if job.jumps else []
    read, at, active = [prompt + given for prompt in prompts], [0] * slots, list(range(slots))
    asked = [(row, SimpleNamespace(extra_args={vllm.ROW: row, vllm.GIVEN: given}), None, []) for row in active]
    update = vllm.BatchUpdate(slots, [], asked, [])
    while active:
        processor.update_state(update)
        chunks = [list(range(at[row], len(read[row]))) for row in active]
        for slot, row in enumerate(active):
            runner.input_batch.num_computed_tokens_cpu[slot] = at[row]
            runner.input_batch.num_prompt_tokens[slot] = len(prompts[row]) + len(given)
        runner.query_start_loc.np[1 : len(active) + 1] = np.cumsum([len(chunk) for chunk in chunks])
        tokens = torch.tensor([read[row][i] for row, chunk in zip(active, chunks, strict=True) for i in chunk], device=device)
        hidden = runner._model_forward(tokens, torch.tensor([*itertools.chain(*chunks)], device=device))
        ends = torch.as_tensor(runner.query_start_loc.np[1 : len(active) + 1] - 1, device=device)
        sampled = runner.sampler(processor.apply(runner.model.compute_logits(hidden[ends]).float())).sampled_token_ids
        for row, more in zip(active, sampled.tolist(), strict=True):
            at[row] = len(read[row])
            read[row] += [token for token in more if token >= 0]
        ended = [slot for slot, row in enumerate(active) if read[row][-1] == job.end_id]
        moved, last = [], len(active) - 1
        for slot in reversed(ended):  # from behind, so that what moves has not ended
            if slot != last:
                moved.append((last, slot, vllm.MoveDirectionality.UNIDIRECTIONAL))
                active[slot] = active[last]
            active, last = active[:last], last - 1
        update = vllm.BatchUpdate(len(active), ended, [], moved)
    answers = [row[len(prompt) :] for row, prompt in zip(read, prompts, strict=True)]
    return answers, processor.observer.drain(*([answers, job.wanted(answers)] if job.jumps else []))


@pytest.mark.parametrize("capture", ["all", "choices", "census"])
def test_the_processor_of_vllm(vllm: ModuleType, compiled: CompiledTask, capture: Any, gpu: torch.device) -> None:
    watched = None if capture == "census" else compiled.watched.tokens
    job = Job(compiled.automaton, compiled.tokenizer.end_id, 60, watched, "all" if capture == "census" else capture)
    prompts = [ids.tolist() for ids in prefixes(compiled, 9)]
    (answers, found), (others, wanted) = (serve(vllm, job, prompts, compiled.tokenizer.size, device) for device in (gpu, CPU))
    assert answers == others
    assert len(set(map(tuple, answers))) > 2
    for name, values in vars(wanted).items():
        np.testing.assert_allclose(
            getattr(found, name), values, rtol=SLACK * 1e-4, atol=SLACK * 1e-4
        ) if name != "preferred" else None


def test_a_job_leaves_vllms_compiled_models_as_they_are(vllm: ModuleType, compiled: CompiledTask) -> None:
    from vllm.config import VllmConfig

    jobs = [Job(compiled.automaton, 1, 60, watched) for watched in (None, compiled.watched.tokens)]
    configs = [VllmConfig(additional_config=vllm.Carried(job)) for job in jobs]
    assert configs[0].compute_hash() == configs[1].compute_hash()
    assert pickle.loads(pickle.dumps(configs[1])).additional_config.job.watched.tolist() == jobs[1].watched.tolist()


def test_vllm_without_a_gpu_says_what_to_do(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, compiled: CompiledTask) -> None:
    monkeypatch.setattr(vllm, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    with pytest.raises(UserError, match=r"teacher\.gpus=1"):
        vllm.VllmTeacher("some", TeacherConfig(), Job(compiled.automaton, 1, 60, None))
