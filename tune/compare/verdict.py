"""What a comparison says in one sentence: how small a student may be and still follow its teacher as closely."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tune.compare.grouping import COMMENTS, PARAMETERS, WHOLE, Group

FULL_SIZE = 0.9  # share of the largest student's parameters from which a student counts as full-size
SMALL = 0.5  # share of the best full-size student's parameters up to which a student counts as small


def verdict(groups: Sequence[Group]) -> str:
    """Whether a student of half the size or less is at least as faithful as the best full-size one, by means over seeds.

    Full-size are the students with at least 90 % of the parameters of the largest. Among those of at most half the
    parameters of the most faithful full-size one, the smallest that is at least as faithful is named, or the nearest.

    Args:
        groups: finished students; those without whole answers or parameters do not count.
    """
    known = [(whole, size, group) for group in groups if (whole := group.mean(WHOLE)) is not None
             and (size := group.mean(PARAMETERS)) is not None]  # fmt: skip
    if not known:
        return "No finished student has been measured on the test split yet, so there is nothing to compare."
    if len(known) == 1:
        return f"There is one measured student so far: {_named(known[0][2])}, with {count(known[0][1])} parameters."
    largest = max(size for _, size, _ in known)
    best, full, reference = max((row for row in known if row[1] >= FULL_SIZE * largest), key=lambda row: (row[0], -row[1]))
    small = [row for row in known if row[1] <= SMALL * full]
    faithful = [row for row in small if row[0] >= best]
    if faithful:
        whole, size, group = min(faithful, key=lambda row: (row[1], -row[0]))
        return (
            f"The smallest student at least as faithful as the largest one (whole answers, test split) has {count(size)} "
            f"parameters, {_share(size / full)} of its size: {group.label} ({percent(group)} against {percent(reference)})."
        )
    if not small:
        top = max(known, key=lambda row: (row[0], -row[1]))[2]
        most = "it is also the most faithful" if top is reference else f"the most faithful of all is {_named(top)}"
        return f"No student of half the size or less of the best full-size one ({_named(reference)}) was measured; {most}."
    whole, size, group = max(small, key=lambda row: (row[0], -row[1]))
    return (
        f"No student at half the size or less of the best full-size one ({_named(reference)}) is as faithful; "
        f"the nearest, {group.label} with {count(size)} parameters, is {_points(best - whole)} below{_noise(group, best)}."
    )


def _noise(group: Group, share: float) -> str:
    """How far the share of right answers may be off by the choice of the test comments alone: its standard error."""
    comments = group.mean(COMMENTS)
    if not comments:
        return ""
    return (
        f", where {comments:,.0f} test comments leave a standard error of {_points(math.sqrt(share * (1 - share) / comments))}"
    )


def count(number: float) -> str:
    """A number of parameters to two or three digits, such as 0.4 M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= 0.0995 * size:
            return f"{number / size:.1f} {unit}" if number < 99.95 * size else f"{number / size:.0f} {unit}"
    return f"{number / 1e3:.0f} k" if number >= 1000 else f"{number:.0f}"


def percent(group: Group) -> str:
    """Whole answers of a group: the mean and, over several seeds, the standard deviation."""
    found = group.spread(WHOLE)
    if found is None:
        return "–"
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.std:.1f} %" if found.std is not None else " %")


def _named(group: Group) -> str:
    return f"{group.label}, {percent(group)}"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} points" if 100 * difference >= 0.05 else "less than 0.1 points"
