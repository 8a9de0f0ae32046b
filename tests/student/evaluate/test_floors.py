from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from sklearn.svm import LinearSVC
from transformers import BertConfig, BertModel, BertTokenizerFast

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.task.task import Task
from student.config import FloorsConfig, TrainConfig
from student.data.examples import Examples, open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.evaluate import floors
from student.evaluate.embeddings import embed
from student.evaluate.floors import LINEAR_SVM, Classifier, Labelled, best_fit, fit_floors, linear_svm, majority

WORDS = {"nice": ("good", True), "awful": ("bad", False), "dull": ("bad", None)}


def made_up(count: int, seed: int) -> Labelled:
    """Texts whose one telling word has its answer, among others that tell nothing."""
    rng = np.random.default_rng(seed)
    words, noise = [*WORDS], ["rain", "day", "walk", "tea", "train"]
    told = [words[i] for i in rng.integers(len(words), size=count)]
    texts = [" ".join([word, *(noise[i] for i in rng.integers(len(noise), size=3))]) for word in told]
    return Labelled(texts, [WORDS[word] for word in told])


@pytest.fixture
def splits(shards: Shards) -> dict[str, Examples]:
    return {name: open_examples(shards, name, "choices") for name in (TRAIN, VALIDATION, TEST)}


def test_the_majority_answers_the_same_always() -> None:
    assert majority([("good", True)] * 3 + [("bad", False)] * 2, 2) == [("good", True)] * 2


def test_the_svm_learns_what_a_word_says_of_values_of_mixed_type() -> None:
    unseen = made_up(40, 2)
    assert linear_svm(made_up(60, 0), made_up(20, 1), unseen.rows) == unseen.answers


def test_the_svm_reads_characters_where_no_word_occurs_twice() -> None:
    train = Labelled(
        [f"nice{i} x{i}" for i in range(20)] + [f"awful{i} y{i}" for i in range(20)], [("good",)] * 20 + [("bad",)] * 20
    )
    assert linear_svm(train, train, ["nice99", "awful99"]) == [("good",), ("bad",)]


def test_where_there_is_nothing_to_learn_from_the_majority_answers() -> None:
    train = Labelled(["a", "b", "c"], [("good",), ("good",), ("bad",)])
    assert linear_svm(train, train, ["d"]) == [("good",)]


def test_answers_of_one_value_alone_need_no_classifier() -> None:
    train = Labelled(["one two", "one three"], [("good", 1), ("good", None)])
    assert linear_svm(train, train, ["one two"])[0][0] == "good"


def test_the_labels_of_a_list_are_each_chosen_by_themselves() -> None:
    """Within the rule: with nothing known of it, a text has the likeliest label."""
    task = Task(name="t", instruction="Judge.", fields={"tags": ["a", "b", True]}, lists={"tags": {"min": 1}})  # type: ignore[dict-item]
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]] * 20, np.float64)
    train = Labelled(rows, [(("a",),), (("b",),), ((True,),), (("a", "b"),)] * 20, task)
    unseen = np.array([[1, 1, 0], [0, 0, 1], [-0.1, -0.2, -0.2]])
    both = [(("a", "b"),), ((True,),), (("a",),)]
    assert best_fit(LINEAR_SVM, train, replace(train, rows=unseen, answers=both))(unseen) == both


def test_the_form_and_strength_are_those_that_validation_takes() -> None:
    """Whole answers cannot say a pair that training has not; fields can. With a useless first strength, another is taken."""
    rows = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]] * 20, np.float64)
    train = Labelled(rows, [("a", "x"), ("a", "y"), ("b", "x")] * 20)
    unseen = np.array([[0, 1, 0, 1]], np.float64)
    assert best_fit(LINEAR_SVM, train, Labelled(unseen, [("b", "y")]))(unseen) == [("b", "y")]
    blind = Classifier(lambda strength: LinearSVC(C=strength), (1e-9, 1.0))
    skewed = Labelled(np.array([[1.0], [-1.0], [-1.0]] * 10), [("a",), ("b",), ("b",)] * 10)
    assert best_fit(blind, skewed, skewed)(np.array([[1.0]])) == [("a",)]


def test_they_are_fitted_on_training_and_measured_on_test(
    shards: Shards, splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(floors, "cache_of", lambda shards: tmp_path)
    seen: dict[str, Any] = {}

    def spy(config: FloorsConfig, train: Labelled, held: Labelled, unseen: list[str]) -> dict[str, Any]:
        seen.update(train=train.rows, held=held.rows, unseen=unseen)
        return {"majority": majority(train.answers, len(unseen))}

    monkeypatch.setattr(floors, "_fit", spy)
    found = fit_floors(FloorsConfig(examples=7), shards, splits)
    assert found.keys() == {"majority"}
    answers = {name: Labelled.of(splits[name]).answers[:7] for name in splits}
    (often,) = majority(answers[TRAIN], 1)
    for name, share in (("whole", TEST), ("validation", VALIDATION)):
        assert found["majority"][name] == pytest.approx(np.mean([answer == often for answer in answers[share]]))
    texts = {name: [examples.text(i) for i in range(len(examples))] for name, examples in splits.items()}
    assert seen == {"train": texts[TRAIN][:7], "held": texts[VALIDATION][:7], "unseen": texts[TEST][:7] + texts[VALIDATION][:7]}
    monkeypatch.setattr(floors, "_fit", None)  # what is known is not fitted again
    assert fit_floors(FloorsConfig(examples=7), shards, splits).keys() == {"majority"}


@pytest.mark.parametrize(("cpus", "reserved"), [(16.0, 3), (2.0, 2), (None, 1)])
def test_a_task_reserves_the_cpus_of_its_classifiers_on_a_machine_for_students(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, cpus: float | None, reserved: int
) -> None:
    """None: no such machine is up yet."""
    options: dict[str, Any] = {}

    def remote(**given: Any) -> Any:
        options.update(given)
        return lambda there: SimpleNamespace(remote=there)

    students = [{"Resources": {"CPU": cpus, "student": 1.0}}] if cpus else []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": {}}, {"Resources": {"CPU": 64.0}}, *students])
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda found: found)
    found = floors._on_ray(FloorsConfig(examples=50), shards.folder, TrainConfig(machines="student"))
    assert found.keys() == {"majority", "linear_svm", "linear_svm_half"}
    assert (options["num_cpus"], options["num_gpus"], options["resources"].keys()) == (reserved, 0, {"student"})


def test_they_can_be_left_out(shards: Shards, splits: dict[str, Examples]) -> None:
    assert fit_floors(FloorsConfig(examples=0), shards, splits) == {}


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A tiny BERT of random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "nice", "awful", "dull", "rain", "day", "walk", "tea", "train"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **size)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_embeddings_are_unit_vectors_that_do_not_depend_on_the_batch(encoder: str) -> None:
    texts = ["nice day", "awful rain " * 50, "tea"]
    vectors_ND = embed(encoder, texts)
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(vectors_ND[2], embed(encoder, ["tea"])[0], atol=1e-6)
    storage.write_json(f"{encoder}/1_Pooling/config.json", {"pooling_mode_cls_token": True})
    assert np.abs(embed(encoder, texts) - vectors_ND).max() > 1e-3


def test_the_floor_of_embeddings_stands_beside_the_others(encoder: str) -> None:
    found = floors._fit(FloorsConfig(embedder=encoder), made_up(200, 0), made_up(50, 1), (unseen := made_up(50, 2)).rows)
    assert list(found) == ["majority", "embeddings_regression", "linear_svm", "linear_svm_half"]
    right = [sum(a == b for a, b in zip(found[name], unseen.answers, strict=True)) for name in found]
    assert right[1] > right[0]


def test_a_folder_without_an_encoder_is_refused(shards: Shards, splits: dict[str, Examples], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"floors\.embedder: no encoder in"):
        fit_floors(FloorsConfig(embedder=str(tmp_path)), shards, splits)
