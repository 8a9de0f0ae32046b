"""How like those it was trained on texts are to a student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from student.decode.familiarity import FILE, ROWS, Familiarity
from student.model.checkpoint import load_tensors, save_tensors

TRAINED_ON = [
    f"please {verb} my {thing}" for verb in ("open", "close", "freeze", "check") for thing in ("card", "account", "app")
]
HELD_OUT = [f"{verb} the {thing} now" for verb in ("open", "close", "freeze") for thing in ("card", "account", "app", "loan")]
STRANGE = ["def walk(self, rows): return rows", "η ζωή είναι ωραία", "9f86d081884c7d659a2feaa0c55ad015"]


def make() -> Familiarity:
    return Familiarity.fit(TRAINED_ON, HELD_OUT, np.linspace(0.5, 1, len(HELD_OUT)))


def test_strange_texts_are_less_familiar_than_held_out_ones_whatever_the_confidence() -> None:
    familiarity = make()
    strange = familiarity.of(STRANGE, np.full(3, 0.9))
    known = familiarity.of(TRAINED_ON, np.full(len(TRAINED_ON), 0.9))
    assert strange.max() < 0.4 < known.min()
    assert (familiarity.of(STRANGE, np.full(3, 0.1)) <= strange).all()


def test_as_many_held_out_texts_are_below_a_share_as_it_says() -> None:
    familiarity = make()
    found = familiarity.of(HELD_OUT, familiarity.confidence)
    for share in (0.1, 0.25, 0.5):
        assert np.mean(found < share) <= share
    assert found.min() < 0.25


def test_texts_are_looked_at_in_pieces_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make()
    monkeypatch.setattr("student.decode.familiarity.PIECE", 5)
    in_pieces = Familiarity.fit(TRAINED_ON, iter(HELD_OUT), whole.confidence)
    assert len(HELD_OUT) == 12
    assert in_pieces.unknown.tolist() == whole.unknown.tolist()


def test_it_is_the_rank_of_fishers_product() -> None:
    familiarity, confidence = make(), np.array([0.7])
    held_out = list(zip(familiarity.confidence, familiarity.unknown, strict=True))
    texts = ["freeze the boat now"]
    (unknown,) = Familiarity.fit(TRAINED_ON, texts, confidence).unknown

    def product(sure: float, new: float) -> float:
        return (1 + sum(other <= sure for other, _ in held_out)) * (1 + sum(other >= new for _, other in held_out))

    mine = product(0.7, unknown)
    expected = (1 + sum(product(*other) <= mine for other in held_out)) / (1 + len(held_out))
    assert familiarity.of(texts, confidence).tolist() == pytest.approx([expected])


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_any_text_has_one(texts: list[str]) -> None:
    found = make().of(texts, np.full(len(texts), 0.5))
    assert ((found > 0) & (found <= 1)).all()


def test_it_comes_back_from_disk_and_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `retort evaluate` first"):
        Familiarity.load(str(tmp_path))
    familiarity, confidence = make(), np.full(3, 0.9)
    familiarity.save(str(tmp_path))
    assert (tmp_path / FILE).stat().st_size < ROWS / 4
    assert Familiarity.load(str(tmp_path)).of(STRANGE, confidence).tolist() == familiarity.of(STRANGE, confidence).tolist()
    tensors = load_tensors(str(tmp_path / FILE))
    for change in ({"seen": tensors["seen"][:9]}, {"unknown": tensors["unknown"][1:]}, {"confidence": torch.ones(2, 2)}):
        save_tensors(str(tmp_path / FILE), tensors | change)
        with pytest.raises(UserError, match="damaged"):
            Familiarity.load(str(tmp_path))
