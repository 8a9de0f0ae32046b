"""The third floor of the configuration: what a search and a measurement of scaling can be told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from pipeline.base.config import Seed, Strict
from student.config import StudentSettings


class TuneConfig(Strict):
    """A search."""

    space: str | None = Field(None, description="YAML file of the search space; null takes tune/space.yaml")
    trials: int = Field(16, ge=1, description="how many students to try")
    concurrent: int | None = Field(None, ge=1, description="trials at once; null takes as many as the cluster has room for")
    seed: Seed = 0
    early_stopping: bool = Field(True, description="stop trials that fall behind (ASHA)")
    points_per_halving: float = Field(
        0.5, ge=0, description="points of agreement that a student of half the parameters may lose and still count as good"
    )
    max_params: int | None = Field(None, ge=1, description="parameters a student may have, its embedding included")
    max_latency_ms: float | None = Field(None, gt=0, description="milliseconds it may take for one text where it trains")
    warm_start: list[str] = Field([], description="folders of earlier searches to learn from")


class ScaleConfig(Strict):
    """How scaling is measured, and what its model assumes where nothing was measured."""

    workers: list[int] = Field([], description="counts to measure beside 1; empty takes 2, 4, … as far as the cluster has room")
    stage: Literal["extract", "train", "both"] = "both"
    steps: int = Field(12, ge=1, description="training steps timed of each kind")
    price_per_hour: float | None = Field(None, gt=0, description="of one worker's share of a machine, in any currency")

    @field_validator("workers")
    @classmethod
    def _counts(cls, workers: list[int]) -> list[int]:
        if any(count < 1 for count in workers):
            raise ValueError("workers takes counts from 1")
        return workers


def _words(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class LadderConfig(Strict):
    """The students that `retort run` trains, and how the best is told."""

    rungs: Annotated[tuple[Literal["ngrams", "own", "teacher"], ...], BeforeValidator(_words)] = Field(
        ("ngrams", "own", "teacher"),
        description="hashed words, of few answers; a student of random weights; half of the teacher, if it is a Gemma 3 here",
    )
    readers: tuple[str, ...] = Field(
        (),
        description="pretrained models for more rungs, by folder or Hub name, as sentence-transformers/all-MiniLM-L6-v2",
    )
    minutes: float = Field(15, gt=0, description="of training for each rung, which cut its epochs where they would take longer")
    points_per_doubling: float = Field(
        0.5, ge=0, description="points of agreement that a student of twice the time for an answer has to be better by"
    )


class GrowConfig(Strict):
    """A loop that asks the teacher about the texts from which the student learns most."""

    calls: int = Field(10_000, ge=1, description="texts to ask about at most")
    first: int = Field(1000, ge=20, description="of them, drawn at random to begin with")
    growth: float = Field(1.5, gt=1, description="how many times as many are asked about after each round as before it")
    coverage: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of texts that the student is to answer alone as often as answer.agree asks; ends the loop",
    )
    seed: Seed = 0


class TuneSettings(StudentSettings):
    """All that many trainings can be told."""

    ladder: LadderConfig = LadderConfig()
    grow: GrowConfig = GrowConfig()
    tune: TuneConfig = TuneConfig()
    scale: ScaleConfig = ScaleConfig()
