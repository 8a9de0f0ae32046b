"""The student as an MLflow model, and its place in the registry.

All goes through clients of the store that is named. MLflow's `log_model` and `register_model` would use the process's
tracking URI and active run instead, which belong to whoever runs Retort.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.pyfunc import save_model
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from pipeline.base import storage
from pipeline.base.errors import UserError
from student.model.checkpoint import load_student, load_temperatures, save_student, save_temperatures

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # its bars would run through Retort's

NAME = "student"
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "student")  # all that pyfunc.py imports
LIBRARIES = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "tokenizers", "torch")
EXAMPLE = {"text": ["I love it, it is the best of all", "What a waste of time"]}
SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "text")]),
    Schema(
        [
            ColSpec("string", "answer", required=False),
            ColSpec("double", "confidence", required=False),
            ColSpec("string", "reason", required=False),
        ]
    ),
)


def log_student(uri: str, run_id: str, student_folder: str) -> str:
    """Logs a student as the model `student` of a run. It loads wherever its requirements are installed, without Retort.

    A run has one: it is not logged again.

    Args:
        student_folder: as `save_student` writes it, on a disk or in a bucket; a training's other files stay behind.

    Returns:
        The model's URI, `models:/m-…`.

    Raises:
        UserError: there is no student in the folder, or the store cannot be used.
    """
    with tempfile.TemporaryDirectory() as scratch, _store(uri) as client:
        student, path = f"{scratch}/student", f"{scratch}/model"
        model, compiled = load_student(student_folder)
        save_student(student, model, compiled)
        temperatures = load_temperatures(student_folder, compiled.task)
        if temperatures:
            save_temperatures(student, temperatures)
        run = client.get_run(run_id)
        if run.outputs and run.outputs.model_outputs:
            return f"models:/{run.outputs.model_outputs[0].model_id}"
        logged = client.create_logged_model(run.info.experiment_id, NAME, run_id, params=run.data.params)
        try:
            id_ = logged.model_id
            save_pyfunc(path, student, Model(logged.artifact_location, run_id, model_uuid=id_, model_id=id_))
            client.log_model_artifacts(logged.model_id, path)
        except BaseException:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return f"models:/{logged.model_id}"


def _code(folder: str) -> list[str]:
    """Copies the packages' modules, and nothing else that lies beside them."""

    def others(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(".py") and not os.path.isdir(os.path.join(parent, name))]

    return [shutil.copytree(ROOT / package, f"{folder}/{package}", ignore=others) for package in PACKAGES]


def save_pyfunc(path: str, student: str, about: Model | None = None) -> None:
    """Writes a student as a folder that `mlflow.pyfunc.load_model` reads.

    Args:
        about: what MLflow is to know of the model; None where it is not logged.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save_model(  # with the signature and the requirements given, MLflow need not load it to find them out
            path,
            python_model=Path(__file__).with_name("pyfunc.py"),
            artifacts={"student": student},
            code_paths=_code(scratch),
            signature=SIGNATURE,
            input_example=pd.DataFrame(EXAMPLE),
            pip_requirements=_requirements(),
            uv_project_path=student,  # else MLflow takes along the uv project the process happens to stand in
            mlflow_model=about,
        )


def _requirements() -> list[str]:
    """The libraries as installed; a build's label, as torch's `+cpu`, is dropped, since PyPI has no such version."""
    return [f"{library}=={version(library).partition('+')[0]}" for library in LIBRARIES]


def register_best(
    uri: str, model_uri: str, name: str, alias: str = "best", description: str | None = None, tags: dict[str, Any] | None = None
) -> str:
    """Registers a logged student as the next version of a registered model, new if need be, and points an alias at it.

    One that already has the alias is left as it is.

    Args:
        model_uri: as `log_student` returns it.
        alias: moves to this version from the one that had it; `models:/NAME@ALIAS` loads it.

    Returns:
        The version, counted from 1.

    Raises:
        UserError: the store cannot be used, or refuses the name.
    """
    with _store(uri) as client:
        model = client.get_logged_model(model_uri.removeprefix("models:/"))
        _ensure_registered(client, name)
        held = _held(client, name, alias)
        if held and held.source == model.artifact_location:
            return str(held.version)
        # The source is the place itself: a database store would look `models:/m-…` up under the process's tracking URI.
        source, run, id_ = model.artifact_location, model.source_run_id, model.model_id
        created = client.create_model_version(name, source, run, tags, description=description, model_id=id_)
        client.set_registered_model_alias(name, alias, created.version)
    return str(created.version)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def log_report(uri: str, run_id: str, folder: str, name: str = "report") -> None:
    """Puts the files directly in a folder, on a disk or in a bucket, among a run's artifacts under a name.

    Raises:
        UserError: the store cannot be used.
    """
    with tempfile.TemporaryDirectory() as scratch, _store(uri) as client:
        for file in storage.list_files(folder):
            storage.write_bytes(f"{scratch}/{file}", storage.read_bytes(storage.join(folder, file)))
        client.log_artifacts(run_id, scratch, name)


def _held(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


@contextmanager
def _store(uri: str) -> Iterator[MlflowClient]:
    try:
        yield MlflowClient(uri)
    except MlflowException as error:
        raise UserError(f"MLflow at {uri} cannot be used: {error}") from error
