"""Answers of the thesis' sizes: a teacher of Gemma 3 4B's shape in bf16 under vLLM against the student of 202 M parameters.

Weights are random, as time does not depend on them. The teacher reads prompts of 100 tokens, whose first 72 are alike and so
mostly in its prefix cache, and writes 40. The student reads 25 tokens and follows the automaton of the shards' task, with the
thesis' 310 watched tokens. Each contender runs in a process of its own with all cores; the median of the rounds counts.

`--starts` measures something else: how long a student with the whole embedding of 262,208 tokens takes from its file to its
first answer, read as bytes or memory-mapped, with the file in the page cache or not.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.inference import in_process_of_its_own, seconds_of, take_turns
from benchmarks.results import keep
from pipeline.task.compiled import CompiledTask
from pipeline.task.vocabulary import WatchedSet
from student.config import THESIS
from student.decode.decode import Decoder
from student.model.checkpoint import assembled, load_shape, save_student
from student.model.model import Student
from student.model.shape import Shape

VOCABULARY, WATCHED, READ = 262_208, 310, 25  # of the student; READ tokens of comment and separator
PROMPT, ALIKE, WRITTEN = 100, 72, 40  # of the teacher
THESIS_RATIO = 7.4  # times the teacher's answers a second

GEMMA_3_4B = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 8192,
}

Run = Callable[[int], Any]  # answers so many comments


def task_of(shards: str) -> CompiledTask:
    """The shards' task with as many watched tokens as the thesis had."""
    compiled = CompiledTask.load(shards)
    watched = compiled.watched
    return replace(compiled, watched=WatchedSet(watched.tokens[:WATCHED], watched.required))


def thesis_student(compiled: CompiledTask, sequence: str) -> Student:
    """With random weights, and a row of the embedding for every token."""
    config = THESIS.model_copy(update={"sequence": sequence})
    shape = Shape(VOCABULARY, VOCABULARY, compiled.watched.size, compiled.context, **config.sizes())
    return Student(shape, np.arange(VOCABULARY, dtype=np.int32)).eval()


def student(shards: str, sequence: str, change: Callable[[Student], Student] = lambda model: model) -> Run:
    """Our decoder, from token ids to the answers'."""
    compiled, random = task_of(shards), np.random.default_rng(0)
    decoder = Decoder(change(thesis_student(compiled, sequence)), compiled)
    return lambda count: decoder.constrained(list(random.integers(0, VOCABULARY, (count, READ), np.int32)))


def teacher(_shards: str) -> Run:
    """vLLM; dummy weights."""
    from transformers import Gemma3TextConfig
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Gemma3TextConfig(architectures=["Gemma3ForCausalLM"], dtype="bfloat16", **GEMMA_3_4B).save_pretrained(folder)
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=PROMPT + WRITTEN,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            block_size=32,
            enable_prefix_caching=True,
            enforce_eager=True,
        )
    asked = SamplingParams(temperature=0, max_tokens=WRITTEN, ignore_eos=True, detokenize=False)
    random = np.random.default_rng(0)
    alike = random.integers(100, VOCABULARY, ALIKE)

    def run(count: int) -> None:
        own = random.integers(100, VOCABULARY, (count, PROMPT - ALIKE))
        llm.generate([{"prompt_token_ids": [*alike.tolist(), *ids]} for ids in own.tolist()], asked, use_tqdm=False)

    return run


STARTS: dict[str, tuple[str, Callable[[str], Run]]] = {
    "teacher": ("teacher, 4 B in bf16, vLLM", teacher),
    "choices": ("student, choices, float32", lambda shards: student(shards, "choices")),
    "full": ("student, full, float32", lambda shards: student(shards, "full")),
    "choices-bf16": ("student, choices, bf16", lambda shards: student(shards, "choices", Student.halved)),
    "full-bf16": ("student, full, bf16", lambda shards: student(shards, "full", Student.halved)),
}


def measure(name: str, shards: str, rows: int, singles: int) -> dict[str, float]:
    """One round of one contender, in this process."""
    run = STARTS[name][1](shards)
    run(1)
    milliseconds = [1000 * seconds_of(lambda: run(1)) for _ in range(singles)]
    seconds = seconds_of(lambda: run(rows))
    return {"rate": rows / seconds, "p50_ms": statistics.median(milliseconds), "rows": rows, "peak_gib": peak_gib()}


def peak_gib() -> float:
    """The most memory this process has held, mapped files included; `ru_maxrss` would count what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    """The medians, against the teacher's."""
    table = Table("", "at once", "answers/s", "× teacher", "× thesis' ratio", "p50 ms", "× teacher", "peak GiB", box=None)
    base = results.get("teacher")
    for name, row in results.items():
        rate, wait = (row["rate"] / base["rate"], base["p50_ms"] / row["p50_ms"]) if base else (float("nan"),) * 2
        batch = (f"{row['rows']:.0f}", f"{row['rate']:.3g}", f"{rate:.1f}", f"{rate / THESIS_RATIO:.1f}")
        table.add_row(STARTS[name][0], *batch, f"{row['p50_ms']:,.0f}", f"{wait:.1f}", f"{row['peak_gib']:.1f}")
    return table


def read_as_bytes(path: str) -> dict[str, torch.Tensor]:
    """The whole file, then tensors within it."""
    from safetensors.torch import load

    return load(Path(path).read_bytes())


def read_mapped(path: str) -> dict[str, torch.Tensor]:
    """Tensors whose pages are read when they are touched."""
    from safetensors.torch import load_file

    return load_file(path)


def read_but_embedding(path: str) -> dict[str, torch.Tensor]:
    """The embedding mapped, all else read front to back."""
    tensors = read_mapped(path)
    return {name: tensor if name.startswith("embedding") else tensor.clone() for name, tensor in tensors.items()}


READERS = {"bytes": read_as_bytes, "mapped": read_mapped, "embedding mapped": read_but_embedding}


def start_of(name: str, folder: str) -> dict[str, float]:
    """From the file to the first answer, in this process; `name` is a reader, and whether the page cache is empty."""
    reader, _, cache = name.rpartition(", ")
    path = f"{folder}/model.safetensors"
    if cache == "cold":
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    compiled = CompiledTask.load(folder)
    model = assembled(load_shape(folder), READERS[reader](path))
    loaded = time.perf_counter()
    Decoder(model, compiled).constrained([np.arange(1000, 1000 + READ, dtype=np.int32)])
    ended = time.perf_counter()
    return {"load_s": loaded - started, "answer_s": ended - loaded, "start_s": ended - started, "peak_gib": peak_gib()}


def starts(shards: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Every reader, warm and cold, on a file made for it."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = task_of(shards)
        save_student(folder, thesis_student(compiled, "choices"), compiled)
        os.sync()
        names = [f"{reader}, {cache}" for cache in ("warm", "cold") for reader in READERS]
        arguments = [f"--shards={shards}", f"--folder={folder}"]
        results = take_turns(names, rounds, lambda name: in_process_of_its_own(__file__, name, arguments, limit=300))
    table = Table("file", "load s", "first answer s", "together s", "peak GiB", box=None)
    for name, row in results.items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("load_s", "answer_s", "start_s", "peak_gib")))
    Console(width=100).print(table)
    return results


@click.command(help=__doc__)
@click.option("--shards", required=True, metavar="DIR", help="An extraction, for its task.")
@click.option("--rows", default=64, show_default=True, help="Comments at once.")
@click.option("--singles", default=5, show_default=True, help="Comments one after another.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--threads", type=int, help="Of each contender; by default one for each core.")
@click.option("--contender", "names", multiple=True, type=click.Choice(list(STARTS)), help="By default all.")
@click.option("--starts", "only_starts", is_flag=True, help="Measure how a student starts instead.")
@click.option("--only", hidden=True)
@click.option("--folder", hidden=True)
def main(
    shards: str,
    rows: int,
    singles: int,
    rounds: int,
    threads: int | None,
    names: tuple[str, ...],
    only_starts: bool,
    only: str | None,
    folder: str | None,
) -> None:
    """Times every contender and prints the table."""
    if only:
        print(json.dumps(start_of(only, folder) if folder else measure(only, shards, rows, singles)))
        return
    if only_starts:
        keep("inference_starts", {"starts": starts(shards, rounds)})
        return
    arguments = [f"--shards={shards}", f"--rows={rows}", f"--singles={singles}"]
    chosen = list(names or STARTS)
    results = take_turns(chosen, rounds, lambda name: in_process_of_its_own(__file__, name, arguments, 1800, threads))
    Console(width=128).print(table_of(results))
    print(f"the thesis says {THESIS_RATIO} times the teacher's answers a second", file=sys.stderr)
    keep("inference_true_size", {"threads": threads or os.cpu_count(), "thesis": THESIS_RATIO, "results": results})


if __name__ == "__main__":
    main()
