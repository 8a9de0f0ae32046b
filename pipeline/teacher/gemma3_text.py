"""The language model of a Gemma 3 checkpoint that can also see, such as `google/gemma-3-4b-it`, alone under vLLM.

vLLM's own class for these checkpoints imports torchvision, which has no build for CPU, and loads the vision tower too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedConfig
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM

from pipeline.teacher.gemma3_names import language_name

ARCHITECTURE = "RetortGemma3Text"
CLASS_OVERRIDES = {ARCHITECTURE: f"{__name__}:Gemma3Text"}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The nested text configuration of a `Gemma3ForConditionalGeneration`; any other as it is. Both with a head in float32.

    A head in bf16 rounds its logits, so that the likeliest two of some answers' choices are equal and a token's id decides.
    """
    if "Gemma3ForConditionalGeneration" in (config.architectures or []):
        text: PreTrainedConfig = config.get_text_config()
        text.architectures, text.dtype, config = [ARCHITECTURE], config.dtype, text
    config.head_dtype = "float32"
    return config


class Gemma3Text(Gemma3ForCausalLM):
    """vLLM's Gemma 3 language model, reading the weights by the names they have beside a vision tower."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the language model's weights; the vision tower's are passed over."""
        return super().load_weights(_language_weights(weights))


def _language_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if (ours := language_name(name)) is not None:
            yield ours, tensor
