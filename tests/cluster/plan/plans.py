"""Plans for tests: configurations, and a scale.json made up by the scaling model's formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import ClusterSettings
from pipeline.cli.settings import load_config
from tests.tune.scaling.test_model import ONE_AND_TWO, extract_row

STUDENT = {"layers": 1, "width": 32, "heads": 2, "mlp": 64, "sequence": "full", "dropout": 0.0}
SMALL = ["student.layers=1", "student.width=32", "student.heads=2", "student.mlp=64"]
EXTRACT = [extract_row(1, 1, 0.010, 20.0), extract_row(2, 1, 0.013, 25.0)]


def planned(*overrides: str, **options: Any) -> ClusterSettings:
    """A configuration; options are keys of `plan`."""
    return load_config(None, list(overrides), {f"plan.{name}": value for name, value in options.items()})


def scale_json(folder: Path, **measured: Any) -> str:
    """As `retort scale` leaves it on a machine without a GPU: 10 and 13 ms a comment, 10 ms a step and 2 ms an example."""
    rows = {"extract": EXTRACT, "train": ONE_AND_TWO} | measured
    settings = {
        "extract": {"teacher": {"gpus": 0.0}, "extract": {"rows_per_unit": 256, "capture": "choices"}},
        "train": {"student": STUDENT, "train": {"epochs": 3, "batch_size": 32, "precision": "float32", "gpus_per_worker": 0.0}},
    }
    content = {"mlflow": None, "figures": {}, "settings": {name: settings[name] for name, found in rows.items() if found}}
    content["measured"] = {name: [row.model_dump() for row in found] for name, found in rows.items()}
    path = folder / "scale.json"
    path.write_text(json.dumps(content))
    return str(path)
