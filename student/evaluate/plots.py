"""The report's plots, as SVG in data URIs: as text in one page, their ids would collide."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from pipeline.base.plots import PALE, PLAIN, STUDENT, TRAIN, WIDTH, fitted, svg
from student.data.answers import Reference
from student.evaluate.verdict import LABELS, named

MOST_VALUES = 40  # that a picture has room for
FLOORS = dict(zip(LABELS.values(), ("#c9a45c", "#a98bb5", "#bdbdbd"), strict=True))  # colours


def agreement_bars(figures: dict[str, Any], reference: Reference) -> str:
    """Agreement with the teacher or the given answers, whole answer and by field: student beside the floors."""
    names = ["whole answer", *figures["student"]["fields"]]
    series = [
        ("student", figures["student"], STUDENT),
        *((label, floor, FLOORS[label]) for label, floor in named(figures["floors"]).items()),
    ]
    thick = 0.81 / len(series)
    with svg(1, 8.4, 3.2) as (drawing, (axes,)):
        for i, (label, result, colour) in enumerate(series):
            heights = [result["whole"], *result["fields"].values()]
            places = [x + (i - (len(series) - 1) / 2) * thick for x in range(len(names))]
            bars = axes.bar(places, heights, 0.93 * thick, label=label, color=colour)
            axes.bar_label(bars, [f"{100 * height:.0f}" for height in heights], fontsize=8, padding=1)
        axes.set_xticks(range(len(names)), [fitted(name, max(6, WIDTH // len(names))) for name in names])
        axes.set_ylim(0, 1.16)
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_title(f"Agreement with {reference.name} on unseen comments")
        axes.legend(ncols=len(series), fontsize=8, loc="upper right")
    return drawing.uri


def confusion(names: list[Any], counts: list[list[int]]) -> str | None:
    """What the student takes each label for, as shares of the label; None for more values than a picture shows."""
    if len(names) > MOST_VALUES:
        return None
    shares = np.array(counts) / np.maximum(1, np.sum(counts, axis=1, keepdims=True))
    size = max(3.2, 0.26 * len(names) + 1.6)
    with svg(1, size + 1, size) as (drawing, (axes,)):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        told = [fitted(json.dumps(name, ensure_ascii=False), 16) for name in names]
        axes.set_xticks(range(len(names)), told, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), told, fontsize=8)
        axes.set_xlabel("the student's answer")
        axes.set_ylabel("people's label")
    return drawing.uri


def learning_curves(epochs: list[dict[str, Any]]) -> str:
    """Loss and choice-step accuracy by epoch, training against held-out."""
    x = [row["epoch"] for row in epochs]
    with svg(2, 8.4, 2.9) as (drawing, (loss, accuracy)):
        for axes, name, title in (
            (loss, "loss", "Loss (nats a step)"),
            (accuracy, "choice_accuracy", "Accuracy at choice steps"),
        ):
            axes.plot(x, [row[f"train_{name}"] for row in epochs], "o-", ms=3, color=TRAIN, label="training")
            axes.plot(x, [row[f"validation_{name}"] for row in epochs], "o-", ms=3, color=STUDENT, label="held out")
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize=8)
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
        loss.yaxis.set_major_formatter(PLAIN)
        loss.yaxis.set_minor_formatter(NullFormatter())
    return drawing.uri


def reliability(calibration: dict[str, Any], reference: Reference) -> str:
    """Accuracy by confidence at choice steps."""
    with svg(1, 4.0, 3.2) as (drawing, (axes,)):
        _calibrated(axes, calibration, reference)
    return drawing.uri


def trust(confidence: dict[str, Any], reference: Reference) -> str:
    """Accuracy by confidence in whole answers, and what a threshold for it leaves to the student."""
    rows = [row for row in confidence["thresholds"] if row["whole"] is not None]
    with svg(2, 8.4, 3.2) as (drawing, (axes, kept)):
        _calibrated(axes, confidence, reference)
        kept.plot([row["share"] for row in rows], [row["whole"] for row in rows], "o-", ms=4, color=STUDENT)
        for row in rows:
            at = (row["share"], row["whole"])
            kept.annotate(f"{row['confidence']:g}", at, (0, 6), textcoords="offset points", fontsize=8)
        kept.set_xlim(0, 1.03)
        kept.set_xlabel("share of comments with at least this confidence")
        kept.set_ylabel(f"share equal to {reference.own}")
        kept.set_title("Whole answers, by the least confidence")
    return drawing.uri


def _calibrated(axes: Axes, calibration: dict[str, Any], reference: Reference) -> None:
    """Accuracy by confidence, beside the diagonal of a calibrated student; dots grow with their count."""
    bins = calibration["bins"]
    total = sum(b["count"] for b in bins) or 1
    axes.plot([0, 1], [0, 1], "--", lw=1, color=PALE)
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "-", lw=1.2, color=STUDENT)
    sizes = [20 + 300 * b["count"] / total for b in bins]
    axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], sizes, color=STUDENT, alpha=0.7)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence")
    axes.set_ylabel(f"share equal to {reference.own}")
    axes.set_title(f"Calibration, ECE {calibration['ece']:.3f}")
