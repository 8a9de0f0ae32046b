"""Readers: parity with transformers on tiny checkpoints of each family, n-grams, and students that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from pipeline.base.errors import UserError
from pipeline.comments.reading import Comment
from pipeline.shards.manifest import Shards
from student.config import PruneConfig, StudentConfig, TrainConfig
from student.data.examples import student_examples
from student.data.unpack import TEST, TRAIN
from student.decode.answerer import Answerer
from student.decode.decode import Decoder
from student.export.folder import ExportedStudent, write_folder
from student.export.measure import by_folder, by_onnx, by_pytorch, verify
from student.export.onnx import write_onnx
from student.model.checkpoint import Tensors, load_student, save_student
from student.model.reader import Ngrams, Pretrained, ngram_rows, side_by_side
from student.model.shape import ReaderShape
from student.prune.source import open_source
from student.train.loop import Loop, Training
from tests.numerics.workers import train
from tests.student.conftest import compiled, shards

__all__ = ["compiled", "shards"]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "LOUD", "quiet", "and", *map(str, range(10))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": len(WORDS)}
DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SMALL | {"max_position_embeddings": 64},
    "xlm-roberta": SMALL | {"max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 1},
    "modernbert": SMALL | {"max_position_embeddings": 64, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    "deberta-v2": SMALL
    | {"max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "qwen3": DECODER,
    "llama": DECODER,
    "gemma3_text": DECODER | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
DEBUG = StudentConfig(layers=1, width=32, heads=2, mlp=64)


def save_pretrained(folder: Path, family: str, **changes: Any) -> str:
    """A tiny model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(family, **FAMILIES[family] | changes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pretrained(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(params=["bert", "llama", "ngrams"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "ngrams" if request.param == "ngrams" else save_pretrained(tmp_path, request.param)


def trained(shards: Shards, reader: str, **changes: Any) -> Loop:
    """A training of a student with a reader, at its end."""
    exact = {"precision": "float32"}  # on all machines
    config = TrainConfig(**{"epochs": 3, "batch_size": 16, "reader_learning_rate": 3e-3, "seed": 1} | exact | changes)
    loop = Loop(Training.of(DEBUG.model_copy(update={"reader": reader}), config, shards), shards)
    list(loop.run())
    return loop


@torch.inference_mode()
def test_states_are_those_of_transformers(family: str, shards: Shards) -> None:
    student = Training.of(DEBUG.model_copy(update={"reader": family}), TrainConfig(), shards).student().eval()
    assert isinstance(student.reader, Pretrained)
    theirs = AutoModel.from_pretrained(family).eval()
    ids = student.reader.encode(["good and bad", "fine", "quiet and LOUD and quiet 12"])
    assert ids[1].tolist() == [2, WORDS.index("fine"), 3]
    together, lengths = side_by_side(ids)
    mask = torch.arange(together.shape[1]) < lengths[:, None]
    states = student.reader.model(input_ids=together, attention_mask=mask.long()).last_hidden_state
    for row, alone in enumerate(ids):
        truth = theirs(input_ids=torch.tensor([alone.tolist()])).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(alone)], truth, atol=1e-5, rtol=1e-5)
        vectors, counts = student.reader(*side_by_side([alone]))
        projected = student.reader.project(truth if counts > 1 else truth[-1:])
        torch.testing.assert_close(vectors[0], projected, atol=1e-5, rtol=1e-5)


def test_a_control_token_in_a_text_is_text_and_long_texts_are_cut(tmp_path: Path, shards: Shards) -> None:
    student = Training.of(
        DEBUG.model_copy(update={"reader": save_pretrained(tmp_path, "bert")}), TrainConfig(), shards
    ).student()
    assert isinstance(student.reader, Pretrained)
    ids, long = student.reader.encode(["good [SEP] [CLS] bad", "good " * 1000])
    assert not {WORDS.index("[CLS]"), WORDS.index("[SEP]"), WORDS.index("[PAD]")} & set(ids[1:-1].tolist())
    assert (len(long), long[-1]) == (64, WORDS.index("[SEP]"))


def test_a_student_with_a_reader_is_not_cut(tmp_path: Path, shards: Shards) -> None:
    student = Training.of(DEBUG.model_copy(update={"reader": "ngrams"}), TrainConfig(), shards).student()
    save_student(str(tmp_path), student, shards.compiled)
    with pytest.raises(UserError, match="has a reader of its own"):
        open_source(PruneConfig(source=str(tmp_path), fraction=0.5), "choices", shards)


def test_the_first_layers_alone(family: str, shards: Shards) -> None:
    one = DEBUG.model_copy(update={"reader": family, "reader_layers": 1})
    student = Training.of(one, TrainConfig(), shards).student()
    assert isinstance(student.reader, Pretrained)
    assert student.reader.model.config.num_hidden_layers == 1
    with pytest.raises(UserError, match=r"reader_layers is 3: .* has 2"):
        Training.of(DEBUG.model_copy(update={"reader": family, "reader_layers": 3}), TrainConfig(), shards)


def test_training_moves_every_weight_of_it(family: str, shards: Shards) -> None:
    before = Training.of(DEBUG.model_copy(update={"reader": family}), TrainConfig(), shards).student().state_dict()
    after = trained(shards, family, epochs=1).state().weights
    still = [name for name, weight in after.items() if name.startswith("reader.") and torch.equal(weight, before[name])]
    unused = [name for name in still if "embeddings" not in name]  # of positions or kinds that no text has
    assert not unused


def test_a_frozen_reader_stays_as_it_is(tmp_path: Path, shards: Shards) -> None:
    reader = save_pretrained(tmp_path, "bert")
    before = Training.of(DEBUG.model_copy(update={"reader": reader}), TrainConfig(), shards).student().state_dict()
    loop = trained(shards, reader, epochs=1, reader_learning_rate=0)
    after = loop.state().weights
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("reader.model."))
    assert not torch.equal(after["reader.project.weight"], before["reader.project.weight"])


def test_a_pretrained_reader_learns_in_small_batches_unless_told_otherwise(tmp_path: Path, shards: Shards) -> None:
    def batch_size(reader: str, **given: Any) -> int | None:
        return Training.of(DEBUG.model_copy(update={"reader": reader}), TrainConfig(**given), shards).config.batch_size

    folder = save_pretrained(tmp_path, "bert")
    assert [batch_size(reader) for reader in ("own", "ngrams", folder)] == [32, 32, 16]
    assert batch_size(folder, batch_size=8) == 8


@pytest.mark.parametrize("fast", [True, False])
def test_a_pretrained_reader_multiplies_in_bf16_where_that_is_fast(
    fast: bool, tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.train.strategy.fast_bf16", lambda device: fast)

    def bf16(reader: str, **given: Any) -> bool:
        training = Training.of(DEBUG.model_copy(update={"reader": reader}), TrainConfig(batch_size=16, **given), shards)
        return Loop(training, shards)._strategy._student.bf16

    folder = save_pretrained(tmp_path, "bert")
    assert [bf16(reader) for reader in ("own", "ngrams", folder)] == [False, False, fast]
    assert [bf16(folder, precision=precision) for precision in ("float32", "bf16")] == [False, True]


def test_layers_computed_again_give_the_same_gradients_and_keep_less(family: str, shards: Shards) -> None:
    def kept_numbers(checkpointing: bool) -> tuple[int, Tensors]:
        config = TrainConfig(batch_size=16, gradient_checkpointing=checkpointing, precision="float32")
        loop = Loop(Training.of(DEBUG.model_copy(update={"reader": family}), config, shards), shards)
        loop._strategy.module.train()
        kept = []
        batch = loop._train.batch(np.arange(16))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            torch.manual_seed(0)
            logits = loop._strategy.module(*batch.inputs)
        logits.square().sum().backward()
        return sum(kept), loop._strategy.gradients()

    whole, gradients = kept_numbers(False)
    less, again = kept_numbers(True)
    assert less < 0.8 * whole
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_of_ngrams_moves_as_far_as_its_gradient_says(shards: Shards) -> None:
    """And not as far as all others, however rarely it is seen."""
    loop = Loop(Training.of(DEBUG.model_copy(update={"reader": "ngrams"}), TrainConfig(batch_size=16), shards), shards)
    strategy, table = loop._strategy, loop._strategy._student.reader.embedding.weight
    before = table.detach().clone()
    strategy.backward(strategy.module(*loop._train.batch(np.arange(16)).inputs).square().mean() / 100)
    gradient = strategy.gradients()["reader.embedding.weight"]
    strategy.step(1e-3)
    seen = gradient.norm(dim=1) > 0
    ratio = (table - before)[seen].norm(dim=1) / gradient[seen].norm(dim=1)
    assert gradient[seen].norm(dim=1).max() > 3 * gradient[seen].norm(dim=1).min()
    assert ratio.max() < 1.2 * ratio.min()


def test_it_learns_decodes_as_it_trains_and_comes_back_from_disk(reader: str, shards: Shards, tmp_path: Path) -> None:
    loop = trained(shards, reader, epochs=30)
    assert loop.position.history[-1]["validation_answer_accuracy"] > 0.9
    model, compiled = loop._strategy._student.eval(), shards.compiled
    save_student(str(tmp_path / "student"), model, compiled)
    again, _ = load_student(str(tmp_path / "student"))
    examples = student_examples(shards, TEST, again)
    batch = examples.batch(np.arange(len(examples)))
    with torch.inference_mode():
        assert torch.equal(again(*batch.inputs), model(*batch.inputs))
    prefixes = [examples.prefix(i) for i in range(len(examples))]
    together = Decoder(again, compiled).constrained(prefixes)
    alone = [Decoder(again, compiled).constrained([prefix]) for prefix in prefixes]
    assert together.tokens == [one.tokens[0] for one in alone]
    np.testing.assert_allclose(together.confidence, [one.confidence[0] for one in alone], rtol=1e-4)
    rows = [Comment(i, text=examples.text(i)) for i in range(len(examples))]
    answers = Answerer(again, compiled).answer(rows)
    np.testing.assert_allclose([answer.confidence for answer in answers], together.confidence, atol=1e-5)


def test_a_training_goes_on_to_the_bit(reader: str, shards: Shards) -> None:
    config = TrainConfig(epochs=2, batch_size=16, seed=1)
    training = Training.of(DEBUG.model_copy(update={"reader": reader}), config, shards)
    whole, first, second = (Loop(training, shards) for _ in range(3))
    list(whole.run())
    next(report for report in first.run() if report.epoch_ended)
    second.go_on_from(first.state(), first.position)
    list(second.run())
    weights = second.state().weights
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.state().weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("family", ["bert", "ngrams"])
def test_two_workers_equal_one(family: str, strategy: str, shards: Shards, tmp_path: Path) -> None:
    reader = "ngrams"
    if family != "ngrams":  # without its own dropout, which each worker would draw for itself
        reader = save_pretrained(tmp_path / family, family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = TrainConfig(epochs=1, batch_size=16, reader_learning_rate=1e-3, strategy=strategy, precision="float32")
    training = Training.of(DEBUG.model_copy(update={"reader": reader}), config, shards)
    torch.multiprocessing.spawn(train, (2, str(tmp_path), shards.folder, training), nprocs=2)
    alone = Loop(
        Training.of(DEBUG.model_copy(update={"reader": reader}), config.model_copy(update={"strategy": "ddp"}), shards), shards
    )
    list(alone.run())
    ours = torch.load(tmp_path / "weights", weights_only=True)
    for name, weight in alone.state().weights.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reader", ["bert", pytest.param("llama", marks=pytest.mark.slow), "ngrams"], indirect=True)
def test_exports_give_its_answers(reader: str, shards: Shards, tmp_path: Path) -> None:
    loop = trained(shards, reader)
    source = ExportedStudent(loop._strategy._student.eval(), shards.compiled, None)
    examples = student_examples(shards, TRAIN, source.model).first(20)
    texts = [examples.text(i) for i in range(len(examples))]
    rows = [Comment(i, text=text, tokens=source.compiled.tokenizer.encode([text])[0]) for i, text in enumerate(texts)]
    student = by_pytorch(source, rows)
    (tmp_path / "folder").mkdir()
    write_folder(str(tmp_path / "folder"), source)
    folder = by_folder(str(tmp_path / "folder"), texts, shards.compiled.task)
    assert folder.values == student.values
    np.testing.assert_allclose(folder.confidence, student.confidence, atol=1e-4)
    write_onnx(str(tmp_path / "student.onnx"), source)
    verify(student, by_onnx(str(tmp_path / "student.onnx"), source, rows, 7))


@settings(max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_ngrams_of_a_text_do_not_depend_on_its_neighbours(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    for text, rows in zip(texts, ngram_rows(texts, 1 << 20), strict=True):
        assert sorted(rows) == sorted(ngram_rows([text], 1 << 20)[0])


def test_ngrams_are_words_pairs_and_runs_of_characters() -> None:
    (rows,) = ngram_rows(["A  bc"], 1 << 30)
    words = rows < 1 << 29
    assert len(set(rows[words].tolist())) == 2 + 1
    assert len(set(rows[~words].tolist())) == (2 + 1) + (3 + 2 + 1)  # of " a " and " bc "
    assert set(rows) == set(ngram_rows(["a bc"], 1 << 30)[0])


def test_what_stands_beside_a_word_is_a_word_of_its_own() -> None:
    def words(text: str) -> list[int]:
        rows = [row for row in ngram_rows([text], 1 << 30)[0].tolist() if row < 1 << 29]
        return rows[: (len(rows) + 1) // 2]  # behind them the pairs, one less

    assert len({row for text in ("what's", "fun", "!", "!!", "हिन्दी") for row in words(text)}) == 5
    assert words("What's fun!! (हिन्दी") == [row for part in ("what's", "fun", "!!", "(", "हिन्दी") for row in words(part)]


def test_words_and_runs_of_characters_count_alike() -> None:
    reader, (rows,) = Ngrams(ReaderShape("ngrams", 64, 8), 4), ngram_rows(["a bc"], 64)
    (vector,) = reader(torch.from_numpy(rows)[None].long(), torch.tensor([len(rows)]))[0][0]
    words, runs = (reader.embedding.weight[part].sum(0) / len(part) ** 0.5 for part in (rows[rows < 32], rows[rows >= 32]))
    torch.testing.assert_close(vector, words + runs)


def test_what_is_no_reader_is_refused_in_a_line(tmp_path: Path, shards: Shards) -> None:
    def refusal(reader: str) -> str:
        with pytest.raises(UserError) as error:
            Training.of(DEBUG.model_copy(update={"reader": reader}), TrainConfig(), shards).student()
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "no tokenizer.json" in refusal(str(tmp_path / "empty"))
    folder = Path(save_pretrained(tmp_path / "whole", "bert"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "weights in other files are not read" in refusal(str(folder))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    assert "an encoder or a decoder alone is wanted" in refusal(str(folder))
    assert "is no folder here, and the Hugging Face Hub does not give it" in refusal("nobody/nothing")
