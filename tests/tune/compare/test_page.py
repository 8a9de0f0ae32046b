from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser

from pipeline.base.errors import UserError, printable
from pipeline.base.tracking import field_metric
from pipeline.cli.main import main
from student.config import StudentChanges, TrainConfig
from tests.browser import shown
from tests.names import NAMES, drawn, left_open
from tests.tune.store import HOSTILE, Store, measures, parameters, params
from tune.compare import page as compare
from tune.compare import runs
from tune.compare.page import Comparison, compare_runs
from tune.compare.runs import Found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one store: students of several seeds, and a search. Making the tables takes seconds: once."""
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder}/mlflow.db"
    _students(Store(uri, "retort"))
    _search(Store(uri, "searches"))
    return folder


def _students(store: Store) -> None:
    for layers, width, whole in ((2, 64, 0.74), (4, 256, 0.80), (8, 384, 0.79)):
        for seed in range(3 if layers < 8 else 1):
            store.student(params(layers, width, seed), measures(whole + 0.01 * seed, layers, width), f"s-{layers}")
    store.student(params(4, 256, 0, note=HOSTILE), measures(0.70, 4, 256, gpu=33.0), "hostile")
    size = {"parameters": parameters(2, 32)}
    store.student(params(2, 32, 0), size, state="stopped", status="KILLED", epochs=(3, 0.5))
    store.student(params(16, 1024, 0), {}, state="refused", status="FAILED", reason=HOSTILE, epochs=(0, 0.0))


def _search(store: Store) -> None:
    parent, _, _ = (store.search(name) for name in ("night", "twice", "twice"))
    for trial, (objective, rate) in enumerate((("topk", 1e-4), ("slim", 1e-3), ("topk", 5e-3), ("slim", 2e-3))):
        about = {"state": "stopped", "status": "KILLED"} if trial == 3 else {}
        final = {} if about else measures(0.7 + 0.02 * trial, 2, 64)
        store.student(params(2, 64, 0, objective=objective, learning_rate=rate), final, f"t{trial}", parent=parent, **about)


@pytest.fixture(scope="module")
def students(folder: Path) -> Comparison:
    return compare_runs(f"sqlite:///{folder}/mlflow.db", "retort", str(folder / "out"))


@pytest.fixture(scope="module")
def page(students: Comparison, folder: Path) -> str:
    return (folder / "out/compare.html").read_text()


def drawings(page: str) -> dict[str, str]:
    """The SVG of each plot, by its heading."""
    found = re.findall(r'<h2>([^<]*)</h2>\n<div class="scroll[^>]*><img src="([^"]*)"', page)
    return {title: drawn(uri) for title, uri in found}


def test_runs_as_they_were_written(students: Comparison) -> None:
    assert len(students.found.runs) == 10
    first = students.found.runs[0]
    assert first.params["student.layers"] == "2"
    assert first.metrics["test/whole"] == 0.74
    assert [epoch for epoch, _ in first.curve] == list(range(1, 9))
    assert first.curve[-1][1] == pytest.approx(0.74)


def test_students_and_the_others(students: Comparison) -> None:
    assert [(len(group.runs), group.front) for group in students.groups] == [(3, True), (1, False), (3, True), (1, False)]
    assert compare.tally(students.unfinished) == "1 stopped early, 1 refused"
    assert students.warnings == []
    assert students.verdict.startswith("The smallest student at least as faithful as the largest one")


def test_many_pages_of_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PAGE", 3)
    found = runs.read_runs(f"sqlite:///{folder}/mlflow.db", "retort")
    assert len({run.id for run in found.runs}) == 10


def test_the_page_holds_every_plot_and_escapes_what_it_shows(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<link" not in page
    assert not re.search(r'src="(?!data:)', page)
    plots = drawings(page)
    assert list(plots) == ["Agreement by size", "Agreement by speed", "Agreement by field", "Learning curves"]
    for title, words in {
        "Agreement by size": ["parameters, embedding included", "floor: linear SVM, 63.5 %", "on the front:"],
        "Agreement by speed": ["answers a second"],
        "Agreement by field": ["sentiment", "agreement, test split"],
        "Learning curves": ["epoch", "stopped early"],
    }.items():
        assert all(word in plots[title] for word in words), title


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_anything_may_have_any_name(students: Comparison, name: str) -> None:
    """Runs, experiments, fields and what params hold."""
    metrics = {field_metric(name): 0.5}
    runs = [
        replace(run, name=name, reason=name, params=run.params | {"note": f"{name} {i}"}, metrics=run.metrics | metrics)
        for i, run in enumerate(students.found.runs)
    ]
    compared = compare.compare(Found(name, name, "a search", runs))
    text = compare.render(compared)
    assert "<script" not in text
    assert len(drawings(text)) == 4
    assert f'<th class="n">{printable(name)[:200]}' in html.unescape(text)
    compare.table(compared)


@pytest.mark.filterwarnings("error::UserWarning")
def test_names_are_drawn_as_they_are_written(students: Comparison) -> None:
    for name in ("price_$5_to_$9", "_hidden"):
        run = replace(students.found.runs[0], metrics=students.found.runs[0].metrics | {field_metric(name): 0.5})
        text = compare.render(compare.compare(replace(students.found, runs=[run])))
        assert f">{name}<" in drawings(text)["Agreement by field"]


def test_the_page_with_every_setting_left_open(students: Comparison) -> None:
    settings = {"train": left_open(TrainConfig), "student": left_open(StudentChanges)}
    params = {f"{part}.{name}": str(value) for part, names in settings.items() for name, value in names.items()}
    varied = params | {"train.learning_rate": "0.001"}
    runs = [replace(run, params=varied if i else params) for i, run in enumerate(students.found.runs)]
    text = compare.render(compare.compare(Found("a search", "", "search", runs)))
    assert "learning_rate=default" in text


def test_what_was_not_measured_is_a_dash(folder: Path, students: Comparison) -> None:
    bare = [replace(run, metrics={}, curve=()) for run in students.found.runs]
    empty = compare.compare(replace(students.found, runs=bare))
    assert "nothing to compare" in empty.verdict
    text = compare.render(empty)
    assert drawings(text) == {}
    assert text.count('<td class="n">–</td>') > 10
    unfinished = compare.compare(replace(students.found, runs=[replace(run, state="failed") for run in bare]))
    assert "10 failed" in compare.render(unfinished)


def test_the_figures(students: Comparison, folder: Path) -> None:
    figures = json.loads((folder / "out/compare.json").read_text())
    assert figures["verdict"] == students.verdict
    best = figures["students"][0]
    assert best["metrics"]["test/whole"] == {"mean": pytest.approx(0.81), "std": pytest.approx(0.01), "seeds": 3}
    assert best["runs"][0]["params"]["student.width"] == "256"
    assert {run["state"] for run in figures["unfinished"]} == {"stopped", "refused"}
    assert [run["reason"] for run in figures["unfinished"] if run["reason"]] == [HOSTILE]


def test_other_shards_and_other_tests_are_not_compared(students: Comparison) -> None:
    first, *rest = students.found.runs
    other = replace(first, params=first.params | {"shards.digest": "other"})
    compared = compare.compare(replace(students.found, runs=[other, *rest]))
    assert "2 sets of shards" in compared.warnings[0]
    assert compared.verdict.startswith("No verdict")
    assert "Not comparable." in compare.render(compared)
    assert any("warning:" in line for line in compare.notes(compared))
    elsewhere = replace(first, metrics=first.metrics | {"floor/majority": 0.5})
    assert "different parts" in compare.compare(replace(students.found, runs=[elsewhere, *rest])).warnings[0]


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["compare", *arguments], env={"MLFLOW_TRACKING_URI": None})
    return done.exit_code, done.output


def test_the_command(folder: Path) -> None:
    code, output = invoke("--out", str(folder))
    assert code == 0, output
    assert (folder / "compare/compare.html").exists()
    assert f"page     {folder}/compare/compare.html" in output
    assert "81.0 ± 1.0" in output
    assert "1 stopped early, 1 refused" in output
    assert f"refused: layers=16, width=1024: {HOSTILE}" in output


def test_the_command_takes_a_search_and_names(folder: Path, tmp_path: Path) -> None:
    store = ["--uri", f"sqlite:///{folder}/mlflow.db", "--experiment", "searches"]
    code, output = invoke("--out", str(tmp_path), *store, "--search", "night", "--by", "objective")
    assert code == 0, output
    assert "objective=slim" in output
    assert "learning_rate" not in output
    assert (tmp_path / "compare/compare.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "retor"], "no experiment 'retor'; it has 'retort'"),
        (["--experiment", "Default"], "no student in the experiment Default"),
        (["--by", "layer"], "no run has a param 'layer' for --by; near: layers"),
        (["--search", "none"], "no search 'none'"),
        (["--experiment", "searches", "--search", "twice"], "2 searches are named 'twice'"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    code, output = invoke("--out", str(folder), *arguments)
    assert code == 1
    assert message in output


def test_a_missing_or_broken_store_is_refused_and_none_is_made(tmp_path: Path) -> None:
    code, output = invoke("--out", str(tmp_path))
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert f"no MLflow database at {tmp_path}/mlflow.db" in output
    (tmp_path / "mlflow.db").write_text("no database, but some text")
    code, output = invoke("--out", str(tmp_path))
    assert code == 1
    assert "cannot be read" in output


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be read") as refused:
        compare_runs("http://user:secret@127.0.0.1:9", "retort", str(tmp_path))
    assert "secret" not in str(refused.value)


def test_a_browser_shows_it_at_every_width(browser: Browser, page: str, tmp_path: Path) -> None:
    shown(browser, page, tmp_path)
