"""The contenders of `benchmarks.inference`: each goes from comments' texts to the values of their answers."""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.comments.reading import Comment, filter_rows, text_row
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Values

BATCH_SIZES = (32, 64, 128, 256)  # that `generate` is tried with

Run = Callable[[list[str]], list[Values | None]]


@dataclass(frozen=True)
class Question:
    """What every contender is asked.

    Attributes:
        student: its folder.
        teacher: a local model.
        export: a folder with ONNX files; None without.
        compiled: the task.
        texts: comments of the test split, those to warm up with first.
        truth: the teacher's stored answers to them.
    """

    student: str
    teacher: str
    export: str | None
    compiled: CompiledTask
    texts: list[str]
    truth: list[Values]

    def lengths(self, answers: list[Values]) -> list[int]:
        """Tokens of answers' texts, end token included."""
        texts = self.compiled.tokenizer.encode([self.compiled.task.render(values) for values in answers])
        return [len(ids) + 1 for ids in texts]

    def rows(self, texts: list[str]) -> list[Comment]:
        """Comments as the task's filters leave them, with their tokens."""
        rows = [text_row(i, text) for i, text in enumerate(texts)]
        return filter_rows(rows, self.compiled.task.comments, self.compiled.tokenizer)

    def parse(self, tokens: list[int]) -> Values | None:
        """What an answer's tokens say; None where they do not fit the task."""
        return self.compiled.task.parse(self.compiled.tokenizer.decode(tokens))


def ours(question: Question, value_probabilities: bool = False, weights: str = "float32") -> Run:
    """The student as `retort predict` runs it."""
    from student.decode.answerer import Answerer

    answerer = Answerer.load(question.student, weights)
    return lambda texts: [tuple(found.values.values()) for found in answerer.answer(question.rows(texts), value_probabilities)]


def onnx(question: Question, file: str) -> Run:
    """An exported graph under ONNX Runtime, batches made as ours are."""
    import onnxruntime

    from student.decode.answerer import BATCH
    from student.decode.choices import padded
    from student.model.checkpoint import load_student

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(f"{question.export}/{file}", options, providers=["CPUExecutionProvider"])
    listed = json.loads(Path(f"{question.export}/answers.json").read_text("utf-8"))
    numbered = [tuple(answer.values()) for answer in listed]
    model, _ = load_student(question.student)
    separator = model.shape.separator or question.compiled.separator

    def run(texts: list[str]) -> list[Values | None]:
        rows = question.rows(texts)
        if model.reader is None:
            prefixes = [np.array([*row.tokens, *separator], np.int32) for row in rows]
        else:
            prefixes = model.reader.encode([row.text for row in rows])
        order, answers = sorted(range(len(texts)), key=lambda i: len(prefixes[i])), {}
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            tokens, lengths = padded([prefixes[i] for i in part])
            *_, numbers = session.run(None, {"tokens": tokens, "lengths": lengths})
            answers |= zip(part, (numbered[number] for number in numbers.tolist()), strict=True)
        return [answers[i] for i in range(len(texts))]

    return run


class Generate:
    """`generate` of `transformers`, batches of like length, what all prompts begin with computed once.

    Args:
        model: of `transformers`.
        prompts: some, to find their common beginning and the size of batches with the most answers a second.
        each: is given what `generate` returns for a batch.
        options: of `generate`.
    """

    def __init__(self, model: Any, prompts: list[list[int]], each: Callable[[Any], None] | None = None, **options: Any) -> None:
        import torch
        from transformers import DynamicCache

        self._model, self._each, self._options = model, each, {"do_sample": False, "pad_token_id": 0} | options
        first, last = min(prompts), max(prompts)
        self._prefix = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))][:-1]
        self._cache = DynamicCache(config=model.config)
        if self._prefix:
            with torch.inference_mode():
                model(torch.tensor([self._prefix]), past_key_values=self._cache)
        rates = {size: self._rate(prompts[:size], size) for size in BATCH_SIZES}
        self._size = max(rates, key=rates.__getitem__)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        """What the model writes after each prompt."""
        return self._written(prompts, self._size)

    def _rate(self, prompts: list[list[int]], size: int) -> float:
        started = time.perf_counter()
        self._written(prompts, size)
        return size / (time.perf_counter() - started)

    def _written(self, prompts: list[list[int]], size: int) -> list[list[int]]:
        order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            answers |= zip(part, self._batch([prompts[i] for i in part]), strict=True)
        return [answers[i] for i in range(len(prompts))]

    def _batch(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        shared, longest = len(self._prefix), max(map(len, prompts))
        gaps = [longest - len(row) for row in prompts]  # between what is shared and the rest
        ids = [self._prefix + [0] * gap + row[shared:] for gap, row in zip(gaps, prompts, strict=True)]
        mask = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
        cache = copy.deepcopy(self._cache)
        if shared:
            cache.batch_repeat_interleave(len(prompts))
        with torch.inference_mode():
            written = self._model.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), past_key_values=cache, **self._options
            )
        if self._each:
            self._each(written)
        tokens = written if isinstance(written, torch.Tensor) else written.sequences
        return tokens[:, longest:].tolist()


def llama_config(shape: Any, vocabulary: int, context: int, **others: Any) -> Any:
    """A Llama with a student's sizes. Its feed-forward is gated, so two thirds as wide: both have equally many parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=2 * shape.mlp // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        head_dim=shape.per_head,
        max_position_embeddings=context,
        **others,
    )


def same_size(question: Question) -> Run:
    """A Llama with the student's sizes, random weights and the teacher's vocabulary, that writes all tokens of an answer.

    Its feed-forward is gated, and two thirds as wide as the student's, so that both have equally many parameters; its input
    and output tables are one.
    """
    from transformers import LlamaForCausalLM

    from student.model.checkpoint import load_shape

    shape = load_shape(question.student)
    config = llama_config(shape, shape.input_vocabulary, 512, num_key_value_heads=shape.groups, tie_word_embeddings=True)
    model, separator = LlamaForCausalLM(config).eval(), list(shape.separator or question.compiled.separator)
    length = round(statistics.mean(question.lengths(question.truth)))

    def prompts(texts: list[str]) -> list[list[int]]:
        return [row.tokens + separator for row in question.rows(texts)]

    answer = Generate(model, prompts(question.texts), min_new_tokens=length, max_new_tokens=length, eos_token_id=None)
    return lambda texts: [None for _ in answer(prompts(texts))]


def teacher_prompts(question: Question) -> Callable[[list[str]], list[list[int]]]:
    """Makes the teacher's prompts of comments."""
    from pipeline.task.tokenization import load_teacher_tokenizer

    tokenizer = load_teacher_tokenizer(question.teacher)
    prompt = tokenizer.prompt(question.compiled.task)
    return lambda texts: prompt.ids(texts, tokenizer)


def transformers(question: Question) -> Run:
    """The teacher under `generate`."""
    from transformers import AutoModelForCausalLM

    compiled, prompts = question.compiled, teacher_prompts(question)
    model: Any = AutoModelForCausalLM.from_pretrained(question.teacher, dtype="auto").eval()

    asked = {"max_new_tokens": compiled.automaton.longest, "eos_token_id": compiled.tokenizer.end_id}
    answer = Generate(model, prompts(question.texts), **asked)
    return lambda texts: [question.parse(tokens) for tokens in answer(prompts(texts))]


def vllm(question: Question, held: bool = False, **options: Any) -> Run:
    """The teacher under vLLM, with the options that were best for it on CPU; `held` to the answers by their JSON schema."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    compiled, prompts = question.compiled, teacher_prompts(question)
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "block_size": 32, "enable_prefix_caching": True}
    longest = max(map(len, prompts(question.texts))) + compiled.automaton.longest
    settings |= {"max_model_len": longest, "generation_config": "vllm", "skip_tokenizer_init": not held}
    llm = LLM(model=question.teacher, **(settings | options))
    fields = compiled.task.fields
    schema = {
        "type": "object",
        "properties": {name: {"enum": values} for name, values in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }
    asked = SamplingParams(
        temperature=0,
        max_tokens=compiled.automaton.longest,
        stop_token_ids=[compiled.tokenizer.end_id],
        detokenize=False,
        structured_outputs=StructuredOutputsParams(json=schema) if held else None,
    )

    def run(texts: list[str]) -> list[Values | None]:
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts(texts)], asked, use_tqdm=False)
        return [question.parse(list(each.outputs[0].token_ids)) for each in found]

    return run


def jumping(question: Question) -> Run:
    """The teacher under Retort's own engine: vLLM that reads forced tokens without a step for each."""
    from pipeline.config import TeacherConfig
    from pipeline.teacher.engines import Job, Request
    from pipeline.teacher.vllm_engine import VllmTeacher

    compiled, prompts = question.compiled, teacher_prompts(question)
    longest = max(map(len, prompts(question.texts)))
    job = Job(compiled.automaton, compiled.tokenizer.end_id, longest, compiled.watched.tokens, "choices")
    teacher = VllmTeacher(question.teacher, TeacherConfig(compile=True), job)

    def run(texts: list[str]) -> list[Values | None]:
        captured = teacher.record([Request(ids) for ids in prompts(texts)])
        both = zip(captured.tokens.tolist(), captured.lengths.tolist(), strict=True)
        return [question.parse(tokens[:length]) for tokens, length in both]

    return run


@dataclass(frozen=True)
class Contender:
    """A way to answer.

    Attributes:
        label: for the table.
        start: opens it and returns what answers comments.
        rows: comments it gets at once, at most.
        singles: comments it gets one after another, at most.
    """

    label: str
    start: Callable[[Question], Run]
    rows: int | None = None
    singles: int | None = None


CONTENDERS = {
    "ours": Contender("student, ours", ours),
    "probabilities": Contender("student, ours, with probabilities", lambda q: ours(q, value_probabilities=True)),
    "bf16": Contender("student, ours, bf16", lambda q: ours(q, weights="bf16")),
    "onnx": Contender("student, ONNX Runtime", lambda q: onnx(q, "student.onnx")),
    "onnx-int8": Contender("student, ONNX Runtime, int8", lambda q: onnx(q, "student.int8.onnx")),
    "same-size": Contender("transformers generate, student's size", same_size, rows=1024, singles=100),
    "vllm": Contender("teacher, vLLM", vllm, rows=1024, singles=200),
    "structured": Contender("teacher, vLLM, structured outputs", lambda q: vllm(q, held=True), rows=1024, singles=200),
    "jumping": Contender("teacher, our engine on vLLM", jumping, rows=1024, singles=200),
    "transformers": Contender("teacher, transformers generate", transformers, rows=256, singles=60),
}
