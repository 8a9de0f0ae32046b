"""What an extraction settles before it starts: the watched set and, if asked for, the codec, by a sample of comments."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import ray

from pipeline.base import storage
from pipeline.base.capacity import ray_options
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.comments.plan import Plan, read_unit
from pipeline.config import ExtractConfig, TeacherConfig
from pipeline.extract import calibration
from pipeline.extract.extractor import Extraction
from pipeline.shards.codec import Codec
from pipeline.shards.payload import CODEC_FILE
from pipeline.task.automaton import Automaton
from pipeline.task.compiled import CompiledTask
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.vocabulary import choose_watched
from pipeline.teacher.capture import Captured, CensusResult
from pipeline.teacher.engines import Job, Request
from pipeline.teacher.isolation import isolate
from pipeline.teacher.process import EngineProcess

log = logging.getLogger(__name__)

CODEC_ROWS = 512  # answers that fit the codec


def prepare(
    extraction: Extraction,
    plan: Plan,
    config: ExtractConfig,
    task: Task,
    tokenizer: TextTokenizer,
    automaton: Automaton,
) -> CompiledTask:
    """Chooses the watched set and commits it, once for all actors. A folder that holds one keeps it.

    Raises:
        UserError: the teacher would not write the task's format, and its own answers are wanted.
    """
    if storage.exists(storage.join(extraction.shards, "compiled.json")):
        return CompiledTask.load(extraction.shards)
    sample = sample_rows(extraction.comments, plan, config.calibration_rows)
    prompts = extraction.prompt.ids([row["text"] for row in sample], tokenizer)
    log.info("calibrating %s on %s comments", extraction.model, len(sample))
    job = Job(automaton, tokenizer.end_id, extraction.max_prompt, watched=None)
    result: CensusResult = ask(extraction, job, "census", prompts)
    states = calibration.masses(result, automaton, tokenizer)
    log.info("least raw mass on allowed tokens: %.4f, after %r", states[0].mass, states[0].written[-40:])
    calibration.check_format(states, config.calibration_floor, given=plan.source.answer is not None)
    watched = choose_watched(automaton, result.mean_probability, task.auxiliary_tokens)
    log.info("watching %s tokens, %s of them required", watched.size, watched.required)
    compiled = CompiledTask(task, tokenizer, automaton, watched)
    content = {"teacher": extraction.identity} | calibration.report(states, len(sample))
    storage.write_json(storage.join(extraction.shards, "format_mass.json"), content)
    if config.codec == "compact":
        fit_codec(extraction, compiled, plan).save(storage.join(extraction.shards, CODEC_FILE))
    compiled.save(extraction.shards)
    return compiled


def fit_codec(extraction: Extraction, compiled: CompiledTask, plan: Plan) -> Codec:
    """Fits the codec on answers as the extraction will have them."""
    sample = sample_rows(extraction.comments, plan, CODEC_ROWS)
    prompts = extraction.prompt.ids([row["text"] for row in sample], compiled.tokenizer)
    requests = [Request(prompt, row["answer"] or None, i) for i, (prompt, row) in enumerate(zip(prompts, sample, strict=True))]
    log.info("fitting the codec on %s answers", len(requests))
    captured: Captured = ask(extraction, extraction.job(compiled), "record", requests)
    answers = (row[:length] for row, length in zip(captured.tokens, captured.lengths, strict=True))
    kept, inside = captured.kept, np.arange(captured.tokens.shape[1]) < captured.lengths[:, None]
    states = compiled.automaton.states_before(answers)[kept[inside]]
    return Codec.fit((captured.logits - captured.lse[..., :1])[kept], states, compiled.automaton.forced)


def sample_rows(folder: str, plan: Plan, rows: int) -> list[dict[str, Any]]:
    """Comments from evenly spaced units, the same on every run."""
    units = np.unique(np.linspace(0, plan.units - 1, min(plan.units, 8)).astype(int)).tolist()
    share = -(-rows // len(units))
    found = [row for unit in units for row in read_unit(folder, unit)[:share].to_pylist()]
    return found[:rows]


def ask(extraction: Extraction, job: Job, method: Literal["census", "record"], items: list[Any]) -> Any:
    """One call of an engine somewhere on the cluster, over all items that do not kill it."""
    return ray.get(ray.remote(**resources(extraction.teacher))(_ask).remote(extraction, job, method, items))


def _ask(extraction: Extraction, job: Job, method: str, items: list[Any]) -> Any:
    check_code_version()

    def call(some: list[Any]) -> Any:
        engine = EngineProcess(extraction.model, extraction.teacher, job)
        try:
            return getattr(engine, method)(some)
        finally:
            engine.close()

    found = isolate(call, items)
    if not found.poison and len(found.parts) == 1:
        return found.parts[0][1]
    return call([item for i, item in enumerate(items) if i not in found.poison])


def resources(teacher: TeacherConfig) -> dict[str, Any]:
    """What Ray reserves for one engine, and the environment of its actor."""
    environment = {VARIABLE: code_version()}
    return ray_options(teacher.resources) | {"runtime_env": {"env_vars": environment}}
