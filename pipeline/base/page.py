"""Pages for people from templates, by one Jinja environment: HTML that needs nothing beside it, and Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from rich.markup import escape
from rich.table import Table

from pipeline.base.errors import printable

ROOT = Path(__file__).resolve().parents[2]


def percent(share: float | None) -> str:
    """A share, or a dash."""
    return "–" if share is None else f"{100 * share:.1f} %"


def rate(number: float | None, digits: int = 1) -> str:
    """A number with some digits behind the point, or a dash."""
    return "–" if number is None else f"{number:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


ENVIRONMENT = Environment(
    loader=FileSystemLoader(ROOT),
    autoescape=select_autoescape(["html.jinja"]),  # Markdown is not
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {
    "percent": percent,
    "duration": duration,
    "count": lambda number: "unknown" if number is None else f"{number:,}",
    "rate": rate,
    "json": lambda value: printable(json.dumps(value, ensure_ascii=False)),
    "text": lambda text: re.sub(r"([\\`*<>&|~$\[\]])", r"\\\1", printable(text)),  # what Markdown shows as it is
    "megabytes": lambda size: f"{size / 1e6:,.1f} MB",
}


def render(module: str, template: str, **values: Any) -> str:
    """A template that lies beside a module, filled in; HTML is escaped."""
    folder = Path(module).resolve().parent.relative_to(ROOT)
    return ENVIRONMENT.get_template(f"{folder}/{template}").render(values)


def table(title: str, rows: list[dict[str, str]]) -> Table:
    """Rows of cells by heading, for the terminal: the first column to the left, figures to the right."""
    made = Table(title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column, heading in enumerate(rows[0]):
        made.add_column(escape(heading), justify="right" if column else "left")
    for row in rows:
        made.add_row(*map(escape, row.values()))
    return made
