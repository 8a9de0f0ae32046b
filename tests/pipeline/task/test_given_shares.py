"""Shares of values as people and programs write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.task.given_shares import fit_shares
from pipeline.task.task import Task

TASK = Task(name="t", instruction="Judge.", fields={"mood": ["good", "bad", "so"], "loud": [True, False]})
ONE = Task(name="t", instruction="Judge.", fields={"stars": [1, 2, 3]})


@pytest.mark.parametrize("form", [lambda given: given, json.dumps])
def test_each_form_is_read(form: Any) -> None:
    mapping = {"loud": {"true": 0.25, "false": 0.75}, "mood": {"good": 0.6, "bad": 0.2}}
    listed = {
        "mood": [{"value": "good", "share": 0.6}, {"value": "bad", "share": 0.2}],
        "loud": [{"value": True, "share": 0.25}],
    }
    for given in (mapping, listed):
        assert fit_shares(TASK, form(given)) == [pytest.approx([0.6, 0.2, 0.2]), pytest.approx([0.25, 0.75])]
    assert fit_shares(ONE, form({"1": 0.5, "2": 0.5, "3": None})) == [pytest.approx([0.5, 0.5, 0])]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mood": {"good": 1}}, "not an object with mood and loud"),
        ({"mood": {"fine": 1}, "loud": {"true": 1}}, "mood: 'fine' is none of its 3 values"),
        ({"mood": {"good": 2}, "loud": {"true": 1}}, "mood: the share of 'good' is 2, not from 0 to 1"),
        ({"mood": {"good": 0.9, "bad": 0.9}, "loud": {"true": 1}}, "mood: its shares are 1.8 together"),
        ({"mood": {}, "loud": {"true": 1}}, "mood: its shares are 0 together"),
        ("[]", "it is no object"),
    ],
)
def test_what_does_not_fit_is_said(given: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fit_shares(TASK, given)
