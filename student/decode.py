"""Greedy decoding with a key/value cache: under the automaton, where every answer is valid, or free.

Under the automaton the model is asked only where there is a choice: forced tokens follow from the state and are read
together with the choice before them, so an answer costs about as many model calls as it has choices. A student of choices
never reads them at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.compiled import CompiledTask
from pipeline.forced import forced_runs
from student.model import Student
from student.reach import KeyValueCache

LEFT = -1  # the state of an answer that has left the automaton


@dataclass(frozen=True)
class Decoded:
    """Answers of N comments.

    Attributes:
        tokens: each answer's ids, end token last where it was reached.
        confidence: float64 [N], product of the probabilities of the choices made, over what was allowed.
        calls: how often the model was run.
    """

    tokens: list[list[int]]
    confidence: NDArray[np.float64]
    calls: int


class Decoder:
    """Decodes many comments together.

    Args:
        model: in evaluation mode.
        compiled: the task it was trained for.
    """

    def __init__(self, model: Student, compiled: CompiledTask) -> None:
        self._model = model
        with torch.inference_mode():
            self._opening = model.read_opening()
        self._device = next(model.parameters()).device
        self._automaton = compiled.automaton
        self._end_id = compiled.tokenizer.end_id
        self._watched = compiled.watched.tokens.astype(np.int64)
        self._runs = forced_runs(compiled.automaton)
        self._choices_only = model.shape.sequence == "choices"
        table, extra = compiled.automaton.next_state, len(self._watched) - len(compiled.automaton.tokens)
        self._targets_SW = np.pad(table, [(0, 0), (0, extra)], constant_values=LEFT)
        self._allowed_SW = torch.as_tensor(self._targets_SW != LEFT, device=self._device)

    def constrained(self, prefixes: list[NDArray[np.int32]]) -> Decoded:
        """The likeliest allowed token at every choice.

        Args:
            prefixes: token ids of each comment and the separator.
        """
        return self._walk(prefixes, masked=True)

    @torch.inference_mode()
    def _walk(self, prefixes: list[NDArray[np.int32]], masked: bool) -> Decoded:
        """Follows the automaton; an answer that leaves it, where nothing is masked, breaks off."""
        runs, end = self._runs, self._automaton.end
        rows = np.arange(len(prefixes))
        states = np.full(len(prefixes), runs.after[0])
        opening = runs.tokens[0, : runs.lengths[0]]
        answers = [opening.tolist() for _ in prefixes]
        chunks = [np.concatenate([prefix, opening[:0] if self._choices_only else opening]) for prefix in prefixes]
        confidence, calls = np.ones(len(prefixes)), 0
        cache = self._cache(prefixes, chunk=1 + runs.tokens.shape[1])
        while (active := (states != end) & (states != LEFT)).any():
            logits = self._read([chunks[row] if active[row] else chunks[row][:0] for row in rows], cache)
            chosen, probability = self._choose(logits, states, masked)
            targets = self._targets_SW[states, chosen]
            calls += 1
            for row in rows[active]:
                token, target = self._watched[chosen[row]], targets[row]
                run = np.concatenate([[token], runs.tokens[target, : runs.lengths[target]]]) if target != LEFT else [token]
                chunks[row] = np.array(run[:1] if self._choices_only else run)
                answers[row] += [int(token) for token in run]
                states[row] = runs.after[target] if target != LEFT else LEFT
                confidence[row] *= probability[row]
        return Decoded(answers, confidence, calls)

    def _choose(
        self, logits_BC: torch.Tensor, states: NDArray[np.int64], masked: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The likeliest column of each row, among those allowed where masked, and its probability among the same."""
        logits_BW = logits_BC[:, : len(self._watched)].float()
        if masked:
            allowed_BW = self._allowed_SW[torch.as_tensor(states, device=self._device)]
            logits_BW = logits_BW.masked_fill(~allowed_BW, -torch.inf)
        best = logits_BW.softmax(-1).max(-1)
        return best.indices.cpu().numpy(), best.values.double().cpu().numpy()

    def free(self, prefixes: list[NDArray[np.int32]]) -> Decoded:
        """The likeliest watched token wherever the student is asked, allowed or not: what it has learned of the format.

        A student of whole answers is asked at every step, until the end token or the length of the longest answer; one of
        choices where the automaton has a choice, until it leaves the automaton.
        """
        return self._walk(prefixes, masked=False) if self._choices_only else self._every_step(prefixes)

    @torch.inference_mode()
    def _every_step(self, prefixes: list[NDArray[np.int32]]) -> Decoded:
        answers: list[list[int]] = [[] for _ in prefixes]
        confidence, calls = np.ones(len(prefixes)), 0
        cache = self._cache(prefixes, chunk=1)
        chunks = [prefix.astype(np.int64) for prefix in prefixes]
        going = np.ones(len(prefixes), bool)
        while going.any() and calls < self._automaton.longest:
            best = self._read([chunk[: len(chunk) * go] for chunk, go in zip(chunks, going, strict=True)], cache)
            top = best[:, : len(self._watched)].float().softmax(-1).max(-1)
            tokens, probability = self._watched[top.indices.cpu().numpy()], top.values.double().cpu().numpy()
            calls += 1
            for row in np.flatnonzero(going):
                answers[row].append(int(tokens[row]))
                chunks[row] = tokens[row : row + 1]
                confidence[row] *= probability[row]
            going &= tokens != self._end_id
        return Decoded(answers, confidence, calls)

    def _cache(self, prefixes: list[NDArray[np.int32]], chunk: int) -> KeyValueCache:
        slots = max(map(len, prefixes)) + self._automaton.longest + chunk
        return KeyValueCache(self._model.shape, len(prefixes), slots, like=self._model.head.weight, opening=self._opening)

    def _read(self, chunks: list[NDArray[np.int64]], cache: KeyValueCache) -> torch.Tensor:
        lengths = np.array([len(chunk) for chunk in chunks])
        tokens = np.zeros((len(chunks), lengths.max()), np.int64)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk)] = chunk
        return self._model.read(torch.from_numpy(tokens).to(self._device), torch.from_numpy(lengths).to(self._device), cache)
