from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from pipeline.comments.reading import filter_rows, text_row
from student.decode.answerer import Answerer
from tests.student.serve.conftest import FakeAnswerer, Serve


def test_answers_are_those_of_the_student(client: httpx.Client, answerer: Answerer):
    texts = [f"comment {'very ' * (i % 5)}{i}" for i in range(20)]
    compiled = answerer.compiled
    rows = filter_rows([text_row(i, text) for i, text in enumerate(texts)], compiled.task.comments, compiled.tokenizer)
    expected = answerer.answer(rows, value_probabilities=True)
    results = client.post("/classify", json={"texts": texts}).json()["results"]
    assert [result["answer"] for result in results] == [answer.values for answer in expected]
    assert len({str(answer.values) for answer in expected}) > 1
    for result, answer in zip(results, expected, strict=True):
        assert result["confidence"] == pytest.approx(answer.confidence, abs=1e-5)
        assert (result["source"], result["reason"]) == ("student", None)
        assert answer.value_probabilities is not None
        for name, values in compiled.task.fields.items():
            assert [entry["value"] for entry in result["probabilities"][name]] == values
            assert [entry["share"] for entry in result["probabilities"][name]] == pytest.approx(
                answer.value_probabilities[name], abs=2e-4
            )


def test_one_text_is_a_list_of_one(client: httpx.Client):
    one = client.post("/classify", json={"text": "fine"}).json()["results"]
    assert one == client.post("/classify", json={"texts": ["fine"]}).json()["results"]
    assert client.post("/classify", json={"texts": []}).json() == {"results": []}


def test_probabilities_can_be_left_out(client: httpx.Client):
    (result,) = client.post("/classify", json={"text": "fine", "probabilities": False}).json()["results"]
    assert result.keys() == {"answer", "confidence", "source", "reason"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"https://example.com"', "urls"),
        ('"<eos>"', "special_tokens"),
        ('"  "', "too_short"),
        (f'"{"word " * 60}"', "too_long"),
        ('"\\ud800"', "malformed: not UTF-8"),
        ("NaN", "malformed: the text is float"),
        ("Infinity", "malformed: the text is float"),
        ("null", "malformed: the text is null"),
        ('{"a": 1}', "malformed: the text is dict"),
    ],
)
def test_a_text_set_aside_has_its_reason_and_its_neighbours_an_answer(client: httpx.Client, text: str, reason: str):
    body = f'{{"texts": ["fine", {text}]}}'
    response = client.post("/classify", content=body, headers={"Content-Type": "application/json"})
    fine, aside = response.json()["results"]
    assert fine["answer"]
    if reason == "special_tokens" and aside["answer"]:  # this tokenizer has no such token
        reason = None
    assert aside["reason"] == reason
    if reason:
        assert (aside["answer"], aside["confidence"], aside["source"], aside["probabilities"]) == (None,) * 4


def test_concurrent_requests_get_their_own_answers(serve: Serve, fake: FakeAnswerer):
    rng = random.Random(0)
    asked = [[rng.choice(["good", "bad"]) + f" {i}.{j}" for j in range(rng.randrange(1, 12))] for i in range(200)]

    async def ask(url: httpx.URL) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=50), timeout=30) as client:
            return await asyncio.gather(*(client.post("/classify", json={"texts": texts}) for texts in asked))

    with serve(fake) as client:
        responses = asyncio.run(ask(client.base_url))
    for texts, response in zip(asked, responses, strict=True):
        assert [result["answer"]["mood"] for result in response.json()["results"]] == [text.split()[0] for text in texts]
    assert max(map(len, fake.batches)) > 12  # of several callers


def test_task_tells_what_and_how_much(client: httpx.Client):
    task = client.get("/task").json()
    assert task["fields"] == {"mood": ["good", "bad", "mixed"], "loud": [True, False]}
    assert (task["max_texts"], task["comments"]["max_tokens"], task["teacher"]) == (50, 40, None)


def test_metrics_count_requests_comments_and_batches(serve: Serve, fake: FakeAnswerer):
    with serve(fake) as client:
        client.post("/classify", json={"texts": ["fine", "word " * 60, ""]})
        client.get("/nowhere/17")
        client.post("/classify", json={})
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'retort_requests_total{route="/classify",status="200"} 1.0',
        'retort_requests_total{route="/classify",status="400"} 1.0',
        'retort_requests_total{route="none",status="404"} 1.0',
        'retort_request_seconds_count{route="/classify"} 2.0',
        'retort_comments_total{outcome="answered"} 1.0',
        'retort_comments_total{outcome="too_long"} 1.0',
        'retort_comments_total{outcome="too_short"} 1.0',
        "retort_batch_comments_count 1.0",
        "retort_queue_comments 0.0",
    ):
        assert line in lines


def test_openapi_describes_requests_with_examples_and_errors(client: httpx.Client):
    api = client.get("/openapi.json").json()
    classify = api["paths"]["/classify"]["post"]
    assert classify["requestBody"]["content"]["application/json"]["schema"]
    assert "I love it" in str(classify["requestBody"])
    assert {"200", "4XX", "5XX"} == classify["responses"].keys()
    assert client.get("/docs").status_code == 404
