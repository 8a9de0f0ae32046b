from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.teacher.gemma3_text import ARCHITECTURE, text_config


def test_every_teachers_head_is_float32() -> None:
    plain: Any = SimpleNamespace(architectures=["Gemma3ForCausalLM"], dtype="bfloat16")
    assert text_config(plain) is plain
    sees: Any = SimpleNamespace(
        architectures=["Gemma3ForConditionalGeneration"], dtype="bfloat16", get_text_config=lambda: SimpleNamespace()
    )
    alone = text_config(sees)
    assert (alone.architectures, alone.dtype) == ([ARCHITECTURE], "bfloat16")
    assert plain.head_dtype == alone.head_dtype == "float32"
