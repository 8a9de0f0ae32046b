"""Models by Hugging Face name or path: where they are, and which."""

from __future__ import annotations

import hashlib
import os

from pipeline.base import storage


def fingerprint(model: str) -> str | None:
    """Identity of a local model's files, of which another may come to lie at the same path; None for one on the Hub."""
    if not os.path.isdir(model):
        return None
    names = sorted(name for name in os.listdir(model) if name.endswith((".safetensors", ".bin", "config.json")))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {storage.fingerprint(os.path.join(model, name))}\n".encode())
    return digest.hexdigest()[:16]


def absolute_model(model: str) -> str:
    """A local model's absolute path, as workers run elsewhere; a Hub name as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model
