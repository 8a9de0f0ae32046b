"""How seconds and memory of each stage grow with the comments, up to five million, on real comments many times over.

Each stage runs in a process of its own, on what the stage before left. All of it is the product's, but for the teacher's
engine, which answers at once (`benchmarks.stand_in`). Each prediction is killed when half of it is there, and goes on. A
process' memory is what it has for itself alone, at its highest: neither mapped files nor Ray's object store.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.results import ROOT, keep
from benchmarks.tables import scale as shown
from student.predict.predict import ROWS_PER_UNIT

FILE_ROWS = 1_000_000  # comments of one file
STEPS = 500  # batches of a training
LOOK_EVERY = 0.2  # seconds between two looks at the memory
STAGE = "import sys; from benchmarks.scale import run; run(*sys.argv[1:])"


@dataclass(frozen=True)
class Work:
    """What the stages of one number of comments work with.

    Attributes:
        folder: theirs; `texts/` in it has the comments.
    """

    task: str
    teacher: str
    student: str
    folder: str
    overrides: tuple[str, ...]

    def config(self) -> Any:
        """The run's configuration."""
        from pipeline.cli.settings import load_config

        options = {"task": self.task, "teacher.model": self.teacher, "out": self.folder}
        options |= {"comments.paths": [f"{self.folder}/texts"], "extract.capture": "choices", "extract.codec": "compact"}
        return load_config(None, list(self.overrides), options)

    @property
    def shards(self) -> str:
        """Where the extraction's shards are."""
        return f"{self.folder}/shards"


def plan(work: Work) -> float:
    """Reads and filters the comments, and cuts them into units; returns the seconds."""
    from pipeline.base.runtime import start_ray
    from pipeline.extract.extract import prepare_run

    start_ray()
    began = time.perf_counter()
    prepare_run(work.config())
    return time.perf_counter() - began


def extract(work: Work) -> float:
    """Writes a shard for each unit."""
    from benchmarks.stand_in import StandInExtractor
    from pipeline.extract import extract as stage
    from tune.scaling.extraction import Untracked

    extraction, units, _ = stage.prepare_run(work.config())
    stage.UnitExtractor = StandInExtractor  # type: ignore[misc]
    began = time.perf_counter()
    stage.run_units(extraction, units, Untracked)  # type: ignore[arg-type]
    return time.perf_counter() - began


def manifest(work: Work) -> float:
    """Derives the manifest from the shards."""
    from pipeline.extract.extract import finish, prepare_run

    extraction, units, compiled = prepare_run(work.config())
    began = time.perf_counter()
    finish(extraction, compiled, units)
    return time.perf_counter() - began


def unpack(work: Work) -> float:
    """Unpacks the shards as a training's machine does."""
    from pipeline.shards.manifest import open_shards
    from student.data.unpack import unpack as stage

    began = time.perf_counter()
    stage(open_shards(work.shards))
    return time.perf_counter() - began


def train(work: Work) -> float:
    """Opens the examples, orders an epoch and makes its first batches; no student learns from them."""
    from pipeline.shards.manifest import open_shards
    from student.config import TrainConfig
    from student.data.examples import open_examples
    from student.train.order import Order

    began = time.perf_counter()
    examples = open_examples(open_shards(work.shards), "train", "choices")
    for indices in itertools.islice(Order(examples.lengths, TrainConfig(batch_size=32)).epoch(1), STEPS):
        examples.batch(indices)
    return time.perf_counter() - began


def predict(work: Work) -> float:
    """Answers the comments by a student, from reading them on."""
    from student.predict.predict import predict as stage

    began = time.perf_counter()
    stage(work.config(), work.student, f"{work.folder}/predict")
    return time.perf_counter() - began


STAGES: dict[str, Callable[[Work], float]] = {f.__name__: f for f in (plan, extract, manifest, unpack, train, predict)}


def run(stage: str, work: str) -> None:
    """A stage in this process; its seconds are the last line it prints."""
    seconds = STAGES[stage](Work(**json.loads(work)))
    print(json.dumps(seconds))


def measure(stage: str, work: Work, until: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Runs a stage in a process of its own, and kills it when `until` says so; its seconds, peaks in MiB, and CPU seconds."""
    began, peaks = time.perf_counter(), {"driver": 0.0, "worker": 0.0, "cpu": 0.0}
    command = [sys.executable, "-c", STAGE, stage, json.dumps(asdict(work))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        family: list[psutil.Process] = []
        while driver.poll() is None:
            family = look(driver.pid, peaks)
            if until():
                driver.kill()
                break
            time.sleep(LOOK_EVERY)
        output = driver.communicate()[0]
    psutil.wait_procs(family, timeout=60)
    if driver.returncode > 0:
        raise SystemExit(f"{stage} failed in {work.folder}")
    return {"seconds": time.perf_counter() - began if driver.returncode else json.loads(output.splitlines()[-1])} | peaks


def look(driver: int, peaks: dict[str, float]) -> list[psutil.Process]:
    """Raises the peaks to what a driver and its largest worker have now, and its CPU seconds; returns all it started."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(driver).children(recursive=True)
        peaks["driver"] = max(peaks["driver"], own_memory(driver))
        peaks["cpu"] = sum(psutil.Process(driver).cpu_times()[:2])
    for process in family:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                peaks["worker"] = max(peaks["worker"], own_memory(process.pid))
    return family


def own_memory(pid: int) -> float:
    """MiB that a process has for itself; 0 of one that is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)
    return 0.0


def write_texts(comments: str, folder: Path, count: int) -> None:
    """So many comments in files, those there are again and again, each with an id and a last word of its own."""
    with gzip.open(comments, "rt") as lines:
        bodies = [json.loads(line)["body"] for line in lines]
    folder.mkdir(parents=True)
    for start in range(0, count, FILE_ROWS):
        rows = range(start, min(count, start + FILE_ROWS))
        lines = (json.dumps({"id": str(i), "body": f"{bodies[i % len(bodies)]} {word(i)}"}) + "\n" for i in rows)
        (folder / f"{start // FILE_ROWS:04d}.jsonl").write_text("".join(lines))


def word(number: int) -> str:
    """Letters that no other number has."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def prepare(work: Work, shards: str, comments: str, count: int) -> None:
    """The texts, and beside where shards will be the compiled task and its codec, as a calibration leaves them."""
    from benchmarks.stand_in import STORED, store
    from pipeline.base import storage
    from pipeline.extract.extract import identify
    from pipeline.shards.codec import Codec
    from pipeline.shards.manifest import open_shards
    from pipeline.shards.payload import CODEC_FILE
    from pipeline.teacher.model_files import absolute_model

    os.environ[STORED] = f"{work.folder}/answers.npz"
    os.environ["RETORT_CACHE"] = f"{work.folder}/cache"
    if os.path.exists(work.shards):
        return
    write_texts(comments, Path(work.folder, "texts"), count)
    known = open_shards(shards)
    captured, compiled, config = store(known, os.environ[STORED]), known.compiled, work.config()
    answers = (row[:length] for row, length in zip(captured.tokens, captured.lengths, strict=True))
    inside = np.arange(captured.tokens.shape[1]) < captured.lengths[:, None]
    states = compiled.automaton.states_before(answers)[captured.kept[inside]]
    logprobs = (captured.logits - captured.lse[..., :1])[captured.kept]
    Codec.fit(logprobs, states, compiled.automaton.forced).save(storage.join(work.shards, CODEC_FILE))
    teacher = identify(absolute_model(work.teacher), config)
    storage.write_json(storage.join(work.shards, "format_mass.json"), {"teacher": teacher})
    compiled.save(work.shards)


def stage_of(name: str, work: Work, count: int) -> dict[str, Any]:
    """A stage's figures; a prediction's are those of both its halves, after all of its answers were found there once."""
    if name != "predict":
        return measure(name, work)
    folder = Path(work.folder, "predict")
    first = measure(name, work, lambda: len(parts(folder)) > count // ROWS_PER_UNIT // 2)
    killed = len(parts(folder))
    second = measure(name, work)
    check_answers(folder, count)
    found = {name: max(first[name], second[name]) for name in ("driver", "worker")}
    found |= {name: first[name] + second[name] for name in ("seconds", "cpu")}
    found |= {"killed": killed, "parts": len(parts(folder))}
    return found | {"rate": rate([part.stat().st_mtime for part in parts(folder)])}


def parts(folder: Path) -> list[Path]:
    """The files of answers that a prediction has."""
    return sorted(folder.glob("answers/part-*"))


def rate(written: list[float]) -> float | None:
    """Answers a second of the files written at these times, the longest gap left out: the command was killed there."""
    gaps = np.sort(np.diff(np.sort(written)))[:-1]
    return float(ROWS_PER_UNIT * len(gaps) / gaps.sum()) if len(gaps) > 1 else None


def check_answers(folder: Path, count: int) -> None:
    """Stops unless every comment has one answer, or is set aside with a reason."""
    times = np.zeros(count, np.int64)
    for path in [folder / "comments" / "set_aside.jsonl", *parts(folder)]:
        with path.open() as lines:
            np.add.at(times, [int(json.loads(line)["id"]) for line in lines], 1)
    if (times != 1).any():
        raise SystemExit(f"{(times == 0).sum()} comments have no answer, {(times > 1).sum()} have several")


def figures(out: str) -> Iterator[dict[str, Any]]:
    """All that was measured in a folder, by this command and by earlier ones."""
    for count in sorted(int(folder.name) for folder in Path(out).iterdir()):
        records = [Path(out, str(count), f"{name}.json") for name in STAGES]
        yield from (json.loads(record.read_text()) for record in records if record.exists())


@click.command(help=__doc__)
@click.option("--task", required=True)
@click.option("--teacher", required=True, help="Whose tokenizer reads; it answers nothing.")
@click.option("--shards", required=True, help="Of that task and teacher: their first answers are given out.")
@click.option("--student", required=True)
@click.option("--comments", required=True)
@click.option("--out", required=True, help="A folder with room for some GB.")
@click.option("--count", "counts", type=int, multiple=True, default=(1_000, 50_000, 500_000), show_default=True)
@click.option("--stage", "stages", type=click.Choice(list(STAGES)), multiple=True, default=tuple(STAGES), show_default=True)
@click.option("--set", "overrides", multiple=True, help="Settings of the run.")
def main(
    task: str, teacher: str, shards: str, student: str, comments: str, out: str,
    counts: tuple[int, ...], stages: tuple[str, ...], overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Measures each stage with each number of comments, but for what was measured before; prints and keeps all figures."""
    for count in counts:
        work = Work(task, teacher, student, f"{out}/{count}", overrides)
        prepare(work, shards, comments, count)
        for name in stages:
            record = Path(work.folder, f"{name}.json")
            if not record.exists():
                found = {"stage": name, "comments": count} | stage_of(name, work, count)
                record.write_text(json.dumps(found))
                print(json.dumps(found), file=sys.stderr)
    keep("scale", {"rows": list(figures(out))})
    head, *lines = shown()
    table = Table(*head, box=None)
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
