"""The page beside a pruned student: what its source's units are worth, and which were cut. It needs nothing beside it."""

from __future__ import annotations

from typing import Any

from pipeline.base import page, storage
from pipeline.base.plots import STUDENT, TRAIN
from student.prune import plots
from student.prune.importance import LEAVE_OUT, Importance

PAGE = "importance.html"


def write_page(folder: str, about: dict[str, Any], importance: Importance) -> None:
    """Writes `importance.html`.

    Args:
        importance: as measured: heads_LH, neurons_LF, channels_D, cosine_L and loss_L are shown.
    """
    html = page.render(
        __file__,
        "page.html.jinja",
        about=about,
        place=about["source"].get("student") or about["source"].get("model"),
        ratio=about["parameters"]["source"] / about["parameters"]["student"],
        kept=_kept(about["sizes"], importance),
        plots=_drawings(about, importance),
        colours={"kept": STUDENT, "cut": TRAIN},
        left_out=min(LEAVE_OUT, about["prune"]["examples"]),
        least=plots.LEAST,
    )
    storage.write_text(storage.join(folder, PAGE), html)


def _kept(sizes: dict[str, int], importance: Importance) -> list[tuple[str, int, int]]:
    """Kinds of units: how many there are after and before."""
    depth, heads = importance.heads_LH.shape
    return [
        ("layers", sizes["layers"], depth),
        ("channels of width", sizes["width"], len(importance.channels_D)),
        ("heads a layer", sizes["heads"], heads),
        ("neurons a layer", sizes["mlp"], importance.neurons_LF.shape[1]),
    ]


def _drawings(about: dict[str, Any], importance: Importance) -> dict[str, str]:
    sizes, kept = about["sizes"], about["kept"]
    return {
        "cosine": plots.layer_bars(importance.cosine_L, kept["layers"], "Block importance, 1 − E[cos]"),
        "loss": plots.layer_bars(importance.loss_L, kept["layers"], "Rise of the loss without it, nats"),
        "heads": plots.head_map(importance.heads_LH, kept["layers"], kept["heads"]),
        "neurons": plots.curves(
            importance.neurons_LF, sizes["mlp"], "neurons of a layer", [*map(str, range(len(importance.neurons_LF)))]
        ),
        "channels": plots.curves(importance.channels_D[None], sizes["width"], "channels"),
    }
