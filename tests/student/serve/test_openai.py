from __future__ import annotations

import httpx
import openai
import pytest

from student.decode.answerer import Answerer
from student.serve.openai import comment_of
from tests.student.serve.conftest import FakeAnswerer, Serve
from tests.tiny import tiny_task

ASKED = [{"role": "user", "content": "a good comment"}]


@pytest.fixture
def chat(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def rendered(client: httpx.Client, answerer: Answerer, text: str) -> str:
    (result,) = client.post("/classify", json={"text": text}).json()["results"]
    return answerer.compiled.task.render(tuple(result["answer"].values()))


def test_the_client_gets_the_text_the_teacher_would_write(chat: openai.OpenAI, client: httpx.Client, answerer: Answerer):
    settings = {"temperature": 0.7, "max_tokens": 5, "top_p": 0.1, "seed": 3, "stop": ["x"], "n": 1}
    completion = chat.chat.completions.create(model="any", messages=ASKED, **settings)
    (choice,) = completion.choices
    assert choice.message.content == rendered(client, answerer, "a good comment")
    assert (choice.finish_reason, completion.model) == ("stop", "tiny")
    tokenizer = answerer.compiled.tokenizer
    assert completion.usage.prompt_tokens == len(tokenizer.encode(["a good comment"])[0])
    assert completion.usage.completion_tokens == len(tokenizer.encode([choice.message.content])[0])


def test_the_client_streams(chat: openai.OpenAI, client: httpx.Client, answerer: Answerer):
    stream = chat.chat.completions.create(model="any", messages=ASKED, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == rendered(client, answerer, "a good comment")
    assert (deltas[0].delta.role, deltas[-1].finish_reason) == ("assistant", "stop")
    assert chunks[-1].usage.total_tokens > 0


def test_the_client_lists_the_student(chat: openai.OpenAI):
    assert [model.id for model in chat.models.list()] == ["tiny"]


def test_the_prompt_of_the_task_is_taken_off(chat: openai.OpenAI, client: httpx.Client, answerer: Answerer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": answerer.compiled.task.user_turn("a good comment")}]},
    ]
    completion = chat.chat.completions.create(model="any", messages=messages)
    assert completion.choices[0].message.content == rendered(client, answerer, "a good comment")


@pytest.mark.parametrize("prompt", ["{instruction}\n\n{comment}", "<<{comment}>>\n{instruction}\n", "{comment}"])
def test_a_comment_is_found_in_any_prompt(prompt: str):
    task = tiny_task(prompt=prompt)
    for comment in ("fine", "Judge.", " two\nlines ", "<<>>"):
        assert comment_of(task.user_turn(comment), task).strip() == comment.strip()
        assert comment_of(task.user_turn(comment).strip(), task).strip() == comment.strip()
    assert comment_of("alone", task) == "alone"


def test_a_message_that_only_overlaps_the_prompt_is_the_comment():
    task = tiny_task(prompt="aba{comment}aba")
    assert comment_of("aba", task) == "aba"
    assert comment_of("abaaba", task) == ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, None),
        ({"stream": "yes"}, None),
        ({"stream_options": {"include_usage": "yes"}}, None),
        ({"logprobs": "no"}, None),
        ({"messages": [{}] * 5000}, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "no_user_message"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "no_user_message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "not_text"),
        ({"messages": [{"role": "user", "content": "word " * 60}]}, "too_long"),
        ({"messages": [{"role": "user", "content": "https://example.com"}]}, "urls"),
        ({"messages": "none"}, None),
        ({"stream": True, "messages": [{"role": "user", "content": ""}]}, "too_short"),
    ],
)
def test_what_it_cannot_do_is_refused_as_openai_does(chat: openai.OpenAI, changes: dict[str, object], code: str | None):
    with pytest.raises(openai.BadRequestError) as refused:
        chat.chat.completions.create(**{"model": "any", "messages": ASKED} | changes)  # type: ignore[call-overload]
    assert refused.value.code == code
    assert refused.value.type == "invalid_request_error"


def test_a_surrogate_is_set_aside(client: httpx.Client):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_a_failure_is_the_servers(serve: Serve, fake: FakeAnswerer):
    with serve(fake) as client:
        chat = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            chat.chat.completions.create(model="any", messages=[{"role": "user", "content": "poison"}])
