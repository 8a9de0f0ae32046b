"""The page of all settings, made from the configuration: `python -m tests.settings_page` writes docs/settings.md."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterSettings
from tests.tiny import ROOT

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every key of a `--config` file, and of `--set KEY=VALUE`. An unknown key is an error. `null` leaves a choice to Retort.
The task's own file is explained in [`tasks/reddit_sentiment.yaml`](../tasks/reddit_sentiment.yaml).
"""


def render() -> str:
    """The page."""
    sections = {name: field for name, field in ClusterSettings.model_fields.items() if is_section(field)}
    top = {name: field for name, field in ClusterSettings.model_fields.items() if name not in sections}
    parts = [HEAD, table("", top)]
    for name, field in sections.items():
        about = str(field.annotation.__doc__).strip().split("\n")[0]
        parts.append(f"## {name}\n\n{about}\n\n{table(f'{name}.', field.annotation.model_fields)}")
    return "\n".join(parts)


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [f"| `{prefix}{name}` | `{shown(field.default)}` | {meaning(field)} |\n" for name, field in fields.items()]
    return "| key | default | |\n| --- | --- | --- |\n" + "".join(rows)


def shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def meaning(field: FieldInfo) -> str:
    choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
    parts = [", ".join(choices), (field.description or "").replace("|", "\\|")]
    return ": ".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(render())
