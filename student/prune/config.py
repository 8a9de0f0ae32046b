"""Typed configuration of pruning."""

from __future__ import annotations

from functools import reduce
from operator import truediv
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from student.config import Seed, Strict, presence

PRUNED = "prune.json"  # in a pruned student's folder, written last: what was cut from what
SIZES = ("width", "heads", "mlp", "layers")


def _parts(value: Any) -> Any:
    """1/4 as people write it."""
    try:
        return reduce(truediv, map(float, value.split("/", 1))) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value} is no share: write 1/4 or 0.25") from error


def _links(value: Any) -> Any:
    return [_parts(part) for part in value.split(",")] if isinstance(value, str) else value


Share = Annotated[float, BeforeValidator(_parts), Field(gt=0, le=1)]


class PruneConfig(Strict):
    """How a smaller student is cut from a trained model."""

    source: str | None = Field(None, description="a student's folder, or a Gemma 3 model by Hugging Face name or path")
    revision: str | None = Field(None, description="commit, branch or tag of such a model on the Hub")
    prompt: Literal["teacher", "bare"] = Field(
        "teacher", description="what a student cut from such a model reads: the teacher's prompt, or comment and separator"
    )
    sequence: Literal["full", "choices"] = Field("full", description="what it reads of answers: see student.sequence")

    width: int | None = Field(None, ge=1, description="embedding channels to keep; null keeps all, as below")
    heads: int | None = Field(None, ge=1, description="attention heads a layer")
    mlp: int | None = Field(None, ge=1, description="feed-forward neurons a layer")
    layers: int | None = Field(None, ge=1)
    params: int | None = Field(None, ge=1, description="instead of sizes: parameters to keep at most, embedding included")
    fraction: Share | None = Field(None, description="the same as a share of the source's, such as 1/4")
    by: Literal["width", "depth"] = Field(
        "width", description="what goes for params and fraction: width, heads and neurons alike, or layers"
    )
    chain: Annotated[tuple[Share, ...], BeforeValidator(_links)] = Field(
        (), description="falling shares of the source's parameters: each link is cut from the one before, and trained"
    )

    rank: Literal["activation", "random"] = Field("activation", description="what decides who stays; random is for comparison")
    rank_layers: Literal["loss", "cosine"] = Field(
        "loss", description="what a layer is worth: the rise of the loss without it, or how far it turns the residual stream"
    )
    examples: int = Field(1024, ge=1, description="training examples that importance is measured on")
    over_sequence: Literal["mean", "l2"] = Field("mean", description="how activations are summed up over an example")
    over_batch: Literal["l2", "mean"] = Field("l2", description="and those sums over the examples")
    batch_size: int = Field(32, ge=1, description="examples of one forward pass")
    seed: Seed = 0

    workers: int = Field(1, ge=1, description="processes that share the examples, each with the whole model")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs Ray reserves for one")
    gpus_per_worker: float = Field(0, ge=0)
    machines: str | None = Field(None, description="custom Ray resource of the machines to run on; null takes any")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [any(getattr(self, name) for name in SIZES), self.params, self.fraction, self.chain]
        if sum(map(bool, given)) > 1:
            raise ValueError("give either sizes (width, heads, mlp, layers), or params, or fraction, or chain")
        if any(later >= earlier for earlier, later in zip((1.0, *self.chain), self.chain, strict=False)):
            raise ValueError("the shares of a chain must fall, from below 1")
        return self

    @property
    def has_target(self) -> bool:
        """Whether it says how small the student is to be."""
        return any(getattr(self, name) for name in (*SIZES, "params", "fraction"))

    def recipe(self) -> dict[str, Any]:
        """For JSON: all that changes what is kept."""
        how = {"source", "chain", "workers", "cpus_per_worker", "gpus_per_worker", "machines", "batch_size"}
        return self.model_dump(mode="json", exclude=how)

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker} | presence(self.machines)
