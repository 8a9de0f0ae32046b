"""The fourth floor of the configuration: what a plan is told beside the run's own configuration."""

from __future__ import annotations

from pydantic import Field

from pipeline.base.config import Strict
from tune.config import TuneSettings


class PlanConfig(Strict):
    """The size of the job, the machines, and what is assumed where nothing was measured."""

    comments: int = Field(500_000, ge=1, description="texts that pass the filters")
    examples: int | None = Field(
        None, ge=1, description="examples an epoch trains on, and nothing else counted; null takes 80 / 10 / 10 of the answers"
    )
    trials: int = Field(1, ge=1, description="students trained one after another, each to its last epoch; above 1 a search")

    teacher_params: float = Field(
        3.88e9, gt=0, description="of the teacher's language model; Gemma 3 4B has 3.88e9 (its technical report, table 1)"
    )

    scale: str | None = Field(None, description="scale.json of `retort scale`: its measurements come before all else")
    seconds_per_answer: float | None = Field(None, gt=0, description="of one teacher worker: 1 / its answers a second")
    seconds_per_example: float | None = Field(None, gt=0, description="of one training worker: 1 / its examples a second")
    mfu: float = Field(0.4, gt=0, le=1, description="share of the peak FLOP/s that the teacher and a training worker reach")

    prices: str | None = Field(None, description="YAML file of machines and prices; null takes cluster/plan/prices.yaml")
    teacher_machine: str | None = Field(
        None, description="kind of the teachers' machines; null takes p5.48xlarge, or cpu-2 for measurements without a GPU"
    )
    student_machine: str | None = Field(None, description="kind of the students' machines; null takes the teachers'")
    workers: int | None = Field(
        None, ge=1, description="of each stage, one a GPU; null takes teacher.actors and the most of train.workers"
    )


class ClusterSettings(TuneSettings):
    """All that Retort can be told."""

    plan: PlanConfig = PlanConfig()
