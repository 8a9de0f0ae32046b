"""Two floors a student must clear, fitted on the same teacher answers: the majority, and TF-IDF + logistic regression."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from pipeline.base import storage
from pipeline.shards.manifest import Shards
from pipeline.task.task import Values
from student.data.answers import teacher_answers
from student.data.examples import Examples
from student.data.unpack import cache_of
from student.evaluate.fidelity import agreement

log = logging.getLogger(__name__)


def floors(shards: Shards, train: Examples, test: Examples) -> dict[str, Any]:
    """How far each floor agrees with the answers of the test examples.

    They are fitted once and kept with the unpacked shards. `tfidf_regression_half` is fitted on every second training example:
    what it lacks is what twice the answers were worth.
    """
    path = str(cache_of(shards) / f"floors-{len(test)}-{len(train)}.json")
    if not storage.exists(path):
        log.info("fitting the floors on %s training comments", f"{len(train):,}")
        storage.write_json(path, _floors(train, test))
    found: dict[str, Any] = storage.read_json(path)
    return found


def _floors(train: Examples, test: Examples) -> dict[str, Any]:
    task, known, truth = test.compiled.task, teacher_answers(train), teacher_answers(test)
    texts, unseen = ([examples.text(i) for i in range(len(examples))] for examples in (train, test))
    answers = {
        "majority": majority(known, len(test)),
        "tfidf_regression": tfidf_regression(texts, known, unseen),
        "tfidf_regression_half": tfidf_regression(texts[::2], known[::2], unseen),
    }
    return {name: agreement(task, truth, list(found)) for name, found in answers.items()}


def majority(train: list[Values], count: int) -> list[Values]:
    """The teacher's most frequent whole answer, for every comment."""
    return [Counter(train).most_common(1)[0][0]] * count


def majority_by_field(train: list[Values]) -> Values:
    """The teacher's most frequent value of each field, which is never worse by field than the whole majority answer."""
    return tuple(Counter(column).most_common(1)[0][0] for column in zip(*train, strict=True))


def tfidf_regression(texts: list[str], train: list[Values], test: list[str]) -> list[Values]:
    """One logistic regression a field over TF-IDF of words and word pairs."""
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        known = features.fit_transform(texts)
    except ValueError:  # no word occurs twice: nothing to regress on
        return [majority_by_field(train)] * len(test)
    unknown = features.transform(test)
    fields = []
    for column in zip(*train, strict=True):
        values = list(dict.fromkeys(column))  # values of mixed type have no order scikit-learn could use
        if len(values) == 1:
            fields.append(values * len(test))
            continue
        model = LogisticRegression(C=10.0, max_iter=300).fit(known, [values.index(value) for value in column])
        fields.append([values[i] for i in model.predict(unknown)])
    return list(zip(*fields, strict=True))
