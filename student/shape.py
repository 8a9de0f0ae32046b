"""What sizes a student, and what it reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    Attributes:
        window: keys a query looks at, itself among them; None for all before it.
        base: of the rotary frequencies.
        stretch: what positions are divided by.
    """

    window: int | None = None
    base: float = 10_000.0
    stretch: float = 1.0


PLAIN = Layer()


@dataclass(frozen=True)
class Shape:
    """Everything that sizes a student, and what it reads.

    What is None takes the value that a student of our own has.

    Attributes:
        input_vocabulary: V, ids of the teacher's tokenizer.
        embeddings: R, rows of the embedding: those of the ids the corpus uses, and one for all others.
        output_vocabulary: W, watched tokens, and one more with the tail.
        context: tokens the student reads at most.
        layers, width, heads, mlp, sequence, dropout: see `StudentConfig`.
        family: `plain` or `gemma3`.
        key_value_heads: G, each shared by as many heads; by default as many as heads.
        head_width: K; by default the width shared among the heads.
        kinds: of each layer.
        epsilon: what the norms over the width add to the mean square; by default float32's own.
        head_epsilon: the same of the norms of queries and keys.
        score_scale: what attention scores are multiplied by; by default 1 / √K.
        opening: ids that the student reads before every comment, computed once.
        separator: ids between comment and answer; by default the task's.
    """

    input_vocabulary: int
    embeddings: int
    output_vocabulary: int
    context: int
    layers: int
    width: int
    heads: int
    mlp: int
    sequence: str = "full"
    dropout: float = 0.0
    family: str = "plain"
    key_value_heads: int | None = None
    head_width: int | None = None
    kinds: tuple[Layer, ...] | None = None
    epsilon: float | None = None
    head_epsilon: float | None = None
    score_scale: float | None = None
    opening: tuple[int, ...] = ()
    separator: tuple[int, ...] | None = None

    @property
    def groups(self) -> int:
        """G, key/value heads."""
        return self.key_value_heads or self.heads

    @property
    def per_head(self) -> int:
        """K, the width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def each_layer(self) -> tuple[Layer, ...]:
        """The kind of every layer."""
        return self.kinds or (PLAIN,) * self.layers

    @property
    def is_gemma(self) -> bool:
        """Whether blocks are built as Gemma 3's."""
        return self.family == "gemma3"

    def as_dict(self) -> dict[str, Any]:
        """As it is read back from JSON, tuples as lists; what is None or empty is left out."""
        return {name: value for name, value in json.loads(json.dumps(asdict(self))).items() if value not in (None, [])}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Shape:
        """From `as_dict`."""
        tuples: dict[str, Any] = {name: tuple(content[name]) for name in ("opening", "separator") if name in content}
        if "kinds" in content:
            tuples["kinds"] = tuple(Layer(**kind) for kind in content["kinds"])
        return Shape(**(content | tuples))
