"""Whether a student has enough answers to learn from."""

from __future__ import annotations

FEW = 1000  # training examples: a student of random weights passes a linear SVM at some thousands (docs/is-it-for-me.md)


def few_examples(train: int) -> str | None:
    """What to expect of a training on so few examples; None where they are many."""
    if train >= FEW:
        return None
    return (
        f"{train:,} examples are few for a student of random weights: expect it to agree less than a linear model would. Some "
        "thousands of answers are a good start; with fewer, begin from a trained model (retort prune --from TEACHER). "
        "docs/is-it-for-me.md has figures"
    )
