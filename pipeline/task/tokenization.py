"""The teacher's tokenizer, with control tokens and a comment's text kept apart.

A comment is data. It is always encoded by a copy of the tokenizer that treats the text of special tokens as plain text,
so `<end_of_turn>` inside a comment can never end a turn.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.base.errors import UserError
from pipeline.task.task import Task
from pipeline.task.text_length import characters_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMENT_MARK = "RETORT-COMMENT-HERE"
ANSWER_MARK = "RETORT-ANSWER-HERE"
UNLIMITED = 256  # characters that count as one token at most, where a tokenizer drops or joins any number of them
PROMPT_SLACK = 8  # tokens a prompt may be longer than its parts: tokens merge, or fail to, across their edges


class TextTokenizer:
    """Encodes text in which nothing is a control token, and decodes answers.

    Args:
        serialized: the content of a `tokenizer.json`.

    Raises:
        ValueError: the content is not a tokenizer's.
    """

    def __init__(self, serialized: str, end_id: int) -> None:
        self.serialized = serialized
        self.end_id = end_id
        self._plain = _bare(_within(serialized))
        self._plain.encode_special_tokens = True

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[str, int]]:
        """Pickles as its arguments: the copy in another process must read control tokens as text too."""
        return TextTokenizer, (self.serialized, self.end_id)

    @property
    def hash(self) -> str:
        """Identity of the vocabulary, its merges and the end token."""
        return hashlib.sha256(f"{self.end_id}\n{self.serialized}".encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    def is_last(self, id_: int) -> bool:
        """Whether an id is there and the next one is not: `size` would list all of them for that."""
        return self._plain.id_to_token(id_) is not None and self._plain.id_to_token(id_ + 1) is None

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Ids and texts of the control tokens."""
        return {id_: token.content for id_, token in self._plain.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def characters_per_token(self) -> int:
        """Characters of a text that one token stands for at most, or that are one at most where the tokenizer has no limit."""
        return characters_per_token(self._plain) or UNLIMITED

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, BOS left out."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def has_control(self, ids: list[int]) -> bool:
        """Whether a control token is among ids, which plain text should never become."""
        return not self.special_tokens.keys().isdisjoint(ids)

    def offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of each text and the characters each token covers."""
        encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encoded]

    def decode(self, ids: NDArray[np.integer] | list[int]) -> str:
        """The text of an answer's tokens; control tokens (the end token) are left out."""
        return str(self._plain.decode([int(i) for i in ids], skip_special_tokens=True))

    def token(self, id_: int) -> str:
        """One token as the vocabulary spells it."""
        return str(self._plain.id_to_token(id_))

    @property
    def is_bpe(self) -> bool:
        """Whether merges decide the tokens, so that a tokenization is right where each neighbouring pair of tokens is."""
        return type(self._plain.model).__name__ == "BPE"


def _within(serialized: str) -> str:
    """The tokenizer of text that does not begin a prompt: some put a space before a prompt's first word, as Mistral's do."""
    try:
        content = json.loads(serialized)
        first = content["pre_tokenizer"] or {}
    except (ValueError, TypeError, KeyError):
        return serialized  # which the library refuses, with a reason
    for part in [first, *first.get("pretokenizers", [])]:
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
            serialized = json.dumps(content)
    return serialized


def _bare(serialized: str) -> Tokenizer:
    """A tokenizer that adds, cuts and pads nothing, and whose offsets are whole: a post-processor may trim spaces off them."""
    try:
        tokenizer = Tokenizer.from_str(serialized)
    except Exception as error:  # what the library raises is of no other class
        raise ValueError(str(error)) from error
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class Prompt:
    """The teacher's prompt around a comment: chat template, user turn, and the opening of the answer.

    `before` and `after` are the plain text next to the comment, encoded together with it as tokens may merge across.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]

    def ids(self, comments: list[str], tokenizer: TextTokenizer) -> list[list[int]]:
        """Token ids of each comment's whole prompt.

        Raises:
            ValueError: the tokenizer makes a control token of a comment's plain text.
        """
        turns = tokenizer.encode([self.before + comment + self.after for comment in comments])
        for comment, turn in zip(comments, turns, strict=True):
            if tokenizer.has_control(turn):
                raise ValueError(f"the tokenizer turns plain text into a control token: {comment[:80]!r}")
        return [self.head + turn + self.tail for turn in turns]

    def longest(self, task: Task, tokenizer: TextTokenizer) -> int:
        """Tokens that the prompt of a comment takes at most."""
        return len(self.ids([""], tokenizer)[0]) + task.comments.max_tokens + PROMPT_SLACK


class TeacherTokenizer(TextTokenizer):
    """A text tokenizer that also knows the teacher's chat template."""

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self._hf = hf
        super().__init__(hf.backend_tokenizer.to_str(), self._find_end(hf))
        self._control = _bare(self.serialized)

    @staticmethod
    def _find_end(hf: PreTrainedTokenizerBase) -> int:
        """The first control token the chat template puts after an answer; without a template, the EOS token."""
        after = _render(hf, [("user", COMMENT_MARK), ("assistant", ANSWER_MARK)], generate=False).split(ANSWER_MARK)[-1]
        control = set(hf.all_special_ids)
        end = next((i for i in hf(after, add_special_tokens=False).input_ids if i in control), hf.eos_token_id)
        if end is None:
            raise UserError("the teacher's tokenizer has no end-of-turn and no EOS token: nothing could end an answer")
        return int(end)

    def prompt(self, task: Task) -> Prompt:
        """The prompt of a task around any comment.

        Its tokens equal those of the whole rendered text wherever the comment holds no special token's text: control
        tokens cut the text apart anyway, and all between two of them is encoded together.

        Raises:
            UserError: the template hides the comment, or the tokenizer reads a text by what stands far before it.
        """
        if written := next(
            (token for shot in task.examples for token in self.special_tokens.values() if token in shot.comment), None
        ):
            raise UserError(f"an example of the task holds the text of the control token {written!r}")
        text = _render(self._hf, task.turns(COMMENT_MARK), generate=True, **task.template)
        if text.count(COMMENT_MARK) != 1:
            raise UserError("the teacher's chat template does not show the user turn exactly once")
        before, after = text.split(COMMENT_MARK)
        cut_before = max((end for _, end in self._control_spans(before)), default=0)
        cut_after = min((start for start, _ in self._control_spans(after)), default=len(after))
        prompt = Prompt(
            head=self._control_ids(before[:cut_before]),
            before=before[cut_before:],
            after=after[:cut_after],
            tail=self._control_ids(after[cut_after:]),
        )
        if prompt.ids([COMMENT_MARK], self)[0] != self._control_ids(text):
            raise UserError("this tokenizer gives a text other tokens after a control token than alone: it is not supported")
        return prompt

    def _control_ids(self, text: str) -> list[int]:
        return list(self._control.encode(text, add_special_tokens=False).ids)

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the template's control tokens stand, with the white space that some of them swallow."""
        encoding = self._control.encode(text, add_special_tokens=False)
        return [span for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ in self.special_tokens]


def _render(hf: PreTrainedTokenizerBase, turns: list[tuple[str, str]], generate: bool, **options: Any) -> str:
    """The chat template's text; for a tokenizer without one (a base model), the turns after its BOS token.

    Raises:
        UserError: the template refuses the turns, as some do with a system turn.
    """
    if hf.chat_template is None:
        return (hf.bos_token or "") + "\n".join(text for _, text in turns) + ("\n" if generate else hf.eos_token or "")
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options))
    except (TemplateError, TypeError) as error:  # the second for an option that is not the template's own
        roles = ", ".join(dict.fromkeys(role for role, _ in turns))
        raise UserError(
            f"the teacher's chat template does not take turns of {roles} with the task's options: {error}"
        ) from error


def load_teacher_tokenizer(model: str, revision: str | None = None) -> TeacherTokenizer:
    """The tokenizer of a teacher, by Hugging Face name or path.

    Raises:
        UserError: there is none, or it has no fast form (`tokenizer.json`).
    """
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model} is not a model: no tokenizer could be loaded from it ({_first_line(error)})") from error
    if not getattr(hf, "is_fast", False):
        raise UserError(f"{model} has only a slow tokenizer; Retort needs its fast form (tokenizer.json)")
    return TeacherTokenizer(hf)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
