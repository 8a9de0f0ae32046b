"""What a number of answers allows to say, and whether more of them would help."""

from __future__ import annotations

import math
from typing import Any

FEW = 1000  # training examples: a student of random weights passes a linear SVM at some thousands (docs/is-it-for-me.md)
SURE = 1.96  # standard errors of a 95 % interval


def few_examples(train: int) -> str | None:
    """What to expect of a training on so few examples; None where they are many."""
    if train >= FEW:
        return None
    return (
        f"{train:,} examples are few for a student of random weights: expect it to agree less than a linear model would. Some "
        "thousands of answers are a good start; with fewer, begin from a trained model (retort prune --from TEACHER). "
        "docs/is-it-for-me.md has figures"
    )


def sample_size_notes(figures: dict[str, Any]) -> list[str]:
    """Sentences on how sure the figures of a report are, and on what more answers would bring."""
    share, tested, trained = figures["student"]["whole"], figures["examples"]["test"], figures["examples"]["train"]
    floor = max(figures["floors"][name]["whole"] for name in ("majority", "tfidf_regression"))
    margin = _margin(share, tested)
    notes = [f"With {tested:,} test comments, {100 * share:.1f} % is known to ± {100 * margin:.1f} points."]
    if abs(share - floor) < margin:
        notes.append(
            "That is more than what lies between the student and the best floor: test on more comments before choosing one."
        )
    gain = figures["floors"]["tfidf_regression"]["whole"] - figures["floors"]["tfidf_regression_half"]["whole"]
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
