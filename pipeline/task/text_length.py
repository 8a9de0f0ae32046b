"""How many characters of a text one token stands for at most, so that a text far too long need not be tokenized."""

from __future__ import annotations

import json
import math
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
KEEPING = {"NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"}  # normalizers that make no fewer characters of a text
COMPOSING = {"NFC", "NFKC"}
COMPOSED = 4  # characters of which Unicode composes one at most
CUTTING = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}  # pre-tokenizers that drop nothing; these two may:
DROPPING = {"Split", "Punctuation"}


def characters_per_token(tokenizer: Tokenizer) -> int | None:
    """Characters of a text that one of its tokens stands for at most.

    Returns:
        None where there may be any number: white space that is dropped, unknown words that are one token. Only what is
        known to have a limit has one.
    """
    shrink = _shrink(_state(tokenizer.normalizer))
    longest = _longest(tokenizer)
    return longest * shrink if longest and shrink and _keeps(_state(tokenizer.pre_tokenizer)) else None


def _state(part: Any) -> dict[str, Any] | None:
    return json.loads(part.__getstate__()) if part else None


def _shrink(normalizer: dict[str, Any] | None) -> int | None:
    """Characters of a text that become one at most."""
    kind = normalizer["type"] if normalizer else "Prepend"
    if kind == "Sequence" and normalizer:
        parts = [_shrink(part) for part in normalizer["normalizers"]]
        return None if None in parts else math.prod(filter(None, parts))
    if kind == "Replace" and normalizer:
        replaced, content = normalizer["pattern"].get("String"), normalizer["content"]
        return max(1, math.ceil(len(replaced) / len(content))) if replaced and content else None
    return {**dict.fromkeys(KEEPING, 1), **dict.fromkeys(COMPOSING, COMPOSED)}.get(kind)


def _keeps(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether all of a text is in one of its words."""
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_keeps, pre_tokenizer["pretokenizers"]))
    return kind in CUTTING or (kind in DROPPING and pre_tokenizer["behavior"] != "Removed")


def _longest(tokenizer: Tokenizer) -> int | None:
    """Characters of the longest token; None where unknown characters may be dropped, or become one token together."""
    model, vocabulary = tokenizer.model, tokenizer.get_vocab(with_added_tokens=False)
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    if type(model).__name__ != "BPE" or any(token.lstrip or token.rstrip for token in added):
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:  # each character is unknown in some places
        return None
    bytes_known = _in_bytes(tokenizer) and vocabulary.keys() >= set(ByteLevel.alphabet())
    fallback_known = model.byte_fallback and vocabulary.keys() >= BYTE_TOKENS
    if not (bytes_known or fallback_known) and (model.unk_token is None or model.fuse_unk):
        return None
    return max(map(len, [*vocabulary, *(text for token in added for text in _texts(token, tokenizer))]))


def _in_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the model sees nothing but bytes."""
    last = [_state(part) or {} for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
    return any((part.get("normalizers") or part.get("pretokenizers") or [part])[-1].get("type") == "ByteLevel" for part in last)


def _texts(token: AddedToken, tokenizer: Tokenizer) -> list[str]:
    """What a text holds where an added token is found, before or after it is normalized."""
    normalized = tokenizer.normalizer.normalize_str(token.content) if tokenizer.normalizer else token.content
    return [token.content, normalized]
