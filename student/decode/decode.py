"""Greedy decoding with a key/value cache: under the automaton, where every answer is valid, or free.

Under the automaton the model is asked only where there is a choice: one call for the comment, then one short call for each
further choice of the comments that still have one. Forced tokens follow from the state: a student of whole answers reads
them together with the choice before them, a student of choices never does.

At each choice the likeliest token is taken. The answer that is likeliest as a whole may be another one: docs/serving.md
says how often it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.task.compiled import CompiledTask
from student.decode.choices import LEFT, NONE, Choices, Chunks, padded
from student.decode.fields import Fields
from student.decode.value_probabilities import ValueProbabilities, ValueProbabilityWalk
from student.model.cache import KeyValueCache
from student.model.model import Student, Text
from student.model.reader import side_by_side

Prefixes = list[NDArray[np.int32]]  # token ids of each comment and the separator, or a reader's ids of each text


@dataclass(frozen=True)
class Decoded:
    """Answers of N comments.

    Attributes:
        tokens: each answer's ids, end token last where it was reached; equal answers may be one and the same list.
        by_field: float64 [N, F], product of the probabilities of the choices made for each field, over what was allowed; for
            a student of whole answers that is asked at every step, all of them are one field.
        calls: how often the model was run.
        value_probabilities: of the values of each field, where they were asked for.
    """

    tokens: list[list[int]]
    by_field: NDArray[np.float64]
    calls: int
    value_probabilities: ValueProbabilities | None = None

    @property
    def confidence(self) -> NDArray[np.float64]:
        """In whole answers: [N]."""
        return self.by_field.prod(1)


class Decoder:
    """Decodes many comments together.

    Args:
        model: in evaluation mode.
        temperatures: what the logits of each field's choices are divided by, for probabilities and confidence; 1 by default.
    """

    def __init__(self, model: Student, compiled: CompiledTask, temperatures: dict[str, float] | None = None) -> None:
        self._model = model
        with torch.inference_mode():
            self._opening = model.read_opening()
        self._device = next(model.parameters()).device
        self._end_id, self._longest = compiled.tokenizer.end_id, compiled.automaton.longest
        self._choices_only = model.shape.sequence == "choices"
        self._choices = Choices(compiled, forced_read=not self._choices_only)
        self._fields, self._task = Fields(compiled, self._choices), compiled.task
        self._allowed_SR = torch.as_tensor(compiled.automaton.allowed, device=self._device)
        self._temperature_S = torch.as_tensor(self._fields.temperatures(temperatures), device=self._device)

    def constrained(self, prefixes: Prefixes, value_probabilities: bool = False) -> Decoded:
        """The likeliest allowed token at every choice.

        Args:
            value_probabilities: whether to tell the share of every value of every field too.
        """
        return self._walk(prefixes, masked=True, value_probabilities=value_probabilities)

    def free(self, prefixes: Prefixes) -> Decoded:
        """The likeliest watched token wherever the student is asked, allowed or not: what it has learned of the format.

        A student of whole answers is asked at every step, until the end token or the length of the longest answer; one of
        choices where the automaton has a choice, until it leaves the automaton.
        """
        return self._walk(prefixes, masked=False) if self._choices_only else self._every_step(prefixes)

    @torch.inference_mode()
    def _walk(self, prefixes: Prefixes, masked: bool, value_probabilities: bool = False) -> Decoded:
        """Follows the automaton; an answer that leaves it, where nothing is masked, breaks off."""
        choices, calls = self._choices, 0
        trails = np.full((len(prefixes), choices.most), NONE, np.int32)
        by_field, rows = np.ones((len(prefixes), len(self._task.fields))), np.arange(len(prefixes))
        states = np.full(len(prefixes), choices.first)
        walk = None
        if value_probabilities:
            walk = ValueProbabilityWalk(self._task, self._fields, choices, len(prefixes), self._ask)
        chunks, text = self._first(prefixes, choices.opening)
        cache = self._cache(chunks)
        for step in range(choices.most):
            probability_BW = self._probability(self._read(chunks, cache, text), states if masked else None)
            text = None
            if walk:
                walk.note(rows, states, probability_BW.double().cpu().numpy(), cache)
            chosen, columns = (found.cpu().numpy() for found in probability_BW.max(-1))
            trails[rows, step] = columns
            by_field[rows, self._fields.by_state[states]] *= chosen
            calls += 1
            targets = choices.targets(states, columns)
            states = choices.after(targets)
            going = np.flatnonzero((states != choices.end) & (states != LEFT))
            if not len(going):
                break
            if len(going) < len(rows):
                rows, states, columns, targets = rows[going], states[going], columns[going], targets[going]
                cache = cache.select(going)
            chunks = choices.chunks(columns, targets)
        calls += walk.calls if walk else 0
        answers = [choices.spell(trail) for trail in trails]
        return Decoded(answers, by_field, calls, walk.settle(answers) if walk else None)

    def _probability(self, logits_BC: torch.Tensor, states: NDArray[np.int64] | None) -> torch.Tensor:
        """Of every watched token; with states, of the required ones that they allow: float32 [B, W or R]."""
        if states is None:
            return logits_BC[:, : len(self._choices.watched)].float().softmax(-1)
        at = torch.as_tensor(states, device=self._device)
        logits_BR = logits_BC[:, : self._allowed_SR.shape[1]].float() / self._temperature_S[at, None]
        return logits_BR.masked_fill(~self._allowed_SR[at], -torch.inf).softmax(-1)

    def _ask(self, chunks: Chunks, cache: KeyValueCache, states: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._probability(self._read(chunks, cache), states).double().cpu().numpy()

    @torch.inference_mode()
    def _every_step(self, prefixes: Prefixes) -> Decoded:
        answers: list[list[int]] = [[] for _ in prefixes]
        confidence, calls, rows = np.ones((len(prefixes), 1)), 0, np.arange(len(prefixes))
        chunks, text = self._first(prefixes, self._choices.opening[:0])
        cache = self._cache(chunks)
        while len(rows) and calls < self._longest:
            probability_BW = self._probability(self._read(chunks, cache, text), None)
            text = None
            chosen, columns = (found.cpu().numpy() for found in probability_BW.max(-1))
            tokens = self._choices.watched[columns]
            for row, token in zip(rows, tokens.tolist(), strict=True):
                answers[row].append(token)
            confidence[rows, 0] *= chosen
            calls += 1
            going = np.flatnonzero(tokens != self._end_id)
            rows, chunks = rows[going], (tokens[going, None], np.ones(len(going), np.int64))
            cache = cache.select(going) if len(going) < len(tokens) else cache
        return Decoded(answers, confidence, calls)

    def _first(self, prefixes: Prefixes, opening: NDArray[np.int64]) -> tuple[Chunks, Text | None]:
        """What is read before the first choice: tokens, or places for a reader's vectors and its ids of the texts."""
        reader = self._model.shape.reader
        if reader is None:
            return padded([np.concatenate([prefix, opening]) for prefix in prefixes]), None
        places = [1 if reader.pools else len(prefix) for prefix in prefixes]
        ids, lengths = side_by_side(prefixes)
        chunks = padded([np.concatenate([np.zeros(count, np.int64), opening]) for count in places])
        return chunks, (ids.to(self._device), lengths.to(self._device))

    def _cache(self, chunks: Chunks) -> KeyValueCache:
        answer = self._choices.most if self._choices_only else self._longest
        slots = chunks[0].shape[1] + 2 * answer  # a chunk is padded to one of another length, of an answer at most
        return self._model.cache(len(chunks[0]), slots, self._opening)

    def _read(self, chunks: Chunks, cache: KeyValueCache, text: Text | None = None) -> torch.Tensor:
        tokens, lengths = (torch.from_numpy(part).to(self._device) for part in chunks)
        return self._model.read(tokens, lengths, cache, text)
