"""A tokenizer fitted to the texts, where no teacher brings one: pieces of their words, and the task's values whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer

PIECES = 8192  # at most
SEEN = 2  # times, at least
CHARACTERS = 4096  # that are pieces of their own; rarer ones are written in bytes
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
END = "<|end|>"
# What chat templates mark turns with. An API may take these for such marks within a text too, whatever its model.
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|channel|>", "<|message|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<s>", "</s>", "[INST]", "[/INST]"),
)


def fit_tokenizer(texts: Iterable[str], task: Task) -> TextTokenizer:
    """Fits byte-pair encoding (Sennrich et al., 2016) to texts, and adds the task's values whole.

    A value's token begins with what stands before it, so that a text hardly ever holds it; a field is one choice then, and so
    is each label of a list. What the texts do not have is written in bytes. The usual control tokens are among its own, so that
    texts that hold them are known by the rule for those (`comments.special_tokens`).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    marks = [mark for name in task.lists for mark in task.list_marks(name)]
    written = "".join([*task.literals(), *marks, *(text for values in task.value_texts() for text in values)])
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        min_frequency=SEEN,
        limit_alphabet=CHARACTERS,
        initial_alphabet=sorted(set(written)),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = _with_bytes(tokenizer)
    tokenizer.add_tokens([AddedToken(value, normalized=False) for value in dict.fromkeys(_values(task))])
    tokenizer.add_special_tokens([END, *CONTROL])
    return TextTokenizer(tokenizer.to_str(), tokenizer.get_vocab()[END])


def _values(task: Task) -> Iterator[str]:
    for name, texts in zip(task.fields, task.value_texts(), strict=True):
        marks = task.list_marks(name)[:2] if name in task.lists else (task.format.key_separator,)
        yield from ["[]"] * (name in task.lists)
        yield from filter(None, texts) if name in task.optional else (mark + text for mark in marks for text in texts)


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The same with a token for each byte, which no trainer adds without making it a control token."""
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(content))
