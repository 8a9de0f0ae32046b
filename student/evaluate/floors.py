"""The floors a student must clear: what a good engineer would have in five minutes, fitted on the same answers.

The majority answer; a linear SVM on words and characters; and, where an encoder is named, logistic regression on its frozen
embeddings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from pipeline.base import storage
from pipeline.base.capacity import ray_options
from pipeline.base.runtime import MALLOC
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.lists import ListRule
from pipeline.task.task import Task
from pipeline.task.values import Values
from student.config import FloorsConfig, TrainConfig
from student.data.answers import teacher_answers
from student.data.examples import Examples, open_examples
from student.data.unpack import SPLIT_TENTHS, TEST, TRAIN, VALIDATION, cache_of
from student.evaluate.embeddings import embed, encoder_identity
from student.evaluate.fidelity import agreement, matches
from student.evaluate.verdict import EMBEDDINGS, HALF, MAJORITY, SVM

log = logging.getLogger(__name__)

WHOLE_ANSWERS = 300  # distinct whole answers up to which a classifier chooses among them; beyond, field by field

Features = Any  # a matrix of N rows, sparse or float32
Predict = Callable[[Features], list[Values]]


@dataclass(frozen=True)
class Classifier:
    """A classifier by its inverse regularisation C, and those to try: the first decides what it chooses among."""

    make: Callable[[float], Any]
    strengths: tuple[float, ...]


LINEAR_SVM = Classifier(lambda strength: LinearSVC(C=strength), (0.3, 0.1, 1.0, 3.0))
REGRESSION = Classifier(lambda strength: LogisticRegression(C=strength, max_iter=300), (10.0, 3.0, 30.0, 100.0))


@dataclass(frozen=True)
class Labelled:
    """N texts, or what stands for them, and their answers; with the task, where some are lists."""

    rows: Any
    answers: list[Values]
    task: Task | None = None

    @staticmethod
    def of(examples: Examples) -> Labelled:
        """The texts of a split."""
        texts = [examples.text(i) for i in range(len(examples))]
        return Labelled(texts, teacher_answers(examples), examples.compiled.task)


def fit_floors(
    config: FloorsConfig, shards: Shards, splits: dict[str, Examples], train: TrainConfig | None = None
) -> dict[str, Any]:
    """How far each floor agrees with the answers of the test examples; fitted once and kept with the unpacked shards.

    `validation` is its share of whole answers on the split that it was chosen by, for what is chosen by that split too.
    They learn from the first `config.examples` of training alone, which bounds their time and memory; 0 fits none.

    Args:
        train: the training on whose machines they are fitted; None fits them in this process.

    Raises:
        UserError: `config.embedder` is no folder with an encoder.
    """
    if not config.examples:
        return {}
    encoder = encoder_identity(config.embedder) if config.embedder else None
    identity = json.dumps([{name: len(examples) for name, examples in splits.items()}, config.examples, encoder, VALIDATION])
    path = str(cache_of(shards) / f"floors-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json")
    if not storage.exists(path):
        log.info("fitting the floors on %s training comments", f"{min(config.examples, len(splits[TRAIN])):,}")
        storage.write_json(path, _on_ray(config, shards.folder, train) if train else _measure(config, splits))
    kept: dict[str, Any] = storage.read_json(path)
    return kept


def _on_ray(config: FloorsConfig, folder: str, train: TrainConfig) -> dict[str, Any]:
    """`_measure` as a task, with a CPU for each of the classifiers that are fitted at once, if a machine has as many."""
    machines = [node["Resources"] for node in ray.nodes() if train.resources.keys() <= node["Resources"].keys() | {"GPU"}]
    most = max((int(resources["CPU"]) for resources in machines), default=1)
    resources = train.resources | {"CPU": min(len(LINEAR_SVM.strengths) - 1, most), "GPU": 0}
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(resources["CPU"])}
    task = ray.remote(runtime_env={"env_vars": environment}, **ray_options(resources))(_measure_there)
    found: dict[str, Any] = ray.get(task.remote(config, folder))
    return found


def _measure_there(config: FloorsConfig, folder: str) -> dict[str, Any]:
    check_code_version()
    shards = open_shards(folder)
    return _measure(config, {split: open_examples(shards, split, "choices") for split in SPLIT_TENTHS})


def _measure(config: FloorsConfig, splits: dict[str, Examples]) -> dict[str, Any]:
    """Fits each floor and holds its answers against those of the test examples."""
    texts = {name: Labelled.of(examples.first(config.examples)) for name, examples in splits.items()}
    test, held = texts[TEST], texts[VALIDATION]
    found = _fit(config, texts[TRAIN], held, [*test.rows, *held.rows])
    task, count = splits[TEST].compiled.task, len(test.answers)
    return {
        name: agreement(task, test.answers, list(answers[:count]))
        | {VALIDATION: float(matches(held.answers, list(answers[count:])).mean())}
        for name, answers in found.items()
    }


def _fit(config: FloorsConfig, train: Labelled, held: Labelled, unseen: list[str]) -> dict[str, list[Values]]:
    """Each floor's answers to unseen texts."""
    found = {MAJORITY: majority(train.answers, len(unseen))}
    if config.embedder:
        train_ND, held_ND, unseen_ND = (embed(config.embedder, texts) for texts in (train.rows, held.rows, unseen))
        known = replace(train, rows=train_ND)
        found[EMBEDDINGS] = best_fit(REGRESSION, known, Labelled(held_ND, held.answers))(unseen_ND)
    half = replace(train, rows=train.rows[::2], answers=train.answers[::2])
    return found | {SVM: linear_svm(train, held, unseen), HALF: linear_svm(half, held, unseen)}


def majority(train: list[Values], count: int) -> list[Values]:
    """The teacher's most frequent whole answer, for every comment."""
    return [Counter(train).most_common(1)[0][0]] * count


def linear_svm(train: Labelled, held: Labelled, unseen: list[str]) -> list[Values]:
    """Answers of a linear SVM on TF-IDF of words, word pairs, and the characters within words."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
    for features in (make_union(words, characters), characters):
        try:
            known = replace(train, rows=features.fit_transform(train.rows))
        except ValueError:  # no word, or nothing at all, occurs twice
            continue
        held = Labelled(features.transform(held.rows), held.answers)
        return best_fit(LINEAR_SVM, known, held)(features.transform(unseen))
    return majority(train.answers, len(unseen))


def best_fit(classifier: Classifier, train: Labelled, held: Labelled) -> Predict:
    """The classifier, over whole answers or field by field, that is right about most whole answers held out."""
    first, *others = classifier.strengths
    forms = [_by_whole, _by_field] if len(set(train.answers)) <= WHOLE_ANSWERS else [_by_field]

    def fit(form: Callable[..., Predict], strength: float) -> tuple[int, Predict]:
        predict = form(lambda: classifier.make(strength), train)
        return sum(a == b for a, b in zip(predict(held.rows), held.answers, strict=True)), predict

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        tried = list(threads.map(lambda form: fit(form, first), forms))
        form = forms[max(range(len(forms)), key=lambda i: tried[i][0])]
        tried += threads.map(lambda strength: fit(form, strength), others)
    return max(tried, key=lambda found: found[0])[1]


def _by_whole(make: Callable[[], Any], train: Labelled) -> Predict:
    return _column(make, train.rows, train.answers)


def _by_field(make: Callable[[], Any], train: Labelled) -> Predict:
    task = train.task
    lists = (
        {i: (task.fields[name], task.lists[name]) for i, name in enumerate(task.fields) if name in task.lists} if task else {}
    )
    columns = [
        _labels(make, train.rows, values, *lists[i]) if i in lists else _column(make, train.rows, values)
        for i, values in enumerate(zip(*train.answers, strict=True))
    ]
    return lambda rows: list(zip(*(column(rows) for column in columns), strict=True))


def _column(make: Callable[[], Any], rows: Features, values: Sequence[Any]) -> Callable[[Features], list[Any]]:
    """What chooses among values, which may be of mixed type and so have no order scikit-learn could use."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    kinds = list(numbers)
    if len(kinds) == 1:
        return lambda rows: kinds * rows.shape[0]
    model = make().fit(rows, [numbers[value] for value in values])
    return lambda rows: [kinds[number] for number in model.predict(rows)]


def _labels(make: Callable[[], Any], rows: Features, lists: Sequence[Any], labels: list[Any], rule: ListRule) -> Predict:
    """What says of each label by itself whether it is in a list: those above 0, the surest ones of too many."""
    told = np.array([[any(_same(label, other) for other in some) for label in labels] for some in lists])
    model = OneVsRestClassifier(make()).fit(rows, told)

    def choose(sure: NDArray[np.float64]) -> tuple[Any, ...]:
        count = min(max(int((sure > 0).sum()), rule.min), rule.most(len(labels)))
        return tuple(labels[i] for i in sorted(np.argsort(-sure, kind="stable")[:count]))

    return lambda rows: list(map(choose, np.reshape(model.decision_function(rows), (-1, len(labels)))))


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other
