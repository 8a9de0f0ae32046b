"""Tiny tokenizers, one of each kind met in the wild, a teacher that knows its task, and a cache to throw away."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Browser
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.comments.reading import KEPT, Columns, read_file
from pipeline.demo.build import build_demo
from pipeline.task.tokenization import TextTokenizer
from tests.browser import CHROMIUM, chromium

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; children take it over
settings.register_profile("retort", deadline=None)  # the machine may be busy
settings.load_profile("retort")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, which tests send

LONGEST = ["test_cluster", "test_tune", "test_run", "test_prune", "test_engines"]  # of tests/integration
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
END_ID = SPECIAL.index("<end_of_turn>")

# Answers in several formats and plain text, so that merges span quotes, separators and the ends of values.
LINES = [
    '{"sentiment": "positive", "tone": "joy", "emotion": "love"}',
    '{"sentiment": "negative", "tone": "anger", "emotion": "anger"}',
    '{"sentiment": "neutral", "tone": "neutral", "emotion": "neutral"}',
    '{"sentiment": "positive", "toxicity": "none", "safe": true, "score": 10}',
    '{"sentiment": "negative", "toxicity": "high", "safe": false, "score": 1}',
    '{"a": "a", "b": "ab", "ab": "abc", "b": null, "a": 12, "b": 123}',
    '{"a":"a","b":"ab","ab":"abc","b":null,"a":12,"b":123}',
    '```json\n{\n  "sentiment": "positive",\n  "tone": "joy"\n}\n```',
    "Judge this comment. Answer with one JSON object.\n\nI love it, it is the best of all ✓",
    "user\nmodel\n",
    "0123456789 -.+\\ : é 日本語 😀 the rest of the alphabet: bcdfghjkpqvwxz",
] * 4

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Gemma's: the BOS token, then turns whose content is trimmed.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma_tokenizer() -> Tokenizer:
    """Gemma-shaped: BPE over the whole text with byte fallback. Its Split never splits: no space is left to split at."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL + byte_tokens, max_token_length=9, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def byte_level_tokenizer() -> Tokenizer:
    """Llama-3-shaped: byte-level BPE within the words of a regex; its post-processor trims spaces off the offsets."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """T5-shaped: Unigram behind Metaspace. It cannot write characters it was not trained on."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=180, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


FACTORIES: dict[str, Callable[[], Tokenizer]] = {
    "gemma": gemma_tokenizer,
    "byte_level": byte_level_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own: none touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETORT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, TextTokenizer]:
    """A tokenizer of each kind."""
    return {kind: TextTokenizer(factory().to_str(), END_ID) for kind, factory in FACTORIES.items()}


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    """The Gemma-shaped one, where a test needs any."""
    return tokenizers["gemma"]


@pytest.fixture(scope="session", params=FACTORIES)
def any_tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    """Each kind in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session", params=["gemma", "byte_level"])
def bpe_tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    """Each kind of BPE in turn."""
    return tokenizers[request.param]


def chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A teacher's tokenizer as transformers loads it, with a Gemma-like chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session", params=["gemma", "byte_level"])
def chat(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A chat tokenizer over each kind of BPE."""
    return chat_tokenizer(FACTORIES[request.param]())


@dataclass(frozen=True)
class RealCase:
    """A teacher that has learnt its task, and comments it was not fitted on where there are such."""

    teacher: Path
    task: Path
    comments: Path

    def texts(self, count: int) -> list[str]:
        """The first comments that can be read."""
        rows = read_file(str(self.comments), Columns("body", "id"))
        return list(islice((row.text for row in rows if row.status == KEPT), count))


@pytest.fixture(scope="session")
def real_case(tmp_path_factory: pytest.TempPathFactory) -> RealCase:
    """The small real teacher of ../shared with its comments; without that folder, the demo's."""
    if SHARED.is_dir():
        comments = SHARED / "data/reddit_comments/dev.jsonl.gz"
        return RealCase(SHARED / "teacher/reddit", ROOT / "tasks/goemotions.yaml", comments)
    paths = build_demo(str(tmp_path_factory.mktemp("demo")))
    return RealCase(Path(paths[1]), ROOT / "tasks/demo.yaml", Path(paths[0]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest, so that the workers end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def browser() -> Iterator[Browser]:
    """For one test: while Playwright is at work, its thread can run no event loop of another's."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with chromium() as found:
        yield found
