"""The runs of stages: the record that each leaves in its folder, and its run in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking


def find_run(folder: str, name: str, identity: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The record of this very run in a folder; None where none was begun.

    Args:
        name: of the record, a JSON file.
        identity: what makes the run this one and no other, as the record has it.

    Raises:
        UserError: the folder holds another run, naming what differs: it is never overwritten.
    """
    path = storage.join(folder, name)
    if not storage.exists(path):
        return None
    found = storage.read_form(path, dict[str, Any])
    differ = [key for key in identity if found.get(key) != identity[key]]
    if differ:
        raise UserError(f"{folder} holds another {what} (its {', '.join(differ)} differ): choose another --out, or delete it")
    return found


@contextmanager
def tracked_run(
    folder: str,
    name: str,
    identity: dict[str, Any],
    what: str,
    start: Callable[[], Tracking],
    closes: bool = True,
    **about: Any,
) -> Iterator[Tracking]:
    """A run in MLflow for as long as the block lasts: a new one, or the one that the folder's run was begun under.

    Args:
        name: of the record that is written when the run starts.
        start: begins the run in MLflow.
        closes: whether the run ends with the block; a search ends the runs of its trials itself.
        **about: what else the record says.

    Raises:
        UserError: the folder holds another run, or MLflow cannot be reached.
    """
    begun = find_run(folder, name, identity, what)
    tracking = Tracking.reopen(**begun["mlflow"]) if begun else start()
    if not begun:
        storage.write_json(storage.join(folder, name), identity | about | {"mlflow": tracking.place})
    with tracking if closes else nullcontext():
        yield tracking
