"""The fidelity report: one HTML page that needs nothing beside it."""

from __future__ import annotations

from typing import Any

from pipeline.base import page
from student.data.answers import REFERENCES
from student.decode.answerer import WHOLE
from student.evaluate import plots
from student.evaluate.verdict import floor_wins, named, verdict
from student.model.checkpoint import Trained


def render(figures: dict[str, Any]) -> str:
    """The page for the figures of `student.evaluate.evaluate`."""
    reference = REFERENCES[figures["answers"]]
    epochs = figures["training"]["epochs"]
    by_value = (figures.get("gold") or {"values": {}})["values"]
    drawings = {
        "confusion": {
            name: row["confusion"] and plots.confusion(row["names"], row["confusion"]) for name, row in by_value.items()
        },
        "agreement": plots.agreement_bars(figures, reference),
        "curves": plots.learning_curves(epochs),
        "reliability": plots.reliability(figures["steps"]["calibration"], reference),
        "trust": plots.trust(figures["confidence"], reference),
    }
    return page.render(
        __file__,
        "report.html.jinja",
        f=figures,
        reference=reference,
        rate=Trained.model_validate(figures["training"]).learning_rate,
        plots=drawings,
        floors=named(figures["floors"]),
        verdict=verdict(figures),
        floor_wins=floor_wins(figures),
        whole=WHOLE,
    )
