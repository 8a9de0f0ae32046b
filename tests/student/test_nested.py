"""Answers with objects and lists in them, and members left out, to texts of several columns, wherever a student is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from pipeline.cli.settings import load_config
from pipeline.task.compiled import CompiledTask, compile_for
from pipeline.task.tokenization import TeacherTokenizer
from student.decode.answerer import Answerer
from student.model.checkpoint import save_student
from student.predict.predict import predict
from tests.browser import opened
from tests.student.decode.test_decode import make_student
from tests.student.serve.conftest import running
from tests.tiny import tiny_task, tiny_tokenizer

ROWS = [{"title": f"text {i}", "body": "is fine" if i else None} for i in range(12)]
TEXTS = [f"text {i}: {'is fine' if i else ''}" for i in range(12)]


@pytest.fixture(scope="module")
def nested() -> CompiledTask:
    fields = {
        "who.tier": ["gold", "none"],
        "who.tags": ["gold", "good", "bad"],
        "who.asks.often": [True, False],
        "who.since": ["good", None],
        "urgent": [True, False],
    }
    about = {"format": {"nesting": "."}, "lists": {"who.tags": {"min": 1, "max": 2}}, "input": "{title}: {body}"}
    about |= {"optional": ["who.since"]}
    return compile_for(tiny_task(fields=fields, context=None, **about), TeacherTokenizer(tiny_tokenizer()))


def shape_of(answer: dict[str, object]) -> dict[str, object]:
    return {key: shape_of(part) if isinstance(part, dict) else None for key, part in answer.items() if key != "since"}


SHAPE = {"who": {"tier": None, "tags": None, "asks": {"often": None}}, "urgent": None}


def test_it_writes_objects_everywhere(nested: CompiledTask, tmp_path: Path) -> None:
    save_student(str(tmp_path / "student"), make_student(nested, 3, 6.0, sequence="choices"), nested)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = load_config(None, ["predict.workers=0"], {"comments.paths": [str(tmp_path / "texts.jsonl")]})
    predict(config, str(tmp_path / "student"), str(tmp_path / "out"))
    (part,) = (tmp_path / "out/answers").iterdir()
    records = [json.loads(line) for line in part.read_text().splitlines()]
    predicted = [record["answer"] for record in records]
    assert [record["text"] for record in records] == [text.strip() for text in TEXTS]
    assert [shape_of(answer) for answer in predicted] == [SHAPE] * len(TEXTS)
    assert all(1 <= len(answer["who"]["tags"]) <= 2 for answer in predicted)
    assert {answer["who"].get("since") for answer in predicted} == {"good", None}
    assert not any(answer["who"].get("since", "") is None for answer in predicted)
    with running(Answerer.load(str(tmp_path / "student"))) as client:
        for texts in (TEXTS, ROWS):
            results = client.post("/classify", json={"texts": texts}).json()["results"]
            assert [result["answer"] for result in results] == predicted
        shares = results[0]["probabilities"]["who.tags"]
        assert [share["value"] for share in shares] == ["gold", "good", "bad"]
        assert client.post("/classify", json={"text": {"subject": "fine"}}).json()["results"][0]["reason"] == (
            "malformed: the text is dict"
        )
        said = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": TEXTS[0]}]}).json()
    assert json.loads(said["choices"][0]["message"]["content"]) == predicted[0]


def test_the_page_reads_them(nested: CompiledTask, browser: Browser) -> None:
    student = Answerer(make_student(nested, 3, 6.0, sequence="choices"), nested)
    with running(student) as client, opened(browser, str(client.base_url), 1280) as page:
        page.get_by_label("title").fill(ROWS[1]["title"])
        page.get_by_label("body").fill(ROWS[1]["body"])
        page.get_by_role("button").click()
        given = client.post("/classify", json={"text": ROWS[1]}).json()["results"][0]["answer"]
        expect(page.locator("li.chosen")).to_have_count(4 + len(given["who"]["tags"]))
        assert page.locator("h2").all_inner_texts() == ["who.tier", "who.tags", "who.asks.often", "who.since", "urgent"]
