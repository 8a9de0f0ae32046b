"""What a report's figures mean, in sentences: the student against its floors, what to try next, and how sure that is."""

from __future__ import annotations

import math
from typing import Any

SVM, EMBEDDINGS, MAJORITY = "linear_svm", "embeddings_regression", "majority"
LABELS = {SVM: "linear SVM", EMBEDDINGS: "frozen embeddings + regression", MAJORITY: "majority answer"}
HALF = "linear_svm_half"  # the SVM on every second answer: what it lacks is what twice the answers were worth
SURE = 1.96  # standard errors of a 95 % interval


def named(floors: dict[str, Any]) -> dict[str, Any]:
    """The floors of a report by the names people know; those that were not fitted are left out."""
    return {label: floors[name] for name, label in LABELS.items() if name in floors}


def verdict(figures: dict[str, Any]) -> list[str]:
    """Whether the student is above its floors, what to try where it is not, and what the number of answers allows to say."""
    return [_against_floors(figures), *_of_labels(figures), *sample_size_notes(figures)]


def _of_labels(figures: dict[str, Any]) -> list[str]:
    """How well the labels of lists are found, by themselves: a list is right as a whole or not at all."""
    who = {"the student": figures["student"]}
    if floor := figures["floors"].get(SVM):
        who[f"a {LABELS[SVM]} for each label"] = floor
    return [
        f"F1 of {name}, micro and macro: "
        + ", ".join(f"{label} {{micro:.3f}} and {{macro:.3f}}".format(**row["labels"][name]) for label, row in who.items())
        + "."
        for name in figures["student"].get("labels", {})
    ]


def floor_wins(figures: dict[str, Any]) -> bool:
    """Whether a floor agrees as often as the student."""
    return any(floor["whole"] >= figures["student"]["whole"] for floor in named(figures["floors"]).values())


def _against_floors(figures: dict[str, Any]) -> str:
    student, floors = figures["student"]["whole"], named(figures["floors"])
    if not floors:
        return "No floor was fitted (floors.examples=0): whether a linear model would do as well is not known."
    told = [f"{label} ({100 * floor['whole']:.1f} %)" for label, floor in floors.items()]
    if not floor_wins(figures):
        return f"The student ({100 * student:.1f} %) is above every floor: {', '.join(told)}."
    label = max(floors, key=lambda name: floors[name]["whole"])
    return (
        f"A floor is as good as this student: {label} agrees on {100 * floors[label]['whole']:.1f} %, the student on "
        f"{100 * student:.1f} %. Use the floor, or try next, in order of worth: {'; '.join(_next(figures))}."
    )


def _next(figures: dict[str, Any]) -> list[str]:
    """Commands that lift a student, the one that promises most first (docs/is-it-for-me.md)."""
    taught = figures["answers"] == "teacher"
    cut = "start from what is known: a pretrained reader (--reader MODEL)"
    cut += ", or half of a Gemma 3 teacher (retort prune)" if taught else ""
    more = "more answers (retort extract with more --comments)" if taught else "more answers"
    search = "a search (retort tune)"
    epochs = figures["training"]["epochs"]
    if epochs[-1]["validation_ce"] <= 1.02 * min(row["validation_ce"] for row in epochs):
        return [cut, more, f"more epochs (train.epochs={2 * len(epochs)}): the held-out loss still falls", search]
    return [cut, more, search]


def sample_size_notes(figures: dict[str, Any]) -> list[str]:
    """Sentences on how sure the figures of a report are, and on what more answers would bring."""
    share, tested, trained = figures["student"]["whole"], figures["examples"]["test"], figures["examples"]["train"]
    floors, margin = figures["floors"], _margin(share, tested)
    notes = [f"With {tested:,} test comments, {100 * share:.1f} % is known to ± {100 * margin:.1f} points."]
    if floors and abs(share - max(floor["whole"] for floor in named(floors).values())) < margin:
        notes.append(
            "That is more than what lies between the student and the best floor: test on more comments before choosing one."
        )
    gain = floors[SVM]["whole"] - floors[HALF]["whole"] if floors else 0
    if gain > margin:
        notes.append(
            f"The second half of the {trained:,} training answers was worth {100 * gain:.1f} points to the floor: as many "
            "again should bring more."
        )
    return notes


def _margin(share: float, count: int) -> float:
    """Half the width of Wilson's interval (1927), which is honest also about few comments that were all answered rightly."""
    spread = math.sqrt(share * (1 - share) / count + SURE**2 / (4 * count**2))
    return SURE * spread / (1 + SURE**2 / count)
