"""The first floor of the configuration: what an extraction can be told.

Each floor holds the sections of its own stages and has those of the floors below: `pipeline.config` < `student.config` <
`tune.config` < `cluster.config`. Each default stands here and nowhere else.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.base.config import Strict, Threads, presence


class TeacherConfig(Strict):
    """The teacher and the engine that runs it."""

    model: str | None = Field(None, description="Hugging Face name or path; null takes the task's")
    revision: str | None = Field(None, description="commit, branch or tag on the Hub")
    engine: Literal["vllm", "transformers", "openai"] = Field(
        "vllm", description="`openai` is any API that speaks like OpenAI's"
    )
    url: str | None = Field(None, description="of such an API, as https://api.openai.com/v1")
    key: str = Field("OPENAI_API_KEY", description="environment variable that holds the API's key")
    requests: int = Field(16, ge=1, description="calls of the API at once")
    input_price: float | None = Field(None, ge=0, description="of a million tokens that the API reads, in any currency")
    output_price: float | None = Field(None, ge=0, description="of a million tokens that it writes")
    max_calls: int | None = Field(None, ge=1, description="calls to make at most, those of earlier runs in the folder included")
    max_cost: float | None = Field(None, gt=0, description="to spend at most, by these prices")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="`auto` is the checkpoint's own; float32 on a CPU that has to emulate bfloat16, and is slow at it"
    )
    temperature: float = Field(0, ge=0, description="of sampling; 0 takes the likeliest token")
    max_num_seqs: int = Field(256, ge=1, description="answers decoded together by one engine")
    max_num_batched_tokens: int = Field(8192, ge=1, description="tokens of one engine step; longer prefills are cut in chunks")
    compile: bool | None = Field(
        None, description="compile the model when an engine starts, which takes some seconds; null does on a GPU"
    )
    kv_cache_gib: int = Field(1, ge=1, description="key/value cache of one engine on CPU")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory one engine takes")
    actors: int = Field(1, ge=1, description="teacher actors, each with its own engine")
    tensor_parallel: int = Field(1, ge=1, description="processes of one machine that share each engine's weights among them")
    cpus: float = Field(0.5, ge=0, description="CPUs Ray reserves for such a process; keep some free for the readers")
    gpus: float = Field(0, ge=0, description="GPUs Ray reserves for such a process")
    machines: str | None = Field(None, description="custom Ray resource of the machines to run on; null takes any")
    threads: Threads | None = Field(None, description="CPU threads of an engine; null shares the machine's among the actors")

    @model_validator(mode="after")
    def _askable(self) -> Self:
        if self.engine == "openai" and self.url is None:
            raise ValueError("engine openai needs a url, the address of the API")
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost needs input_price and output_price, of a million tokens")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for an actor, all of it on one machine."""
        processes = self.tensor_parallel
        return {"CPU": processes * self.cpus, "GPU": processes * self.gpus} | presence(self.machines)


class CommentsConfig(Strict):
    """Where the texts are."""

    paths: list[str] = Field([], description="files, folders, globs or URIs: .jsonl, .parquet, .csv, also .gz and .zst")
    text: str = Field("body", description="column with the text")
    id: str = Field("id", description="column with its id; it may be missing")
    answer: str | None = Field(
        None, description="column with answers for the teacher to score instead of giving its own; or one for each field: a,b"
    )
    probabilities: str | None = Field(None, description="column with the shares of values beside given answers, for an import")
    gold: str | None = Field(
        None, description="column with people's labels for the report, or one for each field: a,b; nothing is trained on them"
    )
    limit: int | None = Field(None, ge=1, description="stop after this many texts that pass the filters")
    max_malformed: int | None = Field(None, ge=0, description="stop the run when more rows than this are malformed")


class ExtractConfig(Strict):
    """How the texts become logit shards."""

    rows_per_unit: int = Field(512, ge=1, le=20_000, description="texts of one unit of work and of one shard")
    capture: Literal["all", "choices"] = Field("all", description="steps whose logits are kept; choices alone are faster")
    samples_per_comment: int = Field(1, ge=1, description="answers sampled for each text; more than one needs a temperature")
    codec: Literal["float16", "compact"] = Field(
        "float16", description="compact takes a thirteenth of the space at a measured error of less than 0.001 nats of KL"
    )
    calibration_rows: int = Field(256, ge=1, description="texts that choose the auxiliary tokens")
    calibration_floor: float = Field(
        0.9, ge=0, le=1, description="least mean raw mass on allowed tokens, at any state visited often enough to tell"
    )


class TrackingConfig(Strict):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; null keeps mlflow.db in the run's folder")
    experiment: str = "retort"


class PipelineSettings(Strict):
    """All that the stages `extract` and `score` can be told."""

    task: str | None = Field(None, description="the task's YAML file")
    out: str | None = Field(None, description="the run's folder")
    teacher: TeacherConfig = TeacherConfig()
    comments: CommentsConfig = CommentsConfig()
    extract: ExtractConfig = ExtractConfig()
    tracking: TrackingConfig = TrackingConfig()
