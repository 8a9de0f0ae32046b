"""`retort plan`: units, money, what more workers and more comments do, its page and its command."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser
from transformers import AutoModel

from cluster.config import PlanConfig
from cluster.plan.estimate import PAYS, make_plan
from cluster.plan.machines import CPU_MACHINE, Machine, read_machines
from cluster.plan.report import dollars, duration, notes, render, sections, size
from cluster.plan.timing import START_SECONDS
from cluster.plan.workload import workload_of
from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from student.model.pretrained import NGRAMS, OWN
from tests.browser import shown
from tests.cluster.plan.plans import SMALL, planned, scale_json
from tests.names import drawn, left_open
from tests.student.model.test_reader import save_pretrained
from tests.tiny import ROOT

MACHINES = """
big: {workers: 4, tflops: 100, bandwidth_gbyte_s: 1.0e+9, memory_gib: 80, local_gbyte_s: 1.0e+9, network_gbit_s: 1.0e+9,
      dollars_per_hour: 8, spot_dollars_per_hour: 2}
own: {workers: 1, tflops: 100, bandwidth_gbyte_s: 1000, memory_gib: 8, local_gbyte_s: 10, network_gbit_s: 1,
      dollars_per_hour: 1}
"""
GIVEN = {"seconds_per_answer": 0.5, "seconds_per_example": 0.1, "teacher_machine": "big"}


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prices") / "prices.yaml"
    path.write_text(MACHINES)
    return str(path)


def test_twice_the_gpus_take_half_the_time_where_nothing_is_lost(prices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.plan.timing.START_SECONDS", 0.0)
    monkeypatch.setattr("cluster.plan.workload.EMBEDDING_ROWS", 1000)
    config = planned(*SMALL, comments=512_000, prices=prices, **GIVEN)
    points = {point.workers["extract"]: point for point in make_plan(config).points}
    for stage in ("extract", "train"):
        assert points[1].stage_hours[stage] == pytest.approx(2 * points[2].stage_hours[stage], rel=2e-3)
        assert points[2].efficiency[stage] == pytest.approx(1, rel=2e-3)


def test_worker_hours_times_their_price_are_the_money(prices: str) -> None:
    plan = make_plan(planned(*SMALL, comments=100_000, prices=prices, workers=8, **GIVEN))
    for stage in plan.stages[:2]:
        assert stage.worker_hours == pytest.approx(8 * stage.wall_hours)
        assert (stage.machines, stage.dollars) == (2, pytest.approx(stage.worker_hours * 8 / 4))
        assert stage.spot_dollars == pytest.approx(stage.dollars / 4)
    evaluate = plan.stages[2]
    assert evaluate.dollars == pytest.approx(8 * evaluate.wall_hours)  # one of four GPUs, and the whole machine is paid for
    assert plan.total.dollars == pytest.approx(sum(stage.dollars for stage in plan.stages))
    assert plan.total.wall_hours == pytest.approx(sum(stage.wall_hours for stage in plan.stages))
    assert plan.total.spot_dollars == pytest.approx(plan.total.dollars / 4)


def test_without_a_spot_price_there_is_none_in_all(prices: str) -> None:
    plan = make_plan(planned(*SMALL, prices=prices, student_machine="own", **GIVEN))
    assert plan.stages[0].spot_dollars is not None
    assert (plan.stages[1].spot_dollars, plan.total.spot_dollars, plan.points[0].spot_dollars) == (None, None, None)
    assert "cost" in drawn(re.findall(r'src="([^"]*)"', render(plan))[1])


def test_a_search_trains_that_many_students(prices: str) -> None:
    one, many = (make_plan(planned(*SMALL, prices=prices, trials=trials, **GIVEN)) for trials in (1, 7))
    assert many.stages[0].worker_hours == one.stages[0].worker_hours
    assert many.stages[1].worker_hours == pytest.approx(7 * one.stages[1].worker_hours)
    assert (many.stages[1].name, many.stages[2].dollars) == ("train × 7", pytest.approx(7 * one.stages[2].dollars))


def test_a_reader_is_work_of_its_own(tmp_path: Path) -> None:
    """A pretrained one's layers are read with every token; hashed words cost a student next to nothing."""
    folder = save_pretrained(tmp_path / "bert", "bert")
    readers = {name: workload_of(planned(*SMALL, f"student.reader={name}"), None) for name in (OWN, folder, NGRAMS)}
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    layers = sum(parameter.numel() for parameter in model.parameters()) - sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding)
    )
    projection = model.config.hidden_size * 32
    assert readers[folder].body == readers[OWN].body + layers + projection
    assert readers[NGRAMS].sequence < readers[OWN].sequence == readers[folder].sequence
    assert "for each of ngrams, own, teacher and for every reader, each for 15 min" in " ".join(
        make_plan(planned(*SMALL)).assumptions
    )


def test_counts_go_on_while_they_pay(prices: str) -> None:
    plan = make_plan(planned(*SMALL, comments=50_000, prices=prices, workers=3, **GIVEN))
    counts, alone = [point.workers["extract"] for point in plan.points], plan.points[0].worker_hours
    assert counts[:4] == [1, 2, 3, 4]
    efficiencies = [alone / point.worker_hours for point in plan.points]
    assert efficiencies[-1] < PAYS <= efficiencies[-2]
    for stage, most in plan.pays.items():
        assert all(point.efficiency[stage] >= PAYS for point in plan.points if point.workers["extract"] <= most)


rates = st.floats(1e-4, 10)
jobs = st.tuples(st.integers(20, 10**6), rates, rates, st.integers(1, 5))


@settings(max_examples=25)
@given(jobs, st.integers(1, 10**6))
def test_more_comments_never_cost_less(job: tuple[int, float, float, int], more: int) -> None:
    comments, answer, example, epochs = job
    known = {"seconds_per_answer": answer, "seconds_per_example": example}
    few, many = (
        make_plan(planned(*SMALL, f"train.epochs={epochs}", comments=count, **known)) for count in (comments, comments + more)
    )
    assert 0 <= few.total.dollars <= many.total.dollars * (1 + 1e-9)
    assert few.total.wall_hours <= many.total.wall_hours * (1 + 1e-9)
    assert all(0 <= few.bytes[name] <= many.bytes[name] for name in few.bytes)


@settings(max_examples=25)
@given(jobs, st.sampled_from(sorted(read_machines(None))))
def test_more_gpus_never_take_fewer_gpu_hours(job: tuple[int, float, float, int], machine: str) -> None:
    comments, answer, example, _ = job
    known = {"seconds_per_answer": answer, "seconds_per_example": example, "teacher_machine": machine}
    points = make_plan(planned(*SMALL, comments=comments, **known)).points
    for before, after in pairwise(points):
        assert after.worker_hours >= before.worker_hours * (1 - 1e-9)


def test_what_does_not_fit_or_is_not_known_is_refused(prices: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes 50.3 GiB, and a worker has 24: choose another plan.teacher_machine"):
        make_plan(planned(*SMALL, teacher_params=27e9, teacher_machine="rtx4090"))
    with pytest.raises(UserError, match="no machine 'h100' among the prices: choose one of big, own"):
        make_plan(planned(*SMALL, teacher_machine="h100", prices=prices))
    with pytest.raises(UserError, match=r"plan\.machine: unknown key"):
        load_config(None, ["plan.machine=x"], {})
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("big: {workers: 4, price: 3}\n")
    with pytest.raises(UserError, match=r"the machines are wrong:\n(.|\n)*big.price: unknown key"):
        read_machines(str(wrong))


def test_every_bundled_machine_has_plausible_figures() -> None:
    for name, machine in read_machines(None).items():
        assert machine.spot_dollars_per_hour is not None
        assert machine.spot_dollars_per_hour < machine.dollars_per_hour < 15 * machine.workers, name
        assert machine.flops_per_second < 1e15
        assert machine.bytes_per_second < 4e12


def test_a_machine_is_paid_for_as_a_whole() -> None:
    machine = read_machines(None)["p5.48xlarge"]
    assert [machine.count(workers) for workers in (1, 8, 9)] == [1, 1, 2]
    assert machine.dollars(9, 2.0) == pytest.approx(2 * 2 * machine.dollars_per_hour)
    assert Machine(**machine.model_dump() | {"spot_dollars_per_hour": None}).dollars(1, 1.0, spot=True) is None


def test_the_page_holds_every_table_and_needs_nothing_beside_it() -> None:
    plan = make_plan(planned(*SMALL, comments=5000, **{"seconds_per_answer": 0.5}))
    page = render(replace(plan, warnings=("<script>",)))
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<table>") == len(sections(plan)) == 4
    wall, cost = map(drawn, re.findall(r'src="([^"]*)"', page))
    for drawing, label in ((wall, "wall time, hours"), (cost, "cost, US dollars")):
        assert label in drawing
        assert "workers of each stage: GPUs" in drawing
        assert len(re.findall(r"text-anchor: end[^>]*>[\d.,]+( [kMB])?<", drawing)) >= 2, "the upright axis has numbers"


def test_the_page_with_every_setting_left_open_and_a_machine_of_any_name(tmp_path: Path) -> None:
    """One without a spot price too."""
    name, path = "own $5 <script>alert(1)</script> [red]", tmp_path / "prices.yaml"
    path.write_text(MACHINES.replace("own:", json.dumps(name) + ":"))
    assert "p5.48xlarge" in render(make_plan(planned(*SMALL, **left_open(PlanConfig))))
    page = render(
        make_plan(
            planned(*SMALL, **left_open(PlanConfig) | {"prices": str(path), "teacher_machine": name, "teacher_params": 1e9})
        )
    )
    assert html.escape(name) in page
    assert "<td>–</td>" in page  # what it costs as a spot machine
    assert "<script" not in page


def test_people_read_units() -> None:
    assert [duration(hours) for hours in (0.01, 0.5, 5, 100)] == ["36 s", "30 min", "5 h", "4.17 days"]
    assert [size(count) for count in (12, 31_600, 15.8e9)] == ["12 B", "31.6 kB", "15.8 GB"]
    assert [dollars(amount) for amount in (None, 0.5, 1234.5)] == ["–", "$0.50", "$1,234"]


def test_the_command_prints_tables_and_leaves_its_files(tmp_path: Path) -> None:
    arguments = ["plan", f"--out={tmp_path}", f"--scale={scale_json(tmp_path)}", "--comments-count=3072", "--workers=2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "measured" in done.output
    figures = json.loads((tmp_path / "plan/plan.json").read_text())
    assert [point["workers"]["train"] for point in figures["points"]][:3] == [1, 2, 4]
    assert [stage["workers"] for stage in figures["stages"]] == [2, 2, 1]
    assert figures["total"]["dollars"] == pytest.approx(sum(stage["dollars"] for stage in figures["stages"]))
    assert (tmp_path / "plan/plan.html").read_text().startswith("<!doctype html>")
    refused = CliRunner().invoke(main, ["plan", f"--out={tmp_path}", "--teacher-machine=none"])
    assert refused.exit_code == 1
    assert "no machine 'none'" in refused.output


def test_it_says_what_it_stands_on() -> None:
    said = "\n".join(notes(make_plan(planned(*SMALL))))
    assert "no task was given" in said
    assert "40 % of FLOP/s" in said
    told = "\n".join(notes(make_plan(planned(f"task={ROOT}/tasks/reddit_sentiment.yaml", *SMALL))))
    assert "warning" not in told


def test_an_api_is_asked_by_one_process_and_costs_its_tokens() -> None:
    api = ["teacher.engine=openai", "teacher.url=http://host/v1", "teacher.requests=20", "plan.comments=10000", *SMALL]
    plan = make_plan(planned(*api, "teacher.input_price=1", "teacher.output_price=2"))
    extraction = plan.stages[0]
    assert (extraction.workers, extraction.source, extraction.machine) == (1, "assumed", CPU_MACHINE)
    assert extraction.wall_hours == pytest.approx((START_SECONDS + 10_000 / 20) / 3600)
    cost = 10_000 * (plan.work.lengths.prompt + 2 * plan.work.lengths.answer) / 1e6
    assert f"{cost:,.2f} by its prices" in " ".join(plan.assumptions)
    assert "say what they cost" in " ".join(make_plan(planned(*api)).assumptions)


def test_a_browser_shows_it_at_every_width(browser: Browser, tmp_path: Path) -> None:
    shown(browser, render(make_plan(planned(*SMALL, comments=5000, **{"seconds_per_answer": 0.5}))), tmp_path)
