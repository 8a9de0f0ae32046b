"""A bound on how often the answers that a student gives alone are its teacher's, and the confidence that keeps it.

Which answers are the student's own goes by one number, the *limit*: those with 1 − confidence ≤ limit · (1 − target), of the
whole answer and of each field that has a target. Validation answers say at which limit to begin; answers that chose nothing
then test it and ever looser ones until one fails: the fixed-sequence testing of "Learn then Test" (Angelopoulos et al., 2021,
arXiv 2110.01052), each by the exact tail of the binomial distribution. So a certificate is wrong with a chance of `RISK` at
most, for texts like those that tested it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, betaincinv

RISK = 0.05  # that a certificate does not hold
LIMITS = 200  # tried at most, evenly spaced over the texts
MOST = 10**8  # texts that are ever asked for

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Targets = Mapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """How sure a student was of answers that are known.

    Attributes:
        confidence: of whole answers and of each field, by name: float [N]; -inf where the student never answers alone.
        agrees: whether they are the teacher's: bool [N].
    """

    confidence: dict[str, NDArray[np.float64]]
    agrees: dict[str, Flags]

    def limits(self, targets: Targets) -> NDArray[np.float64]:
        """The smallest limit under which each text is the student's: float64 [N]."""
        return np.max([(1 - self.confidence[name]) / (1 - share) for name, share in targets.items()], 0)


@dataclass(frozen=True)
class Counts:
    """What the student answers alone under a limit.

    Attributes:
        limit: see the module.
        texts: all that were looked at.
        alone: those among them that are the student's.
        agreed: how many of these are the teacher's, by target.
    """

    limit: float
    texts: int
    alone: int
    agreed: dict[str, int]

    def bound(self, name: str) -> float:
        """The least share of equal answers that so many speak for (Clopper and Pearson, 1934)."""
        equal = self.agreed[name]
        return float(betaincinv(equal, self.alone - equal + 1, RISK)) if equal else 0.0


def certify(targets: Targets, chooses: Evidence, tests: Evidence) -> Counts | None:
    """The loosest limit that passes; None where none does.

    Args:
        targets: shares below 1 of answers that are to be the teacher's, by field, or `WHOLE`.
        chooses: on what the first limit is chosen.
        tests: on what limits are tested, which has chosen nothing.
    """
    limits = _limits(tests.limits(targets))
    if not len(limits):
        return None
    first = int(np.argmin(_tails(*_count(limits, targets, chooses), targets)))
    passes = _tails(*_count(limits[first:], targets, tests), targets) <= RISK
    passed = len(passes) if passes.all() else int(np.argmin(passes))
    return count(limits[first + passed - 1], targets, tests) if passed else None


def coverage(targets: Targets, evidence: Evidence) -> float:
    """The largest share of these texts that the student could answer alone with every target met. No bound: see `certify`."""
    limits = evidence.limits(targets)
    alone, agreed = _count(np.sort(limits[np.isfinite(limits)]), targets, evidence)
    met = np.all([agreed[name] >= share * alone for name, share in targets.items()], 0)
    return float(alone[met].max(initial=0) / max(1, len(limits)))


def count(limit: float, targets: Targets, evidence: Evidence) -> Counts:
    """What the student answers alone under a limit."""
    (alone,), agreed = _count(np.array([limit]), targets, evidence)
    texts = len(evidence.limits(targets))
    return Counts(float(limit), texts, int(alone), {name: int(equal[0]) for name, equal in agreed.items()})


def texts_to_certify(targets: Targets, tests: Evidence) -> int | None:
    """How many texts like these it would take, about, to certify the targets at the best limit; None: no number does."""
    limits, texts = _limits(tests.limits(targets)), len(tests.limits(targets))
    alone, agreed = _count(limits, targets, tests)
    factor = 1.1  # what passes with those there are has done so by luck: it was not what validation answers chose
    while factor * texts <= MOST:
        more = {name: (factor * equal).astype(np.int64) for name, equal in agreed.items()}
        if (_tails((factor * alone).astype(np.int64), more, targets) <= RISK).any():
            return math.ceil(factor * texts)
        factor *= 1.02
    return None


def _limits(limits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those to try, the strictest first."""
    limits = limits[np.isfinite(limits)]
    places = np.linspace(0, len(limits), min(LIMITS, len(limits)) + 1).astype(int)[1:] - 1
    return np.unique(np.sort(limits)[places])


def _count(limits: NDArray[np.float64], targets: Targets, evidence: Evidence) -> tuple[Numbers, dict[str, Numbers]]:
    """How many texts are the student's under each limit, and how many of these agree, by target: int64 [L] each."""
    of_texts = evidence.limits(targets)
    order = np.argsort(of_texts)
    alone = np.searchsorted(of_texts[order], limits, side="right")
    return alone, {name: np.concatenate([[0], np.cumsum(evidence.agrees[name][order])])[alone] for name in targets}


def _tails(alone: Numbers, agreed: dict[str, Numbers], targets: Targets) -> NDArray[np.float64]:
    """The chance of so many equal answers if a target were just missed, the largest of all targets: float64 [L]."""
    return np.max([bdtrc(agreed[name] - 1, alone, share) for name, share in targets.items()], 0)
