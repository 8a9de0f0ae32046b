"""The one tiny task and the one tiny teacher that tests share: real architectures, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from pipeline.demo.teacher import BOS, END_OF_TURN, PAD, train_tokenizer
from pipeline.task.task import Task

ROOT = Path(__file__).parent.parent


def tiny_task(**changes: Any) -> Task:
    """Two fields, six answers, no filter worth the name."""
    content = {
        "name": "tiny",
        "teacher": "none",
        "instruction": "Judge.",
        "fields": {"mood": ["good", "bad", "mixed"], "loud": [True, False]},
        "comments": {"max_tokens": 40},
        "context": 90,
        "auxiliary_tokens": 20,
    }
    return Task.model_validate(content | changes)


def tiny_tokenizer(size: int = 320) -> PreTrainedTokenizerFast:
    """The demo's kind of tokenizer: byte-level BPE with a Gemma-style chat template."""
    return train_tokenizer([("a good comment, a bad one", ("good", True))] * 3, tiny_task(), size)


def text_config(vocabulary: int) -> Gemma3TextConfig:
    """Gemma 3's layout, sliding and full attention, in miniature."""
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END_OF_TURN,
    )


def save_teacher(folder: Path, seed: int) -> None:
    """A Gemma3ForCausalLM checkpoint whose weights are wide enough for clear answers."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(text_config(len(tokenizer)))
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_conditional(folder: Path, seed: int) -> None:
    """A Gemma3ForConditionalGeneration checkpoint, as the real 4B is: text config nested, vocabulary padded."""
    tokenizer = tiny_tokenizer()
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text_config(len(tokenizer) + 64).to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _spread(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
