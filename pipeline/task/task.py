"""A task: what is distilled, and the language of its answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator, model_validator

from pipeline.base.config import Strict
from pipeline.base.errors import clip
from pipeline.task.combinations import Combination, check_combinations
from pipeline.task.lists import ListRule
from pipeline.task.values import Scalar, Value, Values, dumps, finite_values, is_among, typed, written

MAX_VALUES = 10_000  # of all fields together
COLUMN = re.compile(r"\{([^{}]+)\}")
MAX_CHARACTERS = 500_000  # of the whole task as JSON; with MAX_VALUES, what `dump_task` writes is within `yaml_files`' bounds


class Format(Strict):
    """How an answer is written. Each output of the task is written in exactly one way."""

    prefix: str = Field("", description="text before the JSON object, such as an opening code fence")
    suffix: str = Field("", description="text after the JSON object, such as a closing code fence")
    indent: int | None = Field(None, ge=0, le=16, description="as in json.dumps; null writes one line")
    item_separator: str = Field(", ", description="between fields on one line; with an indent, a comma and a newline")
    key_separator: str = Field(": ", description="between a key and its value")
    nesting: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description='with ".", the field a.b is member b of an object a; null: no objects inside',
    )

    @field_validator("item_separator")
    @classmethod
    def _item(cls, text: str) -> str:
        return _separator(text, ",")

    @field_validator("key_separator")
    @classmethod
    def _key(cls, text: str) -> str:
        return _separator(text, ":")


def _separator(text: str, mark: str) -> str:
    if text.strip(" \n\t\r") != mark:
        raise ValueError(f"must be {mark!r} with white space around it at most, not {text!r}")
    return text


class CommentRules(Strict):
    """Which comments take part. Lengths are in the teacher's tokens."""

    min_tokens: int = Field(1, ge=1)
    max_tokens: int = Field(256, ge=1)
    urls: bool = Field(False, description="keep comments that hold a URL")
    special_tokens: bool = Field(False, description="keep comments that hold the text of a special token")

    @model_validator(mode="after")
    def _ordered(self) -> CommentRules:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})")
        return self


class Shot(Strict):
    """A text with the answer that it is to have, which the teacher is shown."""

    comment: str
    answer: Any


class _Members(tuple[tuple[str, Any], ...]):
    """A JSON object's, as a key may stand there twice."""


class Task(Strict):
    """Instruction, output fields with their allowed values, input filters and the student's context."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    teacher: str | None = Field(None, description="Hugging Face name or local path of the teacher; a log of answers needs none")
    instruction: str = Field(..., min_length=1)
    prompt: str = Field("{instruction}\n\n{comment}", description="the user turn the teacher sees")
    system: str | None = Field(None, min_length=1, description="a system turn before it")
    examples: list[Shot] = Field([], description="texts with their answers, turns between the two")
    template: dict[str, Scalar] = Field({}, description="options of the teacher's chat template, as enable_thinking: false")
    input: str | None = Field(
        None, description="the text, from several columns: '{title}\\n\\n{body}'; null: comments.text is one"
    )
    fields: dict[str, list[Scalar]] = Field(..., min_length=1)
    lists: dict[str, ListRule] = Field({}, description="fields that are a list of some of their values, its labels")
    combinations: list[Combination] = Field([], description="fields whose values go together in these ways alone")
    optional: list[str] = Field([], description="fields that an answer leaves out where they are null")
    format: Format = Format()
    comments: CommentRules = CommentRules()
    separator: str = Field("\n\n", min_length=1, description="what the student reads between comment and answer")
    context: int | None = Field(None, ge=3, description="tokens a student reads; null takes what the longest example needs")
    auxiliary_tokens: int = Field(278, ge=0, description="watched tokens outside the output automaton")
    student: dict[str, Scalar] = Field({}, description="the student's shape: keys of the configuration's `student`")

    @field_validator("fields", mode="before")
    @classmethod
    def _finite(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise ValueError("must map each field's name to its values")
        listed = {name: finite_values(clip(str(name)), values) for name, values in fields.items()}
        if (count := sum(map(len, listed.values()))) > MAX_VALUES:
            raise ValueError(f"the fields list {count:,} values, more than {MAX_VALUES:,}: no automaton of theirs would fit")
        return listed

    @field_validator("prompt")
    @classmethod
    def _has_comment(cls, prompt: str) -> str:
        if prompt.count("{comment}") != 1 or prompt.count("{instruction}") > 1:
            raise ValueError("must hold {comment} exactly once and {instruction} at most once")
        return prompt

    @field_validator("input")
    @classmethod
    def _has_columns(cls, template: str | None) -> str | None:
        if template is not None and not COLUMN.search(template):
            raise ValueError("must name columns in braces, as in '{title}\\n\\n{body}'")
        return template

    @model_validator(mode="after")
    def _objects(self) -> Task:
        """Objects that no answer could be written with: one that is a value too, or whose members stand apart."""
        paths = {name: self.path(name) for name in self.fields}
        for name, path in paths.items():
            if any(path[:depth] in paths.values() for depth in range(1, len(path))):
                raise ValueError(f"field {clip(name)!r} is in no object that can be written: see format.nesting")
        if [path for path, _ in self._flat(self.nested(dict.fromkeys(self.fields, True)).items())] != list(paths.values()):
            raise ValueError("the fields of one object must follow each other: see format.nesting")
        return self

    @model_validator(mode="after")
    def _listed(self) -> Task:
        for name, rule in self.lists.items():
            if name not in self.fields:
                raise ValueError(f"lists.{clip(name)} is no field: the fields are {clip(', '.join(self.fields))}")
            if rule.min > len(self.fields[name]):
                raise ValueError(f"lists.{clip(name)}.min is {rule.min}, and the field has {len(self.fields[name])} labels")
        return self

    @model_validator(mode="after")
    def _together(self) -> Task:
        check_combinations(self.combinations, self.fields, self.lists)
        return self

    @model_validator(mode="after")
    def _left_out(self) -> Task:
        together = {name for one in self.combinations for name in one.fields}
        for name in self.optional:
            told = f"optional: {clip(repr(name))}"
            if name not in self.fields:
                raise ValueError(f"{told} is no field: the fields are {clip(', '.join(self.fields))}")
            if name in self.lists or name in together:
                raise ValueError(f"{told} is a list, or in a combination, which is always written")
            if not is_among(None, self.fields[name]):
                raise ValueError(f"{told} does not list null, which says that it is left out: add it to the field's values")
            *outer, _ = self.path(name)
            if not any(
                self.path(other)[: len(outer)] == tuple(outer) for other in self.fields if not self._alone(other, outer)
            ):
                raise ValueError(f"{told} is in an object that may be empty: let one of its members always be written")
        return self

    def _alone(self, name: str, outer: list[str]) -> bool:
        """Whether a field is a member of this object that may be left out."""
        return name in self.optional and list(self.path(name)[:-1]) == outer

    @model_validator(mode="after")
    def _shown(self) -> Task:
        for shot in self.examples:
            if self.fit(shot.answer) is None:
                raise ValueError(f"the example {clip(shot.comment)!r} does not fit: {self.misfit(shot.answer)}")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Task:
        if (size := len(json.dumps(self.model_dump(mode="json")))) > MAX_CHARACTERS:
            raise ValueError(f"the task has {size:,} characters as JSON, more than {MAX_CHARACTERS:,}: shorten its texts")
        return self

    @property
    def hash(self) -> str:
        """Identity of all that shapes prompts, answers and filters. Teacher and student are recorded beside it."""
        content = self.model_dump(mode="json", exclude={"name", "teacher", "student"})
        later = ("input", "lists", "combinations", "optional", "system", "examples", "template")
        for place, name in ((content["format"], "nesting"), *((content, name) for name in later)):
            if not place[name]:  # tasks have the hashes from before there was any
                del place[name]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]

    @property
    def outputs(self) -> int:
        """Size of the output language."""
        return math.prod(
            len(part.values)
            if isinstance(part, Combination)
            else self.lists[part].count(len(self.fields[part]))
            if part in self.lists
            else len(self.fields[part])
            for part in self.parts
        )

    @property
    def parts(self) -> list[str | Combination]:
        """What an answer is made of, in order: fields, and combinations of some."""
        within = {name: one for one in self.combinations for name in one.fields}
        return [within.get(name, name) for name in self.fields if name not in within or within[name].fields[0] == name]

    @property
    def columns(self) -> list[str]:
        """The columns that `input` names; none where the text is one."""
        return list(dict.fromkeys(COLUMN.findall(self.input or "")))

    def text_of(self, given: Any) -> Any:
        """The text of a row's columns, as `input` joins them; what is no mapping, or not of this task, is given back.

        A column that is null or missing is empty, and a number is written as JSON has it.
        """
        if self.input is None or not isinstance(given, Mapping) or not given.keys() & set(self.columns):
            return given
        return COLUMN.sub(lambda found: written(given.get(found[1])), self.input)

    def user_turn(self, comment: str) -> str:
        """The text of the teacher's user turn."""
        before, after = self.prompt.split("{comment}")
        return before.replace("{instruction}", self.instruction) + comment + after.replace("{instruction}", self.instruction)

    def turns(self, comment: str) -> list[tuple[str, str]]:
        """Role and text of all turns of the teacher's prompt."""
        turns = [("system", self.system)] if self.system else []
        for shot in self.examples:
            values = self.fit(shot.answer)
            turns += [("user", self.user_turn(shot.comment)), ("assistant", self.render(values) if values else "")]
        return [*turns, ("user", self.user_turn(comment))]

    @property
    def longest(self) -> int:
        """At least the characters of every answer."""
        return sum(map(len, self.literals())) + sum(map(self._most_characters, self.fields, self.value_texts()))

    def _most_characters(self, name: str, texts: list[str]) -> int:
        longest = sorted(texts, key=len)[-self.lists[name].most(len(texts)) :] if name in self.lists else []
        return len(self.list_text(name, longest)) if longest else max(map(len, texts))

    def literals(self) -> list[str]:
        """The constant text before, between and after the fields: one more than there are fields."""
        return self._constant[0]

    @cached_property
    def _constant(self) -> tuple[list[str], dict[str, tuple[str, str]]]:
        """The constant texts; and of each field what stands around its value, where that is left out together with it."""
        texts, around = [self.format.prefix], list[tuple[str, str]]()
        for piece in self._pieces(self.nested(dict.fromkeys(self.fields, True)), ()):
            if isinstance(piece, tuple):
                texts.append("")
                around.append(piece)
            else:
                texts[-1] += piece
        return [*texts[:-1], texts[-1] + self.format.suffix], dict(zip(self.fields, around, strict=True))

    def _pieces(self, members: dict[str, Any], path: tuple[str, ...]) -> Iterator[str | tuple[str, str]]:
        """An object's text as json.dumps writes it, with a pair where a field stands: what belongs to it on both sides."""
        f, left_out = self.format, set(map(self.path, self.optional))
        before, after = ("", "") if f.indent is None else ("\n" + " " * f.indent * (len(path) + level) for level in (1, 0))
        comma = f.item_separator if f.indent is None else f.item_separator.rstrip()
        written = [(*path, name) not in left_out for name in members]
        yield "{"
        for i, (name, member) in enumerate(members.items()):
            key, led = (
                before + dumps(name) + f.key_separator,
                any(written[:i]),
            )  # a comma parts it from one that is always there
            if not written[i]:
                yield (comma + key, "") if led else (key, comma)
                continue
            yield comma + key if led else key
            if isinstance(member, dict):
                yield from self._pieces(member, (*path, name))
            else:
                yield "", ""
        yield after + "}"

    def path(self, name: str) -> tuple[str, ...]:
        """The keys that lead to a field in an answer."""
        return (name,) if self.format.nesting is None else tuple(name.split(self.format.nesting))

    def nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """An answer as the teacher writes it, from its values by field: with objects in it where the task has some."""
        answer: dict[str, Any] = {}
        for name, value in values.items():
            if value is None and name in self.optional:
                continue
            *outer, last = self.path(name)
            place = answer
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = list(value) if isinstance(value, tuple) else value
        return answer

    def value_texts(self) -> list[list[str]]:
        """The text of every value, by field; of lists, of every label."""
        return [[self._value_text(name, value) for value in values] for name, values in self.fields.items()]

    def _value_text(self, name: str, value: Scalar) -> str:
        """JSON, with what is left out together with it."""
        before, after = self._constant[1][name]
        return "" if value is None and name in self.optional else before + dumps(value) + after

    def list_marks(self, name: str) -> tuple[str, str, str]:
        """What stands before, between and after the labels of a field that is a list, as json.dumps writes it."""
        f = self.format
        if f.indent is None:
            return "[", f.item_separator, "]"
        depth = len(self.path(name))
        line, end = ("\n" + " " * f.indent * level for level in (depth + 1, depth))
        return "[" + line, f.item_separator.rstrip() + line, end + "]"

    def list_text(self, name: str, labels: Sequence[str]) -> str:
        """A list of labels' texts."""
        before, between, after = self.list_marks(name)
        return before + between.join(labels) + after if labels else "[]"

    def render(self, values: Values) -> str:
        """The one way an answer is written."""
        first, *rest = self.literals()
        return first + "".join(
            (self.list_text(name, list(map(dumps, value))) if isinstance(value, tuple) else self._value_text(name, value))
            + text
            for name, value, text in zip(self.fields, values, rest, strict=True)
        )

    def answers(self) -> Iterator[Values]:
        """Every answer of the output language, in field order."""
        return map(tuple, map(itertools.chain.from_iterable, itertools.product(*map(self._every, self.parts))))

    def _every(self, part: str | Combination) -> Iterable[Sequence[Value]]:
        if isinstance(part, Combination):
            return part.values
        return ((value,) for value in (self.lists[part].every(self.fields[part]) if part in self.lists else self.fields[part]))

    def near(self, values: Values) -> list[Values]:
        """The answers that differ in one field alone; in a list, by one label more or less."""
        given = [list(value) if isinstance(value, tuple) else value for value in values]
        others = (
            [*given[:i], value, *given[i + 1 :]]
            for i, name in enumerate(self.fields)
            for value in self._others(name, values[i])
        )
        return [checked for other in others if (checked := self._checked(other))]

    def _others(self, name: str, value: Value) -> list[Any]:
        allowed = self.fields[name]
        if not isinstance(value, tuple):
            return [other for other in allowed if not is_among(other, [value])]
        return [[other for other in allowed if is_among(other, value) != is_among(other, [label])] for label in allowed]

    def draw(self, rng: random.Random, place: int | None = None) -> Values:
        """An answer at random; with each part's value, label or combination of some place, counted round."""
        drawn: list[Value] = []
        for part in self.parts:
            values = part.values if isinstance(part, Combination) else [[value] for value in self.fields[part]]
            which = rng.randrange(len(values)) if place is None else place % len(values)
            if isinstance(part, str) and part in self.lists:
                drawn.append(self.lists[part].draw(self.fields[part], rng, which))
            else:
                drawn += values[which]
        return tuple(drawn)

    def parse(self, text: str) -> Values | None:
        """The values a piece of text states, or None where it is not a JSON object that fits the task."""
        written = self.written(text)
        return None if written is None else tuple(map(self._sorted, self.fields, written))

    def written(self, text: str) -> Values | None:
        """The same with each list in the order that it is written in."""
        found = self._pairs(text)
        there = {path for path, _ in found or ()}
        paths = [self.path(name) for name in self.fields if name not in self.optional or self.path(name) in there]
        if found is None or [path for path, _ in found] != paths:
            return None
        given = dict(found)
        return self._checked([given.get(self.path(name)) for name in self.fields])

    def _sorted(self, name: str, value: Value) -> Value:
        return tuple(other for other in self.fields[name] if is_among(other, value)) if isinstance(value, tuple) else value

    def fit(self, answer: object) -> Values | None:
        """The values of an answer that people or programs gave; None where it does not fit the task.

        It is a mapping in any order, its JSON text, or the bare value of a task's only field. A value that is no string may
        be given as its JSON text, as a CSV file has it; so may a list, whose labels stand in any order and may be there twice.
        A field of an object inside stands there, or under its own name. What is missing, or an empty string, is null where
        the field may be null, but where nothing at all is said.
        """
        given = self._mapping(answer)
        if given.keys() != self.fields.keys():
            return None
        return self._checked([self._typed(name, given[name]) for name in self.fields])

    def misfit(self, answer: object) -> str:
        """Why an answer that does not fit the task does not."""
        given = self._mapping(answer)
        if given.keys() != self.fields.keys():
            return f"{answer!r:.80} is not an object with {' and '.join(self.fields)}"
        wrong = next((name for name in self.fields if not self._allows(name, self._typed(name, given[name]))), None)
        if wrong is None:
            odd = next(one for one in self.combinations if not self._goes(one, [self._typed(n, given[n]) for n in self.fields]))
            said = ", ".join(repr(given[name]) for name in odd.fields)
            return f"{' and '.join(odd.fields)} are {said:.80}, which do not go together"
        if wrong not in self.lists:
            return f"{wrong} is {given[wrong]!r:.80}, which is none of its {len(self.fields[wrong])} values"
        rule, labels = self.lists[wrong], len(self.fields[wrong])
        return f"{wrong} is {given[wrong]!r:.80}, not a list of {rule.min} to {rule.most(labels)} of its {labels} labels"

    @cached_property
    def _nullable(self) -> list[str]:
        return [name for name, values in self.fields.items() if name not in self.lists and is_among(None, values)]

    def _mapping(self, answer: object) -> dict[str, Any]:
        pairs = self._pairs(answer.strip()) if isinstance(answer, str) else None
        if isinstance(answer, dict):
            pairs = tuple(self._flat(answer.items()))
        if pairs is not None:
            named = {(self.format.nesting or "").join(path): value for path, value in pairs}
            empty = [name for name in self._nullable if named.get(name) == "" and "" not in self.fields[name]]  # cells
            if len(named) == len(pairs) and named.keys() > set(empty):  # all empty: nobody answered
                return dict.fromkeys(self._nullable) | named | dict.fromkeys(empty)
            return {}
        return dict.fromkeys(self.fields, answer) if len(self.fields) == 1 else {}

    def _pairs(self, text: str) -> tuple[tuple[tuple[str, ...], Any], ...] | None:
        """The members of a JSON object by their path; None where the text is no object."""
        body = text.removeprefix(self.format.prefix).removesuffix(self.format.suffix)
        try:
            found = json.loads(body, object_pairs_hook=_Members)
        except (ValueError, RecursionError):
            return None
        return tuple(self._flat(found)) if isinstance(found, _Members) else None

    def _flat(self, members: Iterable[tuple[str, Any]]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Members with those of objects inside, where the task has such, and their paths."""
        for name, value in members:
            if self.format.nesting and isinstance(value, _Members | dict):
                inner = value.items() if isinstance(value, dict) else value
                yield from (((str(name), *path), one) for path, one in self._flat(inner))
            else:
                yield (str(name),), value

    def _checked(self, values: list[Any]) -> Values | None:
        if not all(map(self._allows, self.fields, values)) or not all(self._goes(one, values) for one in self.combinations):
            return None
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    def _goes(self, one: Combination, values: Sequence[Any]) -> bool:
        first = list(self.fields).index(one.fields[0])
        return repr(list(values[first : first + len(one.fields)])) in self._combined[one.fields[0]]

    @cached_property
    def _combined(self) -> dict[str, set[str]]:
        """By the first field of each combination, all that it may be; in text, as JSON tells true from 1."""
        return {one.fields[0]: set(map(repr, one.values)) for one in self.combinations}

    def _allows(self, name: str, value: object) -> bool:
        allowed = self.fields[name]
        if name not in self.lists:
            return is_among(value, allowed)
        if not isinstance(value, list) or not all(is_among(label, allowed) for label in value):
            return False
        rule, places = self.lists[name], {dumps(label): place for place, label in enumerate(allowed)}
        labels = [places[dumps(label)] for label in value]
        in_order = rule.order == "any" or labels == sorted(labels)
        return in_order and len(set(labels)) == len(labels) and rule.min <= len(labels) <= rule.most(len(allowed))

    def _typed(self, name: str, given: Any) -> Any:
        """A value as the task has it, from what a file may hold: see `fit`."""
        allowed = self.fields[name]
        if name not in self.lists:
            return typed(given, allowed)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                return given
        if not isinstance(given, list | tuple):
            return given
        labels = [typed(label, allowed) for label in given]
        unknown = [label for label in labels if not is_among(label, allowed)]
        return [label for label in allowed if is_among(label, labels)] + unknown
