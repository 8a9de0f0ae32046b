"""The fidelity report: one HTML page that needs nothing beside it."""

from __future__ import annotations

from typing import Any

from pipeline.base import page
from student.data.answers import REFERENCES
from student.data.sample_size import sample_size_notes
from student.evaluate import plots
from student.model.checkpoint import Trained


def render(figures: dict[str, Any]) -> str:
    """The page for the figures of `student.evaluate.evaluate`."""
    reference = REFERENCES[figures["answers"]]
    epochs = figures["training"]["epochs"]
    drawings = {
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
        verdict=[verdict(figures), *sample_size_notes(figures)],
    )


def verdict(figures: dict[str, Any]) -> str:
    """One sentence: whether the student clears both floors, and what to try where it does not."""
    student = figures["student"]["whole"]
    floors = {
        "the majority answer": figures["floors"]["majority"],
        "TF-IDF + logistic regression": figures["floors"]["tfidf_regression"],
    }
    above = [name for name, floor in floors.items() if student > floor["whole"]]
    below = [f"{name} ({100 * floor['whole']:.1f} %)" for name, floor in floors.items() if student <= floor["whole"]]
    if not below:
        return f"The student is above both floors: {' and '.join(above)}."
    epochs = figures["training"]["epochs"]
    overfits = epochs[-1]["validation_ce"] > 1.1 * min(row["validation_ce"] for row in epochs)
    reason = (
        "its held-out loss rises while training loss falls, so more comments or a smaller student should help"
        if overfits
        else "its held-out loss is still falling or flat, so more epochs, more comments or a larger student should help"
    )
    return f"The student is not above {' nor '.join(below)}: {reason}."
