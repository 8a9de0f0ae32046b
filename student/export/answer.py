"""Answers comments with the student in this folder. It needs torch, safetensors, tokenizers and numpy, and nothing of Retort.

One whose texts are read by a pretrained model needs transformers too.

    python answer.py "I love it" "What a waste of time"
    python answer.py < comments.txt

or, from Python:

    import answer
    student = answer.load()
    student.answer("I love it")

Decoding is written to be read rather than to be fast: for every choice the student reads the whole sequence anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from student.model.model import Student
from student.model.reader import side_by_side
from student.model.shape import Shape

URL = re.compile(r"https?://|\bwww\.", re.IGNORECASE)


class RefusedError(ValueError):
    """A comment that the task's rules leave out."""


class Answerer:
    """A student with all it needs to answer.

    Args:
        folder: of the export.
    """

    def __init__(self, folder: Path) -> None:
        self._rules = json.loads((folder / "rules.json").read_text("utf-8"))
        self._tokenizer = _plain_tokenizer((folder / "tokenizer.json").read_text("utf-8"))
        tokens = self._tokenizer.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in tokens.items() if token.special}
        automaton = load_file(folder / "automaton.safetensors")
        self._tokens, self._next_state = automaton["tokens"], automaton["next_state"]
        shape = Shape.from_dict(json.loads((folder / "shape.json").read_text("utf-8")))
        self._choices_only = shape.sequence == "choices"
        self._model = Student(shape).eval()
        self._model.load_state_dict(load_file(folder / "model.safetensors"))

    def answer(self, comment: str) -> dict[str, Any]:
        """The values of the answer by field, as `answer`, and how likely the student finds it, as `confidence`.

        Raises:
            RefusedError: the comment is none that the student was made for.
        """
        comment = comment.strip()
        tokens, confidence = self._decode(comment, self._encode(comment))
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        values = json.loads(text.removeprefix(self._rules["prefix"]).removesuffix(self._rules["suffix"]))
        return {"answer": values, "confidence": round(confidence, 6)}

    def _encode(self, comment: str) -> list[int]:
        """The comment's tokens."""
        text, rules = comment, self._rules
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RefusedError("malformed: not UTF-8") from None
        if len(text) > rules["max_characters"]:  # its tokens are too many, and to make them would take long
            raise RefusedError("too_long")
        if not rules["special_tokens"] and any(token in text for token in self._special.values()):
            raise RefusedError("special_tokens")
        if not rules["urls"] and URL.search(text):
            raise RefusedError("urls")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._special.keys().isdisjoint(ids):
            raise RefusedError("special_tokens")
        if len(ids) < rules["min_tokens"]:
            raise RefusedError("too_short")
        if len(ids) > rules["max_tokens"]:
            raise RefusedError("too_long")
        return list(ids)

    @torch.inference_mode()
    def _decode(self, comment: str, tokens: list[int]) -> tuple[list[int], float]:
        """The answer's tokens, and the product of the probabilities of the choices made."""
        read, answer, confidence, state, text = tokens + self._rules["separator"], [], 1.0, 0, None
        if self._model.reader is not None:  # its vectors take the first places
            text = side_by_side(self._model.reader.encode([comment]))
            read = [0] * (1 if self._model.reader.shape.pools else int(text[1]))
        while state != len(self._next_state) - 1:
            allowed = self._next_state[state] >= 0
            forced = int(allowed.sum()) == 1
            column = int(allowed.int().argmax())
            if not forced:
                logits = self._model(torch.tensor([read]), text=text)[0, -1, : len(allowed)]
                logits = logits / self._rules["temperatures"].get(str(state), 1.0)
                best = logits.masked_fill(~allowed, -torch.inf).softmax(-1).max(-1)
                column, confidence = int(best.indices), confidence * float(best.values)
            answer.append(int(self._tokens[column]))
            if not (forced and self._choices_only):  # a student of choices never reads what follows by itself
                read.append(answer[-1])
            state = int(self._next_state[state, column])
        return answer, confidence


def _plain_tokenizer(serialized: str) -> Tokenizer:
    """A tokenizer that adds and cuts nothing, and reads the text of control tokens as text: a comment is data."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load(folder: str | Path | None = None) -> Answerer:
    """The student in a folder; by default the one beside this file."""
    return Answerer(Path(folder) if folder else Path(__file__).resolve().parent)


def main(comments: list[str]) -> None:
    """Prints a line of JSON for each comment: its answer and confidence, or as `reason` why it has none."""
    student = load()
    for comment in comments or sys.stdin:
        try:
            line = student.answer(comment)
        except RefusedError as refused:
            line = {"answer": None, "reason": str(refused)}
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
