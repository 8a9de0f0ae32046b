"""What users may call a field, a value, a run or a setting: names that broke something once, and drawings of them."""

from __future__ import annotations

from base64 import b64decode
from types import NoneType
from typing import Any, get_args
from xml.etree import ElementTree

from pydantic import BaseModel

NAMES = [
    "price_$5_to_$9",
    r"$\frac{",
    "_hidden",
    "",
    "bell \x07, nul \x00, escape \x1b[31m",
    "two\nlines",
    "x" * 500,
    "many words " * 50,
    "שלום",
    "\u202eturned round",
    "日本語 😀",
    "100 % {0} {{ 7 * 7 }} %s",
    "<script>alert('x')</script> & \"more\"",
    "[red] and [/x]",
    "a|b *c* `d`",
    "../..",
]


def drawn(uri: str) -> str:
    """The SVG of a data URI: well-formed, and without a number or a name that is written as mathematics."""
    svg = b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()
    ElementTree.fromstring(svg)
    assert "mathdefault" not in svg
    assert "<script" not in svg
    return svg


def left_open(settings: type[BaseModel]) -> dict[str, Any]:
    """Null for each setting that may be null."""
    return {name: None for name, field in settings.model_fields.items() if NoneType in get_args(field.annotation)}
