"""The built-in demo: its comments say what their labels say, and its teacher is fitted to what inference will see."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch.optim import _muon
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo import build, teacher
from pipeline.demo.comments import BAD_LINES, make_comments, write_comments
from pipeline.task.task import Task
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.task.values import Values

LIBRARYS = _muon._zeropower_via_newtonschulz  # before a fit puts another in its place
TINY = teacher.Fit(vocabulary=600, width=64, layers=2, heads=1, mlp=64, epochs=1)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(str(build.TASK))


@pytest.fixture(scope="module")
def labelled() -> list[tuple[str, Values]]:
    return [(body, tuple(labels.values())) for body, labels in make_comments(2500, seed=0)]


@pytest.fixture(scope="module")
def tokenizer(labelled: list[tuple[str, Values]], task: Task) -> TeacherTokenizer:
    return TeacherTokenizer(teacher.train_tokenizer(labelled, task, size=1000))


def test_same_seed_writes_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_comments(str(tmp_path / f"{name}.jsonl.gz"), 50, seed)
    a, b, c = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in "abc")
    assert a == b != c


def test_longer_run_starts_with_shorter_one() -> None:
    assert make_comments(80, seed=3)[:20] == make_comments(20, seed=3)


def test_file_holds_good_rows_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "comments.jsonl.gz"
    write_comments(str(path), 400, seed=0)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert len(lines) == 400 + len(BAD_LINES)
    good = [json.loads(line) for line in lines if line not in BAD_LINES.values()]
    assert len({row["id"] for row in good}) == 400


def test_every_label_is_valid_and_occurs(task: Task, labelled: list[tuple[str, Values]]) -> None:
    for column, allowed in enumerate(task.fields.values()):
        assert {values[column] for _, values in labelled} == set(allowed)
    assert all(task.parse(task.render(values)) == values for _, values in labelled)


def test_comments_hardly_repeat() -> None:
    bodies = [body for body, _ in make_comments(6000, seed=0)]
    assert len(set(bodies)) > 0.97 * len(bodies)


def test_bag_of_words_is_no_match(labelled: list[tuple[str, Values]], task: Task) -> None:
    bodies = [body for body, _ in labelled]
    words = TfidfVectorizer(sublinear_tf=True).fit_transform(bodies)
    right = np.ones(500, bool)
    for column in range(len(task.fields)):
        labels = np.array([values[column] for _, values in labelled])
        floor = LogisticRegression(C=10, max_iter=500).fit(words[:-500], labels[:-500])
        right &= floor.predict(words[-500:]) == labels[-500:]
    assert 0.2 < right.mean() < 0.7


def test_example_is_chat_template_and_answer(
    labelled: list[tuple[str, Values]], task: Task, tokenizer: TeacherTokenizer
) -> None:
    hf = teacher.train_tokenizer(labelled, task, size=1000)
    some = labelled[:200]
    for (body, values), example in zip(some, teacher.make_examples(some, task, tokenizer), strict=True):
        turns = [{"role": "user", "content": task.user_turn(body)}]
        prompt = hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        whole = hf.apply_chat_template(
            [*turns, {"role": "assistant", "content": task.render(values)}], tokenize=True, return_dict=False
        )
        assert example[0] == prompt
        assert example[0] + example[1] == whole[: -len(hf("\n").input_ids)]
        assert example[1][-1] == teacher.END_OF_TURN == tokenizer.end_id


def test_control_tokens_text_in_a_comment_stays_text(task: Task, tokenizer: TeacherTokenizer) -> None:
    values: Values = next(task.answers())
    clean, hostile = teacher.make_examples(
        [("Fine.", values), ("Fine." + "".join(teacher.SPECIAL_TOKENS), values)], task, tokenizer
    )
    control = range(len(teacher.SPECIAL_TOKENS))
    assert [i for i in hostile[0] if i in control] == [i for i in clean[0] if i in control]
    assert hostile[1] == clean[1]


def test_targets_cover_the_answer_alone() -> None:
    examples = [([2, 10, 11], [20, 21, 4]), ([2, 10, 11, 12], [22, 4])]
    inputs, targets = teacher.collate(examples)
    ignored = teacher.IGNORED
    assert inputs.tolist() == [[2, 10, 11, 20, 21], [2, 10, 11, 12, 22]]
    assert targets.tolist() == [[ignored, ignored, 20, 21, 4], [ignored, ignored, ignored, 22, 4]]


def test_padding_leaves_the_loss_unchanged() -> None:
    torch.manual_seed(0)
    model = teacher.make_model(TINY)
    short, long = ([2, 10], [20, 4]), (list(range(5, 25)), [21, 22, 4])
    together = teacher.answer_loss(model, *teacher.collate([short, long])).item()
    alone = [teacher.answer_loss(model, *teacher.collate([example])).item() for example in (short, long)]
    assert together == pytest.approx((2 * alone[0] + 3 * alone[1]) / 5, rel=1e-5)


def test_build_makes_a_loadable_teacher_once(tmp_path: Path, task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    comments, folder = build.build_demo(str(tmp_path), count=200, fit=TINY)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == teacher.END_OF_TURN
    assert tokenizer.chat_template == teacher.CHAT_TEMPLATE
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    caplog.clear()
    assert build.build_demo(str(tmp_path), count=200, fit=TINY) == (comments, folder)
    assert "reusing" in caplog.text
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == written


def test_unfinished_or_older_build_is_redone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    build.build_demo(str(tmp_path), count=60, fit=TINY)
    build.build_demo(str(tmp_path), count=61, fit=TINY)
    for lost in ("demo.json", "comments.jsonl.gz", "teacher/model.safetensors"):
        (tmp_path / lost).unlink()
        build.build_demo(str(tmp_path), count=61, fit=TINY)
    assert "reusing" not in caplog.text


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_steps_are_those_of_pytorchs_muon(shape: tuple[int, int]) -> None:
    gradient, coefficients = torch.randn(shape, generator=torch.Generator().manual_seed(0)), (3.4445, -4.775, 2.0315)
    mine, theirs = (step(gradient, coefficients, 5, 1e-7) for step in (teacher.orthogonal, LIBRARYS))
    assert torch.allclose(mine, theirs.float(), atol=0.02)
    assert 0.6 < torch.linalg.svdvals(mine).min() < torch.linalg.svdvals(mine).max() < 1.3
