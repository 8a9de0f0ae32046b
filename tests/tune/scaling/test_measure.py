"""`retort scale`: what it reads off commits, its tables and page, and the real command with a tiny student."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from playwright.sync_api import Browser

from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from pipeline.extract.monitor import Commit, UnitReport
from pipeline.task.compiled import CompiledTask
from student.config import TrainConfig
from tests.browser import shown
from tests.integration.conftest import Retort, demo
from tests.names import drawn, left_open
from tests.student.conftest import made_up_shards
from tests.tune.scaling.test_model import LINK, ONE_AND_TWO, extract_row
from tune.config import ScaleConfig
from tune.scaling.extraction import Gate, row_of
from tune.scaling.measure import busy_share
from tune.scaling.page import notes, render, tables
from tune.scaling.results import Result, extract_stage, train_stage
from tune.scaling.training import _Alone, _batches

__all__ = ["demo"]

TINY = ["layers=1", "width=32", "heads=2", "mlp=64"]


@pytest.fixture
def result() -> Result:
    extract = extract_stage([extract_row(1, 1, 0.010), extract_row(2, 1, 0.013)], 500_000, 0.0, None)
    train = train_stage(ONE_AND_TWO, 32, LINK, 1.0, 3.6)
    return Result((extract, train), {"extract": {"task": "<script>"}, "train": {}})


def test_only_units_after_the_last_start_count() -> None:
    """Two actors of 2 s a unit; the second one starts 5 s after the first, which waits for it at the gate."""
    first = [Commit("a/1", at) for at in (10.0, 17.0, 19.0, 21.0)]
    second = [Commit("b/2", at) for at in (15.0, 17.0, 19.0)]
    row = row_of(sorted(first + second, key=lambda commit: commit.time), 0.0, 2, 128, 0.001)
    assert row.unit == [2.0] * 5
    assert (row.startup, row.nodes, row.workers) == (13.0, 2, 2)
    assert row.items_per_second == 128.0


def test_the_gate_opens_when_all_have_committed_once() -> None:
    async def report(gate: Gate, name: str) -> bool:
        return await gate.report(UnitReport(name, "idle", rows=5, committed=True))

    async def play() -> None:
        gate = Gate(2)
        first = asyncio.create_task(report(gate, "a/1"))
        await asyncio.sleep(0.05)
        assert not first.done()
        assert not await gate.report(UnitReport("b/2", "starting the engine"))
        assert not await report(gate, "b/2")
        assert not await first
        assert [commit.actor for commit in gate.commits()] == ["a/1", "b/2"]
        assert gate.status().rows == 10
        other = Gate(2)
        waiting = asyncio.create_task(report(other, "a/1"))
        await asyncio.sleep(0.05)
        await other.stop()
        assert await waiting

    asyncio.run(play())


def test_an_extraction_too_short_to_measure_is_refused() -> None:
    commits = [Commit("a/1", 1.0), Commit("a/2", 2.0)]
    with pytest.raises(UserError, match="no unit was left"):
        row_of(commits, 0.0, 2, 128, 0.0)
    with pytest.raises(UserError, match="1 actors committed units where 2"):
        row_of(commits[:1], 0.0, 2, 128, 0.0)


def test_a_step_apart_never_exchanges_and_is_otherwise_the_same() -> None:
    seen = []
    strategy: Any = SimpleNamespace(part=lambda last: seen.append(last), module="the student")
    apart = _Alone(strategy)
    apart.part(last=True)
    assert seen == [False]
    assert apart.module == "the student"


def test_batches_of_every_size_are_as_long() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 4000).astype(np.int32)
    examples: Any = SimpleNamespace(lengths=lengths)
    for size in (8, 16, 32):
        batches = _batches(examples, TrainConfig(), size, 14)
        assert [len(batch) for batch in batches] == [size] * 14
        assert np.mean([lengths[batch].mean() for batch in batches]) == pytest.approx(lengths.mean(), rel=0.02)


def test_figures_of_the_measured_rows(result: Result) -> None:
    extract, train = result.stages
    assert [row["items_per_second"] for row in extract.measured] == pytest.approx([100, 2 / 0.013])
    assert [row["efficiency"] for row in extract.measured] == pytest.approx([1, 10 / 13])
    assert extract.measured[1]["cost"] == pytest.approx({"worker_seconds_per_1000": 13.0, "gpu_seconds_per_1000": 0.0})
    weak, strong = (line.name for line in train.lines)
    assert [(row["line"], row["workers"]) for row in train.measured] == [(weak, 1), (weak, 2), (strong, 1), (strong, 2)]
    two = train.measured[1]
    step, alone = ONE_AND_TWO[2].step[0], ONE_AND_TWO[2].alone[0]
    assert two["communication_share"] == pytest.approx(1 - alone / step)
    assert two["bytes_sent"] == 4_000_000
    assert two["cost"]["gpu_seconds_per_1000"] == pytest.approx(2 * step / 64 * 1000)
    assert two["cost"]["price_per_1000"] == pytest.approx(2 * step / 64)  # 3.6 an hour is 0.001 a second


def test_metrics_by_workers(result: Result) -> None:
    found: dict[tuple[int, str], float] = {}
    for step, row in result.metrics():
        found |= {(step, name): value for name, value in row.items()}
    assert found[1, "train/efficiency"] == found[1, "train/strong_efficiency"] == 1
    assert found[2, "extract/rows_per_second"] == pytest.approx(2 / 0.013)
    assert {(2, "train/examples_per_second"), (2, "train/communication_share")} <= set(found)


def test_sentences_and_tables_say_where_and_why(result: Result) -> None:
    lines = notes(result)
    assert "first under 80 % with 2 workers" in lines[0]
    assert "share its memory" in lines[0]
    assert lines[-1].startswith("assumed, not measured: bandwidth between machines 12.5 GB/s")
    assert len(tables(result)) == 7  # the whole extraction is never measured


def test_a_busy_machine_is_said(result: Result) -> None:
    assert "warning" not in "".join(notes(result))
    busy = extract_stage([extract_row(1, 1, 0.010).model_copy(update={"busy": 0.9})], 500_000, 0.0, None)
    assert notes(Result((busy,), {}))[-1].startswith("warning: Other work took up to 90 %")
    assert "Not an idle machine" in render(Result((busy,), {}))
    assert 0 <= busy_share() <= 1


def test_what_was_not_measured_is_said(result: Result) -> None:
    alone = train_stage(ONE_AND_TWO[:2], 32, LINK, 0.0, None)
    sources = {each["name"]: each["source"] for each in alone.parameters}
    assert sources["bandwidth within a machine"] == "assumed"
    assert sources["an example, for each other worker on the machine"] == "not seen"
    assert "One worker alone was measured" in render(Result((alone,), {}))
    assert "One worker alone was measured" not in render(result)


def test_the_page_holds_every_plot_and_needs_nothing_beside_it(result: Result) -> None:
    page = render(result)
    assert "<script" not in page
    assert "&lt;script&gt;" in page or "\\u003cscript" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    found = re.findall(r'<h3>([^<]*)</h3>\n<img src="([^"]*)"', page)
    titles = [title.partition(":")[0] for title, _ in found]
    assert titles == ["Throughput", "Where the time goes", "Where the time goes"] * 2
    for _, uri in found:
        assert "workers" in drawn(uri)
    assert page.count("assumed</td>") == 2


def test_the_page_with_every_setting_left_open(result: Result) -> None:
    settings = {"scale": ScaleConfig.model_validate(left_open(ScaleConfig)).model_dump(), "train": left_open(TrainConfig)}
    stages = (result.stages[0], train_stage(ONE_AND_TWO, 32, LINK, 0.0, None))
    assert "price of" not in render(Result(stages, settings))


def test_a_training_strategy_without_a_step_apart_is_refused(tmp_path: Path) -> None:
    arguments = ["scale", f"--out={tmp_path}", "--stage=train", "--set=train.strategy=zero2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "ddp" in done.output
    assert load_config(None, ["scale.workers=[1,2]"], {}).scale.workers == [1, 2]
    with pytest.raises(UserError, match="from 1"):
        load_config(None, ["scale.workers=[0]"], {})


@pytest.fixture
def scale(tmp_path: Path, compiled: CompiledTask) -> Callable[..., str]:
    """The command in a process of its own: Ray stays out of this one."""
    shards = made_up_shards(tmp_path / "shards", compiled, 400)
    retort, settings = Retort(tmp_path), [f"--set=student.{one}" for one in TINY]
    same = [
        "scale",
        f"--out={tmp_path}/out",
        f"--shards={shards.folder}",
        "--stage=train",
        "--workers=2",
        "--set=train.threads=1",
    ]

    def run(*more: str, ok: bool = True) -> str:
        return retort(*same, *settings, "--set=scale.steps=2", "--set=train.batch_size=8", *more, ok=ok)

    return run


@pytest.mark.slow
def test_training_is_measured_once_with_one_worker_and_with_two(scale: Callable[..., str], tmp_path: Path) -> None:
    output = scale()
    assert "measuring train with 2 worker(s)" in output
    content = json.loads((tmp_path / "out/scale/scale.json").read_text())
    rows = {(row["workers"], row["share"]): row for row in content["measured"]["train"]}
    assert set(rows) == {(1, 8), (1, 4), (2, 8), (2, 4)}
    assert all(row["nodes"] == 1 and len(row["step"]) == 2 for row in rows.values())
    assert len(rows[2, 8]["exchange"]) == 2
    assert not rows[1, 8]["exchange"]
    assert not (tmp_path / "out/scale/scratch").exists()
    client = MlflowClient(content["mlflow"]["uri"])
    run = client.get_run(content["mlflow"]["run_id"])
    assert (run.data.tags["retort.kind"], run.info.status) == ("scale", "FINISHED")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/efficiency")] == [1, 2]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["scale.html"]

    again = scale("--price-per-hour=2")
    assert again.count("already measured") == 2
    assert json.loads((tmp_path / "out/scale/scale.json").read_text())["measured"] == content["measured"]
    assert "its student differ" in scale("--set=student.layers=2", ok=False)


@pytest.mark.slow
def test_extraction_is_measured_with_one_actor_and_with_two(demo: Path, tmp_path: Path) -> None:
    named = {"task": "tasks/demo.yaml", "teacher": demo / "teacher", "comments": demo / "comments.jsonl.gz"}
    arguments = [f"--{name}={value}" for name, value in named.items()]
    settings = ["--set=teacher.threads=1", "--set=extract.rows_per_unit=50", "--set=extract.calibration_floor=0.8"]
    Retort(tmp_path)("scale", f"--out={tmp_path}/out", "--stage=extract", "--workers=2", *arguments, *settings)
    content = json.loads((tmp_path / "out/scale/scale.json").read_text())
    one, two = content["measured"]["extract"]
    assert (one["workers"], two["workers"], two["nodes"], one["rows"]) == (1, 2, 1, 50)
    assert len(one["unit"]) == 5
    assert one["startup"] > 1
    assert (tmp_path / "out/scale/scale.html").stat().st_size > 10_000


def test_a_browser_shows_it_at_every_width(browser: Browser, result: Result, tmp_path: Path) -> None:
    shown(browser, render(result), tmp_path)
