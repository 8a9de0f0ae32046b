"""Whether a folder holds the very thing that is to be made; another is never overwritten."""

from __future__ import annotations

from typing import Any

from pipeline.base import storage
from pipeline.base.errors import UserError


def find_same(folder: str, name: str, identity: dict[str, Any], what: str) -> dict[str, Any] | None:
    """What a file says of the thing in its folder; None where it is not there.

    Args:
        identity: what makes the thing this one and no other, as the file has it.

    Raises:
        UserError: the folder holds another, naming what differs.
    """
    path = storage.join(folder, name)
    if not storage.exists(path):
        return None
    found = storage.read_form(path, dict[str, Any])
    differ = [key for key in identity if found.get(key) != identity[key]]
    if differ:
        raise UserError(f"{folder} holds another {what} (its {', '.join(differ)} differ): choose another --out, or delete it")
    return found
