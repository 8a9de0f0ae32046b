from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipeline.task.text_length import COMPOSED, characters_per_token
from pipeline.task.tokenization import UNLIMITED, TextTokenizer
from tests.conftest import END_ID, FACTORIES

Change = Callable[[Tokenizer], object]
WORDS = [
    "positive",
    "x",
    " ",
    "\n",
    "\t",
    "Ж",
    "é",
    "e\u0301",
    "α\u0314\u0301\u0345",
    "각",
    "日本",
    "😀",
    "ﷺ",
    "\x00",
    "\u200b",
    "İ",
]
WORDS += ["<eos>", "<start_of_turn>", "<added>", "ab", "▁", '"', "https://", "\ufffd", "a\u0327\u0301"]
texts = st.lists(st.tuples(st.sampled_from(WORDS) | st.characters(exclude_categories=["Cs"]), st.integers(1, 40))).map(
    lambda runs: "".join(word * times for word, times in runs)
)


def model(tokenizer: Tokenizer, **changes: object) -> None:
    """Changes a tokenizer's model, as its file would."""
    content = json.loads(tokenizer.to_str())
    content["model"] |= changes
    tokenizer.model = Tokenizer.from_str(json.dumps(content)).model


def without_byte_tokens(tokenizer: Tokenizer, **changes: object) -> None:
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    kept = [token for token in vocabulary if not token.startswith("<0x")]
    model(tokenizer, vocab={token: i for i, token in enumerate(kept)}, **changes)


def normalize(*steps: normalizers.Normalizer) -> Change:
    return lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Sequence(list(steps)))


def split(step: pre_tokenizers.PreTokenizer) -> Change:
    return lambda tokenizer: setattr(tokenizer, "pre_tokenizer", step)


def add(token: AddedToken) -> Change:
    return lambda tokenizer: tokenizer.add_tokens([token])


LIMITED: dict[str, tuple[str, Change]] = {
    "gemma": ("gemma", lambda _: None),
    "byte_level": ("byte_level", lambda _: None),
    "unknown characters one by one": ("gemma", lambda t: without_byte_tokens(t, byte_fallback=False, fuse_unk=False)),
    "composed": ("byte_level", normalize(normalizers.NFC())),
    "composed of others": ("byte_level", normalize(normalizers.NFKC(), normalizers.Lowercase())),
    "decomposed": ("byte_level", normalize(normalizers.NFKD(), normalizers.Prepend("x"))),
    "shortened": ("gemma", normalize(normalizers.Replace("positive", "po"), normalizers.Replace(" ", "▁"))),
    "an added token": ("byte_level", add(AddedToken("<added>" * 30, normalized=False))),
    "an added token that grows": ("byte_level", lambda t: (normalize(normalizers.NFKC())(t), add(AddedToken("ﷺ" * 9))(t))),
    "a control token that swallows": (
        "gemma",
        lambda t: t.add_special_tokens([AddedToken("<|user|>", rstrip=True, lstrip=True)]),
    ),
}
UNLIMITED_KINDS: dict[str, tuple[str, Change]] = {
    "unigram": ("metaspace", lambda _: None),
    "unknown characters together": ("gemma", lambda t: without_byte_tokens(t, byte_fallback=False, fuse_unk=True)),
    "unknown characters dropped": ("gemma", lambda t: without_byte_tokens(t, byte_fallback=False, unk_token=None)),
    "white space stripped": ("byte_level", normalize(normalizers.Strip())),
    "accents stripped": ("byte_level", normalize(normalizers.NFD(), normalizers.StripAccents())),
    "runs replaced": ("gemma", normalize(normalizers.Replace(Regex(" +"), "▁"))),
    "text replaced by nothing": ("gemma", normalize(normalizers.Replace("x", ""))),
    "white space between words": (
        "byte_level",
        split(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])),
    ),
    "words split off": ("gemma", split(pre_tokenizers.Split("x", "removed"))),
    "an added token that swallows": ("gemma", add(AddedToken("<added>", lstrip=True))),
    "words": ("gemma", lambda t: setattr(t, "model", models.WordLevel({"<unk>": 0}, "<unk>"))),
}


@cache
def changed(kind: str) -> TextTokenizer:
    base, change = (LIMITED | UNLIMITED_KINDS)[kind]
    tokenizer = FACTORIES[base]()
    change(tokenizer)
    return TextTokenizer(tokenizer.to_str(), END_ID)


@pytest.mark.parametrize("kind", LIMITED)
@settings(max_examples=100)
@given(text=texts)
def test_no_token_stands_for_more_characters_than_the_limit(kind: str, text: str) -> None:
    tokenizer = changed(kind)
    limit = characters_per_token(tokenizer._plain)
    assert limit is not None
    assert len(text) <= limit * len(tokenizer.encode([text])[0])


@pytest.mark.parametrize("kind", UNLIMITED_KINDS)
def test_a_tokenizer_that_may_drop_or_join_any_number_of_characters_has_no_limit(kind: str) -> None:
    assert characters_per_token(changed(kind)._plain) is None
    assert changed(kind).characters_per_token == UNLIMITED


def test_the_limit_is_the_longest_tokens_length(tokenizers: dict[str, TextTokenizer]) -> None:
    assert tokenizers["gemma"].characters_per_token == len("<start_of_turn>")
    assert changed("composed").characters_per_token == COMPOSED * tokenizers["byte_level"].characters_per_token


def test_unicode_composes_no_more_characters_and_drops_none() -> None:
    hangul = [chr(code) for code in range(0xAC00, 0xD7A4)]
    changing = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.decomposition(c)] + hangul
    assert max(len(unicodedata.normalize("NFD", c)) for c in changing) == COMPOSED
    assert all(unicodedata.normalize(form, c) for c in changing for form in ("NFD", "NFC", "NFKD", "NFKC"))
