"""What both engines load a teacher as."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pipeline.config import TeacherConfig
from pipeline.teacher.engines import engine_environment, weights_type


def test_vllm_has_its_first_model_runner() -> None:
    """Ours stands on it; docs/extraction.md says what the second one lacks."""
    found = find_spec("vllm")  # to import it takes ten seconds
    assert found is not None
    folder = Path(str(found.origin)).parent
    assert "def _model_forward(" in (folder / "v1/worker/gpu_model_runner.py").read_text()
    assert "class CPUModelRunner(GPUModelRunner)" in (folder / "v1/worker/cpu_model_runner.py").read_text()
    (asked,) = [name for name in engine_environment(TeacherConfig()) if "RUNNER" in name]
    assert asked in (folder / "envs.py").read_text()


@pytest.mark.parametrize(
    ("gpu", "instructions", "asked", "loaded"),
    [
        (False, False, "auto", "float32"),
        (False, True, "auto", "auto"),
        (True, False, "auto", "auto"),
        (False, False, "bfloat16", "bfloat16"),
    ],
)
def test_float32_where_a_cpu_would_emulate_bfloat16(gpu: bool, instructions: bool, asked: str, loaded: str) -> None:
    with (
        patch.object(torch.cuda, "is_available", lambda: gpu),
        patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions),
    ):
        assert weights_type(TeacherConfig(dtype=asked)) == loaded
