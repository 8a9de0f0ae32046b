"""The teacher asked about a random share of what the student answered alone: how often they agree, with an alarm.

The alarm looks at the latest answers, in windows of several lengths, so that it is raised soon after texts have changed. A
window raises it when so few equal answers have a chance of less than `RISK` at the certified share, which is when the upper
bound of their agreement (Clopper and Pearson, 1934) is below that share.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

from scipy.special import bdtr, betaincinv

from pipeline.task.values import Value
from student.decode.answerer import WHOLE
from student.evaluate.evidence import Certificate
from student.serve.metrics import Metrics

log = logging.getLogger(__name__)

WINDOWS = (50, 100, 200, 500)  # latest audits that are looked at together
RISK = 0.001 / len(WINDOWS)  # of a false alarm, at one look
KEPT = "audited.jsonl"

Values = dict[str, Value]


class Audit:
    """What was asked, and what came of it.

    Args:
        share: of the answers that the student gives alone, to be asked about.
        folder: where both answers to each text are kept, for people to look at; None keeps nothing.

    Attributes:
        alarm: what is wrong, for people; None where nothing is known to be.
    """

    def __init__(self, share: float, certificate: Certificate | None, metrics: Metrics, folder: str | None) -> None:
        self._share, self._random = share, random.Random()
        self._targets = certificate.targets if certificate else {}
        self._metrics = metrics
        self._file = Path(folder, KEPT) if folder else None
        self._agreed: dict[str, deque[bool]] = {name: deque(maxlen=WINDOWS[-1]) for name in {WHOLE, *self._targets}}
        self.alarm: str | None = None

    def chosen(self) -> bool:
        """Whether to ask about an answer: chance decides, so that no kind of text is left out."""
        return self._random.random() < self._share

    def note(self, text: str, student: Values, confidence: float, teacher: Values) -> None:
        """Counts an answer of the teacher, and keeps it."""
        for name, agreed in self._agreed.items():
            agreed.append(student == teacher if name == WHOLE else student[name] == teacher[name])
        self._metrics.audited(self._agreed[WHOLE][-1], *self.interval)
        if self._file:
            row = {"body": text, "answer": teacher, "student": student, "confidence": confidence, "time": time.time()}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._look()

    @property
    def interval(self) -> tuple[float, float, float]:
        """Agreement in whole answers over the longest window, and its 95 % interval."""
        agreed = self._agreed[WHOLE]
        equal, count = sum(agreed), len(agreed)
        low = float(betaincinv(equal, count - equal + 1, 0.025)) if equal else 0.0
        high = float(betaincinv(equal + 1, count - equal, 0.975)) if equal < count else 1.0
        return equal / count if count else 1.0, low, high

    def _look(self) -> None:
        findings = (self._finding(name, share) for name, share in self._targets.items())
        found = next((finding for finding in findings if finding), None)
        if (found is None) != (self.alarm is None):
            log.error("%s", found) if found else log.warning("the student agrees as certified again")
        self.alarm = found
        self._metrics.alarm.set(found is not None)

    def _finding(self, name: str, share: float) -> str | None:
        latest = list(self._agreed[name])
        for window in WINDOWS:
            part = latest[-window:]
            if len(part) == window and bdtr(sum(part), window, share) <= RISK:
                of = "" if name == WHOLE else f" in {name!r}"
                return (
                    f"the student agrees with its teacher{of} in {sum(part)} of the latest {window} audited answers, where "
                    f"{100 * share:.4g} % are certified: texts have changed. Certify again, or train on what was audited"
                )
        return None

    def about(self) -> dict[str, Any]:
        """For /task."""
        agreement, low, high = self.interval
        return {"audited": len(self._agreed[WHOLE]), "agreement": agreement, "low": low, "high": high, "alarm": self.alarm}
