"""A pretrained model of `transformers` as a student's reader: where it is, its shape, and its weights."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch

from pipeline.base import storage
from pipeline.base.errors import UserError, clip
from student.config import StudentConfig
from student.model.reader import Pretrained
from student.model.shape import ReaderShape

OWN, NGRAMS = "own", "ngrams"
BUCKETS = 1 << 17  # rows of the table of n-grams
MOST_NGRAMS = 1 << 20  # of a text: none is cut
LONGEST = 512  # tokens read of a text, where the model could read more
FILES = ["*.json", "*.safetensors", "*.model"]


def pretrained_folder(reader: str) -> str | None:
    """The folder of a model of `transformers`, fetched from the Hub where it is a name there; None for the other readers.

    Raises:
        UserError: it cannot be had.
    """
    if reader in (OWN, NGRAMS):
        return None
    if os.path.isdir(reader):
        return os.path.abspath(reader)  # workers run in other folders
    if reader.count("/") > 1 or reader.startswith(("/", ".", "~")):
        raise UserError(f"student.reader: there is no folder {reader} here")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(reader, allow_patterns=FILES))
    except Exception as error:
        raise UserError(
            f"student.reader: {reader} is no folder here, and the Hugging Face Hub does not give it: {clip(str(error), 200)}"
        ) from error


def reader_shape(student: StudentConfig, folder: str | None) -> ReaderShape | None:
    """The shape of a student's reader; None for its own embedding and blocks.

    Raises:
        UserError: the folder holds no model that can read.
    """
    if student.reader == OWN:
        return None
    if folder is None:
        return ReaderShape(NGRAMS, BUCKETS, MOST_NGRAMS)
    tokenizer, config = tokenizer_file(folder), _config(folder, student.reader_layers)
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    about = json.loads(config.to_json_string(use_diff=False))
    return ReaderShape("pretrained", config.vocab_size, longest, about, len(tokenizer))


def _config(folder: str, layers: int | None) -> Any:
    """The model's configuration, with its first layers alone where so many are wanted."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"student.reader: transformers knows no model in {folder}: {clip(str(error), 200)}") from error
    config = getattr(config, "text_config", config)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise UserError(f"student.reader: {folder} holds a {config.model_type}: an encoder or a decoder alone is wanted")
    if not [name for name in os.listdir(folder) if name.endswith(".safetensors")]:
        raise UserError(f"student.reader: no safetensors in {folder}, and weights in other files are not read: convert them")
    if layers is not None:
        if layers > config.num_hidden_layers:
            raise UserError(f"student.reader_layers is {layers}: {folder} has {config.num_hidden_layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def tokenizer_file(folder: str) -> bytes:
    """The tokenizer.json of a model.

    Raises:
        UserError: there is none, and none can be made of the other files.
    """
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        return storage.read_bytes(path)
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()).encode()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise UserError(f"student.reader: no tokenizer.json in {folder}, nor files that one can be made of") from error


def load_pretrained(reader: Pretrained, folder: str) -> None:
    """Gives a reader the model's weights, in float32, and its tokenizer; its own projection stays as it is.

    Raises:
        UserError: the weights are not the model's.
    """
    from transformers import AutoModel

    found, told = AutoModel.from_pretrained(
        folder, config=reader.model.config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    found.pooler = None
    missing = [name for name in told["missing_keys"] if not name.startswith("pooler.")]
    if missing or told["mismatched_keys"]:
        raise UserError(
            f"student.reader: the weights in {folder} are not whole: {min(map(str, missing or told['mismatched_keys']))}"
        )
    reader.model.load_state_dict(found.state_dict())
    reader.tokenizer.copy_(torch.from_numpy(np.frombuffer(tokenizer_file(folder), np.uint8).copy()))
