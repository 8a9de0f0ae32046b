"""An MLflow store with made-up students, as training, evaluation and a search write them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

HOSTILE = "<script>alert('x')</script> $x_1$ [red]"  # a param or a reason may hold anything
DIGEST = "d1" * 16
FIELDS = {"sentiment": 0.05, "tone": 0.03, "emotion": 0.01}  # how far above whole answers


def parameters(layers: int, width: int) -> float:
    """Of a student of this shape with an embedding of 8,000 rows."""
    return float(12 * layers * width**2 + 8000 * width)


def measures(whole: float, layers: int, width: int, gpu: float = 0.0) -> dict[str, float]:
    """The final metrics of a student that came to this share of whole answers."""
    size = parameters(layers, width)
    return {
        "parameters": size,
        "parameters_without_embedding": size - 8000 * width,
        "test/whole": whole,
        **{f"test/field/{name}": whole + more for name, more in FIELDS.items()},
        "test/ece": 0.1 * (1 - whole),
        "test/choice_kl": 0.8 * (1 - whole),
        "floor/majority": 0.413,
        "floor/linear_svm": 0.635,
        "speed/answers_per_second": 4e9 / size,
        "speed/latency_ms": 0.5 + size / 2e6,
        "cost/worker_seconds": 0.0 if gpu else size / 2e4,
        "cost/gpu_seconds": gpu,
    }


def params(layers: int, width: int, seed: int, **train: Any) -> dict[str, Any]:
    """What training logs of a student."""
    student = {"layers": layers, "width": width, "heads": width // 32, "mlp": 4 * width, "sequence": "choices", "dropout": 0.1}
    shards = {"task_name": "goemotions", "digest": DIGEST, "rows": 8192}
    recipe = {"objective": "curriculum", "learning_rate": None, "epochs": 8, "seed": seed} | train
    parts = {"student": student, "train": recipe, "shards": shards}
    return {f"{part}.{key}": value for part, content in parts.items() for key, value in content.items()}


class Store:
    """Writes runs."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.client, self.uri, self.experiment = MlflowClient(uri), uri, experiment
        self.id = self.client.create_experiment(experiment)

    def student(self, params: dict[str, Any], metrics: dict[str, float], name: str = "student", **about: Any) -> str:
        """One run. `about`: state, status, reason, parent, and epochs with the last one's validation share."""
        tags = {"retort.kind": "student", "retort.state": about.get("state", "finished")}
        tags |= {
            key: about[name] for key, name in (("retort.reason", "reason"), ("mlflow.parentRunId", "parent")) if name in about
        }
        run = self.client.create_run(self.id, run_name=name, tags=tags).info.run_id
        logged = [Metric(key, value, 0, 0) for key, value in metrics.items()]
        epochs, last = about.get("epochs", (8, metrics.get("test/whole", 0.5)))
        for epoch in range(1, epochs + 1):
            share = last * (1 - 0.5 * np.exp(-0.7 * epoch)) / (1 - 0.5 * np.exp(-0.7 * epochs))
            logged += [Metric("validation_answer_accuracy", share, 0, 100 * epoch), Metric("epoch", epoch, 0, 100 * epoch)]
        self.client.log_batch(run, logged, [Param(key, str(value)) for key, value in params.items()])
        self.client.set_terminated(run, about.get("status", "FINISHED"))
        return run

    def search(self, name: str) -> str:
        """A search's parent run."""
        run = self.client.create_run(self.id, run_name=name, tags={"retort.kind": "search"})
        self.client.set_terminated(run.info.run_id)
        return str(run.info.run_id)
