"""`retort evaluate` and what reads its figures, with students that the defaults have trained."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser

from pipeline.base import storage
from pipeline.base.tracking import field_metric, field_of
from pipeline.cli.main import main
from pipeline.config import TrackingConfig
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.compiled import CompiledTask
from pipeline.task.vocabulary import WatchedSet
from student.config import FloorsConfig, TrainConfig
from student.data.answers import parse_all, teacher_answers
from student.data.examples import open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.decode.answerer import FAMILIARITY, WHOLE
from student.decode.decode import Decoder
from student.decode.familiarity import Familiarity
from student.evaluate.calibrate import fit_temperatures
from student.evaluate.evaluate import measure
from student.evaluate.evidence import CERTIFICATE, load_evidence
from student.evaluate.fidelity import agreement, matches, step_measures, step_sums, trust
from student.evaluate.report import render
from student.model.checkpoint import Trained, TrainedSizes, load_student
from tests.browser import shown
from tests.names import drawn, left_open
from tests.student.conftest import DEBUG, made_up_shards
from tests.student.decode.test_decode import recompiled
from tests.student.trained import train_here
from tests.tiny import tiny_task

FIELDS = {
    "price_$5_to_$9": ["$0", "<script>alert('x')</script>", "[/red] {{ 7 * 7 }}"],
    "_<script>alert(1)</script> [/x] | 100 % \x07 😀/..": [True, False],
}


def relabelled(shards: Shards, folder: Path, **changes: Any) -> Shards:
    """The same shards with another manifest."""
    shutil.copytree(shards.folder, folder)
    storage.write_json(str(folder / "manifest.json"), shards.manifest.model_dump(mode="json") | changes)
    return open_shards(str(folder))


def given(shards: Shards, folder: Path) -> Shards:
    """The same shards as `retort score` makes them of labels."""
    return relabelled(shards, folder, comments={"source": {"answer": "label"}})


class Runs:
    """Runs `train`, `evaluate` and `compare` with one MLflow store, as making its tables takes seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"

    def evaluated(self, name: str, shards: Shards) -> tuple[str, str, dict[str, Any]]:
        """What `evaluate` says of a student, its page and its figures."""
        out = self.folder / name
        train_here(out, shards, TrackingConfig(uri=self.uri, experiment=name))
        said = self._retort("evaluate", "--out", str(out), "--shards", shards.folder)
        figures = json.loads((out / "report/fidelity.json").read_text())
        return said, html.unescape((out / "report/fidelity.html").read_text()), figures

    def compared(self, name: str) -> str:
        """The page of `compare`."""
        self._retort("compare", "--out", str(self.folder / name), "--uri", self.uri, "--experiment", name)
        return html.unescape((self.folder / name / "compare/compare.html").read_text())

    def _retort(self, *arguments: str) -> str:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        return done.output


def drawings(page: str) -> list[str]:
    return [drawn(uri) for uri in re.findall(r'src="(data:[^"]*)"', page)]


def keys(content: Any) -> Any:
    return {name: keys(value) for name, value in content.items()} if isinstance(content, dict) else None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def taught(runs: Runs, shards: Shards) -> tuple[str, str, dict[str, Any]]:
    """A report on a teacher's answers."""
    return runs.evaluated("taught", shards)


def test_a_report_on_a_teachers_answers(taught: tuple[str, str, dict[str, Any]]) -> None:
    said, page, figures = taught
    assert figures["answers"] == "teacher"
    assert "agreement with the teacher" in said
    assert re.search(r"answers/s, [\d.]+ × the teacher; KL [\d.]+ nats", said)
    for words in ("KL(teacher ‖ student)", "equal the teacher's", "the teacher's answers a second", "<code>made up</code>"):
        assert words in page
    assert "Agreement with the teacher" in drawings(page)[0]
    assert f"learning rate up to {0.25 / DEBUG.width:.3g}" in page


def test_a_report_is_on_test_comments_and_calibrated_on_held_out_ones(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]]
) -> None:
    figures = taught[2]
    model, compiled = load_student(str(runs.folder / "taught/student"))
    splits = {split: open_examples(shards, split, model.shape.sequence) for split in (TRAIN, VALIDATION, TEST)}
    batches = {split: [examples.batch(np.arange(len(examples)))] for split, examples in splits.items()}
    temperatures = {split: fit_temperatures(model, compiled, some) for split, some in batches.items()}
    assert figures["confidence"]["temperatures"] == pytest.approx(temperatures[VALIDATION], rel=1e-3)
    for other in (TRAIN, TEST):
        assert figures["confidence"]["temperatures"] != pytest.approx(temperatures[other], rel=1e-3)
    test, truth = splits[TEST], teacher_answers(splits[TEST])
    assert figures["examples"]["test"] == len(test)
    assert figures["steps"]["kl"] == pytest.approx(step_measures(step_sums(model, batches[TEST]))["kl"], rel=1e-4)
    decoder, prefixes = Decoder(model, compiled, temperatures[VALIDATION]), [test.prefix(i) for i in range(len(test))]
    answered, free = decoder.constrained(prefixes), parse_all(compiled, decoder.free(prefixes).tokens)
    answers = parse_all(compiled, answered.tokens)
    assert figures["student"] == agreement(compiled.task, truth, answers)
    assert figures["unconstrained"] == agreement(compiled.task, truth, free)
    assert figures["confidence"]["ece"] == pytest.approx(trust(answered.confidence, matches(truth, answers))["ece"], rel=1e-2)


def test_a_report_on_labels_speaks_of_no_teacher(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    said, page, figures = runs.evaluated("labels", given(shards, tmp_path / "shards"))
    assert keys(figures) == keys(taught[2])
    assert (figures["answers"], figures["steps"]["kl"], figures["steps"]["choice_kl"]) == ("given", None, None)
    assert (figures["speed"]["ratio"], figures["speed"]["teacher_answers_per_second"]) == (None, None)
    assert "agreement with the given answers" in said
    assert "How closely it follows the given answers" in page
    assert "Agreement with the given answers" in drawings(page)[0]
    for text in (said, *drawings(page), re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL)):
        for absent in ("KL", "×", "the teacher", "made up"):
            assert absent not in text
    assert '<td class="n">–</td>' in runs.compared("labels")  # its KL
    assert "choice_kl" not in (runs.folder / "labels/compare/compare.json").read_text()


@pytest.mark.filterwarnings("error::UserWarning")
def test_fields_and_values_may_have_any_names(
    runs: Runs, compiled: CompiledTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = made_up_shards(tmp_path, recompiled(compiled, tiny_task(fields=FIELDS, context=300)), 120)
    said, page, figures = runs.evaluated("names", shards)
    assert "not in MLflow" not in caplog.text
    assert "price_$5_to_$9" in said
    assert list(figures["student"]["fields"]) == list(FIELDS)
    for text in (page, runs.compared("names")):
        assert any(">price_$5_to_$9<" in svg for svg in drawings(text))
        assert all(name.partition("\x07")[0] in text for name in FIELDS)
    written = (runs.folder / "names/report/fidelity.html").read_text() + (
        runs.folder / "names/compare/compare.html"
    ).read_text()
    assert "<script" not in written


def test_shards_that_do_not_say_how_fast_the_teacher_was(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    """As those that came from JSON lines."""
    unknown = relabelled(shards, tmp_path / "shards", teacher_seconds=0.0)
    figures = measure(FloorsConfig(examples=0), unknown.folder, str(runs.folder / "taught/student"), str(tmp_path / "report"))
    assert figures["speed"]["ratio"] is None
    assert figures["steps"]["kl"] > 0
    assert "the teacher's answers a second" not in (tmp_path / "report/fidelity.html").read_text()


@pytest.mark.parametrize("answers", ["teacher", "given"])
def test_the_page_with_every_setting_left_open(taught: tuple[str, str, dict[str, Any]], answers: str) -> None:
    figures = taught[2]
    recipe = TrainConfig.model_validate(left_open(TrainConfig)).recipe()
    figures = figures | {"training": figures["training"] | {"train": recipe}, "answers": answers}
    assert figures["sizes"]["teacher"] is None
    assert "unknown" in render(figures) or answers == "given"


def test_the_learning_rate_that_a_training_took() -> None:
    training = Trained.model_construct(train=TrainConfig(), student=TrainedSizes(layers=2, width=50, heads=1, mlp=64))
    assert training.learning_rate == 0.005
    assert training.model_copy(update={"init": "the content of a student"}).learning_rate == 0.002
    assert training.model_copy(update={"train": TrainConfig(learning_rate=0.01)}).learning_rate == 0.01


def test_a_field_keeps_its_name_in_mlflow() -> None:
    for name in (*FIELDS, "plain", "v1.2", "a/../b", "größe", "24:x"):
        assert field_of(field_metric(name)) == name
        assert re.fullmatch(r"test/field/[\w :-]*", field_metric(name))
    assert len(field_metric("x" * 500)) == 250


def test_suspects_are_of_test_and_training_texts(runs: Runs, taught: tuple[str, str, dict[str, Any]]) -> None:
    figures = taught[2]
    rows = [json.loads(line) for line in (runs.folder / "taught/report/suspects.jsonl").read_text().splitlines()]
    of_test = [row for row in rows if row["split"] == "test"]
    assert len(of_test) == round((1 - figures["student"]["whole"]) * figures["examples"]["test"])
    assert any(row["split"] == "train" for row in rows)
    assert [row["confidence"] for row in rows] == sorted((row["confidence"] for row in rows), reverse=True)


def test_what_is_certified_is_what_test_comments_say(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]]
) -> None:
    figures, (model, compiled) = taught[2], load_student(str(runs.folder / "taught/student"))
    held = load_evidence(str(runs.folder / "taught/student"), compiled.task)
    for split, known in ((VALIDATION, held.chooses), (TEST, held.tests)):
        examples = open_examples(shards, split, model.shape.sequence)
        decoder = Decoder(model, compiled, figures["confidence"]["temperatures"])
        answered = decoder.constrained([examples.prefix(i) for i in range(len(examples))])
        assert np.allclose(known.confidence, answered.by_field, atol=1e-5)
        agrees = matches(teacher_answers(examples), parse_all(compiled, answered.tokens))
        assert np.all(known.agrees, 1).tolist() == agrees.astype(bool).tolist()
        texts = [examples.text(i) for i in range(len(examples))]
        familiarity = Familiarity.load(str(runs.folder / "taught/student")).of(texts, answered.confidence.round(6))
        assert np.allclose(known.familiarity, familiarity, atol=2 / len(held.chooses.agrees))
        assert split == TEST or 0.1 < np.mean(familiarity < 0.2) <= 0.2
    assert [row["targets"] for row in figures["certificates"]] == [{WHOLE: share} for share in (0.9, 0.95, 0.99)]
    assert "What it may answer alone" in taught[1]


def test_a_certificate_is_asked_for_and_left_beside_the_student(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    student, test = runs.folder / "taught/student", taught[2]["examples"]["test"]
    asked = ["evaluate", "--out", str(runs.folder / "taught"), "--shards", shards.folder, "--set", "floors.examples=0"]
    said = runs._retort(*asked, "--agree-fields", "loud=0.2")
    kept = json.loads((student / CERTIFICATE).read_text())
    assert kept["says"] in " ".join(said.split())
    assert (kept["targets"], kept["measured_on"], kept["texts"]) == ({"loud": 0.2}, "the test split", test)
    runs._retort(*asked, "--agree-fields", "loud=0.2", "--unfamiliar", "0.3")
    fewer = json.loads((student / CERTIFICATE).read_text())
    assert fewer["thresholds"].keys() == {"loud", FAMILIARITY}
    assert 0 < fewer["alone"] < kept["alone"] <= fewer["texts"] == test
    refused = CliRunner().invoke(main, [*asked, "--agree", "0.999"])
    assert refused.exit_code == 1
    assert "no confidence certifies that 99.9 %" in refused.stderr


def test_other_texts_certify_but_those_that_were_trained_on(
    runs: Runs, shards: Shards, taught: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    compiled, student = shards.compiled, runs.folder / "taught/student"
    required = WatchedSet(compiled.automaton.tokens, len(compiled.automaton.tokens))  # as another calibration may choose it
    others = made_up_shards(tmp_path, replace(compiled, watched=required), 100, seed=9)
    asked = ["evaluate", "--out", str(runs.folder / "taught"), "--shards", shards.folder, "--set", "floors.examples=0"]
    runs._retort(*asked, "--agree-fields", "loud=0.2", "--certify-on", others.folder)
    kept = json.loads((student / CERTIFICATE).read_text())
    train = open_examples(shards, TRAIN, "choices")
    seen = {train.text(i) for i in range(len(train))}
    texts = [text for table in others.tables() for text in table.texts]
    assert 0 < kept["texts"] == sum(text not in seen for text in texts) < 100
    assert kept["measured_on"] == "texts given for it"


def test_a_browser_shows_it_at_every_width(
    browser: Browser, runs: Runs, taught: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    shown(browser, (runs.folder / "taught/report/fidelity.html").read_text(), tmp_path)
