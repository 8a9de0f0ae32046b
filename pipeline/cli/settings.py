"""The whole configuration, put together from a YAML file, `--set` and a command's own options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.base.config import describe
from pipeline.base.errors import UserError, clip
from pipeline.base.yaml_files import parse_yaml, read_yaml

if TYPE_CHECKING:
    from cluster.config import ClusterSettings

PRESETS = Path(__file__).parent / "presets"


def load_config(path: str | None, overrides: list[str], options: dict[str, Any], preset: str | None = None) -> ClusterSettings:
    """Configuration from a preset, a YAML file, `key.path=value` overrides, and the command's own options, each over the last.

    Raises:
        UserError: an unknown key or a value of the wrong kind, by name.
    """
    from cluster.config import ClusterSettings

    content = read_yaml(str(PRESETS / f"{preset}.yaml")) if preset else {}
    _merge(content, read_yaml(path) if path else {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes key.path=value, not {clip(override)!r}")
        _put(content, key, parse_yaml(value, f"--set {clip(override)}"))
    for key, value in options.items():
        _put(content, key, value)
    try:
        return ClusterSettings.model_validate(content)
    except ValidationError as error:
        raise UserError(f"the configuration is wrong:\n{describe(error)}") from error


def _merge(content: dict[str, Any], others: dict[str, Any]) -> None:
    for key, value in others.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _merge(content[key], value)
        else:
            content[key] = value


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        if content.get(parent) is None:
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise UserError(f"{clip(path)}: {clip(parent)} holds a value, not keys")
    content[leaf] = value
