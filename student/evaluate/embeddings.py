"""Frozen sentence embeddings of any encoder that `transformers` reads: the mean of its last states, or its first."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.teacher.model_files import fingerprint

BATCH = 64
LONGEST = 512  # tokens read of a text


def encoder_identity(folder: str) -> str:
    """Which encoder a folder holds.

    Raises:
        UserError: it holds none.
    """
    found = fingerprint(folder)
    if found is None or not storage.exists(storage.join(folder, "config.json")):
        raise UserError(f"floors.embedder: no encoder in {folder}: name a folder that transformers' AutoModel reads")
    return found


@torch.inference_mode()
def embed(folder: str, texts: list[str]) -> NDArray[np.float32]:
    """Unit vectors of texts, float32 [N, D]: the states' mean, or the first one where the folder's pooling says so."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    pooling = storage.join(folder, "1_Pooling", "config.json")
    first = storage.exists(pooling) and storage.read_json(pooling).get("pooling_mode_cls_token", False)
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors_ND = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt")
        states_BTD = model(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None].float()
        pooled_BD = states_BTD[:, 0] if first else (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        vectors_ND[rows] = F.normalize(pooled_BD, dim=-1).numpy()
    return vectors_ND
