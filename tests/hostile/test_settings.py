"""Settings and folders that make no sense: each is refused in a line, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.plan.machines import read_machines
from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from student.config import StudentConfig, changed_shape
from tune.search.space import read_space

FAR = "9" * 20  # beyond 64 bits

SETTINGS = {
    "train.learning_rate=.inf": "train.learning_rate: Input should be a finite number",
    "train.learning_rate=.nan": "train.learning_rate: Input should be a finite number",
    "train.learning_rate=1e400": "train.learning_rate: Input should be a finite number",
    "train.growth=[0.9, .nan]": "train.growth.1: Input should be a finite number",
    "train.growth=[.inf]": "train.growth.0: Input should be a finite number",
    "teacher.temperature=.inf": "teacher.temperature: Input should be a finite number",
    "student.dropout=.nan": "student.dropout: Input should be a finite number",
    "tune.max_latency_ms=.inf": "tune.max_latency_ms: Input should be a finite number",
    "plan.teacher_params=.inf": "plan.teacher_params: Input should be a finite number",
    "serve.timeout_seconds=.inf": "serve.timeout_seconds: Input should be a finite number",
    "prune.fraction=1e999/3": "prune.fraction: Input should be a finite number",
    "prune.fraction=1e-99999999": "prune.fraction: Input should be greater than 0",
    "prune.fraction=1/0": "1/0 is no share",
    "prune.chain=1/2,nan": "prune.chain.1: Input should be a finite number",
    f"train.batch_size={FAR}": "train.batch_size: an integer must fit in 64 bits",
    f"train.batch_size=-{FAR}": "train.batch_size: ",
    "train.batch_size=1.0e+30": "train.batch_size: ",
    "train.batch_size=" + "9" * 5000: "is too large a number",
    f"train.workers=[1, {FAR}]": "train",
    f"scale.workers=[{FAR}]": "scale.workers",
    f"extract.calibration_rows={FAR}": "extract.calibration_rows: an integer must fit in 64 bits",
    f"student.layers={FAR}": "student.layers: an integer must fit in 64 bits",
    "train.threads=100000": "train.threads: Input should be less than or equal to 1024",
    "serve.threads=2147483648": "serve.threads: Input should be less than or equal to 1024",
    "train.seed=-1": "train.seed: Input should be greater than or equal to 0",
    "train.seed=4294967296": "train.seed: Input should be less than 4294967296",
    "tune.seed=-1": "tune.seed: Input should be greater than or equal to 0",
    ".".join("a" * 10_000) + "=1": "a: unknown key",
    "train." + ".".join("a" * 10_000) + "=1": "train.a: unknown key",
    "task." + "x." * 10_000 + "=1": "task",
    "train.batch_size=" + "[" * 5000 + "]" * 5000: "nested deeper than 40 levels",
    "train={a: " + "[" * 5000: "nested deeper than 40 levels",
    "x=&a [" + "*a, " * 5000 + "]": "nested deeper than 40 levels",
    "train.seed=[" + "1, " * 60_000 + "]": "more than 40,000 keys and values",
    "train=!!python/object/apply:os.abort []": "tags such as",
    "train.seed=2024-02-31": "as a date",
    'out="\\ud800"': "half a character",
    'out="a\\0b"': "cannot write to the folder",
    'task="a\\0b"': "is no path",
    "y" * 100_000: "--set takes key.path=value",
    "y" * 100_000 + "=1": "unknown key",
    "=": "--set takes key.path=value",
}


def refusal(arguments: list[str]) -> str:
    """What the command says as it refuses."""
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    assert len(done.output) < 3000
    return done.output


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[:40])
def test_a_senseless_setting_is_refused_in_a_line(tmp_path: Path, setting: str) -> None:
    out = [] if setting.startswith("out=") else ["--out", str(tmp_path / "out")]
    output = refusal(["plan", *out, "--set", setting])
    assert output.startswith("error: ")
    assert SETTINGS[setting] in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["run", "extract", "score", "train", "prune", "tune", "evaluate", "scale", "predict", "serve"]
)
def test_a_configuration_file_takes_the_same_way(tmp_path: Path, command: str) -> None:
    (tmp_path / "run.yaml").write_text(f"train:\n  batch_size: {FAR}\n  yes: 1\n")
    out = ["--out", str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml")]
    assert "run.yaml, line 3: the key `yes` is no string to YAML" in refusal([command, *out])
    (tmp_path / "run.yaml").write_text(f"train:\n  batch_size: {FAR}\n  learning_rate: .inf\n")
    output = refusal([command, *out])
    assert "train.batch_size: an integer must fit in 64 bits" in output
    assert "train.learning_rate: Input should be a finite number" in output


@pytest.mark.parametrize("kind", ["space", "prices"])
def test_a_search_space_and_prices_are_bounded_too(tmp_path: Path, kind: str) -> None:
    read, bad = {
        "space": (read_space, "train.learning_rate: {low: 1.0e-4, high: .inf}\n"),
        "prices": (read_machines, "m: {workers: 1, tflops: .inf}\n"),
    }[kind]
    for content, told in [(bad, "finite number"), ("a: " + "[" * 5000, "nested deeper"), ("no: [1]\n", "key `no`")]:
        (tmp_path / "file.yaml").write_text(content)
        with pytest.raises(UserError, match=told):
            read(str(tmp_path / "file.yaml"))


@pytest.mark.parametrize(
    ("option", "value"), [("--price-per-hour", "inf"), ("--price-per-hour", "nan"), ("--workers", FAR), ("--workers", "-1")]
)
def test_options_are_bounded_like_settings(tmp_path: Path, option: str, value: str) -> None:
    refusal(["scale", "--out", str(tmp_path), option, value])


FOLDERS = {
    "a file": "{place}/file",
    "below a file": "{place}/file/out",
    "below a device": "/dev/null/out",
    "where nothing can be made": "/proc/out",
    "a dead link": "{place}/link",
    "a name too long": "{place}/" + "x" * 300,
    "a path too long": "{place}" + "/x" * 5000,
    "not UTF-8": "{place}/\udcff",
}


def folder(place: Path, kind: str) -> str:
    (place / "file").write_text("")
    (place / "link").symlink_to(place / "nowhere")
    return FOLDERS[kind].format(place=place)


@pytest.mark.parametrize("command", ["run", "train", "evaluate", "predict", "export", "plan", "demo"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_starts(tmp_path: Path, command: str, kind: str) -> None:
    output = refusal([command, "--out", folder(tmp_path, kind)])
    assert ("is not UTF-8" if kind == "not UTF-8" else "error: cannot write to the folder") in output


def test_what_is_missing_of_a_folder_is_not_made_by_asking(tmp_path: Path) -> None:
    assert "no file at" in refusal(["plan", "--out", str(tmp_path / "a/b"), "--task", "nowhere.yaml"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("shape", ["layers=1000000", "width=1048576", "mlp=1073741824", f"heads={2**62}"])
def test_a_shape_beyond_any_machine_is_refused(shape: str) -> None:
    with pytest.raises(UserError, match="the student has no such shape"):
        changed_shape(StudentConfig(), load_config(None, [f"student.{shape}"], {}).student)


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("train", ["--out", "{place}/out", "--set", "train.learning_rate=.inf"], "finite number"),
        ("extract", ["--out", "{place}/\udcff"], "is not UTF-8"),
        ("predict", ["--out", "/dev/null/out"], "cannot write to the folder"),
    ],
)
def test_the_installed_command_says_it_in_a_line(tmp_path: Path, command: str, arguments: list[str], told: str) -> None:
    retort = Path(sys.executable).parent / "retort"
    given = [os.fsencode(argument.format(place=tmp_path)) for argument in arguments]
    done = subprocess.run([retort, command, *given], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 1000
