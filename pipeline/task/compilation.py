"""A task and a tokenizer to the output automaton.

A language of at most `ENUMERATED` outputs is built from the tokens of every whole answer, which is exact by construction.
A larger one is composed field by field, and a list label by label. That is exact for BPE tokenizers: a sequence of tokens is
the BPE encoding of its text if and only if each neighbouring pair of tokens is the encoding of theirs (Berglund and van der
Merwe, "Formalizing BPE tokenization", 2023). So the answers are cut at places in the constant text where a token ends whatever
the two values around it are; inside a piece and across a cut, all neighbours have then been seen in a real encoding.
A sample of whole answers is checked at the end, since a tokenizer's pre-tokenizer could look further than that.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.base.errors import UserError
from pipeline.task.automaton import ADVICE, CHECKED_SAMPLE, Automaton, Piece, Tokens, build, refused
from pipeline.task.lists import Begun, ListRule
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.values import dumps

ENUMERATED = 100_000
COMPILED_CHARACTERS = 30_000_000  # of the answers that are tokenized to compile a task; a minute's work

MAX_BEGINNINGS = 20_000  # of one list
JOINTS = 4096  # tokenized at once


def compile_automaton(task: Task, tokenizer: TextTokenizer) -> Automaton:
    """Compiles a task against a tokenizer.

    Raises:
        UserError: the language is too large to enumerate and cannot be composed exactly, or an answer cannot be written
            in this tokenizer; the message says what to change.
    """
    check_writable(task, tokenizer)
    if task.outputs <= ENUMERATED and task.outputs * task.longest <= COMPILED_CHARACTERS:
        return build([enumerate_answers(task, tokenizer)])
    automaton = build(compose_answers(task, tokenizer))
    check_sample(automaton, task, tokenizer)
    return automaton


def check_writable(task: Task, tokenizer: TextTokenizer) -> None:
    """Refuses constant texts and values that the tokenizer cannot give back as they are.

    Raises:
        UserError: naming the text.
    """
    marks = [mark for name in task.lists for mark in task.list_marks(name)]
    texts = task.literals() + marks + [text for values in task.value_texts() for text in values]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        if tokenizer.decode(ids).strip() != text.strip():
            raise UserError(f"the teacher's tokenizer cannot write {text!r}: it comes back as {tokenizer.decode(ids)!r}")
        named = [token for token in tokenizer.special_tokens.values() if token in text]
        if named:
            raise UserError(f"the task writes {text!r}, which holds the text of the control token {named[0]!r}")


def check_sample(automaton: Automaton, task: Task, tokenizer: TextTokenizer) -> None:
    """Walks a sample of whole answers, each field's values all among them.

    Raises:
        UserError: an answer's own tokens are not a path of the automaton.
    """
    rng = random.Random(0)
    for answer in refused(automaton, task, tokenizer, [task.draw(rng) for _ in range(CHECKED_SAMPLE)]):
        raise UserError(f"the tokens of {task.render(answer)!r} reach across fields in this tokenizer: {ADVICE}")


def enumerate_answers(task: Task, tokenizer: TextTokenizer) -> Piece:
    """The tokens of every answer, end token last."""
    texts = [task.render(values) for values in task.answers()]
    return {((*ids, tokenizer.end_id), 1) for ids in tokenizer.encode(texts)}


def compose_answers(task: Task, tokenizer: TextTokenizer) -> list[Piece]:
    """The answers in pieces: one a field, or several where it is a list.

    Raises:
        UserError: the tokens cannot be cut between two fields or labels.
    """
    if not tokenizer.is_bpe:
        raise UserError(f"the task allows {task.outputs:,} answers, and this tokenizer (not BPE) has to see each: {ADVICE}")
    composition = _Composition(task, tokenizer)
    if (characters := sum(map(len, composition.forms)) * task.longest) > COMPILED_CHARACTERS:
        raise UserError(
            f"the fields have {sum(map(len, task.fields.values())):,} values to look at, each in an answer of up to "
            f"{task.longest:,} characters, {characters:,} in all, and at most {COMPILED_CHARACTERS:,} characters are handled: "
            f"{ADVICE}"
        )
    pieces: list[Piece] = []
    for field in range(len(composition.forms)):
        pieces += composition.pieces(field, len(pieces))
    return pieces


@dataclass(frozen=True)
class _View:
    """An answer's tokens: where each starts, in characters, its id, and where the constant text behind each field starts.

    Some fields alone may stand for all: what tokens meet at a place hangs on what is near.
    """

    starts: list[int]
    ids: list[int]
    after: dict[int, int]

    def around(self, place: int) -> Tokens:
        """The tokens before and behind a place; none where no token starts there."""
        return tuple(self.ids[self.starts.index(place) - 1 :][:2]) if place in self.starts else ()

    def between(self, start: int, end: int | None) -> Tokens:
        """The tokens from one place on up to another, or all."""
        return tuple(self.ids[self.starts.index(start) : None if end is None else self.starts.index(end)])


@dataclass(frozen=True)
class _Joint:
    """A pair of tokens that meet at a cut, and an answer in which they are to do so.

    Attributes:
        texts: of some fields.
        place: of the cut, counted from the end of the first of them.
    """

    pair: Tokens
    texts: dict[int, str]
    place: int


class _Composition:
    """The answers of a task in pieces, cut where tokens end."""

    def __init__(self, task: Task, tokenizer: TextTokenizer) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._literals, self._values, self._names = _slots(task)
        self._last = len(self._names) - 1

    @cached_property
    def forms(self) -> list[list[str]]:
        """Texts of each field that show all its tokens: of a list, each label once, twice and three times, and none."""
        return [
            [self._task.list_text(name, [text] * count) for count in (1, 2, 3) for text in texts] + ["[]"]
            if name in self._task.lists
            else texts
            for name, texts in zip(self._names, self._values, strict=True)
        ]

    @cached_property
    def _views(self) -> list[dict[str, _View]]:
        """An answer with each form of each field."""
        return [
            dict(zip(forms, self._encode([{field: form} for form in forms], range(self._last + 1)), strict=True))
            for field, forms in enumerate(self.forms)
        ]

    def _encode(self, choices: list[dict[int, str]], fields: range) -> list[_View]:
        """Answers, or some fields of them, with these texts; other fields have their first."""
        texts, ends = [], []
        for chosen in choices:
            text, after = self._literals[fields[0]], {}
            for field in fields:
                text += chosen.get(field, self.forms[field][0])
                after[field] = len(text)
                text += self._literals[field + 1]
            texts.append(text)
            ends.append(after)
        encoded = self._tokenizer.offsets(texts)
        return [_View(_starts(offsets), ids, after) for (ids, offsets), after in zip(encoded, ends, strict=True)]

    @cached_property
    def _cuts(self) -> list[int]:
        """Between each two fields, counted from the end of the first."""
        return [self._cut(field) for field in range(self._last)]

    def _cut(self, field: int) -> int:
        """A place in the text between two fields where a token begins whatever the two values are."""
        length, sides = len(self._literals[field + 1]), self._views[field : field + 2]
        common = set(range(1, length))
        for view in (*sides[0].values(), *sides[1].values()):
            common &= {start - view.after[field] for start in view.starts if start >= 0}
        for cut in sorted(common, key=lambda cut: abs(cut - length / 2)):
            texts = sorted(form + self._literals[field + 1][:cut] for form in self.forms[field])
            if any(text.startswith(begun) for begun, text in itertools.pairwise(texts)):
                continue  # where a field may be left out: the cut is to stand where it shows
            before, behind = (
                {view.around(view.after[field] + cut)[side]: text for text, view in views.items()}
                for side, views in enumerate(sides)
            )
            joints = [
                _Joint((a, b), {field: x, field + 1: y}, cut)
                for (a, x), (b, y) in itertools.product(before.items(), behind.items())
            ]
            if self._hold(joints):
                return cut
        raise UserError(
            f"no token boundary between the fields {self._names[field]!r} and {self._names[field + 1]!r} holds for all their "
            f"values, and {self._task.outputs:,} answers are too many to list: {ADVICE}"
        )

    def _hold(self, joints: list[_Joint]) -> bool:
        """Whether tokens that end at a cut are followed, in a real encoding, by all those that begin there."""
        fields = range(min(joints[0].texts), max(joints[0].texts) + 1)
        literals = sum(len(self._literals[field]) for field in (*fields, fields[-1] + 1))
        characters = sum(literals + sum(map(len, joint.texts.values())) for joint in joints)
        return characters <= COMPILED_CHARACTERS and all(
            view.around(view.after[fields[0]] + joint.place) == joint.pair
            for some in (joints[i : i + JOINTS] for i in range(0, len(joints), JOINTS))
            for view, joint in zip(self._encode([joint.texts for joint in some], fields), some, strict=True)
        )

    def pieces(self, field: int, first: int) -> list[Piece]:
        """A field's, numbered from `first` on; what comes next has the number behind theirs."""
        rule, texts = self._task.lists.get(self._names[field]), self._values[field]
        if rule is None:
            return [{(tokens, first + 1) for tokens in self._whole(field, texts)}]
        alone = [self._task.list_text(self._names[field], [text]) for text in texts]
        parts = _ListParts(self._whole(field, ["[]"])[0], [self._whole(field, alone)], [], None)
        return _list_pieces(rule, self._labels(field, parts) if rule.most(len(texts)) > 1 else parts, len(texts), first)

    def _whole(self, field: int, forms: list[str]) -> list[Tokens]:
        return [self._between(field, form, None, None) for form in forms]

    def _between(self, field: int, form: str, start: int | None, end: int | None) -> Tokens:
        """The tokens of a form of a field, from one place on up to another, counted from its end; without them, the piece's."""
        view = self._views[field][form]
        first, last = (self._cuts[field - 1] if field else 0), (self._cuts[field] if field < self._last else None)
        begin = (view.after[field - 1] + first if field else 0) if start is None else view.after[field] + start
        if end is not None:
            return view.between(begin, view.after[field] + end)
        if last is None:
            return (*view.between(begin, None), self._tokenizer.end_id)
        return view.between(begin, view.after[field] + last)

    def _labels(self, field: int, parts: _ListParts) -> _ListParts:
        """The parts of a list that is cut between two labels, where a token begins whatever the two are."""
        between = self._task.list_marks(self._names[field])[1]
        for cut in (0, -1, *range(1, len(between) + 2)):  # also within the quotation marks that most labels have
            found = self._labels_at(field, cut, parts)
            if found and self._hold(self._joints(field, cut, found)):
                return found
        raise UserError(
            f"no token boundary between the labels of {self._names[field]!r} holds for all of them, and {self._task.outputs:,} "
            f"answers are too many to list: {ADVICE}"
        )

    def _labels_at(self, field: int, cut: int, parts: _ListParts) -> _ListParts | None:
        """The parts, with each label as the first, a middle and the last one; None where tokens reach across the cut."""
        opening, middle, closing = list[Tokens](), list[Tokens](), list[Tokens]()
        for text in self._values[field]:
            two, three = (self._task.list_text(self._names[field], [text] * count) for count in (2, 3))
            one_of_two, one, other = (self._place(field, [text] * n, k, cut) for n, k in ((2, 1), (3, 1), (3, 2)))
            places = ((two, one_of_two), (three, one), (three, other))
            if not all(
                self._views[field][form].after[field] + place in self._views[field][form].starts for form, place in places
            ):
                return None
            opening.append(self._between(field, two, None, one_of_two))
            middle.append(self._between(field, three, one, other))
            closing.append(self._between(field, two, one_of_two, None))
        found = _ListParts(parts.empty, [*parts.last, closing], [opening, middle], None)
        if any(b[: len(a)] == a for going in found.going for a, b in itertools.pairwise(sorted(going))):
            return None  # a label would begin another one
        return found if cut > 0 else found.ended()

    def _place(self, field: int, labels: list[str], count: int, cut: int) -> int:
        """Of the cut behind some of a list's labels, counted from its end."""
        before, between, _ = self._task.list_marks(self._names[field])
        return len(before + between.join(labels[:count])) + cut - len(self._task.list_text(self._names[field], labels))

    def _joints(self, field: int, cut: int, parts: _ListParts) -> list[_Joint]:
        """All that may meet at a cut between labels: a first or a later one before it, the last or another one behind."""
        texts = self._values[field]
        left = {some[-1]: [text] * (1 + i) for i in (0, 1) for some, text in zip(parts.going[i], texts, strict=True)}
        right = {
            some[0]: [text] * (1 + i)
            for i in (0, 1)
            for some, text in zip((parts.last[1], parts.going[1])[i], texts, strict=True)
        }
        return [
            _Joint((a, b), {field: self._task.list_text(self._names[field], x + y)}, self._place(field, x + y, len(x), cut))
            for (a, x), (b, y) in itertools.product(left.items(), right.items())
        ]


def _slots(task: Task) -> tuple[list[str], list[list[str]], list[str]]:
    """A task's constant texts, the texts between them, and their names; a combination is one field, of all that it may be."""
    literals, texts, names = task.literals(), dict(zip(task.fields, task.value_texts(), strict=True)), list(task.fields)
    constant, values, called = literals[:1], list[list[str]](), list[str]()
    for part in task.parts:
        fields = [part] if isinstance(part, str) else part.fields
        inner = literals[(first := names.index(fields[0]) + 1) : first + len(fields) - 1]
        rows = [[text] for text in texts[part]] if isinstance(part, str) else [list(map(dumps, row)) for row in part.values]
        forms = ["".join(itertools.chain(*itertools.zip_longest(row, inner, fillvalue=""))) for row in rows]
        if values and not constant[-1]:  # nothing stands between it and the field before: one of the two may be left out
            if called[-1] in task.lists or (isinstance(part, str) and part in task.lists):
                raise UserError(f"{called[-1]!r} is a list next to what may be left out: {ADVICE}")
            values[-1] = [before + form for before in values[-1] for form in forms]
            constant[-1], called[-1] = literals[first + len(fields) - 1], " and ".join([called[-1], *fields])
            continue
        values.append(forms)
        constant.append(literals[first + len(fields) - 1])
        called.append(" and ".join(fields))
    return constant, values, called


def _starts(offsets: list[tuple[int, int]]) -> list[int]:
    """Where each token starts, in characters; -1 for tokens that share a character with the one before."""
    starts = [0] + [start for start, _ in offsets[1:]]
    return [s if i == 0 or offsets[i - 1][1] <= s else -1 for i, s in enumerate(starts)]


@dataclass(frozen=True)
class _ListParts:
    """The tokens of a list's parts.

    Attributes:
        empty: of the list without labels.
        last: of each label as the list's only one, and as its last; from the cut before it to the end.
        going: of each label as the first of several, and as one between others; to the cut behind it.
        end: from the cut behind any label to the end of the list, where `last` is not needed.
    """

    empty: Tokens
    last: list[list[Tokens]]
    going: list[list[Tokens]]
    end: Tokens | None

    def ended(self) -> _ListParts | None:
        """The same where a list is cut at a label's end, and so goes on or ends behind the cut; None where it cannot be."""
        pairs = [pair for some, last in zip(self.going, self.last, strict=True) for pair in zip(some, last, strict=True)]
        ends = {last[len(some) :] if last[: len(some)] == some else () for some, last in pairs}
        return replace(self, end=ends.pop()) if len(ends) == 1 and () not in ends else None


def _list_pieces(rule: ListRule, parts: _ListParts, labels: int, first: int) -> list[Piece]:
    """A list's pieces, one for each beginning that matters, numbered from `first` on; what comes next has the number behind.

    Raises:
        UserError: they are too many.
    """
    numbers, steps = {Begun(): first}, dict[Begun, list[tuple[int, Begun]]]()
    for begun in (waiting := [Begun()]):
        steps[begun] = list(rule.following(begun, labels))
        for _, further in steps[begun]:
            if further not in numbers and (parts.end or any(rule.following(further, labels))):
                numbers[further] = first + len(numbers)
                waiting.append(further)
        if len(numbers) > MAX_BEGINNINGS:
            raise UserError(
                f"a list of {labels} labels in any order has too many beginnings: give it a smaller max, or order: listed"
            )
    behind = first + len(numbers)
    return [_list_piece(rule, parts, begun, steps[begun], numbers, behind) for begun in waiting]


def _list_piece(
    rule: ListRule, parts: _ListParts, begun: Begun, steps: list[tuple[int, Begun]], numbers: dict[Begun, int], behind: int
) -> Piece:
    """The ways on from one beginning of a list."""
    later, piece = bool(begun.seen), Piece()
    if not later and rule.min == 0:
        piece.add((parts.empty, behind))
    if later and parts.end and begun.size >= rule.min:
        piece.add((parts.end, behind))
    for label, further in steps:
        if not parts.end and further.size >= rule.min:
            piece.add((parts.last[later][label], behind))
        if further in numbers and parts.going:
            piece.add((parts.going[later][label], numbers[further]))
    return piece
