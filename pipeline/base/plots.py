"""Plots as SVG in data URIs, all in one style: as text in one page, their ids would collide."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import wrap
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.base.errors import printable

STUDENT, TRAIN, INK, PALE = "#1f5fa8", "#9db8d6", "#333333", "#cfcfcf"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "retort",
    "text.parse_math": False,  # names may hold dollar signs
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
WIDTH = 90  # characters that fit side by side below the widest plots


class Drawing:
    """A figure that becomes a data URI when its block ends."""

    uri = ""


@contextmanager
def svg(columns: int, width: float, height: float) -> Iterator[tuple[Drawing, list[Axes]]]:
    """A drawing and its axes, side by side; width and height in inches."""
    drawing = Drawing()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, in a font that has it
        figure = Figure(figsize=(width, height), layout="constrained")
        yield drawing, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    drawing.uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def fitted(text: str, width: int) -> str:
    """What two lines of so many characters hold of a text."""
    return "\n".join(wrap(printable(text), width, max_lines=2, placeholder="…", break_on_hyphens=False))
