"""Damaged students: every command that reads one says in one line which file is damaged, before it begins anything."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base import storage
from pipeline.task.compiled import CompiledTask
from student.config import TrainConfig
from student.model.checkpoint import TRAINED, save_student, save_temperatures
from tests.hostile import damage
from tests.hostile.damage import Case, Damage, assert_one_line, filled, holed, in_json, in_tensors, retort, shorten, write
from tests.student.conftest import compiled, made_up_shards  # noqa: F401 - a fixture
from tests.student.decode.test_decode import make_student

JSON = ["compiled.json", "shape.json", "vocabulary.json", "calibration.json"]
WEIGHTS, AUTOMATON = "model.safetensors", "automaton.safetensors"
FUZZED = 120  # files changed at random
SECONDS = 120  # after which a command hangs, also on a busy machine


def swapped(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another automaton: the two tokens of the last choice lead where the other did; still no circle."""
    state = int(np.flatnonzero((table >= 0).sum(1) == 2)[-1])
    columns = np.flatnonzero(table[state] >= 0)
    table = table.copy()
    table[state, columns] = table[state, columns[::-1]]
    return table


CASES: dict[str, Case] = {
    **{f"{name}, {{}}": (name, write(b"{}")) for name in JSON},
    **{f"{name}, []": (name, write(b"[]")) for name in JSON},
    **{f"{name}, cut": (name, shorten(0.5)) for name in JSON},
    "compiled.json, NaN": ("compiled.json", in_json(end_id=math.nan)),
    "compiled.json, nested": ("compiled.json", write(b"[" * 200_000)),
    "compiled.json, no text": ("compiled.json", write(b"\xff\xfe\x00")),
    "compiled.json, another hash": ("compiled.json", in_json(hashes={"task": "0"})),
    "compiled.json, a FIFO": ("compiled.json", damage.fifo),
    "tokenizer.json, {}": ("tokenizer.json", write(b"{}")),
    "tokenizer.json, cut": ("tokenizer.json", shorten(0.7)),
    "tokenizer.json, a device": ("tokenizer.json", damage.device),
    "vocabulary.json, ids": ("vocabulary.json", in_json(required=[{"id": 10**30, "token": "x"}])),
    "vocabulary.json, fewer": ("vocabulary.json", in_json(required=[])),
    "temperatures, 0": ("calibration.json", in_json(temperatures={"mood": 0, "loud": 1})),
    "temperatures, less": ("calibration.json", in_json(temperatures={"mood": -1, "loud": 1})),
    "temperatures, NaN": ("calibration.json", in_json(temperatures={"mood": math.nan, "loud": 1})),
    "temperatures, infinite": ("calibration.json", in_json(temperatures={"mood": math.inf, "loud": 1})),
    "temperatures, words": ("calibration.json", in_json(temperatures={"mood": "hot", "loud": 1})),
    "temperatures, one missing": ("calibration.json", in_json(temperatures={"mood": 1})),
    "temperatures, unknown field": ("calibration.json", in_json(temperatures={"mood": 1, "loud": 1, "new": 1})),
    "shape, a million layers": ("shape.json", in_json(layers=1_000_000)),
    "shape, 10³⁰ layers": ("shape.json", in_json(layers=10**30)),
    "shape, no layers": ("shape.json", in_json(layers=0)),
    "shape, endless context": ("shape.json", in_json(context=10**12)),
    "shape, short context": ("shape.json", in_json(context=3)),
    "shape, heads that do not divide": ("shape.json", in_json(heads=3)),
    "shape, wide heads": ("shape.json", in_json(head_width=10**9)),
    "shape, another width": ("shape.json", in_json(width=64)),
    "shape, another vocabulary": ("shape.json", in_json(input_vocabulary=7)),
    "shape, unknown key": ("shape.json", in_json(depth=2)),
    "shape, unknown family": ("shape.json", in_json(family="llama")),
    "shape, NaN": ("shape.json", in_json(epsilon=math.nan)),
    "shape, of another kind": ("shape.json", in_json(kinds=[{"window": 0}, {"window": 1}])),
    "weights, missing": (WEIGHTS, damage.remove),
    "weights, empty": (WEIGHTS, write(b"")),
    "weights, other file": (WEIGHTS, write(b"PK\x03\x04" * 500)),
    "weights, cut in the header": (WEIGHTS, shorten(0.001)),
    "weights, cut in the body": (WEIGHTS, shorten(0.9)),
    "weights, absurd header": (WEIGHTS, write(b"\xff" * 8 + b"{}")),
    "weights, absurd tensor": (
        WEIGHTS,
        write(damage.header({"a": {"dtype": "F32", "shape": [2**40] * 2, "data_offsets": [0, 9]}})),
    ),
    "weights, no tensor": (WEIGHTS, write(damage.header({}))),
    "weights, one missing": (WEIGHTS, in_tensors(norm__weight=None)),
    "weights, one too many": (WEIGHTS, in_tensors(blocks__7__up__weight=filled(1.0))),
    "weights, another size": (WEIGHTS, in_tensors(head__weight=lambda weights: weights[:-1])),
    "weights, whole numbers": (WEIGHTS, in_tensors(norm__weight=lambda weights: weights.astype(np.int32))),
    "weights, rows beyond": (WEIGHTS, in_tensors(rows=holed(9999))),
    "weights, NaN": (WEIGHTS, in_tensors(blocks__0__up__weight=holed(math.nan))),
    "weights, infinite": (WEIGHTS, in_tensors(embedding__weight=holed(-math.inf))),
    "weights, a folder": (WEIGHTS, damage.folder),
    "weights, a FIFO": (WEIGHTS, damage.fifo),
    "automaton, empty": (AUTOMATON, write(b"")),
    "automaton, cut": (AUTOMATON, shorten(0.8)),
    "automaton, zeros": (AUTOMATON, in_tensors(next_state=filled(0))),
    "automaton, nowhere": (AUTOMATON, in_tensors(next_state=filled(-1))),
    "automaton, out of range": (AUTOMATON, in_tensors(next_state=lambda table: np.where(table > 3, 10**6, table))),
    "automaton, a circle": (AUTOMATON, in_tensors(next_state=lambda table: np.where(table == 5, 1, table))),
    "automaton, one state": (AUTOMATON, in_tensors(next_state=lambda table: table[:1])),
    "automaton, other numbers": (AUTOMATON, in_tensors(next_state=lambda table: table.astype(np.float32))),
    "automaton, other tokens": (AUTOMATON, in_tensors(tokens=lambda tokens: tokens + 1)),
    "automaton, other answers": (AUTOMATON, in_tensors(next_state=swapped)),
    "automaton, one table": (AUTOMATON, in_tensors(tokens=None)),
}
TRAINING_CASES: dict[str, Damage] = {
    "{}": write(b"{}"),
    "[]": write(b"[]"),
    "cut": shorten(0.5),
    "no run": in_json(mlflow={}),
    "no epoch": in_json(epochs=[]),
    "words": in_json(parameters={"embedding": "many", "rest": 1}),
    "another recipe": in_json(train={"objective": "none"}),
}
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "automaton, zeros": ("serve", ["--student", "{student}", "--port", "0"]),
    "weights, a FIFO": ("predict", ["--student", "{student}", "--comments", "{comments}"]),
    "shape, a million layers": ("evaluate", ["--student", "{student}", "--shards", "{shards}"]),
    "temperatures, NaN": ("export", ["--student", "{student}", "--shards", "{shards}"]),
    "weights, NaN": ("train", ["--init", "{student}", "--shards", "{shards}"]),
}


@pytest.fixture(scope="module")
def places(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """A student that was trained and calibrated, its shards, and a few comments."""
    folder = tmp_path_factory.mktemp("whole")
    student = folder / "student"
    save_student(str(student), make_student(compiled, 3, 6.0, sequence="choices"), compiled)
    save_temperatures(str(student), {"mood": 1.5, "loud": 0.7})
    made_up_shards(folder / "shards", compiled, 60)
    training = {
        "shards": {"teacher": {"model": "none"}},
        "student": {"layers": 2, "width": 32, "heads": 2, "mlp": 64},
        "train": TrainConfig().recipe(),
        "parameters": {"embedding": 1, "rest": 1},
        "best_epoch": 1,
        "epochs": [{"epoch": 1}],
        "cost": {"worker_seconds": 1.0},
        "mlflow": {"uri": f"sqlite:///{folder}/mlflow.db", "run": "none"},
    }
    storage.write_json(str(student / TRAINED), training)
    (folder / "comments.jsonl").write_text("".join(json.dumps({"body": f"good and quiet {i}"}) + "\n" for i in range(3)))
    return {"student": student, "shards": folder / "shards", "comments": folder / "comments.jsonl"}


@pytest.fixture
def damaged(places: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same with a copy of the student, to be damaged."""
    return places | {"student": Path(shutil.copytree(places["student"], tmp_path / "student"))}


def predicted(places: dict[str, Path], out: Path) -> tuple[int, str]:
    arguments = ["--comments", str(places["comments"]), "--out", str(out), "--set", "predict.workers=0"]
    return retort("predict", "--student", str(places["student"]), *arguments)


def test_the_whole_student_answers(places: dict[str, Path], tmp_path: Path) -> None:
    status, said = predicted(places, tmp_path)
    assert status == 0, said


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_student_is_named_in_one_line(damaged: dict[str, Path], tmp_path: Path, case: str) -> None:
    name, harm = CASES[case]
    harm(damaged["student"] / name)
    missing = "no student in" if case == "weights, missing" else name
    assert_one_line(*predicted(damaged, tmp_path / "out"), missing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_a_damaged_training_is_named_in_one_line(damaged: dict[str, Path], tmp_path: Path, case: str, command: str) -> None:
    TRAINING_CASES[case](damaged["student"] / TRAINED)
    folders = ("--student", str(damaged["student"]), "--shards", str(damaged["shards"]), "--out", str(tmp_path / "out"))
    assert_one_line(*retort(command, *folders), TRAINED)
    assert not (tmp_path / "out").exists()


def test_any_byte_may_change(places: dict[str, Path], tmp_path: Path) -> None:
    """The student still answers, or one line says why not."""
    rng, refused = random.Random(16), 0
    names = sorted(path.name for path in places["student"].iterdir())
    for i in range(FUZZED):
        student = Path(shutil.copytree(places["student"], tmp_path / f"student-{i}"))
        damage.flip(student / names[i % len(names)], rng)
        refused += damage.refused(*predicted(places | {"student": student}, tmp_path / f"out-{i}"), names[i % len(names)])
    assert refused > FUZZED / 3


@pytest.mark.slow
def test_every_command_refuses_it_before_it_begins(places: dict[str, Path], tmp_path: Path) -> None:
    """As processes, all at the same time."""
    started = {}
    for i, (case, (command, arguments)) in enumerate(COMMANDS.items()):
        here = places | {"student": Path(shutil.copytree(places["student"], tmp_path / f"student-{i}"))}
        name, harm = CASES[case]
        harm(here["student"] / name)
        filled_in = [argument.format(**here) for argument in arguments]
        program = [sys.executable, "-m", "pipeline.cli", command, *filled_in, "--out", str(tmp_path / f"out-{i}")]
        started[case] = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for case, process in started.items():
        try:
            said, _ = process.communicate(timeout=SECONDS)
        finally:
            process.send_signal(signal.SIGKILL)
        assert_one_line(process.returncode, said, CASES[case][0])
    assert not list(tmp_path.glob("out-*"))
