"""What both engines load a teacher as."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from pipeline.config import TeacherConfig
from pipeline.teacher.engines import weights_type


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
