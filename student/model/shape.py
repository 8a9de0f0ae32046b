"""What sizes a student, and what it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


def _require_positive(sized: object, *names: str) -> None:
    """Raises ValueError where one of these is given and is not a finite number above 0."""
    for name in names:
        value = getattr(sized, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}")


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

    def __post_init__(self) -> None:
        """Raises ValueError where no layer is so."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} keys")
        _require_positive(self, "base", "stretch")


PLAIN = Layer()


@dataclass(frozen=True)
class ReaderShape:
    """What turns a text into vectors, where the student does not read the teacher's tokens.

    Attributes:
        kind: `pretrained`, a model of `transformers`, or `ngrams`.
        vocabulary: ids it reads, or rows its n-grams are hashed into.
        context: ids of a text it reads at most.
        config: of the model, as `transformers` writes it.
        tokenizer: bytes of its tokenizer.json, which lies among the weights.

    Raises:
        ValueError: there is no such reader.
    """

    kind: str
    vocabulary: int
    context: int
    config: dict[str, Any] | None = None
    tokenizer: int = 0

    def __post_init__(self) -> None:
        """Refuses what is no reader."""
        _require_positive(self, "vocabulary", "context")
        if self.kind not in ("pretrained", "ngrams"):
            raise ValueError(f"no reader {self.kind!r} is known")

    @property
    def pools(self) -> bool:
        """Whether a text becomes one vector, and not one for each of its ids."""
        return self.kind == "ngrams"

    @property
    def most_vectors(self) -> int:
        """Vectors of the longest text."""
        return 1 if self.pools else self.context

    def tensors(self, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and size of every tensor of its weights."""
        import torch

        from student.model.reader import make_reader

        with torch.device("meta"):
            weights = make_reader(self, width).state_dict()
        yield from ((f"reader.{name}", tuple(tensor.shape)) for name, tensor in weights.items())


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
        reader: of the text; None for the student's own embedding and blocks.

    Raises:
        ValueError: no student has these sizes.
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
    reader: ReaderShape | None = None

    def __post_init__(self) -> None:
        """Refuses sizes that no student has."""
        _require_positive(
            self, "input_vocabulary", "embeddings", "output_vocabulary", "context", "layers", "width", "heads", "mlp"
        )
        _require_positive(self, "key_value_heads", "head_width", "epsilon", "head_epsilon", "score_scale")
        if self.sequence not in ("full", "choices") or self.family not in ("plain", "gemma3"):
            raise ValueError(f"no sequence {self.sequence!r} of a family {self.family!r} is known")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not from 0 to less than 1")
        if self.heads % self.groups or self.per_head % 2 or (self.head_width is None and self.width % self.heads):
            raise ValueError(f"width {self.width}, {self.heads} heads and {self.groups} key/value heads do not divide")
        if self.kinds is not None and len(self.kinds) != self.layers:
            raise ValueError(f"{self.layers} layers, but the kinds of {len(self.kinds)}")
        if not all(0 <= id_ < self.input_vocabulary for id_ in (*self.opening, *(self.separator or ()))):
            raise ValueError(f"opening or separator hold an id beyond the vocabulary of {self.input_vocabulary}")

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

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and size of every tensor of a student's weights, as `student.model.model` has them."""
        width, queries, keys = self.width, self.heads * self.per_head, self.groups * self.per_head
        block: dict[str, tuple[int, ...]] = {
            "attention_norm": (width,),
            "attention.qkv": (queries + 2 * keys, width),
            "attention.out": (width, queries),
            "mlp_norm": (width,),
            "up": (self.mlp * (1 + self.is_gemma), width),
            "down": (width, self.mlp),
        }
        if self.is_gemma:
            block |= dict.fromkeys(("attention_out_norm", "mlp_out_norm"), (width,))
            block |= dict.fromkeys(("attention.query_norm", "attention.key_norm"), (self.per_head,))
        yield "rows", (self.input_vocabulary,)
        yield "embedding.weight", (self.embeddings, width)
        for layer in range(self.layers):
            yield from ((f"blocks.{layer}.{name}.weight", size) for name, size in block.items())
        yield "norm.weight", (width,)
        yield "head.weight", (self.output_vocabulary, width)
        if self.reader:
            yield from self.reader.tensors(width)

    def as_dict(self) -> dict[str, Any]:
        """As it is read back from JSON, tuples as lists; what is None is left out, and an empty opening."""
        return {
            name: value
            for name, value in json.loads(json.dumps(asdict(self))).items()
            if value is not None and (value or name == "separator")
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Shape:
        """From `as_dict`."""
        tuples: dict[str, Any] = {name: tuple(content[name]) for name in ("opening", "separator") if name in content}
        if "kinds" in content:
            tuples["kinds"] = tuple(Layer(**kind) for kind in content["kinds"])
        if "reader" in content:
            tuples["reader"] = ReaderShape(**content["reader"])
        return Shape(**(content | tuples))
