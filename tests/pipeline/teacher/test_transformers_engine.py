"""The plain engine's choices; tests/integration/test_engines.py holds it and vLLM against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.task.compilation import compile_automaton
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.teacher.engines import Job, Request
from pipeline.teacher.transformers_engine import _Chooser, _give_float32_head
from tests.tiny import save_teacher, tiny_task, tiny_tokenizer

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0])


def chosen(requests: list[Request], temperature: float, steps: int = 1) -> list[list[int]]:
    """Tokens of each request, the same logits at every step."""
    tokenizer = TeacherTokenizer(tiny_tokenizer())
    job = Job(compile_automaton(tiny_task(), tokenizer), tokenizer.end_id, 60, watched=None, temperature=temperature)
    choose = _Chooser(requests, job, torch.device("cpu"))
    return torch.stack([choose(LOGITS.repeat(len(requests), 1), step) for step in range(steps)], 1).tolist()


def test_a_seed_repeats_its_draws_in_any_company_and_seeds_differ() -> None:
    first = chosen([Request([5], seed=seed) for seed in range(4)], temperature=1.0, steps=20)
    assert len(set(map(tuple, first))) == 4
    again = chosen([Request([5], seed=seed) for seed in (2, 7, 0)], temperature=1.0, steps=20)
    assert (again[0], again[2]) == (first[2], first[0])


def test_seeds_spread_as_the_temperature_says() -> None:
    drawn = chosen([Request([5], seed=seed) for seed in range(1000)], temperature=2.0)
    shares = np.bincount(np.ravel(drawn), minlength=4) / 1000
    np.testing.assert_allclose(shares, (LOGITS / 2).softmax(0), atol=0.06)


def test_without_a_temperature_the_likeliest_is_taken_and_what_is_given_in_any_case() -> None:
    assert chosen([Request([5], seed=1), Request([5], answer=[1, 0])], temperature=0.0, steps=3) == [[3, 3, 3], [1, 0, 3]]
    assert chosen([Request([5], answer=[1, 0], seed=1)], temperature=1.0, steps=2) == [[1, 0]]


@torch.inference_mode()
def test_logits_are_float32_products_of_a_bfloat16_teacher(tmp_path: Path) -> None:
    save_teacher(tmp_path, seed=0)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    _give_float32_head(model)
    ids, table = torch.tensor([[5, 6, 7]]), model.get_input_embeddings().weight
    found, states = model(input_ids=ids).logits, model.model(input_ids=ids).last_hidden_state
    assert (found.dtype, states.dtype, table.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(found, states.float() @ table.float().T)
