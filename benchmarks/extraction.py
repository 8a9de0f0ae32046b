"""Answers a second of a teacher with the logits of its watched tokens kept, against other ways to get the same.

Every contender answers the same comments with the same teacher on the same machine, each in a process of its own, and they
take turns over some rounds; the median of the rounds counts. Contenders that keep logits token by token as Python objects, or
decode batch by batch, are slow and get fewer comments. Model calls are per answer: how often the model ran for one request,
the reading of its prompt included.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.results import keep

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 64


@dataclass(frozen=True)
class Question:
    """What every contender is asked."""

    model: str
    prompts: list[list[int]]
    compiled: Any
    max_prompt: int


Run = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Contender:
    """A way to answer.

    Attributes:
        label: for the table.
        start: opens it and returns what answers prompts, and what counts model calls.
        rows: comments it gets at most.
        baseline: whether it is somebody else's.
    """

    label: str
    start: Callable[[Question], tuple[Run, list[int]]]
    rows: int | None = None
    baseline: bool = False


def ours(question: Question, jump: bool = True, capture: str = "all", record: bool = True) -> tuple[Run, list[int]]:
    """Retort's vLLM engine."""
    from pipeline.config import TeacherConfig
    from pipeline.teacher.capture import Recorder
    from pipeline.teacher.engines import Job, Request
    from pipeline.teacher.vllm_engine import VllmTeacher

    c = question.compiled
    job = Job(c.automaton, c.tokenizer.end_id, question.max_prompt, c.watched.tokens, capture, jump=jump)
    teacher = VllmTeacher(question.model, TeacherConfig(compile=True), job)
    calls = count_calls(teacher._llm)
    if record:
        return lambda prompts: teacher.record([Request(prompt) for prompt in prompts]), calls
    Recorder.observe, Recorder.missing = lambda *_: None, lambda *_: []
    return lambda prompts: teacher._ask([Request(prompt) for prompt in prompts]).seen.result(), calls


def vllm(question: Question, sampling: dict[str, Any] | None = None, **options: Any) -> tuple[Run, list[int]]:
    """The engine by itself, with the options that were best for it here."""
    import vllm.sampling_params
    from vllm import LLM, SamplingParams

    vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS = 10**6
    c = question.compiled
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "skip_tokenizer_init": True}
    settings |= {"max_model_len": question.max_prompt + c.automaton.longest, "generation_config": "vllm", "block_size": 32}
    llm = LLM(model=question.model, **(settings | options))
    params = {"temperature": 0, "max_tokens": c.automaton.longest, "stop_token_ids": [c.tokenizer.end_id], "detokenize": False}
    asked = SamplingParams(**(params | (sampling or {})))
    calls = count_calls(llm)
    return lambda prompts: llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False), calls


def structured(question: Question) -> tuple[Run, list[int]]:
    """Structured outputs of vLLM, by the JSON schema of the task."""
    from vllm.sampling_params import StructuredOutputsParams

    fields = question.compiled.task.fields
    schema = {
        "type": "object",
        "properties": {name: {"enum": values} for name, values in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }
    return vllm(
        question,
        {"structured_outputs": StructuredOutputsParams(json=schema), "max_tokens": 64},
        skip_tokenizer_init=False,
        max_model_len=question.max_prompt + 64,
    )


def transformers(question: Question) -> tuple[Run, list[int]]:
    """`generate` with the logits of every step, as fast as it goes: see `benchmarks.inference_contenders.Generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.inference_contenders import Generate

    model: Any = AutoModelForCausalLM.from_pretrained(question.model, dtype="auto").eval()
    watched, calls = torch.as_tensor(question.compiled.watched.tokens, dtype=torch.int64), [0]

    def keep_logits(out: Any) -> None:
        calls[0] += sum(len(logits) for logits in out.logits)
        [logits[:, watched].half().numpy() for logits in out.logits]

    options = {"max_new_tokens": question.compiled.automaton.longest, "eos_token_id": question.compiled.tokenizer.end_id}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    return Generate(model, question.prompts[: 2 * WARM_UP], keep_logits, **options), calls


def count_calls(llm: Any) -> list[int]:
    """Counts, in the list's one element, requests times model calls."""
    calls = [0]

    def install(worker: Any) -> None:
        runner, forward = worker.model_runner, worker.model_runner._model_forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[0] += runner.input_batch.num_reqs
            return forward(*args, **kwargs)

        runner._model_forward = counting

    llm.collective_rpc(install)
    return calls


CONTENDERS = {
    "choices": Contender("Retort, logits of choice steps", lambda q: ours(q, capture="choices")),
    "all": Contender("Retort, logits of all steps", ours),
    "bare": Contender("Retort, no logits", lambda q: ours(q, capture="choices", record=False)),
    "step-all": Contender("Retort, step by step, logits of all steps", lambda q: ours(q, jump=False)),
    "plain": Contender("vLLM, unconstrained, no logits", vllm, baseline=True),
    "structured": Contender("vLLM, structured outputs, no logits", structured, baseline=True),
    "logprobs": Contender(
        "vLLM, `logprob_token_ids` with its cap lifted, flat",
        lambda q: vllm(q, {"logprob_token_ids": q.compiled.watched.tokens.tolist(), "flat_logprobs": True}),
        rows=96,
        baseline=True,
    ),
    "transformers": Contender("`transformers`, `output_logits`", transformers, rows=512, baseline=True),
}


def load_question(model: str, shards: str, comments: str, rows: int) -> Question:
    """The task as an extraction compiled it, and the first comments that pass its filters."""
    from pipeline.comments.reading import KEPT, Comment, filter_rows
    from pipeline.task.compiled import CompiledTask
    from pipeline.task.tokenization import load_teacher_tokenizer

    compiled, tokenizer = CompiledTask.load(shards), load_teacher_tokenizer(model)
    with gzip.open(comments, "rt") as lines:
        read = [Comment(i, text=json.loads(line)["body"]) for i, line in zip(range(2 * (WARM_UP + rows)), lines, strict=False)]
    texts = [row.text for row in filter_rows(read, compiled.task.comments, tokenizer) if row.status == KEPT][: WARM_UP + rows]
    prompts = tokenizer.prompt(compiled.task).ids(texts, tokenizer)
    return Question(model, prompts, compiled, max(map(len, prompts)))


def measure(name: str, question: Question) -> dict[str, float]:
    """One round of one contender, in this process."""
    contender = CONTENDERS[name]
    run, calls = contender.start(question)
    prompts = question.prompts[WARM_UP:][: contender.rows]
    run(question.prompts[:WARM_UP])
    calls[0] = 0
    start = time.perf_counter()
    run(prompts)
    seconds = time.perf_counter() - start
    return {"answers_per_second": len(prompts) / seconds, "model_calls": calls[0] / len(prompts), "rows": len(prompts)}


def in_process_of_its_own(name: str, arguments: list[str]) -> dict[str, float]:
    """The same measurement in a fresh process, with the environment of an extraction's engines."""
    from pipeline.config import TeacherConfig
    from pipeline.teacher.engines import engine_environment

    environment = os.environ | engine_environment(TeacherConfig()) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments, "--only", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    """The medians, and their ratios to the named alternatives."""
    table = Table("", "answers/s", "spread", "model calls an answer", "× best baseline", "× logprob_token_ids", box=None)
    baselines = [row["answers_per_second"] for name, row in results.items() if CONTENDERS[name].baseline]
    for name, row in results.items():
        rate = row["answers_per_second"]
        best = f"{rate / max(baselines):.2f}" if baselines else "-"
        against = f"{rate / results['logprobs']['answers_per_second']:.1f}" if "logprobs" in results else "-"
        spread = f"{min(row['rounds']):.1f} to {max(row['rounds']):.1f}"
        table.add_row(CONTENDERS[name].label, f"{rate:.1f}", spread, f"{row['model_calls']:.1f}", best, against)
    return table


@click.command()
@click.option("--teacher", required=True, help="A local model.")
@click.option("--shards", required=True, help="An extraction of it, for the compiled task and the watched tokens.")
@click.option("--comments", required=True, help="A .jsonl.gz of comments.")
@click.option("--rows", default=1024, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--contender", "names", multiple=True, type=click.Choice(list(CONTENDERS)), help="By default all.")
@click.option("--only", type=click.Choice(list(CONTENDERS)), hidden=True)
def main(teacher: str, shards: str, comments: str, rows: int, rounds: int, names: tuple[str, ...], only: str) -> None:
    """Times every contender and prints the table."""
    if only:
        print(json.dumps(measure(only, load_question(teacher, shards, comments, rows))))
        return
    arguments = [f"--teacher={teacher}", f"--shards={shards}", f"--comments={comments}", f"--rows={rows}"]
    rounds_of: dict[str, list[dict[str, float]]] = {name: [] for name in names or CONTENDERS}
    for number in range(rounds):
        for name, done in rounds_of.items():
            done.append(in_process_of_its_own(name, arguments))
            print(f"round {number + 1} {name}: {done[-1]['answers_per_second']:.1f} answers/s", file=sys.stderr)
    results = {
        name: {
            "answers_per_second": statistics.median(one["answers_per_second"] for one in done),
            "rounds": [one["answers_per_second"] for one in done],
            "model_calls": done[0]["model_calls"],
            "rows": done[0]["rows"],
        }
        for name, done in rounds_of.items()
    }
    Console(width=140).print(table_of(results))
    keep("extraction", {"results": results})


if __name__ == "__main__":
    main()
