"""Greedy decoding against a slow reference, and against the answer that is likeliest as a whole, on real test comments.

The reference reads the whole sequence anew for every token of every comment by itself, without a cache, and masks what the
automaton does not allow. The likeliest answer is found by scoring every output of the task for every comment.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.results import keep
from pipeline.base.console import progress
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import open_examples
from student.data.unpack import TEST
from student.decode.decode import Decoder
from student.model.checkpoint import load_student
from student.model.model import Student

MOST_OUTPUTS = 20_000


def reference(model: Student, compiled: CompiledTask, prefix: NDArray[np.int32]) -> list[int]:
    """The tokens of one answer, step by step."""
    automaton, full = compiled.automaton, model.shape.sequence == "full"
    read, answer, state = prefix.tolist(), list[int](), 0
    while state != automaton.end:
        allowed = torch.as_tensor(automaton.allowed[state])
        if automaton.forced[state]:
            column = int(allowed.int().argmax())
        else:
            logits = model(torch.tensor([read]))[0, -1, : len(allowed)]
            column = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        answer.append(int(automaton.tokens[column]))
        if full or not automaton.forced[state]:
            read.append(answer[-1])
        state = int(automaton.next_state[state, column])
    return answer


class Outputs:
    """Every output of a task, as ways through a tree of what a student has read when it chooses."""

    def __init__(self, compiled: CompiledTask, full: bool) -> None:
        self._automaton = automaton = compiled.automaton
        texts = [compiled.task.render(values) for values in compiled.task.answers()]
        self.answers = [[*ids, compiled.tokenizer.end_id] for ids in compiled.tokenizer.encode(texts)]
        self._nodes: dict[tuple[int, ...], int] = {}
        self._states: list[int] = []
        self._ways = [list(self._way(answer, full)) for answer in self.answers]
        self._allowed = torch.as_tensor(automaton.allowed)[self._states]

    def _way(self, answer: list[int], full: bool) -> Iterator[tuple[int, int]]:
        """The choices of an answer, as node and column."""
        read: tuple[int, ...] = ()
        for state, token in zip(self._automaton.walk(answer), answer, strict=False):
            if not self._automaton.forced[state]:
                if read not in self._nodes:
                    self._nodes[read] = len(self._nodes)
                    self._states.append(state)
                yield self._nodes[read], self._automaton.column[token]
            if full or not self._automaton.forced[state]:
                read = (*read, token)

    def scores(self, model: Student, prefix: NDArray[np.int32]) -> NDArray[np.float64]:
        """The log-probability of every output after a comment."""
        lengths = np.array([len(prefix) + len(read) for read in self._nodes])
        tokens = np.zeros((len(lengths), lengths.max()), np.int64)
        for row, read in enumerate(self._nodes):
            tokens[row, : lengths[row]] = [*prefix, *read]
        last = torch.as_tensor(np.arange(len(lengths)) * tokens.shape[1] + lengths - 1)
        logits = model(torch.from_numpy(tokens), last)[:, : self._allowed.shape[1]].double()
        table = logits.masked_fill(~self._allowed, -torch.inf).log_softmax(-1).numpy()
        return np.array([sum(table[step] for step in way) for way in self._ways])


@click.command()
@click.option("--shards", required=True, help="Folder of logit shards.")
@click.option("--student", required=True, help="Folder of a student trained on them.")
@click.option("--comments", default=1000, show_default=True, help="Test comments.")
def main(shards: str, student: str, comments: int) -> None:
    """Greedy decoding against a slow reference and against the likeliest answer."""
    model, compiled = load_student(student)
    test = open_examples(open_shards(shards), TEST, model.shape.sequence, model.shape.separator).first(comments)
    if compiled.task.outputs > MOST_OUTPUTS:
        raise click.UsageError(f"the task has {compiled.task.outputs:,} outputs, too many to score each")
    prefixes = [test.prefix(i) for i in range(len(test))]
    decoder = Decoder(model, compiled)
    greedy, outputs = decoder.constrained(prefixes).tokens, Outputs(compiled, model.shape.sequence == "full")
    counted = ("together other than the reference", "alone other than the reference", "not the likeliest")
    found = {"comments": len(test), "outputs": len(outputs.answers)} | dict.fromkeys(counted, 0)
    agree = {"greedy": 0, "likeliest": 0}
    with torch.inference_mode(), progress("scoring every output", len(test)) as (bar, task):
        for i, prefix in enumerate(prefixes):
            likeliest = outputs.answers[int(outputs.scores(model, prefix).argmax())]
            slow = reference(model, compiled, prefix)
            found["together other than the reference"] += greedy[i] != slow
            found["alone other than the reference"] += decoder.constrained([prefix]).tokens[0] != slow
            found["not the likeliest"] += greedy[i] != likeliest
            truth = test.answer(i).tolist()
            agree["greedy"] += greedy[i] == truth
            agree["likeliest"] += likeliest == truth
            bar.update(task, completed=i + 1)
    result = found | {f"{name} equals the teacher's": count for name, count in agree.items()}
    for name, count in result.items():
        Console().print(f"{count:6,}  {name}", highlight=False)
    keep("greedy", result)


if __name__ == "__main__":
    main()
