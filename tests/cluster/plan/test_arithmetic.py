"""The formulas of a plan, by hand and against the figures of the thesis and the design."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan.arithmetic import decode_seconds, example_seconds, prefill_seconds, shard_bytes, update_seconds
from cluster.plan.estimate import make_plan
from cluster.plan.machines import GPU_MACHINE, read_machines
from cluster.plan.timing import PUBLISHED, answer_seconds, train_timing
from cluster.plan.workload import workload_of
from pipeline.cli.settings import load_config
from tests.cluster.plan.plans import SMALL, planned
from tests.tiny import ROOT

H100 = read_machines(None)[GPU_MACHINE]
TASK = str(ROOT / "tasks/reddit_sentiment.yaml")


def test_the_design_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 6·N·T FLOPs an example, 7.5 M examples of the 200 M student are about 7e17: half an hour of an H100 at 40 %."""
    monkeypatch.setattr("cluster.plan.timing.START_SECONDS", 0.0)
    work = workload_of(planned(), None)
    assert work.body == pytest.approx(16 * 12 * 1024**2, rel=0.001)
    assert work.sequence == 75
    assert 6 * work.body * work.sequence * 7.5e6 == pytest.approx(7e17, rel=0.05)
    hours = 7.5e6 * example_seconds(work.body, work.sequence, H100.flops_per_second, 0.4) / 3600
    assert hours == pytest.approx(0.48, rel=0.05)
    config = planned("train.epochs=1", examples=7_500_000)
    stage = train_timing(config, workload_of(config, None), H100, None)
    assert stage.source == PUBLISHED
    assert stage.hours(1) == pytest.approx(hours, rel=1e-3)


def test_the_thesis() -> None:
    """15 epochs of 500,000 examples at 1.25 s are 2,604 hours of training; 270 hours of extraction are 1.944 s a comment."""
    plan = make_plan(load_config(str(ROOT / "cluster/plan/thesis.yaml"), [], {}))
    hours = {stage.name: stage.worker_hours for stage in plan.stages}
    assert hours["extract"] == pytest.approx(270, rel=2e-3)
    assert hours["train"] == pytest.approx(7.5e6 * 1.25 / 3600, rel=1e-3)
    assert hours["evaluate"] == 0
    assert {stage.source for stage in plan.stages} == {"given"}
    ours = plan.elsewhere
    same, h100 = ours["rtx4090"], ours["p5.48xlarge"]
    assert same is not None
    assert h100 is not None
    assert h100.stage_hours["train"] == pytest.approx(0.5, rel=0.05)
    assert same.stage_hours["train"] == pytest.approx(h100.stage_hours["train"] * 989.4 / 165.2, rel=0.05)
    assert ours["cpu-2"] is None  # 7.8 GB of weights


def test_reading_and_writing_by_hand() -> None:
    assert prefill_seconds(4e9, 100, 1e15, 0.4) == pytest.approx(2e-3)
    arguments = {"params": 4e9, "tokens": 50, "calls": 5, "weight_bytes": 8e9, "flops_per_second": 1e15, "mfu": 0.4}
    assert decode_seconds(**arguments, together=1, bytes_per_second=2e12) == pytest.approx(20e-3)  # reading weights
    assert decode_seconds(**arguments, together=256, bytes_per_second=2e12) == pytest.approx(1e-3)  # arithmetic
    assert update_seconds(1e9, 2.8e12) == pytest.approx(0.01)


def test_an_answer_is_its_prompt_and_the_slower_of_two() -> None:
    config = planned(teacher_params=4e9)
    work = workload_of(config, None)
    work = replace(work, lengths=replace(work.lengths, prompt=100))
    assert work.calls == pytest.approx(5.8)  # four fields
    peak = 0.4 * 989.4e12
    assert answer_seconds(config, work, H100) == pytest.approx(2 * 4e9 * (100 + 50) / peak)
    alone = planned("teacher.max_num_seqs=1", teacher_params=4e9)
    assert answer_seconds(alone, work, H100) == pytest.approx(2 * 4e9 * 100 / peak + 5.8 * 8e9 / (0.6 * 3.35e12))


def test_lengths_are_the_tasks() -> None:
    lengths = workload_of(planned(f"task={TASK}"), None).lengths
    assert (lengths.comment, lengths.answer, lengths.fields, lengths.watched) == (25, 56, 4, 310)
    choices = workload_of(planned(f"task={TASK}", "student.sequence=choices", "extract.capture=choices"), None)
    assert (choices.sequence, choices.kept_steps, choices.calls) == (25 + 1 + 4, 5, pytest.approx(4.8))


def test_the_data_grow() -> None:
    work = workload_of(planned(*SMALL, "train.growth=[0.25,0.5,1]", "train.epochs=4", comments=1000), None)
    assert (work.examples, work.validation, work.test) == (800, 100, 100)
    assert work.passes == pytest.approx(2.75)
    assert work.steps == 7 + 13 + 25 + 25


def test_bytes_by_hand() -> None:
    assert shard_bytes(50, 310, compact=False) == 50 * (310 * 2 + 12)
    assert shard_bytes(50, 310, compact=True) == pytest.approx(50 * 632 / 13)
    plan = make_plan(planned(*SMALL, "extract.samples_per_comment=2", comments=1000, trials=3))
    assert plan.bytes["shards"] == plan.bytes["unpacked for training"] == 2000 * 31_600
    assert plan.bytes["students"] == 3 * 4 * plan.work.params
    assert plan.bytes["checkpoints"] == 2 * 3 * plan.bytes["students"]
    assert plan.tokens["chinchilla"] == 20 * plan.work.body
    assert plan.tokens["trained"] == 15 * plan.tokens["distinct"] == 15 * 1600 * 75


@given(st.floats(1, 1e12), st.floats(1, 1e5), st.floats(1e9, 1e16), st.floats(0.01, 1))
def test_training_costs_three_forward_passes(params: float, tokens: float, peak: float, mfu: float) -> None:
    assert example_seconds(params, tokens, peak, mfu) == pytest.approx(3 * prefill_seconds(params, tokens, peak, mfu))
